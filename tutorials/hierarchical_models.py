# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of about a minute:
#   #     jupytext --to ipynb --execute hierarchical_models.py
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
# # Hierarchical models
#
# A hierarchical model has a few unknowns that everything shares, its **globals**, and many that belong to one group each,
# its **locals**. This notebook fits one with 100 groups, and shows
#
# 1. the **exact** posterior of the globals, by quadrature;
# 2. what Pyro's automatic Gaussian guides get wrong, and how `pf.judge` notices without knowing the truth;
# 3. the **structure** of the model, found from its density alone, and how `pf.fit_posterior` uses it;
# 4. a **verdict by parts**, on the globals and on the whole;
# 5. a "no", and what to do then.
#
# You need to know Pyro's `sample` and `plate`. [Eight schools](eight_schools.ipynb) is a gentler start: a smaller model, and
# more on weights and flows. Everything runs on one CPU core in about a minute.

# %%
import math
import time
import warnings

# A notice of another package that would only distract here, on notebook widgets.
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
from IPython.display import display
from pyro.distributions import HalfNormal, Normal
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

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
# ## 1. The data and the model
#
# Radon, a radioactive gas, is measured in a few houses of each of 100 counties. Some counties have five houses, some have
# one. (The data are simulated.)

# %%
COUNTIES = 100
generator = torch.Generator().manual_seed(0)
houses = torch.randint(1, 6, (COUNTIES,), generator=generator)
county = torch.repeat_interleave(torch.arange(COUNTIES), houses)
true_levels = 1.3 + 0.5 * torch.randn(COUNTIES, generator=generator)
y = true_levels[county] + 0.8 * torch.randn(len(county), generator=generator)

# %% [markdown]
# County $j$ has a level $\theta_j$. The levels scatter around a common mean $\mu$ with standard deviation $\tau$, and the
# houses of a county scatter around its level with standard deviation $\sigma$:
#
# $$
# \mu \sim N(0, 2), \quad \tau, \sigma \sim \text{HalfNormal}(1), \qquad
# \theta_j \sim N(\mu, \tau), \qquad y_i \sim N(\theta_{\text{county}(i)}, \sigma).
# $$


# %%
def radon(county, y):
    mu = pyro.sample("mu", Normal(0.0, 2.0))
    tau = pyro.sample("tau", HalfNormal(1.0))
    sigma = pyro.sample("sigma", HalfNormal(1.0))
    with pyro.plate("counties", COUNTIES):
        theta = pyro.sample("theta", Normal(mu, tau))
    with pyro.plate("houses", len(y)):
        # The dots let many draws pass through the model at once.
        pyro.sample("y", Normal(theta[..., county], sigma), obs=y)


data = (county, y)

# %% [markdown]
# ## 2. The exact posterior of the globals
#
# Given the globals, all is normal, and the levels can be integrated out by hand. What is left of county $j$, which has $n_j$
# houses, is their mean $\bar y_j$ and the scatter within it:
#
# $$
# \bar y_j \mid \mu, \tau, \sigma \sim N\!\left(\mu, \sqrt{\tau^2 + \sigma^2 / n_j}\right), \qquad
# \log p(\text{scatter}_j \mid \sigma) = -\frac{\sum_i (y_i - \bar y_j)^2}{2 \sigma^2}
# - \frac{n_j - 1}{2} \log 2 \pi \sigma^2 - \frac{1}{2} \log n_j .
# $$
#
# That is normal in $\mu$ too, so $\mu$ also goes by hand, and a grid over $(\log \tau, \log \sigma)$ does the rest.

# %%
mean = torch.bincount(county, y) / houses
scatter = torch.bincount(county, (y - mean[county]).square()).sum()

axis_tau, axis_sigma = torch.linspace(-4, 0.5, 226), torch.linspace(-0.7, 0.2, 91)
log_tau, log_sigma = torch.meshgrid(axis_tau, axis_sigma, indexing="ij")
tau, sigma = log_tau.exp(), log_sigma.exp()

