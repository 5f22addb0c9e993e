"""The objectives against Gaussian cases solved by hand, quadrature, and autograd of the closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import pyroflows as pf
from pyroflows.model import LogDensity
from pyroflows.train.objectives import (
    FAB,
    MMD,
    ChiSquareBound,
    ForwardKL,
    ImportanceWeightedBound,
    PathELBO,
    RenyiBound,
)
from pyroflows.train.objectives.bounds import Particles

Y = torch.tensor([1.0, -0.5], dtype=torch.float64)
# The posterior of z ~ N(0, 1), y ~ N(z, 1/2), by hand.
MEAN, SD = 0.8 * Y, math.sqrt(0.2)
LOG_EVIDENCE = float(dist.Normal(0.0 * Y, math.sqrt(1.25)).log_prob(Y).sum())

BOUNDS: dict[str, Callable[[int], Any]] = {
    "elbo": PathELBO,
    "importance": ImportanceWeightedBound,
    "renyi half": lambda k: RenyiBound(0.5, k),
    "renyi two": lambda k: RenyiBound(2.0, k),
    "chi-square": lambda k: ChiSquareBound(num_particles=k),
}


def model(y: Tensor = Y) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


@pytest.fixture(scope="module")
def density() -> LogDensity:
    return LogDensity(model)


@pytest.fixture
def parameters() -> tuple[Tensor, Tensor]:
    loc = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor([-0.7, -0.9], dtype=torch.float64, requires_grad=True)
    return loc, log_scale


def normal(parameters: tuple[Tensor, Tensor]) -> Any:
    loc, log_scale = parameters
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def renyi_divergence(loc: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """Of order alpha, from a diagonal normal to the posterior."""
    if alpha == 1:
        return (
            math.log(SD) - scale.log() + (scale**2 + (loc - MEAN) ** 2) / (2 * SD**2) - 0.5
        ).sum()
    variance = alpha * SD**2 + (1 - alpha) * scale**2
    spread = math.log(SD) - scale.log() + (2 * math.log(SD) - variance.log()) / (2 * (alpha - 1))
    return (spread + 0.5 * alpha * (loc - MEAN) ** 2 / variance).sum()


def assert_within_error(estimates: Tensor, exact: Tensor, errors: float = 5.0) -> None:
    """Each row is an estimate; five standard errors of their mean."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - exact).abs() <= errors * error + 1e-9).all(), (
        estimates.mean(0),
        exact,
        error,
    )


def gradients_of(
    loss: Callable[[], Tensor], parameters: tuple[Tensor, ...], times: int
) -> tuple[Tensor, Tensor]:
    values, gradients = [], []
    for _ in range(times):
        value = loss()
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)]))
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


# Values and gradients solved by hand


@pytest.mark.parametrize(
    ("make", "alpha"),
    [
        (PathELBO, 1.0),
        (BOUNDS["renyi half"], 0.5),
        (BOUNDS["renyi two"], 2.0),
        (BOUNDS["chi-square"], -1.0),
    ],
    ids=["elbo", "renyi half", "renyi two", "chi-square"],
)
def test_bounds_of_gaussians(
    density: LogDensity, parameters: tuple[Tensor, Tensor], make: Callable[[int], Any], alpha: float
) -> None:
    """log Z minus the divergence between normals; the bias is of order 1/K, the error of 1/sqrt(20 K)."""
    objective = make(2048)
    loc, log_scale = parameters
    closed = LOG_EVIDENCE - renyi_divergence(loc, log_scale.exp(), alpha)
    loss = closed if alpha < 0 else -closed
    exact = torch.cat(torch.autograd.grad(loss, parameters))
    values, gradients = gradients_of(
        lambda: objective.density_loss(normal(parameters), density), parameters, 20
    )
    assert_within_error(values, loss.detach())
    assert_within_error(gradients, exact)
    assert (
        float((gradients.std(0) / exact.abs().max()).max()) < 0.25
    )  # so that the agreement means something


