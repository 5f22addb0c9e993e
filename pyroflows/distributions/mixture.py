"""Mixtures of distributions that differ in kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from .._checks import check_batch_shape

__all__ = ["FlowMixture"]


class FlowMixture(dist.TorchDistribution):
    r"""A mixture of distributions over vectors, each of which may be a flow of its own.

    .. math:: q(z) = \sum_k \pi_k\, q_k(z).

    A batch of one family can be mixed by ``MixtureSameFamily``; flows with parameters of their own
    cannot. Draws carry no gradient, because there is none through the choice of a component.

    Args:
        components: Distributions with the same batch and event shapes.
        logits: Unnormalised log weights, of shape ``(len(components),)``.
        auxiliary: Whether it is an auxiliary site of a guide, whose log density ``Trace_ELBO``
            leaves out of the cost of its score.
        validate_args: Whether to check values against the support.

    Raises:
        ValueError: If there is no component, their shapes differ, or ``logits`` do not fit.

    Example:
        >>> mixture = FlowMixture([dist.Normal(-2.0, 1.0), dist.StudentT(4.0, 2.0)], torch.zeros(2))
        >>> mixture.log_prob(torch.tensor(-2.0))
        tensor(-1.5954)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real_vector}
    has_rsample = False

    def __init__(
        self,
        components: Sequence[torch.distributions.Distribution],
        logits: Tensor,
        auxiliary: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if not components:
            raise ValueError("Expected at least one component; got none.")
        shapes = {(tuple(c.batch_shape), tuple(c.event_shape)) for c in components}
        if len(shapes) > 1:
            raise ValueError(
                f"Expected components of one shape; got batch and event shapes {sorted(shapes)}."
            )
        if logits.shape != (len(components),):
            raise ValueError(
                f"Expected logits of shape ({len(components)},); got {tuple(logits.shape)}."
            )
        self.components = list(components)
        self.logits = logits
        self.auxiliary = auxiliary
        super().__init__(
            components[0].batch_shape, components[0].event_shape, validate_args=validate_args
        )

    @property
    def support(self) -> Any:
        """That of the first component."""
        return self.components[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowMixture:
        """The mixture with a larger batch shape."""
        batch_shape = check_batch_shape("batch_shape", batch_shape)
        components = [c.expand(batch_shape) for c in self.components]
        return FlowMixture(components, self.logits, self.auxiliary, validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of shape ``sample_shape + batch_shape + event_shape``."""
        sample_shape = check_batch_shape("sample_shape", sample_shape)
        draws = torch.stack([c.sample(sample_shape) for c in self.components])
        choice = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(
            sample_shape + self.batch_shape
        )
        index = choice.reshape(1, *choice.shape, *(1,) * len(self.event_shape)).expand(
            1, *draws.shape[1:]
        )
        return draws.gather(0, index).squeeze(0)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density at ``value``, of shape ``(*, *event_shape)``."""
        each = self.component_log_probs(value)
        # Where no component has any density, logsumexp has no gradient.
        outside = (each == -torch.inf).all(-1)
        return (
            each.masked_fill(outside.unsqueeze(-1), 0.0)
            .logsumexp(-1)
            .masked_fill(outside, -torch.inf)
        )

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """The parts of the gradient of an ELBO, so that the score has all its costs."""
        parts = super().score_parts(x, *args, **kwargs)
        return (
            parts._replace(entropy_term=parts.log_prob.detach() * parts.log_prob)
            if self.auxiliary
            else parts
        )

    def component_log_probs(self, value: Tensor) -> Tensor:
        """Log density of each component, weight included, along a last dimension."""
        each = torch.stack([c.log_prob(value) for c in self.components], -1)
        return each.masked_fill(each.isnan(), -torch.inf) + self.logits.log_softmax(-1)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:
        """Draws, which carry no gradient, and their log densities."""
        value = self.sample(sample_shape)
        return value, self.log_prob(value)
