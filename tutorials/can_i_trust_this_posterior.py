# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of about a minute:
#   #     jupytext --to ipynb --execute can_i_trust_this_posterior.py
#   # ruff: noqa: E402
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Can I trust this posterior?
#
# Any approximation of a posterior comes back with numbers. The question is whether they are the posterior's. This notebook
# is about the evidence that one can collect without knowing the answer: what `pyroflows` looks at before it says "trust this
# posterior", what each of these checks is blind to, and what to do when the answer is "no". In order:
#
# 1. a small problem from astronomy with two answers, its **verdict**, and the **ladder** of attempts that led there;
# 2. what **importance weights** tell (k-hat, effective sample size, shift), and how each of them fails on its own;
# 3. a **lost mode**: perfect weights, perfect chains, and a wrong posterior; the **census** that finds it;
# 4. guides that are **mixtures**;
# 5. **polish**: draws that a sampler has moved, and what their moving says;
# 6. **chains** from the guide, and the usual diagnostics in **ArviZ**;
# 7. a posterior that does **not exist**, and what one does then;
# 8. what **no check** can see.
#
# Every problem here is so small that the truth can be computed by quadrature, so that each verdict can be judged in turn.
# You need to know Pyro's `sample` and `plate`, and what an ELBO is. Everything runs on one CPU core in about a minute.

# %%
import math
import time
import warnings

# Two notices of other packages that would only distract here: on notebook widgets, and on a future ArviZ.
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="Estimated shape parameter")  # the table of az.loo says so too
warnings.filterwarnings("ignore", message="(?s).*ArviZ is undergoing a major refactor")

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
from IPython.display import display
from pyro.distributions import (
    HalfCauchy,
    ImproperUniform,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    constraints,
)
from pyro.infer import SVI, Trace_ELBO

import pyroflows as pf
from pyroflows.sampling import drift, polish

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
pd.set_option("display.precision", 3, "display.max_colwidth", None, "display.width", 200)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
DRAWS = 20_000

# %% [markdown]
# ## 1. A star, seven nights, and a verdict
#
# A star wobbles as a planet pulls at it. We have measured its velocity on seven nights, and look for the frequency $\omega$
# of the wobble, in radians per day. Its period may be anything between a day and twelve:
#
# $$
# \omega \sim \text{Uniform}(0.5, 6), \qquad a, b \sim N(0, 2), \qquad
# y_i \sim N(a \cos \omega t_i + b \sin \omega t_i,\; 0.6).
# $$

# %%
NOISE, SWING = 0.6, 2.0
nights = torch.tensor([0.0, 1.0, 2.0, 3.1, 4.0, 5.0, 6.1])
velocity = torch.tensor([1.74, -0.21, -1.6, 1.08, -0.01, -1.37, 2.08])


def wobble(t, y):
    omega = pyro.sample("omega", Uniform(0.5, 6.0))
    a = pyro.sample("a", Normal(0.0, SWING))
    b = pyro.sample("b", Normal(0.0, SWING))
    with pyro.plate("night", len(t)):
        pyro.sample("y", Normal(a * torch.cos(omega * t) + b * torch.sin(omega * t), NOISE), obs=y)


posterior = pf.fit_posterior(wobble, args=(nights, velocity), progress=False)
print(posterior.verdict)

# %% [markdown]
# The verdict is a record. Its `str` is the sentence above; its fields are what the sentence rests on, and its `findings` the
# result of each check.

# %%
EXPLAINED = {
    "ok": "the answer: whether to trust this posterior",
    "khat": "k-hat: how heavy the tail of the importance weights is (up to 0.7 they can be relied on)",
    "ess": "effective sample size of the weights, as a share of the draws",
    "shift": "the furthest that weighting moves a mean or a width, in standard deviations",
    "missed": "what a census has found where the guide has next to nothing, relative to what the guide knows",
    "drift": "the furthest that a few Hamiltonian trajectories move a mean or a width, beyond the noise",
    "elbo": "the evidence lower bound",
    "log_evidence": "log evidence by importance sampling",
    "log_evidence_error": "its Monte Carlo error, as far as the draws know",
}


def fields(verdict):
    return pd.DataFrame({"value": [getattr(verdict, f) for f in EXPLAINED], "": EXPLAINED.values()}, index=list(EXPLAINED))


display(fields(posterior.verdict))

# %% [markdown]
# ### The ladder
#
# `fit_posterior` tries what is cheap first, and stops at the first guide that passes. What it tried is in `posterior.rungs`:
# a name, the seconds since the start, and the verdict on it. (All models here are small. In one of eight latents or more,
# where a few govern all others, a guide that follows this structure comes first:
# [Eight schools with a flow guide](eight_schools.ipynb) shows it.)