def test_chi_square_bound_is_above_and_the_others_below(
    density: LogDensity, parameters: tuple[Tensor, Tensor]
) -> None:
    q = normal(parameters)
    bounds = {
        name: float(make(4096).density_loss(q, density).detach()) for name, make in BOUNDS.items()
    }
    values = [-bounds[name] for name in ("renyi two", "elbo", "renyi half", "importance")] + [
        bounds["chi-square"]
    ]
    assert values == sorted(values)
    assert values[2] < LOG_EVIDENCE < values[4]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.0])
def test_gradients_of_two_particles_by_quadrature(alpha: float) -> None:
    """The expected estimator of a bound with K = 2 is the gradient of the bound, to the precision of quadrature."""
    objective = {0.0: ImportanceWeightedBound(2), 1.0: PathELBO(2)}.get(alpha) or RenyiBound(
        alpha, 2
    )
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    noise = torch.cartesian_prod(nodes, nodes)
    mass = torch.cartesian_prod(weights, weights).prod(-1) / weights.sum() ** 2
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def log_weight(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return -0.5 * z**2 + 0.1 * z.sin() - dist.Normal(loc, scale).log_prob(z)

    z = loc + scale * noise
    power = 1 - alpha
    log_w = log_weight(z, loc, scale)
    each = log_w.mean(-1) if power == 0 else ((power * log_w).logsumexp(-1) - math.log(2)) / power
    bound = (mass * each).sum()
    exact = torch.autograd.grad(bound, (loc, scale), retain_graph=True)

    point = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(log_weight(point, loc.detach(), scale.detach()).sum(), point)
    path = (z - z.detach()) * slope
    losses = torch.func.vmap(lambda w, p: objective._loss(Particles(w, p)))(log_w.detach(), path)
    estimate = (mass * losses).sum()
    torch.testing.assert_close(-estimate, bound, atol=1e-9, rtol=0)
    for mine, other in zip(torch.autograd.grad(estimate, (loc, scale)), exact, strict=True):
        torch.testing.assert_close(-mine, other, atol=1e-6, rtol=0)


def test_importance_weighted_bound_by_quadrature(density: LogDensity) -> None:
    """One dimension of the posterior differs from the guide, so that the bound of two particles is a double integral."""
    q = dist.Normal(MEAN + torch.tensor([0.4, 0.0]), SD).to_event(1)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    z = torch.cartesian_prod(nodes, nodes) * SD + float(MEAN[0]) + 0.4
    mass = torch.cartesian_prod(weights, weights).prod(-1) / weights.sum() ** 2
    log_w = dist.Normal(MEAN[0], SD).log_prob(z) - dist.Normal(MEAN[0] + 0.4, SD).log_prob(z)
    exact = LOG_EVIDENCE + float((mass * (log_w.logsumexp(-1) - math.log(2))).sum())
    objective = ImportanceWeightedBound(2)
    values = torch.stack([-objective.density_loss(q, density) for _ in range(400)])
    assert_within_error(values, torch.tensor(exact, dtype=torch.float64))


# No noise where the guide is exact


@torch.no_grad()
def set_exactly(guide: Any) -> None:
    """Gives an autoguide the posterior."""
    guide()
    if isinstance(guide, pf.AutoFlow):
        guide.whiten(MEAN, SD * torch.eye(2, dtype=torch.float64))
    elif isinstance(guide, AutoNormal):
        guide.locs.z.copy_(MEAN)
        guide.scales.z = torch.full_like(MEAN, SD)
    else:
        guide.loc.copy_(MEAN)
        guide.scale = torch.full_like(MEAN, SD)
        if isinstance(guide, AutoLowRankMultivariateNormal):
            guide.cov_factor.zero_()


def gradients_in_svi(
    objective: Any, model: Any, guide: Any, *args: Any
) -> tuple[float, dict[str, Tensor]]:
    with pyro.poutine.trace(param_only=True) as capture:
        loss = objective.loss_and_grads(model, guide, *args)
    parameters = {name: node["value"].unconstrained() for name, node in capture.trace.nodes.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return loss, gradients


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize(
    "kind",
    [
        pf.AutoFlow,
        AutoNormal,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
    ],
)
def test_no_noise_at_the_exact_autoguide(name: str, kind: Any) -> None:
    objective, guide = BOUNDS[name](8), kind(model)
    set_exactly(guide)
    loss, gradients = gradients_in_svi(objective, model, guide)
    assert abs(loss) == pytest.approx(-LOG_EVIDENCE, abs=1e-9)
    assert gradients
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    assert objective.loss(model, guide) == pytest.approx(loss, abs=1e-9)


def chain() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.5))


