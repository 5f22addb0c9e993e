"""From a model to a posterior, and whether to trust it."""

from .amortized import AmortizedPosterior, fit_amortized
from .chains import Chains, flow_mc, neutra
from .checks import Check
from .climb import Rung
from .comparison import compare
from .evidence import Evidence, evidence
from .fit import fit_posterior
from .judge import judge
from .loading import load_posterior
from .posterior import Attempt, Posterior
from .verdict import Finding, Verdict

__all__ = [
    "AmortizedPosterior",
    "Attempt",
    "Chains",
    "Check",
    "Evidence",
    "Finding",
    "Posterior",
    "Rung",
    "Verdict",
    "compare",
    "evidence",
    "fit_amortized",
    "fit_posterior",
    "flow_mc",
    "judge",
    "load_posterior",
    "neutra",
]
