# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of about a minute:
#   #     jupytext --to ipynb --execute crossed_effects.py
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
# # Crossed effects and many groups
#
# Sixty people rate films out of thirty: each rating belongs to a person *and* to a film. Neither grouping lies within the
# other, they are **crossed**. This notebook shows
#
# 1. the **exact** answer, by linear algebra and quadrature;
# 2. how much too sure a guide with independent parts is, and what `pf.judge` says;
# 3. the **structure**, and the **verdict by parts**;
# 4. what happens with **many groups**, up to 10,000.
#
# You need to know Pyro's `sample` and `plate`; [Hierarchical models](hierarchical_models.ipynb) explains globals and locals
# at more leisure. Everything runs on one CPU core in about a minute.

# %%
import math
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
# ## 1. The data and the model
#
# Person $i$ is generous by $a_i$, film $k$ is good by $b_k$, and a rating is the sum of both and of noise (simulated):
#
# $$
# \mu \sim N(0, 2), \quad \tau_a, \tau_b, \sigma \sim \text{HalfNormal}(1), \qquad
# a_i \sim N(0, \tau_a), \quad b_k \sim N(0, \tau_b), \qquad y \sim N(\mu + a_{\text{person}} + b_{\text{film}}, \sigma).
# $$

# %%
PEOPLE, FILMS, RATINGS = 60, 30, 700
generator = torch.Generator().manual_seed(0)
generous = 0.7 * torch.randn(PEOPLE, generator=generator)
good = 0.4 * torch.randn(FILMS, generator=generator)
person = torch.randint(PEOPLE, (RATINGS,), generator=generator)
film = torch.randint(FILMS, (RATINGS,), generator=generator)
y = 1 + generous[person] + good[film] + 0.8 * torch.randn(RATINGS, generator=generator)


def ratings(person, film, y):
    mu = pyro.sample("mu", Normal(0.0, 2.0))
    tau_a = pyro.sample("tau_a", HalfNormal(1.0))
    tau_b = pyro.sample("tau_b", HalfNormal(1.0))
    sigma = pyro.sample("sigma", HalfNormal(1.0))
    with pyro.plate("people", PEOPLE):
        a = pyro.sample("a", Normal(0.0, tau_a))
    with pyro.plate("films", FILMS):
        b = pyro.sample("b", Normal(0.0, tau_b))
    with pyro.plate("ratings", len(y)):
        # The dots let many draws pass through the model at once.
        pyro.sample("y", Normal(mu + a[..., person] + b[..., film], sigma), obs=y)


data = (person, film, y)

# %% [markdown]
# ## 2. The exact answer
#
# Given the three scales, the model is linear and normal: with $z = (\mu, a, b)$, a design matrix $X$ of zeros and ones and
# prior precisions $D$,
#
# $$
# \log p(y \mid \tau_a, \tau_b, \sigma) = -\frac{n}{2} \log 2 \pi \sigma^2 - \frac{y^\top y}{2 \sigma^2}
# + \frac{1}{2} \log \frac{\det D}{\det H} + \frac{1}{2} h^\top H^{-1} h,
# \qquad H = D + \frac{X^\top X}{\sigma^2}, \quad h = \frac{X^\top y}{\sigma^2} .
# $$
#
# The scales go on a grid of three dimensions.

# %%
X = torch.zeros(RATINGS, 1 + PEOPLE + FILMS)
X[:, 0] = 1
X[torch.arange(RATINGS), 1 + person] = 1
X[torch.arange(RATINGS), 1 + PEOPLE + film] = 1
XX, Xy = X.T @ X, X.T @ y


def solve(tau_a, tau_b, sigma):
    """The log likelihood with z integrated out, and the mean and variance of mu, at scales of shape (n,)."""
    counts = torch.tensor([1, PEOPLE, FILMS])
    scales = torch.stack([torch.full_like(tau_a, 2.0), tau_a, tau_b], -1).repeat_interleave(
        counts, -1
    )
    root = torch.linalg.cholesky(XX / sigma[:, None, None] ** 2 + torch.diag_embed(scales**-2))
    h = (Xy / sigma[:, None] ** 2).unsqueeze(-1)
    first = torch.zeros_like(h)
    first[:, 0] = 1
    half, unit = torch.linalg.solve_triangular(root, torch.cat([h, first], -1), upper=False).unbind(
        -1
    )
    log_likelihood = -RATINGS * (0.5 * math.log(2 * math.pi) + sigma.log()) - y @ y / (2 * sigma**2)
    log_likelihood -= scales.log().sum(-1) + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (
        log_likelihood + 0.5 * half.square().sum(-1),
        (half * unit).sum(-1),
        unit.square().sum(-1),
    )


