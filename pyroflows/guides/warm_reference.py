"""Where Newton's method begins for the locals, given the globals."""

from __future__ import annotations

import torch
from torch import Tensor

from .marginal_mode import Integrated

__all__ = ["WarmReference", "regress_reference"]

# Whitened globals are taken no further from the mode: the mean of the locals bends there.
FARTHEST = 3.0


class WarmReference:
    r"""The mean of the locals as an affine function of the whitened globals.

    .. math:: x_0(g) = a + B u, \quad u = L^{-1} (g - g^*)

    A few steps of Newton's method from there do as well as many from one point.

    Args:
        loc: The globals :math:`g^*`, of shape ``(features,)``.
        root: The lower root :math:`L` of their covariance.
        constant: The locals :math:`a`, of shape ``(locals,)``.
        slopes: The matrix :math:`B^\top`, of shape ``(features, locals)``.
    """

    def __init__(self, loc: Tensor, root: Tensor, constant: Tensor, slopes: Tensor) -> None:
        self.loc, self.root, self.constant, self.slopes = loc, root, constant, slopes

    def __call__(self, g: Tensor) -> Tensor:
        """The locals at globals of shape ``(*, features)``, of shape ``(*, locals)``."""
        u = self.whiten(g).clamp(-FARTHEST, FARTHEST)
        return self.constant.to(g) + u @ self.slopes.to(g)

    def whiten(self, g: Tensor) -> Tensor:
        """The whitened globals, of shape ``(*, features)``."""
        centred = (g - self.loc.to(g)).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.root.to(g), centred, upper=False).squeeze(-1)


def regress_reference(
    marginal: Integrated, loc: Tensor, root: Tensor, reference: Tensor
) -> WarmReference:
    """Regresses the mean of the locals on the globals.

    The design has the mode, and a whitened unit to both sides along each axis.

    Args:
        marginal: The marginal density.
        loc: Its mode, of shape ``(features,)``.
        root: The lower root of the covariance there, of shape ``(features, features)``.
        reference: The mean of the locals there, of shape ``(locals,)``.

    Returns:
        The affine function.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> from pyroflows.model.structure import find_structure
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", 2):
        ...         effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(effect, 1.0), obs=y)
        >>> density = LogDensity(model, (torch.tensor([0.0, 2.0]),))
        >>> marginal = Marginal(density, find_structure(density))
        >>> at = torch.zeros(1).double(), torch.eye(1).double(), torch.zeros(2).double()
        >>> warm = regress_reference(marginal, *at)
        >>> warm(torch.ones(1).double())
        tensor([0.5000, 1.5000], dtype=torch.float64)
    """
    units = torch.eye(len(loc)).to(root)
    design = torch.cat([0 * units[:1], units, -units])
    _, means = marginal.evaluate(loc + design @ root.mT, reference)
    means = means.where(means.isfinite().all(-1, keepdim=True), reference)
    up, down = means[1:].chunk(2)
    return WarmReference(loc, root, means.mean(0), (up - down) / 2)
