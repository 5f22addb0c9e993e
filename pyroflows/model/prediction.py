"""Running a model once per draw: its deterministic sites, its likelihood, its predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..report import arviz_bridge as arviz
from .density import LogDensity, site_plates

__all__ = [
    "deterministic_sites",
    "dimension_names",
    "inference_data",
    "log_likelihood",
    "observed_data",
    "posterior_predictive",
    "prior_draws",
]

Draws = dict[str, Tensor]


def inference_data(
    density: LogDensity,
    z: Tensor,
    sample_stats: Mapping[str, Tensor],
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Draws in ArviZ's container, with all that the model allows: predictions, likelihood, data, prior.

    Args:
        density: The density of the model.
        z: Draws of shape ``(chains, draws, features)``.
        sample_stats: For each statistic a tensor of shape ``(chains, draws)``.
        attrs: What to note on the whole.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
    """
    chains, draws = z.shape[:2]
    rows = z.reshape(-1, density.features)
    of_draws = {
        "posterior": {**density.constrain(rows), **deterministic_sites(density, rows)},
        "log_likelihood": log_likelihood(density, rows),
        "posterior_predictive": posterior_predictive(density, rows),
    }
    groups: dict[str, dict[str, Tensor]] = {
        group: {name: value.unflatten(0, (chains, draws)) for name, value in values.items()}
        for group, values in of_draws.items()
    }
    groups["sample_stats"] = dict(sample_stats)
    groups["prior"] = {
        name: value.unsqueeze(0) for name, value in prior_draws(density, draws).items()
    }
    groups["observed_data"] = observed_data(density)
    arrays = {
        group: {name: value.detach().cpu().numpy() for name, value in values.items()}
        for group, values in groups.items()
    }
    return arviz.to_inference_data(arrays, dims=dimension_names(density), attrs=attrs)


def dimension_names(density: LogDensity) -> dict[str, list[str | None]]:
    """For each latent and observed site that lies in plates, the names of its dimensions."""
    trace = density._trace(density.constrain(density.initial))
    names = {site.name: list(site.plates) for site in density.sites}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and name not in names and not site_is_subsample(site):
            names[name] = list(site_plates(site))
    return {name: plates for name, plates in names.items() if any(plates)}


def deterministic_sites(density: LogDensity, z: Tensor) -> Draws:
    """Values of ``pyro.deterministic`` sites, one run of the model per draw ``z`` of shape ``(draws, features)``."""
    if density.discrete:
        return {}
    return _per_draw(
        density,
        z,
        lambda trace: {n: s["value"] for n, s in trace.nodes.items() if _is_deterministic(s)},
    )


def log_likelihood(density: LogDensity, z: Tensor) -> Draws:
    """Log likelihood of each entry of the observed sites, given draws ``z`` of shape ``(draws, features)``."""
    if density.discrete:
        return {}

    def of_trace(trace: Any) -> Draws:
        trace.compute_log_prob()
        return {name: trace.nodes[name]["log_prob"] for name in _observed(trace)}

    observed = set(observed_data(density))
    return _per_draw(
        density, z, lambda trace: {n: v for n, v in of_trace(trace).items() if n in observed}
    )


def posterior_predictive(density: LogDensity, z: Tensor) -> Draws:
    """New data from the model, given draws ``z`` of shape ``(draws, features)``; nothing where data cannot be drawn."""
    if density.discrete:
        return {}
    names = list(observed_data(density))

    def simulate(row: Tensor) -> Draws:
        free = poutine.condition(poutine.uncondition(density.model), data=density.constrain(row))
        trace = _trace(free, density)
        return {name: trace.nodes[name]["value"] for name in names}

    try:
        return _map(simulate, z, density.batched)
    except NotImplementedError:
        return {}


def prior_draws(density: LogDensity, draws: int) -> Draws:
    """Draws of the latent sites from the prior; nothing where a prior is improper."""
    rows = density.initial.new_zeros(draws, 1)

    def simulate(row: Tensor) -> Draws:
        trace = _trace(poutine.uncondition(density.model), density)
        return {site.name: trace.nodes[site.name]["value"] for site in density.sites}

    try:
        return _map(simulate, rows, density.batched)
    except NotImplementedError:
        return {}


def observed_data(density: LogDensity) -> Draws:
    """Values of the observed sites."""
    trace = density._trace(density.constrain(density.initial))
    names = set(_observed(trace)) - {site.name for site in density.sites}
    return {
        n: s["value"]
        for n, s in trace.nodes.items()
        if n in names and isinstance(s["value"], Tensor)
    }


def _observed(trace: Any) -> list[str]:
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not _is_deterministic(site)
        and not _is_factor(site)
    ]


def _is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a site is no more than a function of others: of ``pyro.deterministic``, or reparametrised away."""
    if site["type"] != "sample":
        return False
    fn = site["fn"]
    while isinstance(fn, (dist.MaskedDistribution, torch.distributions.Independent)):
        fn = fn.base_dist
    return bool(site["infer"].get("_deterministic")) or (
        site["is_observed"] and isinstance(fn, dist.Delta)
    )


def _is_factor(site: dict[str, Any]) -> bool:
    return isinstance(site["fn"], dist.Unit)


def _trace(model: Callable[..., Any], density: LogDensity) -> Any:
    with density.on_device(), poutine.block(), pyro.validation_enabled(False):
        return poutine.trace(model).get_trace(*density.args, **density.kwargs)


def _per_draw(density: LogDensity, z: Tensor, read: Callable[[Any], Draws]) -> Draws:
    def run(row: Tensor) -> Draws:
        with pyro.validation_enabled(False):
            return read(density._trace(density.constrain(row)))

    return _map(run, z, density.batched)


@torch.no_grad()
def _map(run: Callable[[Tensor], Draws], rows: Tensor, batched: bool) -> Draws:
    if batched:
        try:
            with warnings.catch_warnings():
                # torch says so of its own binomial sampler; the samples are right.
                warnings.filterwarnings(
                    "ignore", message="An output with one or more elements was resized"
                )
                return torch.func.vmap(run, randomness="different", chunk_size=1000)(rows)
        except (RuntimeError, ValueError):
            pass  # some samplers have no batching rule; one run at a time needs none
    runs = [run(row) for row in rows]
    return {name: torch.stack([values[name] for values in runs]) for name in runs[0]}
