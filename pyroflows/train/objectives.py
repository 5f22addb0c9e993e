r"""Objectives for training a guide: losses of ``pyro.infer.SVI``, and of a distribution against a log density.

The bounds on the evidence share one way down. Particles :math:`z_i \sim q_\phi` are drawn once, with their weights
:math:`w_i = p(z_i) / q_\phi(z_i)` and the slopes :math:`\nabla_z \log w_i` at fixed parameters, and

.. math:: \mathcal{L}_s = \frac{1}{s} \log \frac{1}{K} \sum_i w_i^s, \qquad
    \nabla_\phi \mathcal{L}_s = \sum_i v_i \,(1 - s + s v_i)\, \nabla_z \log w_i^\top \frac{\partial z_i}{\partial \phi},
    \qquad v_i = \frac{w_i^s}{\sum_j w_j^s},

is the ELBO for :math:`s \to 0`, the importance-weighted bound for :math:`s = 1`, and a Renyi bound for
:math:`s = 1 - \alpha`. No term of the gradient is a score of :math:`q`, so that it has no noise where the guide is exact.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from .._checks import check_positive, check_size
from ..distributions import FlowDistribution
from ..model.density import LogDensity
from ..model.sites import LatentSite, find_latent_sites
from ..sampling.hamiltonian import Target, hmc

__all__ = [
    "FAB",
    "MMD",
    "ChiSquareBound",
    "ForwardKL",
    "ImportanceWeightedBound",
    "Objective",
    "PathELBO",
    "RenyiBound",
]


class Objective(ELBO):
    """What a guide is trained for: a loss of ``SVI``, and of a distribution over the unconstrained vector of a density.

    Args:
        num_particles: Draws for each step.
        vectorize_particles: Whether model and guide run once for all particles, in an outermost plate.

    Raises:
        TypeError: If ``num_particles`` is not an integer.
        ValueError: If it is not positive.
    """

    def __init__(self, num_particles: int = 32, vectorize_particles: bool = True) -> None:
        check_size("num_particles", num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)

    @abstractmethod
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss of a guide, to differentiate.

        Args:
            model: A Pyro model.
            guide: Its guide.
            *args: Arguments of both.
            **kwargs: Keyword arguments of both.

        Returns:
            Tensor without dimensions, whose gradient is the estimator.
        """

    @abstractmethod
    def density_loss(
        self, distribution: torch.distributions.Distribution, density: LogDensity
    ) -> Tensor:
        """The loss of a distribution, to differentiate.

        Args:
            distribution: Over vectors of shape ``(features,)``, such as ``flow()`` or ``guide.get_posterior()``.
            density: The log density.

        Returns:
            Tensor without dimensions, whose gradient is the estimator.

        Raises:
            ValueError: If the distribution is not one over such vectors.
        """

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The value of the loss, without gradient."""
        with torch.no_grad():
            return _checked(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The value of the loss; its gradient is added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return _checked(loss)


def _checked(loss: Tensor) -> float:
    warn_if_nan(loss, "loss")
    return loss.item()


# Bounds on the evidence


class _Particles(NamedTuple):
    """Log weights, and zeros whose gradient is that of the log weights along the paths of the particles, each ``(K,)``."""

    log_weight: Tensor
    path: Tensor


class _Bound(Objective):
    """A bound by the mean of a power of the weights; see the head of this module."""

    power: float
    upper = False

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        runs = list(self._get_traces(model, guide, args, kwargs))
        return self._loss(_Particles(*map(torch.cat, zip(*runs, strict=True))))

    def density_loss(
        self, distribution: torch.distributions.Distribution, density: LogDensity
    ) -> Tensor:
        _check_distribution(distribution, density)
        _check_reparametrised(distribution)
        z, log_guide, score = _draw(distribution, self.num_particles)
        log_joint, slope = density.value_and_grad(z)
        return self._loss(_particles(log_joint - log_guide, [(z, slope - score)]))

    def _loss(self, particles: _Particles) -> Tensor:
        log_weight, path = particles
        finite = log_weight.isfinite()
        fixed = log_weight.detach().where(finite, 0.0)
        tempered = (self.power * fixed).where(finite, -math.inf)
        share = tempered.softmax(0).where(finite, 0.0)
        if self.power == 0:
            bound = fixed.sum() / finite.sum()
        else:
            # A weight of zero counts where its power is zero too; else it is left out.
            count = torch.ones_like(fixed).where(finite, float(self.power > 0)).sum()
            bound = (tempered.logsumexp(0) - count.log()) / self.power
        surrogate = (share * (log_weight.where(finite, 0.0) + self._path_share(share) * path)).sum()
        loss = bound + surrogate - surrogate.detach()
        return loss if self.upper else -loss

    def _path_share(self, share: Tensor) -> Tensor:
        return 1 - self.power + self.power * share

    def _get_trace(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> _Particles:
        """Runs the guide, and then guide and model at its draws, cut off from the parameters that these came by."""
        if isinstance(poutine.unwrap(guide), Messenger):
            kind = type(poutine.unwrap(guide)).__name__
            raise TypeError(
                f"Expected a guide that runs without its model; got {kind}. Use pyro.infer.Trace_ELBO for it."
            )
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        sources = _sources(drawn)
        for name, node in sources.items():
            _check_reparametrised(node["fn"], f" at site {name!r}")
        points = {name: node["value"].detach().requires_grad_() for name, node in sources.items()}
        guide_trace = poutine.trace(poutine.replay(guide, trace=_at(drawn, points))).get_trace(
            *args, **kwargs
        )
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        self._check(model_trace, guide_trace)
        drawn, guide_trace, model_trace = map(
            prune_subsample_sites, (drawn, guide_trace, model_trace)
        )
        drawn.compute_score_parts()
        joint = self._sum(model_trace)
        log_weight = (joint - self._sum(drawn)).detach()
        if not torch.is_grad_enabled():
            return _particles(log_weight, [])
        carried = _carried_scores(sources)
        # Point masses follow from the draws: what the parameters do to them is no score.
        direct = joint - self._sum(guide_trace, lambda name: name not in sources)
        at_points = direct - self._sum(
            guide_trace, lambda name: name in sources and name not in carried
        )
        slopes = _gradients(at_points, points)
        paths = [
            (node["value"], slopes[name] - carried.get(name, 0.0)) for name, node in sources.items()
        ]
        return _particles(direct + (log_weight - direct.detach()), paths)

    def _sum(
        self, trace: poutine.Trace, chosen: Callable[[str], bool] = lambda name: True
    ) -> Tensor:
        """The log density of each particle, over some sites."""
        count = self.num_particles if self.vectorize_particles else 1
        trace.compute_log_prob(lambda name, _: chosen(name))
        nodes = [node for name, node in _sample_nodes(trace) if chosen(name)]
        for node in nodes if is_validation_enabled() else []:
            check_site_shape(node, self.max_plate_nesting)  # type: ignore[arg-type]
        return sum(
            (node["log_prob"].reshape(count, -1).sum(-1) for node in nodes), start=torch.zeros(())
        )

    def _check(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
        missing = [
            n
            for n, node in _sample_nodes(model_trace)
            if not node["is_observed"] and n not in guide_trace
        ]
        if missing:
            raise ValueError(
                f"Expected a guide of every latent site of the model; got one without {', '.join(map(repr, missing))}. "
                "Discrete sites are summed out by pyro.infer.TraceEnum_ELBO."
            )
        if self.upper and any(node["type"] == "param" for node in model_trace.nodes.values()):
            raise ValueError(
                f"Expected a model without parameters of its own in {type(self).__name__}; got one with some. To minimise "
                "an upper bound on the evidence would fit them away from the data."
            )
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)


class PathELBO(_Bound):
    r"""The evidence lower bound with path gradients (sticking the landing), for every reparametrised guide.

    .. math:: \mathcal{L}(\phi) = \mathbb{E}_{z \sim q_\phi}\left[\log \frac{p(z)}{q_\phi(z)}\right], \qquad
        \nabla_\phi \mathcal{L} = \mathbb{E}\left[\left(\nabla_z \log p(z) - \nabla_z \log q_\phi(z)\right)^\top
        \frac{\partial z}{\partial \phi}\right].

    The score of mean zero, :math:`\nabla_\phi \log q_\phi(z)` at a fixed :math:`z`, is left out, so that the gradient has no
    noise where the guide is exact. A flow carries :math:`\nabla_z \log q` along its sampling pass, without an inversion.
    Particles whose density or slope is not finite are left out.

    Args:
        num_particles: Draws for each step.
        vectorize_particles: Whether model and guide run once for all particles, in an outermost plate.

    Raises:
        TypeError: If ``num_particles`` is not an integer.
        ValueError: If it is not positive; in a step, if a site of the guide is not reparametrised, or the guide lacks a
            latent site of the model.

    Reference:
        Roeder, Wu, Duvenaud, "Sticking the landing: Simple, lower-variance gradient estimators for variational inference",
        2017, https://arxiv.org/abs/1703.09194

        Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for normalizing flows", 2024,
        https://arxiv.org/abs/2403.15881

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        >>> svi = SVI(model, pf.AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), loss=PathELBO(num_particles=32))
        >>> loss = svi.step()
    """

    power = 0.0


class ImportanceWeightedBound(_Bound):
    r"""The importance-weighted bound (IWAE) with doubly reparametrised gradients (DReG).

    .. math:: \mathcal{L}_K(\phi) = \mathbb{E}\left[\log \frac{1}{K} \sum_{i=1}^K w_i\right], \quad
        w_i = \frac{p(z_i)}{q_\phi(z_i)}, \qquad
        \nabla_\phi \mathcal{L}_K = \mathbb{E}\left[\sum_i v_i^2\, \nabla_z \log w_i^\top
        \frac{\partial z_i}{\partial \phi}\right], \quad v_i = \frac{w_i}{\sum_j w_j}.

    It rises with :math:`K` from the ELBO to the log evidence. Unlike the plain gradient, this one gains from more particles
    and has no noise where the guide is exact. The parameters :math:`\theta` of the model get
    :math:`\sum_i v_i \nabla_\theta \log p_\theta(z_i)`. A density of zero is a weight of zero.

    Args:
        num_particles: Particles :math:`K` of the bound.
        vectorize_particles: As in :class:`PathELBO`.

    Raises:
        TypeError, ValueError: As :class:`PathELBO`.

    Reference:
        Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016, https://arxiv.org/abs/1509.00519

        Tucker, Lawson, Gu, Maddison, "Doubly reparameterized gradient estimators for Monte Carlo objectives", 2019,
        https://arxiv.org/abs/1810.04152

        Bauer, Mnih, "Generalized doubly reparameterized gradient estimators", 2021, https://arxiv.org/abs/2101.11046

    Example:
        >>> import pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        >>> import pyro
        >>> exact = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> bool(ImportanceWeightedBound(8).density_loss(exact, LogDensity(model)).abs() < 1e-6)
        True
    """

    power = 1.0


class RenyiBound(_Bound):
    r"""The variational Renyi bound, from the ELBO to the importance-weighted bound and beyond.

    .. math:: \mathcal{L}_\alpha(\phi) = \frac{1}{1 - \alpha} \log \mathbb{E}_{z \sim q_\phi}\left[
        \left(\frac{p(z)}{q_\phi(z)}\right)^{1 - \alpha}\right] = \log Z - D_\alpha(q_\phi \| p / Z),

    with the Renyi divergence :math:`D_\alpha`, estimated by the mean over :math:`K` particles. The gradient is doubly
    reparametrised,

    .. math:: \nabla_\phi \mathcal{L} = \sum_i \left(\alpha v_i + (1 - \alpha) v_i^2\right) \nabla_z \log w_i^\top
        \frac{\partial z_i}{\partial \phi}, \qquad v_i \propto w_i^{1 - \alpha},

    which is unbiased for the expected estimate. A small :math:`\alpha` covers the mass of the posterior, a large one seeks
    a mode. The order 1 is :class:`PathELBO`, 0 is :class:`ImportanceWeightedBound`, and a negative one bounds from above, as
    :class:`ChiSquareBound` does.

    Args:
        alpha: Order of the divergence, positive.
        num_particles: Particles of the estimate.
        vectorize_particles: As in :class:`PathELBO`.

    Raises:
        TypeError, ValueError: As :class:`PathELBO`; if ``alpha`` is not a positive number.

    Reference:
        Li, Turner, "Renyi divergence variational inference", 2016, https://arxiv.org/abs/1602.02311

        Daudel, Benton, Shi, Doucet, "Alpha-divergence variational inference meets importance weighted auto-encoders:
        Methodology and asymptotics", 2023, https://arxiv.org/abs/2210.06226

    Example:
        >>> RenyiBound(alpha=0.5, num_particles=64).alpha
        0.5
    """

    def __init__(
        self, alpha: float, num_particles: int = 32, vectorize_particles: bool = True
    ) -> None:
        self.alpha = check_positive("alpha", alpha)
        self.power = 1 - self.alpha
        super().__init__(num_particles, vectorize_particles)


class ChiSquareBound(_Bound):
    r"""The chi-square upper bound on the evidence (CUBO), to minimise.

    .. math:: \mathcal{U}_n(\phi) = \frac{1}{n} \log \mathbb{E}_{z \sim q_\phi}\left[
        \left(\frac{p(z)}{q_\phi(z)}\right)^n\right] \ge \log Z, \qquad
        \nabla_\phi \mathcal{U}_n = (1 - n) \sum_i v_i \nabla_z \log w_i^\top \frac{\partial z_i}{\partial \phi},
        \quad v_i = \frac{w_i^n}{\sum_j w_j^n}.

    For :math:`n = 2` it is :math:`\log Z + \frac{1}{2} \log(1 + \chi^2(p / Z \| q))`. The gradient is that of
    :math:`\mathbb{E}[w^n]`, doubly reparametrised and divided by its own estimate, with a bias of order :math:`1 / K`.
    It punishes a guide that is narrower than the posterior. The mean over few particles lies below the bound.

    Args:
        order: The power :math:`n`, above 1.
        num_particles: Particles of the estimate.
        vectorize_particles: As in :class:`PathELBO`.

    Raises:
        TypeError, ValueError: As :class:`PathELBO`; if ``order`` is not a number above 1; in a step of ``SVI``, if the model
            has parameters of its own, which an upper bound cannot fit.

    Reference:
        Dieng, Tran, Ranganath, Paisley, Blei, "Variational inference via chi upper bound minimization", 2017,
        https://arxiv.org/abs/1611.00328

    Example:
        >>> ChiSquareBound(num_particles=64).order
        2.0
    """

    upper = True

    def __init__(
        self, order: float = 2.0, num_particles: int = 256, vectorize_particles: bool = True
    ) -> None:
        self.power = self.order = check_positive("order", order)
        if self.order <= 1:
            raise ValueError(
                f"Expected order > 1; got {order}. Up to 1 the bound is a lower one: use RenyiBound."
            )
        super().__init__(num_particles, vectorize_particles)

    def _path_share(self, share: Tensor) -> Tensor:
        return torch.full_like(share, 1 - self.power)


def _particles(log_weight: Tensor, paths: Sequence[tuple[Tensor, Tensor]]) -> _Particles:
    """Particles from their weights, and from draws with the slopes of the log weights there."""
    count = len(log_weight)
    path = torch.zeros_like(log_weight)
    for z, slope in paths:
        slope = slope.reshape(count, -1)
        sound = slope.isfinite().all(-1)
        log_weight = log_weight.where(sound, -math.inf)
        path = path + (
            (z - z.detach()).reshape(count, -1) * slope.where(sound.unsqueeze(-1), 0.0)
        ).sum(-1)
    return _Particles(log_weight, path)


def _draw(distribution: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws with their log densities and scores, at fixed parameters."""
    if isinstance(distribution, FlowDistribution):
        distribution = distribution.expand((count,))
        distribution.path_gradient = True
        z = distribution.rsample()
        log_prob, _, entropy_term = distribution.score_parts(z)
        score = _carried_score(distribution, entropy_term, z)
        if score is not None:
            return z, log_prob.detach(), score
    else:
        z = distribution.rsample((count,))
    return z, *_score(distribution, z)


