"""Kinds of latent sites, entries that a mask switches off, and the terms of each site."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import test_enumeration
import test_log_density
import torch
from pyro import poutine
from torch import Tensor

from pyroflows._archive import read_archive, write_archive
from pyroflows.guides import AutoFlow
from pyroflows.model import LogDensity
from pyroflows.model.sites import SiteKind

KINDS: dict[str, tuple[Callable[[], Any], SiteKind]] = {
    "von Mises": (lambda: dist.VonMises(0.0, 1.0), SiteKind.CIRCLE),
    "in an event": (lambda: dist.VonMises(torch.zeros(2), 1.0).to_event(1), SiteKind.CIRCLE),
    "expanded": (lambda: dist.VonMises(0.0, 1.0).expand([2]).to_event(1), SiteKind.CIRCLE),
    "masked": (lambda: dist.VonMises(0.0, 1.0).mask(True), SiteKind.CIRCLE),
    "two angles": (
        lambda: dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, correlation=0.5),
        SiteKind.CIRCLE,
    ),
    "skewed": (
        lambda: dist.SineSkewed(
            dist.VonMises(torch.zeros(2), 1.0).to_event(1), torch.tensor([0.3, -0.1])
        ),
        SiteKind.CIRCLE,
    ),
    "normal": (lambda: dist.Normal(0.0, 1.0), SiteKind.REAL),
    "simplex": (lambda: dist.Dirichlet(torch.ones(3)), SiteKind.REAL),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:This model cannot be evaluated for a batch")
def test_sites_know_their_kind(name: str) -> None:
    make, kind = KINDS[name]
    (site,) = LogDensity(lambda: pyro.sample("x", make())).sites
    assert site.kind is kind


SEEN = torch.tensor([True, False, True])


def masked_handler() -> None:
    with pyro.plate("n", 3), poutine.mask(mask=SEEN):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def masked_distribution() -> None:
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(SEEN))


def masked_inside() -> None:
    with pyro.plate("n", 3):
        entries = dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False]))
        pyro.sample("x", entries.to_event(1))


def masked_everywhere() -> None:
    with pyro.plate("n", 3), poutine.mask(mask=False):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def not_masked() -> None:
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


ROWS = SEEN.unsqueeze(-1).expand(3, 2)


@pytest.mark.parametrize(
    ("model", "active"),
    [
        (masked_handler, ROWS),
        (masked_distribution, ROWS),
        (masked_inside, torch.tensor([True, False]).expand(3, 2)),
        (not_masked, torch.ones(3, 2).bool()),
    ],
)
def test_sites_know_the_entries_that_a_mask_switches_off(
    model: Callable[[], None], active: Tensor
) -> None:
    density = LogDensity(model)
    (site,) = density.sites
    assert torch.equal(site.active, active)
    assert density.features == site.features == int(active.sum())
    z = torch.randn(4, density.features, generator=torch.Generator().manual_seed(0))
    # The density is that of the others alone, and they stand where they stood.
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(density.log_prob(z), expected)
    values = density.constrain(z)["x"]
    torch.testing.assert_close(values[:, active], z)
    assert not bool(values[:, ~active].any())
    assert torch.equal(density.unconstrain({"x": values}), z)
    assert site.blank(values).isnan().any(0).equal(~active)


def test_a_model_in_which_all_is_masked_has_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match=r"got only masked ones \('x'\)"):
        LogDensity(masked_everywhere)


def test_values_imputed_by_obs_mask_have_no_density_where_they_are_observed() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.ones(3), obs_mask=SEEN)

    sites = {site.name: site.active for site in LogDensity(model).sites}
    assert torch.equal(sites["x_unobserved"], ~SEEN)
    assert bool(sites["mean"])


def simplices() -> None:
    with pyro.plate("n", 3), poutine.mask(mask=SEEN):
        pyro.sample("w", dist.Dirichlet(torch.ones(4)))


def test_whole_events_are_switched_off() -> None:
    density = LogDensity(simplices)
    (site,) = density.sites
    assert (density.features, site.indices[3:]) == (6, [(2, 0), (2, 1), (2, 2)])
    z = torch.randn(6, generator=torch.Generator().manual_seed(0))
    of_one = LogDensity(lambda: pyro.sample("w", dist.Dirichlet(torch.ones(4))))
    torch.testing.assert_close(density.log_prob(z), of_one.log_prob(z.reshape(2, 3)).sum())
    terms = density.site_terms(z)["w"]
    torch.testing.assert_close(terms.sum(), density.log_prob(z))
    assert terms.shape == (3,)
    assert float(terms[1]) == 0


def padded(steps: int = 3) -> None:
    lengths, z = torch.tensor([3, 1]), 0.0
    with pyro.plate("sequences", 2):
        for t in range(steps):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=torch.ones(2))


def test_padded_sequences() -> None:
    density = LogDensity(padded)
    assert [site.features for site in density.sites] == [2, 1, 1]


def flat_prior() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, False])))
    pyro.sample("y", dist.Normal(x[..., 1], 1.0), obs=torch.tensor(3.0))


def step_of_a_masked_site() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("y", dist.Normal((x > 0.2).float(), 1.0), obs=torch.tensor(0.0))


def mask_of_another_site() -> None:
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0).mask(g > 0))


@pytest.mark.parametrize(
    ("model", "features"),
    [(flat_prior, 2), (step_of_a_masked_site, 1), (mask_of_another_site, 2)],
)
def test_a_masked_entry_that_the_model_needs_is_active(
    model: Callable[[], None], features: int
) -> None:
    assert LogDensity(model).features == features


def test_a_density_is_not_bound_to_data_that_need_a_masked_entry() -> None:
    def model(seen: Tensor) -> None:
        with pyro.plate("n", 3), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    density = LogDensity(model, (SEEN,))
    assert density.bind((SEEN.clone(),)).features == 2
    with pytest.raises(ValueError, match="'x' has entries that a mask switched off"):
        density.bind((~SEEN,))


# Terms


@pytest.fixture
def float64() -> None:
    torch.set_default_dtype(torch.float64)


def check_sum(density: LogDensity) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 3, density.features, generator=generator)
    z = density.initial + 0.5 * noise.to(density.initial)
    terms = density.site_terms(z)
    assert all(term.shape[:2] == (2, 3) for term in terms.values())
    total = sum(term.reshape(2, 3, -1).sum(-1) for term in terms.values())
    torch.testing.assert_close(total, density.log_prob(z))
    return terms


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", sorted(test_log_density.CASES))
def test_the_terms_add_up_to_the_log_density(name: str) -> None:
    check_sum(test_log_density.double(name))


def shapes(model: Callable[..., Any]) -> dict[str, tuple[int, ...]]:
    terms = check_sum(LogDensity(model))
    return {name: tuple(term.shape[2:]) for name, term in terms.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            test_log_density.CASES["nested_plates"](),
            {"scale": (), "a": (3, 1), "b": (2,), "c": (3, 2), "y": (3, 2)},
        ),
        (test_log_density.CASES["cholesky"](), {"scales": (), "root": (), "y": (4,)}),
        (test_log_density.CASES["masks"](), {"x": (), "y": (3,), "w": (3,)}),
        # Discrete sites: each group has one term, in the plates that all of it is in.
        (test_enumeration.mixture, {"weights": (), "locs": (), "k": (6,)}),
        (test_enumeration.coin_outside, {"x": (), "coin": ()}),
        (test_enumeration.nested_plates, {"x": (), "group": (3,)}),
        (test_enumeration.chain, {"x": (), "a": ()}),
        (test_enumeration.masked_and_scaled, {"x": (), "k": (6,)}),
        (test_enumeration.hmm_in_a_plate, {"stay": (), "state_0": (3,)}),
    ],
)
def test_the_terms_keep_the_plates_of_their_sites(
    model: Callable[..., Any], expected: dict[str, tuple[int, ...]]
) -> None:
    assert shapes(model) == expected


@pytest.mark.usefixtures("float64")
def test_terms_by_hand() -> None:
    y = torch.tensor([0.5, -1.0])

    def model() -> None:
        with pyro.plate("n", 2), poutine.scale(scale=3.0):
            s = pyro.sample("s", dist.Exponential(2.0))
            pyro.sample("y", dist.Normal(0.0, s), obs=y)

    z = torch.tensor([0.3, -0.7])
    terms = LogDensity(model).site_terms(z)
    # The scale acts on the log density, not on the Jacobian of the map from the reals.
    torch.testing.assert_close(terms["s"], 3 * (math.log(2.0) - 2 * z.exp()) + z)
    torch.testing.assert_close(terms["y"], 3 * dist.Normal(0.0, z.exp()).log_prob(y))


@pytest.mark.usefixtures("float64")
def test_two_groups_of_discrete_sites_have_two_terms() -> None:
    y = torch.tensor([0.2, 1.4, -0.6])

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(x + k, 1.0), obs=y.expand(2, 3))
        j = pyro.sample("j", dist.Bernoulli(0.6))
        pyro.sample("w", dist.Normal(x - j, 1.0), obs=torch.tensor(0.1))

    assert shapes(model) == {"x": (), "k": (2, 3), "j": ()}
    terms = LogDensity(model).site_terms(torch.tensor([0.4]))
    coin = torch.tensor([0.0, 1.0])
    of_k = dist.Bernoulli(0.3).log_prob(coin) + dist.Normal(0.4 + coin, 1.0).log_prob(y[:, None])
    of_j = dist.Bernoulli(0.6).log_prob(coin) + dist.Normal(0.4 - coin, 1.0).log_prob(
        torch.tensor(0.1)
    )
    torch.testing.assert_close(terms["k"], of_k.logsumexp(-1).expand(2, 3))
    torch.testing.assert_close(terms["j"], of_j.logsumexp(-1))


@pytest.mark.usefixtures("float64")
def test_rows_of_a_subsampled_plate_are_scaled_up() -> None:
    y = torch.linspace(-1, 1, 6)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 6, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])

    density = LogDensity(model)
    rows = torch.tensor([4, 1])
    all_rows = check_sum(density)["y"]
    some = check_sum(density.bind(rows={"n": rows}))["y"]
    assert all_rows.shape == (2, 3, 6)
    torch.testing.assert_close(some, 3 * all_rows[..., rows])


def test_terms_of_no_points_and_of_a_model_that_is_looped_over() -> None:
    density = LogDensity(test_log_density.CASES["nested_plates"]())
    assert density.site_terms(torch.zeros(0, density.features))["y"].shape == (0, 3, 2)
    with pytest.warns(UserWarning, match="one point at a time"):
        looped = LogDensity(test_log_density.reads_a_value)
    assert {n: tuple(t.shape) for n, t in looped.site_terms(torch.zeros(4, 1)).items()} == {
        "x": (4,),
        "y": (4,),
    }


# Sites without a density here


def half(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float16)


def point_mass() -> None:
    with pyro.plate("n", 2):
        pyro.sample("x", dist.Delta(torch.ones(2)))
    pyro.sample("u", dist.Normal(0.0, 1.0))


def in_half_precision() -> None:
    pyro.sample("x", dist.Normal(half(0.0), half(1.0)))


def direction() -> None:
    pyro.sample("x", dist.ProjectedNormal(torch.ones(3)))


def mixture() -> None:
    components = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), components))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (point_mass, "got 'x' with Delta, which has none. Write it as pyro.deterministic"),
        (in_half_precision, "of dtype float32 or float64; got 'x' of dtype float16."),
        (direction, "ProjectedNormalReparam"),
        (mixture, "got 'x' with MixtureSameFamily. Draw the component from a Categorical site"),
    ],
)
def test_sites_without_a_density_are_refused_with_advice(model: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        LogDensity(model)
    guide = AutoFlow(model)
    with pytest.raises(ValueError, match="'x'"):
        guide()


# Names


class Name(str):
    """Stands for the names of other libraries."""


class Names(str, enum.Enum):
    X = "x"
    Y = "y"
    ROWS = "rows"
    MEAN = "mean"


@pytest.mark.parametrize("make", [np.str_, Name, Names])
def test_names_of_other_types_are_strings(make: Any, tmp_path: Path) -> None:
    def model() -> None:
        mean = pyro.param(make("mean"), torch.tensor(0.0).requires_grad_(False))
        with pyro.plate(make("rows"), 2):
            x = pyro.sample(make("x"), dist.Normal(mean, 1.0))
            pyro.sample(make("y"), dist.Normal(x, 1.0), obs=torch.zeros(2))

    density = LogDensity(model)
    (site,) = density.sites
    assert [type(name) for name in (site.name, *site.plates, *density.observed)] == 3 * [str]
    path = str(tmp_path / "names.pt")
    write_archive({make("x"): [make("y")]}, path)
    assert read_archive(path) == {"x": ["y"]}
