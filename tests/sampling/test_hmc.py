"""Hamiltonian Monte Carlo for many chains: the integrator, its exactness, and what it does where densities end."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.sampling.hamiltonian import evaluate, hmc, integrate, latent_target


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * x.square().sum(-1), -x


def gumbel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The density of the logarithm of an exponential variable: skewed, steep on one side."""
    return (x - x.exp()).sum(-1), 1 - x.exp()


def half_normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """A normal whose first entry is positive; elsewhere NaN."""
    outside = x[:, 0] < 0
    return (-0.5 * x.square().sum(-1)).masked_fill(outside, math.nan), (-x).masked_fill(
        outside.unsqueeze(-1), math.nan
    )


def gumbel_draws(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64).exponential_().log()


def phase_point(seed: int = 0, chains: int = 6, features: int = 3) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(seed)
    start = evaluate(gumbel, torch.randn(chains, features, dtype=torch.float64))
    return (
        start,
        torch.randn(chains, features, dtype=torch.float64),
        0.1 + 0.2 * torch.rand(chains, 1, dtype=torch.float64),
    )


def energy(point: Any, momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1) - point.log_density


def test_integrator_runs_back() -> None:
    start, momentum, size = phase_point()
    end, at_end = integrate(gumbel, start, momentum, size, 7)
    back, at_start = integrate(gumbel, end, -at_end, size, 7)
    torch.testing.assert_close(back.position, start.position, rtol=0, atol=1e-12)
    torch.testing.assert_close(at_start, -momentum, rtol=0, atol=1e-12)


def test_integrator_keeps_volume() -> None:
    start, momentum, size = phase_point(chains=1, features=2)

    def step(phase: Tensor) -> Tensor:
        end, at_end = integrate(gumbel, evaluate(gumbel, phase[:1]), phase[1:], size, 5)
        return torch.cat([end.position, at_end])

    phase = torch.cat([start.position, momentum])
    jacobian = torch.autograd.functional.jacobian(step, phase).reshape(4, 4)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-12)


def test_integrator_is_of_second_order() -> None:
    start, momentum, _ = phase_point()
    errors = []
    for steps in (16, 32):
        size = torch.full((6, 1), 1.6 / steps, dtype=torch.float64)
        errors.append(
            energy(*integrate(gumbel, start, momentum, size, steps)) - energy(start, momentum)
        )
    torch.testing.assert_close(
        errors[0] / errors[1], torch.full((6,), 4.0, dtype=torch.float64), rtol=0.1, atol=0
    )


def test_detailed_balance() -> None:
    """Pairs of successive draws are exchangeable: E f(x) g(x') = E g(x) f(x'), for a step that rejects often."""
    torch.manual_seed(0)
    start = gumbel_draws(40_000, 1)
    result = hmc(gumbel, start, 1, step_size=1.6, adapt=False)
    assert 0.4 < result.acceptance < 0.9
    x, y = start[:, 0], result.position[:, 0]
    for f in (
        x.square() * y - x * y.square(),
        x.exp() * y - x * y.exp(),
        x - y,
        x.square() - y.square(),
    ):
        assert abs(float(f.mean())) < 4 * float(f.std()) / math.sqrt(len(f))


@pytest.mark.parametrize("features", [1, 2, 30])
def test_moments_of_a_normal(features: int) -> None:
    """From a start far off; 4000 chains know a mean to 0.016 and a variance to 0.022."""
    torch.manual_seed(1)
    start = 3 + 2 * torch.randn(4000, features, dtype=torch.float64)
    result = hmc(normal, start, 20)
    tail = 4 + math.log10(features)
    assert float(result.position.mean(0).abs().max()) < tail / math.sqrt(4000)
    assert float((result.position.var(0) - 1).abs().max()) < tail * math.sqrt(2 / 4000)
    assert result.acceptance == pytest.approx(0.8, abs=0.06)
    assert result.divergences == 0


def test_no_orbit_of_a_normal_closes() -> None:
    torch.manual_seed(0)
    start = torch.full((2000, 1), 3.0, dtype=torch.float64)
    for length in (math.pi, 2 * math.pi):
        end = hmc(
            normal, start, 8, path_length=length, step_size=0.2, adapt=False, leapfrog=100
        ).position
        assert abs(float(end.mean())) < 4 / math.sqrt(2000)


@pytest.mark.parametrize("size", [1e-3, 50.0])
@pytest.mark.parametrize("chains", [4, 500])
def test_step_size_is_found(size: float, chains: int) -> None:
    torch.manual_seed(0)
    start = torch.randn(chains, 10, dtype=torch.float64)
    found = hmc(normal, start, 60, step_size=size).step_size
    again = hmc(
        normal, torch.randn(1000, 10, dtype=torch.float64), 20, step_size=found, adapt=False
    )
    assert again.acceptance == pytest.approx(0.8, abs=0.08)
    assert again.step_size == found


def test_never_enters_nan() -> None:
    torch.manual_seed(0)
    start = torch.randn(4000, 2, dtype=torch.float64).abs()
    result = hmc(half_normal, start, 20, keep=True)
    assert result.history is not None
    assert bool((result.history[..., 0] > 0).all())
    assert bool(result.log_density.isfinite().all())
    positive, free = result.position.T
    assert float(positive.mean()) == pytest.approx(
        math.sqrt(2 / math.pi), abs=4 * 0.603 / math.sqrt(4000)
    )
    assert abs(float(free.mean())) < 4 / math.sqrt(4000)


