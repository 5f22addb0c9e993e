"""Models of Pyro's examples and tutorials, each written anew, on simulated data of a size that long
chains can answer. Those of sequences are in :mod:`benchmarks.pyro_sequences`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

Draws = Mapping[str, Tensor]
Moments = dict[str, tuple[float, float]]

MODELS: dict[str, Callable[[], Case]] = {}


@dataclass(frozen=True)
class Case:
    """A model, its arguments, and the numbers by which its posterior is compared.

    Args:
        model: The Pyro model.
        args: Its arguments.
        exact: Mean and standard deviation of scalars by a closed form; empty where long chains
            answer.
        scalars: From draws by site, of shape ``(n, *shape)``, to scalars by name, of shape
            ``(n,)``: all entries of all sites by default. Models whose labels can be switched give
            numbers that do not depend on them.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    exact: Moments = field(default_factory=dict)
    scalars: Callable[[Draws], dict[str, Tensor]] | None = None


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Enters a case under the name of its function; its data are drawn with a fixed seed."""

    def seeded() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(make.__name__))
            return make()

    MODELS[make.__name__] = seeded
    return seeded


def only(*names: str) -> Callable[[Draws], dict[str, Tensor]]:
    """Returns a function that takes all entries of some sites."""
    return lambda draws: entries({name: draws[name] for name in names})


def logs(*names: str) -> Callable[[Draws], dict[str, Tensor]]:
    """Returns a function that takes the logarithms of all entries of some positive sites."""
    return lambda draws: entries({name: draws[name].log() for name in names})


def entries(draws: Draws) -> dict[str, Tensor]:
    """Takes all entries of all sites apart.

    Args:
        draws: Draws by site, of shape ``(n, *shape)``.

    Returns:
        Tensors of shape ``(n,)`` by name, such as ``theta[0]``.
    """
    scalars = {}
    for name, values in draws.items():
        flat = values.reshape(len(values), -1)
        for i in range(flat.shape[1]):
            scalars[name if flat.shape[1] == 1 else f"{name}[{i}]"] = flat[:, i]
    return scalars


def _normal(precision: float, weighed: float) -> tuple[float, float]:
    return weighed / precision, precision**-0.5


# Introductions


@case
def coin() -> Case:
    """SVI Part I: the fairness of a coin."""
    tosses = torch.tensor([1.0] * 6 + [0.0] * 4)

    def model(data: Tensor) -> None:
        fairness = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(fairness), obs=data[i])

    a, b = 16.0, 14.0
    sd = math.sqrt(a * b / (a + b) ** 2 / (a + b + 1))
    return Case(model, (tosses,), {"latent_fairness": (a / (a + b), sd)})


@case
def weighing() -> Case:
    """An introduction to inference: a weight, measured on an unreliable scale."""

    def scale(guess: float) -> None:
        weight = pyro.sample("weight", dist.Normal(guess, 1.0))
        pyro.sample("measurement", dist.Normal(weight, 0.75), obs=torch.tensor(9.5))

    precision = 1 + 0.75**-2
    return Case(scale, (8.5,), {"weight": _normal(precision, 8.5 + 9.5 / 0.75**2)})


@case
def terrain() -> Case:
    """Bayesian regression: terrain ruggedness, Africa, and their interaction."""
    n = 170
    ruggedness, africa = torch.rand(n) * 6, (torch.rand(n) < 0.3).float()
    mean = 9.2 - 1.9 * africa - 0.2 * ruggedness + 0.35 * africa * ruggedness
    log_gdp = mean + 0.95 * torch.randn(n)

    def model(is_cont_africa: Tensor, ruggedness: Tensor, log_gdp: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 10.0))
        b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
        b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
        b_ar = pyro.sample("bAR", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = a + b_a * is_cont_africa + b_r * ruggedness + b_ar * is_cont_africa * ruggedness
        with pyro.plate("data", len(ruggedness)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)

    return Case(model, (africa, ruggedness, log_gdp))


@case
def schools() -> Case:
    """Eight schools with a half-Cauchy scale, not centred."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(sigma: Tensor, y: Tensor) -> None:
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10 * torch.ones(1)).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(25 * torch.ones(1)).to_event(1))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)

    return Case(model, (sigma, y))


