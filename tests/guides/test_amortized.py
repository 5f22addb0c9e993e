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
from pyroflows.train import objectives

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


SLOW = pytest.param("jit", marks=pytest.mark.slow)


@pytest.mark.parametrize("encoder", [None, "rows"])
@pytest.mark.parametrize("elbo", [*[name for name in ELBOS if name != "jit"], SLOW])
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
        of_guide, _ = traces(given_part, guide, x, y, rows)
        loc, slope = of_guide.nodes["loc"]["value"], of_guide.nodes["slope"]["value"]
        block = guide.blocks[0]
        whitened, _ = guide.flow.whitening.inverse_and_log_det(loc.reshape(1))
        encoding = block.encode([y[rows], x[rows]])
        context = torch.cat([encoding, whitened.expand(PART, 1)], -1)
        share = block.centring(encoding).squeeze(-1)
        middle = guide.flow.whitening.loc[0]
        scale = 0.5  # of the prior, at the globals and in their middle
        u = (slope.log() - middle - (1 - share) * (loc - middle)) / scale
        inner = block.flow(context).log_prob(u.unsqueeze(-1))
        of_rows = (inner - math.log(scale) - slope.log()).sum()
        log_q = guide.flow().log_prob(loc.reshape(1)) + ROWS / PART * of_rows
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
    step(model, guide, y, ROWS // 2, elbo=ELBOS["vectorised"](), steps=150, lr=0.01)
    draws = guide.sample(4000, y)["z"]
    torch.testing.assert_close(draws.mean(0), y / 2, atol=0.12, rtol=0.0)
    torch.testing.assert_close(draws.std(0), torch.full((ROWS,), 0.5**0.5), atol=0.05, rtol=0.0)


BOUNDS: list[Any] = [
    (Trace_ELBO, 5),
    (objectives.PathELBO, 5),
    (objectives.ImportanceWeightedBound, ROWS),
]


@pytest.mark.parametrize(("loss", "part"), BOUNDS)
def test_at_the_posterior_no_noise_reaches_the_flow_of_the_rows(loss: Any, part: int) -> None:
    """There each draw's path gradient is zero, whichever rows are seen."""
    y = torch.linspace(-2.0, 2.0, ROWS).double()

    def model(y: Tensor) -> None:
        with pyro.plate("rows", ROWS, subsample_size=part) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    guide = pf.AutoAmortizedFlow(
        model, lambda y: y.unsqueeze(-1), gaussian, data=lambda y: y.requires_grad_(False)
    )
    guide(y)
    head = guide.blocks[0].flow.transform.layers[-1]
    with torch.no_grad():
        # The log-scale and the shift of N(y / 2, 1 / 2).
        bound = 6.0
        raw = bound * math.atanh(-0.5 * math.log(2.0) / bound)
        head.conditioner.start_at(torch.tensor([raw, 0.0], dtype=y.dtype))
        head.conditioner.linear.weight[1] = 0.5
    loss(num_particles=3).loss_and_grads(model, guide, y)
    largest = [float(p.grad.abs().max()) for p in guide.blocks[0].flow.parameters()]
    assert max(largest) < 1e-9


# Rows of every shape


def nested(y: Tensor, rows: Tensor) -> None:
    """Groups in the second dimension from the right, with observations and a site in each."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    with pyro.plate("groups", ROWS, subsample=rows, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, scale[..., 0]))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("seasons", 4, dim=-1):
            b = pyro.sample("b", dist.Exponential(scale[..., 1]))
            mean = a + b + w[..., 0]
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


@pytest.mark.parametrize("encoder", [None, "rows"])
@pytest.mark.parametrize("elbo", ["plain", "vectorised"])
def test_nested_plates_and_every_support(elbo: str, encoder: Any) -> None:
    y, rows = torch.randn(ROWS, 4), torch.tensor([3, 0, 11])
    guide = pf.AutoAmortizedFlow(nested, encoder)
    made = Trace_ELBO(**({} if elbo == "plain" else VECTORISED))
    assert all(math.isfinite(loss) for loss in step(nested, guide, y, rows, elbo=made))
    draws = guide.sample(6, y, rows)
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"scale": (6, 2), "a": (6, 3, 1), "w": (6, 3, 1, 3), "b": (6, 3, 4)}
    assert bool((draws["b"] > 0).all())
    torch.testing.assert_close(draws["w"].sum(-1), torch.ones(6, 3, 1))


VECTORISED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}


def test_the_parts_of_one_row_are_not_mixed_with_those_of_another() -> None:
    """Without a context each row's draws follow its own encoding alone."""
    y, rows = torch.randn(ROWS, 4), torch.tensor([3, 0, 11])
    guide = pf.AutoAmortizedFlow(nested, "rows")
    guide(y, rows)
    table = guide.blocks[0].encoder.network.values
    with torch.no_grad():
        # log-scales, then shifts, of a, w (two entries) and b (four)
        table[0, 7] = 50.0
        table[11, 10:] = torch.tensor([3.0, 4.0, 5.0, 6.0])
        table[:, :7] = -5.0
        guide.flow.whitening.set(torch.zeros(2), 1e-3 * torch.eye(2))
    draws = guide.sample(200, y, rows)
    assert draws["a"].mean(0).squeeze().tolist() == pytest.approx([0.0, 50.0, 0.0], abs=0.3)
    middle = draws["b"].log().mean(0)
    expected = torch.zeros(3, 4)
    expected[2] = torch.tensor([3.0, 4.0, 5.0, 6.0])
    torch.testing.assert_close(middle, expected, atol=0.1, rtol=0.0)


def test_two_plates_of_rows_each_have_an_encoder() -> None:
    y = torch.randn(6, 8)

    def model(y: Tensor) -> None:
        users = pyro.plate("users", 6, subsample_size=3, dim=-2)
        items = pyro.plate("items", 8, subsample_size=4, dim=-1)
        with users as of_users:
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with items as of_items:
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with users, items:
            seen = y[of_users][:, of_items]
            pyro.sample("y", dist.Normal(u + v, 1.0), obs=seen)

    guide = pf.AutoAmortizedFlow(model)
    assert all(math.isfinite(loss) for loss in step(model, guide, y))
    assert [block.plate for block in guide.blocks] == ["users", "items"]
    shapes = {name: tuple(value.shape) for name, value in guide.sample(2, y).items()}
    assert shapes == {"u": (2, 3, 1), "v": (2, 4)}


def test_missing_entries_do_not_reach_the_encoder() -> None:
    y = torch.randn(ROWS, 4)
    seen = torch.rand(ROWS, 4) < 0.6

    def model(y: Tensor, seen: Tensor) -> None:
        with pyro.plate("groups", ROWS, subsample_size=PART, dim=-2) as rows:
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("weeks", 4, dim=-1), poutine.mask(mask=seen[rows]):
                pyro.sample("y", dist.Normal(a, 1.0), obs=y[rows])

    guide = pf.AutoAmortizedFlow(model)
    pyro.set_rng_seed(1)
    guide(y, seen)
    pyro.set_rng_seed(2)
    expected = guide(y, seen)["a"]
    pyro.set_rng_seed(2)
    other = y.where(seen, 1e3)
    assert torch.equal(guide(other, seen)["a"], expected)


def test_observations_are_exchangeable_and_a_series_is_not() -> None:
    y = torch.randn(5, 7, 2)
    cloud = RowEncoder([RowSource("y", y.shape[1:], exchangeable=1)])
    torch.testing.assert_close(cloud(y), cloud(y.flip(1)), atol=1e-5, rtol=0.0)
    series = RowEncoder([RowSource("y", y.shape[1:], series=True)])
    assert not torch.allclose(series(y), series(y.flip(1)), atol=1e-3)
    joint = RowEncoder([RowSource("x", torch.Size([7]), 1), RowSource("y", y.shape[1:], 1)])
    x = torch.randn(5, 7)
    torch.testing.assert_close(joint(x, y), joint(x.flip(1), y.flip(1)), atol=1e-5, rtol=0.0)
    assert not torch.allclose(joint(x, y), joint(x.flip(1), y), atol=1e-4)


def test_a_mask_leaves_its_entries_out_of_a_set() -> None:
    shape = torch.Size([7])
    encoder = RowEncoder([RowSource("y", shape, 1), RowSource("y", shape, 1, mask=True)])
    y, mask = torch.randn(5, 7), torch.ones(5, 7)
    mask[:, 4:] = 0.0
    other = y.clone()
    other[:, 4:] = 9.0
    torch.testing.assert_close(encoder(y, mask), encoder(other, mask))


def series_model(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = z.unsqueeze(-2) + torch.zeros(5, 2)
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(2), obs=y)


def test_a_series_is_encoded_and_new_rows_are_predicted() -> None:
    y = torch.randn(8, 5, 2)
    guide = pf.AutoAmortizedFlow(series_model)
    assert all(math.isfinite(loss) for loss in step(series_model, guide, y))
    assert guide.blocks[0].encoder.network.sources[0].series
    new = torch.randn(3, 5, 2)
    predictive = Predictive(series_model, guide=guide, num_samples=6, parallel=True)
    assert predictive(new)["z"].shape == (6, 3, 2)


def test_rows_without_data_are_left_to_the_prior() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 0.1))
            pyro.sample("y", dist.Normal(z * x, 0.5), obs=y)

    x, y = torch.randn(2, 10)
    guide = pf.AutoAmortizedFlow(model)
    step(model, guide, x, y)
    new = torch.ones(4)
    found = Predictive(model, guide=guide, num_samples=50, parallel=True)(new)
    assert found["y"].shape == found["z"].shape == (50, 4)
    spread = (found["z"] - found["loc"]).std()
    assert float(spread) == pytest.approx(0.1, abs=0.02)


