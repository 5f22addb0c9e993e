# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of about a minute:
#   #     jupytext --to ipynb --execute time_series.py
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
# # Time series
#
# In a time series each state touches the one before and the one after. This notebook fits two models of that kind, and shows
#
# 1. the **exact** answer for the first of them, by a Kalman filter;
# 2. how far off a guide with independent parts can be, and what `pf.judge` says;
# 3. the **structure**, a chain, which `pyroflows` finds even where the code hides it;
# 4. a **verdict by parts**;
# 5. the same with 2,000 time steps, and a model whose states are *not* normal.
#
# You need to know Pyro's `sample` and `plate`; [Hierarchical models](hierarchical_models.ipynb) explains globals and locals
# at more leisure. Everything runs on one CPU core in about a minute.

# %%
import time
import warnings

# A notice of another package that would only distract here, on notebook widgets.
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch
from IPython.display import display
from pyro.distributions import HalfNormal, Normal
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyroflows as pf
from pyroflows.model import LogDensity
from pyroflows.model.structure import find_structure

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
plt.rcParams.update(
    {"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
)
pd.set_option("display.precision", 3, "display.max_colwidth", None, "display.width", 200)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"

# %% [markdown]
# ## 1. A level that wanders
#
# The *local level* model: a hidden level $x_t$ takes a random step of size $q$ each day, and we see it with noise $s$,
#
# $$
# q, s \sim \text{HalfNormal}(1), \qquad x_t \sim N(x_{t-1}, q), \qquad y_t \sim N(x_t, s), \qquad x_0 = 0.
# $$
#
# It is written by its increments, in one vectorised line; a loop over days would be slow in Pyro.


# %%
def simulate(days):
    generator = torch.Generator().manual_seed(0)
    level = (0.2 * torch.randn(days, generator=generator)).cumsum(0)
    return level, level + 0.6 * torch.randn(days, generator=generator)


def local_level(y):
    q = pyro.sample("q", HalfNormal(1.0))
    s = pyro.sample("s", HalfNormal(1.0))
    with pyro.plate("steps", len(y)):
        step = pyro.sample("step", Normal(0.0, q))
    with pyro.plate("days", len(y)):
        pyro.sample("y", Normal(step.cumsum(-1), s), obs=y)


DAYS = 150
true_level, y = simulate(DAYS)
fig, ax = plt.subplots(figsize=(9, 2.8), layout="constrained")
ax.plot(y, ".", color="black", ms=5, label="$y_t$")
ax.plot(true_level, color=BLUE, lw=1.6, label="true level")
ax.set_xlabel("day")
ax.legend(frameon=False, ncols=2)
plt.show()

# %% [markdown]
# ## 2. The exact answer, by a Kalman filter
#
# Given $q$ and $s$, all is normal, and the Kalman filter computes $p(y \mid q, s)$ day by day: predict, compare with $y_t$,
# correct. It runs here at all points of a grid over $(\log q, \log s)$ at once; the sum over the grid is the evidence.


# %%
def quadrature(y, axis_q, axis_s):
    """The log evidence, and the probability of each cell of a grid over log q and log s."""
    log_q, log_s = torch.meshgrid(axis_q, axis_s, indexing="ij")
    q, s = log_q.exp(), log_s.exp()
    log_joint = HalfNormal(1.0).log_prob(q) + log_q + HalfNormal(1.0).log_prob(s) + log_s
    mean, variance = torch.zeros_like(q), torch.zeros_like(q)
    for y_t in y:
        variance = variance + q**2  # predict
        log_joint += Normal(mean, (variance + s**2).sqrt()).log_prob(y_t)  # compare
        gain = variance / (variance + s**2)
        mean, variance = mean + gain * (y_t - mean), (1 - gain) * variance  # correct
    cell = (axis_q[1] - axis_q[0]) * (axis_s[1] - axis_s[0])
    log_sum = log_joint.flatten().logsumexp(0)
    return float(log_sum + cell.log()), (log_joint - log_sum).exp()


axis_q, axis_s = torch.linspace(-4, 0, 201), torch.linspace(-1, 0, 101)
exact_log_evidence, probability = quadrature(y, axis_q, axis_s)


def moments(values, weights):
    middle = (weights * values).sum()
    return float(middle), float((weights * (values - middle) ** 2).sum().sqrt())


exact = pd.DataFrame(
    {
        "q": moments(axis_q.exp(), probability.sum(1)),
        "s": moments(axis_s.exp(), probability.sum(0)),
    },
    index=["mean", "sd"],
).T
print(f"log evidence by quadrature: {exact_log_evidence:.4f}")
display(exact)

# %% [markdown]
# ## 3. What the usual guide gets wrong
#
# Pyro's `AutoNormal` gives each step a normal of its own.

# %%
guide = AutoNormal(local_level)
pyro.clear_param_store()
pyro.set_rng_seed(0)
optim_args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "T_max": 1500}
optimizer = pyro.optim.CosineAnnealingLR(optim_args, clip_args={"clip_norm": 10.0})
elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
svi = SVI(local_level, guide, optimizer, elbo)
start = time.process_time()
for _ in range(1500):
    loss = svi.step(y)
    optimizer.step()
