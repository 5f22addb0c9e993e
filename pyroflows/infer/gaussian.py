"""A Gaussian fit of a log density, to start a flow from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .log_density import LogDensity

__all__ = ["Gaussian", "fit_gaussian"]


# Where a density does not fall off, the widths grow until they overflow.
WIDEST = 1e15


class Gaussian(NamedTuple):
    """A normal law and its ELBO.

    Attributes:
        loc: Mean, of shape ``(features,)``.
        scale_tril: Lower-triangular root of the covariance, of shape ``(features, features)``.
        elbo: Monte Carlo estimate of the evidence lower bound.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float


def fit_gaussian(density: LogDensity, start: Tensor, steps: int = 30, draws: int = 256, seed: int = 0) -> Gaussian:
    r"""Fits a Gaussian by saddle-free Newton steps in whitened units, keeping the one with the best ELBO.

    Each step takes the Hessian of :math:`\log p` along the columns of the current root :math:`L`, by central differences
    of the gradient,

    .. math:: H = \tfrac{1}{2h} L^\top [\nabla \log p(z + h L) - \nabla \log p(z - h L)] = V \operatorname{diag}(w) V^\top,

    renews the root, :math:`L \leftarrow L V |w|^{-1/2}`, and moves along :math:`L L^\top \nabla \log p` by the best of a
    geometric series of lengths. In whitened units neither the scale nor the correlation of the parameters matters, and
    with :math:`|w|` a saddle repels. Where the density has no finite mode, the ELBO says which point on the way to take.

    Args:
        density: The log density.
        start: Where to start, of shape ``(features,)``, with a finite log density.
        steps: Most steps to take.
        draws: Draws for each ELBO; the same for all of them.
        seed: Seed of these draws.

    Returns:
        The Gaussian with the best ELBO.

    Reference:
        Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, "Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization", 2014,
        https://arxiv.org/abs/1406.2572
    """
    n = density.features
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws // 2, n, generator=generator, device="cpu", dtype=start.dtype).to(start.device)
    noise = torch.cat([noise, -noise])
    z, root = start.clone(), torch.eye(n, dtype=start.dtype, device=start.device)
    width = 1e-3 if start.dtype == torch.float64 else 3e-2
    lengths = 2.0 ** torch.arange(-14, 5, dtype=start.dtype, device=start.device)
    best = Gaussian(z, root, _elbo(density, z, root, noise))
    unimproved = 0
    for _ in range(steps):
        root, gradient = _renew_root(density, z, root, width)
        if not bool(root.abs().amax() < WIDEST):
            break
        direction = root @ (root.mT @ gradient)
        z, moved = _line_search(density, z, direction, lengths)
        elbo = _elbo(density, z, root, noise)
        unimproved = 0 if elbo > best.elbo + 1e-2 else unimproved + 1
        if elbo > best.elbo:
            best = Gaussian(z, root, elbo)
        if unimproved >= 5 or (unimproved and not moved):
            break
    return best._replace(scale_tril=_lower_root(best.scale_tril))


def _renew_root(density: LogDensity, z: Tensor, root: Tensor, width: float) -> tuple[Tensor, Tensor]:
    n = len(z)
    points = torch.cat([z + width * root.mT, z - width * root.mT, z.unsqueeze(0)])
    gradients = density.value_and_grad(points)[1]
    change = (gradients[:n] - gradients[n : 2 * n]) / (2 * width) @ root
    change = -(change + change.mT) / 2
    if not bool(change.isfinite().all()):
        return root, gradients[-1]
    eigenvalues, vectors = torch.linalg.eigh(change)
    # One step changes a width by at most a factor of 30: the Hessian is known only within the present ones.
    return root @ (vectors * eigenvalues.abs().clamp(1e-3, 1e3).rsqrt()), gradients[-1]


def _line_search(density: LogDensity, z: Tensor, direction: Tensor, lengths: Tensor) -> tuple[Tensor, bool]:
    points = torch.cat([z.unsqueeze(0), z + lengths.unsqueeze(-1) * direction])
    values = density.log_prob(points).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    best = int(values.argmax())
    return points[best], best > 0


def _elbo(density: LogDensity, z: Tensor, root: Tensor, noise: Tensor) -> float:
    value = density.log_prob(z + noise @ root.mT)
    entropy = torch.linalg.slogdet(root)[1] + 0.5 * len(z) * (1 + torch.log(torch.tensor(2 * torch.pi)))
    return float((value.mean() + entropy).nan_to_num(nan=-torch.inf, posinf=-torch.inf))


def _lower_root(root: Tensor) -> Tensor:
    upper = torch.linalg.qr(root.mT)[1]
    return upper.mT * upper.diagonal().sign()