# %%
def ladder(posterior):
    rows = [
        {
            "rung": rung.name,
            "seconds": round(rung.seconds, 1),
            "ok": rung.verdict.ok,
            "k-hat": rung.verdict.khat,
            "ESS": rung.verdict.ess,
            "shift": rung.verdict.shift,
            "missed": rung.verdict.missed,
            "drift": rung.verdict.drift,
        }
        for rung in posterior.rungs
    ]
    return pd.DataFrame(rows).set_index("rung").round(3)


display(ladder(posterior))

# %% [markdown]
# (NaN stands for "not looked at": once a check has failed, the dearer ones after it are spared.) The reasons, rung by rung:

# %%
for rung in posterior.rungs:
    print(f"{rung.name}: {rung.verdict.reason}\n")

# %% [markdown]
# The weights of the one Gaussian show a small flaw and nothing of the large one. But a **census** that climbs the density
# from many places had found a second hill, and the ladder went on with a guide that has a part for each.
#
# ### Was it right?
#
# Given $\omega$, the model is linear and Gaussian in $(a, b)$, so that these can be integrated out by hand: the data are
# $N(0, X_\omega X_\omega^\top \cdot 4 + 0.36\, I)$ with the columns $\cos \omega t$ and $\sin \omega t$ in $X_\omega$. One
# dimension is left, and fits on a grid.

# %%
grid = torch.linspace(0.5, 6.0, 8001)


def design(omega):
    return torch.stack([torch.cos(omega[:, None] * nights), torch.sin(omega[:, None] * nights)], -1)


X = design(grid)
given_omega = MultivariateNormal(torch.zeros(len(nights)), SWING**2 * X @ X.mT + NOISE**2 * torch.eye(len(nights)))
log_joint = Uniform(0.5, 6.0).log_prob(grid.clamp(max=5.9999)) + given_omega.log_prob(velocity)
step = grid[1] - grid[0]
exact_log_evidence = float(log_joint.logsumexp(0) + step.log())
exact_density = (log_joint - exact_log_evidence).exp()


def exact_draws(n, seed):
    generator = torch.Generator().manual_seed(seed)
    cell = torch.multinomial(exact_density, n, replacement=True, generator=generator)
    omega = grid[cell] + step * (torch.rand(n, generator=generator) - 0.5)
    x = design(omega)
    precision = x.mT @ x / NOISE**2 + torch.eye(2) / SWING**2
    mean = torch.linalg.solve(precision, (x.mT @ velocity / NOISE**2).unsqueeze(-1)).squeeze(-1)
    root = torch.linalg.cholesky(precision).mT
    noise = torch.linalg.solve_triangular(root, torch.randn(n, 2, 1, generator=generator), upper=True).squeeze(-1)
    a, b = (mean + noise).unbind(-1)
    return {"omega": omega, "a": a, "b": b}


reference = exact_draws(200_000, seed=0)


def errors(draws, reference):
    """The largest error of a mean, in standard deviations, and the largest log ratio of standard deviations."""
    mean = max(float((draws[k].mean() - reference[k].mean()).abs() / reference[k].std()) for k in reference)
    sd = max(float((draws[k].std() / reference[k].std()).log().abs()) for k in reference)
    return mean, sd


def share_fast(draws):
    """Share of the draws in the mode of the higher frequency."""
    return float((draws["omega"] > math.pi).double().mean())


draws = posterior.sample(DRAWS, seed=1)
mean_error, sd_error = errors(draws, reference)
print(f"largest error of a mean {mean_error:.3f} sd, of a standard deviation {sd_error:.3f} (log ratio)")
print(f"share of the faster mode   exact {share_fast(reference):.3f}   draws {share_fast(draws):.3f}")
print(f"log evidence               exact {exact_log_evidence:.3f}   importance {posterior.log_evidence:.3f}")

# %%
fine = torch.linspace(-0.3, 6.4, 600)
some = exact_draws(40, seed=2)
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=[1.5, 1])
for omega, a, b in zip(*(some[k] for k in ("omega", "a", "b")), strict=True):
    colour = ORANGE if omega > math.pi else BLUE
    left.plot(fine, a * torch.cos(omega * fine) + b * torch.sin(omega * fine), color=colour, lw=0.8, alpha=0.35)
