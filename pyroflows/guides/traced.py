"""Guides written as ``pyro.sample`` statements, drawn and scored by tracing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .._random import forked
from .._vmap import vmap
from ..model.checks import check_call
from ..model.density import LogDensity
from ..model.sites import CIRCULAR, LatentSite, SiteKind, base_distribution, distribution_name
from .guide import Guide

__all__ = ["TracedGuide", "check_sites"]

#: Draws or points that are traced at a time.
AT_ONCE = 1000
#: Draws by which the support of a transformed distribution is judged.
SUPPORT_DRAWS = 100


class TracedGuide(Guide):
    r"""A guide that is run under a trace: its sites are drawn and scored as Pyro does.

    .. math:: \log q(z) = \sum_s \log q(g_s(z) \mid \text{sites before}) + \log|\det J_g(z)|

    for the map :math:`g` from vectors to values of the sites. Many points are traced at a time by
    :func:`torch.func.vmap`, or one by one where the guide cannot be batched. There is no base
    space.

    Args:
        guide: A function or module with ``pyro.sample`` statements.
        density: The log density of the model, which gives the arguments and the sites.

    Attributes:
        sites: The sites, in the order of the guide.

    Raises:
        TypeError: If a site is a point mass.
        ValueError: If a site is auxiliary, unknown to the model, or of another shape or support.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Exponential(1.0))
        >>> def guide():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = TracedGuide(guide, pf.model.LogDensity(model))
        >>> guide.log_prob(torch.zeros(1, 1))
        tensor([-0.9189])
    """

    def __init__(self, guide: Callable[..., Any], density: LogDensity) -> None:
        self.guide, self.density = guide, density
        check_call("the guide", guide, density.args, density.kwargs)
        # Parameters are made by the first run, which must not be one of a batch.
        with forked(0):
            trace = self._trace()
        nodes = dict(_latent_nodes(trace))
        _refuse_without_density(nodes)
        self.sites = check_sites(nodes, density)
        if not self.sites:
            raise ValueError(
                "Expected a guide with a pyro.sample statement for each continuous latent site of "
                f"the model; got {_name(guide)!r} with none."
            )
        self.features = sum(site.features for site in self.sites)
        self._start = torch.zeros(self.features).to(density.initial)
        self._batched_draws, self._batched_scores = self._find_batched()

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws and scores by one trace; see :meth:`Guide.sample_and_log_prob`."""
        start = self._start.expand(n, -1)
        if self._batched_draws:
            return self._draw_batch(start)
        z, log_prob = zip(*map(self._draw, start), strict=True)
        return torch.stack(z), torch.stack(log_prob)

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores by a trace on given values; see :meth:`Guide.log_prob`."""
        if self._batched_scores:
            return self._score_batch(z)
        return torch.stack([self._score(row) for row in z])

    def state_dict(self) -> dict[str, Any]:
        """The parameters and buffers of the module, and the parameters in the param store."""
        module = self.guide.state_dict() if isinstance(self.guide, nn.Module) else {}
        stored = {name: value.detach() for name, value in self._stored().items()}
        return {"module": dict(module), "store": stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the numbers of :meth:`state_dict`."""
        if isinstance(self.guide, nn.Module):
            self.guide.load_state_dict(state["module"])
        with torch.no_grad():
            for name, value in self._stored().items():
                value.copy_(state["store"][name])

    def spec(self) -> dict[str, Any]:
        """The name of the guide, which is the user's own; see :meth:`Guide.spec`."""
        return {"own": _name(self.guide)}

    def _draw(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """One draw and its log density."""
        trace = self._trace_sites()
        parts, log_det = [], like.new_zeros(())
        for site in self.sites:
            value = trace.nodes[site.name]["value"]
            part = site.pack(value)
            parts.append(part)
            log_det = log_det + site.log_det(site.unpack(part), value).sum()
        return torch.cat(parts), trace.log_prob_sum() + log_det

    def _score(self, z: Tensor) -> Tensor:
        """The log density at one point."""
        values, log_det = {}, z.new_zeros(())
        blocks = z.split([site.features for site in self.sites])
        for site, block in zip(self.sites, blocks, strict=True):
            unconstrained = site.unpack(block)
            values[site.name] = value = site.transform(unconstrained)
            log_det = log_det + site.log_det(unconstrained, value).sum()
        return self._trace_sites(values).log_prob_sum() + log_det

    def _trace_sites(self, values: Mapping[str, Tensor] | None = None) -> Any:
        """A trace that has the sites of the first run."""
        trace = self._trace(values)
        missing = [site.name for site in self.sites if site.name not in trace.nodes]
        if missing:
            raise ValueError(
                f"Expected a guide with the same sites in each run; got one without {missing[0]!r}."
            )
        return trace

    def _trace(self, values: Mapping[str, Tensor] | None = None) -> Any:
        guide = self.guide if values is None else poutine.condition(self.guide, data=dict(values))
        # Validation reads values, which a batch under vmap does not have.
        with self.density.on_device(), poutine.block(), pyro.validation_enabled(False):
            return poutine.trace(guide).get_trace(*self.density.args, **self.density.kwargs)

    @property
    def _draw_batch(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return vmap(self._draw, randomness="different", chunk_size=AT_ONCE)

    @property
    def _score_batch(self) -> Callable[[Tensor], Tensor]:
        return vmap(self._score, chunk_size=AT_ONCE)

    @torch.no_grad()
    def _find_batched(self) -> tuple[bool, bool]:
        """Whether draws, and whether scores, of a batch are those of single traces."""
        with forked(0):
            pairs = [self._draw(self._start) for _ in range(3)]
            points = torch.stack([z for z, _ in pairs])
            expected = torch.stack([self._score(z) for z in points])
            scores = _tried(lambda: self._score_batch(points))
            drawn = _tried(lambda: self._draw_batch(self._start.expand(3, -1)))
            has_draws = drawn is not None and len(drawn[0].unique(dim=0)) == 3
            again = torch.stack([self._score(z) for z in drawn[0]]) if has_draws else None
        batched_scores = scores is not None and torch.allclose(scores, expected, 1e-3, 1e-3)
        batched_draws = again is not None and torch.allclose(drawn[1], again, 1e-3, 1e-3)
        return batched_draws, batched_scores

    def _stored(self) -> dict[str, Tensor]:
        """The unconstrained leaves that the guide keeps in the param store."""
        with forked(0):
            nodes = self._trace().nodes
        store = pyro.get_param_store()
        names = [name for name, node in nodes.items() if node["type"] == "param" and name in store]
        values: dict[str, Any] = {name: store[name] for name in names}
        return {name: value.unconstrained() for name, value in values.items()}


def _name(guide: Callable[..., Any]) -> str:
    return getattr(guide, "__name__", type(guide).__name__)


def _tried(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception:  # whatever stands against a batch, single traces do without it
        return None


def _latent_nodes(trace: Any) -> Any:
    for name, node in trace.iter_stochastic_nodes():
        if not (site_is_subsample(node) or node["infer"].get("_deterministic")):
            yield name, node


def _refuse_without_density(nodes: Mapping[str, Any]) -> None:
    for name, node in nodes.items():
        if node["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Expected a guide without auxiliary sites; got {name!r}, over which the density "
                "would have to be integrated. Use AutoFlow, or write the guide without it."
            )
        if isinstance(node["fn"], pyro.distributions.Delta):
            raise TypeError(
                f"Expected a guide with a density; got site {name!r} with a Delta, which puts all "
                "mass on one point. Give it a distribution, such as a Normal."
            )


def check_sites(nodes: Mapping[str, Any], density: LogDensity) -> list[LatentSite]:
    """Finds the sites of a guide among those of its model.

    Args:
        nodes: Nodes of a trace, by name.
        density: The log density of the model.

    Returns:
        The sites of the model by the names of the nodes, in the order of the nodes.

    Raises:
        ValueError: If a name is not among the continuous latent sites of the model, or if a shape
            or a support differs.
    """
    known = {site.name: site for site in density.sites}
    for name, node in nodes.items():
        if name not in known:
            raise ValueError(
                "Expected a guide of the continuous latent sites of the model, "
                f"{', '.join(map(repr, known))}; got one with {name!r} too."
            )
        got, expected = tuple(node["value"].shape), tuple(known[name].shape)
        if got != expected:
            raise ValueError(
                f"Expected a guide with {name!r} of shape {expected}, as in the model; got {got}."
            )
        if not _has_support(density, known[name], node["fn"]):
            if known[name].kind is SiteKind.CIRCLE:
                raise ValueError(
                    f"Expected a guide with a distribution of angles at {name!r}, such as a "
                    f"VonMises; got {distribution_name(node['fn'])}."
                )
            raise ValueError(
                f"Expected a guide with {name!r} on the support that it has in the model; "
                f"got {node['fn'].support}."
            )
    return [known[name] for name in nodes]


def _has_support(density: LogDensity, site: LatentSite, fn: Any) -> bool:
    if site.kind is SiteKind.CIRCLE:
        return isinstance(base_distribution(fn), CIRCULAR)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        # It gives the codomain of its last transform, which may be larger than its support: draws
        # tell more.
        with torch.no_grad(), forked(0):
            draws = fn.sample((SUPPORT_DRAWS,))
        return bool(site.transform.inv(draws).isfinite().all())
    return density.has_support(site.name, fn.support)
