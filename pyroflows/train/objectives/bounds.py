r"""Bounds on the evidence, with gradients along the paths of the particles.

They share one way down. Particles :math:`z_i \sim q_\phi` are drawn once, with their weights
:math:`w_i = p(z_i) / q_\phi(z_i)` and the slopes :math:`\nabla_z \log w_i` at fixed parameters, and

.. math:: \mathcal{L}_s = \frac{1}{s} \log \frac{1}{K} \sum_i w_i^s, \qquad
    \nabla_\phi \mathcal{L}_s = \sum_i v_i \,(1 - s + s v_i)\, \nabla_z \log w_i^\top
    \frac{\partial z_i}{\partial \phi}, \qquad v_i = \frac{w_i^s}{\sum_j w_j^s},

is the ELBO for :math:`s \to 0`, the importance-weighted bound for :math:`s = 1`, and a Renyi bound
for :math:`s = 1 - \alpha`. No term of the gradient is a score of :math:`q`, so that it has no
noise where the guide is exact. With ``path=False`` the gradient is the total one,
:math:`\sum_i v_i \nabla_\phi \log w_i(z_i(\phi))`, in which :math:`q_\phi` depends on its
parameters too. So it is for :math:`s \ne 0` where sites of the guide are scaled or masked, because
the double reparametrisation is one of the density itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from ..._checks import check_positive
from ...distributions import FlowDistribution
from ...distributions.flow import log_prob_and_score
from ...model.density import LogDensity
from ...model.sites import sample_nodes
from .. import processes
from ..processes import Part
from ._traces import fix_draws, latent_draws
from .objective import Objective, check_distribution, check_reparametrised

__all__ = ["ChiSquareBound", "ImportanceWeightedBound", "PathELBO", "RenyiBound"]


class Particles(NamedTuple):
    """Log weights, and zeros that carry their gradients along the paths of the particles.

    Attributes:
        log_weight: Of shape ``(K,)``; its own gradient is that of all else than the paths.
        path: Of shape ``(K,)``.
    """

    log_weight: Tensor
    path: Tensor


class Draws(NamedTuple):
    """Draws of a distribution over the vector of a density.

    Attributes:
        z: Of shape ``(K, features)``, with the graph of their paths.
        log_guide: Their log densities, with a graph if the gradient is the total one.
        log_weight: Log weights without graph, minus infinity where the slope is not finite.
        slope: Slopes of the log weights, or of the log joint alone if the gradient is the total
            one.
    """

    z: Tensor
    log_guide: Tensor
    log_weight: Tensor
    slope: Tensor


class Bound(Objective):
    """A bound by the mean of a power of the weights; see the head of this module."""

    power: float
    upper = False

    def __init__(
        self, num_particles: int = 32, vectorize_particles: bool = True, *, path: bool = True
    ) -> None:
        super().__init__(num_particles, vectorize_particles)
        self.path = path

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        runs = list(self._get_traces(model, guide, args, kwargs))
        return self._loss(Particles(*map(torch.cat, zip(*runs, strict=True))))

    def density_loss(
        self, distribution: torch.distributions.Distribution, density: LogDensity
    ) -> Tensor:
        check_distribution(distribution, density)
        check_reparametrised(distribution)
        z, log_guide, log_weight, slope = self._draw(distribution, density)
        path = ((z - z.detach()) * slope).sum(-1)
        if self.path:
            return self._loss(Particles(log_weight, path))
        total = log_weight + path - (log_guide - log_guide.detach())
        return self._loss(Particles(total, torch.zeros_like(path)))

    def backward(self, distribution: torch.distributions.Distribution, density: LogDensity) -> Part:
        mine = processes.rows(self.num_particles)
        if self.power == 0:
            draws = self._draw_apart(distribution, density, mine)
            part, share = self._mean(draws.log_weight)
        else:
            # The shares need the weights of all particles, by a message of their own.
            with processes.add_up(self.num_particles, density.initial.device) as everyone:
                draws = self._draw_apart(distribution, density, mine)
                everyone[mine] = draws.log_weight.to(everyone)
            bound, shares = self._shares(everyone.to(draws.log_weight))
            part, share = Part(bound, torch.ones_like(bound)), shares[mine]
        self._pull(draws, share)
        return part if self.upper else Part(-part.total, part.weight)

    def _draw_apart(self, distribution: Any, density: LogDensity, mine: slice) -> Draws:
        with processes.apart():
            return self._draw(distribution, density, mine)

    def _pull(self, draws: Draws, share: Tensor) -> None:
        """Adds the gradient of particles, given the share that each has in the bound."""
        weight = self._path_share(share) if self.path else share
        weight = weight if self.upper else -weight
        pull = weight.unsqueeze(-1) * draws.slope
        if self.path:
            draws.z.backward(pull)
        else:
            torch.autograd.backward([draws.z, draws.log_guide], [pull, -weight])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "power": self.power, "path": self.path}

    def _loss(self, particles: Particles) -> Tensor:
        return self._differentiable(particles, *self._shares(particles.log_weight.detach()))

    def _shares(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """The bound, and the share that each particle has in it."""
        if self.power == 0:
            part, share = self._mean(log_weight)
            return part.mean, share
        finite = log_weight.isfinite()
        tempered = (self.power * log_weight).where(finite, -math.inf)
        # A weight of zero counts where its power is zero too; else it is left out.
        count = torch.ones_like(log_weight).where(finite, float(self.power > 0)).sum()
        bound = (tempered.logsumexp(0) - count.log()) / self.power
        return bound, tempered.softmax(0).where(finite, 0.0)

    def _mean(self, log_weight: Tensor) -> tuple[Part, Tensor]:
        """The ELBO of some of the particles, and the share that each has in that of all."""
        finite = log_weight.isfinite()
        total = log_weight.where(finite, 0.0).sum()
        share = finite.to(log_weight) / self.num_particles
        return Part(total, finite.sum().to(total)), share

    def _differentiable(self, particles: Particles, bound: Tensor, share: Tensor) -> Tensor:
        """A loss with the value of the bound and the gradient of the particles."""
        log_weight, path = particles
        gradient = self._path_share(share) * path
        if log_weight.requires_grad:
            gradient = gradient + share * log_weight.where(log_weight.isfinite(), 0.0)
        total = gradient.sum()
        loss = bound + total - total.detach()
        return loss if self.upper else -loss

    def _path_share(self, share: Tensor) -> Tensor:
        return share if self.power == 0 else share * (1 - self.power + self.power * share)

    def _draw(self, distribution: Any, density: LogDensity, keep: slice = slice(None)) -> Draws:
        shape = (self.num_particles,)
        score = None
        if not self.path:
            z, log_guide = _rsample_and_log_prob(distribution, shape, keep)
        elif isinstance(distribution, FlowDistribution):
            z, log_guide, score = distribution.rsample_and_score(shape, keep)
        else:
            z = distribution.rsample(shape)[keep]
            log_guide, score = log_prob_and_score(distribution.log_prob, z)
        with torch.no_grad():
            log_joint, slope, _ = density.evaluate(z)
            slope = slope if score is None else slope - score
            sound = slope.isfinite().all(-1)
            log_weight = (log_joint - log_guide).where(sound, -math.inf)
            return Draws(z, log_guide, log_weight, slope.where(sound.unsqueeze(-1), 0.0))

    # SVI

    def _get_trace(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Particles:
        """Runs the guide, and the model at its draws."""
        if isinstance(poutine.unwrap(guide), Messenger):
            kind = type(poutine.unwrap(guide)).__name__
            raise TypeError(
                f"Expected a guide that runs without its model; got {kind}. "
                "Use pyro.infer.Trace_ELBO for it."
            )
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        sources = latent_draws(drawn)
        for name, node in sources.items():
            check_reparametrised(node["fn"], f" at site {name!r}")
        if not self.path or (self.power and any(map(_is_scaled, sources.values()))):
            # A scaled density of the guide has another double reparametrisation; the total
            # gradient needs none.
            model_trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(
                *args, **kwargs
            )
            self._check(model_trace, drawn)
            return _total(_particles(self._sum(model_trace) - self._sum(drawn), []))
        carried = _carried_scores(sources)
        points = {name: node["value"].detach().requires_grad_() for name, node in sources.items()}
        fixed = poutine.replay(guide, trace=fix_draws(drawn, points))
        guide_trace = poutine.trace(fixed).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        self._check(model_trace, guide_trace)
        log_guide = self._sum(drawn).detach()
        return self._along_paths(sources, points, carried, log_guide, guide_trace, model_trace)

    def _along_paths(
        self,
        sources: Mapping[str, Any],
        points: Mapping[str, Tensor],
        carried: Mapping[str, Tensor],
        log_guide: Tensor,
        guide_trace: poutine.Trace,
        model_trace: poutine.Trace,
    ) -> Particles:
        """Particles from guide and model run again at draws that are cut off from their paths."""
        joint = self._sum(model_trace)
        log_weight = joint.detach() - log_guide
        if not torch.is_grad_enabled():
            return _particles(log_weight, [])
        # Point masses follow from the draws: what the parameters do to them is no score.
        direct = joint - self._sum(guide_trace, lambda name: name not in sources)
        scored = self._sum(guide_trace, lambda name: name in sources and name not in carried)
        slopes = _gradients(direct - scored, points)
        paths = [
            (node["value"], slopes[name] - carried.get(name, 0.0)) for name, node in sources.items()
        ]
        return _particles(direct + (log_weight - direct.detach()), paths)

    def _sum(
        self, trace: poutine.Trace, chosen: Callable[[str], bool] = lambda name: True
    ) -> Tensor:
        """The log density of each particle, over some sites."""
        trace = prune_subsample_sites(trace)
        count = self.num_particles if self.vectorize_particles else 1
        trace.compute_log_prob(lambda name, _: chosen(name))
        nodes = [node for name, node in sample_nodes(trace) if chosen(name)]
        for node in nodes if is_validation_enabled() else []:
            check_site_shape(node, self.max_plate_nesting)  # type: ignore[arg-type]
        parts = [node["log_prob"].reshape(count, -1).sum(-1) for node in nodes]
        return sum(parts, start=torch.zeros(()))

    def _check(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
        latents = [name for name, node in sample_nodes(model_trace) if not node["is_observed"]]
        missing = [name for name in latents if name not in guide_trace]
        if missing:
            raise ValueError(
                "Expected a guide of every latent site of the model; got one without "
                f"{', '.join(map(repr, missing))}. "
                "Discrete sites are summed out by pyro.infer.TraceEnum_ELBO."
            )
        if self.upper and any(node["type"] == "param" for node in model_trace.nodes.values()):
            raise ValueError(
                f"Expected a model without parameters of its own in {type(self).__name__}; got one "
                "with some. To minimise an upper bound on the evidence would fit them away from "
                "the "
                "data."
            )
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)


class PathELBO(Bound):
    r"""The evidence lower bound with path gradients (sticking the landing), for every
    reparametrised guide.

    .. math:: \mathcal{L}(\phi) = \mathbb{E}_{z \sim q_\phi}\left[\log \frac{p(z)}{q_\phi(z)}\right], \qquad
        \nabla_\phi \mathcal{L} = \mathbb{E}\left[\left(\nabla_z \log p(z) - \nabla_z \log
        q_\phi(z)\right)^\top \frac{\partial z}{\partial \phi}\right].

    The score of mean zero, :math:`\nabla_\phi \log q_\phi(z)` at a fixed :math:`z`, is left out,
    so that the gradient has no noise where the guide is exact. A flow carries :math:`\nabla_z \log
    q` along its sampling pass, without an inversion. Particles whose density or slope is not
    finite are left out: the value is the mean over the others, and they add nothing to the
    gradient, which is still divided by the number of all.

    Args:
        num_particles: Draws for each step.
        vectorize_particles: Whether model and guide run once for all particles, in an outermost
            plate.
        path: Whether to leave that score out; else the gradient is the total one, for guides whose
            density cannot be differentiated at a fixed point.

    Raises:
        TypeError: If ``num_particles`` is not an integer.
        ValueError: If it is not positive; in a step, if a site of the guide is not reparametrised,
            or the guide lacks a latent site of the model.

    Reference:
        Roeder, Wu, Duvenaud, "Sticking the landing: Simple, lower-variance gradient estimators for
        variational inference", 2017, https://arxiv.org/abs/1703.09194

        Vaitl, Winkler, Richter, Kessel, "Fast and unified path gradient estimators for normalizing
        flows", 2024, https://arxiv.org/abs/2403.15881

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer import SVI
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        >>> adam = pyro.optim.Adam({"lr": 0.01})
        >>> svi = SVI(model, pf.AutoFlow(model), adam, loss=PathELBO(num_particles=32))
        >>> loss = svi.step()
    """

    power = 0.0


class ImportanceWeightedBound(Bound):
    r"""The importance-weighted bound (IWAE) with doubly reparametrised gradients (DReG).

    .. math:: \mathcal{L}_K(\phi) = \mathbb{E}\left[\log \frac{1}{K} \sum_{i=1}^K w_i\right], \quad
        w_i = \frac{p(z_i)}{q_\phi(z_i)}, \qquad
        \nabla_\phi \mathcal{L}_K = \mathbb{E}\left[\sum_i v_i^2\, \nabla_z \log w_i^\top
        \frac{\partial z_i}{\partial \phi}\right], \quad v_i = \frac{w_i}{\sum_j w_j}.

    It rises with :math:`K` from the ELBO to the log evidence. Unlike the plain gradient, this one
    gains from more particles and has no noise where the guide is exact. The parameters
    :math:`\theta` of the model get :math:`\sum_i v_i \nabla_\theta \log p_\theta(z_i)`. A density
    of zero is a weight of zero.

    Args:
        num_particles: Particles :math:`K` of the bound.
        vectorize_particles: As in :class:`PathELBO`.
        path: Whether the gradient is doubly reparametrised; else it is the total one.

    Raises:
        TypeError, ValueError: As :class:`PathELBO`.

    Reference:
        Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016,
        https://arxiv.org/abs/1509.00519

        Tucker, Lawson, Gu, Maddison, "Doubly reparameterized gradient estimators for Monte Carlo
        objectives", 2019, https://arxiv.org/abs/1810.04152

        Bauer, Mnih, "Generalized doubly reparameterized gradient estimators", 2021,
        https://arxiv.org/abs/2101.11046

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