def chain_guide() -> None:
    """The posterior of the chain, drawn backwards; both sites depend on parameters, one on the other."""
    loc, scale = (
        pyro.param("loc", torch.tensor(1.0)),
        pyro.param("scale", torch.tensor(math.sqrt(2 / 3))),
    )
    slope, width = (
        pyro.param("slope", torch.tensor(0.5)),
        pyro.param("width", torch.tensor(math.sqrt(0.5))),
    )
    b = pyro.sample("b", dist.Normal(loc, scale))
    pyro.sample("a", dist.Normal(slope * b, width))


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("vectorize", [True, False])
def test_no_noise_at_an_exact_guide_of_two_dependent_sites(name: str, vectorize: bool) -> None:
    objective = BOUNDS[name](4)
    objective.vectorize_particles = vectorize
    loss, gradients = gradients_in_svi(objective, chain, chain_guide)
    assert abs(loss) == pytest.approx(
        -float(dist.Normal(0.0, math.sqrt(3)).log_prob(torch.tensor(1.5))), abs=1e-5
    )
    assert set(gradients) == {"loc", "scale", "slope", "width"}
    assert max(float(g.abs()) for g in gradients.values()) < 1e-5


@pytest.mark.parametrize("name", slow_but_for(["renyi half"], ["importance", "renyi half"]))
def test_dependent_sites_have_the_gradient_of_the_bound(name: str) -> None:
    """Off the posterior, against the total gradient of the same bound, whose scores have mean zero but are noisy."""
    objective = BOUNDS[name](3)
    chain_guide()
    names, store = ("loc", "scale", "slope", "width"), pyro.get_param_store()
    for parameter, value in (("slope", 0.1), ("loc", 0.4)):
        store[parameter].unconstrained().data.fill_(value)

    def total() -> Tensor:
        """By hand, for 20000 bounds of three particles at a time."""
        loc, scale, slope, width = (store[n] for n in names)
        b = loc + scale * torch.randn(20000, 3)
        a = slope * b + width * torch.randn(20000, 3)
        log_q = dist.Normal(loc, scale).log_prob(b) + dist.Normal(slope * b, width).log_prob(a)
        prior = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(a, 1.0).log_prob(b)
        log_w = prior + dist.Normal(b, 1.0).log_prob(torch.tensor(1.5)) - log_q
        return -((objective.power * log_w).logsumexp(-1) - math.log(3)).mean() / objective.power

    reference = gradients_of(total, tuple(store[n].unconstrained() for n in names), 10)[1]
    runs = [gradients_in_svi(objective, chain, chain_guide)[1] for _ in range(250)]
    mine = torch.stack([torch.stack([run[n] for n in names]) for run in runs])
    error = (reference.var(0) / len(reference) + mine.var(0) / len(mine)).sqrt()
    assert ((mine.mean(0) - reference.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("name", "weight"),
    slow_but_for(
        [("elbo", "mask"), ("importance", "scale")],
        [(name, weight) for name in BOUNDS for weight in ("scale", "mask")],
    ),
)
def test_a_weight_of_the_guide_weighs_its_score(name: str, weight: str) -> None:
    """As in annealing: path gradients against total ones, off the posterior."""

    def weigh(program: Any) -> Any:
        if weight == "mask":
            return pyro.poutine.mask(program, torch.tensor(False))
        return pyro.poutine.scale(program, 0.3)

    guide = pf.AutoFlow(model, flow=lambda n: pf.RealNVP(n, transforms=2), init_scale=0.6)
    guide()
    path, total = BOUNDS[name](64), BOUNDS[name](64)
    total.path = False
    pairs = [
        [gradients_in_svi(each, weigh(model), weigh(guide))[1] for each in (path, total)]
        for _ in range(100)
    ]
    differences = torch.stack([torch.cat([(a[n] - b[n]).flatten() for n in a]) for a, b in pairs])
    error = differences.std(0) / len(differences) ** 0.5
    assert (differences.mean(0).abs() <= 5 * error + 1e-5).all()


# In SVI


def plated(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        u = pyro.sample("u", dist.Normal(loc, scale))
    with pyro.plate("data", len(y), subsample_size=4) as index, pyro.poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(u[..., index % 3], 1.0), obs=y[index])


def make_list(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(pyro.poutine.block(model, expose=["scale"])))
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["scale"])))
    return guide


