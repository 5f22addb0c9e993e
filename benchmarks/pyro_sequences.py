"""Models of sequences from Pyro's examples and tutorials, written as theirs are: loops over time,
masks for sequences of unequal length, enumeration by ``infer``, handlers that reparametrise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from benchmarks.pyro_models import Case, case, logs, only

PARALLEL = {"enumerate": "parallel"}


# Capture and recapture: the models of Cormack, Jolly and Seber


def _captures(animals: int = 40, years: int = 6) -> Tensor:
    """Who was captured when, of shape ``(animals, years)``; each is captured once at least."""
    alive = torch.ones(animals)
    first = torch.arange(animals) % (years - 1)
    captured = torch.zeros(animals, years)
    for t in range(years):
        alive = torch.where(first < t, alive * (torch.rand(animals) < 0.8), alive)
        seen = (torch.rand(animals) < 0.6) & (first < t)
        captured[:, t] = torch.where(first == t, 1.0, seen * alive)
    return captured


def _follow(
    animals: pyro.plate, captures: Tensor, survival: Callable[[int], Any], rho: Tensor
) -> None:
    """Follows animals from their first captures on.

    Args:
        animals: Their plate.
        captures: Who was captured when, of shape ``(animals, years)``.
        survival: From a year to the probability to survive into it.
        rho: The probability that a living animal is captured.
    """
    n, years = captures.shape
    z, first = torch.ones(n), torch.zeros(n).bool()
    for t in pyro.markov(range(years)):
        phi = survival(t)
        with animals, poutine.mask(mask=first):
            alive = torch.where(first, phi * z, torch.ones(()))
            z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer=PARALLEL)
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=captures[:, t])
        first = first | captures[:, t].bool()


@case
def cjs_1() -> Case:
    """Capture and recapture 1: one probability of survival, one of recapture."""

    def model(captures: Tensor) -> None:
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        animals = pyro.plate("animals", len(captures), dim=-1)
        _follow(animals, captures, lambda t: phi, rho)

    return Case(model, (_captures(),))


@case
def cjs_2() -> Case:
    """Capture and recapture 2: survival differs from year to year."""

    def survival(t: int) -> Any:
        return pyro.sample(f"phi_{t}", dist.Uniform(0.0, 1.0)) if t > 0 else 1.0

    def model(captures: Tensor) -> None:
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        animals = pyro.plate("animals", len(captures), dim=-1)
        _follow(animals, captures, survival, rho)

    return Case(model, (_captures(),))


@case
def cjs_3() -> Case:
    """Capture and recapture 3: the logit of survival is random from year to year."""

    def model(captures: Tensor) -> None:
        phi_mean = pyro.sample("phi_mean", dist.Uniform(0.0, 1.0))
        phi_sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        phi_logit_mean = (phi_mean / (1 - phi_mean)).log()

        def survival(t: int) -> Tensor:
            logit = pyro.sample(f"phi_logit_{t}", dist.Normal(phi_logit_mean, phi_sigma))
            return logit.sigmoid()

        animals = pyro.plate("animals", len(captures), dim=-1)
        _follow(animals, captures, survival, rho)

    return Case(model, (_captures(),), scalars=only("phi_mean", "phi_sigma", "rho"))


@case
def cjs_4() -> Case:
    """Capture and recapture 4: animals differ in survival, integrated by a latent for each."""

    def model(captures: Tensor) -> None:
        phi_mean = pyro.sample("phi_mean", dist.Uniform(0.0, 1.0))
        phi_sigma = pyro.sample("phi_sigma", dist.HalfNormal(1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        logit_mean = (phi_mean / (1 - phi_mean)).log()
        animals = pyro.plate("animals", len(captures), dim=-1)
        with animals:
            logit = pyro.sample("phi_logit", dist.Normal(logit_mean, phi_sigma))
        _follow(animals, captures, lambda t: logit.sigmoid(), rho)

    noncentred = poutine.reparam(model, {"phi_logit": LocScaleReparam(0.0)})
    return Case(noncentred, (_captures(),), scalars=only("phi_mean", "phi_sigma", "rho"))


@case
def cjs_5() -> Case:
    """Capture and recapture 5: two groups of animals, with effects of years and groups."""
    captures = _captures()
    sex = torch.arange(len(captures)) % 2

    def model(captures: Tensor, sex: Tensor) -> None:
        phi_male = pyro.sample("phi_male", dist.Uniform(0.0, 1.0))
        phi_female = pyro.sample("phi_female", dist.Uniform(0.0, 1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        phi = sex * phi_male + (1.0 - sex) * phi_female
        animals = pyro.plate("animals", len(captures), dim=-1)
        _follow(animals, captures, lambda t: phi, rho)

    return Case(model, (captures, sex))


# Hidden Markov models of sequences of notes


def _notes(sequences: int = 5, times: int = 10, notes: int = 3) -> tuple[Tensor, Tensor]:
    """Sequences of zeros and ones, of shape ``(sequences, times, notes)``, and their lengths."""
    stays = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    rates = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.7, 0.8]])[:, :notes]
    lengths = torch.randint(times // 2, times + 1, (sequences,))
    x = torch.zeros(sequences, dtype=torch.long)
    steps = []
    for _ in range(times):
        x = dist.Categorical(stays[x]).sample()
        steps.append(dist.Bernoulli(rates[x]).sample())
    return torch.stack(steps, 1), lengths


def _transitions(states: int = 2) -> Tensor:
    """The transition matrix, whose prior prefers to stay."""
    return pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(states) + 0.1).to_event(1))


def _emissions(notes: int, states: int = 2) -> Tensor:
    """The rates of the notes in each state, a priori falling from state to state for the first
    note, so that states have names."""
    a = torch.ones(states, notes)
    b = torch.ones(states, notes)
    a[:, 0], b[:, 0] = torch.tensor([8.0, 2.0]), torch.tensor([2.0, 8.0])
    return pyro.sample("probs_y", dist.Beta(a, b).to_event(2))


def _emissions_of_two(notes: int) -> Tensor:
    """The rates of the notes in each pair of states of two chains: a priori the first note falls
    with the state of the first chain, and the second note with that of the second."""
    a = torch.ones(2, 2, notes)
    a[0, :, 0], a[1, :, 0], a[:, 0, 1], a[:, 1, 1] = 8.0, 2.0, 8.0, 2.0
    b = torch.ones(2, 2, notes)
    b[0, :, 0], b[1, :, 0], b[:, 0, 1], b[:, 1, 1] = 2.0, 8.0, 2.0, 8.0
    return pyro.sample("probs_y", dist.Beta(a, b).to_event(3))


@case
def hmm_0() -> Case:
    """HMM 0: one sequence after the other, each to its own length."""
    sequences, lengths = _notes()

    def model(sequences: Tensor, lengths: Tensor) -> None:
        notes = sequences.shape[2]
        probs_x, probs_y = _transitions(), _emissions(notes)
        for i in pyro.plate("sequences", len(sequences)):
            length = int(lengths[i])
            x = 0
            for t in pyro.markov(range(length)):
                x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with pyro.plate(f"notes_{i}_{t}", notes, dim=-1):
                    rates = probs_y[x.squeeze(-1)]
                    pyro.sample(f"y_{i}_{t}", dist.Bernoulli(rates), obs=sequences[i, t])

    return Case(model, (sequences[:2], lengths[:2]))


@case
def hmm_1() -> Case:
    """HMM 1: all sequences at a time, with masks after their ends."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        notes = sequences.shape[2]
        probs_x, probs_y = _transitions(), _emissions(notes)
        tones = pyro.plate("notes", notes, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2):
            x = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones:
                        rates = probs_y[x.squeeze(-1)]
                        pyro.sample(f"y_{t}", dist.Bernoulli(rates), obs=sequences[:, t])

    return Case(model, _notes())