axes = {
    "tau_a": torch.linspace(-1.0, 0.3, 20),
    "tau_b": torch.linspace(-1.9, 0.1, 18),
    "sigma": torch.linspace(-0.4, 0.0, 18),
}
points = torch.cartesian_prod(*axes.values()).exp()
log_likelihood, mu_mean, mu_variance = (
    torch.cat(c) for c in zip(*(solve(*few.T) for few in points.split(360)), strict=True)
)
log_joint = log_likelihood + (HalfNormal(1.0).log_prob(points) + points.log()).sum(-1)
log_cell = sum((axis[1] - axis[0]).log() for axis in axes.values())
exact_log_evidence = float(log_joint.logsumexp(0) + log_cell)
probability = log_joint.softmax(0)


def moments(values):
    middle = (probability * values).sum()
    return float(middle), float((probability * (values - middle) ** 2).sum().sqrt())


mu_middle, mu_spread = moments(mu_mean)
mu_sd = math.sqrt(mu_spread**2 + float((probability * mu_variance).sum()))
exact = {name: moments(column) for name, column in zip(axes, points.T, strict=True)}
exact = pd.DataFrame({"mu": (mu_middle, mu_sd), **exact}, index=["mean", "sd"]).T
print(f"log evidence by quadrature: {exact_log_evidence:.4f}")
display(exact)

# %% [markdown]
# ## 3. What the usual guide gets wrong

# %%
guide = AutoNormal(ratings)
pyro.clear_param_store()
pyro.set_rng_seed(0)
optim_args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "T_max": 1500}
optimizer = pyro.optim.CosineAnnealingLR(optim_args, clip_args={"clip_norm": 10.0})
elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
svi = SVI(ratings, guide, optimizer, elbo)
start = time.process_time()
for _ in range(1500):
    svi.step(*data)
    optimizer.step()
print(f"AutoNormal: {time.process_time() - start:.0f} CPU s")
mean_field = Predictive(guide, num_samples=10_000, parallel=True)(*data)
ratio = {name: float(mean_field[name].std()) / exact.loc[name, "sd"] for name in exact.index}
display(pd.DataFrame(ratio, index=["sd of AutoNormal / exact sd"]))

# %%
start = time.process_time()
print(pf.judge(guide, ratings, args=data, draws=2000).verdict)
print(f"{time.process_time() - start:.0f} CPU s")

# %% [markdown]
# Far too sure of $\mu$. Raise $\mu$ a little and lower all $a_i$ by as much: no rating changes. The posterior is long in
# this direction, in which 61 unknowns move together. A guide with independent parts asks how far $\mu$ can move *while all
# else stays*, and the answer to that is: hardly.

# %% [markdown]
# ## 4. The structure

# %%
density = LogDensity(ratings, data)
structure = find_structure(density)
names = [site.name for site in density.sites for _ in range(site.features)]
print("globals:", ", ".join(names[i] for i in structure.globals))
print(f"locals:  {len(structure.locals)}, with {len(structure.local_edges)} pairs that touch")

pattern = torch.eye(structure.size)
pattern[tuple(structure.edges.T)] = 1
pattern = torch.maximum(pattern, pattern.T)
order = torch.cat([structure.globals, structure.locals])
fig, ax = plt.subplots(figsize=(3.8, 3.8), layout="constrained")
ax.imshow(pattern[order][:, order], cmap="Greys", interpolation="nearest")
ax.set_title("who touches whom", fontsize=11)
ends = torch.tensor([0, 4, 4 + PEOPLE, 4 + PEOPLE + FILMS])
ax.set_xticks(((ends[1:] + ends[:-1] - 1) / 2).tolist(), ["$g$", "people", "films"])
ax.set_yticks([])
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# People do not touch people, films do not touch films; a person touches a film if there is a rating. Of the globals $g$,
# $\mu$ and $\sigma$ touch all, and each $\tau$ its own kind. Given the globals the
# effects are one normal with this sparse precision. `pyroflows` eliminates the people first, who are independent given the
# films, and is left with a small dense matrix for the films. So the effects can be integrated out,
#
# $$
# p(g, y) = \frac{p(g, a, b, y)}{p(a, b \mid g, y)},
# $$
#
# and a small flow is trained on the four globals. Nothing is trained for the effects.