left.errorbar(nights, velocity, yerr=NOISE, fmt="o", color="black", capsize=3, zorder=3)
left.set(xlabel="$t$ (days)", ylabel="velocity", title="40 exact draws")
edges = np.linspace(1.2, 5.0, 96)
right.fill_between(grid, exact_density, color="0.85", label="exact")
right.hist(draws["omega"], edges, density=True, histtype="step", color=ORANGE, lw=1.6, label="fit_posterior")
right.set(xlabel="$\\omega$ (radians per day)", xlim=(1.2, 5.0), title="posterior density of the frequency")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# The nights are almost a day apart, each to the next, and at whole days a wave of frequency $2\pi - \omega$ runs through the
# same points as one of $\omega$. Astronomers call this *aliasing*. The small gaps in the rhythm (a measurement a little late
# here and there) could tell the two apart, but not with errors of this size. An honest posterior shows both.

# %% [markdown]
# ## 2. What the weights tell
#
# Now the checks one by one. Draw $z_1, \dots, z_N$ from a guide $q$ and weigh them by
#
# $$
# w_i = \frac{p(z_i, y)}{q(z_i)}.
# $$
#
# If $q$ is the posterior, all weights are equal. The verdict takes three numbers from them:
#
# - **k-hat** fits a Pareto distribution to the largest weights; the $k$-th moment of the weights exists up to $k < 1 / \hat
#   k$. Up to 0.7, averages with (smoothed) weights can be relied on ([Vehtari et al.,
#   2024](https://arxiv.org/abs/1507.02646)).
# - **ESS** $= (\sum w_i)^2 / (N \sum w_i^2)$: the share of the draws that are left after weighting. At 1 no weighting is
#   needed.
# - **shift**: how far weighting moves the means and widths. It says how wrong the *unweighted* draws are, in the unit in
#   which one would care.
#
# Five guides for a density on the line shall show why there are three of them, and why three are not enough. The guides are
# normals, set by hand; `pf.judge(guide, model)` judges any guide: one of pyroflows, one of Pyro's, one written by hand.


# %%
def mixture(weights, parts):
    logs = [math.log(w) for w in weights]
    return lambda x: torch.stack([c + part.log_prob(x) for c, part in zip(logs, parts, strict=True)]).logsumexp(0)


def normal(loc, scale):
    return Normal(torch.tensor(loc), torch.tensor(scale))


TARGETS = {
    "a normal": normal(0.0, 1.0).log_prob,
    "a normal with a speck of heavy tail": mixture(
        [0.99, 0.01], [normal(0.0, 1.0), StudentT(torch.tensor(8.0), torch.tensor(0.0), torch.tensor(3.0))]
    ),
    "two normals": mixture([0.5, 0.5], [normal(-5.0, 1.0), normal(7.0, 1.0)]),
}
GUIDES = {
    "nearly right": ("a normal", 0.0, 1.03),
    "too wide": ("a normal", 0.0, 2.5),
    "too narrow": ("a normal", 0.0, 0.6),
    "a far tail is off": ("a normal with a speck of heavy tail", 0.0, 1.0),
    "a mode is lost": ("two normals", -5.0, 1.0),
}


def on_the_line(log_density):
    def model():
        x = pyro.sample("x", ImproperUniform(constraints.real, (), ()))
        pyro.factor("log_density", log_density(x))

    return model


def judged_by_hand(target, loc, scale):
    model = on_the_line(TARGETS[target])
    guide = pf.AutoFlow(model, flow=lambda features: pf.transforms.Elementwise(pf.univariate.SumOfSquares(), features))
    guide()
    guide.whiten(torch.tensor([loc]), torch.tensor([[scale]]))
    return pf.judge(guide, model)


line = torch.linspace(-60.0, 60.0, 120_001)


def exact_moments(log_density):
    p = log_density(line).softmax(0)
    mean = p @ line
    return mean, (p @ (line - mean).square()).sqrt()


def error(values, moments):
    mean, sd = moments
    return max(float((values.mean() - mean).abs() / sd), float((values.std() / sd).log().abs()))


by_hand = {name: judged_by_hand(*setting) for name, setting in GUIDES.items()}
rows = {}
for name, (target, _, _) in GUIDES.items():
    fitted, truth = by_hand[name], exact_moments(TARGETS[target])
    guide_draws = fitted.guide.sample_and_log_prob(DRAWS)[0].detach().squeeze(-1)
    verdict = fitted.verdict
    rows[name] = {
        "k-hat": verdict.khat,
        "ESS": verdict.ess,
        "shift": verdict.shift,
        "missed": verdict.missed,
        "drift": verdict.drift,
        "ok": verdict.ok,
        "error of the guide": error(guide_draws, truth),
        "error of .sample()": error(fitted.sample(DRAWS, seed=1)["x"], truth),
    }
display(pd.DataFrame(rows).T.infer_objects())