def test_leaves_nan() -> None:
    torch.manual_seed(0)
    start = torch.rand(500, 2, dtype=torch.float64) - 1
    assert not bool(evaluate(half_normal, start).log_density.isfinite().any())
    result = hmc(half_normal, start, 40, step_size=0.3, adapt=False)
    assert bool((result.position[:, 0] > 0).all())


def test_overflow_is_a_rejection() -> None:
    torch.manual_seed(0)
    start = torch.randn(50, 2)

    def steep(x: Tensor) -> tuple[Tensor, Tensor]:
        return -x.pow(8).sum(-1), -8 * x.pow(7)

    result = hmc(steep, start, 3, step_size=100.0, adapt=False)
    assert torch.equal(result.position, start)
    assert result.acceptance == 0
    assert result.divergences == 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result(dtype: torch.dtype) -> None:
    start = torch.zeros(5, 3, dtype=dtype)
    result = hmc(normal, start, 4, keep=True)
    assert result.history is not None
    assert result.history.shape == (4, 5, 3)
    assert torch.equal(result.history[-1], result.position)
    torch.testing.assert_close(result.log_density, normal(result.position)[0])
    assert result.position.dtype == result.log_density.dtype == dtype
    assert result.trajectories == 4
    assert hmc(normal, start, 4).history is None


def test_seed() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return hmc(normal, torch.zeros(5, 3), 4).position

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_no_trajectory() -> None:
    start = torch.ones(5, 3)
    result = hmc(normal, start, 0, keep=True)
    assert result.trajectories == 0
    assert torch.equal(result.position, start)
    assert math.isnan(result.acceptance)
    assert result.history is not None and result.history.shape == (0, 5, 3)


def model() -> None:
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), scale).to_event(1))


def log_joint(z: Tensor) -> Tensor:
    """The model on the unconstrained scale, by hand."""
    prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    return prior + dist.Normal(0.0, z[:, :1].exp()).log_prob(z[:, 1:]).sum(-1)


def affine(seed: int) -> pf.transforms.LowerTriangularAffine:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64).tril(-1) + torch.eye(3) * (
        1 + seed
    )
    layer = pf.transforms.LowerTriangularAffine(3).double()
    layer.set(torch.randn(3, generator=generator, dtype=torch.float64), matrix)
    return layer


def coupled() -> pf.transforms.Transform:
    torch.manual_seed(3)
    layers = [
        pf.transforms.AffineCoupling(3),
        pf.transforms.Reverse(3),
        pf.transforms.AffineCoupling(3),
    ]
    for parameter in [p for layer in layers for p in layer.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    return pf.transforms.Compose([*[layer.double() for layer in layers], affine(0)])


@pytest.mark.parametrize(
    "transform",
    [affine(1), pf.transforms.Compose([affine(0), affine(1)]), coupled()],
    ids=["affine", "two affine", "couplings"],
)
def test_latent_target(transform: pf.transforms.Transform) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
    z, log_det = transform.forward_and_log_det(x)
    expected = log_joint(z) + log_det
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with torch.no_grad():
        value, slope = latent_target(pf.model.LogDensity(model), transform)(x)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, gradient)
    assert not value.requires_grad and not slope.requires_grad
    assert all(parameter.grad is None for parameter in transform.parameters())


def test_polish_brings_a_guide_to_the_posterior() -> None:
    """A guide that is off by a standard deviation and too narrow by a half."""
    shift = pf.transforms.LowerTriangularAffine(2).double()
    shift.set(torch.tensor([4.0, 2.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    torch.manual_seed(0)

    def wide() -> None:
        loc = torch.tensor([3.0, 4.0], dtype=torch.float64)
        pyro.sample("x", dist.Normal(loc, 2.0).to_event(1))

    x = torch.randn(2000, 2, dtype=torch.float64)
    z = shift(hmc(latent_target(pf.model.LogDensity(wide), shift), x, 12).position).detach()
    error = (z.mean(0) - torch.tensor([3.0, 4.0], dtype=torch.float64)) / 2
    assert float(error.abs().max()) < 4 / math.sqrt(2000)
    assert float((z.std(0) / 2 - 1).abs().max()) < 4 / math.sqrt(4000)


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"start": [[0.0]]}, TypeError, "Expected start to be a tensor"),
    (
        {"start": torch.zeros(2, 2, dtype=torch.int64)},
        TypeError,
        "Expected start of a floating-point dtype",
    ),
    (
        {"start": torch.zeros(3)},
        ValueError,
        r"Expected start of shape \(chains, features\); got \(3,\)",
    ),
    (
        {"start": torch.zeros(0, 3)},
        ValueError,
        r"Expected start of shape \(chains, features\); got \(0, 3\)",
    ),
    ({"start": torch.tensor([[math.nan]])}, ValueError, "Expected start to be finite"),
    ({"trajectories": -1}, ValueError, "Expected trajectories >= 0"),
    ({"trajectories": 1.5}, TypeError, "Expected trajectories to be an integer"),
    ({"path_length": 0.0}, ValueError, "Expected path_length to be positive"),
    ({"leapfrog": 0}, ValueError, "Expected leapfrog >= 1"),
    ({"step_size": -1.0}, ValueError, "Expected step_size to be positive"),
    (
        {"target": lambda x: (x, x)},
        ValueError,
        r"Expected target to return tensors of shapes \(2,\) and \(2, 1\)",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), MISUSE, ids=[message for *_, message in MISUSE]
)
def test_misuse(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "target": normal,
        "start": torch.zeros(2, 1),
        "trajectories": 1,
        **change,
    }
    with pytest.raises(error, match=message):
        hmc(**arguments)
