"""Gradients that a model loses, because it turns latent values into numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sites import LatentSite

__all__ = ["find_lost_slope"]

POINTS = 3

# Steps of the differences on the unconstrained scale; they must agree to be trusted.
STEPS = (1e-2, 2.5e-3)

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def find_lost_slope(evaluate: Evaluate, sites: Sequence[LatentSite], start: Tensor) -> str:
    """Looks for a latent site along which a log density changes though its gradient is zero.

    Gradients are compared with central differences near the start. One is lost if they differ at
    all points, and by much more than two differences of unlike steps and than rounding explains.

    Args:
        evaluate: From points of shape ``(n, features)`` to values and gradients.
        sites: The latent sites.
        start: Point of shape ``(features,)``.

    Returns:
        The name of the site; empty if no gradient is lost.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.randn(POINTS + 1, len(start), generator=generator, device="cpu").to(start)
    points, direction = start + 0.1 * noise[1:], noise[0]
    if not _is_lost(evaluate, points, direction):
        return ""
    blocks = torch.eye(len(sites)).to(start)
    sizes = torch.tensor([site.features for site in sites])
    blocks = blocks.repeat_interleave(sizes.to(start.device), dim=1)
    for site, block in zip(sites, blocks, strict=True):
        if site.features and _is_lost(evaluate, points, block * direction):
            return site.name
    return ""


def _is_lost(evaluate: Evaluate, points: Tensor, direction: Tensor) -> bool:
    """Whether the slope in a direction is not the one that the gradient gives, at all points."""
    direction = direction / direction.norm()
    return all(_is_lost_at(evaluate, point, direction) for point in points)


def _is_lost_at(evaluate: Evaluate, point: Tensor, direction: Tensor) -> bool:
    shifts = [sign * step for step in STEPS for sign in (1.0, -1.0)]
    moves = torch.tensor([0.0, *shifts]).to(point).unsqueeze(-1)
    values, grads = evaluate(point + moves * direction)
    right, left, nearer_right, nearer_left = values[1:]
    wide, narrow = (right - left) / (2 * STEPS[0]), (nearer_right - nearer_left) / (2 * STEPS[1])
    slope = grads[0] @ direction
    rounding = torch.finfo(point.dtype).eps * (1 + values[0].abs()) / STEPS[1]
    margin = 10 * (wide - narrow).abs() + 10 * rounding + 0.01 * (wide.abs() + slope.abs())
    return bool((wide - slope).abs() > margin)  # and not if anything is NaN
