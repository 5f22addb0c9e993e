"""The sample sites of a model, read from a trace."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import IndependentTransform

from .._compat import mask_of
from .circle import CircleMap

__all__ = [
    "WRAPPERS",
    "LatentSite",
    "SiteKind",
    "base_distribution",
    "distribution_name",
    "find_latent_sites",
    "is_discrete",
    "is_factor",
    "latent_nodes",
    "observed_names",
    "plate_frames",
    "plate_size",
    "rotated",
    "sample_nodes",
    "site_plates",
    "split_angles",
    "split_vector",
    "unmasked_entries",
]

Node = dict[str, Any]

#: Distributions of another one, by which Pyro and torch reshape and mask it.
WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
DTYPES = (torch.float32, torch.float64)

# How to write latent sites whose support has no bijection from real vectors.
ADVICE = {
    "ProjectedNormal": " Use poutine.reparam with pyro.infer.reparam.ProjectedNormalReparam.",
    "MixtureSameFamily": " Draw the component from a Categorical site, which is summed out.",
}

CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class SiteKind(Enum):
    """The space in which the entries of a latent site live.

    Attributes:
        REAL: A set that ``biject_to`` maps from the real vectors, one to one.
        CIRCLE: Angles, which :class:`pyroflows.model.circle.CircleMap` maps from the line. Their
            distribution repeats itself every :math:`2\\pi`, so its density over the whole line, on
            which Pyro puts the site, is not that of a distribution.
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
        transform: The bijection from the reals onto the support, or onto the circle.
        plates: For each dimension of a value the name of its plate, or ``None``.
        kind: Where the entries live.
        active: Which entries are unknown, of shape ``shape``: not those that ``poutine.mask``,
            ``.mask()`` of a distribution or ``obs_mask`` switches off, and on which nothing else
            in the model depends. The unconstrained vector has none of these.

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
        return self.unconstrained_shape.numel() if self.complete else len(self._places)

    @functools.cached_property
    def complete(self) -> bool:
        """Whether all entries are active."""
        return bool(self.active.all())

    @property
    def centres(self) -> Tensor:
        """The angles that stand at zero of a circular site, of shape ``(features,)``."""
        zero = torch.zeros(self.features, device=self.active.device)
        return self.transform(self.unpack(zero))[self.active]

    @property
    def indices(self) -> list[tuple[int, ...]]:
        """The index of each entry of the unconstrained vector in the unconstrained shape."""
        every = list(itertools.product(*map(range, self.unconstrained_shape)))
        return every if self.complete else [every[place] for place in self._places.tolist()]

    def unpack(self, part: Tensor) -> Tensor:
        """The unconstrained value that a part of a vector holds; zero at inactive entries.

        Args:
            part: Tensor of shape ``(*, features)``.

        Returns:
            Tensor of shape ``(*, *unconstrained_shape)``.
        """
        batch = part.shape[:-1]
        if not self.complete:
            with_zero = torch.cat([part, part.new_zeros(*batch, 1)], -1)
            part = with_zero.index_select(-1, self._sources.to(part.device))
        return part.reshape(batch + self.unconstrained_shape)

    def pack(self, value: Tensor) -> Tensor:
        """The part of a vector that stands for a value.

        Args:
            value: Tensor of shape ``(*, *shape)``.

        Returns:
            Tensor of shape ``(*, features)``.
        """
        return self.active_entries(self.transform.inv(value))

    def active_entries(self, unconstrained: Tensor) -> Tensor:
        """The entries of an unconstrained value that are unknown.

        Args:
            unconstrained: Tensor of shape ``(*, *unconstrained_shape)``.

        Returns:
            Tensor of shape ``(*, features)``.
        """
        batch = unconstrained.shape[: unconstrained.dim() - len(self.unconstrained_shape)]
        flat = unconstrained.reshape(*batch, self.unconstrained_shape.numel())
        return flat if self.complete else flat.index_select(-1, self._places.to(flat.device))

    def log_det(self, unconstrained: Tensor, value: Tensor) -> Tensor:
        """The log-Jacobian of the map onto the support; zero for inactive entries.

        Args:
            unconstrained: Tensor of shape ``(*, *unconstrained_shape)``.
            value: Its image.

        Returns:
            Tensor of shape ``(*)`` and the first dimensions of a value: all but those that the map
            mixes.
        """
        if self.complete:
            return self.transform.log_abs_det_jacobian(unconstrained, value)
        log_det = self._innermost.log_abs_det_jacobian(unconstrained, value)
        return log_det.where(self._active_events.to(log_det.device), 0.0)

    def blank(self, value: Tensor) -> Tensor:
        """Puts NaN, which says that they are missing, at the inactive entries of a value."""
        return value if self.complete else value.where(self.active.to(value.device), torch.nan)

    def entries_of_value(self, chosen: Tensor) -> Tensor:
        """The entries of a value that belong to some unconstrained ones.

        Args:
            chosen: Which unconstrained entries, of shape ``unconstrained_shape``.

        Returns:
            Which entries of a value: all of an event of which one is chosen.
        """
        inside = self._innermost.domain.event_dim
        events = chosen.flatten(-inside).any(-1) if inside else chosen
        ones = (1,) * self._innermost.codomain.event_dim
        return events.reshape(events.shape + ones).expand(self.shape)

    @functools.cached_property
    def _innermost(self) -> Transform:
        """The map of one event, in which a mask cannot reach."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return transform

    @functools.cached_property
    def _active_events(self) -> Tensor:
        dims = self._innermost.codomain.event_dim
        return self.active.flatten(-dims).any(-1) if dims else self.active

    @functools.cached_property
    def _places(self) -> Tensor:
        """Where the active entries stand in the flattened unconstrained value."""
        events = self._active_events
        inside = (1,) * self._innermost.domain.event_dim
        active = events.reshape(events.shape + inside).expand(self.unconstrained_shape)
        return active.flatten().nonzero().squeeze(-1)

    @functools.cached_property
    def _sources(self) -> Tensor:
        """For each entry of the unconstrained value its place among the active ones, or behind."""
        sources = torch.full((self.unconstrained_shape.numel(),), len(self._places))
        sources[self._places.cpu()] = torch.arange(len(self._places))
        return sources


def find_latent_sites(trace: Any) -> list[LatentSite]:
    """The continuous latent sites of a trace.

    Args:
        trace: A trace of the model.

    Returns:
        The sites in the order of the trace.

    Raises:
        ValueError: If one has no density, as a ``Delta``, if it is in half precision, or if
            ``biject_to`` does not know its support.
    """
    nodes = latent_nodes(trace)
    return [_latent_site(name, node) for name, node in nodes if not is_discrete(node)]


def split_vector(sites: Sequence[LatentSite], z: Tensor) -> Iterator[tuple[LatentSite, Tensor]]:
    """Pairs of a site and its unconstrained value.

    Args:
        sites: Latent sites.
        z: Points of shape ``(*, features)``, with the entries of all sites in their order.
    """
    parts = z.split([site.features for site in sites], -1)
    for site, part in zip(sites, parts, strict=True):
        yield site, site.unpack(part)


def split_angles(sites: Sequence[LatentSite], angles: Tensor) -> dict[str, Tensor]:
    """The blocks of the circular sites, by name.

    Args:
        sites: Latent sites.
        angles: One entry for each angle among them, in their order.
    """
    circles = [site for site in sites if site.kind is SiteKind.CIRCLE]
    blocks = angles.split([site.features for site in circles])
    return {site.name: block for site, block in zip(circles, blocks, strict=True)}


def rotated(sites: Sequence[LatentSite], centres: Mapping[str, Tensor]) -> list[LatentSite]:
    """The sites with other centres of their circles.

    Args:
        sites: Latent sites.
        centres: For some circular sites the angles at zero, of shape ``(features,)``.

    Returns:
        The sites, in the same order.
    """
    return [_rotated(site, centres) for site in sites]


def _rotated(site: LatentSite, centres: Mapping[str, Tensor]) -> LatentSite:
    if site.name not in centres:
        return site
    centre = site.unpack(centres[site.name])
    return replace(site, transform=CircleMap(centre))


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
    return is_factor(node["fn"]) or torch.as_tensor(node["value"]).numel() > 0


def plate_frames(trace: Any) -> Iterator[Any]:
    """The vectorised plates around each sample statement of a trace."""
    for node in trace.nodes.values():
        if node["type"] == "sample":
            yield from (frame for frame in node["cond_indep_stack"] if frame.vectorized)


def plate_size(node: Node) -> int:
    """How many rows the vectorised plates around a sample statement have together."""
    frames = (frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return math.prod(frame.size for frame in frames)


def is_discrete(node: Node) -> bool:
    """Whether the values of a sample statement are discrete."""
    try:
        return bool(node["fn"].support.is_discrete)
    except NotImplementedError:
        return isinstance(node["value"], Tensor) and not node["value"].is_floating_point()


def site_plates(node: Node) -> tuple[str | None, ...]:
    """For each dimension of a site's value the name of its plate, or ``None``."""
    event_dim = node["fn"].event_dim
    names: list[str | None] = [None] * (node["value"].dim() - event_dim)
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= len(names):
            names[frame.dim] = frame.name
    return (*names, *[None] * event_dim)


