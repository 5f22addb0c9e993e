"""A stack whose activations are not kept for the backward pass but recomputed by inversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .._saturation import bound_gradient, saturate

__all__ = ["Step", "recompute"]


class Step(nn.Module):
    """One layer in one direction, as a module that can be called with parameters lent to it."""

    def __init__(self, layer: Any, inverted: bool) -> None:
        super().__init__()
        self.layer = layer
        self.inverted = inverted

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        given = None if self.layer.context_shape is None else context
        return (
            self.layer.inverse_and_log_det if self.inverted else self.layer.forward_and_log_det
        )(x if self.layer.scales_down else bound_gradient(self.layer.keep_within(x)), given)

    def back(self, y: Tensor, context: Tensor | None) -> Tensor:
        given = None if self.layer.context_shape is None else context
        x = (self.layer.forward_and_log_det if self.inverted else self.layer.inverse_and_log_det)(
            y, given
        )[0]
        return x if self.layer.exact else saturate(x.nan_to_num(nan=0.0))


def recompute(steps: Sequence[Step], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Runs a stack and keeps its output alone.

    The backward pass walks down the stack: each layer's input is the inverse of its output, from
    which its own backward pass is built and thrown away again. So the memory of a training step
    does not grow with depth, at the price of one inversion and one more evaluation of each layer.
    It is differentiable once.

    Args:
        steps: The layers in the order in which they run.
        x: Points of shape ``(*, *event_shape)``.
        context: Context of shape ``(*, context_features)``, or ``None``.

    Returns:
        The output and the sum of the log-determinants.
    """
    named = [dict(step.named_parameters()) for step in steps]
    parameters = [parameter for one in named for parameter in one.values()]
    plan = _Plan(list(steps), [list(one) for one in named])
    return _Recomputed.apply(plan, x, context, *parameters)


class _Plan(NamedTuple):
    steps: list[Step]
    names: list[list[str]]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, x: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, total = plan.steps[0](x, context)
        for step in plan.steps[1:]:
            y, log_det = step(y, context)
            total = total + log_det
        ctx.plan, ctx.shape, ctx.has_context = plan, x.shape, context is not None
        ctx.save_for_backward(y, *([] if context is None else [context]), *parameters)
        return y, total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        y, *kept = ctx.saved_tensors
        context = kept.pop(0) if ctx.has_context else None
        grad_context = None if context is None else torch.zeros_like(context)
        grads: list[list[Tensor | None]] = []
        for step, names in zip(reversed(ctx.plan.steps), reversed(ctx.plan.names), strict=True):
            own, kept = kept[len(kept) - len(names) :], kept[: len(kept) - len(names)]
            y, grad_y, of_context, of_own = _undo(step, names, own, y, context, grad_y, grad_total)
            if of_context is not None and grad_context is not None:
                grad_context = grad_context + of_context
            grads.insert(0, of_own)
        grad_x = grad_y.sum_to_size(ctx.shape)
        return None, grad_x, grad_context, *(grad for one in grads for grad in one)


def _undo(
    step: Step,
    names: list[str],
    parameters: list[Tensor],
    y: Tensor,
    context: Tensor | None,
    grad_y: Tensor,
    grad_total: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
    """The input of a step, and the gradients with respect to it, to the context and to the parameters."""
    lent = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
    x = functional_call(
        _Back(step), {f"step.{n}": p for n, p in zip(names, lent, strict=True)}, (y, context)
    )
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        given = None if context is None else context.detach().requires_grad_()
        outputs = functional_call(step, dict(zip(names, lent, strict=True)), (x, given))
        wanted = [x, *([] if given is None else [given]), *(p for p in lent if p.requires_grad)]
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, (grad_y, grad_total), strict=True)
            if out.requires_grad
        ]
        found = list(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
            )
        )
    of_x, of_context = found.pop(0), None if given is None else found.pop(0)
    of_own = [found.pop(0) if p.requires_grad else None for p in lent]
    return x.detach(), torch.zeros_like(x) if of_x is None else of_x, of_context, of_own


class _Back(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.step.back(y, context)