@case
def hmm_2() -> Case:
    """HMM 2: a note depends on whether it sounded before, too."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        notes = sequences.shape[2]
        probs_x = _transitions()
        a = torch.ones(2, 2, notes)
        a[0, :, 0], a[1, :, 0] = 8.0, 2.0
        probs_y = pyro.sample("probs_y", dist.Beta(a, a.flip(0)).to_event(3))
        tones = pyro.plate("notes", notes, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2):
            x, y = 0, torch.zeros(len(sequences), notes).long()
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones as tone:
                        rates = probs_y[x, y, tone]
                        y = pyro.sample(f"y_{t}", dist.Bernoulli(rates), obs=sequences[:, t]).long()

    return Case(model, _notes())


@case
def hmm_3() -> Case:
    """HMM 3: two hidden chains that do not depend on each other."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        notes = sequences.shape[2]
        stay = 0.9 * torch.eye(2) + 0.1
        probs_w = pyro.sample("probs_w", dist.Dirichlet(stay).to_event(1))
        probs_x = pyro.sample("probs_x", dist.Dirichlet(stay).to_event(1))
        probs_y = _emissions_of_two(notes)
        tones = pyro.plate("notes", notes, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2):
            w = x = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones as tone:
                        rates = probs_y[w, x, tone]
                        pyro.sample(f"y_{t}", dist.Bernoulli(rates), obs=sequences[:, t])

    return Case(model, _notes(4, 6))