# %%
fig, axes = plt.subplots(2, 5, figsize=(13, 4.6), layout="constrained", sharex="col", height_ratios=[1.4, 1])
x = torch.linspace(-10.0, 12.0, 1500)
for (top, bottom), (name, (target, loc, scale)) in zip(axes.T, GUIDES.items(), strict=True):
    log_p, log_q = TARGETS[target](x), normal(loc, scale).log_prob(x)
    top.fill_between(x, log_p.exp(), color="0.82", label="posterior")
    top.plot(x, log_q.exp(), color=BLUE, lw=1.6, label="guide")
    top.set_title(name, fontsize=11)
    top.set(xlim=(-10, 12) if target == "two normals" else (-7, 7), yticks=[])
    reached = (x - loc).abs() < 3.9 * scale
    bottom.plot(x, (log_p - log_q).exp(), color="0.75", lw=1.2, ls=":")
    bottom.plot(x[reached], (log_p - log_q)[reached].exp(), color=ORANGE, lw=2)
    bottom.set_yscale("log")
    bottom.set(ylim=(5e-2, 2e3), xlabel="$x$")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
axes[1, 0].set_ylabel("weight $p / q$")
plt.show()

# %% [markdown]
# Above the densities, below the weights; in orange as far as ten thousand draws of the guide reach. Column by column:
#
# - **Nearly right.** All checks agree.
# - **Too wide.** The weights are bounded, so k-hat finds no tail at all. Many draws are wasted: the ESS is low, the shift is
#   large, and rightly so, as the guide's own draws are too wide. Weighted, they are right. *An ESS that is low need not mean
#   an answer that is wrong*; and *a k-hat that is good says nothing about the unweighted draws*.
# - **Too narrow.** The weights grow outwards without end, though slowly enough for k-hat, which lets it pass. That the guide
#   is wrong shows in the shift. k-hat asks whether weighting *can* repair a guide, and shift whether there *is* something to
#   repair.
# - **A far tail is off.** The weights grow ever faster, but only where next to nothing is. k-hat raises an alarm (not a
#   loud one) over a tail that moves no mean and no width by much; the ESS, near 1, and the
#   shift, near 0, say so, and the verdict follows them. (If you do care about such a tail, say for the probability of a
#   rare event, listen to k-hat.)
# - **A mode is lost.** Every weight is the same: k-hat, ESS and shift are perfect, and so they would be with a million
#   draws. The draws know half of the posterior. *Weights exist only where the guide goes.* What saves the day is the
#   census, in the column "missed".
#
# So no check is enough, and one of them may be wrong while the others are right. In the language of assertions:

# %%
wide, narrow, tail, half = (by_hand[name].verdict for name in list(GUIDES)[1:])
assert wide.khat < 0.7 and wide.ess < 0.9 and rows["too wide"]["error of .sample()"] < 0.1  # a low ESS, a right answer
assert narrow.khat < 0.7 and rows["too narrow"]["error of the guide"] > 0.2  # a good k-hat, a wrong guide
assert tail.khat > 0.7 and rows["a far tail is off"]["error of the guide"] < 0.1  # a bad k-hat, a right answer
assert half.khat < 0.7 and half.ess > 0.99 and half.shift < 0.01 and half.missed > 0.5  # all weights equal, half is missing

# %% [markdown]
# The verdict wants a good k-hat **or** an ESS
# near 1, **and** a small shift, **and** no mode missed, **and** no drift, **and** nothing
# beyond the guide's reach (both section 5).

# %%
for name, fitted in by_hand.items():
    print(f"{name}: {fitted.verdict}\n")

# %% [markdown]
# ## 3. A mode is lost, in earnest
#
# Nobody sets a guide by hand in the wrong place. But ordinary SVI does: it starts somewhere, climbs the hill on which it
# finds itself, and has no reason to leave. Here is a flow guide for the star, trained by Pyro's `SVI` as usual.

# %%
pyro.clear_param_store()
pyro.set_rng_seed(0)
lost = pf.AutoFlow(wobble)
optimizer = pyro.optim.CosineAnnealingLR(
    {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "T_max": 600}, clip_args={"clip_norm": 10.0}
)
svi = SVI(wobble, lost, optimizer, Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1))
for _ in range(600):
    svi.step(nights, velocity)
    optimizer.step()

judged = pf.judge(lost, wobble, args=(nights, velocity))
print(judged.verdict)

# %% [markdown]
# The findings, check by check:

