"""References of the benchmark of real models: each has the density of its model up to a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.pyro_models import MODELS
from benchmarks.pyro_references import REFERENCES, Reference
from benchmarks.real_models import long_run
from pyroflows.model import LogDensity

# Those whose sites are not those of their models have a test each.
OTHER_SITES = ("baseball", "cjs_3", "forecasting_1", "forecasting_2")
QUICK = ("dirichlet_process", "gaussian_mixture")
# Pyro's quadrature of the stable density and the single precision of the times of tracking.
TOLERANCE = {"stable": 2e-3, "tracking": 1e-4}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def densities(name: str) -> tuple[LogDensity, LogDensity]:
    """The density of a model and that of its reference, on the same data."""
    torch.set_default_dtype(torch.float32)
    case = MODELS[name]()
    torch.set_default_dtype(torch.float64)
    args = tuple(a.double() if a.is_floating_point() else a for a in case.args)
    return LogDensity(case.model, args), LogDensity(REFERENCES[name].model, args)


def compare(name: str, to_reference: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Tensor:
    """Differences of the log densities of constrained values at a few points."""
    model, reference = densities(name)
    torch.manual_seed(0)
    points = 0.5 * torch.randn(3, model.features)
    values = [model.constrain(point) for point in points]
    mapped = torch.stack([reference.unconstrain(to_reference(value)) for value in values])
    return model.log_prob(points) - reference.log_prob(mapped)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow)
        for n in REFERENCES
        if n not in OTHER_SITES
    ],
)
def test_a_reference_has_the_density_of_its_model(name: str) -> None:
    differences = compare(name, dict)
    spread = float(differences.max() - differences.min())
    assert spread < TOLERANCE.get(name, 1e-8)


def test_a_hierarchy_that_is_not_centred_has_the_density_with_its_jacobian() -> None:
    log_scales = []

    def steps(value: dict[str, Tensor]) -> dict[str, Tensor]:
        loc, scale, alpha = value["loc"], value["scale"], value["alpha"]
        log_scales.append(scale.log())
        return {"loc": loc, "scale": scale, "steps": (alpha - loc) / scale}

    differences = compare("baseball", steps) + 18 * torch.stack(log_scales)
    assert float(differences.max() - differences.min()) < 1e-8


@pytest.mark.slow
def test_years_that_are_not_centred_have_the_density_with_its_jacobian() -> None:
    log_scales = []

    def steps(value: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: value[name] for name in ("phi_mean", "phi_sigma", "rho")}
        logits = torch.stack([value[f"phi_logit_{t}"] for t in range(6)])
        log_scales.append(kept["phi_sigma"].log())
        centred = (logits - kept["phi_mean"].logit()) / kept["phi_sigma"]
        return {**kept, "steps": centred}

    differences = compare("cjs_3", steps) + 6 * torch.stack(log_scales)
    assert float(differences.max() - differences.min()) < 1e-8


def log_integral(density: LogDensity, start: Tensor, directions: Tensor) -> Tensor:
    """The log integral along directions in which a density is Gaussian, up to a constant: there
    differences of the gradient are its curvature, and the mode is a step of Newton's away."""
    slopes = density.value_and_grad(torch.cat([start[None], start + directions]))[1] @ directions.T
    curvature = slopes[1:] - slopes[0]
    mode = start - torch.linalg.solve(curvature, slopes[0]) @ directions
    return density.log_prob(mode) - 0.5 * torch.logdet(-curvature)


def test_the_walk_of_a_forecast_is_summed_out() -> None:
    model, reference = densities("forecasting_2")
    differences = []
    for drift_scale, noise_scale in ((0.1, 0.2), (0.3, 0.2), (0.5, 0.1)):
        known = {
            "drift_scale": torch.tensor(drift_scale),
            "noise_scale": torch.tensor(noise_scale),
        }
        start = model.unconstrain({**known, "drift_decentered": torch.zeros(25)})
        ones = model.unconstrain({**known, "drift_decentered": torch.ones(25)})
        directions = torch.eye(len(start))[ones != start]
        total = log_integral(model, start, directions)
        differences.append(total - reference.log_prob(reference.unconstrain(known)))
    assert max(differences) - min(differences) < 1e-8


def test_the_bias_of_a_forecast_is_summed_into_the_levels() -> None:
    model, reference = densities("forecasting_1")
    torch.manual_seed(0)
    differences = []
    for trend in (0.5, 1.0, 2.0):
        known = {"trend": torch.tensor(trend), "noise_scale": torch.tensor(0.4)}
        levels = torch.randn(7)
        start = model.unconstrain({**known, "bias": torch.tensor(0.0), "seasonal": levels})
        moved = {"bias": torch.tensor(1.0), "seasonal": levels - 1.0}
        direction = model.unconstrain({**known, **moved}) - start
        total = log_integral(model, start, direction[None])
        levelled = reference.unconstrain({**known, "levels": levels})
        differences.append(total - reference.log_prob(levelled))
    assert max(differences) - min(differences) < 1e-8


def test_a_weighted_prior_knows_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gaussian_mixture"
    monkeypatch.setitem(REFERENCES, name, Reference(REFERENCES[name].model, prior_draws=50_000))
    found = long_run(name)
    assert found["method"] == "weighted draws of the prior"
    assert 1 < found["least_ess"] < 50_000
    # The five points are two clusters, at 0.5 and 11.
    low, high = found["moments"]["low"], found["moments"]["high"]
    assert low[0] < high[0]
