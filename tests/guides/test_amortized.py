"""Amortised guides: latents of rows, with the rows and the data that the model sees."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.nn import RowEncoder, RowSource

ROWS, PART = 20, 4


def tables(device: torch.device = torch.device("cpu")) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, ROWS, 3, generator=generator).to(device)
    return x, 1.0 + x + 0.5 * noise


def random_part(x: Tensor, y: Tensor) -> None:
    """The model draws its rows."""
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", ROWS, subsample_size=PART, device=str(x.device)) as rows:
        observe(loc, x[rows], y[rows])


def given_part(x: Tensor, y: Tensor, rows: Tensor | None = None) -> None:
    """The model is given its rows."""
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
    rows = torch.arange(PART) if rows is None else rows
    with pyro.plate("rows", ROWS, subsample=rows):
        observe(loc, x[rows], y[rows])


def batch(x: Tensor, y: Tensor) -> None:
    """The model is given the data of a batch."""
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", ROWS, subsample_size=len(x)):
        observe(loc, x, y)


def observe(loc: Tensor, x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.LogNormal(loc, 0.5))
    mean = slope.unsqueeze(-1) * x
    pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)


def step(
    model: Any, guide: Any, *args: Any, elbo: Any = None, steps: int = 2, lr: float = 1e-2
) -> list[float]:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def traces(model: Any, guide: Any, *args: Any) -> tuple[Any, Any]:
    guide_trace = poutine.trace(guide).get_trace(*args)
    replayed = poutine.replay(model, trace=guide_trace)
    return guide_trace, poutine.trace(replayed).get_trace(*args)


class Recorder(nn.Module):
    """An encoder that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, ...]] = []

    def forward(self, *rows: Tensor) -> Tensor:
        self.seen.append(rows)
        return rows[0].mean(-1, keepdim=True)


# The same rows in the model and in the guide


@pytest.mark.parametrize("encoder", [None, "rows"])
@pytest.mark.parametrize("model", [random_part, given_part, batch], ids=lambda m: m.__name__)
def test_model_and_guide_see_the_same_rows_pyro_3468(model: Any, encoder: Any) -> None:
    x, y = tables()
    args = (x[:PART], y[:PART]) if model is batch else (x, y)
    guide = pf.AutoAmortizedFlow(model, encoder)
    for _ in range(3):
        of_guide, of_model = traces(model, guide, *args)
        rows = of_guide.nodes["rows"]["value"]
        assert torch.equal(rows, of_model.nodes["rows"]["value"])
        if model is not batch:
            assert torch.equal(of_model.nodes["y"]["value"], y[rows])
        scales = {of_guide.nodes["slope"]["scale"], of_model.nodes["slope"]["scale"]}
        assert scales == {ROWS / PART}


def test_an_index_that_changes_from_step_to_step_is_followed_pyro_3468() -> None:
    x, y = tables()
    encoder = Recorder()
    guide = pf.AutoAmortizedFlow(given_part, encoder)
    for start in (0, 7, 16):
        rows = torch.arange(start, start + PART)
        of_guide, of_model = traces(given_part, guide, x, y, rows)
        assert torch.equal(of_guide.nodes["rows"]["value"], rows)
        assert torch.equal(of_model.nodes["rows"]["value"], rows)
        seen_y, seen_x = encoder.seen[-1]
        assert torch.equal(seen_y, y[rows])
        assert torch.equal(seen_x, x[rows])


def test_random_rows_change_and_are_those_that_are_encoded_pyro_3468() -> None:
    x, y = tables()
    encoder = Recorder()
    guide = pf.AutoAmortizedFlow(random_part, encoder)
    seen = set()
    for _ in range(4):
        of_guide, _ = traces(random_part, guide, x, y)
        rows = of_guide.nodes["rows"]["value"]
        assert torch.equal(encoder.seen[-1][0], y[rows])
        seen.add(tuple(rows.tolist()))
    assert len(seen) > 1