@pytest.mark.parametrize(
    "make",
    [
        pf.AutoFlow,
        AutoNormal,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        AutoIAFNormal,
        AutoDelta,
        make_list,
    ],
)
def test_values_are_those_of_pyros_elbo(make: Any) -> None:
    """With plates, subsampled data, scaled sites and bijections; the draws of a seed are the same."""
    y, guide = torch.arange(8.0), make(plated)
    losses = []
    for objective in (PathELBO(5), Trace_ELBO(5, vectorize_particles=True)):
        objective.loss(plated, guide, y)  # counts the plates
        pyro.set_rng_seed(1)
        losses.append(objective.loss(plated, guide, y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("make", [AutoNormal, AutoStructured, make_list, AutoDelta])
def test_mean_gradients_are_those_of_pyros_elbo(make: Any) -> None:
    """Also of guides whose point masses depend on parameters."""
    y = torch.arange(8.0)
    guide = make(plated)
    guide(y)
    means, variances = [], []
    for objective in (PathELBO(100), Trace_ELBO(100, vectorize_particles=True)):
        runs = [gradients_in_svi(objective, plated, guide, y)[1] for _ in range(12)]
        flat = torch.stack(
            [torch.cat([g.reshape(-1) for _, g in sorted(run.items())]) for run in runs]
        )
        means.append(flat.mean(0))
        variances.append(flat.var(0) / len(runs))
    assert ((means[0] - means[1]).abs() <= 6 * (variances[0] + variances[1]).sqrt() + 1e-5).all()


def test_svi_and_density_agree(density: LogDensity) -> None:
    """One seed, one flow: the gradients by effect handlers are those by the captured density."""
    guide = pf.AutoFlow(model)
    guide()
    for p in guide.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for make in BOUNDS.values():
        objective = make(16)
        objective.loss(model, guide)
        gradients = []
        for handlers in (True, False):
            guide.zero_grad()
            pyro.set_rng_seed(3)
            both = objective.differentiable_loss, objective.density_loss
            (both[0](model, guide) if handlers else both[1](guide.flow(), density)).backward()
            gradients.append(
                torch.cat([p.grad.reshape(-1) for p in guide.parameters() if p.grad is not None])
            )
        torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-7)


def test_a_flow_is_not_inverted(density: LogDensity, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = pf.AutoFlow(model)
    guide()

    def refuse(*args: Any) -> None:
        raise AssertionError("inverted")

    for layer in guide.flow.transform.layers:
        monkeypatch.setattr(layer, "inverse_and_log_det", refuse)
    for make in BOUNDS.values():
        objective = make(8)
        objective.loss_and_grads(model, guide)
        objective.loss(model, guide)
        objective.density_loss(guide.get_posterior(), density).backward()


def test_parameters_of_the_model_get_the_weighted_gradient() -> None:
    """Five fixed draws, by hand."""

    def learnt() -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 2.0))

    objective = ImportanceWeightedBound(5)
    objective.loss(learnt, guide)
    pyro.set_rng_seed(7)
    _, gradients = gradients_in_svi(objective, learnt, guide)
    pyro.set_rng_seed(7)
    z = 2.0 * torch.randn(5)
    log_p = dist.Normal(0.3, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(2.0))
    share = (log_p - dist.Normal(0.0, 2.0).log_prob(z)).softmax(0)
    torch.testing.assert_close(gradients["loc"], -(share * (z - 0.3)).sum())


