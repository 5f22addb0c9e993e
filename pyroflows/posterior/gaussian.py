"""Gaussian fits of a log density, to start flows from."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._deadline import TimeOver
from ..model.density import LogDensity
from ..transforms.roots import Root, join_roots, pick_root

__all__ = ["Gaussian", "Gaussians", "antithetic_noise", "fit_gaussians"]


# Where a density does not fall off, the widths grow until they overflow.
WIDEST = 1e15


class Gaussian(NamedTuple):
    """A normal distribution and its ELBO.

    Attributes:
        loc: Mean, of shape ``(features,)``.
        scale_tril: Lower-triangular root of the covariance, of shape ``(features, features)``; of
            many features a root of low rank.
        elbo: Monte Carlo estimate of the evidence lower bound.
    """

    loc: Tensor
    scale_tril: Root
    elbo: float


class Gaussians(NamedTuple):
    """Several normal distributions and their ELBOs.

    Attributes:
        loc: Means, of shape ``(count, features)``.
        root: Roots of the covariances, of shape ``(count, features, features)``; of many features
            roots of low rank.
        elbo: Monte Carlo estimates of the evidence lower bounds, of shape ``(count,)``.
    """

    loc: Tensor
    root: Root
    elbo: Tensor

    def where(self, condition: Tensor, other: Gaussians) -> Gaussians:
        """Takes ``self`` where a condition of shape ``(count,)`` holds, else ``other``."""
        index = torch.arange(len(condition), device=condition.device)
        both = self.join(other)
        return both.pick(index.where(condition, index + len(condition)))

    def put(self, index: Tensor, new: Gaussians) -> Gaussians:
        """Takes new ones in the places of some."""
        source = torch.arange(len(self.elbo), device=index.device)
        source[index] = len(source) + torch.arange(len(index), device=index.device)
        return self.join(new).pick(source)

    def join(self, *others: Gaussians) -> Gaussians:
        """All of them, and all of others after them."""
        groups = [self, *others]
        loc, elbo = (torch.cat([getattr(g, name) for g in groups]) for name in ("loc", "elbo"))
        return Gaussians(loc, join_roots([group.root for group in groups]), elbo)

    def pick(self, index: Tensor) -> Gaussians:
        """Picks some of them, by indices or a mask."""
        return Gaussians(self.loc[index], pick_root(self.root, index), self.elbo[index])

    def one(self, index: int) -> Gaussian:
        """Picks one of them."""
        root = pick_root(self.root, index)
        lower = _lower_root(root) if isinstance(root, Tensor) else root
        return Gaussian(self.loc[index], lower, float(self.elbo[index]))


def fit_gaussians(
    density: LogDensity,
    starts: Tensor,
    steps: int = 30,
    draws: int = 256,
    seed: int = 0,
    root: Tensor | None = None,
) -> tuple[Gaussians, Gaussians]:
    r"""Fits Gaussians from many starts at once, by saddle-free Newton steps in whitened units.

    Each step takes the Hessian of :math:`\log p` along the columns of the current root :math:`L`,
    by central differences of the gradient,

    .. math:: H = \tfrac{1}{2h} L^\top [\nabla \log p(z + h L) - \nabla \log p(z - h L)]
        = V \operatorname{diag}(w) V^\top,

    renews the root, :math:`L \leftarrow L V |w|^{-1/2}`, and moves along :math:`L L^\top \nabla
    \log p` by the best of a geometric series of lengths. In whitened units neither the scale nor
    the correlation of the parameters matters, and with :math:`|w|` a saddle repels. Where the
    density has no finite mode, the ELBO says which point on the way to take.

    Args:
        density: The log density.
        starts: Where to start, of shape ``(count, features)``, with finite log densities.
        steps: Most steps to take.
        draws: Draws for each ELBO; the same for all of them.
        seed: Seed of these draws.
        root: Roots to start with, of shape ``(count, features, features)``; the identity if
            ``None``.

    Returns:
        For each start the Gaussian with the best ELBO on the way, and the last one, which sits at a
        mode if there is one. When the time of the fit is over, they are the best found so far.

    Raises:
        TimeOver: If the time is over before the starts have been evaluated.

    Reference:
        Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, "Identifying and attacking the saddle
        point problem in high-dimensional non-convex optimization", 2014,
        https://arxiv.org/abs/1406.2572
    """
    n = density.features
    noise = antithetic_noise(draws, starts[0], seed)
    if root is None:
        root = torch.eye(n, dtype=starts.dtype, device=starts.device).expand(len(starts), n, n)
    last = best = Gaussians(starts, root, _elbos(density, starts, root, noise))
    unimproved = torch.zeros_like(best.elbo)
    going = unimproved == 0
    for _ in range(steps):
        if not bool(going.any()):
            break
        index = going.nonzero().squeeze(-1)
        try:
            new, moved, sound = _newton_step(density, last.pick(index), noise)
        except TimeOver:
            break
        held = best.pick(index)
        unimproved[index] = torch.where(new.elbo > held.elbo + 1e-2, 0.0, unimproved[index] + 1)
        best = best.put(index, new.where(new.elbo > held.elbo, held))
        last = last.put(index, new)
        stuck = (unimproved[index] >= 5) | ((unimproved[index] > 0) & ~moved)
        going[index] = sound & ~stuck
    return best, last


def _newton_step(
    density: LogDensity, now: Gaussians, noise: Tensor
) -> tuple[Gaussians, Tensor, Tensor]:
    """Renews the roots, and moves along them.

    Returns:
        The Gaussians after the step, and for each whether it has moved, and whether its new root
        was usable.
    """
    before = cast("Tensor", now.root)
    root, gradient = _renew_roots(density, now.loc, before)
    sound = root.abs().amax((-2, -1)) < WIDEST
    root = torch.where(sound[:, None, None], root, before)
    direction = (root @ (root.mT @ gradient.unsqueeze(-1))).squeeze(-1)
    loc, moved = _line_searches(density, now.loc, direction)
    return Gaussians(loc, root, _elbos(density, loc, root, noise)), moved, sound


def antithetic_noise(draws: int, like: Tensor, seed: int) -> Tensor:
    """Standard normal draws of shape ``(draws, features)``, each with its opposite.

    Where there are enough of them their covariance is exactly one, so that the ELBOs of normal
    densities carry no sampling error.

    Args:
        draws: How many.
        like: Vector of shape ``(features,)`` whose dtype and device they have.
        seed: Their seed.
    """
    size = (draws // 2, len(like))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator, device="cpu", dtype=like.dtype)
    if size[0] >= size[1]:
        # Not by the Gram matrix, which is nearly singular for as many draws as features.
        orthogonal, triangle = torch.linalg.qr(noise)
        noise = orthogonal * triangle.diagonal().sign() * math.sqrt(size[0])
    return torch.cat([noise, -noise]).to(like.device)


def _renew_roots(density: LogDensity, z: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    n = z.shape[-1]
    width = 1e-3 if z.dtype == torch.float64 else 3e-2
    centre = z.unsqueeze(-2)
    points = torch.cat([centre + width * root.mT, centre - width * root.mT, centre], -2)
    gradients = density.value_and_grad(points)[1]
    change = (gradients[:, :n] - gradients[:, n : 2 * n]) / (2 * width) @ root
    change = -(change + change.mT) / 2
    finite = change.isfinite().all(-1).all(-1)[:, None, None]
    eigenvalues, vectors = torch.linalg.eigh(
        torch.where(finite, change, torch.eye(n, dtype=z.dtype, device=z.device))
    )
    # One step changes a width by at most a factor of 30: the Hessian is known only within the
    # present ones.
    renewed = root @ (vectors * eigenvalues.abs().clamp(1e-3, 1e3).rsqrt().unsqueeze(-2))
    return torch.where(finite, renewed, root), gradients[:, -1].nan_to_num(0.0, 0.0, 0.0)


def _line_searches(density: LogDensity, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    lengths = 2.0 ** torch.arange(-14, 5, dtype=z.dtype, device=z.device)
    points = torch.cat(
        [z.unsqueeze(-2), z.unsqueeze(-2) + lengths.unsqueeze(-1) * direction.unsqueeze(-2)], -2
    )
    values = density.log_prob(points).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    best = values.argmax(-1)
    return points[torch.arange(len(z), device=z.device), best], best > 0


def _elbos(density: LogDensity, z: Tensor, root: Tensor, noise: Tensor) -> Tensor:
    values = density.log_prob(z.unsqueeze(-2) + noise @ root.mT)
    entropy = torch.linalg.slogdet(root)[1] + 0.5 * z.shape[-1] * (1 + math.log(2 * math.pi))
    return (values.mean(-1) + entropy).nan_to_num(nan=-torch.inf, posinf=-torch.inf)


def _lower_root(root: Tensor) -> Tensor:
    upper = torch.linalg.qr(root.mT)[1]
    return upper.mT * upper.diagonal().sign()
