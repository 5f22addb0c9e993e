"""Several transforms one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import check_flag
from .._compat import transforming
from .._saturation import bound_gradient
from ._recompute import Step, recompute
from .base import FAST, Transform, check_transform

__all__ = ["Compose"]


def _check_reversible(layer: Transform) -> None:
    kind = type(layer).__name__
    if layer.fast != "both":
        kind = f"{kind} (fast: {FAST[layer.fast]})"
        raise ValueError(
            f"Expected reversible=True with transforms fast in both directions; got {kind}."
        )
    if not all(module.repeatable for module in layer.modules() if isinstance(module, Transform)):
        kind = f"{kind}, which changes with use"
        raise ValueError(
            f"Expected reversible=True with transforms that repeat themselves; got {kind}."
        )


class Compose(Transform):
    r"""Several transforms one after the other, :math:`f = f_K \circ \dots \circ f_1`, first applied first.

    Args:
        transforms: Transforms in generative order. Those that take a context all get the same one.
        reversible: Whether the backward pass recomputes activations by inversion instead of keeping
            them, so that the memory of a training step does not grow with depth; see the reference.
            The result is differentiable once.

    Raises:
        TypeError: If one of them is not a :class:`Transform`.
        ValueError: If there is none, if the shapes of events or contexts do not fit together, or if
            ``reversible`` is asked of transforms that are slow in one direction or do not repeat
            themselves.

    Reference:
        Gomez, Ren, Urtasun, Grosse, "The reversible residual network: Backpropagation without
        storing activations", 2017, https://arxiv.org/abs/1707.04585

    Example:
        >>> from pyroflows.transforms import Compose, Reverse
        >>> Compose([Reverse(3), Reverse(3)])(torch.arange(3.0))
        tensor([0., 1., 2.])
    """

    transform: Transform
    context: Tensor

    def __init__(self, transforms: Iterable[Transform], reversible: bool = False) -> None:
        if not isinstance(transforms, Iterable):
            raise TypeError(
                f"Expected transforms to be a sequence of transforms; got {type(transforms).__name__}."
            )
        layers = list(transforms)
        if not layers:
            raise ValueError("Expected at least one transform in transforms; got none.")
        for layer in layers:
            check_transform("transforms", layer)
        shape = layers[0].event_shape
        for number, layer in enumerate(layers):
            if layer.event_shape != shape:
                raise ValueError(
                    f"Expected transform {number} of event shape {tuple(shape)}, as the one before it gives; "
                    f"got {tuple(layer.event_shape)}."
                )
            shape = layer.image_shape
        contexts = {
            layer.context_shape: None for layer in layers if layer.context_shape is not None
        }
        if len(contexts) > 1:
            described = ", ".join(str(tuple(context)) for context in contexts)
            raise ValueError(f"Expected one shape of context in all transforms; got {described}.")
        super().__init__(layers[0].event_shape, context_shape=next(iter(contexts), None))
        self.layers = nn.ModuleList(layers)
        self._image_shape = shape
        # Torch asks a dozen times per distribution.
        self._domain, self._codomain = layers[0].domain, layers[-1].codomain
        self.reversible = check_flag("reversible", reversible)
        for layer in layers if reversible else []:
            _check_reversible(layer)

    @property
    def fast(self) -> str:
        limits = {layer.fast for layer in self.layers} - {"both"}
        if len(limits) > 1:
            return "neither"
        return limits.pop() if limits else "both"  # type: ignore[return-value]

    @property
    def image_shape(self) -> torch.Size:
        return self._image_shape

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._codomain

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverted=False)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run(y, context, inverted=True)

    def _run(self, x: Tensor, context: Tensor | None, inverted: bool) -> tuple[Tensor, Tensor]:
        layers = list(self._with_context(context))
        if inverted:
            layers.reverse()
        if self.reversible and torch.is_grad_enabled() and not transforming():
            steps = [Step(layer, inverted) for layer, _ in layers]
            return recompute(steps, x, context)
        total: Tensor | None = None
        for number, (layer, given) in enumerate(layers):
            move = layer.inverse_and_log_det if inverted else layer.forward_and_log_det
            x = x if layer.scales_down else self.keep_within(x)
            # Before every fourth layer, because each hook costs as much as two small kernels.
            bounded = number % 4 == 1 and not self.exact
            x, log_det = move(bound_gradient(x) if bounded else x, given)
            total = log_det if total is None else total + log_det
        return x, total  # type: ignore[return-value]

    def push_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        total: Tensor | None = None
        for layer, given in self._with_context(context):
            x, log_det, score = layer.push_score(x, score, given)
            total = log_det if total is None else total + log_det
        return x, total, score  # type: ignore[return-value]

    def pull_score(
        self, y: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        total: Tensor | None = None
        for layer, given in reversed(list(self._with_context(context))):
            y, log_det, score = layer.pull_score(y, score, given)
            total = log_det if total is None else total + log_det
        return y, total, score  # type: ignore[return-value]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        for layer in self.layers:
            shape = layer.forward_shape(shape)  # type: ignore[operator]
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        for layer in reversed(self.layers):
            shape = layer.inverse_shape(shape)  # type: ignore[operator]
        return shape

    def _with_context(self, context: Tensor | None) -> Iterator[tuple[Transform, Tensor | None]]:
        for layer in self.layers:
            assert isinstance(layer, Transform)
            yield layer, None if layer.context_shape is None else context
