"""Objectives that compare a guide with given draws of the posterior."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from ..._checks import check_positive, check_size
from ...model.density import LogDensity
from ...model.sites import LatentSite, find_latent_sites
from ._traces import latent_draws
from .objective import Objective, check_distribution, check_reparametrised

__all__ = ["MMD", "ForwardKL", "VectorObjective"]


class VectorObjective(Objective):
    """An objective for guides that draw one unconstrained vector."""

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        distribution = self._get_trace(model, guide, args, kwargs)
        target = self._target(model, guide, args, kwargs)
        if isinstance(target, LogDensity):
            check_distribution(distribution, target)
        return self._loss(distribution, target)

    def density_loss(
        self, distribution: torch.distributions.Distribution, density: LogDensity
    ) -> Tensor:
        check_distribution(distribution, density)
        return self._loss(distribution, density)

    def _get_trace(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> torch.distributions.Distribution:
        """The distribution of the vector, taken from a run, in which SVI sees the parameters."""
        sources = {}
        if isinstance(guide, AutoContinuous):
            sources = latent_draws(poutine.trace(guide).get_trace(*args, **kwargs))
        if len(sources) != 1:
            raise TypeError(
                "Expected a guide with one distribution over an unconstrained vector, such as "
                "pyroflows.AutoFlow, in "
                f"{type(self).__name__}; got {type(guide).__name__}."
            )
        return next(iter(sources.values()))["fn"]

    @abstractmethod
    def _target(
        self, model: Any, guide: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the distribution is compared with."""

    @abstractmethod
    def _loss(self, distribution: Any, target: Any) -> Tensor:
        """The loss of a distribution."""


class _Sites(NamedTuple):
    sites: list[LatentSite]