@pytest.mark.parametrize("name", BOUNDS)
def test_densities_that_are_not_finite(name: str) -> None:
    """A half-space of density zero, and NaN beyond 1.5: weights of zero where their power is, else left out."""

    def cliffs() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("zero", torch.where(z > 0, 0.0, -math.inf).sum(-1))
        pyro.factor("nan", torch.where(z > 1.5, math.nan, 0.0).sum(-1))

    density = LogDensity(cliffs, init_loc_fn=init_to_value(values={"z": torch.ones(1)}))
    objective = BOUNDS[name](4000)
    loc = torch.zeros(1, requires_grad=True)
    loss = objective.density_loss(dist.Normal(loc, 1.0).to_event(1), density)
    loss.backward()
    assert loc.grad is not None and bool(loc.grad.isfinite().all())
    inside = float(dist.Normal(0.0, 1.0).cdf(torch.tensor(1.5))) - 0.5
    bound = math.log(inside) / objective.power if objective.power > 0 else 0.0
    # The share inside has a relative standard error of sqrt(0.57 / 0.43 / 4000) = 0.018.
    error = 5 * 0.018 / objective.power if objective.power > 0 else 1e-6
    assert float(loss.detach()) == pytest.approx(bound if objective.upper else -bound, abs=error)


# On draws, and annealed


def draws_of_posterior(n: int) -> dict[str, Tensor]:
    return {"z": MEAN + SD * torch.randn(n, 2, dtype=torch.float64)}


def forward_kl_gradient(parameters: tuple[Tensor, Tensor]) -> Tensor:
    loc, scale = parameters[0], parameters[1].exp()
    kl = (scale.log() - math.log(SD) + (SD**2 + (MEAN - loc) ** 2) / (2 * scale**2) - 0.5).sum()
    return torch.cat(torch.autograd.grad(kl, parameters))


def test_forward_kl(density: LogDensity, parameters: tuple[Tensor, Tensor]) -> None:
    objectives = iter([ForwardKL(draws_of_posterior(2000), 2000) for _ in range(20)])
    values, gradients = gradients_of(
        lambda: next(objectives).density_loss(normal(parameters), density), parameters, 20
    )
    loc, log_scale = (p.detach() for p in parameters)
    squares = (SD**2 + (MEAN - loc) ** 2) / (2 * log_scale).exp()
    assert_within_error(values, (log_scale + 0.5 * math.log(2 * math.pi) + 0.5 * squares).sum())
    assert_within_error(gradients, forward_kl_gradient(parameters))


@pytest.mark.parametrize("objective", [ForwardKL, MMD])
def test_training_on_draws_learns_their_moments(objective: Any) -> None:
    """Sites on the half-line and the line, given as constrained values."""
    z = torch.randn(2000, 2) @ torch.tensor([[0.5, 0.4], [0.0, 0.3]]) + torch.tensor([1.0, -1.0])

    def sites() -> None:
        pyro.sample("a", dist.LogNormal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    guide = AutoMultivariateNormal(sites, init_scale=0.5)
    loss = objective({"b": z[:, 1:], "a": z[:, 0].exp()}, num_particles=250)
    svi = SVI(sites, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), loss=loss)
    for _ in range(300):
        svi.step()
    posterior = guide.get_posterior()
    torch.testing.assert_close(posterior.mean.detach(), z.mean(0), atol=0.07, rtol=0)
    torch.testing.assert_close(posterior.covariance_matrix.detach(), z.T.cov(), atol=0.07, rtol=0)