# Saving, copying, precision


@pytest.mark.parametrize("encoder", [None, "rows"])
def test_a_state_and_a_copy_restore_the_guide(encoder: Any) -> None:
    x, y = tables()
    guide = pf.AutoAmortizedFlow(random_part, encoder)
    step(random_part, guide, x, y)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    restored = pf.AutoAmortizedFlow(random_part, encoder)
    restored.load_state_dict(torch.load(file))  # before its first call
    restored(x, y)
    expected = draw(guide, x, y)
    assert torch.equal(draw(restored, x, y), expected)
    assert torch.equal(draw(copy.deepcopy(guide), x, y), expected)


def draw(guide: Any, *args: Any) -> Tensor:
    pyro.set_rng_seed(5)
    value: Tensor = guide(*args)["slope"]
    return value


def test_a_second_guide_trains_its_own_parameters() -> None:
    x, y = tables()
    for _ in range(2):
        guide = pf.AutoAmortizedFlow(random_part)
        guide(x, y)
        before = copy.deepcopy(guide.state_dict())
        step(random_part, guide, x, y)
        name = "rows_0.encoder.network.joint.0.weight"
        assert not torch.equal(before[name], guide.state_dict()[name])


def test_it_follows_the_precision_and_the_device_of_the_model(device: torch.device) -> None:
    x, y = (value.double() for value in tables(device))
    guide = pf.AutoAmortizedFlow(random_part)
    values = guide(x, y)
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert {value.device.type for value in values.values()} == {device.type}