# mu by hand: its precision and mean at each point of the grid.
variance = tau.unsqueeze(-1) ** 2 + sigma.unsqueeze(-1) ** 2 / houses
precision = 1 / 2.0**2 + (1 / variance).sum(-1)
mu_mean = (mean / variance).sum(-1) / precision

log_joint = HalfNormal(1.0).log_prob(tau) + log_tau + HalfNormal(1.0).log_prob(sigma) + log_sigma
log_joint += Normal(0.0, variance.sqrt()).log_prob(mean).sum(-1)
log_joint += 0.5 * precision * mu_mean**2 - 0.5 * (2.0**2 * precision).log()
within = len(y) - COUNTIES
log_joint -= (
    scatter / (2 * sigma**2)
    + within * (0.5 * math.log(2 * math.pi) + log_sigma)
    + 0.5 * houses.log().sum()
)

cell = (axis_tau[1] - axis_tau[0]) * (axis_sigma[1] - axis_sigma[0])
exact_log_evidence = float(log_joint.flatten().logsumexp(0) + cell.log())
probability = (log_joint - log_joint.logsumexp((0, 1))).exp()
print(f"log evidence by quadrature: {exact_log_evidence:.4f}")


# %%
def moments(values, weights):
    middle = (weights * values).sum()
    return float(middle), float((weights * (values - middle) ** 2).sum().sqrt())


mu_exact = moments(mu_mean, probability)
exact = pd.DataFrame(
    {
        "mu": [mu_exact[0], math.sqrt(mu_exact[1] ** 2 + float((probability / precision).sum()))],
        "tau": moments(tau, probability),
        "sigma": moments(sigma, probability),
    },
    index=["mean", "sd"],
).T
display(exact)

# %% [markdown]
# ## 3. What the usual guides get wrong
#
# Pyro's `AutoNormal` gives each unknown a normal of its own; `AutoMultivariateNormal` is one normal for all of them, with a
# covariance matrix. Both are trained here in the same way, with a step size that decays.


# %%
def train(guide, steps=1500):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim_args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "T_max": steps}
    optimizer = pyro.optim.CosineAnnealingLR(optim_args, clip_args={"clip_norm": 10.0})
    svi = SVI(
        radon,
        guide,
        optimizer,
        Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1),
    )
    start = time.process_time()
    for _ in range(steps):
        svi.step(*data)
        optimizer.step()
    print(f"{type(guide).__name__}: {time.process_time() - start:.0f} CPU s")
    return Predictive(guide, num_samples=10_000, parallel=True)(*data)


mean_field, full_rank = AutoNormal(radon), AutoMultivariateNormal(radon)
draws = {"AutoNormal": train(mean_field)}

# %%
start = time.process_time()
judged = pf.judge(mean_field, radon, args=data, draws=4000)
print(judged.verdict)
print(f"{time.process_time() - start:.0f} CPU s")

# %%
draws["AutoMultivariateNormal"] = train(full_rank)

# %% [markdown]
# The verdict on `AutoNormal` is a "no", reached without the exact answer. With the exact answer, one sees
# why. Here is the standard deviation of each global, as a multiple of the exact one:


# %%
def widths(draws):
    ratio = {
        name: float(d.std()) / exact.loc[name, "sd"]
        for name, d in draws.items()
        if name in exact.index
    }
    return {name: ratio[name] for name in exact.index}


ratios = pd.DataFrame({method: widths(d) for method, d in draws.items()}).T
display(ratios)