@pytest.mark.parametrize("width", [0.7, 3.0])
def test_mmd_of_gaussians(
    density: LogDensity, parameters: tuple[Tensor, Tensor], width: float
) -> None:
    """The mean kernel of a normal difference d ~ N(m, s^2): the product of h / sqrt(t) exp(-m^2 / 2t), t = h^2 + s^2."""

    def term(distance: Tensor, variance: Tensor) -> Tensor:
        total = width**2 + variance
        return torch.prod(width / total.sqrt() * torch.exp(-(distance**2) / (2 * total)))

    loc, scale = parameters[0], parameters[1].exp()
    same = torch.zeros_like(MEAN)
    exact = (
        term(same, 2 * scale**2)
        - 2 * term(loc - MEAN, scale**2 + SD**2)
        + term(same, same + 2 * SD**2)
    )
    objectives = iter([MMD(draws_of_posterior(500), width, num_particles=500) for _ in range(20)])
    values, gradients = gradients_of(
        lambda: next(objectives).density_loss(normal(parameters), density), parameters, 20
    )
    assert_within_error(values, exact.detach())
    assert_within_error(gradients, torch.cat(torch.autograd.grad(exact, parameters)))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_annealed_weights_are_unbiased(
    density: LogDensity, parameters: tuple[Tensor, Tensor], alpha: float
) -> None:
    """Their mean is the integral of p^alpha q^(1 - alpha), known for Gaussians; the draws have its mean."""
    loc, scale = parameters[0].detach(), parameters[1].detach().exp()
    z, log_weight, log_guide = FAB(4000, alpha=alpha, temperatures=3)._anneal(
        normal((loc, scale.log())), density
    )
    log_mean = alpha * LOG_EVIDENCE + (
        2 * renyi_divergence_from_posterior(loc, scale) if alpha == 2 else 0.0
    )
    assert_within_error(
        (log_weight - log_mean).exp().unsqueeze(-1), torch.ones(1, dtype=torch.float64)
    )
    torch.testing.assert_close(log_guide, normal((loc, scale.log())).log_prob(z))
    precision = alpha / SD**2 + (1 - alpha) / scale**2
    target = (alpha * MEAN / SD**2 + (1 - alpha) * loc / scale**2) / precision
    share = log_weight.softmax(0)
    assert ((share @ z - target).abs() < 5 * (share.square().sum() / precision).sqrt()).all()


def renyi_divergence_from_posterior(loc: Tensor, scale: Tensor) -> float:
    """Half the logarithm of E_q[(p / q)^2], by skew symmetry."""
    return -float(renyi_divergence(loc, scale, -1.0))


def test_fab_has_the_gradient_of_the_forward_kl(
    density: LogDensity, parameters: tuple[Tensor, Tensor]
) -> None:
    """A new buffer each time, of 4096 draws; the bias is of the order of their number's inverse."""

    def loss() -> Tensor:
        return FAB(2048, alpha=1.0, temperatures=2).density_loss(normal(parameters), density)

    assert_within_error(gradients_of(loss, parameters, 10)[1], forward_kl_gradient(parameters))


def test_fab_corrects_the_buffer_for_a_changed_guide(
    density: LogDensity, parameters: tuple[Tensor, Tensor]
) -> None:
    """With alpha = 2 the target is p^2 / q: after a change of q, the weights of old draws have the mean of the new one."""
    old = (parameters[0].detach(), parameters[1].detach())
    new = (old[0] + 0.1, old[1] + 0.1)
    objective = FAB(4000, alpha=2.0, temperatures=3, reuse=100)
    objective.density_loss(normal(old), density)
    for _ in range(8):
        objective.density_loss(normal(new), density)
    assert objective._buffer is not None
    z, log_weight, log_guide = objective._buffer
    taken = (log_guide - normal(new).log_prob(z)).abs() < 1e-9
    assert float(log_weight.softmax(0)[taken].sum()) > 0.9
    log_mean = 2 * LOG_EVIDENCE + 2 * renyi_divergence_from_posterior(new[0], new[1].exp())
    ratio = (log_weight - log_mean).exp()[taken]
    missing = (log_weight - log_mean).exp()[~taken].sum() / len(z)
    # Standard error of the mean of 8000 weights, and the small part that has not been taken.
    error = float(ratio.std() / math.sqrt(len(z)) + missing)
    assert float(ratio.sum() / len(z) + missing) == pytest.approx(1.0, abs=5 * error)


def two_modes() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    modes = (
        dist.Normal(torch.tensor([[-2.5, 0.0], [2.5, 0.0]]), 0.6)
        .to_event(1)
        .log_prob(x.unsqueeze(-2))
    )
    pyro.factor("modes", (modes + torch.tensor([0.3, 0.7]).log()).logsumexp(-1))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "low", "high"), [(FAB, 0.5, 0.8), (PathELBO, 0.0, 0.05)])
