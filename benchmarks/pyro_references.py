"""Posteriors of :mod:`benchmarks.pyro_models` and :mod:`benchmarks.pyro_sequences`, written once
more such that long chains answer: discrete and nuisance variables are summed out by hand, and
hierarchies are not centred.

None of this uses pyroflows, nor Pyro's enumeration: where an enumerated site is masked, NUTS and
``TraceEnum_ELBO`` of Pyro disagree, because only the former masks the site itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCES: dict[str, Reference] = {}


@dataclass(frozen=True)
class Reference:
    """Another way to write a posterior.

    Args:
        model: A Pyro model without discrete latents, which takes the arguments of the case and has
            every site that the scalars of the case need.
        prior_draws: Draws of the prior that are weighted by the likelihood, for posteriors that are
            not much narrower than their priors, and for those of several modes, between which
            chains do not move. With 0, NUTS runs.
    """

    model: Callable[..., Any]
    prior_draws: int = 0


def _reference(prior_draws: int = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters a reference under the name of its function, which is that of the case."""

    def enter(model: Callable[..., Any]) -> Callable[..., Any]:
        REFERENCES[model.__name__] = Reference(model, prior_draws)
        return model

    return enter


# Introductions and mixtures


@_reference()
def baseball(at_bats: Tensor, hits: Tensor) -> None:
    """Not centred."""
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(hits)), 1.0).to_event(1))
    alpha = pyro.deterministic("alpha", loc + scale * steps)
    pyro.factor("hits", (hits * alpha - at_bats * F.softplus(alpha)).sum())