# %%
findings = [(f.name, f.status, f.value, f.limit) for f in judged.verdict.findings]
display(pd.DataFrame(findings, columns=["check", "status", "value", "limit"]).set_index("check"))
of_weights = [judged.verdict.finding(name).status for name in ("supports", "weights", "outliers", "shift")]
assert set(of_weights) == {"held"} and judged.verdict.finding("census").status == "failed"

# %%
lost_draws = judged.sample(DRAWS, seed=1)
print(f"share of the faster mode   exact {share_fast(reference):.3f}   lost {share_fast(lost_draws):.3f}")
print(
    f"log evidence   exact {exact_log_evidence:.3f}   lost {judged.log_evidence:.3f}, with a Monte Carlo error of only "
    f"{judged.verdict.log_evidence_error:.4f}"
)
print(f"what is missing, by the evidence   {1 - math.exp(judged.log_evidence - exact_log_evidence):.3f}")

# %% [markdown]
# The checks of the weights have no objection: they hold, all four. The census alone finds what is missing, and where. (Once
# a check has failed, those that cost trajectories are spared; the findings say so.)
#
# The **census** works like this. From dozens of starts, drawn from the prior, spread over the space, and scattered far
# around a first fit, it climbs to maxima of the density by Newton steps and fits a Gaussian to each. Then every such local
# fit asks the guide: *of the mass that I see here, how much lies where your density is twenty times too small?* That is the
# number `missed`. It asks for a mode wherever some start leads to it, whether or not a draw of the guide comes near.
#
# Note the evidence, too. The lost guide's is too small by just the share of the lost mode, while its Monte Carlo error is
# tiny. Two fits from different places whose evidences differ by more than their errors are the classical sign of a lost
# mode; the one with more evidence has seen more.
#
# ### Would chains have helped?
#
# R-hat is the standard check of convergence: it compares chains with each other. Let us start 16 chains of Hamiltonian Monte
# Carlo from draws of this guide (in the base space of the flow: that is NeuTra,
# [Hoffman et al., 2019](https://arxiv.org/abs/1903.03704)).

# %%
chains = pf.posterior.neutra(judged, draws=150, chains=16, warmup=50, progress=False)
display(chains.summary()[["mean", "sd", "ess_bulk", "rhat"]])
print(f"share of the faster mode   exact {share_fast(reference):.3f}   chains {share_fast(chains.draws):.3f}")

# %% [markdown]
# R-hat is close to 1 and the effective sample size is large, since all chains agree: they all sit on the same hill. R-hat
# needs starts that are *overdispersed*, wider than the posterior, and a guide that lost a mode is no source of such starts.
# Diagnostics agree with each other if they are blind in the same spot.

# %% [markdown]
# ## 4. A mixture for a guide
#
# One flow makes one hill well; a smooth invertible map of a normal can hardly make two without a bridge. What the ladder
# took for the star is a mixture, $q(z) = \sum_k \pi_k\, q_k(z)$, with a flow for every mode of the census. Each flow is
# trained on its own, and the weights $\pi_k$ are then found by importance sampling, so that they answer the question that
# no flow can answer by itself: how much does each mode weigh?

# %%
mixture_guide = posterior.guide
print(type(mixture_guide).__name__, "with", len(mixture_guide.flows), "flows of weights")
print(np.round(mixture_guide.logits.softmax(-1).detach().numpy(), 3))
pieces = {f"component {k}": flow().sample((4,)) for k, flow in enumerate(mixture_guide.flows)}
print({name: np.round(judged.density.constrain(z)["omega"].numpy(), 2) for name, z in pieces.items()})
print(f"faster mode, exact: {share_fast(reference):.3f}")

# %% [markdown]
# The same by hand, for your own training loops: `pf.guides.AutoMixture(model, components=2)`, each component placed by
# `guide.whiten(k, loc, scale_tril)`. Left where they start, all components train to the same hill.

# %% [markdown]
# ## 5. Polish
#
# There is another way to ask whether draws are right: *move them by a sampler that leaves the posterior as it is, and see
# whether they change*. If the draws come from the posterior, their distribution stays; if it does not stay, they did not.
# The sampler is Hamiltonian Monte Carlo in the base space of the guide, a few trajectories for all draws at once. Two things
# come of it: the **drift** of means and widths, which is a check, and the moved draws, which are better than those before
# (**polish**).
#
# A banana, and two guides that do not fit: the Gaussian at which the ladder starts (`steps=0` goes no further), and a flow
# that was given 40 steps.


# %%
def banana():
    x = pyro.sample("x", Normal(0.0, 1.0))
    pyro.sample("y", Normal(x**2, 0.5))


