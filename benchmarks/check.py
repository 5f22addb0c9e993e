r"""Check of the Pyro models against reference draws by the gradient identities.

If draws v come from the density exp(f) on an unbounded space, with g = grad f, then E[g] = 0 and
E[v g'] = -I. Both are tested over the reference draws, mapped to the unconstrained scale and whitened, in
units of their Monte Carlo error. A wrong prior, likelihood or Jacobian shows as a large z-score. The centred
eight schools' gradients are too heavy-tailed for that; its log density is compared, draw by draw, with the
non-centred one's plus the Jacobian of z -> theta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.models import MODELS
from benchmarks.posteriordb import Reference, unflatten
from pyroflows.model.density import LogDensity

CENTERED = "eight_schools-eight_schools_centered"
NONCENTERED = "eight_schools-eight_schools_noncentered"
MAX_Z = 4.0
MAX_DIFFERENCE = 1e-8


@dataclass(frozen=True)
class Check:
    """The outcome for one model.

    Args:
        name: The posterior's name.
        z_gradient: Largest |z-score| of E[g] = 0, over the D directions, or None.
        z_stein: Largest |z-score| of E[v g'] = -I, over the D^2 entries, or None.
        difference: Largest |difference| from the log density that the model is compared with, or None.
    """

    name: str
    z_gradient: float | None = None
    z_stein: float | None = None
    difference: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the model agrees with the reference draws."""
        limits = (
            (self.z_gradient, MAX_Z),
            (self.z_stein, MAX_Z),
            (self.difference, MAX_DIFFERENCE),
        )
        return all(value < limit for value, limit in limits if value is not None)


def check(reference: Reference) -> Check:
    """Check one model against its reference draws.

    Args:
        reference: Data and reference draws of a posterior in `benchmarks.models.MODELS`.

    Returns:
        The z-scores or, for the centred eight schools, the difference of log densities.
    """
    z, value, gradient = evaluate(reference, reference.name)
    if reference.name == CENTERED:
        return Check(CENTERED, difference=_difference_from_noncentered(reference, value))
    return Check(reference.name, *identity_z_scores(z, gradient))


def evaluate(reference: Reference, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate a model at the reference draws.

    Args:
        reference: Data and reference draws.
        name: The model, a key of `benchmarks.models.MODELS`.

    Returns:
        The draws on the unconstrained scale, `(N, D)`, the log density there, `(N,)`, and its gradient, `(N,
        D)`.
    """
    entry = MODELS[name]
    stan = {key: torch.as_tensor(array) for key, array in unflatten(reference.draws).items()}
    density = LogDensity(entry.model, kwargs=entry.kwargs(reference.data))
    z = density.unconstrain(entry.from_stan(stan))
    return z, *density.value_and_grad(z)


def identity_z_scores(z: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Return the largest |z-score| of E[g] = 0 and of E[v g'] = -I, v the whitened draws.

    Args:
        z: Independent draws, `(N, D)`.
        gradient: Gradients of their log density, `(N, D)`.
    """
    root = torch.linalg.cholesky(torch.cov(z.T).reshape(z.shape[1], z.shape[1]))
    v = torch.linalg.solve_triangular(root, (z - z.mean(0)).T, upper=False).T
    g = gradient @ root
    outer = v[:, :, None] * g[:, None, :] + torch.eye(z.shape[1], dtype=z.dtype)
    return _largest_z(g), _largest_z(outer.flatten(1))


def _largest_z(samples: Tensor) -> float:
    return float((samples.mean(0) / (samples.std(0) / len(samples) ** 0.5)).abs().max())


def _difference_from_noncentered(reference: Reference, centered: Tensor) -> float:
    _, noncentered, _ = evaluate(reference, NONCENTERED)
    log_tau = torch.as_tensor(reference.draws["tau"]).log()
    schools = sum(name.startswith("theta[") for name in reference.draws)
    return float((centered + schools * log_tau - noncentered).abs().max())


def table(checks: Sequence[Check]) -> str:
    """Format the outcomes as a table.

    Args:
        checks: The outcomes.
    """
    lines = [_line("posterior", "|z| E[g]", "|z| E[vg']", "max diff", "ok")]
    for c in checks:
        numbers = (_show(c.z_gradient, ".2f"), _show(c.z_stein, ".2f"), _show(c.difference, ".1e"))
        lines.append(_line(c.name, *numbers, "yes" if c.ok else "NO"))
    return "\n".join(lines)


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(name: str, *cells: str) -> str:
    return f"{name:42s}" + " ".join(f"{cell:>10s}" for cell in cells)