def test_a_loader_gives_each_batch_and_a_shorter_last_one() -> None:
    x, y = tables()
    encoder = Recorder()
    guide = pf.AutoAmortizedFlow(batch, encoder)
    svi = SVI(batch, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    sizes = []
    for part in DataLoader(TensorDataset(x, y), batch_size=6):
        assert math.isfinite(svi.step(*part))
        assert torch.equal(encoder.seen[-1][0], part[1])
        sizes.append(len(guide.sample(2, *part)["slope"][0]))
    assert sizes == [6, 6, 6, 2]


def in_a_list(encoder: Any, **options: Any) -> Callable[[Any], AutoGuideList]:
    def make(model: Any) -> AutoGuideList:
        guide = AutoGuideList(model, **options)
        guide.append(AutoDiagonalNormal(poutine.block(model, expose=["loc"])))
        guide.append(pf.AutoAmortizedFlow(poutine.block(model, hide=["loc"]), encoder))
        return guide

    return make


def test_a_list_of_guides_shares_its_rows_pyro_3471() -> None:
    x, y = tables()
    encoder = Recorder()
    guide = in_a_list(encoder)(random_part)
    for _ in range(3):
        of_guide, of_model = traces(random_part, guide, x, y)
        rows = of_guide.nodes["rows"]["value"]
        assert torch.equal(rows, of_model.nodes["rows"]["value"])
        assert torch.equal(encoder.seen[-1][0], y[rows])
    assert all(math.isfinite(loss) for loss in step(random_part, guide, x, y))


def test_a_list_with_rows_of_its_own_is_refused_pyro_3478() -> None:
    x, y = tables()
    guide = in_a_list(None)(given_part)
    with pytest.raises(ValueError, match="rows of plate 'rows' that the model has chosen"):
        guide(x, y, torch.arange(4, 8))


def test_create_plates_gives_a_list_the_rows_of_the_model_pyro_3468() -> None:
    x, y = tables()
    encoder = Recorder()

    def plates(x: Tensor, y: Tensor, rows: Tensor) -> Any:
        return pyro.plate("rows", ROWS, subsample=rows)

    guide = in_a_list(encoder, create_plates=plates)(given_part)
    for start in (0, 5):
        rows = torch.arange(start, start + PART)
        traces(given_part, guide, x, y, rows)
        assert torch.equal(encoder.seen[-1][0], y[rows])


# The mathematics


ELBOS = {
    "plain": lambda: Trace_ELBO(),
    "particles": lambda: Trace_ELBO(num_particles=3),
    "vectorised": lambda: Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    "mean field": lambda: TraceMeanField_ELBO(),
    "jit": lambda: JitTrace_ELBO(ignore_jit_warnings=True),
}


def gaussian(features: int, context_features: int) -> Any:
    return pf.transforms.Elementwise(pf.univariate.Affine(), features, context_features)


@pytest.mark.parametrize("encoder", [None, "rows"])
@pytest.mark.parametrize("elbo", ELBOS)
def test_every_elbo_trains_every_parameter(elbo: str, encoder: Any) -> None:
    x, y = tables()
    guide = pf.AutoAmortizedFlow(random_part, encoder, gaussian)
    guide(x, y)
    before = copy.deepcopy(guide.state_dict())
    losses = step(random_part, guide, x, y, elbo=ELBOS[elbo](), steps=4)
    assert all(math.isfinite(loss) for loss in losses)
    after = guide.state_dict()
    trained = dict(guide.named_parameters())
    still = [name for name in trained if torch.equal(before[name], after[name])]
    still.remove("flow.transform.layers.1.lower")  # a single global has nothing below a diagonal
    assert still == []


def test_the_loss_is_that_of_the_densities() -> None:
    """Auxiliary draws and point masses together have the density of the latents."""
    x, y = tables()
    guide = pf.AutoAmortizedFlow(given_part)
    rows = torch.arange(PART)
    with torch.no_grad():
        guide(x, y, rows)
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        of_guide, of_model = traces(given_part, guide, x, y, rows)
        loc, slope = of_guide.nodes["loc"]["value"], of_guide.nodes["slope"]["value"]
        block = guide.blocks[0]
        theta = loc.reshape(1)
        encoding = block.encode([y[rows], x[rows]])
        context = torch.cat([encoding, theta.expand(PART, 1)], -1)
        u = (slope.log() - loc) / 0.5
        inner = block.flow(context).log_prob(u.unsqueeze(-1))
        log_q = guide.flow().log_prob(theta) + ROWS / PART * (
            inner - math.log(0.5) - slope.log()
        ).sum()
        of_guide.compute_log_prob()
    assert float(of_guide.log_prob_sum()) == pytest.approx(float(log_q), abs=1e-3)


def test_it_reaches_a_conjugate_posterior_by_parts_of_the_rows() -> None:
    """z_i ~ N(0, 1), y_i ~ N(z_i, 1): the posterior of each is N(y_i / 2, 1 / 2)."""
    y = torch.linspace(-2.0, 2.0, ROWS)

    def model(y: Tensor, part: int | None = None) -> None:
        with pyro.plate("rows", ROWS, subsample_size=part) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    guide = pf.AutoAmortizedFlow(model, plates=["rows"])
    step(model, guide, y, ROWS // 2, elbo=ELBOS["vectorised"](), steps=200, lr=0.03)
    draws = guide.sample(2000, y)["z"]
    torch.testing.assert_close(draws.mean(0), y / 2, atol=0.15, rtol=0.0)
    torch.testing.assert_close(draws.std(0), torch.full((ROWS,), 0.5**0.5), atol=0.1, rtol=0.0)
