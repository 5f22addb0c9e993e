"""Where a model starts: elsewhere if it fails there, and with a value for each row of a plate."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import LocScaleReparam, TransformReparam

from pyroflows.guides import AutoFlow
from pyroflows.model import LogDensity
from pyroflows.model.explanation import explain


def of_wide_scales() -> None:
    """Fails at the median of its prior."""
    x = pyro.sample("x", dist.Normal(3.0, 0.5))
    torch.linalg.cholesky(torch.eye(2) * (2.0 - x))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))


def test_a_model_that_fails_at_its_start_starts_elsewhere() -> None:
    before = torch.get_rng_state()
    density = LogDensity(of_wide_scales)
    assert float(density.initial) < 2
    assert density.mode == "captured"
    assert bool(density.evaluate(density.initial).usable)
    guide = AutoFlow(of_wide_scales, init_loc_fn=density.init_loc_fn)
    density.introduce(guide)
    assert guide.features == 1
    torch.set_rng_state(before)
    assert torch.equal(LogDensity(of_wide_scales).initial, density.initial)


def test_a_start_that_works_is_kept() -> None:
    start = init_to_value(values={"x": torch.tensor(1.5)})
    density = LogDensity(of_wide_scales, init_loc_fn=start)
    assert float(density.initial) == 1.5
    assert density.init_loc_fn is start


def test_a_model_that_fails_everywhere_is_told_in_one_sentence() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        torch.linalg.cholesky(-torch.eye(2) * (1 + x**2))

    with pytest.raises(ValueError, match=r"got LinAlgError \(.*\) after site 'x'") as told:
        LogDensity(model)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("z", "sentence"),
    [
        (3.0, "LinAlgError (linalg.cholesky: The factorization could not be completed"),
        (torch.nan, "at site 'y' gives nan"),
    ],
)
def test_what_fails_at_a_point_and_where(z: float, sentence: str) -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if not bool(x.isnan()):
            torch.linalg.cholesky(torch.eye(2) * (2.0 - x))
        pyro.sample("y", dist.Normal(x, 1.0, validate_args=False), obs=torch.tensor(0.0))

    density = LogDensity(model)
    assert sentence.removeprefix("at ") in explain(density, torch.tensor([z]))


@pytest.mark.parametrize("centered", [0.0, 0.5, None])
@pytest.mark.parametrize("inside", [True, False])
def test_a_reparametrised_site_in_a_plate_has_a_value_for_each_row(
    centered: float | None, inside: bool
) -> None:
    check_rows("th_decentered", LocScaleReparam(centered), inside, dist.Normal)


def test_a_transformed_site_in_a_plate() -> None:
    check_rows("th_base", TransformReparam(), True, dist.LogNormal)


def check_rows(name: str, reparam: Any, inside: bool, family: Any) -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("n", 8), poutine.reparam(config={"th": reparam} if inside else {}):
            th = pyro.sample("th", family(0.0, scale))
        with pyro.plate("m", 8):
            pyro.sample("y", dist.Normal(th, 1.0), obs=torch.ones(8))

    given = model if inside else poutine.reparam(model, config={"th": reparam})
    density = LogDensity(given)
    assert {site.name: tuple(site.shape) for site in density.sites}[name] == (8,)
    guide = AutoFlow(given)
    density.introduce(guide)
    assert guide.features == density.features == 9