@case
def hmm_4() -> Case:
    """HMM 4: two hidden chains, of which the second depends on the first."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        notes = sequences.shape[2]
        stay = 0.9 * torch.eye(2) + 0.1
        probs_w = pyro.sample("probs_w", dist.Dirichlet(stay).to_event(1))
        probs_x = pyro.sample("probs_x", dist.Dirichlet(stay.expand(2, 2, 2)).to_event(2))
        probs_y = _emissions_of_two(notes)
        tones = pyro.plate("notes", notes, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2):
            w, x = torch.zeros(()).long(), torch.zeros(()).long()
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[w, x]), infer=PARALLEL)
                    with tones as tone:
                        rates = probs_y[w, x, tone]
                        pyro.sample(f"y_{t}", dist.Bernoulli(rates), obs=sequences[:, t])

    return Case(model, _notes(4, 6))


@case
def mixed_hmm() -> Case:
    """Mixed-effect HMM, small: animals of two groups that forage or rest, with effects of both."""
    groups, animals, times = 2, 3, 8
    steps = dist.Gamma(2.0, 1.0).sample((times, animals, groups))

    def model(steps: Tensor) -> None:
        times, animals, groups = steps.shape
        stay = pyro.sample("stay", dist.Normal(1.0, 1.0).expand([2]).to_event(1))
        group_scale = pyro.sample("group_scale", dist.HalfNormal(1.0))
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor([-0.5, 1.0]), 0.5).to_event(1))
        with pyro.plate("groups", groups, dim=-1):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            with pyro.plate("animals", animals, dim=-2):
                y = torch.zeros(()).long()
                for t in pyro.markov(range(times)):
                    stays = torch.sigmoid(stay[y] + group_scale * effect)
                    forages = torch.where(y == 0, 1 - stays, stays)
                    y = pyro.sample(f"y_{t}", dist.Bernoulli(forages), infer=PARALLEL).long()
                    pyro.sample(f"step_{t}", dist.Gamma(2.0, rate[y]), obs=steps[t])

    return Case(model, (steps,), scalars=only("stay", "group_scale", "rate"))


@case
def tracking() -> Case:
    """Tracking an unknown number of objects, small: two on lines, whose detections have no names."""
    times = torch.linspace(0.0, 1.0, 8)
    seen = torch.stack([1 + 2 * times, 3 - 1.5 * times], -1) + 0.15 * torch.randn(8, 2)
    shuffled = torch.where((torch.rand(8) < 0.5)[:, None], seen, seen.flip(-1))

    def model(observations: Tensor) -> None:
        start = pyro.sample("start", dist.Normal(torch.tensor([0.0, 4.0]), 1.0).to_event(1))
        speed = pyro.sample("speed", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        for t in range(len(observations)):
            positions = start + speed * times[t]
            with pyro.plate(f"detections_{t}", 2):
                which = pyro.sample(f"which_{t}", dist.Categorical(torch.ones(2) / 2))
                at = dist.Normal(positions[which], 0.2)
                pyro.sample(f"seen_{t}", at, obs=observations[t])

    return Case(model, (shuffled,))


# Time series


@case
def forecasting_1() -> Case:
    """Forecasting I: a linear trend and a season of a week."""
    n = 42
    days = torch.arange(n) % 7
    season = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0, -1.0, -1.0])
    data = 0.05 * torch.arange(n) + season[days] + 0.3 * torch.randn(n)

    def model(data: Tensor) -> None:
        time = torch.arange(float(len(data))) / len(data)
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        trend = pyro.sample("trend", dist.LogNormal(0.0, 1.0))
        with pyro.plate("day_of_week", 7):
            seasonal = pyro.sample("seasonal", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("noise_scale", dist.LogNormal(-2.0, 3.0))
        prediction = bias + trend * time + seasonal[torch.arange(len(data)) % 7]
        with pyro.plate("time", len(data)):
            pyro.sample("residual", dist.StudentT(10.0, prediction, sigma), obs=data)

    return Case(model, (data,), scalars=only("trend", "noise_scale"))


@case
def forecasting_2() -> Case:
    """Forecasting I, second model: a random walk, reparametrised as the tutorial does."""
    data = (0.3 * torch.randn(25)).cumsum(0) + 0.2 * torch.randn(25)

    def model(data: Tensor) -> None:
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))
        sigma = pyro.sample("noise_scale", dist.LogNormal(-2.0, 1.0))
        with pyro.plate("time", len(data)):
            drift = pyro.sample("drift", dist.Normal(torch.zeros(()), drift_scale))
            pyro.sample("obs", dist.Normal(drift.cumsum(-1), sigma), obs=data)

    reparametrised = poutine.reparam(model, {"drift": LocScaleReparam()})
    return Case(reparametrised, (data,), scalars=logs("drift_scale", "noise_scale"))


@case
def gaussian_hmm() -> Case:
    """State space models: a local level and its trend, integrated out by GaussianHMM."""
    level = (0.3 * torch.randn(30)).cumsum(0)
    data = (level + 0.4 * torch.randn(30)).unsqueeze(-1)

    def model(data: Tensor) -> None:
        q = pyro.sample("q", dist.LogNormal(-1.0, 1.0))
        r = pyro.sample("r", dist.LogNormal(-1.0, 1.0))
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        walk = dist.Normal(torch.zeros(1), q.unsqueeze(-1)).to_event(1)
        noise = dist.Normal(torch.zeros(1), r.unsqueeze(-1)).to_event(1)
        one = torch.eye(1)
        hmm = dist.GaussianHMM(start, one, walk, one, noise, duration=len(data))
        pyro.sample("obs", hmm, obs=data)

    return Case(model, (data,), scalars=logs("q", "r"))


@case
def stable() -> Case:
    """Stochastic volatility's distribution: returns that are stable, scored by their density."""
    returns = dist.Stable(1.7, 0.1, 0.5, 0.1).sample((60,))

    def model(returns: Tensor) -> None:
        stability = pyro.sample("stability", dist.Uniform(1.2, 2.0))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("time", len(returns)):
            pyro.sample("r", dist.StableWithLogProb(stability, 0.0, scale, loc), obs=returns)

    return Case(model, (returns,))


