"""Latent entries that a mask switches off, told from those that are needed all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._random import forked
from .program import FAILURES
from .sites import LatentSite, unmasked_entries

__all__ = ["settle_masks"]

# Distances from the start, on the unconstrained scale, at which the model is run: the furthest at
# which it can be.
STEPS = (1.0, 0.1, 0.01)
RUNS = 3

Run = Callable[[Mapping[str, Tensor]], Any]


def settle_masks(sites: Sequence[LatentSite], trace: Any, run: Run) -> list[LatentSite]:
    """Finds the entries that a mask switches off and on which nothing in the model depends.

    A mask alone does not say so: ``Normal(0, 1).mask(False)`` is an improper prior where the data
    are to decide, and a mask may depend on another site. So the model is run at a few points. An
    entry is inactive if it is masked in all of these runs, the log density has no slope along it,
    and stays the same when all inactive entries move.

    Args:
        sites: The latent sites of a trace, with the masks of that one run.
        trace: The trace.
        run: From values of the sites to a trace of the model at them.

    Returns:
        The sites, in which the other entries are active.
    """
    if all(site.complete for site in sites):
        return list(sites)
    start = {s.name: s.transform.inv(trace.nodes[s.name]["value"].detach()) for s in sites}
    candidates = {site.name: ~site.active for site in sites}
    for seed in range(RUNS):
        _drop_needed(candidates, sites, _points_around(start, seed), run)
    if not _is_flat(candidates, sites, start, run):
        candidates = {name: torch.zeros_like(idle) for name, idle in candidates.items()}
    return [replace(site, active=~candidates[site.name]) for site in sites]


def _points_around(start: Mapping[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    """Points in one random direction from the start, nearer and nearer."""
    with forked(seed):
        noise = {n: torch.randn(v.shape, device="cpu").to(v) for n, v in start.items()}
    for step in STEPS:
        yield {name: value + step * noise[name] for name, value in start.items()}


def _drop_needed(
    candidates: dict[str, Tensor],
    sites: Sequence[LatentSite],
    points: Iterator[Mapping[str, Tensor]],
    run: Run,
) -> None:
    """Drops candidates that are not masked, or have a slope, at the first usable point."""
    for point in points:
        leaves = {name: value.clone().requires_grad_() for name, value in point.items()}
        try:
            with torch.enable_grad():
                trace, log_joint = _evaluate(run, _images(sites, leaves))
            slopes = torch.autograd.grad(log_joint, list(leaves.values()), allow_unused=True)
        except FAILURES:
            continue  # the model cannot be run here
        for site, slope in zip(sites, slopes, strict=True):
            idle = candidates[site.name] & ~unmasked_entries(trace.nodes[site.name])
            needed = _needed(site, slope).to(idle.device)
            candidates[site.name] = idle & ~needed
        return


def _needed(site: LatentSite, slope: Tensor | None) -> Tensor:
    """Which entries of a value have a slope, or one that is not a number."""
    if slope is None:
        return torch.zeros(site.shape, dtype=torch.bool)
    return site.entries_of_value(slope != 0)


def _is_flat(
    candidates: Mapping[str, Tensor],
    sites: Sequence[LatentSite],
    start: Mapping[str, Tensor],
    run: Run,
) -> bool:
    """Whether the log density stays the same when all candidates move."""
    here = _images(sites, start)
    with torch.no_grad():
        expected = _evaluate(run, here)[1]
        for seed in range(RUNS):
            there = _images(sites, next(_points_around(start, seed)))
            mixed = {name: there[name].where(candidates[name], here[name]) for name in here}
            try:
                found = _evaluate(run, mixed)[1]
            except FAILURES:
                return False
            if not torch.equal(found, expected):
                return False
    return True


def _images(sites: Sequence[LatentSite], unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {site.name: site.transform(unconstrained[site.name]) for site in sites}


def _evaluate(run: Run, values: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    with forked(0):
        trace = run(values)
    return trace, trace.log_prob_sum()
