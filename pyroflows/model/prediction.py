"""Running a model once per draw: its deterministic sites, its likelihood, its predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..report import arviz_bridge as arviz
from .density import LogDensity, limit_batch
from .pointwise import map_points
from .program import FAILURES
from .sites import base_distribution, is_factor, sample_nodes, site_plates

__all__ = [
    "deterministic_sites",
    "dimension_names",
    "inference_data",
    "log_likelihood",
    "observed_data",
    "posterior_predictive",
    "prior_draws",
    "site_draws",
]

Draws = dict[str, Tensor]

# Draws for which one batched run of the model is made; fewer if it sees many rows of data.
DRAWS_AT_ONCE = 1000
# Groups with a number for each draw and each row, and the most numbers of one: four gigabytes.
OF_ROWS, MOST_NUMBERS = ("log_likelihood", "posterior_predictive"), 2**30


def inference_data(
    density: LogDensity,
    z: Tensor,
    sample_stats: Mapping[str, Tensor],
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Draws in ArviZ's container, with predictions, likelihood, data and prior where there are any.

    Args:
        density: The density of the model.
        z: Draws of shape ``(chains, draws, features)``.
        sample_stats: For each statistic a tensor of shape ``(chains, draws)``.
        attrs: What to note on the whole.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x). Groups with a number for
        each draw and each observation are left out, and a note says so, where these are too many.
    """
    chains, draws = z.shape[:2]
    rows = z.reshape(-1, density.features)
    of_draws = {"posterior": site_draws(density, rows)}
    numbers = len(rows) * sum(value.numel() for value in observed_data(density).values())
    if numbers > MOST_NUMBERS:
        of_rows = {group: _too_large(numbers) for group in OF_ROWS}
    else:
        of_draws["log_likelihood"] = log_likelihood(density, rows)
        of_draws["posterior_predictive"] = posterior_predictive(density, rows)
        of_rows = _left_out(density, of_draws["log_likelihood"])
    notes = {**(attrs or {}), **of_rows}
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
    return arviz.to_inference_data(arrays, dims=dimension_names(density), attrs=notes)


def _too_large(numbers: int) -> str:
    """Says why a group with a number for each draw and each row is not made."""
    return (
        f"Left out: it would have {numbers:.3g} numbers, one for each draw and each observation. "
        "Ask for fewer draws."
    )


def _left_out(density: LogDensity, likelihood: Draws) -> dict[str, str]:
    """Says which observed sites of a model with discrete ones have no log likelihood."""
    names = [name for name in observed_data(density) if name not in likelihood]
    if not (density.discrete and names):
        return {}
    sentence = (
        f"Left out: {', '.join(names)}, whose entries share discrete latent sites, so that they "
        "have no log likelihoods of their own."
    )
    return {"log_likelihood": sentence}


def site_draws(density: LogDensity, z: Tensor, discrete: bool = False) -> Draws:
    """Values of the latent and the deterministic sites.

    Args:
        density: The density of the model.
        z: Draws of shape ``(draws, features)``.
        discrete: Whether to draw the discrete latent sites too.

    Returns:
        For each site a tensor of shape ``(draws, *site_shape)``; NaN, that is missing, at
        continuous entries that a mask switches off.
    """
    values = density.constrain(z)
    latent = {site.name: site.blank(values[site.name]) for site in density.sites}
    if density.discrete and discrete:
        return {**latent, **_with_discrete_sites(density, z)}
    return {**latent, **deterministic_sites(density, z)}


def _with_discrete_sites(density: LogDensity, z: Tensor) -> Draws:
    """Draws of the discrete sites, and values of the deterministic ones given these."""

    def values_of(row: Tensor) -> Draws:
        drawn = density.sample_discrete(row)
        given = poutine.condition(density.model, data={**density.constrain(row), **drawn})
        nodes = density.trace_of(given).nodes.items()
        return {**drawn, **{name: site["value"] for name, site in nodes if _is_deterministic(site)}}

    return _map(density, values_of, z)


def dimension_names(density: LogDensity) -> dict[str, list[str | None]]:
    """For each latent and observed site that lies in plates, the names of its dimensions."""
    trace = density.trace()
    names = {site.name: list(site.plates) for site in density.sites}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and name not in names and not site_is_subsample(site):
            names[name] = list(site_plates(site))
    return {name: plates for name, plates in names.items() if any(plates)}


