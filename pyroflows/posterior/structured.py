"""The rung of models with globals and locals: a flow for the globals, normals for the locals."""

from __future__ import annotations

import math

import torch

from ..guides import AutoStructuredFlow
from ..guides.marginal_mode import MarginalMode, find_marginal_mode
from ..guides.surrogate import PolynomialDensity
from ..model.density import LogDensity
from ..model.sites import sample_nodes
from ..model.structure import Structure, find_structure
from ..train.marginal import MarginalFit
from ..train.objectives import PathELBO
from ..train.training import PARTICLES, STEP_SIZE, WHITENING_STEP_SIZE
from .climb import Climb
from .gaussian import Gaussian
from .marginal_census import find_flat_ridge

__all__ = ["make_structured", "train_structured"]

# Smaller models cost next to nothing by the other rungs.
LEAST_FEATURES = 8
# A flow on a polynomial follows so many globals.
MOST_GLOBALS = 24
# A model without locals is worth it from so many observed numbers on.
MANY_ROWS = 4096
# With so many, integrals are dear, and their difference from Laplace's approximation is simple.
DEAR_ROWS = 16_384
# Rows for each local by which it may be nearly normal.
CROWD = 100
# Steps of Newton's method for each value of the search for the mode then, which goes on from where
# the last ones have led.
FEW_STEPS = 1
# So much wider than the curvature at their mode says is the design of globals with a core: their
# scales have long thin tails.
LONG_TAILED = 1.6
# Widths of a mode that are less come from a density with jumps, where locals change their modes.
NARROWEST = 1e-5


def make_structured(climb: Climb) -> AutoStructuredFlow | None:
    """Makes the guide that follows the structure of a model; ``None`` if it has none to follow, or
    if its globals have no mode."""
    if not _may_have_structure(climb):
        return None
    try:
        structure = find_structure(climb.density)
        if not _is_of_use(structure, climb.density):
            return None
        guide = AutoStructuredFlow.of(climb.density, structure)
        start_structured(climb, guide)
    except ValueError as error:
        climb.obstacle = error
        return None  # the other rungs need no structure
    return guide


def start_structured(climb: Climb, guide: AutoStructuredFlow) -> None:
    """Starts a guide at the mode of its globals, and looks at their density around it.

    Args:
        climb: The fit, which keeps what it sees.
        guide: The guide.

    Raises:
        ValueError: If the globals have no mode.
    """
    marginal, rows = guide.marginal, _count_rows(climb.density)
    # So many rows for each local may make it nearly normal.
    crowded = not marginal.is_normal and rows >= max(DEAR_ROWS, CROWD * len(marginal.reference))
    mode = find_marginal_mode(marginal.with_steps(FEW_STEPS) if crowded else marginal)
    guide.start_at(mode)
    regressed = crowded and mode.found and guide.regress_locals() is not None
    # Around a pole there is nothing to integrate.
    integrable = not regressed and (mode.found or not _is_narrow(mode))
    if integrable and guide.integrate_leaves() is not None:
        mode = _mode_of_integrals(guide, mode)
        guide.start_at(mode)
    if not mode.found and not _is_flat(guide, mode):
        raise ValueError(
            "Expected globals whose density has a mode, with the locals integrated out; the search "
            f"found none in {mode.rounds} rounds."
        )
    if not regressed:
        guide.repeat_locals()
    if guide.core is not None:
        mode = mode._replace(root=LONG_TAILED * mode.root)
    climb.marginal_fit = MarginalFit(guide.log_marginal, mode, climb.density.initial)


def _mode_of_integrals(guide: AutoStructuredFlow, laplace: MarginalMode) -> MarginalMode:
    """The mode of the globals with the locals integrated by quadrature."""
    if laplace.found and _count_rows(guide.marginal.density) >= DEAR_ROWS:
        regressed = guide.regress_leaves()
        near = None if regressed is None else regressed.move_mode(laplace)
        if near is not None:
            return near
    integrated = guide.leaves or guide.marginal
    return find_marginal_mode(integrated, start=laplace.loc, reference=laplace.reference)


def _is_flat(guide: AutoStructuredFlow, mode: MarginalMode) -> bool:
    """Whether there is no mode because the density does not fall off, which a verdict tells."""
    if _is_narrow(mode):
        return False  # so near by, nothing falls off
    fit = Gaussian(mode.loc, mode.root, math.nan)
    return find_flat_ridge(guide.log_marginal, fit) is not None


def _is_narrow(mode: MarginalMode) -> bool:
    return float(torch.linalg.svdvals(mode.root).amin()) < NARROWEST


def train_structured(climb: Climb, guide: AutoStructuredFlow, steps: int) -> int:
    """Trains the flow of the globals on a polynomial, and returns how many steps it took."""
    objective = PathELBO(PARTICLES)

    def train(surrogate: PolynomialDensity, share: float) -> int:
        return climb.train_in_place(
            surrogate,
            guide.flow,
            steps,
            objective=objective,
            step_size=share * STEP_SIZE,
            whitening_step_size=share * WHITENING_STEP_SIZE,
        )

    if guide.core is None:
        return climb.marginal_fit.train(guide.flow, train)
    # Scales of a core have thin tails many widths of the mode long, which few draws do not show.
    return climb.marginal_fit.train(guide.flow, train, good=1.0)


def _may_have_structure(climb: Climb) -> bool:
    density = climb.density
    # Another objective is there for a flow over all latents.
    chosen = not isinstance(climb.settings.get("objective", PathELBO(PARTICLES)), PathELBO)
    return (
        density.features >= LEAST_FEATURES
        and density.batched
        and not (density.streamed or density.centres or chosen)
    )


def _is_of_use(structure: Structure, density: LogDensity) -> bool:
    if not 0 < len(structure.globals) <= MOST_GLOBALS:
        return False
    return len(structure.locals) > 0 or _count_rows(density) >= MANY_ROWS


def _count_rows(density: LogDensity) -> int:
    """How many numbers are observed."""
    nodes = dict(sample_nodes(density.trace()))
    return sum(torch.as_tensor(nodes[name]["value"]).numel() for name in density.observed)
