"""Where Newton's method begins for the locals, given the globals."""

from __future__ import annotations

import torch
from torch import Tensor

from .marginal import Marginal
from .marginal_mode import Integrated

__all__ = ["WarmReference", "regress_reference", "regress_shift"]

# Whitened globals are taken no further from the mode: the mean of the locals bends there.
FARTHEST = 3.0
# Draws of the locals and their opposites by which their mean is found, and steps towards it.
PAIRS, STEPS = 32, 2


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
    _, means = marginal.evaluate(_design(loc, root), reference)
    means = means.where(means.isfinite().all(-1, keepdim=True), reference)
    return _regress(loc, root, means)


@torch.no_grad()
def regress_shift(marginal: Marginal, warm: WarmReference, seed: int = 0) -> WarmReference:
    r"""Regresses on the globals by how much the mean of the locals differs from their mode.

    With a normal distribution about :math:`m` whose precision :math:`H` is that at the mode, the
    divergence from it to the locals given the globals is least where :math:`\mathbb{E}_q[\nabla_x
    \log p] = 0`, to which Newton's method goes by

    .. math:: m \leftarrow m + H^{-1}\, \mathbb{E}_q [\nabla_x \log p(x, g)].

    Where many locals are a little skew, this takes most of the noise from their weights.

    Args:
        marginal: The marginal density.
        warm: Where the locals begin.
        seed: Seed of the draws.

    Returns:
        The difference as an affine function.

    Reference:
        Opper, Archambeau, "The variational Gaussian approximation revisited", 2009,
        https://doi.org/10.1162/neco.2008.08-07-592
    """
    g = _design(warm.loc, warm.root)
    given = marginal.condition(g, warm(g))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(PAIRS, *given.mean.shape, generator=generator).to(given.mean)
    shift = torch.zeros_like(given.mean)
    for _ in range(STEPS):
        slope = torch.zeros_like(shift)
        for one in noise:
            about = given.normal.draw_centred(one)
            for centred in (about, -about):
                found = marginal.value_and_slopes(g, given.mean + shift + centred)[1]
                slope += found.nan_to_num(0.0, 0.0, 0.0) / (2 * PAIRS)
        shift = shift + given.normal.solve(slope)
    return _regress(warm.loc, warm.root, shift.nan_to_num(0.0, 0.0, 0.0))


def _design(loc: Tensor, root: Tensor) -> Tensor:
    """The mode, and a whitened unit to both sides along each axis."""
    units = torch.eye(len(loc)).to(root)
    return loc + torch.cat([0 * units[:1], units, -units]) @ root.mT


def _regress(loc: Tensor, root: Tensor, values: Tensor) -> WarmReference:
    """The affine function nearest to values at the points of the design."""
    up, down = values[1:].chunk(2)
    return WarmReference(loc, root, values.mean(0), (up - down) / 2)
