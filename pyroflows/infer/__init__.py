"""Inference: from a model to a posterior, and whether to trust it."""

from . import distributed
from .checkpoint import Checkpoint
from .comparison import Evidence, compare, evidence
from .density import DensityReport, fit_density
from .fit import fit_posterior
from .log_density import LogDensity
from .mcmc import Chains, flow_mc, neutra
from .objectives import FAB, MMD, ChiSquareBound, ForwardKL, ImportanceWeightedBound, Objective, PathELBO, RenyiBound
from .posterior import Posterior, Rung, load_posterior
from .training import TrainingReport, train
from .verdict import Verdict

__all__ = [
    "FAB",
    "MMD",
    "Chains",
    "Checkpoint",
    "ChiSquareBound",
    "DensityReport",
    "Evidence",
    "ForwardKL",
    "ImportanceWeightedBound",
    "LogDensity",
    "Objective",
    "PathELBO",
    "Posterior",
    "RenyiBound",
    "Rung",
    "TrainingReport",
    "Verdict",
    "compare",
    "distributed",
    "evidence",
    "fit_density",
    "fit_posterior",
    "flow_mc",
    "load_posterior",
    "neutra",
    "train",
]