class _DrawsObjective(VectorObjective):
    """An objective that compares a guide with draws of the posterior."""

    def __init__(self, draws: Mapping[str, Tensor], num_particles: int) -> None:
        super().__init__(num_particles)
        self.draws = _check_draws(draws)

    def _target(
        self, model: Any, guide: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Sites:
        # A guide of Pyro's knows its trace alone.
        sites = getattr(guide, "sites", None)
        return _Sites(find_latent_sites(guide.prototype_trace) if sites is None else sites)

    def _vectors(self, target: LogDensity | _Sites) -> Tensor:
        """The draws as unconstrained vectors."""
        parts = []
        for site in target.sites:
            values = self.draws.get(site.name)
            if values is None:
                raise ValueError(f"Expected draws of every latent site; got none of {site.name!r}.")
            if values.shape[1:] != site.shape:
                expected = tuple(site.shape)
                raise ValueError(
                    f"Expected draws of {site.name!r}, each of shape {expected}; got "
                    f"{tuple(values.shape)}."
                )
            part = site.pack(values)
            outside = int((~part.isfinite()).any(-1).sum())
            if outside:
                raise ValueError(
                    f"Expected draws of {site.name!r} inside of its support; got {outside} of "
                    f"{len(values)} that are not."
                )
            parts.append(part)
        return torch.cat(parts, -1)

    def _batch(self, vectors: Tensor) -> Tensor:
        """As many of the vectors as there are particles, at random, or all."""
        if len(vectors) <= self.num_particles:
            return vectors
        return vectors[torch.randperm(len(vectors), device=vectors.device)[: self.num_particles]]


class ForwardKL(_DrawsObjective):
    r"""The forward Kullback-Leibler divergence on given draws of the posterior, that is maximum
    likelihood.

    .. math:: \mathrm{KL}(p \| q_\phi) = \mathbb{E}_{z \sim p}[\log p(z) - \log q_\phi(z)], \qquad
        \ell(\phi) = -\frac{1}{K} \sum_i \log q_\phi(z_i), \quad z_i \sim p,

    in unconstrained units; the loss lacks the entropy of the posterior, which does not depend on
    :math:`\phi`. It covers all modes of the draws. The guide is one over an unconstrained vector,
    such as an ``AutoFlow`` or any ``AutoContinuous``; a flow that is fast to score trains fast.

    Args:
        draws: For each latent site of the model a tensor of shape ``(n, *site_shape)``, from MCMC,
            say.
        num_particles: Draws for each step, at random; all if there are fewer.

    Raises:
        TypeError: If ``draws`` is not a mapping to tensors; in a step, if the guide is of another
            kind.
        ValueError: If the tensors differ in length; in a step, if a site is missing or of another
            shape.

    Reference:
        Jerfel, Wang, Wong-Fannjiang, Heller, Ma, Jordan, "Variational refinement for importance
        sampling using the forward Kullback-Leibler divergence", 2021,
        https://arxiv.org/abs/2106.15980

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> objective = ForwardKL({"x": torch.randn(1000).exp()})
        >>> adam = pyro.optim.Adam({"lr": 0.01})
        >>> loss = SVI(model, pf.AutoFlow(model), adam, loss=objective).step()
    """

    def __init__(self, draws: Mapping[str, Tensor], num_particles: int = 256) -> None:
        super().__init__(draws, num_particles)

    def _loss(self, distribution: Any, target: LogDensity | _Sites) -> Tensor:
        return -distribution.log_prob(self._batch(self._vectors(target))).mean()


class MMD(_DrawsObjective):
    r"""The squared maximum mean discrepancy between the guide and given draws of the posterior.

    .. math:: \mathrm{MMD}^2 = \mathbb{E}\,k(z, z') - 2\, \mathbb{E}\,k(z, y) + \mathbb{E}\,k(y, y'), \qquad
        k(z, y) = \exp\Big(-\frac{1}{2} \sum_j \frac{(z_j - y_j)^2}{h_j^2}\Big),

    with independent :math:`z, z' \sim q_\phi` and draws :math:`y, y'`, in unconstrained units, by
    unbiased means over all pairs. It sees differences of the scale of :math:`h`, and needs no
    density, so that it trains flows that are slow to score.

    Args:
        draws: For each latent site of the model a tensor of shape ``(n, *site_shape)``, with ``n``
            of at least 2.
        bandwidth: The widths :math:`h`: a number, a tensor of shape ``(features,)``, or ``None``
            for the standard deviations of the draws times :math:`\sqrt{2 D}`, the typical distance
            of two draws.
        num_particles: Draws of the guide for each step, and of the given ones, at random; all if
            there are fewer.

    Raises:
        TypeError: If an argument is of the wrong type; in a step, if the guide is of another kind
            than that of :class:`ForwardKL`.
        ValueError: If the tensors differ in length, or a bandwidth or a number of draws is too
            small; in a step, if a site is missing or of another shape.

    Reference:
        Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A kernel two-sample test", 2012,
        https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> objective = MMD({"x": torch.randn(1000).exp()})
        >>> adam = pyro.optim.Adam({"lr": 0.01})
        >>> loss = SVI(model, pf.AutoFlow(model), adam, loss=objective).step()
    """

    def __init__(
        self,
        draws: Mapping[str, Tensor],
        bandwidth: float | Tensor | None = None,
        num_particles: int = 256,
    ) -> None:
        super().__init__(draws, check_size("num_particles", num_particles, least=2))
        if len(next(iter(self.draws.values()))) < 2:
            raise ValueError("Expected at least 2 draws; got 1.")
        if isinstance(bandwidth, Tensor):
            if not bool((bandwidth > 0).all()):
                raise ValueError(f"Expected bandwidth to be positive; got {bandwidth.tolist()}.")
        elif bandwidth is not None:
            check_positive("bandwidth", bandwidth)
        self.bandwidth = bandwidth

    def _loss(self, distribution: Any, target: LogDensity | _Sites) -> Tensor:
        check_reparametrised(distribution)
        vectors = self._vectors(target)
        width = self.bandwidth
        if isinstance(width, Tensor) and width.dim() and width.shape != vectors.shape[-1:]:
            raise ValueError(
                f"Expected bandwidth of shape ({vectors.shape[-1]},); got {tuple(width.shape)}."
            )
        if width is None:
            width = vectors.std(0) * math.sqrt(2 * vectors.shape[-1])
            if not bool((width > 0).all()):
                raise ValueError(
                    "Expected draws that differ in every coordinate, or a bandwidth; got a "
                    "constant one."
                )
        # About their mean, for the squares of large numbers would drown their differences.
        y = (self._batch(vectors) - vectors.mean(0)) / width
        z = (distribution.rsample((self.num_particles,)) - vectors.mean(0)) / width
        return _mean_of_pairs(z) - 2 * _kernel(z, y).mean() + _mean_of_pairs(y)


def _kernel(z: Tensor, y: Tensor) -> Tensor:
    # Not cdist: the gradient of a distance is not defined where two points meet.
    return torch.exp(z @ y.mT - 0.5 * z.square().sum(-1).unsqueeze(-1) - 0.5 * y.square().sum(-1))


def _mean_of_pairs(z: Tensor) -> Tensor:
    """The mean kernel of two different rows."""
    kernel = _kernel(z, z)
    return (kernel.sum() - kernel.diagonal().sum()) / (len(z) * (len(z) - 1))


def _check_draws(draws: Any) -> dict[str, Tensor]:
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"Expected draws to be a mapping of names to tensors; got {type(draws).__name__}."
        )
    for name, values in draws.items():
        if not isinstance(values, Tensor):
            raise TypeError(
                f"Expected draws of {name!r} to be a tensor; got {type(values).__name__}."
            )
    lengths = {name: len(values) if values.dim() else 0 for name, values in draws.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"Expected draws of at least one site, all of one length; got {lengths}.")
    return dict(draws)
