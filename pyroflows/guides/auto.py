"""A flow as an automatic guide."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.kl import register_kl
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .._checks import call_factory, check_function, check_model, check_positive
from .._random import forked
from .._spec import build, describe, name_of
from ..distributions import FlowDistribution
from ..distributions.flow import sum_rightmost
from ..flows import Flow, RealNVP
from ..model.checks import check_entries
from ..model.density import LogDensity
from ..model.handlers import StartInPlates, UnrolledLoops
from ..model.masks import settle_masks
from ..model.sites import (
    LatentSite,
    SiteKind,
    find_latent_sites,
    rotated,
    split_angles,
    split_vector,
)
from ..model.start import check_support, init_to_median
from ..nn import mlp
from ..transforms import Elementwise, Transform
from ..transforms.low_rank import LowRankRoot
from ..transforms.roots import Root
from ..univariate import MonotoneNetwork
from .guide import BaseSpace, Guide
from .late import BuiltLate
from .whitened import WhitenedFlow

__all__ = ["AutoFlow", "ScoredDeltas", "check_factory", "whitened_flow"]


class FlowGuide(BuiltLate, AutoContinuous, Guide):
    """The part that guides made of flows share: construction, quantiles, saving and copying."""

    def __init__(
        self,
        model: Callable[..., Any],
        flow: Callable[[int], Flow | Transform] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        self._init_scale = check_positive("init_scale", init_scale)
        check_model(model)
        check_function("init_loc_fn", init_loc_fn)
        check_factory("flow", flow)
        unrolled = UnrolledLoops()(StartInPlates()(model))
        super().__init__(unrolled, init_loc_fn=init_loc_fn)
        self._make_flow = flow

    # Construction, once the model has run

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._model is None:
            raise RuntimeError(
                "Expected a guide with a model; got one that was pickled before its first call, "
                "and pickles hold no model. "
                f"Make a new {type(self).__name__}(model)."
            )
        try:
            self._build(*args, **kwargs)
            self.load_waiting_state()
        except Exception as error:
            # A guide that refused a model once must refuse it again, and not go on half made.
            trace, self.prototype_trace = self.prototype_trace, None
            if isinstance(error, NotImplementedError) and trace is not None:
                for name, site in trace.iter_stochastic_nodes():
                    check_support(name, site["fn"].support)
                _refuse_subsampled_latents(trace)
            raise

    def _build(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        _refuse_subsampled_latents(self.prototype_trace)
        found = find_latent_sites(self.prototype_trace)
        sites = settle_masks(found, self.prototype_trace, self._runner(args, kwargs))
        check_entries(sites)
        self._sites = sites
        self.latent_dim = sum(site.features for site in sites)
        angles = sum(site.features for site in sites if site.kind is SiteKind.CIRCLE)
        if angles:
            self.register_buffer("circle_centres", torch.zeros(angles).to(self._init_loc()))

    def _runner(self, args: Any, kwargs: Any) -> Callable[[Mapping[str, Tensor]], Any]:
        """Runs the model at values of its sites."""

        def run(values: Mapping[str, Tensor]) -> Any:
            model = poutine.trace(poutine.condition(self.model, data=dict(values)))
            with poutine.block():
                return model.get_trace(*args, **kwargs)

        return run

    @property
    def sites(self) -> list[LatentSite]:
        """The latent sites, in the order of the vector."""
        self._check_built("sites")
        return rotated(self._sites, self.centres())

    def centres(self) -> dict[str, Tensor]:
        """The angles that the guide takes for zero; see :meth:`Guide.centres`."""
        angles = getattr(self, "circle_centres", None)
        return {} if angles is None else split_angles(self._sites, angles)

    def rotate(self, centres: Mapping[str, Tensor]) -> None:
        """Sets the angles that the guide takes for zero; see :meth:`Guide.rotate`."""
        for name, block in self.centres().items():
            block.copy_(centres[name])

    def _whitened_flow(self, loc: Tensor) -> WhitenedFlow:
        """Makes a fresh flow, with a whitening map that starts at a point."""
        return whitened_flow(self._make_flow, loc, self._init_scale)

    # The contract of a guide

    @property
    def features(self) -> int:  # type: ignore[override]
        """Entries of the unconstrained vector."""
        self._check_built("features")
        return self.latent_dim

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws vectors and scores them in the same pass; see :meth:`Guide.sample_and_log_prob`."""
        return self.get_posterior().rsample_and_log_prob((n,))

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores vectors; see :meth:`Guide.log_prob`."""
        return self.get_posterior().log_prob(z)

    def spec(self) -> dict[str, Any]:
        """Plain data from which the guide is made anew; see :meth:`Guide.spec`."""
        self._check_built("spec")
        name = name_of(type(self))
        return Guide.spec(self) if name is None else {"guide": name, **self._parts_spec()}

    def _parts_spec(self) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} does not define _parts_spec.")

    # The protocol of AutoContinuous

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent site, as a guide with the arguments of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with ScoredDeltas():
            return self._sample_sites(*args, **kwargs)

    def _sample_sites(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values = {}
        for site, node, unconstrained in self._constrainable(latent):
            value = site.transform(unconstrained)
            log_density: Any = 0.0
            if poutine.get_mask() is not False:
                log_det = site.log_det(unconstrained, value)
                inside = log_det.dim() - value.dim() + node["fn"].event_dim
                log_density = -sum_rightmost(log_det, inside)
            delta = dist.Delta(value, log_density, node["fn"].event_dim)
            with contextlib.ExitStack() as stack:
                for frame in node["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                values[site.name] = pyro.sample(site.name, delta)
        return values

    def _init_loc(self) -> Tensor:
        nodes = self.prototype_trace.nodes
        return torch.cat([site.pack(nodes[site.name]["value"].detach()) for site in self._sites])

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Pairs of a site and its unconstrained value, which is zero where a mask is off."""
        batch = latent.shape[:-1]
        pairs = split_vector(self._sites, latent)
        blocks = [unconstrained.reshape(*batch, -1) for _, unconstrained in pairs]
        return super()._unpack_latent(torch.cat(blocks, -1))

    def _constrainable(self, latent: Tensor) -> Iterator[tuple[LatentSite, Any, Tensor]]:
        for site, (node, unconstrained) in zip(
            self.sites, self._unpack_latent(latent), strict=True
        ):
            yield site, node, unconstrained

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        latent = self._reference_draws()
        return latent.quantile(0.5, dim=0), latent.std(0)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior medians by Monte Carlo, of each unconstrained entry, on the supports."""
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles by Monte Carlo, of each unconstrained entry, on the supports.

        Args:
            quantiles: Levels between 0 and 1.

        Returns:
            For each site a tensor of shape ``(len(quantiles), *site_shape)``.

        Raises:
            ValueError: If a level is outside of [0, 1].
        """
        latent = self._reference_draws()
        levels = torch.as_tensor(quantiles, dtype=latent.dtype, device=latent.device)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"Expected quantiles between 0 and 1; got {quantiles}.")
        result: dict[str, list[Tensor]] = {}
        for row in latent.quantile(levels, dim=0):
            for site, _, unconstrained in self._constrainable(row):
                result.setdefault(site.name, []).append(site.transform(unconstrained))
        return {name: torch.stack(values) for name, values in result.items()}

    def _draws(self, pairs: int) -> Tensor:
        """Twice as many draws of the guide, as unconstrained vectors."""
        return self.get_posterior().sample((2 * pairs,))

    def _reference_draws(self, pairs: int = 5000) -> Tensor:
        """Draws with a seed of their own: medians and quantiles agree, no random state moves."""
        self._check_built("median and quantiles")
        with forked(0):
            return self._draws(pairs)

    def _check_built(self, what: str) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                "Expected a guide that has met its model; "
                f"call guide(*args, **kwargs) before {what}."
            )