@case
def baseball() -> Case:
    """Baseball: batting averages, partially pooled on the scale of logits."""
    players, at_bats = 18, torch.full((18,), 45.0)
    hits = dist.Binomial(45, torch.sigmoid(-1.1 + 0.25 * torch.randn(players))).sample()

    def model(at_bats: Tensor, hits: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("num_players", len(at_bats)):
            alpha = pyro.sample("alpha", dist.Normal(loc, scale))
            pyro.sample("hits", dist.Binomial(at_bats, logits=alpha), obs=hits)

    return Case(model, (at_bats, hits), scalars=only("loc", "scale", "alpha"))


@case
def inclined_plane() -> Case:
    """Inclined plane: the friction of a block, from the times that it takes to slide down."""
    times = _sliding_time(torch.tensor(0.12)) + 0.02 * torch.randn(20)

    def model(times: Tensor) -> None:
        mu = pyro.sample("mu", dist.Uniform(0.0, 0.5))
        time = _sliding_time(mu)
        with pyro.plate("observations", len(times)):
            pyro.sample("obs", dist.Normal(time, 0.02), obs=times)

    return Case(model, (times,))


def _sliding_time(friction: Tensor) -> Tensor:
    """The time to slide two metres down a slope of 30 degrees."""
    acceleration = 9.8 * (math.sin(math.pi / 6) - friction * math.cos(math.pi / 6))
    return (4.0 / acceleration).sqrt()


@case
def working_memory() -> Case:
    """Designing adaptive experiments: how long a sequence a participant remembers."""
    lengths = torch.tensor([5.0, 7.0, 9.0, 6.0, 8.0, 7.0, 10.0, 3.0])
    correct = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0])

    def model(lengths: Tensor, correct: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(7.0, 2.0))
        with pyro.plate("rounds", len(lengths)):
            pyro.sample("y", dist.Bernoulli(logits=theta - lengths), obs=correct)

    return Case(model, (lengths, correct))


# Regressions


@case
def ordinal() -> Case:
    """Ordinal regression with ordered cut points."""
    x = torch.randn(50)
    latent = 1.2 * x + dist.Normal(0.0, 1.0).sample((50,)) * 1.6
    y = (latent[:, None] > torch.tensor([-1.0, 1.0])).sum(-1)

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("cuts", 2):
            raw = pyro.sample("c_raw", dist.Normal(torch.tensor([-0.5, 0.5]), 1.0))
        cuts = torch.stack([raw[..., 0], raw[..., 0] + raw[..., 1].exp()], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OrderedLogistic(b * x, cuts), obs=y)

    return Case(model, (x, y))


@case
def sparse_regression() -> Case:
    """Sparse regression: a Gaussian process with the kernel of all pairwise interactions."""
    n, p = 30, 4
    x = torch.randn(n, p)
    y = x[:, 0] + 0.7 * x[:, 1] * x[:, 2] + 0.2 * torch.randn(n)

    def model(x: Tensor, y: Tensor) -> None:
        n, p = x.shape
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        eta1 = pyro.sample("eta1", dist.HalfCauchy(1.0))
        slopes = pyro.sample("lambda", dist.HalfCauchy(torch.ones(p)).to_event(1))
        m_squared = pyro.sample("msq", dist.InverseGamma(3.0, 2.0))
        kappa = m_squared.sqrt() * slopes / (m_squared + (eta1 * slopes).square()).sqrt()
        products = (kappa * x) @ (kappa * x).T
        k = 0.5 * eta1**2 * (1.0 + products).square() - 0.5 * eta1**2 + torch.eye(n) * 1e-4
        noise = sigma.square() * torch.eye(n)
        pyro.sample(
            "y", dist.MultivariateNormal(torch.zeros(n), covariance_matrix=k + noise), obs=y
        )

    return Case(model, (x, y), scalars=logs("sigma", "eta1", "lambda", "msq"))


@case
def gp_regression() -> Case:
    """Gaussian processes: the posterior of a kernel's three numbers."""
    x = torch.linspace(0.0, 5.0, 20)
    y = 0.5 * (3 * x).sin() + 0.2 * torch.randn(20)

    def model(x: Tensor, y: Tensor) -> None:
        variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
        lengthscale = pyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-2.0, 1.0))
        distance = (x[:, None] - x) / lengthscale
        k = variance * (-0.5 * distance.square()).exp() + (noise + 1e-6) * torch.eye(len(x))
        tril = torch.linalg.cholesky(k)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=tril), obs=y)

    return Case(model, (x, y), scalars=logs("variance", "lengthscale", "noise"))