# %%
start = time.process_time()
posterior = pf.fit_posterior(ratings, data, progress=False)
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
draws = posterior.sample(2000, seed=1)
fig, both = plt.subplots(1, 2, figsize=(8.5, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, sample, colour, label in (
    (both[0], mean_field, GREEN, "AutoNormal"),
    (both[1], draws, ORANGE, "fit_posterior"),
):
    mu, a = (sample[name].reshape(len(sample[name]), -1)[:2000] for name in ("mu", "a"))
    ax.scatter(mu, a.mean(-1), s=5, lw=0, alpha=0.4, color=colour)
    ax.set(xlabel="$\\mu$", title=label)
both[0].set_ylabel("mean of all $a_i$")
plt.show()

# %% [markdown]
# The ridge: what $\mu$ gains, the people lose.
#
# ### The verdict by parts
#
# The searches for what the guide may lack are made on the **globals**, with the effects integrated out; the weights are
# those of the **whole**.


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
# ## 5. Many groups
#
# One grouping, ten rows in each group, and more and more groups. As each group adds one block that touches only the globals,
# the cost of a point grows in proportion, while the flow over three globals stays the same. The exact evidence is by
# quadrature (see [Hierarchical models](hierarchical_models.ipynb)).

# %%
ROWS = 10


def grouped(y):
    mu = pyro.sample("mu", Normal(0.0, 2.0))
    tau = pyro.sample("tau", HalfNormal(1.0))
    sigma = pyro.sample("sigma", HalfNormal(1.0))
    with pyro.plate("groups", len(y), dim=-2):
        theta = pyro.sample("theta", Normal(mu, tau))
        with pyro.plate("rows", ROWS, dim=-1):
            pyro.sample("y", Normal(theta, sigma), obs=y)


def quadrature(y):
    groups, mean = len(y), y.mean(-1)
    scatter = (y - mean.unsqueeze(-1)).square().sum()
    width = 6 / math.sqrt(groups)
    axis_tau = math.log(0.5) + torch.linspace(-width, width, 81)
    axis_sigma = torch.linspace(-width, width, 161)
    log_tau, log_sigma = torch.meshgrid(axis_tau, axis_sigma, indexing="ij")
    tau, sigma = log_tau.exp(), log_sigma.exp()
    variance = tau**2 + sigma**2 / ROWS
    precision = 0.25 + groups / variance
    log_joint = (
        HalfNormal(1.0).log_prob(tau) + log_tau + HalfNormal(1.0).log_prob(sigma) + log_sigma
    )
    log_joint += -0.5 * (groups * (2 * math.pi * variance).log() + mean.square().sum() / variance)
    log_joint += 0.5 * (mean.sum() / variance) ** 2 / precision - 0.5 * (4 * precision).log()
    log_joint -= scatter / (2 * sigma**2) + groups * (ROWS - 1) * (
        0.5 * math.log(2 * math.pi) + log_sigma
    )
    log_joint -= 0.5 * groups * math.log(ROWS)
    cell = (axis_tau[1] - axis_tau[0]) * (axis_sigma[1] - axis_sigma[0])
    return float(log_joint.flatten().logsumexp(0) + cell.log())


rows = []
for groups in (100, 1000, 10_000):
    generator = torch.Generator().manual_seed(groups)
    levels = 1 + 0.5 * torch.randn(groups, 1, generator=generator)
    y_grouped = levels + torch.randn(groups, ROWS, generator=generator)
    start = time.process_time()
    fitted = pf.fit_posterior(grouped, (y_grouped,), progress=False)
    rows.append(
        {
            "unknowns": fitted.guide.features,
            "CPU s": time.process_time() - start,
            "ok": fitted.verdict.ok,
            "ESS/N": fitted.verdict.ess,
            "log evidence": fitted.log_evidence,
            "by quadrature": quadrature(y_grouped),
        }
    )
table = pd.DataFrame(rows).set_index("unknowns")
display(table)

# %%
fig, ax = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
ax.loglog(table.index, table["CPU s"], "o-", color=ORANGE, label="fit_posterior, with its verdict")
ax.loglog(
    table.index,
    table["CPU s"].iloc[0] * table.index / table.index[0],
    ":",
    color="0.5",
    label="in proportion",
)
ax.set(xlabel="unknowns", ylabel="CPU seconds")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# The dotted line is proportional cost. A small fit spends most of its time on what does not depend on the number of groups.
# And the weights do not decay: with the locals exact, they are weights in three dimensions.

# %% [markdown]
# ## 6. When it says no
#
# - **globals**, any check: the flow of the globals, or the model. A scale that the data cannot tell from zero is the usual
#   suspect (one film only, or one rating each): give it a prior that says how small it may be.
# - **whole, weights**, with all globals held: the effects are far from normal given the globals, as in ratings of yes or no.
#   Where the groups are independent, quadrature in each takes care of that; where they are crossed it cannot, and
#   `fit_posterior` goes on to flows over all unknowns.
# - **No structure**: with too many large groupings that all touch each other, or more than 24 globals, `posterior.name`
#   names another rung, and the cost is that of a dense guide.
