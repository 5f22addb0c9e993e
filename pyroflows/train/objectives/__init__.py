"""What flows are trained for: losses of ``SVI``, of ``fit_posterior`` and of any distribution.

Bounds on the evidence need the model only: :class:`PathELBO`, :class:`ImportanceWeightedBound`,
:class:`RenyiBound`, :class:`ChiSquareBound`. :class:`FAB` makes draws of the posterior by
annealing; :class:`ForwardKL` and :class:`MMD` are given such draws, by MCMC, say.
"""

from .bounds import ChiSquareBound, ImportanceWeightedBound, PathELBO, RenyiBound
from .draws import MMD, ForwardKL
from .fab import FAB
from .objective import Objective

__all__ = [
    "FAB",
    "MMD",
    "ChiSquareBound",
    "ForwardKL",
    "ImportanceWeightedBound",
    "Objective",
    "PathELBO",
    "RenyiBound",
]
