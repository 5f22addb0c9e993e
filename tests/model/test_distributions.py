"""Every distribution of Pyro with a density is evaluated in a batch, as prior and likelihood."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_but_for
from pyro import poutine
from pyro.infer.reparam import LinearHMMReparam, StableReparam, StudentTReparam
from torch import Tensor

from pyroflows.model import LogDensity
from pyroflows.model.evaluator import agree

Make = Callable[[Tensor], Any]

ONES, ZEROS = torch.ones(2), torch.zeros(2)
EYE = torch.eye(2)
MASK = torch.tensor([True, False])
SIGNS = torch.tensor([-0.4, 0.7])


def simplex(x: Tensor) -> Tensor:
    return x.softmax(-1)


def scale_tril(x: Tensor) -> Tensor:
    """A Cholesky factor, written entry by entry."""
    factor = torch.zeros(2, 2)
    factor[0, 0] = x[0].exp()
    factor[1, 0] = x[1]
    factor[1, 1] = x[2].exp()
    return factor


def covariance(x: Tensor) -> Tensor:
    factor = scale_tril(x)
    return factor @ factor.mT


def rows(x: Tensor) -> Tensor:
    return torch.stack([x[:2], x[1:]]).softmax(-1)


def hmm(x: Tensor, family: Any = dist.GaussianHMM, observe: Any = dist.Normal) -> Any:
    normal = dist.Normal(ZEROS, ONES).to_event(1)
    noise = observe(ZEROS, x[2].exp() * ONES).to_event(1)
    moves = dist.Normal(x[:2], ONES).to_event(1)
    return family(normal, EYE, moves, EYE, noise, duration=2)


def gamma_hmm(x: Tensor) -> Any:
    normal = dist.MultivariateNormal(ZEROS, covariance_matrix=covariance(x))
    gamma = dist.Gamma(x[0].exp(), 1.0)
    return dist.GammaGaussianHMM(gamma, normal, EYE, normal, EYE, normal, duration=2)


#: For each distribution one whose parameters are functions of three latent numbers.
TABLE: dict[str, Make] = {
    "AVFMultivariateNormal": lambda x: dist.AVFMultivariateNormal(
        x[:2], scale_tril(x), torch.zeros(2, 2, 2)
    ),
    "AffineBeta": lambda x: dist.AffineBeta(x[0].exp(), x[1].exp(), -1.0, 2.0),
    "AsymmetricLaplace": lambda x: dist.AsymmetricLaplace(x[0], x[1].exp(), x[2].exp()),
    "Bernoulli": lambda x: dist.Bernoulli(logits=x[0]),
    "Beta": lambda x: dist.Beta(x[0].exp(), x[1].exp()),
    "BetaBinomial": lambda x: dist.BetaBinomial(x[0].exp(), x[1].exp(), 5),
    "Binomial": lambda x: dist.Binomial(5, logits=x[0]),
    "Categorical": lambda x: dist.Categorical(logits=x),
    "Cauchy": lambda x: dist.Cauchy(x[0], x[1].exp()),
    "Chi2": lambda x: dist.Chi2(x[0].exp()),
    "CoalescentTimes": lambda x: dist.CoalescentTimes(torch.tensor([0.0, 0.1, 0.2]), x[0].exp()),
    "CoalescentTimesWithRate": lambda x: dist.CoalescentTimesWithRate(
        torch.tensor([2.0, 2.0, 2.5]), x[0].exp() * torch.ones(3)
    ),
    "ContinuousBernoulli": lambda x: dist.ContinuousBernoulli(logits=x[0] + 3),
    "Dirichlet": lambda x: dist.Dirichlet(x.exp()),
    "DirichletMultinomial": lambda x: dist.DirichletMultinomial(x.exp(), 5),
    "DiscreteHMM": lambda x: dist.DiscreteHMM(
        x[:2], rows(x).log(), dist.Normal(x[1:], 1.0), duration=2
    ),
    "ExpandedDistribution": lambda x: dist.Normal(x[0], 1.0).expand([2]),
    "Exponential": lambda x: dist.Exponential(x[0].exp()),
    "ExtendedBetaBinomial": lambda x: dist.ExtendedBetaBinomial(x[0].exp(), x[1].exp(), 5),
    "ExtendedBinomial": lambda x: dist.ExtendedBinomial(5, logits=x[0]),
    "FisherSnedecor": lambda x: dist.FisherSnedecor(x[0].exp(), x[1].exp()),
    "FoldedDistribution": lambda x: dist.FoldedDistribution(dist.Normal(x[0], x[1].exp())),
    "Gamma": lambda x: dist.Gamma(x[0].exp(), x[1].exp()),
    "GammaGaussianHMM": gamma_hmm,
    "GammaPoisson": lambda x: dist.GammaPoisson(x[0].exp(), x[1].exp()),
    "GaussianHMM": hmm,
    "GaussianMRF": lambda x: dist.GaussianMRF(
        dist.MultivariateNormal(ZEROS, covariance(x)),
        dist.MultivariateNormal(torch.zeros(1, 4), torch.eye(4) + 0.1),
        dist.MultivariateNormal(torch.zeros(1, 4), torch.eye(4) + 0.1),
    ),
    "GeneralizedPareto": lambda x: dist.GeneralizedPareto(0.0, x[0].exp(), x[1].exp()),
    "Geometric": lambda x: dist.Geometric(logits=x[0]),
    "GroupedNormalNormal": lambda x: dist.GroupedNormalNormal(
        x[:2], x[1:].exp(), torch.ones(3), torch.tensor([0, 1, 1])
    ),
    "Gumbel": lambda x: dist.Gumbel(x[0], x[1].exp()),
    "HalfCauchy": lambda x: dist.HalfCauchy(x[0].exp()),
    "HalfNormal": lambda x: dist.HalfNormal(x[0].exp()),
    "Independent": lambda x: dist.Normal(x, 1.0).to_event(1),
    "IndependentHMM": lambda x: dist.IndependentHMM(
        dist.GaussianHMM(
            dist.Normal(torch.zeros(2, 1), 1.0).to_event(1),
            torch.ones(2, 1, 1, 1),
            dist.Normal(x[:2].reshape(2, 1, 1), 1.0).to_event(1),
            torch.ones(2, 1, 1, 1),
            dist.Normal(torch.zeros(2, 1, 1), 1.0).to_event(1),
            duration=2,
        )
    ),
    "InverseGamma": lambda x: dist.InverseGamma(x[0].exp(), x[1].exp()),
    "Kumaraswamy": lambda x: dist.Kumaraswamy(x[0].exp(), x[1].exp()),
    "LKJ": lambda x: dist.LKJ(3, x[0].exp()),
    "LKJCholesky": lambda x: dist.LKJCholesky(3, x[0].exp()),
    "Laplace": lambda x: dist.Laplace(x[0], x[1].exp()),
    "LogNormal": lambda x: dist.LogNormal(x[0], x[1].exp()),
    "LogNormalNegativeBinomial": lambda x: dist.LogNormalNegativeBinomial(
        x[0].exp(), x[1], x[2].exp()
    ),
    "Logistic": lambda x: dist.Logistic(x[0], x[1].exp()),
    "LogisticNormal": lambda x: dist.LogisticNormal(x[:2], x[1:].exp()),
    "LowRankMultivariateNormal": lambda x: dist.LowRankMultivariateNormal(
        x[:2], x[1:].unsqueeze(-1), x[1:].exp()
    ),
    "MaskedDistribution": lambda x: dist.Normal(x[:2], 1.0).mask(MASK),
    "MaskedMixture": lambda x: dist.MaskedMixture(
        MASK, dist.Normal(x[:2], 1.0), dist.Laplace(x[1:], 1.0)
    ),
    "MixtureOfDiagNormals": lambda x: dist.MixtureOfDiagNormals(
        torch.stack([x[:2], x[1:]]), torch.ones(2, 2), x[:2]
    ),
    "MixtureOfDiagNormalsSharedCovariance": lambda x: dist.MixtureOfDiagNormalsSharedCovariance(
        torch.stack([x[:2], x[1:]]), ONES, x[:2]
    ),
    "MixtureSameFamily": lambda x: dist.MixtureSameFamily(
        dist.Categorical(logits=x), dist.Normal(x, 1.0)
    ),
    "Multinomial": lambda x: dist.Multinomial(5, logits=x),
    "MultivariateNormal": lambda x: dist.MultivariateNormal(x[:2], covariance(x)),
    "MultivariateStudentT": lambda x: dist.MultivariateStudentT(
        x[0].exp() + 2, x[:2], scale_tril(x)
    ),
    "NanMaskedMultivariateNormal": lambda x: dist.NanMaskedMultivariateNormal(x[:2], covariance(x)),
    "NanMaskedNormal": lambda x: dist.NanMaskedNormal(x[:2], 1.0),
    "NegativeBinomial": lambda x: dist.NegativeBinomial(x[0].exp(), logits=x[1]),
    "Normal": lambda x: dist.Normal(x[0], x[1].exp()),
    "OMTMultivariateNormal": lambda x: dist.OMTMultivariateNormal(x[:2], scale_tril(x)),
    "OneHotCategorical": lambda x: dist.OneHotCategorical(logits=x),
    "OneHotCategoricalStraightThrough": lambda x: dist.OneHotCategoricalStraightThrough(logits=x),
    "OneOneMatching": lambda x: dist.OneOneMatching(x[:2].unsqueeze(-1) * torch.eye(2)),
    "OneTwoMatching": lambda x: dist.OneTwoMatching(x.repeat(2)[:4].unsqueeze(-1) * ONES),
    "OrderedLogistic": lambda x: dist.OrderedLogistic(x[0], torch.stack([x[1], x[1] + x[2].exp()])),
    "Pareto": lambda x: dist.Pareto(1.0, x[0].exp()),
    "Poisson": lambda x: dist.Poisson(x[0].exp()),
    "ProjectedNormal": lambda x: dist.ProjectedNormal(x[:2]),
    "RelaxedBernoulli": lambda x: dist.RelaxedBernoulli(x[0].exp(), logits=x[1]),
    "RelaxedBernoulliStraightThrough": lambda x: dist.RelaxedBernoulliStraightThrough(
        x[0].exp(), logits=x[1]
    ),
    "RelaxedOneHotCategorical": lambda x: dist.RelaxedOneHotCategorical(x[0].exp(), logits=x),
    "RelaxedOneHotCategoricalStraightThrough": lambda x: (
        dist.RelaxedOneHotCategoricalStraightThrough(x[0].exp(), logits=x)
    ),
    "SineBivariateVonMises": lambda x: dist.SineBivariateVonMises(
        x[0], x[1], x[0].exp(), x[1].exp(), weighted_correlation=x[2].sigmoid()
    ),
    "SineSkewed": lambda x: dist.SineSkewed(
        dist.VonMises(x[:2], x[1:].exp()).to_event(1), torch.stack([x[0], x[1]]).tanh() / 3
    ),
    "SkewLogistic": lambda x: dist.SkewLogistic(x[0], x[1].exp(), x[2].exp()),
    "SoftAsymmetricLaplace": lambda x: dist.SoftAsymmetricLaplace(x[0], x[1].exp(), x[2].exp()),
    "SoftLaplace": lambda x: dist.SoftLaplace(x[0], x[1].exp()),
    "SpanningTree": lambda x: dist.SpanningTree(x),
    "StableWithLogProb": lambda x: dist.StableWithLogProb(
        1.5 + 0.3 * x[0].tanh(), x[1].tanh() * SIGNS, x[2].exp(), x[0]
    ),
    "StudentT": lambda x: dist.StudentT(x[0].exp(), x[1], x[2].exp()),
    "TransformedDistribution": lambda x: dist.TransformedDistribution(
        dist.Normal(x[0], 1.0), [dist.transforms.AffineTransform(x[1], x[2].exp())]
    ),
    "TruncatedPolyaGamma": lambda x: dist.TruncatedPolyaGamma(x.new_zeros(()) + 1.0),
    "Uniform": lambda x: dist.Uniform(-x[0].exp(), 1 + x[1].exp()),
    "VonMises": lambda x: dist.VonMises(x[0], x[1].exp()),
    "VonMises3D": lambda x: dist.VonMises3D(x),
    "Weibull": lambda x: dist.Weibull(x[0].exp(), x[1].exp()),
    "Wishart": lambda x: dist.Wishart(3 + x[0].exp(), covariance(x)),
    "ZeroInflatedDistribution": lambda x: dist.ZeroInflatedDistribution(
        dist.Poisson(x[0].exp()), gate=x[1].sigmoid()
    ),
    "ZeroInflatedNegativeBinomial": lambda x: dist.ZeroInflatedNegativeBinomial(
        x[0].exp(), logits=x[1], gate=x[2].sigmoid()
    ),
    "ZeroInflatedPoisson": lambda x: dist.ZeroInflatedPoisson(x[0].exp(), gate=x[1].sigmoid()),
}

#: Data of distributions that cannot be drawn.
DATA = {
    "GammaGaussianHMM": torch.tensor([[0.3, -0.2], [0.1, 0.8]]),
    "CoalescentTimesWithRate": torch.tensor([0.5, 1.5]),
    "GaussianMRF": torch.tensor([[0.3, -0.2]]),
    "GroupedNormalNormal": torch.tensor([0.3, -0.2, 0.8]),
    "LogNormalNegativeBinomial": torch.tensor(3.0),
    "VonMises3D": torch.tensor([0.6, 0.0, -0.8]),
    "GeneralizedPareto": torch.tensor(0.4),
    "DiscreteHMM": torch.tensor([0.3, -0.2]),
    "IndependentHMM": torch.tensor([[0.3, -0.2], [0.1, 0.8]]),
    "OneOneMatching": torch.tensor([1, 0]),
    "OneTwoMatching": torch.tensor([0, 0, 1, 1]),
    "SpanningTree": torch.tensor([[0, 1], [1, 2]]),
    "TruncatedPolyaGamma": torch.tensor(0.2),
}


#: Distributions that are in no batch, each with the reason.
LEFT_OUT = {
    "Delta": "a point has no density to compare; see test_log_density",
    "Empirical": "a list of draws; it has no parameters, and no density where it has no draw",
    "ExponentialFamily": "a base class",
    "GaussianScaleMixture": "its gradient fails in single traces too: Pyro writes into an output",
    "ImproperUniform": "flat, without parameters; see test_log_density",
    "LKJCorrCholesky": "deprecated; it is LKJCholesky",
    "LinearHMM": "it has a density under a reparametrisation only; see the test below",
    "Rejector": "its density is the user's",
    "Stable": "it has a density under a reparametrisation only; see the test below",
    "TorchDistribution": "a base class",
    "Unit": "a factor; see test_log_density",
}


def draw(name: str, distribution: Any) -> Tensor:
    if name in DATA:
        return DATA[name]
    torch.manual_seed(3)
    return distribution.sample()


def has_bijection(support: Any) -> bool:
    try:
        torch.distributions.biject_to(support)
    except NotImplementedError:
        return False
    return True


#: Distributions that are no priors here, each with the reason.
NO_PRIOR = {
    "GroupedNormalNormal": "Pyro says that its values are single numbers, which they are not",
    "GeneralizedPareto": "torch says that its support is an interval with an infinite end",
    **{
        name: "a likelihood of series, whose prior costs seconds to capture"
        for name in ("GammaGaussianHMM", "GaussianHMM", "GaussianMRF", "IndependentHMM")
    },
}


def is_distribution(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.distributions.Distribution)


def is_continuous(distribution: Any) -> bool:
    """Whether a distribution can be the prior of a site that a density has as a latent one."""
    return not distribution.support.is_discrete and has_bijection(distribution.support)


def check_batch(model: Callable[[], Any]) -> None:
    """Compares a batch with single traces."""
    density = LogDensity(model, batch_size=4)
    assert density.mode == "captured"
    alone = density.bind()
    alone._program = alone._evaluator.make_program(alone.inputs, 1, "loop")
    torch.manual_seed(1)
    z = density.initial + 0.5 * torch.randn(4, density.features)
    for found, right in zip(density.value_and_grad(z), alone.value_and_grad(z), strict=True):
        assert bool(right.isfinite().any())
        assert agree(found, right)


def test_every_distribution_is_in_the_table() -> None:
    names = {name for name in dist.__all__ if is_distribution(getattr(dist, name))}
    assert names == set(TABLE) | set(LEFT_OUT)


#: One of each kind of support, of parameters and of wrapper, and those that are evaluated anew.
KINDS = [
    *("Bernoulli", "Beta", "Binomial", "Categorical", "CoalescentTimes", "Dirichlet"),
    *("DirichletMultinomial", "DiscreteHMM", "ExpandedDistribution", "FoldedDistribution"),
    *("Gamma", "GeneralizedPareto", "Independent", "LKJCholesky", "LogNormalNegativeBinomial"),
    *("LowRankMultivariateNormal", "MaskedDistribution", "MaskedMixture", "MixtureSameFamily"),
    *("Multinomial", "MultivariateNormal", "NanMaskedNormal", "OneHotCategorical"),
    *("OneOneMatching", "OrderedLogistic", "Pareto", "Poisson", "ProjectedNormal"),
    *("RelaxedOneHotCategorical", "SpanningTree", "StableWithLogProb", "StudentT"),
    *("TransformedDistribution", "TruncatedPolyaGamma", "Uniform", "VonMises", "Wishart"),
    "ZeroInflatedPoisson",
]


@pytest.mark.parametrize("name", slow_but_for(KINDS, TABLE))
def test_a_batch_agrees_with_single_traces(name: str) -> None:
    make = TABLE[name]
    fixed = make(torch.full((3,), 0.1))
    data = draw(name, fixed)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("likelihood", make(x), obs=data)
        if name not in NO_PRIOR and is_continuous(fixed):
            pyro.sample("prior", make(torch.full((3,), 0.1)))

    check_batch(model)


def test_a_stable_distribution_by_its_reparametrisation() -> None:
    def model() -> None:
        shape = pyro.sample("shape", dist.Uniform(0.5, 1.5))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Stable(shape, 0.2, 1.0, 0.0), obs=SIGNS)

    check_batch(poutine.reparam(model, {"y": StableReparam()}))


def test_a_linear_hmm_by_its_reparametrisation() -> None:
    data = torch.tensor([[0.3, -0.2], [0.1, 0.8]])

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", hmm(x, dist.LinearHMM, functools.partial(dist.StudentT, 3.0)), obs=data)

    check_batch(poutine.reparam(model, {"y": LinearHMMReparam(obs=StudentTReparam())}))


def test_stable_densities_in_coordinates_that_pyro_has_wrong_are_refused():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        stable = dist.StableWithLogProb(1.7, 0.0, 1.0, loc, coords="S")
        pyro.sample("y", stable, obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="coords='S0'; site 'y' has 'S'"):
        LogDensity(model)