@case
def sir() -> Case:
    """Epidemiological models: a deterministic SIR model under overdispersed counts of cases."""
    population, days = 1000.0, 25

    def cases(r0: Tensor, recovery: Tensor) -> Tensor:
        s, i = torch.full_like(r0, population - 5.0), torch.full_like(r0, 5.0)
        new = []
        for _ in range(days):
            infected = (r0 / recovery * s * i / population).clamp(max=population)
            infected = torch.minimum(infected, s)
            s, i = s - infected, i + infected - i / recovery
            new.append(infected)
        return torch.stack(new, -1)

    means = cases(torch.tensor(2.5), torch.tensor(7.0))
    counts = dist.GammaPoisson(20.0, 20.0 / (0.5 * means + 1e-3)).sample()

    def model(counts: Tensor) -> None:
        r0 = pyro.sample("R0", dist.LogNormal(0.5, 0.5))
        recovery = pyro.sample("tau", dist.LogNormal(math.log(7.0), 0.2))
        rho = pyro.sample("rho", dist.Beta(10.0, 10.0))
        concentration = pyro.sample("k", dist.LogNormal(3.0, 0.5))
        mean = rho * cases(r0, recovery) + 1e-3
        fn = dist.GammaPoisson(concentration, concentration / mean)
        pyro.sample("cases", fn.to_event(1), obs=counts)

    return Case(model, (counts,))


@case
def logistic_growth() -> Case:
    """Logistic growth: a curve's rate, capacity and start, under multiplicative noise."""
    times = torch.linspace(0.0, 10.0, 21)

    def curve(rate: Tensor, capacity: Tensor, start: Tensor) -> Tensor:
        odds = (capacity - start) / start
        return capacity / (1 + odds * (-rate * times).exp())

    truth = curve(torch.tensor(0.8), torch.tensor(10.0), torch.tensor(0.5))
    sizes = truth * (0.1 * torch.randn(21)).exp()

    def model(sizes: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        capacity = pyro.sample("capacity", dist.LogNormal(2.0, 1.0))
        start = pyro.sample("start", dist.LogNormal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("times", len(sizes)):
            mean = curve(rate, capacity, start).log()
            pyro.sample("size", dist.LogNormal(mean, sigma), obs=sizes)

    return Case(model, (sizes,))


@case
def counts_with_zeros() -> Case:
    """Counts with more zeros than a Poisson has, and a weekly covariate."""
    x = torch.randn(60)
    rates = (0.8 + 0.5 * x).exp()
    counts = torch.poisson(rates) * (torch.rand(60) > 0.25)

    def model(x: Tensor, counts: Tensor) -> None:
        gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.ZeroInflatedPoisson((a + b * x).exp(), gate=gate), obs=counts)

    return Case(model, (x, counts))


@case
def log_gaussian_process() -> Case:
    """Counts over time whose log rate is a Gaussian process, with its numbers unknown."""
    x = torch.linspace(0.0, 1.0, 12)
    counts = torch.poisson((1.0 + (6 * x).sin()).exp())

    def model(x: Tensor, counts: Tensor) -> None:
        lengthscale = pyro.sample("lengthscale", dist.InverseGamma(5.0, 1.0))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
        k = (-0.5 * ((x[:, None] - x) / lengthscale).square()).exp() + 1e-5 * torch.eye(len(x))
        eta = pyro.sample("eta", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        f = amplitude * torch.linalg.cholesky(k) @ eta
        with pyro.plate("bins", len(x)):
            pyro.sample("counts", dist.Poisson(f.exp()), obs=counts)

    return Case(model, (x, counts), scalars=logs("lengthscale", "amplitude"))
