"""A mixture of flows as an automatic guide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_size
from .._spec import build, describe
from ..distributions import FlowMixture
from ..flows import Flow
from ..model.density import LogDensity
from ..model.start import init_to_median
from ..transforms import Transform
from ..transforms.roots import Root
from .auto import FlowGuide
from .guide import BaseSpace
from .whitened import WhitenedFlow

__all__ = ["AutoMixture"]


class AutoMixture(FlowGuide):
    r"""A mixture of flows over all continuous latent sites, for posteriors with several modes.

    .. math:: q(z) = \sum_k \pi_k\, q_k(z),

    with a whitened flow :math:`q_k` as in :class:`AutoFlow` for each mode.
    :func:`pyroflows.fit_posterior` makes one where it finds separate modes. In an SVI it trains by
    the score function of ``Trace_ELBO``. All components start at one place; :meth:`whiten` sets
    them apart. There is no one map from a base to the posterior, so that ``NeuTraReparam`` cannot
    take this guide; flow Monte Carlo can.

    Args:
        model: A Pyro model.
        components: How many flows.
        flow: Makes each flow; as in :class:`AutoFlow`.
        init_loc_fn: Where each site starts.
        init_scale: Standard deviation at the start, in unconstrained units.

    Raises:
        ValueError: If ``components`` or ``init_scale`` is not positive; in the first call as in
            :class:`AutoFlow`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(x.abs(), 0.1), obs=torch.tensor(2.0))
        >>> guide = AutoMixture(model, components=2)
        >>> _ = guide()
        >>> for k, mode in enumerate((-2.0, 2.0)):
        ...     guide.whiten(k, torch.tensor([mode]), torch.tensor([[0.1]]))
        >>> guide.get_posterior().sample((100,)).abs().mean().round()
        tensor(2.)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        components: int,
        flow: Callable[[int], Flow | Transform] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        count = check_size("components", components)
        super().__init__(model, flow, init_loc_fn, init_scale)
        self._count = count

    def _build(self, *args: Any, **kwargs: Any) -> None:
        super()._build(*args, **kwargs)
        for k in range(self._count):
            setattr(self, f"flow_{k}", self._whitened_flow(self._init_loc()))
        self.logits = nn.Parameter(torch.zeros_like(self._init_loc()[:1]).repeat(self._count))

    @property
    def flows(self) -> list[WhitenedFlow]:
        """The components."""
        return [getattr(self, f"flow_{k}") for k in range(self._count)]

    def base_spaces(self) -> Sequence[BaseSpace]:
        """The bases of the components, with their shares."""
        mixture = self.get_posterior()
        return tuple(
            BaseSpace(flow.transform, flow.base, functools.partial(_log_share, mixture, k))
            for k, flow in enumerate(self.flows)
        )

    def _parts_spec(self) -> dict[str, Any]:
        return {"flows": [describe(flow)["kwargs"]["flow"] for flow in self.flows]}

    @classmethod
    def make(cls, spec: Mapping[str, Any], density: LogDensity) -> AutoMixture:
        """Makes the guide of a spec."""
        each = iter(spec["flows"])
        guide = cls(
            density.continuous_model,
            len(spec["flows"]),
            lambda features: build(next(each)),
            density.init_loc_fn,
        )
        density.introduce(guide)
        return guide

    def whiten(self, component: int, loc: Tensor, scale_tril: Root) -> None:
        """Sets the whitening map of one component, for instance to a Gaussian fit of one mode.

        Args:
            component: Which one.
            loc: Tensor of shape ``(features,)``.
            scale_tril: Lower-triangular tensor of shape ``(features, features)`` with a positive
                diagonal.

        Raises:
            RuntimeError: If the guide has not met its model yet.
            ValueError: If there is no such component, or the diagonal is not positive.
        """
        self._check_built("whiten")
        if check_size("component", component, least=0) >= self._count:
            raise ValueError(f"Expected component < {self._count}; got {component}.")
        self.flows[component].whiten(loc, scale_tril)

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowMixture:
        """The distribution of the unconstrained latent vector."""
        self._check_built("get_posterior")
        components = [flow() for flow in self.flows]
        return FlowMixture(components, self.logits, auxiliary=True, validate_args=False)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Refused: there is no one map from a base to a mixture.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Expected a guide with one transform, such as AutoFlow; got AutoMixture, which has one "
            "for each component "
            "and none for all. For exact draws use flow Monte Carlo, which needs no transform."
        )


def _log_share(mixture: FlowMixture, component: int, z: Tensor) -> Tensor:
    return mixture.component_log_probs(z).log_softmax(-1)[:, component]