@case
def lkj() -> Case:
    """LKJ: a covariance, taken apart into scales and a correlation."""
    d = 3
    tril = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.2, 0.9]])
    y = torch.randn(80, d) @ tril.T

    def model(y: Tensor) -> None:
        d, n = y.shape[1], y.shape[0]
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(d)).to_event(1))
        corr = pyro.sample("L_omega", dist.LKJCholesky(d, torch.ones(())))
        tril = torch.diag_embed(theta.sqrt()) @ corr
        with pyro.plate("observations", n):
            pyro.sample("obs", dist.MultivariateNormal(torch.zeros(d), scale_tril=tril), obs=y)

    def scalars(draws: Draws) -> dict[str, Tensor]:
        corr = draws["L_omega"] @ draws["L_omega"].mT
        rows, columns = torch.tril_indices(d, d, -1)
        return {
            **only("theta")(draws),
            **{
                f"corr[{int(i)}, {int(j)}]": corr[:, i, j]
                for i, j in zip(rows, columns, strict=True)
            },
        }

    return Case(model, (y,), scalars=scalars)


# Mixtures


@case
def gaussian_mixture() -> Case:
    """Gaussian mixture model: two clusters of five points."""
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    def scalars(draws: Draws) -> dict[str, Tensor]:
        locs, order = draws["locs"].sort(-1)
        weight = draws["weights"].gather(-1, order)[:, 0]
        return {
            "low": locs[:, 0],
            "high": locs[:, 1],
            "weight": weight,
            "scale": draws["scale"].log(),
        }

    return Case(model, (data,), scalars=scalars)


@case
def toy_mixture() -> Case:
    """Toy mixture model with discrete enumeration: events under two pairs of rates."""
    kinds = dist.Bernoulli(0.7).sample((40,)).long()
    rates = torch.tensor([[0.4, 0.9], [0.8, 0.2]])
    events = dist.Bernoulli(rates[kinds]).sample()

    def model(events: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("kinds", 2):
            first = pyro.sample(
                "first", dist.Beta(torch.tensor([2.0, 6.0]), torch.tensor([6.0, 2.0]))
            )
            second = pyro.sample("second", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(events)):
            kind = pyro.sample("kind", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            rate = torch.stack([first[kind.long()], second[kind.long()]], -1)
            pyro.sample("events", dist.Bernoulli(rate).to_event(1), obs=events)

    return Case(model, (events,))


@case
def dirichlet_process() -> Case:
    """Dirichlet process mixtures: sticks, broken off at four clusters of the line."""
    data = torch.cat([torch.randn(20) - 4, torch.randn(15) + 4])
    sticks = 4

    def model(data: Tensor) -> None:
        with pyro.plate("sticks", sticks - 1):
            beta = pyro.sample("beta", dist.Beta(1.0, 1.0))
        with pyro.plate("clusters", sticks):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        rest = F.pad((1 - beta).cumprod(-1), (1, 0), value=1.0)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(F.pad(beta, (0, 1), value=1.0) * rest))
            pyro.sample("obs", dist.Normal(mu[z], 1.0), obs=data)

    def scalars(draws: Draws) -> dict[str, Tensor]:
        beta, mu = draws["beta"], draws["mu"]
        weights = F.pad(beta, (0, 1), value=1.0) * F.pad((1 - beta).cumprod(-1), (1, 0), value=1.0)
        left = (weights * (mu < 0)).sum(-1)
        return {"mass on the left": left, "mean": (weights * mu).sum(-1)}

    return Case(model, (data,), scalars=scalars)


@case
def lda() -> Case:
    """Latent Dirichlet allocation, small: two topics over four words, ten documents."""
    topics = torch.tensor([[0.7, 0.2, 0.05, 0.05], [0.05, 0.05, 0.2, 0.7]])
    shares = torch.rand(10)
    kinds = dist.Bernoulli(shares.expand(12, 10)).sample().long()
    words = dist.Categorical(topics[kinds]).sample()

    def model(words: Tensor) -> None:
        with pyro.plate("topics", 2):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(4) / 2))
        with pyro.plate("documents", words.shape[1]):
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", words.shape[0]):
                topic = pyro.sample(
                    "word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"}
                )
                pyro.sample("doc_words", dist.Categorical(topic_words[topic]), obs=words)

    def scalars(draws: Draws) -> dict[str, Tensor]:
        first = draws["topic_words"][..., 0]
        named = first.argmax(-1)
        rows = torch.arange(len(named))
        shares = draws["doc_topics"][rows, :, named]
        return {
            "first word": first[rows, named],
            **{f"share[{i}]": shares[:, i] for i in range(4)},
        }

    return Case(model, (words,), scalars=scalars)