@_reference(prior_draws=4_000_000)
def gaussian_mixture(data: Tensor) -> None:
    """Assignments summed out."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    z = (data[:, None] - locs) / scale
    terms = weights.log() - scale.log() - 0.5 * z.square()
    pyro.factor("data", terms.logsumexp(-1).sum())


@_reference(prior_draws=4_000_000)
def dirichlet_process(data: Tensor) -> None:
    """Assignments summed out."""
    beta = pyro.sample("beta", dist.Uniform(torch.zeros(3), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 5.0).to_event(1))
    first, second, third = beta.unbind(-1)
    rest = (1 - first) * (1 - second)
    weights = torch.stack([first, (1 - first) * second, rest * third, rest * (1 - third)])
    terms = weights.log() - 0.5 * (data[:, None] - mu).square()
    pyro.factor("data", terms.logsumexp(-1).sum())


@_reference()
def lda(words: Tensor) -> None:
    """Topics of words summed out."""
    documents = words.shape[1]
    topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.full((2, 4), 0.5)).to_event(1))
    shares = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(documents, 2)).to_event(1))
    counts = torch.stack([(words == word).sum(0) for word in range(4)], -1)
    pyro.factor("words", (counts * (shares @ topic_words).log()).sum())


# Capture and recapture


def _log_captures(captures: Tensor, survival: Tensor, recapture: Tensor) -> Tensor:
    """The probability of what follows each first capture, by the recursion over years.

    Args:
        captures: Who was captured when, of shape ``(animals, years)``.
        survival: Probabilities to survive into each year, which broadcast against them.
        recapture: The probability that a living animal is captured.
    """
    survival = survival.expand(captures.shape)
    known = captures.cumsum(-1) > captures
    alive, dead = torch.ones(len(captures)), torch.zeros(len(captures))
    for t in range(captures.shape[1]):
        seen, phi = captures[:, t], survival[:, t]
        caught = torch.where(seen == 1, recapture, 1 - recapture)
        dead = torch.where(known[:, t], (dead + alive * (1 - phi)) * (1 - seen), dead)
        alive = torch.where(known[:, t], alive * phi * caught, alive)
    return (alive + dead).log().sum()


def _probability(name: str) -> Tensor:
    return pyro.sample(name, dist.Uniform(0.0, 1.0))


@_reference(prior_draws=1_000_000)
def cjs_1(captures: Tensor) -> None:
    """One probability of survival."""
    pyro.factor("captures", _log_captures(captures, _probability("phi"), _probability("rho")))


@_reference(prior_draws=1_000_000)
def cjs_2(captures: Tensor) -> None:
    """Survival differs from year to year."""
    rho = _probability("rho")
    years = [_probability(f"phi_{t}") for t in range(1, captures.shape[1])]
    survival = torch.stack([torch.ones(()), *years])
    pyro.factor("captures", _log_captures(captures, survival, rho))


@_reference(prior_draws=1_000_000)
def cjs_3(captures: Tensor) -> None:
    """Survival is random from year to year, not centred."""
    mean, rho = _probability("phi_mean"), _probability("rho")
    sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
    years = captures.shape[1]
    steps = pyro.sample("steps", dist.Normal(torch.zeros(years), 1.0).to_event(1))
    logits = pyro.deterministic("phi_logit", mean.logit() + sigma * steps)
    pyro.factor("captures", _log_captures(captures, logits.sigmoid(), rho))


@_reference(prior_draws=1_000_000)
def cjs_4(captures: Tensor) -> None:
    """Survival is random from animal to animal, not centred."""
    mean, rho = _probability("phi_mean"), _probability("rho")
    sigma = pyro.sample("phi_sigma", dist.HalfNormal(1.0))
    steps = dist.Normal(torch.zeros(len(captures)), 1.0).to_event(1)
    logits = mean.logit() + sigma * pyro.sample("phi_logit_decentered", steps)
    pyro.factor("captures", _log_captures(captures, logits.sigmoid()[:, None], rho))


@_reference(prior_draws=1_000_000)
def cjs_5(captures: Tensor, sex: Tensor) -> None:
    """Two groups of animals."""
    male, female = _probability("phi_male"), _probability("phi_female")
    survival = torch.where(sex == 1, male, female)[:, None]
    pyro.factor("captures", _log_captures(captures, survival, _probability("rho")))


# Hidden Markov models


def _log_forward(transition: Tensor, emissions: Tensor, lengths: Tensor) -> Tensor:
    """The log likelihood of sequences that start from the first state, by the forward algorithm.

    Args:
        transition: Probabilities from state to state, of shape ``(states, states)``.
        emissions: Log densities in each state, of shape ``(sequences, times, states)``.
        lengths: How many times of each sequence count, of shape ``(sequences,)``.
    """
    log_transition = transition.log()
    forward = log_transition[0] + emissions[:, 0]
    for t in range(1, emissions.shape[1]):
        moved = (forward[:, :, None] + log_transition).logsumexp(1) + emissions[:, t]
        forward = torch.where((t < lengths)[:, None], moved, forward)
    return forward.logsumexp(-1).sum()


def _log_notes(rates: Tensor, sequences: Tensor) -> Tensor:
    """Log densities of notes, of shape ``(sequences, times, states)``, from rates of shape
    ``(states, notes)``."""
    return _log_notes_apart(rates, sequences).sum(-1)


def _log_notes_apart(rates: Tensor, sequences: Tensor) -> Tensor:
    sounds = sequences[:, :, None]
    return sounds * rates.log() + (1 - sounds) * (1 - rates).log()


def _transition(name: str, *batch: int) -> Tensor:
    prior = torch.tensor([[1.0, 0.1], [0.1, 1.0]]).expand(*batch, 2, 2)
    return pyro.sample(name, dist.Dirichlet(prior).to_event(1 + len(batch)))


def _rates(a: Tensor) -> Tensor:
    """Rates whose prior is Beta(8, 2), Beta(2, 8) or uniform, where `a` is 8, 2 or 1."""
    b = torch.where(a == 1, a, 10 - a)
    return pyro.sample("probs_y", dist.Beta(a, b).to_event(a.dim()))


def _one_chain(sequences: Tensor, lengths: Tensor) -> None:
    """One hidden chain."""
    transition, rates = _transition("probs_x"), _rates(torch.tensor([[8.0, 1, 1], [2, 1, 1]]))
    pyro.factor("notes", _log_forward(transition, _log_notes(rates, sequences), lengths))


REFERENCES["hmm_0"] = REFERENCES["hmm_1"] = Reference(_one_chain, prior_draws=2_000_000)


@_reference()
def hmm_2(sequences: Tensor, lengths: Tensor) -> None:
    """A note depends on whether it sounded before."""
    transition = _transition("probs_x")
    rates = _rates(torch.tensor([[[8.0, 1, 1]] * 2, [[2, 1, 1]] * 2]))
    before = F.pad(sequences, (0, 0, 1, 0))[:, :-1, None]
    silent, sounded = (_log_notes_apart(rates[:, y], sequences) for y in (0, 1))
    emissions = (before * sounded + (1 - before) * silent).sum(-1)
    pyro.factor("notes", _log_forward(transition, emissions, lengths))


def _rates_of_two() -> Tensor:
    """Rates in the four states of two chains, of shape ``(4, 3)``."""
    return _rates(torch.tensor([[[8.0, 8, 1], [8, 2, 1]], [[2, 8, 1], [2, 2, 1]]])).flatten(0, 1)


@_reference(prior_draws=2_000_000)
def hmm_3(sequences: Tensor, lengths: Tensor) -> None:
    """Two chains are one of four states."""
    transition = torch.kron(_transition("probs_w"), _transition("probs_x"))
    emissions = _log_notes(_rates_of_two(), sequences)
    pyro.factor("notes", _log_forward(transition, emissions, lengths))


@_reference(prior_draws=2_000_000)
def hmm_4(sequences: Tensor, lengths: Tensor) -> None:
    """Two chains, of which the second depends on where the first has gone."""
    first, second = _transition("probs_w"), _transition("probs_x", 2)
    transition = torch.einsum("wv,vxy->wxvy", first, second).reshape(4, 4)
    emissions = _log_notes(_rates_of_two(), sequences)
    pyro.factor("notes", _log_forward(transition, emissions, lengths))


@_reference()
def tracking(observations: Tensor) -> None:
    """Names of detections summed out."""
    start = pyro.sample("start", dist.Normal(torch.tensor([0.0, 4.0]), 1.0).to_event(1))
    speed = pyro.sample("speed", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    times = torch.linspace(0.0, 1.0, len(observations))
    positions = start + speed * times[:, None]
    z = (observations[:, :, None] - positions[:, None]) / 0.2
    pyro.factor("detections", (-0.5 * z.square()).logsumexp(-1).sum())


# Time series


@_reference()
def forecasting_1(data: Tensor) -> None:
    """The bias summed into the levels of the days."""
    trend = pyro.sample("trend", dist.LogNormal(0.0, 1.0))
    sigma = pyro.sample("noise_scale", dist.LogNormal(-2.0, 3.0))
    prior = dist.MultivariateNormal(torch.zeros(7), 25.0 * torch.eye(7) + 100.0)
    levels = pyro.sample("levels", prior)
    days = torch.arange(len(data))
    z = (data - levels[days % 7] - trend * days / len(data)) / sigma
    pyro.factor("data", (-sigma.log() - 5.5 * (z.square() / 10).log1p()).sum())


@_reference(prior_draws=1_000_000)
def forecasting_2(data: Tensor) -> None:
    """The walk summed out: its covariance at two times is the variance up to the earlier."""
    drift_scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))
    sigma = pyro.sample("noise_scale", dist.LogNormal(-2.0, 1.0))
    times = torch.arange(1.0, len(data) + 1)
    walk = drift_scale.square() * torch.minimum(times[:, None], times)
    pyro.factor("data", _log_normal(data, walk + sigma.square() * torch.eye(len(data))))


@_reference(prior_draws=1_000_000)
def gaussian_hmm(data: Tensor) -> None:
    """The level summed out: a walk from a normal start."""
    q = pyro.sample("q", dist.LogNormal(-1.0, 1.0))
    r = pyro.sample("r", dist.LogNormal(-1.0, 1.0))
    times = torch.arange(1.0, len(data) + 1)
    level = 1.0 + q.square() * torch.minimum(times[:, None], times)
    covariance = level + r.square() * torch.eye(len(data))
    pyro.factor("data", _log_normal(data.squeeze(-1), covariance))


def _log_normal(data: Tensor, covariance: Tensor) -> Tensor:
    """The log density of a centred normal distribution but for a constant."""
    tril = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(tril, data[:, None], upper=False)
    return -0.5 * whitened.square().sum() - tril.diagonal().log().sum()


@_reference()
def stable(returns: Tensor) -> None:
    """The density by the inverse Fourier transform of exp(-t^stability), with t = u^4 such that
    the integrand is smooth at zero."""
    stability = pyro.sample("stability", dist.Uniform(1.2, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    u = torch.linspace(0.0, 2.1, 1001)[1:]
    t = u**4
    weights = 4 * u**3 * (u[1] - u[0]) * (-(t**stability)).exp()
    waves = torch.cos((returns - loc)[:, None] / scale * t)
    pyro.factor("returns", (((waves * weights).sum(-1) / math.pi).log() - scale.log()).sum())