class AutoFlow(FlowGuide):
    r"""A normalizing flow over all continuous latent sites of a model, as an autoguide of Pyro.

    The sites are mapped to one unconstrained vector :math:`z`, and

    .. math:: x \sim N(0, I), \qquad z = \mu + L\, f(x),

    with a flow :math:`f` that starts at the identity and a whitening map :math:`(\mu, L)` that
    starts at ``init_loc_fn`` and ``init_scale``; see :meth:`whiten` for a better start. Above 256
    latent entries :math:`L` is a diagonal matrix times one of low rank beside the identity. The
    ELBOs of Pyro that ask a guide for its entropy term (``Trace_ELBO``, ``TraceGraph_ELBO``,
    ``TraceMeanField_ELBO`` and their jitted kin) get the path gradient.

    Args:
        model: A Pyro model.
        flow: A ready-made flow such as ``RealNVP``, or any callable from the number of features to a
            :class:`Flow` or a :class:`Transform` over the whole space. By default a ``RealNVP``
            with ``mixing=None`` and narrow, bounded networks, and for a single latent feature a
            monotone network.
        init_loc_fn: Where each site starts: an initialisation function of Pyro, or the default,
            which knows improper sites too.
        init_scale: Standard deviation at the start, in unconstrained units.

    Raises:
        ValueError: If ``init_scale`` is not positive; in the first call, if the flow does not fit
            the model or a latent site is discrete or inside a subsampled plate.

    Reference:
        Kucukelbir, Tran, Ranganath, Gelman, Blei, "Automatic differentiation variational
        inference", 2017, https://arxiv.org/abs/1603.00788

        Agrawal, Sheldon, Domke, "Advances in black-box VI: Normalizing flows, importance weighting,
        and optimization", 2020, https://arxiv.org/abs/2006.10343

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoFlow(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step()
        >>> sorted(guide.median())
        ['scale', 'x']
    """

    has_path_gradient = True

    def _build(self, *args: Any, **kwargs: Any) -> None:
        super()._build(*args, **kwargs)
        self.flow = self._whitened_flow(self._init_loc())

    def sample_with_path_gradient(
        self, n: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws vectors with the path gradient; see :meth:`Guide.sample_with_path_gradient`."""
        posterior = self.get_posterior()
        z = posterior.rsample((n,))
        return z, posterior.score_parts(z).entropy_term

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The base of the flow."""
        self._check_built("base_spaces")
        return (BaseSpace(self.flow.transform, self.flow.base),)

    def _parts_spec(self) -> dict[str, Any]:
        return {"flow": describe(self.flow)["kwargs"]["flow"]}

    @classmethod
    def make(cls, spec: Mapping[str, Any], density: LogDensity) -> AutoFlow:
        """Makes the guide of a spec."""
        guide = cls(
            density.continuous_model, lambda features: build(spec["flow"]), density.init_loc_fn
        )
        density.introduce(guide)
        return guide

    def whiten(self, loc: Tensor, scale_tril: Root) -> None:
        r"""Sets the whitening map, for instance to a Gaussian fit of the posterior.

        Args:
            loc: Tensor of shape ``(features,)``.
            scale_tril: Lower-triangular tensor of shape ``(features, features)`` with a positive
                diagonal, of which the principal factors are kept above 256 features.

        Raises:
            RuntimeError: If the guide has not met its model yet.
            ValueError: If the diagonal is not positive.
        """
        self._check_built("whiten")
        self.flow.whiten(loc, scale_tril)

    def get_base_dist(self) -> torch.distributions.Distribution:
        """The base distribution."""
        self._check_built("get_base_dist")
        return self.flow.base

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """The transform from the base to the unconstrained latent vector.

        Raises:
            RuntimeError: If the guide has not met its model yet.
            ValueError: If a site is an angle, which ``NeuTraReparam`` would read as a real number.
        """
        self._check_built("get_transform")
        if self.centres():
            raise ValueError(
                "Expected a guide without angles, which NeuTraReparam takes for real numbers; got "
                f"one with {', '.join(map(repr, self.centres()))}. Use "
                "pyroflows.posterior.neutra."
            )
        return self.flow.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution of the unconstrained latent vector."""
        self._check_built("get_posterior")
        return self.flow(path_gradient=True)

    @torch.no_grad()
    def _draws(self, pairs: int) -> Tensor:
        x = self.flow.base.sample((pairs,))
        if self.flow.given_base is None:
            # Antithetic pairs make the median of a normal exact.
            x = torch.cat([x, -x])
        return self.flow.transform.forward_and_log_det(x)[0]


def check_factory(name: str, flow: Any) -> None:
    """Raises ``TypeError`` unless ``flow`` is ``None`` or a callable that may make flows."""
    if flow is not None and not callable(flow):
        raise TypeError(
            f"Expected {name} to be a callable from the number of features to a Flow; got {flow!r}."
        )
    if isinstance(flow, torch.nn.Module):
        raise TypeError(
            f"Expected {name} to be a callable such as pf.RealNVP, not a made "
            f"{type(flow).__name__}."
        )


def whitened_flow(
    make: Callable[[int], Flow | Transform] | None, loc: Tensor, scale: float
) -> WhitenedFlow:
    """Makes a fresh flow, with a whitening map that starts at a point.

    Args:
        make: A callable from the number of features to a flow, or ``None`` for the default.
        loc: The point, of shape ``(features,)``.
        scale: Standard deviation of each entry.

    Raises:
        TypeError: If it makes no flow.
        ValueError: If the flow does not fit.
    """
    made = call_factory("flow", make or default_flow, "pf.RealNVP is", features=len(loc))
    flow = WhitenedFlow(_check_flow(made, len(loc))).to(loc.device, loc.dtype)
    flow.whiten(loc, LowRankRoot.diagonal(torch.full_like(loc, scale)))
    return flow


def default_flow(features: int) -> Flow | Transform:
    """Makes a flow that any optimiser may train: bounded networks let no draw run away."""
    if features == 1:
        return Elementwise(MonotoneNetwork(), features)
    return RealNVP(features, network=mlp((32, 32), torch.nn.Tanh), mixing=None)


def _check_flow(made: Any, features: int) -> Flow | Transform:
    if not isinstance(made, (Flow, Transform)):
        raise TypeError(f"Expected flow(features) to return a Flow or a Transform; got {made!r}.")
    support = getattr(made, "support", None)
    if support is not None:
        raise ValueError(
            f"Expected a flow over the whole space in AutoFlow; got one with support {support}."
        )
    if made.context_features is not None:
        raise ValueError(
            "Expected a flow without context in AutoFlow; got one with context_features."
        )
    if made.event_shape != (features,):
        raise ValueError(
            f"Expected a flow of {features} features, as the model has; "
            f"got {tuple(made.event_shape)}."
        )
    return made


def _refuse_subsampled_latents(trace: Any) -> None:
    for name, site in trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"Expected latent sites outside of subsampled plates; got {name!r} in plate "
                    f"{frame.name!r}, of which each run sees {frame.size} of {frame.full_size}. "
                    "An AutoFlow learns one vector of latents for all data; use AutoAmortizedFlow, "
                    "an amortised guide, which reads each mini-batch, for such a site."
                )


class _ScoredDelta(dist.Delta):
    """A point mass with a log-density, which Delta's Kullback-Leibler divergence leaves out."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> _ScoredDelta:
        return super().expand(batch_shape, self._get_checked_instance(_ScoredDelta, _instance))


@register_kl(_ScoredDelta, dist.Distribution)
def _kl_scored_delta(p: _ScoredDelta, q: Any) -> Tensor:
    # Then TraceMeanField_ELBO takes the log-densities of the sites, with the scale and the mask
    # that each one has.
    raise NotImplementedError


class ScoredDeltas(Messenger):
    """Makes scored deltas of sites, because TraceMeanField_ELBO takes divergences if it can."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:  # type: ignore[override]
        if type(msg["fn"]) is dist.Delta:
            delta = msg["fn"]
            msg["fn"] = _ScoredDelta(
                delta.v, delta.log_density, delta.event_dim, validate_args=False
            )