def test_fab_finds_the_mode_that_a_reverse_divergence_loses(
    make: Any, low: float, high: float
) -> None:
    """From a start on the lesser mode, whose neighbour 8 sd away has 70 % of the mass."""
    start = init_to_value(values={"x": torch.tensor([-2.5, 0.0])})

    def flow(features: int) -> pf.Flow:
        return pf.RealNVP(features, transforms=4, network=pf.nn.mlp((32,), torch.nn.Tanh))

    guide = pf.AutoFlow(two_modes, flow, init_loc_fn=start, init_scale=0.6)
    svi = SVI(two_modes, guide, pyro.optim.ClippedAdam({"lr": 0.01}), loss=make(128))
    for _ in range(400):
        svi.step()
    draws = guide.get_posterior().sample((4000,))
    assert low <= float((draws[:, 0] > 0).double().mean()) <= high


# Everywhere, and misused


@pytest.mark.parametrize("name", [*BOUNDS, "forward", "mmd", "fab"])
def test_every_objective_trains_on_a_device(name: str, device: torch.device) -> None:
    y = Y.to(device)
    draws = {"z": torch.randn(20, 2, dtype=torch.float64, device=device)}
    others: dict[str, Any] = {
        "forward": lambda: ForwardKL(draws),
        "mmd": lambda: MMD(draws),
        "fab": lambda: FAB(8),
    }
    objective = others[name]() if name in others else BOUNDS[name](8)
    guide = pf.AutoFlow(model)
    guide(y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    assert math.isfinite(svi.step(y)) and math.isfinite(svi.evaluate_loss(y))
    assert any(not torch.equal(p, before[n]) for n, p in guide.named_parameters())
    assert all(
        p.dtype == torch.float64 and p.device.type == device.type for p in guide.parameters()
    )


def test_same_seed_same_result(density: LogDensity) -> None:
    losses = []
    for _ in range(2):
        pyro.set_rng_seed(11)
        objective, q = FAB(16), dist.Normal(MEAN, 1.0).to_event(1)
        losses.append([float(objective.density_loss(q, density)) for _ in range(6)])
    assert losses[0] == losses[1]


class Unreparametrised(dist.Normal):
    has_rsample = False


def discrete() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(z + k, 1.0), obs=torch.tensor(0.0))


def own_parameter() -> None:
    pyro.sample("z", dist.Normal(pyro.param("own", torch.tensor(0.0)), 1.0))


def plain_guide() -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def score_guide() -> None:
    pyro.sample("z", Unreparametrised(pyro.param("loc", torch.tensor(0.0)), 1.0))


