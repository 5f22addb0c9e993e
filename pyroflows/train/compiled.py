"""The flow's part of a training step, compiled: with its score, or its density."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._checks import caller_level
from .._compat import WeakIdKeyDictionary, make_fx
from .._compile import compiled
from .._wording import unstopped
from ..transforms import Transform
from .points import Points, log_prob

__all__ = ["compiled_log_prob", "compiled_push_score"]

F = TypeVar("F", bound=Callable[..., Any])
LogProb = Callable[[Points], Tensor]
PushScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# What has been compiled for a flow: a ladder trains one in several rounds.
_COMPILED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def compiled_push_score(transform: Transform, like: Tensor, owner: nn.Module) -> PushScore | None:
    """Compiles ``transform.push_score`` and its backward pass for one shape of points.

    The score's recursion differentiates inside of a forward pass, which ``torch.compile`` does not
    read; so the pass is captured as a graph of tensor operations first, and that graph is compiled.

    Args:
        transform: The transform.
        like: Points of the shape to come, ``(n, *event_shape)``.
        owner: The flow that the transform is of; what is compiled serves again for another
            transform of the same make.

    Returns:
        A function of the points and their score, with the values of ``push_score``; ``None`` where
        this fails, after a warning that says why.
    """
    with _own_random_state(like):
        x = torch.randn_like(like)

        def results(push: PushScore) -> list[Tensor]:
            y, log_det, score = push(x, -x)
            return [y, log_det, score, *_gradients(y, transform, -x)]

        eager: PushScore = transform.push_score
        return _if_it_agrees(lambda: _compile(transform, x, owner), eager, results)


def compiled_log_prob(flow: nn.Module, points: Points) -> LogProb | None:
    """Compiles the log density of a flow and its backward pass.

    Args:
        flow: A module whose call, with the context if there is one, returns a distribution.
        points: Some points with their contexts.

    Returns:
        A function of points and their contexts, with the values of :func:`log_prob`; ``None`` where
        this fails, after a warning that says why.
    """
    # Not by a call, which does things for Pyro that cannot be compiled.
    fixed = flow.forward() if points.context is None else None

    def evaluate(x: Tensor, context: Tensor | None) -> Tensor:
        return (flow.forward(context) if fixed is None else fixed).log_prob(x)

    def compile() -> LogProb:
        function = compiled(evaluate)
        return lambda given: function(given.x, given.context)

    def results(log_prob: LogProb) -> list[Tensor]:
        values = log_prob(points)
        return [values, *_gradients(values, flow, torch.ones_like(values))]

    eager: LogProb = functools.partial(log_prob, flow)
    with _own_random_state(points.x):
        return _if_it_agrees(compile, eager, results)


def _own_random_state(like: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else [])


def _if_it_agrees(
    compile: Callable[[], F], eager: F, results: Callable[[F], list[Tensor]]
) -> F | None:
    """The compiled function, if it has the results of the eager one."""
    try:
        made = compile()
        # The first call is the one that compiles.
        if _close(results(made), results(eager)):
            return made
        reason = "its values differ when compiled"
    except Exception as error:
        reason = _reason(error)
    warnings.warn(
        f"The training goes on without compile=True: {reason}.", stacklevel=caller_level()
    )
    return None


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


def _gradients(values: Tensor, module: nn.Module, weights: Tensor) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(
        torch.autograd.grad(values, parameters, weights, allow_unused=True, materialize_grads=True)
    )


def _close(found: list[Tensor], expected: list[Tensor]) -> bool:
    tolerance = 1e-8 if expected[0].dtype == torch.float64 else 1e-3
    for a, b in zip(found, expected, strict=True):
        scale = 1 + float(b.detach().abs().amax())
        if a.shape != b.shape or not torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale):
            return False
    return True


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in ("InvalidCxxCompiler", "TritonMissing"):
            return "torch.compile found no C++ compiler, or no Triton, on this machine"
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    told = " ".join(str(error).split())[:200] or type(error).__name__
    return f"torch.compile failed with {unstopped(told)}"