print(f"{time.process_time() - start:.0f} CPU s")
print(f"ELBO {-loss:.1f}, log evidence {exact_log_evidence:.1f}")

# %%
mean_field = Predictive(guide, num_samples=5000, parallel=True)(y)
found = {
    name: [float(mean_field[name].mean()), float(mean_field[name].std())] for name in exact.index
}
display(
    pd.concat({"exact": exact, "AutoNormal": pd.DataFrame(found, index=["mean", "sd"]).T}, axis=1)
)

# %% [markdown]
# This is not a matter of widths: it has found *another answer*. The data fix the level, which is a **sum** of steps. Steps
# that add up to a known level are strongly correlated in the posterior: if one was larger, its neighbour was smaller. In a
# guide with independent steps the errors of the steps add up instead, so that the only way to follow the data is to allow
# next to no steps: a small $q$, and the rest is called noise.
#
# What does the judge say, who does not know the exact answer?

# %%
start = time.process_time()
print(pf.judge(guide, local_level, args=(y,), draws=2000).verdict)
print(f"{time.process_time() - start:.0f} CPU s")

# %% [markdown]
# ## 4. The structure
#
# By its *increments*, the model looks hopeless: each step touches all days after it, and so every other step. By its
# *states* $x_t$ it is a chain. `find_structure` notices, because partial sums of the site touch far fewer
# others than its entries do.

# %%
density = LogDensity(local_level, (y,))
structure = find_structure(density)
names = [site.name for site in density.sites for _ in range(site.features)]
print("globals:", ", ".join(names[i] for i in structure.globals))
print(
    f"locals:  {len(structure.locals)} in {len(structure.block_sizes)} block,",
    f"with {len(structure.local_edges)} pairs that touch",
)


# %%
def show_pattern(structure):
    pattern = torch.eye(structure.size)
    pattern[tuple(structure.edges.T)] = 1
    pattern = torch.maximum(pattern, pattern.T)
    order = torch.cat([structure.globals, structure.locals])
    _, ax = plt.subplots(figsize=(3.6, 3.6), layout="constrained")
    ax.imshow(pattern[order][:, order], cmap="Greys", interpolation="nearest")
    ax.set_title("who touches whom: globals, then days", fontsize=11)
    ax.set(xticks=[], yticks=[])
    plt.show()


show_pattern(structure)

# %% [markdown]
# The two globals touch all days; each day touches the next. Given the globals $g = (q, s)$, the states are one normal whose
# precision matrix has three diagonals. Its mean and its determinant cost a time linear in the number of days, as those of a
# Kalman filter. So the density of the globals alone is known,
#
# $$
# p(g, y) = \frac{p(g, x, y)}{p(x \mid g, y)} \quad \text{at any } x,
# $$
#
# and `pf.fit_posterior` trains a small flow on these two unknowns. Nothing is trained for the states.

# %%
start = time.process_time()
posterior = pf.fit_posterior(local_level, (y,), progress=False)
print(posterior.name)
print(posterior.verdict)
print(f"{time.process_time() - start:.1f} CPU s for {posterior.guide.features} unknowns")
print(f"log evidence {posterior.log_evidence:.4f}, by quadrature {exact_log_evidence:.4f}")
display(
    pd.concat(
        {"exact": exact, "fit_posterior": posterior.summary().loc[exact.index, ["mean", "sd"]]},
        axis=1,
    )
)

# %%
draws = posterior.sample(5000, seed=1)
LEVELS = torch.tensor([0.05, 0.5, 0.95])


def plot_band(ax, path, colour, label):
    low, middle, high = path.quantile(LEVELS, 0)
    ax.fill_between(range(len(middle)), low, high, color=colour, alpha=0.25, lw=0)
    ax.plot(middle, color=colour, lw=1.6, label=label)


fig, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True, layout="constrained")
for ax, steps, colour, label in (
    (axes[0], mean_field["step"].reshape(5000, -1), GREEN, "AutoNormal"),
    (axes[1], draws["step"], ORANGE, "fit_posterior"),
):
    ax.plot(true_level, color="black", lw=1, ls="--", label="true level")
    plot_band(ax, steps.cumsum(-1), colour, f"{label}, 90 % band")
    ax.set_xlabel("day")
    ax.legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# On the left the band widens with time, as errors add up. On the right it keeps its width.