class RenyiBound(Bound):
    r"""The variational Renyi bound, from the ELBO to the importance-weighted bound and beyond.

    .. math:: \mathcal{L}_\alpha(\phi) = \frac{1}{1 - \alpha} \log \mathbb{E}_{z \sim q_\phi}\left[
        \left(\frac{p(z)}{q_\phi(z)}\right)^{1 - \alpha}\right] = \log Z - D_\alpha(q_\phi \| p /
        Z),

    with the Renyi divergence :math:`D_\alpha`, estimated by the mean over :math:`K` particles. The
    gradient is doubly reparametrised,

    .. math:: \nabla_\phi \mathcal{L} = \sum_i \left(\alpha v_i + (1 - \alpha) v_i^2\right) \nabla_z \log w_i^\top
        \frac{\partial z_i}{\partial \phi}, \qquad v_i \propto w_i^{1 - \alpha},

    which is unbiased for the expected estimate. A small :math:`\alpha` covers the mass of the
    posterior, a large one seeks a mode. The order 1 is :class:`PathELBO`, 0 is
    :class:`ImportanceWeightedBound`, and a negative one bounds from above, as
    :class:`ChiSquareBound` does.

    Args:
        alpha: Order of the divergence, positive.
        num_particles: Particles of the estimate.
        vectorize_particles: As in :class:`PathELBO`.
        path: As in :class:`ImportanceWeightedBound`.

    Raises:
        TypeError, ValueError: As :class:`PathELBO`; if ``alpha`` is not a positive number.

    Reference:
        Li, Turner, "Renyi divergence variational inference", 2016, https://arxiv.org/abs/1602.02311

        Daudel, Benton, Shi, Doucet, "Alpha-divergence variational inference meets importance
        weighted auto-encoders: Methodology and asymptotics", 2023, https://arxiv.org/abs/2210.06226

    Example:
        >>> RenyiBound(alpha=0.5, num_particles=64).alpha
        0.5
    """

    def __init__(
        self,
        alpha: float,
        num_particles: int = 32,
        vectorize_particles: bool = True,
        *,
        path: bool = True,
    ) -> None:
        self.alpha = check_positive("alpha", alpha)
        self.power = 1 - self.alpha
        super().__init__(num_particles, vectorize_particles, path=path)