def base_distribution(fn: Any) -> Any:
    """The distribution inside of ``to_event``, ``expand`` and ``mask``."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def is_factor(fn: Any) -> bool:
    """Whether a distribution is that of a ``pyro.factor``."""
    return isinstance(base_distribution(fn), dist.Unit)


def is_improper(fn: Any) -> bool:
    """Whether a distribution is that of an improper prior."""
    return isinstance(base_distribution(fn), dist.ImproperUniform)


def distribution_name(fn: Any) -> str:
    """The name of the distribution inside of ``to_event``, ``expand`` and ``mask``."""
    return type(base_distribution(fn)).__name__


def _latent_site(name: str, node: Node) -> LatentSite:
    fn, value = node["fn"], node["value"]
    _check_density(name, fn, value)
    circular = isinstance(base_distribution(fn), CIRCULAR)
    try:
        transform = CircleMap() if circular else biject_to(fn.support)
        unconstrained = transform.inv(value)
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"Expected latent sites with a support that biject_to knows; got {name!r} with "
            f"{distribution_name(fn)}.{ADVICE.get(distribution_name(fn), '')}"
        ) from None
    return LatentSite(
        name,
        value.shape,
        unconstrained.shape,
        transform,
        site_plates(node),
        SiteKind.CIRCLE if circular else SiteKind.REAL,
        unmasked_entries(node),
    )


def _check_density(name: str, fn: Any, value: Tensor) -> None:
    """Refuses a latent site whose values have no density, or too few digits for one."""
    if isinstance(base_distribution(fn), dist.Delta):
        raise ValueError(
            f"Expected latent sites with a density; got {name!r} with Delta, which has none. Write "
            "it as pyro.deterministic(name, value)."
        )
    if value.dtype not in DTYPES:
        raise ValueError(
            f"Expected latent sites of dtype float32 or float64; got {name!r} of dtype "
            f"{str(value.dtype).removeprefix('torch.')}."
        )


def unmasked_entries(node: Node) -> Tensor:
    """Which entries of a value a mask leaves in the density of its site."""
    value: Tensor = node["value"]
    active = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for mask, dims in _masks(node):
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device).bool()
            active = active & _reduced(mask.reshape(mask.shape + (1,) * dims), value.shape)
    return active


def _masks(node: Node) -> Iterator[tuple[Any, int]]:
    """The masks of a site, each with the number of dimensions to the right of its own."""
    yield node["mask"], node["fn"].event_dim
    fn = node["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            yield mask_of(fn), fn.event_dim
        fn = fn.base_dist


def _reduced(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the dimensions of a value; on where one of its entries there is on."""
    while mask.dim() > len(shape):
        mask = mask.any(0)
    for k in range(1, mask.dim() + 1):
        if shape[-k] == 1:
            mask = mask.any(-k, keepdim=True)
    return mask