# %% [markdown]
# ## 5. A verdict by parts
#
# Searches for what the guide may lack are made on the **globals**, with the states integrated out: two dimensions, in which
# a chain moves fast. The weights are those of the **whole**.


# %%
def findings(posterior):
    rows = [
        {
            "block": f.block or "whole",
            "check": f.name,
            "status": f.status,
            "value": f.value,
            "limit": f.limit,
        }
        for f in posterior.verdict.findings
    ]
    return (
        pd.DataFrame(rows).set_index(["block", "check"]).sort_index(level=0, sort_remaining=False)
    )


display(findings(posterior))

# %% [markdown]
# ## 6. More days
#
# The cost grows with the number of days, and no faster. The evidence stays right:

# %%
_, long_y = simulate(2000)
start = time.process_time()
long_posterior = pf.fit_posterior(local_level, (long_y,), progress=False)
print(long_posterior.verdict)
print(f"{time.process_time() - start:.1f} CPU s for {long_posterior.guide.features} unknowns")
long_log_evidence, _ = quadrature(
    long_y, torch.linspace(-2.4, -1, 71), torch.linspace(-0.7, -0.3, 61)
)
print(f"log evidence {long_posterior.log_evidence:.3f}, by quadrature {long_log_evidence:.3f}")

# %% [markdown]
# ## 7. States that are not normal
#
# *Stochastic volatility*: what wanders is not the level of the data but the log of their variance, $h_t$. The Kalman filter
# has no answer here, as $h$ given the globals is not normal. We ask for the structured guide and for nothing else, to see
# what its verdict says; by default `fit_posterior` would go on to other guides after a "no".


# %%
def volatility(y):
    mean = pyro.sample("mean", Normal(0.0, 2.0))
    q = pyro.sample("q", HalfNormal(0.5))
    with pyro.plate("steps", len(y)):
        step = pyro.sample("step", Normal(0.0, q))
    with pyro.plate("days", len(y)):
        pyro.sample("y", Normal(0.0, ((mean.unsqueeze(-1) + step.cumsum(-1)) / 2).exp()), obs=y)


generator = torch.Generator().manual_seed(0)
true_h = (0.15 * torch.randn(200, generator=generator)).cumsum(0) - 1
returns = (true_h / 2).exp() * torch.randn(200, generator=generator)
start = time.process_time()
volatile = pf.fit_posterior(volatility, (returns,), guide=pf.AutoStructuredFlow, progress=False)
print(volatile.verdict)
print(f"{time.process_time() - start:.1f} CPU s")

# %%
display(findings(volatile))

# %% [markdown]
# A narrow "no". Read it by its parts. Nothing failed on the **globals**: no mode is lost. What failed is on the **whole**:
# the guide of the states is now an approximation, a normal at the peak of $p(h \mid g, y)$ (Laplace's), and on each of 200
# days it is off by a little. The weights see that, as fewer draws are effective than before, and they name the step that is
# furthest off (`shift`).
#
# But k-hat is below its limit, so the weights themselves can be relied on, and `sample` resamples by them:

# %%
print("k-hat", round(volatile.verdict.khat, 2), "| draws are corrected by weights:", volatile.corrects)

# %%
some = volatile.sample(4000, seed=1)
h = some["mean"].unsqueeze(-1) + some["step"].cumsum(-1)
fig, ax = plt.subplots(figsize=(9, 3), layout="constrained")
ax.plot(returns.abs(), ".", color="0.6", ms=4, label="$|y_t|$")
ax.plot((true_h / 2).exp(), color="black", lw=1, ls="--", label="true volatility $e^{h_t / 2}$")
plot_band(ax, (h / 2).exp(), ORANGE, "fit_posterior, 90 % band")
ax.set_xlabel("day")
ax.legend(frameon=False, ncols=3, loc="upper left")
ax.set_ylim(top=1.25 * float(returns.abs().max()))
plt.show()

# %% [markdown]
# ## 8. When it says no
#
# Read the first check that failed, and its block:
#
# - **globals**, any check: the model, or the flow of the few globals. A $q$ that the data cannot tell from zero is the
#   usual suspect: give it a prior that says how small it may be, or more time by `time_limit`.
# - **whole, shift**, with a good k-hat: the draws of the guide are off, those of `posterior.sample` are corrected. Use the
#   corrected ones, and more of them, as some are repeated.
# - **whole, weights**, with all globals held: the states are too far from normal given the globals, as where counts are near
#   zero or noise has heavy tails. Let `fit_posterior` go on to flows over all unknowns (it does so by default); for long
#   series, aggregate days to weeks, or fit a shorter stretch.
# - **not judged**: there was no time for that check; raise `time_limit`.
#
# Next: [Crossed effects and many groups](crossed_effects.ipynb).