def test_covariates_are_read_and_an_index_is_not() -> None:
    x, y = tables()
    encoder = Recorder()
    guide = pf.AutoAmortizedFlow(given_part, encoder)
    guide(x, y, torch.arange(PART))
    assert [tuple(each.shape) for each in encoder.seen[0]] == [(PART, 3), (PART, 3)]


# Refusals


def discrete(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def no_rows(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def unseen(y: Tensor) -> None:
    with pyro.plate("rows", 10, subsample_size=5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y[0])


def out_of_range(y: Tensor) -> None:
    rows = torch.tensor([0, 10])
    with pyro.plate("rows", 10, subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[:2])


def masked(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(y > 0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def twice(y: Tensor) -> None:
    with (
        pyro.plate("rows", 10, subsample_size=5, dim=-1),
        pyro.plate("columns", 10, subsample_size=5, dim=-2),
    ):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def plain(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a discrete latent": (discrete, {}, ValueError, "got the discrete 'k'. Enumerate it"),
    "no latent of rows": (no_rows, {}, ValueError, "Use AutoFlow for this model"),
    "no data of rows": (unseen, {}, ValueError, "observed site in plate 'rows'"),
    "a row out of range": (out_of_range, {}, ValueError, "between 0 and 9; got 10."),
    "a masked latent": (masked, {}, ValueError, "without masks; got 'z'"),
    "two subsampled plates": (twice, {}, ValueError, "one subsampled plate at most"),
    "an unknown plate": (plain, {"plates": ["cells"]}, ValueError, "got 'cells' without."),
    "a word as plates": (plain, {"plates": "rows"}, TypeError, "Expected plates to be a seq"),
    "a word as encoder": (plain, {"encoder": "row"}, TypeError, "a module, 'rows' or None"),
    "an encoder of other inputs": (
        plain,
        {"encoder": nn.Linear(3, 2)},
        TypeError,
        r"rows of plate 'rows', of shape \(10,\); got Linear, which raises RuntimeError",
    ),
    "an encoder of one encoding": (
        plain,
        {"encoder": lambda y: torch.zeros(5)},
        ValueError,
        r"give \(10, features\) for 10 rows of plate 'rows'; got \(5,\)",
    ),
    "data of other rows": (
        plain,
        {"data": lambda y: y[:7]},
        ValueError,
        r"data\(\*args, \*\*kwargs\) with a row for each of the 10 of plate 'rows'",
    ),
    "a flow without context": (
        plain,
        {"flow": lambda n, c: pf.MAF(n)},
        ValueError,
        "features=1 and context_features=32",
    ),
    "a flow of one argument": (
        plain,
        {"flow": lambda n: pf.MAF(n)},
        TypeError,
        r"called with \(features, context_features\)",
    ),
    "a made flow": (plain, {"flow": pf.MAF(1)}, TypeError, "not a made MAF"),
    "a number as model": (3, {}, TypeError, "model to be a callable with Pyro statements; got 3"),
    "a number as start": (plain, {"init_loc_fn": 3}, TypeError, "init_loc_fn to be a function"),
    "a number as plates": (plain, {"create_plates": 3}, TypeError, "create_plates to be a funct"),
    "an encoder of no plate": (
        plain,
        {"encoder": {"cells": None}},
        ValueError,
        "by the plates of rows, 'rows'; got 'cells'",
    ),
    "an encoder of whole numbers": (
        plain,
        {"encoder": lambda y: y.long().unsqueeze(-1)},
        ValueError,
        r"got \(10, 1\) of torch.int64",
    ),
    "encodings that are not finite": (
        plain,
        {"encoder": lambda y: y.unsqueeze(-1) * torch.nan},
        ValueError,
        "finite encodings of the rows of plate 'rows'",
    ),
    "a negative scale": (plain, {"init_scale": -1.0}, ValueError, "init_scale to be positive"),
}


def make_and_call(model: Any, options: dict[str, Any], y: Tensor) -> None:
    pf.AutoAmortizedFlow(model, **options)(y)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_sentence(case: str) -> None:
    model, options, error, match = REFUSED[case]
    y = torch.randn(10)
    with pytest.raises(error, match=match):
        make_and_call(model, options, y)


@pytest.mark.parametrize(
    "options",
    [{"encoder": lambda y: y.double().unsqueeze(-1)}, {"data": lambda y: y.double()}],
)
def test_encodings_and_data_may_be_of_double_precision(options: dict[str, Any]) -> None:
    guide = pf.AutoAmortizedFlow(plain, **options)
    assert guide(torch.randn(10))["z"].dtype == torch.float32


def test_a_guide_that_refused_a_model_refuses_it_again() -> None:
    guide = pf.AutoAmortizedFlow(no_rows)
    for _ in range(2):
        with pytest.raises(ValueError, match="Use AutoFlow for this model"):
            guide(torch.randn(10))


def test_rows_beyond_those_of_the_first_call_have_no_parameters() -> None:
    guide = pf.AutoAmortizedFlow(plain, "rows")
    guide(torch.randn(10))
    with pytest.raises(ValueError, match="rows of plate 'rows' between 0 and 9; got 11"):
        guide(torch.randn(12))


def test_a_pickle_holds_no_model() -> None:
    guide = pf.AutoAmortizedFlow(plain)
    guide(torch.randn(10))
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match="pickles hold no model"):
        loaded(torch.randn(10))


def test_an_improper_prior_needs_no_draw() -> None:
    def model(y: Tensor) -> None:
        flat = dist.ImproperUniform(constraints.positive, (), ())
        scale = pyro.sample("scale", flat)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(10)
    guide = pf.AutoAmortizedFlow(model)
    assert all(math.isfinite(loss) for loss in step(model, guide, y))