class ChiSquareBound(Bound):
    r"""The chi-square upper bound on the evidence (CUBO), to minimise.

    .. math:: \mathcal{U}_n(\phi) = \frac{1}{n} \log \mathbb{E}_{z \sim q_\phi}\left[
        \left(\frac{p(z)}{q_\phi(z)}\right)^n\right] \ge \log Z, \qquad
        \nabla_\phi \mathcal{U}_n = (1 - n) \sum_i v_i \nabla_z \log w_i^\top \frac{\partial
        z_i}{\partial \phi}, \quad v_i = \frac{w_i^n}{\sum_j w_j^n}.

    For :math:`n = 2` it is :math:`\log Z + \frac{1}{2} \log(1 + \chi^2(p / Z \| q))`. The gradient
    is that of :math:`\mathbb{E}[w^n]`, doubly reparametrised and divided by its own estimate, with
    a bias of order :math:`1 / K`. It punishes a guide that is narrower than the posterior. The
    mean over few particles lies below the bound.

    Args:
        order: The power :math:`n`, above 1.
        num_particles: Particles of the estimate.
        vectorize_particles: As in :class:`PathELBO`.
        path: As in :class:`ImportanceWeightedBound`.

    Raises:
        TypeError, ValueError: As :class:`PathELBO`; if ``order`` is not a number above 1; in a
            step of ``SVI``, if the model has parameters of its own, which an upper bound cannot
            fit.

    Reference:
        Dieng, Tran, Ranganath, Paisley, Blei, "Variational inference via chi upper bound
        minimization", 2017, https://arxiv.org/abs/1611.00328

    Example:
        >>> ChiSquareBound(num_particles=64).order
        2.0
    """

    upper = True

    def __init__(
        self,
        order: float = 2.0,
        num_particles: int = 256,
        vectorize_particles: bool = True,
        *,
        path: bool = True,
    ) -> None:
        self.power = self.order = check_positive("order", order)
        if self.order <= 1:
            raise ValueError(
                f"Expected order > 1; got {order}. Up to 1 the bound is a lower one: use "
                "RenyiBound."
            )
        super().__init__(num_particles, vectorize_particles, path=path)

    def _path_share(self, share: Tensor) -> Tensor:
        return (1 - self.power) * share


