"""From a model to a posterior, and whether to trust it."""

from .chains import Chains, flow_mc, neutra
from .comparison import Evidence, compare, evidence
from .fit import fit_posterior
from .posterior import Posterior, Rung, load_posterior
from .verdict import Verdict

__all__ = [
    "Chains",
    "Evidence",
    "Posterior",
    "Rung",
    "Verdict",
    "compare",
    "evidence",
    "fit_posterior",
    "flow_mc",
    "load_posterior",
    "neutra",
]
