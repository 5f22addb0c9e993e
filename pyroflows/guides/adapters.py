"""Pyro's autoguides and hand-written guides, as guides of this library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide as autoguides
from torch import Tensor

from .._compat import init_transform_of, location_and_scale
from .._random import forked
from .._spec import build, describe, name_of, resolve_class
from .._wording import unstopped
from ..flows import Flow
from ..model.density import LogDensity
from ..model.sites import LatentSite, SiteKind
from ..transforms import Transform
from .auto import FlowGuide
from .combined import ProductGuide, ReorderedGuide, TorchMap
from .guide import Base, BaseSpace, Guide
from .traced import TracedGuide, check_sites

__all__ = ["as_guide"]


class Adapted(NamedTuple):
    """A guide of some sites, in the order in which its vector holds them."""

    guide: Guide
    sites: list[LatentSite]


def as_guide(guide: Any, density: LogDensity) -> Guide:
    """Adapts a guide of Pyro to the contract of :class:`Guide`.

    A fresh autoguide meets its model first. Its parameters are read in each call, so that later
    training is seen.

    Args:
        guide: A guide of this library; an autoguide over one vector, such as
            ``AutoMultivariateNormal`` or ``AutoIAFNormal``; ``AutoNormal``; an ``AutoGuideList`` of
            these; or a hand-written guide, a function or a module with the arguments of the model,
            whose ``pyro.sample`` statements are those of the continuous latent sites.
        density: The log density of the model.

    Returns:
        A guide over the unconstrained vector of ``density``.

    Raises:
        TypeError: If ``guide`` is no guide, or has no density, such as ``AutoDelta``.
        ValueError: If its sites are not those of the model, in name, shape or support; if it has
            auxiliary sites; or if it cannot score a vector that it has not drawn.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = as_guide(AutoMultivariateNormal(model), pf.model.LogDensity(model))
        >>> z, log_q = guide.sample_and_log_prob(5)
        >>> torch.allclose(guide.log_prob(z), log_q), len(guide.base_spaces())
        (True, 1)
    """
    adapted, sites = _adapt(guide, density)
    names, wanted = [site.name for site in sites], [site.name for site in density.sites]
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise ValueError(f"Expected a guide with each site once; got {twice[0]!r} more than once.")
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(
            "Expected a guide of all continuous latent sites of the model; "
            f"got one without {', '.join(map(repr, missing))}."
        )
    if adapted.features != density.features:
        raise ValueError(
            f"Expected a guide of the {density.features} unknown entries of the model; got one of "
            f"{adapted.features}. Entries that a mask switches off are unknowns for "
            f"{type(guide).__name__}; use AutoFlow, which leaves them out."
        )
    return adapted if names == wanted else ReorderedGuide(adapted, _order(sites, wanted))


def _order(sites: Sequence[LatentSite], wanted: Sequence[str]) -> Tensor:
    """Where each entry of a vector in the wanted order stands in the vector of the sites."""
    entries = torch.arange(sum(site.features for site in sites), device="cpu")
    blocks = entries.split([site.features for site in sites])
    of_site = {site.name: block for site, block in zip(sites, blocks, strict=True)}
    return torch.cat([of_site[name] for name in wanted])


@functools.singledispatch
def _adapt(guide: Any, density: LogDensity) -> Adapted:
    """Adapts a guide whose kind is not registered: it is run under a trace."""
    if isinstance(guide, type):
        name = guide.__name__
        raise TypeError(f"Expected a made guide such as {name}(model); got the class {name}.")
    if isinstance(guide, (Flow, Transform)):
        name = type(guide).__name__
        raise TypeError(f"Expected a guide such as AutoFlow(model, {name}); got a made {name}.")
    if not callable(guide):
        raise TypeError(
            f"Expected a guide, which takes the arguments of the model; got {type(guide).__name__}."
        )
    traced = TracedGuide(guide, density)
    return Adapted(traced, traced.sites)


def _refuse(kinds: Sequence[type], advice: str) -> None:
    """Registers kinds of guides that have no density to judge."""

    def refuse(guide: Any, density: LogDensity) -> Adapted:
        raise TypeError(f"Expected a guide with a density; got {type(guide).__name__}, {advice}.")

    for kind in kinds:
        _adapt.register(kind, refuse)


_refuse(
    [autoguides.AutoDelta],
    "which puts all mass on one point: use AutoNormal, or AutoLaplaceApproximation and the result "
    "of its laplace_approximation()",
)
_refuse(
    [autoguides.AutoLaplaceApproximation],
    "which is one point until it is approximated: pass guide.laplace_approximation(*args)",
)
_refuse(
    [autoguides.AutoStructured, autoguides.AutoGaussian],
    "which cannot score a vector that it has not drawn: use AutoMultivariateNormal or AutoFlow",
)
_refuse(
    [autoguides.AutoDiscreteParallel],
    "which is of discrete sites: leave it out, because they are summed out",
)


@_adapt.register
def _(guide: Guide, density: LogDensity) -> Adapted:
    return Adapted(guide, list(density.sites))


@_adapt.register
def _(guide: FlowGuide, density: LogDensity) -> Adapted:
    if guide.prototype_trace is None:
        density.introduce(guide)  # its parameters are its own, whatever the param store holds
    return Adapted(guide, _sites(guide, density))


@_adapt.register
def _(guide: autoguides.AutoContinuous, density: LogDensity) -> Adapted:
    sites = _sites(guide, density)
    has_base = type(guide).get_base_dist is not autoguides.AutoContinuous.get_base_dist

    def space() -> tuple[Base, Any]:
        return guide.get_base_dist(), guide.get_transform()

    return _of_vector(guide, sites, guide.get_posterior, space if has_base else None)


@_adapt.register
def _(guide: autoguides.AutoLowRankMultivariateNormal, density: LogDensity) -> Adapted:
    sites = _sites(guide, density)

    def space() -> tuple[Base, Any]:
        normal = guide.get_posterior()
        root = torch.linalg.cholesky(normal.covariance_matrix)
        return _standard_normal(normal.loc), dist.transforms.LowerCholeskyAffine(normal.loc, root)

    return _of_vector(guide, sites, guide.get_posterior, space)


@_adapt.register
def _(guide: autoguides.AutoNormal, density: LogDensity) -> Adapted:
    sites = _sites(guide, density)

    def loc_and_scale() -> tuple[Tensor, Tensor]:
        pairs = [(site, location_and_scale(guide, site.name)) for site in sites]
        # Entries are independent, so that those which a mask switches off can be left out.
        locs, scales = zip(*(map(site.active_entries, pair) for site, pair in pairs), strict=True)
        return torch.cat(locs), torch.cat(scales)

    def space() -> tuple[Base, Any]:
        loc, scale = loc_and_scale()
        return _standard_normal(loc), dist.transforms.AffineTransform(loc, scale)

    return _of_vector(guide, sites, lambda: dist.Normal(*loc_and_scale()).to_event(1), space)


@_adapt.register
def _(guide: autoguides.AutoGuideList, density: LogDensity) -> Adapted:
    _meet(guide, density)
    parts = [_adapt(part, density) for part in guide]
    sites = [site for part in parts for site in part.sites]
    return Adapted(
        ProductGuide([part.guide for part in parts], functools.partial(_spec, guide)), sites
    )


def _meet(guide: autoguides.AutoGuide, density: LogDensity) -> None:
    """Runs a fresh autoguide once, which builds it and reads a param store that was loaded."""
    if guide.prototype_trace is None:
        with density.on_device(), poutine.block():
            guide(*density.args, **density.kwargs)


def _sites(guide: autoguides.AutoGuide, density: LogDensity) -> list[LatentSite]:
    _meet(guide, density)
    return check_sites(dict(guide.prototype_trace.iter_stochastic_nodes()), density)


def _of_vector(
    guide: autoguides.AutoGuide,
    sites: list[LatentSite],
    distribution: Callable[[], Any],
    space: Callable[[], tuple[Base, Any]] | None,
) -> Adapted:
    """Adapts an autoguide with a distribution of one vector, if it can score any vector."""
    angles = [site.name for site in sites if site.kind is SiteKind.CIRCLE]
    if angles:
        raise ValueError(
            f"Expected a guide of angles in {', '.join(map(repr, angles))}; got "
            f"{type(guide).__name__}, which puts them on the whole line. Use AutoFlow."
        )
    adapted = VectorGuide(guide, distribution, space)
    with torch.no_grad(), forked(0):
        z, _ = adapted.sample_and_log_prob(1)
        try:
            adapted.log_prob(z.clone())
        except (NotImplementedError, KeyError, RuntimeError) as error:
            reason = unstopped(" ".join(str(error).split())) or type(error).__name__
            raise ValueError(
                f"Expected a guide that can score any vector; got {type(guide).__name__}, whose "
                f"transform has no inverse here ({reason}). Use AutoFlow, or another transform."
            ) from error
    return Adapted(adapted, sites)


def _standard_normal(like: Tensor) -> Any:
    return dist.Normal(torch.zeros_like(like), torch.ones_like(like)).to_event(1)


class VectorGuide(Guide):
    """An autoguide of Pyro with a distribution of one vector.

    Args:
        guide: The autoguide, which has met its model.
        distribution: Makes the distribution of the vector.
        space: Makes its base, and the transform of torch from there; ``None`` where there is no
            base.
    """

    def __init__(
        self,
        guide: autoguides.AutoGuide,
        distribution: Callable[[], Any],
        space: Callable[[], tuple[Base, Any]] | None,
    ) -> None:
        self.guide, self._distribution, self._space = guide, distribution, space
        (self.features,) = distribution().event_shape

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws vectors and scores them; see :meth:`Guide.sample_and_log_prob`."""
        distribution = self._distribution()
        z = distribution.rsample((n,))
        return z, distribution.log_prob(z)

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores vectors; see :meth:`Guide.log_prob`."""
        # A tensor that is new to the caches of Pyro's transforms, which do not see that parameters
        # change.
        return self._distribution().log_prob(z.view_as(z))

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The base of the autoguide, if it has one."""
        if self._space is None:
            return ()
        base, transform = self._space()
        return (BaseSpace(TorchMap(transform), base),)

    def state_dict(self) -> Mapping[str, Any]:
        """The numbers that the autoguide has learned."""
        return self.guide.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the numbers of :meth:`state_dict`."""
        self.guide.load_state_dict(state)

    def spec(self) -> dict[str, Any]:
        """Plain data from which the guide is made anew; see :meth:`Guide.spec`."""
        return _spec(self.guide)

    @classmethod
    def make(cls, spec: Mapping[str, Any], density: LogDensity) -> Guide:
        """Makes the autoguide of a spec, and adapts it."""
        with forked(0):
            return as_guide(_make(spec["autoguide"], density.continuous_model), density)


# How Pyro's autoguides are described and made anew


def _spec(guide: autoguides.AutoGuide) -> dict[str, Any]:
    return {"guide": name_of(VectorGuide), "autoguide": _describe(guide)}


@functools.singledispatch
def _options(guide: Any) -> dict[str, Any] | None:
    """The options that an autoguide is made with; ``None`` if it cannot be made anew."""
    return None


@_options.register(autoguides.AutoNormal)
@_options.register(autoguides.AutoDiagonalNormal)
@_options.register(autoguides.AutoMultivariateNormal)
def _no_options(guide: Any) -> dict[str, Any]:
    return {}


@_options.register
def _(guide: autoguides.AutoLowRankMultivariateNormal) -> dict[str, Any]:
    return {"rank": guide.rank}


@_options.register
def _(guide: autoguides.AutoNormalizingFlow) -> dict[str, Any]:
    return {"init_transform_fn": init_transform_of(guide)}


def _describe(guide: Any) -> dict[str, Any]:
    if isinstance(guide, autoguides.AutoGuideList):
        return {"parts": [_describe(part) for part in guide]}
    kind, options = type(guide), _options(guide)
    # The constructor of this one takes other options, and makes that of the other.
    name = name_of(autoguides.AutoNormalizingFlow if kind is autoguides.AutoIAFNormal else kind)
    if name is None or options is None:
        return {"own": kind.__qualname__}
    sites = list(guide.prototype_trace.stochastic_nodes)
    return {"class": name, "options": describe(options), "sites": sites}


def _make(data: Mapping[str, Any], model: Callable[..., Any]) -> autoguides.AutoGuide:
    if "parts" in data:
        whole = autoguides.AutoGuideList(model)
        for part in data["parts"]:
            whole.append(_make(part, model))
        return whole
    if "own" in data:
        return build(data)
    of_sites = poutine.block(model, expose=data["sites"])
    kind = resolve_class(data["class"], autoguides.AutoGuide)
    return kind(of_sites, **build(data["options"]))
