"""What the rest of the library may ask of a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._spec import own_error, resolve_class
from ..model.density import LogDensity
from ..model.rounding import without_noise

__all__ = ["Base", "BaseSpace", "Guide", "Map", "Part", "from_spec"]


class Map(Protocol):
    """An invertible map of vectors, as each :class:`pyroflows.transforms.Transform` is one."""

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps base to event: from ``(*, features)`` to ``(*, features)`` and ``(*)``."""

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Maps event to base: from ``(*, features)`` to ``(*, features)`` and ``(*)``."""


class Base(Protocol):
    """A distribution of vectors that can be drawn and scored."""

    def sample(self, sample_shape: Any = ...) -> Tensor:
        """Draws vectors of shape ``(*sample_shape, features)``."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of vectors of shape ``(*, features)``, of shape ``(*)``."""


@dataclass(frozen=True)
class BaseSpace:
    r"""A space in which the posterior is nearly simple, so that trajectories mix fast.

    With the map :math:`f`, the posterior pulled back, :math:`p(f(x))\,|\det J_f(x)|`, is close to
    the base.

    Attributes:
        transform: The map :math:`f` from the base to the unconstrained vector.
        base: The distribution that :math:`f` maps to the guide, or to a component of it.
        log_share: For one component :math:`k` of a mixture the logarithm of its share
            :math:`\pi_k q_k(z) / q(z)`, from ``(n, features)`` to ``(n,)``; ``None`` where one
            space serves the whole guide.
    """

    transform: Map
    base: Base
    log_share: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Part:
    """A block of the unconstrained vector that can be drawn and scored given the parts before it.

    Attributes:
        entries: Which entries of the vector, of shape ``(k,)``.
        rows: The rows of the data that the block belongs to; ``None`` for one that all rows share.
        sample_and_log_prob: From the number of draws, and the draws ``(n, features before)`` of the
            parts before, to the entries ``(n, k)`` and their log-density ``(n,)`` given those.
        log_prob: From whole vectors ``(n, features)`` to the same log-density.
    """

    entries: Tensor
    rows: Tensor | None
    sample_and_log_prob: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]