bent = pf.model.LogDensity(banana)
guides = {
    "Gaussian": pf.fit_posterior(banana, steps=0, progress=False).guide,
    "rough flow": pf.fit_posterior(banana, guide=pf.RealNVP, steps=40, progress=False).guide,
}
torch.manual_seed(0)
moved = {}
for name, guide in guides.items():
    moved[name, 0] = guide.get_posterior().sample((4000,))
    for trajectories in (5, 10, 15, 20):
        moved[name, trajectories] = polish(bent, guide, moved[name, trajectories - 5], 5)

generator = torch.Generator().manual_seed(0)
exact_x = torch.randn(4000, generator=generator)
exact_banana = torch.stack([exact_x, exact_x**2 + 0.5 * torch.randn(4000, generator=generator)], -1)
truth = {"x": (0.0, 1.0), "y": (1.0, 1.5)}
rows = {}
for (name, trajectories), z in moved.items():
    found = bent.constrain(z)
    rows[name, trajectories] = {f"error of {k}": error(found[k], truth[k]) for k in truth}
    if trajectories:
        rows[name, trajectories]["drift since the row above"] = float(drift(moved[name, trajectories - 5], z, 4000).max())
rows["exact draws", ""] = {f"error of {k}": error(exact_banana[:, i], truth[k]) for i, k in enumerate(truth)}
display(pd.DataFrame(rows).T.rename_axis(["start", "trajectories"]).round(3))

# %%
fig, axes = plt.subplots(1, 5, figsize=(13, 3), sharex=True, sharey=True, layout="constrained")
panels = {f"{name}, {t} trajectories": moved[name, t] for name in guides for t in (0, 20)} | {"exact": exact_banana}
for ax, (name, z) in zip(axes, panels.items(), strict=True):
    ax.scatter(*z[:3000].T, s=4, lw=0, alpha=0.4, color="0.45" if name == "exact" else BLUE)
    ax.set_title(name, fontsize=10)
    ax.set(xlabel="$x$", xlim=(-3.6, 3.6), ylim=(-2.5, 9))
axes[0].set_ylabel("$y$")
plt.show()

# %% [markdown]
# From the Gaussian, the first round moves the draws by a good part of a standard deviation: the drift calls out that the
# guide is not the posterior. The rounds after it move them less, and yet the draws are still far from right. So mind what a
# small drift does *not* mean: a sampler that mixes slowly drifts little, too. Drift is a proof of guilt and never of
# innocence, as every check here.
#
# From a flow that was trained for a moment only, a few trajectories do most of what remains to be done. In the base space
# of a *good* guide the posterior is nearly a standard normal, which a few trajectories cross from end to end. This is why
# the ladder polishes last, after the best flow that it could train.
#
# When a posterior has been polished, `posterior.trajectories` says how many trajectories every draw has made.
#
# One more check sends trajectories out. A guide that fits the middle of a long thin mode may cut it short: the weights are
# even, no other mode is missing, and a few trajectories drift little. So chains start from the draws and *roam*, by steps
# that suit the thin directions, as long as they find more mass where the guide has next to none. The share of those that
# end there is the finding **reach**. The ladder answers with a rung named **refit**: fresh flows, fitted to these chains.
#
# Far modes are out of reach for polish as they are for the weights: that is what the census is for. The checks are
# chosen so that their blind spots differ.
#
# And the ladder itself, on this banana:

# %%
bent_posterior = pf.fit_posterior(banana, progress=False)
display(ladder(bent_posterior))
found = bent_posterior.sample(DRAWS, seed=1)
print({f"error of {k}": round(error(found[k], truth[k]), 3) for k in truth})

# %% [markdown]
# ## 6. Chains that jump, and ArviZ
#
# A guide that knows all modes also makes a sampler that visits all of them. `flow_mc` mixes local trajectories with jumps: a
# draw of the guide is proposed, from wherever the chain is, and accepted by Metropolis' rule. What the guide has slightly
# wrong, the rule corrects; how often it accepts says how good the guide is.

