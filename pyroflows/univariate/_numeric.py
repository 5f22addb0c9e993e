"""One numeric inverse for every increasing map that has no formula for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._saturation import limit

__all__ = ["invert", "readable"]

Increasing = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Most rounds of growth (each by the factor) and most steps, where the search may stop early, where
#: it may not, and where besides each step makes a graph larger that TorchScript keeps as it is.
_FACTOR = 64.0
_ROUNDS = {"stops": (200, 200), "fixed": (12, 60), "traced": (3, 12)}


def invert(function: Increasing, y: Tensor, owner: str) -> tuple[Tensor, Tensor]:
    r"""Solves :math:`f(x) = y` entry by entry for an increasing function of the line onto itself.

    From the guess :math:`x = y` a bracket grows until it holds the root; then come Newton's steps,
    with bisection wherever they leave the bracket or are slow. Two more steps of Newton carry the
    derivatives: by the implicit function theorem the first gives
    :math:`\partial x / \partial \theta = -(\partial f / \partial \theta) / f'`, and the second
    those of second and third order.

    To stop, the search reads from the device. Where nothing may be read (under ``vmap``, in a traced
    or compiled graph, on the meta device) it takes a fixed number of steps instead, and cannot raise.

    Args:
        function: Returns :math:`f(x)` and :math:`\log f'(x)`, both of the shape of ``x``.
        y: Values.
        owner: Name of the map, for the error.

    Returns:
        :math:`x` and :math:`\log \partial x / \partial y`.

    Raises:
        RuntimeError: If the search does not converge.
    """
    with torch.no_grad():
        x = _search(function, y.detach(), owner)
    if torch.is_grad_enabled():
        for _ in range(2):
            value, log_slope = function(x)
            # Where a slope underflows, so does what the step could carry.
            step = (value - y) * log_slope.neg().exp().clamp(max=torch.finfo(y.dtype).max ** 0.5)
            x = x - (step - step.detach())
    return x, -function(x)[1]


def readable(values: Tensor) -> bool:
    """Whether Python may read values from the device here."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or values.is_meta:
        return False
    try:
        bool((values == values).all())
    except RuntimeError:  # within vmap or a tracer
        return False
    return True


def _search(function: Increasing, y: Tensor, owner: str) -> Tensor:
    largest = torch.finfo(y.dtype).max / 4
    guess = y.clamp(-largest, largest)
    excess = function(guess)[0] - y
    stops = readable(
        excess
    )  # not of y alone, for the function may close over what a transformation maps
    growings, steps = (1, 1) if y.is_meta else _ROUNDS[_manner(stops)]
    low, high, held = _bracket(function, y, guess, excess, growings, stops)
    x = torch.minimum(torch.maximum(y, low), high)
    value, log_slope = function(x)
    last = before = high - low
    for _ in range(steps):
        excess = value - y
        low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
        newton = x - excess * log_slope.neg().exp()
        # Newton's step is taken where it stays inside and halves the step before the last.
        good = (newton >= low) & (newton <= high) & ((newton - x).abs() <= 0.5 * before)
        proposal = torch.where(excess == 0, x, torch.where(good, newton, _middle(low, high)))
        before, last = last, (proposal - x).abs()
        x = proposal
        value, log_slope = function(x)
        if stops and bool(_settled(x, last, low, high, y).all()):
            break
    if stops and not bool(((held & _settled(x, last, low, high, y)) | _close(value, y)).all()):
        worst = float(torch.where(y.isfinite(), value - y, 0.0).abs().max())
        raise RuntimeError(
            f"The numeric inverse of {owner} does not converge: after {steps} steps a value is missed by {worst:.3g}."
        )
    return x


def _manner(stops: bool) -> str:
    if stops:
        return "stops"
    return "traced" if torch.jit.is_tracing() or torch.compiler.is_exporting() else "fixed"


def _bracket(
    function: Increasing, y: Tensor, guess: Tensor, excess: Tensor, growings: int, stops: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds between which the function takes the values, which coincide where the guess is right, and whether they hold."""
    largest = torch.finfo(y.dtype).max / 4
    near = far = guess
    direction, width = -excess.sign(), 2 * excess.abs()
    held = (excess == 0) | ~y.isfinite()
    for _ in range(growings):
        if stops and bool(held.all()):
            break
        probe = (near + direction * width).clamp(-largest, largest)
        value = function(probe)[0]
        crossed = (value - y) * direction >= 0
        # A root that outgrows the dtype ends at its edge; one out of the range does not exist.
        outgrown = (probe.abs() == largest) & (value.abs() >= limit(y.dtype, 0.5))
        far = torch.where(held, far, probe)
        held = held | crossed | outgrown
        near, width = torch.where(held, near, probe), width * _FACTOR
    return torch.minimum(near, far), torch.maximum(near, far), held


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """The midpoint, on a logarithmic scale where the bounds are of different orders of magnitude."""
    plain = 0.5 * low + 0.5 * high
    wide = high - low > 0.5 * torch.maximum(low.abs(), high.abs())
    scaled = torch.sinh(0.5 * (torch.asinh(low) + torch.asinh(high)))
    return torch.where(wide, torch.minimum(torch.maximum(scaled, low), high), plain)


def _settled(x: Tensor, step: Tensor, low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    """Whether the search moves no further: rounding allows no better root."""
    rounding = 2 * torch.finfo(x.dtype).eps * x.abs() + torch.finfo(x.dtype).tiny
    return (step <= rounding) | (high - low <= rounding) | ~y.isfinite()


def _close(value: Tensor, y: Tensor) -> Tensor:
    """Whether a root is right to half the digits, which is as far as a map of large internal terms may get."""
    return (value - y).abs() <= torch.finfo(y.dtype).eps ** 0.5 * (1 + y.abs())