DRAWS = {"z": torch.zeros(5, 2, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PathELBO(0), ValueError, "num_particles >= 1; got 0"),
        (lambda: PathELBO(2.5), TypeError, "num_particles to be an integer"),  # type: ignore[arg-type]
        (lambda: RenyiBound(-1.0), ValueError, "alpha to be positive"),
        (lambda: RenyiBound("2"), TypeError, "alpha to be a number"),  # type: ignore[arg-type]
        (lambda: ChiSquareBound(1.0), ValueError, "order > 1; got 1.0.*RenyiBound"),
        (lambda: ForwardKL(torch.zeros(3)), TypeError, "draws to be a mapping"),  # type: ignore[arg-type]
        (lambda: ForwardKL({"z": [1.0]}), TypeError, "draws of 'z' to be a tensor; got list"),  # type: ignore[dict-item]
        (lambda: ForwardKL({}), ValueError, "at least one site"),
        (
            lambda: ForwardKL({"a": torch.zeros(3), "b": torch.zeros(4)}),
            ValueError,
            "all of one length",
        ),
        (lambda: MMD({"a": torch.zeros(1)}), ValueError, "at least 2 draws"),
        (lambda: MMD(DRAWS, bandwidth=-1.0), ValueError, "bandwidth to be positive"),
        (
            lambda: MMD(DRAWS, bandwidth=torch.tensor([1.0, 0.0])),
            ValueError,
            "bandwidth to be positive",
        ),
        (lambda: MMD(DRAWS, num_particles=1), ValueError, "num_particles >= 2"),
        (lambda: FAB(alpha=0.5), ValueError, "alpha >= 1; got 0.5"),
        (lambda: FAB(temperatures=0), ValueError, "temperatures >= 1"),
        (lambda: FAB(reuse=0), ValueError, "reuse >= 1"),
        (lambda: FAB(64, capacity=32), ValueError, "capacity >= 64"),
    ],
)
def test_misuse(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "model", "make_guide", "error", "message"),
    [
        (
            PathELBO(2),
            own_parameter,
            lambda m: score_guide,
            ValueError,
            "reparametrised distribution.*Unreparametrised at site 'z'",
        ),
        (PathELBO(2), discrete, lambda m: plain_guide, ValueError, "got one without 'k'"),
        (
            ChiSquareBound(),
            own_parameter,
            lambda m: plain_guide,
            ValueError,
            "without parameters of its own",
        ),
        (
            FAB(),
            own_parameter,
            lambda m: plain_guide,
            TypeError,
            "pyroflows.AutoFlow, in FAB; got function",
        ),
        (
            PathELBO(2),
            model,
            AutoNormalMessenger,
            TypeError,
            "runs without its model; got AutoNormalMessenger",
        ),
        (MMD(DRAWS), model, AutoNormal, TypeError, "in MMD; got AutoNormal"),
        (ForwardKL(DRAWS), model, AutoDelta, TypeError, "in ForwardKL; got AutoDelta"),
        (MMD(DRAWS), model, pf.AutoFlow, ValueError, "draws that differ in every coordinate"),
        (
            MMD(DRAWS, bandwidth=torch.ones(3)),
            model,
            pf.AutoFlow,
            ValueError,
            r"bandwidth of shape \(2,\); got \(3,\)",
        ),
        (
            MMD({"z": torch.full((5, 2), math.nan)}),
            model,
            pf.AutoFlow,
            ValueError,
            "inside of its support; got 5 of 5",
        ),
        (
            ForwardKL({"z": torch.full((5, 2), math.nan)}),
            model,
            pf.AutoFlow,
            ValueError,
            "inside of its support; got 5 of 5",
        ),
        (
            FAB(),
            model,
            lambda m: pf.AutoFlow(own_parameter),
            ValueError,
            r"one vector of 2 features; got one of shape \(1,\)",
        ),
        (ForwardKL({"x": torch.zeros(3)}), model, pf.AutoFlow, ValueError, "got none of 'z'"),
        (
            ForwardKL({"z": torch.zeros(3, 4)}),
            model,
            pf.AutoFlow,
            ValueError,
            r"each of shape \(2,\); got \(3, 4\)",
        ),
    ],
)
def test_misuse_in_svi(
    objective: Any, model: Any, make_guide: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        objective.loss_and_grads(model, make_guide(model))


@pytest.mark.parametrize(
    ("distribution", "error", "message"),
    [
        (torch.zeros(2), TypeError, "a distribution, such as flow"),
        (dist.Normal(torch.zeros(2), 1.0), ValueError, "2 features; got one of shape"),
        (
            dist.Normal(torch.zeros(3), 1.0).to_event(1),
            ValueError,
            r"2 features; got one of shape \(3,\)",
        ),
        (Unreparametrised(torch.zeros(2), 1.0).to_event(1), ValueError, "with rsample; got"),
    ],
)
def test_misuse_of_a_distribution(
    density: LogDensity, distribution: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PathELBO(2).density_loss(distribution, density)


def test_fab_needs_one_finite_density() -> None:
    def nowhere() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("far", torch.where(z > 50, 0.0, -math.inf).sum(-1))

    density = LogDensity(nowhere, init_loc_fn=init_to_value(values={"z": torch.full((1,), 60.0)}))
    with pytest.raises(
        ValueError, match="finite log density at a draw of the guide; got none at 8"
    ):
        FAB(8).density_loss(dist.Normal(torch.zeros(1), 1.0).to_event(1), density)


def test_fab_refuses_other_data() -> None:
    objective, guide = FAB(8), pf.AutoFlow(model)
    objective.loss(model, guide, Y)
    objective.loss(model, guide, Y.clone())
    with pytest.raises(ValueError, match="arguments of the first step"):
        objective.loss(model, guide, Y + 1)
