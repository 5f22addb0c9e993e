"""Flows whose weights are latent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from .._checks import check_context, check_positive
from .._compat import module_name
from ..distributions import FlowDistribution
from .flow import Flow

__all__ = ["BayesianFlow", "bayesian"]

#: Makes the prior of a parameter from its name and its present value.
WeightPrior = Callable[[str, Tensor], torch.distributions.Distribution]


def bayesian(flow: Flow, prior: float | WeightPrior = 1.0) -> BayesianFlow:
    r"""Makes the weights of a flow latent.

    .. math:: w \sim p(w), \qquad y \sim p_w(y \mid c).

    Called in a model, with the context if it has one, the result samples each parameter of the flow
    once, as a site named by the flow and the parameter, and returns the distribution that the flow
    is at these weights. The flow itself stays as it is.

    Args:
        flow: A flow.
        prior: A function from the name of a parameter and its present value to a distribution of
            its shape; or the standard deviation of a normal around the present value, which for a
            fresh flow is that of its base.

    Returns:
        A callable that is the distribution of a flow with latent weights.

    Raises:
        TypeError: If ``flow`` is no flow, or ``prior`` neither a number nor a function.
        ValueError: If the standard deviation is not positive, or the flow has no parameters.

    Reference:
        Trippe, Turner, "Conditional density estimation with Bayesian normalising flows", 2018,
        https://arxiv.org/abs/1802.04908

    Example:
        >>> import pyroflows as pf
        >>> weights = pf.bayesian(pf.NICE(2, transforms=2), prior=0.1)
        >>> def model(y):
        ...     drawn = weights()
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", drawn, obs=y)
        >>> trace = pyro.poutine.trace(model).get_trace(torch.zeros(3, 2))
        >>> sites = [name for name in trace.nodes if name.startswith("NICE.")]
        >>> len(sites) == len(list(weights.flow.parameters()))
        True
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"Expected flow to be a Flow; got {type(flow).__name__}.")
    if not callable(prior):
        check_positive("prior", prior)
    if not any(True for _ in flow.parameters()):
        raise ValueError("Expected a flow with parameters; got one with none.")
    return BayesianFlow(flow, prior)


class BayesianFlow:
    """A flow with latent weights; see :func:`bayesian`.

    Args:
        flow: The flow.
        prior: The prior of its weights.
    """

    def __init__(self, flow: Flow, prior: float | WeightPrior) -> None:
        self.flow, self.prior = flow, prior

    def __call__(self, context: Tensor | None = None) -> FlowDistribution:
        """Samples the weights, and returns the distribution of the flow at these.

        Args:
            context: Tensor of shape ``(*, *context_shape)``, or ``None`` for a flow without
                context.

        Raises:
            TypeError: If the prior of a parameter is no distribution of Pyro's.
            ValueError: If the prior of a parameter has another shape, the context does not
                fit, or a plate around the call would make several flows of one.
        """
        given = check_context(context, self.flow.context_shape, type(self.flow).__name__)
        weights = {name: self._sample(name, value) for name, value in self._parameters().items()}
        return self.at(weights, given)

    def at(self, weights: dict[str, Tensor], context: Tensor | None = None) -> FlowDistribution:
        """The distribution of the flow at some weights.

        Args:
            weights: The weights by the names of the flow's parameters.
            context: Tensor of shape ``(*, *context_shape)``.
        """
        places: dict[int, Any] = {
            id(value): weights[name] for name, value in self._parameters().items()
        }
        flow = copy.deepcopy(self.flow, places)
        transform = flow.transform if context is None else flow.transform.condition(context)
        return FlowDistribution(flow.base, transform, flow.support)

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.flow.named_parameters())

    def _sample(self, name: str, value: Tensor) -> Tensor:
        full = f"{module_name(self.flow)}.{name}"
        fn: Any = self._prior_of(name, value.detach())
        if not isinstance(fn, TorchDistributionMixin):
            raise TypeError(
                f"Expected prior to give a distribution of pyro.distributions for {name!r}; got "
                f"{fn!r}."
            )
        if fn.batch_shape + fn.event_shape != value.shape:
            raise ValueError(
                f"Expected prior to give a distribution of shape {tuple(value.shape)} for "
                f"{name!r}; got {tuple(fn.batch_shape + fn.event_shape)}."
            )
        weight: Tensor = pyro.sample(full, fn.to_event(len(fn.batch_shape)))
        if weight.shape != value.shape:
            raise ValueError(
                f"Expected the weights of a flow to be drawn outside of the plates of its data; got "
                f"{full!r} of shape {tuple(weight.shape)}. Call it before the plate: one flow is "
                "shared by all rows."
            )
        return weight

    def _prior_of(self, name: str, value: Tensor) -> Any:
        return self.prior(name, value) if callable(self.prior) else dist.Normal(value, self.prior)