# %%
COLOURS = {"AutoNormal": GREEN, "AutoMultivariateNormal": BLUE, "fit_posterior": ORANGE}
mu_axis = torch.linspace(mu_exact[0] - 0.25, mu_exact[0] + 0.25, 300)
mu_density = probability.unsqueeze(-1) * Normal(mu_mean, precision**-0.5).log_prob(
    mu_axis[:, None, None]
).exp().movedim(0, -1)
EXACT = {
    "mu": (mu_axis, mu_density.sum((0, 1))),
    "tau": (axis_tau.exp(), probability.sum(1) / (axis_tau[1] - axis_tau[0]) / axis_tau.exp()),
    "sigma": (
        axis_sigma.exp(),
        probability.sum(0) / (axis_sigma[1] - axis_sigma[0]) / axis_sigma.exp(),
    ),
}


def plot_globals(draws):
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for ax, (name, (x, density)) in zip(axes, EXACT.items(), strict=True):
        ax.fill_between(x, density, color="0.85", label="exact")
        low, high = (
            exact.loc[name, "mean"] + sign * 4.5 * exact.loc[name, "sd"] for sign in (-1, 1)
        )
        edges = np.linspace(max(low, 0.0), high, 50)
        for method, values in draws.items():
            ax.hist(
                values[name].flatten(),
                edges,
                density=True,
                histtype="step",
                lw=1.6,
                color=COLOURS[method],
                label=method,
            )
        ax.set(xlabel=f"$\\{name}$", yticks=[], xlim=(edges[0], edges[-1]))
    fig.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    plt.show()


plot_globals(draws)

# %% [markdown]
# `AutoNormal` is too sure of $\tau$. In the posterior, $\tau$ and the levels move together: for a smaller $\tau$ all 100
# levels draw closer to $\mu$. A guide with independent parts holds the levels where they are while it decides how wide
# $\tau$ may be, and 100 levels that do not move pin $\tau$ down.
#
# `AutoMultivariateNormal` has correlations, but the *scatter* of the levels grows with $\tau$, and no correlation can say
# that. It also has to learn a matrix with thousands of entries, most of which the model already knows:

# %%
size = COUNTIES + 3
print(f"parameters of AutoMultivariateNormal: {size + size * (size + 1) // 2}")

# %% [markdown]
# ## 4. The structure
#
# Two unknowns touch if the second derivative of the log density by both is not zero. The pattern is found from a few
# products with this matrix; nothing has to be known of plates or of the index `county`.

# %%
density = LogDensity(radon, data)
structure = find_structure(density)
names = [site.name for site in density.sites for _ in range(site.features)]
print("globals:", ", ".join(names[i] for i in structure.globals))
print(
    f"locals:  {len(structure.locals)}, in {len(structure.block_sizes)} blocks of {structure.block_sizes.max()}"
)

# %%
pattern = torch.eye(structure.size)
pattern[tuple(structure.edges.T)] = 1
pattern = torch.maximum(pattern, pattern.T)
order = torch.cat([structure.globals, structure.locals])
fig, ax = plt.subplots(figsize=(3.6, 3.6), layout="constrained")
ax.imshow(pattern[order][:, order], cmap="Greys", interpolation="nearest")
ax.set_title("who touches whom: globals first", fontsize=11)
ax.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# An arrow: the globals touch everything, and each level touches the globals and itself, but no other level. So *given the
# globals, the levels are independent*. That is what makes the model easy.
#
# `pf.fit_posterior` uses it. Write $g$ for the globals. Given $g$, the levels have a normal distribution, whose mean and
# precision are read off the density. Dividing by it leaves the density of the globals alone, at any $\theta$ one likes,
#
# $$
# p(g, y) = \frac{p(g, \theta, y)}{p(\theta \mid g, y)},
# $$
#
# and a small flow is trained on these three unknowns. The guide is $q(g)\, p(\theta \mid g, y)$. Nothing is trained for the
# levels, and the cost grows only linearly with the number of counties.

# %%
start = time.process_time()
posterior = pf.fit_posterior(radon, data, progress=False)
print(posterior.name)
print(posterior.verdict)
print(f"{time.process_time() - start:.1f} CPU s for {posterior.guide.features} unknowns")
print(f"log evidence {posterior.log_evidence:.4f}, by quadrature {exact_log_evidence:.4f}")

