"""What all objectives share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from ..._checks import check_flag, check_size
from ...model.density import LogDensity
from .. import processes
from ..processes import Part

__all__ = ["Objective", "check_distribution", "check_reparametrised"]


class Objective(ELBO):
    """What a guide is trained for: a loss of ``SVI``, and of a distribution over latent vectors.

    Args:
        num_particles: Draws for each step.
        vectorize_particles: Whether model and guide run once for all particles, in an outermost
            plate.

    Raises:
        TypeError: If ``num_particles`` is not an integer.
        ValueError: If it is not positive.
    """

    def __init__(self, num_particles: int = 32, vectorize_particles: bool = True) -> None:
        check_size("num_particles", num_particles)
        check_flag("vectorize_particles", vectorize_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)

    @abstractmethod
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss of a guide, to differentiate.

        Args:
            model: A Pyro model.
            guide: Its guide.
            *args: Arguments of both.
            **kwargs: Keyword arguments of both.

        Returns:
            Tensor without dimensions, whose gradient is the estimator.
        """

    @abstractmethod
    def density_loss(
        self, distribution: torch.distributions.Distribution, density: LogDensity
    ) -> Tensor:
        """The loss of a distribution, to differentiate.

        Args:
            distribution: Over vectors of shape ``(features,)``, such as ``flow()`` or
                ``guide.get_posterior()``.
            density: The log density.

        Returns:
            Tensor without dimensions, whose gradient is the estimator.

        Raises:
            ValueError: If the distribution is not one over such vectors.
        """

    def backward(self, distribution: torch.distributions.Distribution, density: LogDensity) -> Part:
        """Adds this process's part of the gradient of :meth:`density_loss`.

        By default every process computes the whole loss, but for its evaluations of the density;
        bounds share out their particles.

        Args:
            distribution: As for :meth:`density_loss`, which has checked it.
            density: The log density.

        Returns:
            Its part of the loss, without gradient.
        """
        loss = self.density_loss(distribution, density)
        (loss / processes.world_size()).backward()
        return Part(loss.detach(), torch.ones_like(loss))

    def settings(self) -> dict[str, Any]:
        """What tells it from others, as numbers and strings."""
        return {"objective": type(self).__name__, "particles": self.num_particles}

    def state_dict(self) -> dict[str, Any]:
        """What the objective remembers between steps, as tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], density: LogDensity) -> None:
        """Goes back to a state.

        Args:
            state: What :meth:`state_dict` returned.
            density: The log density that it belongs to.
        """

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The value of the loss, without gradient."""
        with torch.no_grad():
            return _checked(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The value of the loss; its gradient is added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return _checked(loss)


def _checked(loss: Tensor) -> float:
    warn_if_nan(loss, "loss")
    return loss.item()


def check_distribution(distribution: Any, density: LogDensity) -> None:
    if not isinstance(distribution, torch.distributions.Distribution):
        raise TypeError(
            f"Expected a distribution, such as flow(); got {type(distribution).__name__}."
        )
    shape = tuple(distribution.batch_shape + distribution.event_shape)
    if tuple(distribution.event_shape) != (density.features,) or distribution.batch_shape:
        raise ValueError(
            f"Expected a distribution of one vector of {density.features} features; got one of "
            f"shape {shape}."
        )


def check_reparametrised(distribution: Any, where: str = "") -> None:
    if not distribution.has_rsample:
        raise ValueError(
            "Expected a reparametrised distribution, with rsample; got "
            f"{type(distribution).__name__}{where}. "
            "pyro.infer.TraceGraph_ELBO trains such a guide."
        )