def _score(distribution: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """The log density and its gradient with respect to the point; neither carries a graph."""
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        log_prob = distribution.log_prob(point)
        return log_prob.detach(), _gradients(log_prob, {"point": point})["point"]


def _gradients(values: Tensor, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with respect to points, zero for those that the values do not depend on; the graph stays."""
    if not points or not values.requires_grad:
        return {name: torch.zeros_like(point) for name, point in points.items()}
    gradients = torch.autograd.grad(
        values.sum(),
        list(points.values()),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(points, gradients, strict=True))


def _carried_score(distribution: Any, entropy_term: Any, z: Tensor) -> Tensor | None:
    """The score that a flow took along when it drew ``z``, or ``None``."""
    if not (
        isinstance(distribution, FlowDistribution)
        and distribution.path_gradient
        and z.requires_grad
    ):
        return None
    if distribution._support is not None or not torch.is_grad_enabled():
        return None
    return torch.autograd.grad(entropy_term.sum(), z, retain_graph=True, allow_unused=True)[0]


def _carried_scores(sources: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scores at the draws of a guide that is one flow; where one site depends on another they are not enough."""
    if len(sources) != 1:
        return {}
    ((name, node),) = sources.items()
    score = _carried_score(node["fn"], node["score_parts"].entropy_term, node["value"])
    return {} if score is None else {name: score}


def _sources(trace: poutine.Trace) -> dict[str, Any]:
    """The sites where a guide draws: all but its point masses."""
    return {
        name: node
        for name, node in _sample_nodes(trace)
        if not (node["is_observed"] or _is_point_mass(node))
    }


def _at(trace: poutine.Trace, points: Mapping[str, Tensor]) -> poutine.Trace:
    """A trace to replay: with these points for draws, and without the point masses, which follow from them."""
    fixed = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not _is_point_mass(node):
            fixed.nodes[name] = {**node, "value": points.get(name, node["value"])}  # type: ignore[typeddict-item]
    return fixed


def _sample_nodes(trace: poutine.Trace) -> list[tuple[str, Any]]:
    return [
        (n, node)
        for n, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    ]


def _is_point_mass(node: Any) -> bool:
    fn = node["fn"]
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, Delta)


# Objectives of one distribution over the unconstrained vector


class _VectorObjective(Objective):
    """An objective for guides that draw one unconstrained vector."""

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        distribution = self._get_trace(model, guide, args, kwargs)
        target = self._target(model, guide, args, kwargs)
        if isinstance(target, LogDensity):
            _check_distribution(distribution, target)
        return self._loss(distribution, target)

    def density_loss(
        self, distribution: torch.distributions.Distribution, density: LogDensity
    ) -> Tensor:
        _check_distribution(distribution, density)
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
            sources = _sources(poutine.trace(guide).get_trace(*args, **kwargs))
        if len(sources) != 1:
            raise TypeError(
                f"Expected a guide with one distribution over an unconstrained vector, such as pyroflows.AutoFlow, in "
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


class _DrawsObjective(_VectorObjective):
    """An objective that compares a guide with draws of the posterior."""

    def __init__(self, draws: Mapping[str, Tensor], num_particles: int) -> None:
        super().__init__(num_particles)
        self.draws = _check_draws(draws)

    def _target(
        self, model: Any, guide: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Sites:
        return _Sites(find_latent_sites(guide.prototype_trace))

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
                    f"Expected draws of {site.name!r}, each of shape {expected}; got {tuple(values.shape)}."
                )
            part = site.transform.inv(values).reshape(len(values), -1)
            outside = int((~part.isfinite()).any(-1).sum())
            if outside:
                raise ValueError(
                    f"Expected draws of {site.name!r} inside of its support; got {outside} of {len(values)} that are not."
                )
            parts.append(part)
        return torch.cat(parts, -1)

    def _batch(self, vectors: Tensor) -> Tensor:
        """As many of the vectors as there are particles, at random, or all."""
        if len(vectors) <= self.num_particles:
            return vectors
        return vectors[torch.randperm(len(vectors), device=vectors.device)[: self.num_particles]]


class ForwardKL(_DrawsObjective):
    r"""The forward Kullback-Leibler divergence on given draws of the posterior, that is maximum likelihood.

    .. math:: \mathrm{KL}(p \| q_\phi) = \mathbb{E}_{z \sim p}[\log p(z) - \log q_\phi(z)], \qquad
        \ell(\phi) = -\frac{1}{K} \sum_i \log q_\phi(z_i), \quad z_i \sim p,

    in unconstrained units; the loss lacks the entropy of the posterior, which does not depend on :math:`\phi`. It covers all
    modes of the draws. The guide is one over an unconstrained vector, such as an ``AutoFlow`` or any ``AutoContinuous``; a
    flow that is fast to score trains fast.

    Args:
        draws: For each latent site of the model a tensor of shape ``(n, *site_shape)``, from MCMC, say.
        num_particles: Draws for each step, at random; all if there are fewer.

    Raises:
        TypeError: If ``draws`` is not a mapping to tensors; in a step, if the guide is of another kind.
        ValueError: If the tensors differ in length; in a step, if a site is missing or of another shape.

    Reference:
        Jerfel, Wang, Wong-Fannjiang, Heller, Ma, Jordan, "Variational refinement for importance sampling using the forward
        Kullback-Leibler divergence", 2021, https://arxiv.org/abs/2106.15980

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> objective = ForwardKL({"x": torch.randn(1000).exp()})
        >>> loss = SVI(model, pf.AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), loss=objective).step()
    """

    def __init__(self, draws: Mapping[str, Tensor], num_particles: int = 256) -> None:
        super().__init__(draws, num_particles)

    def _loss(self, distribution: Any, target: LogDensity | _Sites) -> Tensor:
        return -distribution.log_prob(self._batch(self._vectors(target))).mean()


class MMD(_DrawsObjective):
    r"""The squared maximum mean discrepancy between the guide and given draws of the posterior.

    .. math:: \mathrm{MMD}^2 = \mathbb{E}\,k(z, z') - 2\, \mathbb{E}\,k(z, y) + \mathbb{E}\,k(y, y'), \qquad
        k(z, y) = \exp\Big(-\frac{1}{2} \sum_j \frac{(z_j - y_j)^2}{h_j^2}\Big),

    with independent :math:`z, z' \sim q_\phi` and draws :math:`y, y'`, in unconstrained units, by unbiased means over all
    pairs. It sees differences of the scale of :math:`h`, and needs no density, so that it trains flows that are slow to
    score.

    Args:
        draws: For each latent site of the model a tensor of shape ``(n, *site_shape)``, with ``n`` of at least 2.
        bandwidth: The widths :math:`h`: a number, a tensor of shape ``(features,)``, or ``None`` for the standard deviations
            of the draws times :math:`\sqrt{2 D}`, the typical distance of two draws.
        num_particles: Draws of the guide for each step, and of the given ones, at random; all if there are fewer.

    Raises:
        TypeError: If an argument is of the wrong type; in a step, if the guide is of another kind than that of
            :class:`ForwardKL`.
        ValueError: If the tensors differ in length, or a bandwidth or a number of draws is too small; in a step, if a site
            is missing or of another shape.

    Reference:
        Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A kernel two-sample test", 2012,
        https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> objective = MMD({"x": torch.randn(1000).exp()})
        >>> loss = SVI(model, pf.AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), loss=objective).step()
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
        _check_reparametrised(distribution)
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
                    "Expected draws that differ in every coordinate, or a bandwidth; got a constant one."
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


class FAB(_VectorObjective):
    r"""Flow annealed importance sampling bootstrap: a forward divergence on annealed draws from a replay buffer.

    Draws of the guide :math:`q` are carried by annealed importance sampling, with Hamiltonian Monte Carlo, over
    :math:`g_\beta \propto q\,(p / q)^{\alpha \beta}` to :math:`g_1 \propto p^\alpha q^{1 - \alpha}`, get weights :math:`w_i`
    there, and train the guide by

    .. math:: \nabla_\phi \ell = -\sum_i \bar w_i \nabla_\phi \log q_\phi(z_i) \approx
        -\mathbb{E}_{g_1}[\nabla_\phi \log q_\phi(z)],

    the gradient of the forward :math:`\mathrm{KL}(p \| q)` for :math:`\alpha = 1`, and of :math:`\log \int p^2 / q` for
    :math:`\alpha = 2`, which seeks what the guide lacks. A mode outside of the guide is found by the annealing and kept by
    the buffer, where a reverse divergence would not miss it.

    Each step takes draws from the buffer with probability :math:`\propto w_i`, corrects for what the guide has become
    since, :math:`(q_\mathrm{old} / q)^{\alpha - 1}`, clipped at 10, and updates their weights; every ``reuse`` steps the
    buffer gets new draws. The guide is one over an unconstrained vector, as for :class:`ForwardKL`. Data and parameters of
    the model stay what they were in the first step. The loss is a cross-entropy.

    Args:
        num_particles: Draws for each step, and chains of the annealing.
        alpha: Power of the posterior in the target, at least 1.
        temperatures: Stages of the annealing.
        leapfrog_steps: Most leapfrog steps of a stage.
        reuse: Steps between annealings.
        capacity: Most draws that are kept; the oldest go.

    Raises:
        TypeError: If an argument is of the wrong type; in a step, if the guide is of another kind.
        ValueError: If an argument is out of range; in a step, if model or arguments are others than in the first.

    Reference:
        Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, "Flow annealed importance sampling bootstrap", 2023,
        https://arxiv.org/abs/2208.01893

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> loss = SVI(model, pf.AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), loss=FAB(32)).step()
    """

    def __init__(
        self,
        num_particles: int = 128,
        alpha: float = 2.0,
        temperatures: int = 4,
        leapfrog_steps: int = 5,
        reuse: int = 4,
        capacity: int = 16384,
    ) -> None:
        super().__init__(check_size("num_particles", num_particles, least=2))
        self.alpha = check_positive("alpha", alpha)
        if self.alpha < 1:
            raise ValueError(f"Expected alpha >= 1; got {alpha}.")
        self.temperatures = check_size("temperatures", temperatures)
        self.leapfrog_steps = check_size("leapfrog_steps", leapfrog_steps)
        self.reuse = check_size("reuse", reuse)
        self.capacity = check_size("capacity", capacity, least=num_particles)
        self.step_size = 0.5
        self._density: LogDensity | None = None
        self._buffer: _Annealed | None = None
        self._steps = 0

    def _target(
        self, model: Any, guide: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> LogDensity:
        known = self._density
        if known is None:
            self._density = LogDensity(model, args, kwargs)
        elif not (known.model is model and _same(known.args, args) and _same(known.kwargs, kwargs)):
            raise ValueError(
                "Expected the model and arguments of the first step, to which the draws in the buffer belong; got others. "
                "Make another FAB() for them."
            )
        assert self._density is not None
        return self._density

    def _loss(self, distribution: Any, density: LogDensity) -> Tensor:
        if density is not self._density:
            self._density, self._buffer = density, None
        if self._buffer is None:
            self._steps, self._buffer = 0, self._anneal(distribution, density)
        if self._steps % self.reuse == 0:
            parts = zip(self._buffer, self._anneal(distribution, density), strict=True)
            self._buffer = _Annealed(*(torch.cat(part)[-self.capacity :] for part in parts))
        self._steps += 1
        z, log_weight, log_guide = self._buffer
        rows = log_weight.softmax(0).multinomial(self.num_particles, replacement=True)
        log_prob = distribution.log_prob(z[rows])
        correction = (self.alpha - 1) * (log_guide[rows] - log_prob.detach())
        log_weight[rows] += correction
        log_guide[rows] = log_prob.detach()
        return -(correction.exp().clamp(max=10.0) * log_prob).mean()

    def _anneal(self, distribution: Any, density: LogDensity) -> _Annealed:
        """Annealed importance sampling from a guide, in units of the widths of its draws."""
        with torch.no_grad():
            z = distribution.sample((self.num_particles,))
        scale = z.std(0).clamp_min(torch.finfo(z.dtype).tiny)
        log_weight = torch.zeros_like(z[:, 0])
        for stage in range(1, self.temperatures + 1):
            log_weight = log_weight + self.alpha / self.temperatures * _log_ratio(
                distribution, density, z
            )
            target = _tempered(distribution, density, self.alpha * stage / self.temperatures, scale)
            moved = hmc(
                target,
                z / scale,
                1,
                leapfrog=self.leapfrog_steps,
                step_size=self.step_size,
                adapt=False,
            )
            z = moved.position * scale
            self.step_size *= math.exp(0.2 * (moved.acceptance - ACCEPTANCE))
        with torch.no_grad():
            log_guide = distribution.log_prob(z)
        sound = log_weight.isfinite() & log_guide.isfinite()
        if not bool(sound.any()):
            raise ValueError(
                f"Expected a finite log density at a draw of the guide; got none at {len(z)}."
            )
        return _Annealed(z[sound], log_weight[sound], log_guide[sound])


# The acceptance of Hamiltonian Monte Carlo at which a unit of distance costs least.
ACCEPTANCE = 0.65


class _Annealed(NamedTuple):
    """Annealed draws ``(n, features)``, their log weights and what the log density of the guide was there, ``(n,)``."""

    z: Tensor
    log_weight: Tensor
    log_guide: Tensor


@torch.no_grad()
def _log_ratio(distribution: Any, density: LogDensity, z: Tensor) -> Tensor:
    return density.log_prob(z) - distribution.log_prob(z)


def _tempered(distribution: Any, density: LogDensity, power: float, scale: Tensor) -> Target:
    """The log density of a guide times a power of the weights, as a function of scaled points."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x * scale
        log_guide, score = _score(distribution, z)
        log_joint, slope = density.value_and_grad(z)
        return log_guide + power * (log_joint - log_guide), (
            score + power * (slope - score)
        ) * scale

    return target


# Checks


def _check_distribution(distribution: Any, density: LogDensity) -> None:
    if not isinstance(distribution, torch.distributions.Distribution):
        raise TypeError(
            f"Expected a distribution, such as flow(); got {type(distribution).__name__}."
        )
    shape = tuple(distribution.batch_shape + distribution.event_shape)
    if tuple(distribution.event_shape) != (density.features,) or distribution.batch_shape:
        raise ValueError(
            f"Expected a distribution of one vector of {density.features} features; got one of shape {shape}."
        )


def _check_reparametrised(distribution: Any, where: str = "") -> None:
    if not distribution.has_rsample:
        raise ValueError(
            f"Expected a reparametrised distribution, with rsample; got {type(distribution).__name__}{where}. "
            "pyro.infer.TraceGraph_ELBO trains such a guide."
        )


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


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, (Real, str)) and a == b)