# %%
draws["fit_posterior"] = posterior.sample(10_000, seed=1)
display(
    pd.concat(
        {"exact": exact, "fit_posterior": posterior.summary().loc[exact.index, ["mean", "sd"]]},
        axis=1,
    )
)
plot_globals(draws)

# %% [markdown]
# ### What the levels look like
#
# A county with one house is drawn far towards the common mean, a county with five houses less: *shrinkage*.

# %%
levels = draws["fit_posterior"]["theta"]
shown = torch.cat([(houses == n).nonzero().flatten()[:8] for n in (1, 5)])
fig, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
ax.axhline(exact.loc["mu", "mean"], color="0.7", lw=1, zorder=0, label="posterior mean of $\\mu$")
ax.plot(mean[shown], "x", color="black", ms=7, label="mean of the houses")
middle, (low, high) = (
    levels.mean(0)[shown],
    levels[:, shown].quantile(torch.tensor([0.05, 0.95]), 0),
)
ax.errorbar(
    range(16),
    middle,
    yerr=[middle - low, high - middle],
    fmt="o",
    color=ORANGE,
    label="level, 90 % interval",
)
ax.plot(true_levels[shown], "_", color=BLUE, ms=12, mew=2, label="true level")
ax.axvline(7.5, color="0.85", lw=1)
ax.set_xticks([3.5, 11.5], ["counties with one house", "counties with five houses"])
ax.set_ylabel("level $\\theta_j$")
fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# ## 5. A verdict by parts
#
# Weights in a hundred dimensions are easily spoilt, and chains in a hundred dimensions are slow. So each check is made on
# the part where it says most: the hunt for lost modes and for places beyond the guide's reach on the *globals*, with the
# levels integrated out; the weights on the *whole*.


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
# - **proper**: the density falls off in every direction; **census**: climbing from many places finds no mode that the guide
#   lacks;
# - **supports**, **weights**, **outliers**, **shift**: the model agrees with the guide at the guide's own draws (a k-hat
#   above its limit is forgiven where nine in ten draws are effective: then it is about a far tail of next to no mass);
# - **drift**, **reach**: trajectories that start from the draws change nothing, and find nothing new.
#
# [Can I trust this posterior?](can_i_trust_this_posterior.ipynb) takes each of them apart.

# %% [markdown]
# ## 6. When it says no
#
# The same guide, `pf.AutoStructuredFlow`, goes into an SVI loop of your own. Stop it too early on purpose, ask the judge,
# and train on:

# %%
guide = pf.AutoStructuredFlow(radon)
pyro.clear_param_store()
pyro.set_rng_seed(0)
elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.995})  # a step size that decays
svi = SVI(radon, guide, optimizer, elbo)
taken = 0
for steps in (20, 200, 800):
    for _ in range(steps - taken):
        svi.step(*data)
    taken = steps
    judged = pf.judge(guide, radon, args=data)
    print(f"{steps} steps. {judged.verdict}\n")
    if steps == 20:
        early = findings(judged)

# %% [markdown]
# The findings after the first few steps, by parts (dear checks are spared once a cheap one has failed):

# %%
display(early)

# %% [markdown]
# In general, read the first check that failed, and the block it belongs to:
#
# - **globals, census, drift or reach**: the flow of the globals is not there yet. Train it longer, or give `fit_posterior`
#   more time; it goes on by itself to longer training and to other guides.
# - **globals, proper**: it is about the model. A global has no end in some direction, so give it a proper prior.
# - **whole, weights or shift**, while all globals hold: with levels that are normal given the globals, train longer. With
#   others (counts, heavy tails), reparametrise them, or look for groups with next to no data.
#
# The next notebooks have locals that touch each other: in a chain, [Time series](time_series.ipynb), and in a grid,
# [Crossed effects and many groups](crossed_effects.ipynb).