class Guide:
    r"""The contract of every guide, a distribution :math:`q(z)` of unconstrained vectors.

    A vector holds the continuous latent sites in the order of
    :class:`pyroflows.model.LogDensity`. A subclass writes :meth:`sample_and_log_prob` and
    :meth:`log_prob`, and whichever of the other methods can say more than the defaults: no base
    space, a single part, no path gradient, no plain data.

    ``rows`` are the rows of the data that a guide with blocks for some rows is asked for, as
    integers of shape ``(m,)``, or ``None`` for all. Where no entry belongs to a row, as in a dense
    guide, they make no difference.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = pf.AutoFlow(model)
        >>> _ = guide()
        >>> z, log_q = guide.sample_and_log_prob(5)
        >>> z.shape, log_q.shape, len(guide.base_spaces()), len(guide.parts())
        (torch.Size([5, 1]), torch.Size([5]), 1, 1)
    """

    #: Entries of the unconstrained vector.
    features: int
    #: Whether :meth:`sample_with_path_gradient` may be called.
    has_path_gradient = False
    #: Whether it is a flow over globals with the rest given these, of which the density of the
    #: globals is known with the rest integrated out, as in :class:`AutoStructuredFlow`.
    has_marginal = False

    def sample(self, n: int) -> Tensor:
        """Draws vectors as close to the posterior as the guide can, without a graph.

        Args:
            n: How many draws.

        Returns:
            Tensor of shape ``(n, features)``; by default those of :meth:`sample_and_log_prob`.
        """
        with torch.no_grad():
            return self.sample_and_log_prob(n)[0]

    def sample_and_log_prob(self, n: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws from the guide and scores the draws.

        Both carry a graph where gradients are enabled and the guide has them.

        Args:
            n: How many draws.
            rows: Rows of the data, of shape ``(m,)``.

        Returns:
            Vectors of shape ``(n, features)`` and their log-densities of shape ``(n,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define sample_and_log_prob.")

    def log_prob(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores vectors; ``-inf`` or NaN where the guide cannot reach them.

        Args:
            z: Vectors of shape ``(n, features)``.
            rows: Rows of the data, of shape ``(m,)``.

        Returns:
            Log-densities of shape ``(n,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define log_prob.")

    @torch.no_grad()
    def sample_and_weigh(self, density: LogDensity, n: int) -> tuple[Tensor, Tensor]:
        r"""Draws vectors with importance weights: any such that for all functions :math:`h`

        .. math:: \mathbb{E}[w\, h(z)] = \int p(z, \mathrm{data})\, h(z)\, \mathrm{d}z.

        By default they are :math:`p(z, \mathrm{data}) / q(z)`, and zero where the density is noise.

        Args:
            density: The log density of the model.
            n: How many draws.

        Returns:
            Vectors of shape ``(n, features)`` and log weights of shape ``(n,)``, without a graph.
        """
        z, log_q = self.sample_and_log_prob(n)
        return z, without_noise(density, z, density.log_prob(z) - log_q)

    def sample_with_path_gradient(
        self, n: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draws from the guide, with log-densities whose gradient runs through the draws alone.

        The gradient of :math:`\log q(z)` leaves out that of the density's own parameters, whose
        mean is zero.

        Args:
            n: How many draws.
            rows: Rows of the data, of shape ``(m,)``.

        Returns:
            Vectors of shape ``(n, features)`` and log-densities of shape ``(n,)``, with a graph.

        Reference:
            Roeder, Wu, Duvenaud, "Sticking the landing: Simple, lower-variance gradient estimators
            for variational inference", 2017, https://arxiv.org/abs/1703.09194
        """
        raise NotImplementedError(f"{type(self).__name__} has no path gradient.")

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The spaces in which trajectories run: none, one for all, or one for each component."""
        return ()

    def parts(self, rows: Tensor | None = None) -> Sequence[Part]:
        """The blocks, those that all rows share first; by default a single one.

        Args:
            rows: Rows of the data, of shape ``(m,)``.
        """
        return (
            Part(
                entries=torch.arange(self.features),
                rows=None,
                sample_and_log_prob=lambda n, before: self.sample_and_log_prob(n, rows),
                log_prob=lambda z: self.log_prob(z, rows),
            ),
        )

    def centres(self) -> Mapping[str, Tensor]:
        """For each circular site the angles that the guide takes for zero.

        By default none: whichever the density takes. The circle is cut opposite to them, so that a
        vector of the guide is one of the density if they are the same in both; see
        :meth:`pyroflows.model.LogDensity.rotated`.
        """
        return {}

    def rotate(self, centres: Mapping[str, Tensor]) -> None:
        """Sets the angles of :meth:`centres`, in a guide that has yet to be trained."""

    def spec(self) -> dict[str, Any]:
        """Plain data from which :func:`from_spec` makes such a guide.

        They are numbers, strings and tensors, and tuples, lists and dictionaries of these. The
        numbers that it has learned are not among them; see ``state_dict``. Where the guide is made
        by a callable of the user's own, which no data can stand for, the data name it, and
        :func:`from_spec` refuses them.
        """
        return {"own": type(self).__qualname__}

    def state_dict(self) -> Mapping[str, Any]:
        """The numbers that the guide has learned, as of a module; by default none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Sets the numbers of :meth:`state_dict`."""

    @classmethod
    def make(cls, spec: Mapping[str, Any], density: LogDensity) -> Guide:
        """Makes a guide, which has met its model, of a spec; see :func:`from_spec`."""
        raise NotImplementedError(f"{cls.__name__} does not define make.")


def from_spec(spec: Mapping[str, Any], density: LogDensity) -> Guide:
    """Makes a guide from plain data, with the numbers of a fresh one until ``load_state_dict``.

    Args:
        spec: The result of :meth:`Guide.spec`; ``spec["guide"]`` names the class, which needs no
            entry elsewhere.
        density: The log density of its model.

    Returns:
        A guide that has met its model.

    Raises:
        ValueError: If the guide, or a part of it, was made by a callable of the user's own.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> density = pf.model.LogDensity(model)
        >>> guide = pf.AutoFlow(density.model, flow=lambda n: pf.MAF(n, transforms=2))
        >>> density.introduce(guide)
        >>> copy = from_spec(guide.spec(), density)
        >>> copy.load_state_dict(guide.state_dict())
        <All keys matched successfully>
        >>> torch.equal(copy.log_prob(torch.ones(1, 2)), guide.log_prob(torch.ones(1, 2)))
        True
    """
    if "own" in spec:
        raise own_error(spec["own"])
    return resolve_class(spec["guide"], Guide).make(spec, density)