def deterministic_sites(density: LogDensity, z: Tensor) -> Draws:
    """Values of the ``pyro.deterministic`` sites.

    Args:
        density: The density of the model.
        z: Draws of shape ``(draws, features)``.

    Returns:
        For each of these sites a tensor of shape ``(draws, *site_shape)``; empty if the model has
        none, or has discrete latent sites.
    """
    # A run for every draw costs a look at all rows of data.
    if density.discrete or not any(map(_is_deterministic, density.trace().nodes.values())):
        return {}

    def values_of(row: Tensor) -> Draws:
        nodes = density.trace(row).nodes.items()
        return {name: site["value"] for name, site in nodes if _is_deterministic(site)}

    return _map(density, values_of, z, density.initial)


def log_likelihood(density: LogDensity, z: Tensor) -> Draws:
    """Log likelihood of each entry of the observed sites.

    Args:
        density: The density of the model.
        z: Draws of shape ``(draws, features)``.

    Returns:
        For each observed site a tensor of shape ``(draws, *batch_shape)``. Discrete latent sites
        are summed out; observed sites that share some with each other are left out.
    """
    observed = set(observed_data(density))

    def likelihood_of(row: Tensor) -> Draws:
        terms = density.observed_terms(row)
        return {name: term for name, term in terms.items() if name in observed}

    return _map(density, likelihood_of, z, density.initial)


def posterior_predictive(density: LogDensity, z: Tensor) -> Draws:
    """New data from the model.

    Args:
        density: The density of the model.
        z: Draws of shape ``(draws, features)``.

    Returns:
        For each observed site a tensor of shape ``(draws, *site_shape)``, given draws of the
        discrete latent sites; empty if the data cannot be drawn.
    """
    names = list(observed_data(density))
    latent = density.constrain(z)
    if density.discrete:
        latent |= _map(density, density.sample_discrete, z)

    def simulate(draw: Tensor) -> Draws:
        values = {name: value[draw] for name, value in latent.items()}
        free = poutine.condition(poutine.uncondition(density.model), data=values)
        trace = density.trace_of(free)
        return {name: trace.nodes[name]["value"] for name in names}

    try:
        return _map(density, simulate, torch.arange(len(z), device=z.device))
    except NotImplementedError:
        return {}


def prior_draws(density: LogDensity, draws: int) -> Draws:
    """Draws of the latent sites from the prior; nothing where a prior is improper, or where the
    model has no values of its discrete sites."""
    if density.needs_enumeration:
        return {}
    rows = density.initial.new_zeros(draws, 1)

    def simulate(row: Tensor) -> Draws:
        trace = density.trace_of(poutine.uncondition(density.model))
        return {site.name: trace.nodes[site.name]["value"] for site in density.sites}

    try:
        values = _map(density, simulate, rows, safe=rows[:1].squeeze(0))
    except FAILURES:
        return {}
    missing = [value.isnan().reshape(draws, -1).any(-1) for value in values.values()]
    known = ~torch.stack(missing).any(0)
    return {name: value[known] for name, value in values.items()} if bool(known.any()) else {}


def observed_data(density: LogDensity) -> Draws:
    """Values of the observed sites."""
    trace = density.trace()
    names = set(_observed(trace)) - {site.name for site in density.sites}
    return {
        n: s["value"]
        for n, s in trace.nodes.items()
        if n in names and isinstance(s["value"], Tensor)
    }


def _observed(trace: Any) -> list[str]:
    nodes = [(name, site) for name, site in sample_nodes(trace) if site["is_observed"]]
    return [name for name, s in nodes if not (_is_deterministic(s) or is_factor(s["fn"]))]


def _is_deterministic(site: dict[str, Any]) -> bool:
    """Whether a site is a function of others: of ``pyro.deterministic``, or reparametrised away."""
    if site["type"] != "sample":
        return False
    is_point = isinstance(base_distribution(site["fn"]), dist.Delta)
    return bool(site["infer"].get("_deterministic")) or (site["is_observed"] and is_point)


@torch.no_grad()
def _map(
    density: LogDensity, run: Callable[[Tensor], Draws], rows: Tensor, safe: Tensor | None = None
) -> Draws:
    with warnings.catch_warnings():
        # torch says so of its own binomial sampler; the samples are right.
        warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
        at_once = limit_batch(DRAWS_AT_ONCE, density.trace()) if density.batched else 1
        return map_points(run, rows, at_once, safe)
