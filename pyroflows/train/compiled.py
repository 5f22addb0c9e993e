"""The flow's part of a training step, compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._compat import WeakIdKeyDictionary, make_fx
from .._compile import compiled
from ..transforms import Transform

__all__ = ["compiled_push_score"]

PushScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# What has been compiled for a flow: a ladder trains one in several rounds.
_COMPILED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def compiled_push_score(transform: Transform, like: Tensor, owner: nn.Module) -> PushScore:
    """Compiles ``transform.push_score`` and its backward pass for one shape of points.

    The score's recursion differentiates inside of a forward pass, which ``torch.compile`` does not read; so the pass is
    captured as a graph of tensor operations first, and that graph is compiled. Where this fails, a warning says why, and
    the transform's own method comes back.

    Args:
        transform: The transform.
        like: Points of the shape to come, ``(n, *event_shape)``.
        owner: The flow that the transform is of; what is compiled serves again for another transform of the same make.

    Returns:
        A function of the points and their score, with the values of ``push_score``.
    """
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        x = torch.randn_like(like)
        try:
            push_score = _compile(transform, x, owner)
            reason = (
                None
                if _agree(push_score, transform.push_score, transform, x)
                else "its values differ when compiled"
            )
        except Exception as error:
            reason = _reason(error)
    if reason is None:
        return push_score
    warnings.warn(f"The training goes on without compile=True: {reason}.", stacklevel=4)
    return transform.push_score


class _PushScore(nn.Module):
    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det, score = self.transform.push_score(x, score)
        return y, log_det, score.detach()


def _compile(transform: Transform, x: Tensor, owner: nn.Module) -> PushScore:
    module = _PushScore(transform)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def run(parameters: Any, buffers: Any, x: Tensor, score: Tensor) -> Any:
        return functional_call(module, (parameters, buffers), (x, score))

    shapes = {
        name: (tensor.shape, tensor.requires_grad)
        for name, tensor in {**parameters, **buffers}.items()
    }
    key = (x.shape, x.dtype, x.device, tuple(shapes.items()))
    made = _COMPILED.setdefault(owner, {})
    if key not in made:
        graph = make_fx(run)(parameters, buffers, x, -x)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        made[key] = compiled(graph)
    step = made[key]
    return lambda x, score: step(parameters, buffers, x, score)


def _agree(compiled: PushScore, eager: PushScore, transform: Transform, x: Tensor) -> bool:
    """Whether values and gradients are the same; the first call is the one that compiles."""
    parameters = [p for p in transform.parameters() if p.requires_grad]
    results = []
    for push in (compiled, eager):
        y, log_det, score = push(x, -x)
        grads = torch.autograd.grad(y, parameters, -x, allow_unused=True)
        results.append(
            [y, log_det, score, *(torch.zeros(()) if grad is None else grad for grad in grads)]
        )
    tolerance = 1e-8 if x.dtype == torch.float64 else 1e-3
    return all(
        a.shape == b.shape
        and torch.allclose(
            a, b, rtol=tolerance, atol=tolerance * (1 + float(b.detach().abs().amax()))
        )
        for a, b in zip(*results, strict=True)
    )


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in ("InvalidCxxCompiler", "TritonMissing"):
            return "torch.compile found no C++ compiler, or no Triton, on this machine"
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return "torch.compile failed with " + (
        " ".join(str(error).split())[:200] or type(error).__name__
    ).rstrip(".")