def _particles(log_weight: Tensor, paths: Sequence[tuple[Tensor, Tensor]]) -> Particles:
    """Particles from their weights, and from draws with the slopes of the log weights there."""
    count = len(log_weight)
    path = torch.zeros_like(log_weight)
    for z, slope in paths:
        slope = slope.reshape(count, -1)
        sound = slope.isfinite().all(-1)
        log_weight = log_weight.where(sound, -math.inf)
        moved = (z - z.detach()).reshape(count, -1)
        path = path + (moved * slope.where(sound.unsqueeze(-1), 0.0)).sum(-1)
    return Particles(log_weight, path)


def _total(particles: Particles) -> Particles:
    """The same particles, whose log weights carry the gradients along the paths too."""
    log_weight, path = particles
    return Particles(log_weight + path, torch.zeros_like(path))


def _rsample_and_log_prob(
    distribution: Any, shape: tuple[int, ...], keep: slice
) -> tuple[Tensor, Tensor]:
    """Draws with their log densities, both with their gradients."""
    if isinstance(distribution, FlowDistribution):
        return distribution.rsample_and_log_prob(shape, keep)
    z = distribution.rsample(shape)[keep]
    return z, distribution.log_prob(z)


def _gradients(values: Tensor, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with respect to points, zero where values do not depend on them; keeps the graph."""
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


def _is_scaled(node: Mapping[str, Any]) -> bool:
    """Whether a site's log density counts with a factor, or in part."""
    scale = node["scale"]
    return node["mask"] is not None or isinstance(scale, Tensor) or scale != 1


def _carried_scores(sources: Mapping[str, Any]) -> dict[str, Tensor]:
    """The score at the draw of a guide that is one flow, before the flow forgets it.

    Where one site depends on another, scores of single sites are not enough.
    """
    if len(sources) != 1:
        return {}
    ((name, node),) = sources.items()
    if not isinstance(node["fn"], FlowDistribution) or _is_scaled(node):
        return {}
    score = node["fn"].carried_score(node["value"])
    return {} if score is None else {name: score}
