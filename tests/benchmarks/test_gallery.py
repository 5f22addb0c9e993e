"""The gallery of flows: its densities are what they say, and its page is made from its numbers."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow_but_for
from PIL import Image

import pyroflows as pf
from benchmarks import gallery
from benchmarks.gallery import ALL, CELLS, DENSITIES, FAMILIES, Family, data, main, page, places

PLACES = places(None)
PRESETS = {
    name
    for name in pf.__all__
    if inspect.isclass(getattr(pf, name)) and issubclass(getattr(pf, name), pf.flows.LayeredFlow)
}
#: Half-widths beyond which the densities have less than 1e-4 of their mass; funnels are wide.
WIDE = {"moons": 4.0, "gaussians": 4.0, "spiral": 4.0, "wave": math.pi}


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads(PLACES.results.read_text(encoding="utf-8"))


# The densities


@pytest.mark.parametrize("key", slow_but_for(["gaussians", "wave"], WIDE))
def test_the_densities_are_normalised_and_their_samples_are_theirs(key: str) -> None:
    density, half = ALL[key], WIDE[key]
    cells = 400
    axis = half * (2 * (torch.arange(cells) + 0.5) / cells - 1)
    points = torch.cartesian_prod(axis, axis)
    log_p = torch.cat([density.log_prob(part) for part in points.split(8192)]).double()
    mass = log_p.exp() * (2 * half / cells) ** 2
    assert abs(float(mass.sum()) - 1) < 1e-3
    entropy = -float((mass * log_p).sum())
    scores = density.log_prob(data(density, seed=1)[2]).double()
    assert (
        abs(float(scores.mean()) + entropy)
        < 4 * float(scores.std()) / math.sqrt(len(scores)) + 2e-3
    )
    mean = (mass[:, None] * points).sum(0)
    x = data(density, seed=1)[2].double()
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / math.sqrt(len(x)) + 2e-3).all()


def test_the_funnel_has_the_entropy_of_its_formula() -> None:
    x = data(ALL["funnel"], seed=1)[2]
    scores = ALL["funnel"].log_prob(x)
    # Two normals of standard deviations 1 and 0.7 exp(0.8 v), E v = 0.
    entropy = 1 + math.log(2 * math.pi) + math.log(0.7)
    assert abs(float(scores.mean()) + entropy) < 4 * float(scores.std()) / math.sqrt(len(scores))


def test_data_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    state = torch.get_rng_state()
    first, again, other = (data(ALL["wave"], seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_copies_stand_side_by_side() -> None:
    x = data(ALL["moons"], seed=0, copies=3)[1]
    assert x.shape == (gallery.VALIDATION, 6)
    assert abs(float(torch.corrcoef(x.T)[0, 2])) < 4 / math.sqrt(len(x))


# What is stored


def test_every_preset_has_its_place() -> None:
    assert {family.preset for family in FAMILIES.values()} == PRESETS


def test_all_families_are_stored_with_the_settings_of_the_code(stored: dict[str, Any]) -> None:
    settings = stored["settings"]
    assert list(stored["families"]) == list(FAMILIES)
    assert settings == gallery.settings(settings["steps"], settings["seed"])
    for name, row in stored["families"].items():
        assert tuple(row["fits"]) == FAMILIES[name].densities
        flow = FAMILIES[name].make(2)
        assert row["parameters"] == sum(p.numel() for p in flow.parameters() if p.requires_grad)
        assert row["fast"] == flow.transform.fast
        for fit in row["fits"].values():
            # Below zero by more than its error, the loss would beat the truth.
            assert fit["gap"] > -4 * fit["error"]


def test_the_truth_is_stored_as_it_is(stored: dict[str, Any]) -> None:
    truths = gallery.truths(stored["settings"]["seed"])
    assert stored["truth"] == pytest.approx(truths, abs=1e-3)


def test_the_page_is_made_from_the_numbers(stored: dict[str, Any]) -> None:
    assert PLACES.page.read_text(encoding="utf-8") == page(stored)


def test_the_page_shows_every_preset_and_every_picture() -> None:
    text = PLACES.page.read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert shown == ["gallery/truth.png", *(f"gallery/{name}.png" for name in FAMILIES)]
    assert {path.name for path in PLACES.pictures.iterdir()} == {Path(name).name for name in shown}
    for name in PRESETS:
        assert f"pf.{name}(" in text
    headings = {
        line[4:].lower().replace(",", "").replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("### ")
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings


def test_the_calls_on_the_page_run() -> None:
    for family in FAMILIES.values():
        flow = eval(family.call, {"pf": pf})
        assert type(flow).__name__ == family.preset
        assert flow.event_shape == (2,)


def test_pictures_are_small_and_not_blank() -> None:
    files = list(PLACES.pictures.iterdir())
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 60_000 and sum(sizes) < 1_200_000
    for file in files:
        with Image.open(file) as picture:
            assert picture.height == CELLS + gallery.TITLE
            assert np.asarray(picture.convert("L")).std() > 20


def test_rows_are_in_the_table_with_their_loss(stored: dict[str, Any]) -> None:
    text = page(stored)
    row = next(line for line in text.splitlines() if line.startswith("| [RealNVP]"))
    fits = stored["families"]["realnvp"]["fits"]
    for key in DENSITIES:
        assert f"{stored['truth'][key] - fits[key]['gap']:.2f} ({fits[key]['gap']:.2f})" in row


# The command, without training


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "train_flow", lambda *_: SimpleNamespace(skipped=1))
    monkeypatch.setattr(gallery, "REPEATS", (1, 1))


@pytest.mark.usefixtures("untrained")
@pytest.mark.slow
def test_parts_are_put_together_and_the_page_can_be_made_anew(tmp_path: Path) -> None:
    assert main(["--families", "nice", "--steps", "50", "--out", str(tmp_path)]) == 0
    assert main(["--families", "nsf_circular", "--steps", "50", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gallery.json").read_text(encoding="utf-8"))
    assert list(results["families"]) == ["nice", "nsf_circular"]
    assert {path.name for path in (tmp_path / "gallery").iterdir()} == {
        "truth.png",
        "nice.png",
        "nsf_circular.png",
    }
    made = (tmp_path / "gallery.md").read_text(encoding="utf-8")
    assert "4 training steps were skipped" in made
    (tmp_path / "gallery.md").write_text("")
    assert main(["--page", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == made
    # An untrained flow is the standard normal, whose loss on the funnel is known: E[x2^2] = 0.49 exp(2 * 0.8^2).
    expected = 0.5 * 0.49 * math.exp(1.28) - 0.5 - math.log(0.7)
    fit = results["families"]["nice"]["fits"]["funnel"]
    assert abs(fit["gap"] - expected) < 4 * fit["error"]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "nice,nicest"], "Expected --families to be among nice, realnvp"),
        (["--families", ""], "Expected --families to be among"),
        (["--steps", "0"], "Expected --steps to be a positive multiple of 50; got 0"),
        (["--steps", "75"], "Expected --steps to be a positive multiple of 50; got 75"),
        (["--page", "--out", "nowhere"], "Expected stored numbers in"),
        (["--families", "nice", "--seed", "7"], "Write to another folder with --out"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = PLACES.results.read_bytes()
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert PLACES.results.read_bytes() == before


def test_a_flow_is_the_same_for_the_same_seed() -> None:
    family: Family = FAMILIES["maf"]
    first, again = (gallery.fresh(family, 3, seed=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
