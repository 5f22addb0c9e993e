"""The sample sites of a model, read from a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to

from .._compat import mask_of

__all__ = [
    "LatentSite",
    "SiteKind",
    "base_distribution",
    "distribution_name",
    "find_latent_sites",
    "is_discrete",
    "latent_nodes",
    "observed_names",
    "plate_frames",
    "sample_nodes",
    "site_plates",
]

Node = dict[str, Any]

CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class SiteKind(Enum):
    """The space in which the entries of a latent site live.

    Attributes:
        REAL: A set that ``biject_to`` maps from the real vectors, one to one.
        CIRCLE: Angles. Their distribution repeats itself every :math:`2\\pi`, so its density over
            the whole line, on which Pyro puts the site, is not that of a distribution.
    """

    REAL = "real"
    CIRCLE = "circle"


@dataclass(frozen=True)
class LatentSite:
    """A continuous latent site.

    Attributes:
        name: The name of the sample statement.
        shape: The shape of a value.
        unconstrained_shape: The shape of a value mapped to the reals.
        transform: The bijection from the reals onto the support.
        plates: For each dimension of a value the name of its plate, or ``None``.
        kind: Where the entries live.
        active: Which entries have a density of their own, of shape ``shape``: not those that
            ``poutine.mask``, ``.mask()`` of a distribution or ``obs_mask`` switches off, as read
            at the start.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyroflows.model import LogDensity
        >>> def model():
        ...     seen = torch.tensor([True, False])
        ...     pyro.sample("x", dist.VonMises(torch.zeros(2), 1.0).mask(seen))
        >>> (site,) = LogDensity(model).sites
        >>> site.kind, site.active
        (<SiteKind.CIRCLE: 'circle'>, tensor([ True, False]))
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    transform: Transform
    plates: tuple[str | None, ...]
    kind: SiteKind = SiteKind.REAL
    active: Tensor = field(default_factory=lambda: torch.ones(()).bool(), compare=False)

    @property
    def features(self) -> int:
        """Entries of the site in the unconstrained vector."""
        return self.unconstrained_shape.numel()


def find_latent_sites(trace: Any) -> list[LatentSite]:
    """The continuous latent sites of a trace.

    Args:
        trace: A trace of the model.

    Returns:
        The sites in the order of the trace.

    Raises:
        ValueError: If ``biject_to`` does not know the support of one.
    """
    nodes = latent_nodes(trace)
    return [_latent_site(name, node) for name, node in nodes if not is_discrete(node)]


def sample_nodes(trace: Any) -> Iterator[tuple[str, Node]]:
    """The sample statements of a trace that have a density: all but the draws of plates' rows and
    the statements of ``pyro.deterministic``."""
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if not node["infer"].get("_deterministic"):
            yield name, node


def latent_nodes(trace: Any) -> Iterator[tuple[str, Node]]:
    """The sample statements of a trace that are not observed."""
    for name, node in sample_nodes(trace):
        if not node["is_observed"]:
            yield name, node


def observed_names(trace: Any) -> list[str]:
    """The names of the sample statements that are given data, or are a ``pyro.factor``."""
    return [name for name, node in sample_nodes(trace) if node["is_observed"] and _has_data(node)]


def _has_data(node: Node) -> bool:
    is_factor = isinstance(base_distribution(node["fn"]), dist.Unit)
    return is_factor or torch.as_tensor(node["value"]).numel() > 0


def plate_frames(trace: Any) -> Iterator[Any]:
    """The vectorised plates around each sample statement of a trace."""
    for node in trace.nodes.values():
        if node["type"] == "sample":
            yield from (frame for frame in node["cond_indep_stack"] if frame.vectorized)


def is_discrete(node: Node) -> bool:
    """Whether the values of a sample statement are discrete."""
    try:
        return bool(node["fn"].support.is_discrete)
    except NotImplementedError:
        return isinstance(node["value"], Tensor) and not node["value"].is_floating_point()


def site_plates(node: Node) -> tuple[str | None, ...]:
    """For each dimension of a site's value the name of its plate, or ``None``."""
    batch_dim = node["value"].dim() - node["fn"].event_dim
    return (*term_plates(node, batch_dim), *(None for _ in range(node["fn"].event_dim)))


def term_plates(node: Node, batch_dim: int) -> tuple[str | None, ...]:
    """For each of the batch dimensions of a site the name of its plate, or ``None``."""
    names: list[str | None] = [None] * batch_dim
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= batch_dim:
            names[frame.dim] = frame.name
    return tuple(names)


def base_distribution(fn: Any) -> Any:
    """The distribution inside of ``to_event``, ``expand`` and ``mask``."""
    wrappers = (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn


def distribution_name(fn: Any) -> str:
    """The name of the distribution inside of ``to_event``, ``expand`` and ``mask``."""
    return type(base_distribution(fn)).__name__


def _latent_site(name: str, node: Node) -> LatentSite:
    fn, value = node["fn"], node["value"]
    try:
        transform = biject_to(fn.support)
        unconstrained = transform.inv(value)
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"Expected latent sites with a support that biject_to knows; got {name!r} with "
            f"{distribution_name(fn)}."
        ) from None
    circular = isinstance(base_distribution(fn), CIRCULAR)
    return LatentSite(
        name,
        value.shape,
        unconstrained.shape,
        transform,
        site_plates(node),
        SiteKind.CIRCLE if circular else SiteKind.REAL,
        _active(node),
    )


def _active(node: Node) -> Tensor:
    """Which entries of a value count in the density of its site."""
    value: Tensor = node["value"]
    active = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    fn, event_dim = node["fn"], node["fn"].event_dim
    masks = [(node["mask"], event_dim)]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((mask_of(fn), fn.event_dim))
        fn = fn.base_dist
    for mask, dims in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device)
            active = active & mask.reshape(mask.shape + (1,) * dims)
    return active