# %%
jumping = pf.posterior.flow_mc(posterior, draws=200, chains=16, warmup=50, progress=False)
display(jumping.summary()[["mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "rhat"]])
print(f"jumps accepted             {jumping.jump_acceptance:.2f}")
print(f"share of the faster mode   exact {share_fast(reference):.3f}   chains {share_fast(jumping.draws):.3f}")
by_chain = (jumping.draws["omega"] > math.pi).double().mean(1)
print(f"                           the chain that has least {by_chain.min():.3f}, most {by_chain.max():.3f}")

# %% [markdown]
# This R-hat deserves trust: each chain has been in both modes, and they agree on the shares. In pictures, three chains of
# each kind:

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 2.8), sharey=True, layout="constrained")
for ax, (name, run) in zip(axes, {"neutra, from the lost guide": chains, "flow_mc": jumping}.items(), strict=True):
    for chain, colour in zip(run.draws["omega"][:3], (BLUE, ORANGE, GREEN), strict=True):
        ax.plot(chain, ".", ms=3, color=colour)
    ax.set(title=name, xlabel="draw")
axes[0].set_ylabel("$\\omega$")
plt.show()

# %% [markdown]
# Both a posterior and chains go into ArviZ by `to_arviz()`, with names of dimensions, log likelihood and predictions.

# %%
idata = jumping.to_arviz()
display(az.summary(idata, var_names=["omega", "a", "b"], kind="diagnostics"))
az.plot_forest(idata, var_names=["omega", "a", "b"], combined=True, r_hat=True, ess=True, figsize=(9, 2.6))
plt.show()

# %% [markdown]
# A word on the picture: an interval cannot show two modes. The one of $\omega$ spans the gap between them, where there is
# nothing at all. Where a posterior has several modes, report the modes.
#
# Leave-one-out cross-validation:

# %%
print(az.loo(posterior.to_arviz()))

# %% [markdown]
# `az.loo` has a k-hat of its own, one for each night, for another question: can the posterior *without* night $i$ be
# reached by weighting draws of the posterior *with* it? When it says "no" for a night, this is news about the night (it
# matters a lot), not about the fit.
#
# And a *posterior predictive check* asks what none of the checks above asks: whether the model itself is any good. A
# posterior can be right to the last digit, and the model nonsense.

# %%
replicated = posterior.to_arviz().posterior_predictive["y"].values[0]
low, high = np.quantile(replicated, [0.05, 0.95], axis=0)
outside = ((velocity.numpy() < low) | (velocity.numpy() > high)).sum()
print(f"nights outside of their 90 % predictive interval: {outside} of {len(nights)}")

# %% [markdown]
# ## 7. A posterior that is none
#
# Five groups, a measurement for each, and a scale $\tau$ between them. Someone who wants to say "I know nothing of $\tau$"
# takes the prior $p(\tau) \propto 1 / \tau$. The model runs, SVI trains on it, and NUTS returns draws.


# %%
def groups(y):
    tau = pyro.sample("tau", ImproperUniform(constraints.positive, (), ()))
    pyro.factor("prior_of_tau", -tau.log())
    mu = pyro.sample("mu", Normal(0.0, 5.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", Normal(mu, tau))
        pyro.sample("y", Normal(theta, 1.0), obs=y)


measured = torch.tensor([2.8, 0.8, -0.3, 0.7, 1.9])
failed = pf.fit_posterior(groups, args=(measured,), steps=600, progress=False)
print(failed.verdict)
display(ladder(failed))
assert not any(rung.verdict.ok for rung in failed.rungs)

# %% [markdown]
# A "no", from every rung. (We cut the training short by `steps=600`. More steps do not help, as we shall see.) What now?
#
# **First: read where.** The sentence names a place, or a site. Plot it, on the unconstrained scale.

# %%
z = failed.sample_unconstrained(3000, seed=0)
names = failed.entry_names
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.scatter(z[:, names.index("theta[0]")], z[:, names.index("tau")], s=4, lw=0, alpha=0.4, color=BLUE)
left.set(xlabel="theta[0]", ylabel="log tau", title="draws of the best guide so far")


def log_marginal(tau, prior):
    """Log density of log tau and the data, with mu and theta integrated out, up to a constant."""
    covariance = (1 + tau.square())[:, None, None] * torch.eye(5) + 25.0
    return MultivariateNormal(torch.zeros(5), covariance).log_prob(measured) + prior(tau) + tau.log()


log_tau = torch.linspace(-12.0, 4.0, 400)
priors = {"$1 / \\tau$": lambda tau: -tau.log(), "half-Cauchy(2)": HalfCauchy(2.0).log_prob}
for (label, prior), colour in zip(priors.items(), (ORANGE, BLUE), strict=True):
    log_p = log_marginal(log_tau.exp(), prior)
    right.plot(log_tau, (log_p - log_p.max()).exp(), color=colour, lw=2, label=label)
right.set(xlabel="log tau", title="the exact posterior of log tau, not normalised")
right.legend(title="prior of $\\tau$", frameon=False)
right.set_yticks([])
plt.show()

# %% [markdown]
# **Second: think about the model there.** As $\tau \to 0$ all groups are one, and the likelihood no longer depends on
# $\tau$. So the posterior of $\log \tau$ is as flat as its prior there, down to $-\infty$: its integral is infinite. There
# is no posterior, and no method can find one ([Gelman, 2006](https://doi.org/10.1214/06-BA117A)). A sampler would just have
# wandered, and an average over its draws would depend on how long you let it run.
#
# **Third: change the model**, not the method. A proper prior, here a half-Cauchy, settles it. And since the scale of a
# hierarchy makes a funnel, we also write the effects in their non-centred form while we are at it. That is no cure of the
# first illness, but saves the flow much work.


# %%
def groups_again(y):
    tau = pyro.sample("tau", HalfCauchy(2.0))
    mu = pyro.sample("mu", Normal(0.0, 5.0))
    with pyro.plate("group", len(y)):
        effect = pyro.sample("effect", Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * effect)
        pyro.sample("y", Normal(theta, 1.0), obs=y)


start = time.perf_counter()
mended = pf.fit_posterior(groups_again, args=(measured,), progress=False)
print(mended.verdict)
display(ladder(mended))
line_of_log_tau = torch.linspace(-25.0, 12.0, 4000)
p = log_marginal(line_of_log_tau.exp(), HalfCauchy(2.0).log_prob).softmax(0)
exact_mean = p @ line_of_log_tau
exact_sd = (p @ (line_of_log_tau - exact_mean).square()).sqrt()
log_taus = mended.sample(DRAWS, seed=1)["tau"].log()
print(f"log tau: mean {log_taus.mean():.3f} (exact {exact_mean:.3f}), sd {log_taus.std():.3f} (exact {exact_sd:.3f})")

# %% [markdown]
# In general, when the answer is "no", and in the order in which it pays:
#
# 1. **Which check failed, and where?** `posterior.verdict.reason`, `posterior.rungs`, a plot of the named site.
# 2. **Is the posterior proper,** and the density finite, on all of its support? Look at improper priors, at scales near 0,
#    at parameters that no data inform, at label switching.
# 3. **Several modes?** If they are copies of each other (labels, signs), break the symmetry: order the components, fix a
#    sign. If they are real, as for the star, a mixture or jumping chains must carry them.
# 4. **A funnel or a long tail?** Non-centre, or give the prior a tail that you believe.
# 5. **More work**: more steps (`steps=`), or a wider flow (`guide=lambda n: pf.RealNVP(n, transforms=12)`).
# 6. **Chains** from the best guide so far: `pf.posterior.neutra` or `pf.posterior.flow_mc`, and R-hat.
# 7. If nothing helps, believe the "no". It is a result.

# %% [markdown]
# ## 8. What no check can see
#
# A verdict rests on a finite number of points at which the density was evaluated. Nothing can be known of what lies between
# them. Here is a needle, a hundredth wide, sixty standard deviations off, with half of the mass:


# %%
def needle():
    x = pyro.sample("x", ImproperUniform(constraints.real, (), ()))
    pyro.factor("log_density", mixture([0.5, 0.5], [normal(0.0, 1.0), normal(60.0, 0.01)])(x))


fooled = pf.fit_posterior(needle, progress=False)
print(fooled.verdict)
near = fooled.sample(DRAWS, seed=0)["x"] > 50
print(f"share of the draws near the needle: {near.double().mean():.3f} (exact: 0.5)")
assert fooled.verdict.ok  # wrongly

# %% [markdown]
# This verdict is wrong, and no amount of care in the checks would change it: neither R-hat, nor importance weights, nor a
# longer chain would have found the needle. What would have is knowledge of the model. So the last check is you: *where
# could another explanation of these data lie?* If you can name a place, start there (`init_loc_fn` of the guide), or put it
# into a mixture.

# %% [markdown]
# ## Exercises
#
# 1. **Better nights.** Move two of the seven nights by half a day and simulate new data from $\omega = 2.2$. How does the
#    mass of the faster mode change? Which night would you choose next, if you had one more?
#
# 2. **How narrow may a guide be?** For a normal guide of scale $s < 1$ and a standard normal posterior, show that the tail
#    of the weights is that of a Pareto distribution with $k = 1 - s^2$. For which $s$ is the limit 0.7 reached? How wrong
#    are the widths then? Now take $d$ such coordinates: how does the ESS depend on $d$, and k-hat?
#
# 3. **A lost mode, by the evidence.** Fit `wobble` by SVI from two starts, `init_loc_fn` near each of the modes. Judge
#    both by `pf.judge(guide, wobble, args)`. Find the shares of the modes from the two log evidences alone, and compare
#    them with the quadrature.
#
# 4. **Break it.** Find a density on the line for which `fit_posterior` says "trust" and is wrong, with the two modes as
#    close together as you can. What had to be narrow?
