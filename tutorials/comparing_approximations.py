# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of about two minutes:
#   #     jupytext --to ipynb --execute comparing_approximations.py
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
# # Comparing posterior approximations
#
# Seven ways to a posterior, side by side on four posteriors whose truth is known:
#
# | method | what it is |
# |---|---|
# | mean field | a Gaussian with independent coordinates: Pyro's `AutoNormal` |
# | full rank | a Gaussian with a covariance matrix: Pyro's `AutoMultivariateNormal` |
# | IAF | an affine autoregressive flow: `pf.IAF` |
# | RealNVP | affine coupling layers, with linear maps between them: `pf.RealNVP` |
# | splines | couplings by rational-quadratic splines, likewise: `pf.NSF` |
# | NUTS | Pyro's No-U-Turn sampler, one chain |
# | NeuTra | Hamiltonian Monte Carlo in the base space of the RealNVP above: `pf.posterior.neutra` |
#
# The four posteriors each have a trouble of their own: *correlation*, a *bend*, a *funnel*, and *two modes*.
#
# **The budgets are small**, so that all of this runs in about a minute and a half on one CPU core: a few hundred steps of
# training for each guide, a few hundred draws of NUTS. A method that is behind here may catch up with
# more; what matters is *how* each of them fails, and whether it says so. The benchmark in the repository
# (`python -m benchmarks.posteriors`) is the place for a race.

# %%
import math
import time
import warnings

# Two notices of other packages that would only distract here: on notebook widgets, and on a future ArviZ.
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="(?s).*ArviZ is undergoing a major refactor")

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
from IPython.display import display
from pyro.distributions import HalfCauchy, LogNormal, MultivariateNormal, Normal
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.importance import vectorized_importance_weights

import pyroflows as pf
from pyroflows.examples import load_example
from pyroflows.report.plots import hardest_pair

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
pd.set_option("display.precision", 3, "display.width", 200)
DRAWS = 8000

# %% [markdown]
# ## The methods, each in a few lines
#
# A method takes a model with its data, and returns draws, importance weights where it has a density, and the CPU seconds
# that it took. The Gaussians are trained by Pyro's `SVI`, with many particles and a step size that decays.


# %%
def by_svi(make):
    def fit(model, data, fits):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make(model)
        optim_args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "T_max": 400}
        optimizer = pyro.optim.CosineAnnealingLR(optim_args, clip_args={"clip_norm": 10.0})
        elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, optimizer, elbo)
        start = time.process_time()
        for _ in range(400):
            svi.step(**data)
            optimizer.step()
        seconds = time.process_time() - start
        with torch.no_grad():
            shapes = {name: value.shape for name, value in guide(**data).items()}
            log_weights, _, trace = vectorized_importance_weights(
                model, guide, num_samples=DRAWS, max_plate_nesting=1, **data
            )
        draws = {name: trace.nodes[name]["value"].reshape(DRAWS, *shape) for name, shape in shapes.items()}
        return {"draws": draws, "seconds": seconds, **importance(log_weights)}

    return fit


def importance(log_weights):
    smoothed, khat = az.psislw(log_weights.numpy())
    return {"k-hat": float(khat), "ESS/N": float(np.exp(-np.logaddexp.reduce(2 * np.asarray(smoothed)))) / DRAWS}


# %% [markdown]
# The flows are trained by `pf.fit_posterior`, which starts from a Gaussian fit. For a fair look at the *guides* we take
# their own draws, and leave out the corrections (by weights, or by trajectories) that `posterior.sample` makes where it
# can. The seconds contain all of `fit_posterior`, with its verdict. Two further columns of the tables say whether the
# verdict trusts the posterior, and what the larger of the two errors is when `posterior.sample` has made its corrections.


# %%
def by_flow(flow):
    def fit(model, data, fits):
        start = time.process_time()
        posterior = pf.fit_posterior(model, kwargs=data, guide=flow, steps=200, progress=False)
        seconds = time.process_time() - start
        fits[flow.__name__] = posterior
        torch.manual_seed(1)
        with torch.no_grad():
            z, log_q = posterior.guide.get_posterior().rsample_and_log_prob((DRAWS,))
            weights = importance(posterior.density.log_prob(z) - log_q)
        corrected = posterior.sample(DRAWS, seed=1)
        return {
            "draws": posterior.density.constrain(z),
            "seconds": seconds,
            **weights,
            "posterior": posterior,
            "sample": corrected,
        }

    return fit


# %% [markdown]
# Chains have no density, so no k-hat. The seconds of NeuTra come on top of those of the RealNVP. The effective sample size
# is ArviZ's, in the bulk, of the worst scalar.


# %%
def by_nuts(model, data, fits):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model, max_tree_depth=6), num_samples=200, warmup_steps=120, disable_progbar=True)
    start = time.process_time()
    mcmc.run(**data)
    seconds = time.process_time() - start
    draws = mcmc.get_samples()
    ess = min(float(az.ess(column[None], method="bulk")) for column in scalars(draws).values())
    return {"draws": draws, "seconds": seconds, "ESS/N": ess / 200}


def by_neutra(model, data, fits):
    start = time.process_time()
    chains = pf.posterior.neutra(fits["RealNVP"], draws=100, chains=16, warmup=50, progress=False)
    seconds = time.process_time() - start
    ess = min(float(values.min()) for values in chains.ess.values())
    draws = {name: values.flatten(0, 1) for name, values in chains.draws.items()}
    return {"draws": draws, "seconds": seconds, "ESS/N": ess / 1600}


METHODS = {
    "mean field": by_svi(AutoNormal),
    "full rank": by_svi(AutoMultivariateNormal),
    "IAF": by_flow(pf.IAF),
    "RealNVP": by_flow(pf.RealNVP),
    "splines": by_flow(pf.NSF),
    "NUTS": by_nuts,
    "NeuTra": by_neutra,
}

# %% [markdown]
# Errors are the largest over all scalars: of a mean in units of the true standard deviation, and of a standard deviation as
# a log ratio (0.1 is ten per cent). The last line of each table is what *other exact draws* score, as many as the guides
# draw: the noise of the table. The few draws of NUTS are noisier.


# %%
def scalars(draws):
    columns = {}
    for name, value in draws.items():
        flat = value.detach().reshape(len(value), -1).T.numpy()
        columns |= {f"{name}[{i}]" if len(flat) > 1 else name: column for i, column in enumerate(flat)}
    return columns


def errors(draws, reference):
    found, known = scalars(draws), scalars(reference)
    mean = max(abs(found[k].mean() - known[k].mean()) / known[k].std() for k in known)
    sd = max(abs(math.log(found[k].std() / known[k].std())) for k in known)
    return {"mean error": mean, "sd error": sd}


def in_print(value):
    return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.3f}"


SCORES = {}


def run(name, model, data, exact_draws):
    """Every method on one posterior: prints the table and returns the draws of all."""
    reference, fits = exact_draws(100_000, seed=0), {}
    results = {method: fit(model, data, fits) for method, fit in METHODS.items()}
    table = {}
    for method, result in results.items():
        rest = {k: result.get(k, math.nan) for k in ("k-hat", "ESS/N", "seconds")}
        if "posterior" in result:
            rest["trusted"] = "yes" if result["posterior"].verdict.ok else "no"
            rest["error of .sample()"] = max(errors(result["sample"], reference).values())
        table[method] = errors(result["draws"], reference) | rest
    table["exact draws"] = errors(exact_draws(DRAWS, seed=1), reference)
    SCORES[name] = pd.DataFrame(table).T.infer_objects()
    display(SCORES[name].map(in_print))
    return {"exact": exact_draws(DRAWS, seed=1)} | {method: result["draws"] for method, result in results.items()}, fits


# %% [markdown]
# And two pictures for each posterior: the pair of scalars that is hardest to fit (chosen by
# `pyroflows.report.plots.hardest_pair` from the exact draws: the pair whose dependence a Gaussian explains least), and the
# marginals of these two.

# %%
COLOURS = {
    "exact": "#777777",
    "mean field": "#E69F00",
    "full rank": "#0072B2",
    "IAF": "#009E73",
    "RealNVP": "#D55E00",
    "splines": "#CC79A7",
    "NUTS": "#000000",
    "NeuTra": "#56B4E9",
}


def hardest(draws, log):
    columns = scalars(draws["exact"])
    names = list(columns)
    pair = hardest_pair(np.stack(list(columns.values()), 1))
    x, y = (names[i] for i in pair)

    def values(method, name):
        column = scalars(draws[method])[name]
        return np.log(column) if name in log else column

    return [(name, f"log {name}" if name in log else name) for name in (x, y)], values


def window(column):
    low, high = np.quantile(column, [0.002, 0.998])
    return low - 0.15 * (high - low), high + 0.15 * (high - low)


def plot_pair(draws, log=()):
    (x, y), values = hardest(draws, log)
    _, axes = plt.subplots(2, 4, figsize=(12, 5.6), sharex=True, sharey=True, layout="constrained")
    for ax, method in zip(axes.flat, draws, strict=True):
        ax.scatter(values(method, x[0])[:1000], values(method, y[0])[:1000], s=5, lw=0, alpha=0.45, color=COLOURS[method])
        ax.set_title(method, fontsize=11)
    axes[0, 0].set(xlim=window(values("exact", x[0])), ylim=window(values("exact", y[0])))
    for ax in axes[1]:
        ax.set_xlabel(x[1])
    for ax in axes[:, 0]:
        ax.set_ylabel(y[1])
    plt.show()


def plot_marginals(draws, log=()):
    pair, values = hardest(draws, log)
    fig, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for ax, (name, label) in zip(axes, pair, strict=True):
        edges = np.linspace(*window(values("exact", name)), 36)
        middle = (edges[1:] + edges[:-1]) / 2
        for method in draws:
            column = values(method, name)
            height = np.histogram(column, edges)[0] / len(column) / (edges[1] - edges[0])
            if method == "exact":
                ax.fill_between(middle, height, color="0.85", label=method)
            else:
                ax.plot(middle, height, color=COLOURS[method], lw=1.4, ls=":" if method == "NUTS" else "-", label=method)
        ax.set(xlabel=label, yticks=[])
        ax.set_ylim(bottom=0)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    plt.show()


# %% [markdown]
# ## 1. Correlation: a regression with collinear predictors
#
# Three predictors that nearly move together, a known noise, normal priors: the posterior is exactly Gaussian, with a
# covariance that one can write down.

# %%
generator = torch.Generator().manual_seed(1)
common = torch.randn(40, 1, generator=generator)
features = common + 0.25 * torch.randn(40, 3, generator=generator)
response = features @ torch.tensor([1.0, -0.5, 0.5]) + 0.5 + torch.randn(40, generator=generator)


def regression(x, y):
    intercept = pyro.sample("intercept", Normal(0.0, 3.0))
    beta = pyro.sample("beta", Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", Normal(intercept + (beta * x).sum(-1), 1.0), obs=y)


columns = torch.cat([torch.ones(40, 1), features], 1)
precision = columns.T @ columns + torch.eye(4) / 9
posterior_mean = torch.linalg.solve(precision, columns.T @ response)


def exact_regression(n, seed):
    torch.manual_seed(seed)
    draws = MultivariateNormal(posterior_mean, precision_matrix=precision).sample((n,))
    return {"intercept": draws[:, 0], "beta": draws[:, 1:]}


correlated, _ = run("correlation", regression, {"x": features, "y": response}, exact_regression)

# %%
plot_pair(correlated)
plot_marginals(correlated)

# %% [markdown]
# The full-rank Gaussian is the right family, and all flows contain it. The mean-field guide finds the means, but is far too
# narrow, and this is no matter of training: among the Gaussians with independent coordinates, the one that is closest in
# $\text{KL}(q \| p)$ has the variances $1 / \Lambda_{ii}$, of the *precision* matrix $\Lambda$, which are the variances of
# one coordinate *given all others*. One can check this without any training:

# %%
covariance = torch.linalg.inv(precision)
predicted = (1 / precision.diagonal().sqrt() / covariance.diagonal().sqrt()).numpy()
fitted = {k: v.std() for k, v in scalars(correlated["mean field"]).items()}
exact_sd = {k: v.std() for k, v in scalars(correlated["exact"]).items()}
ratios = {k: fitted[k] / exact_sd[k] for k in fitted}
display(pd.DataFrame({"predicted": dict(zip(ratios, predicted, strict=True)), "mean field": ratios}).rename_axis("sd ratio"))
assert np.allclose(list(ratios.values()), predicted, atol=0.05)

# %% [markdown]
# A mean-field ELBO that has converged is thus no sign of a right width. Its importance weights do tell: look at the ESS in
# the first table.
#
# ## 2. A bend: a saturating curve
#
# A reaction whose speed saturates, $v(c) = v_{\max}\, c / (K + c)$, measured at concentrations that hardly reach
# saturation. The data know the slope $v_{\max} / K$ well, and the two by themselves badly: a curved ridge. Two parameters,
# so the truth is a sum over a grid.

# %%
concentration = torch.tensor([0.2, 0.4, 0.6, 0.9, 1.2, 1.5])
speed = torch.tensor([0.19, 0.41, 0.42, 0.71, 0.72, 0.98])


def saturation(c, v):
    vmax = pyro.sample("vmax", LogNormal(0.5, 1.0))
    k = pyro.sample("K", LogNormal(0.5, 1.0))
    with pyro.plate("row", len(c)):
        pyro.sample("v", Normal(vmax * c / (k + c), 0.06), obs=v)


def on_a_grid(x, y, log_density, names, back=lambda values: values):
    """Exact draws from a density on the plane: a cell of the grid, and a point in it."""
    mesh = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    probabilities = log_density(mesh).softmax(0)
    cell = torch.stack([x[1] - x[0], y[1] - y[0]])

    def draw(n, seed):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(probabilities, n, replacement=True, generator=generator)
        values = back(mesh[chosen] + cell * (torch.rand(n, 2, generator=generator) - 0.5))
        return dict(zip(names, values.unbind(-1), strict=True))

    return draw


def log_saturation(logs):
    vmax, k = logs.exp().unsqueeze(-1).unbind(-2)
    likelihood = Normal(vmax * concentration / (k + concentration), 0.06).log_prob(speed).sum(-1)
    return likelihood + Normal(0.5, 1.0).log_prob(logs).sum(-1)


exact_saturation = on_a_grid(
    torch.linspace(-1.0, 5.0, 900), torch.linspace(-1.5, 5.5, 900), log_saturation, ("vmax", "K"), torch.exp
)
bent, _ = run("bend", saturation, {"c": concentration, "v": speed}, exact_saturation)

# %%
plot_pair(bent, log=("vmax", "K"))
plot_marginals(bent, log=("vmax", "K"))

# %% [markdown]
# On the logarithmic scale, on which the guides live, the ridge is a narrow, bent strip. A Gaussian has to choose a straight
# piece of it. The flows bend.
#
# ## 3. A funnel: eight schools
#
# The classic, in its centred form: ten scalars, of which $\tau$ decides how far the eight $\theta_j$ may differ. The truth
# is a sum over a grid of $(\mu, \log \tau)$, and $\theta$ given both is conjugate
# (the [tutorial on eight schools](eight_schools.ipynb) takes it apart).

# %%
example = load_example("eight_schools")
sigma, y = example.kwargs["sigma"], example.kwargs["y"]


def log_schools(points):
    mu, log_tau = points.unsqueeze(-1).unbind(-2)
    tau = log_tau.exp()
    likelihood = Normal(mu, (sigma**2 + tau**2).sqrt()).log_prob(y).sum(-1)
    return likelihood + (Normal(0.0, 5.0).log_prob(mu) + HalfCauchy(5.0).log_prob(tau) + log_tau).squeeze(-1)


exact_mu_tau = on_a_grid(torch.linspace(-20, 30, 401), torch.linspace(-10, 5, 901), log_schools, ("mu", "log_tau"))


def exact_schools(n, seed):
    found = exact_mu_tau(n, seed)
    mu, tau = found["mu"].unsqueeze(-1), found["log_tau"].exp().unsqueeze(-1)
    precision = 1 / sigma**2 + 1 / tau**2
    noise = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed + 100))
    theta = (y / sigma**2 + mu / tau**2) / precision + noise / precision.sqrt()
    return {"mu": mu.squeeze(-1), "tau": tau.squeeze(-1), "theta": theta}


schools, _ = run("funnel", example.model, example.kwargs, exact_schools)

# %%
plot_pair(schools, log=("tau",))
plot_marginals(schools, log=("tau",))

# %% [markdown]
# Every method has trouble in the neck, at small $\tau$, and each its own. The Gaussians have one width for all $\tau$, and
# settle for a piece of the mouth. The flows go down into the neck as far as their training has taken them. NUTS has one
# step size, for the mouth, and its chain enters the neck seldom if at all; with 200 draws it has not seen much else either.
# NeuTra runs where the RealNVP has already straightened most of the funnel. Left to choose its guide by itself,
# `fit_posterior` puts a flow over $\mu$ and $\tau$ only, and so goes around the funnel; the tutorial on eight schools shows
# that guide.
#
# ## 4. Two modes: a place from two distances
#
# Two beacons on the line $v = 0$, and a measured distance to each. The place is on one side of the line or on its mirror
# image; only a weak prior prefers one.

# %%
beacons = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
distances = torch.tensor([2.4, 2.7])


def beacon_model(r):
    u = pyro.sample("u", Normal(0.0, 2.0))
    v = pyro.sample("v", Normal(0.5, 2.0))
    place = torch.stack([u, v], -1)
    with pyro.plate("beacon", 2):
        pyro.sample("r", Normal((place - beacons).norm(dim=-1), 0.15), obs=r)


def log_beacons(points):
    prior = Normal(torch.tensor([0.0, 0.5]), 2.0).log_prob(points).sum(-1)
    return prior + Normal((points.unsqueeze(-2) - beacons).norm(dim=-1), 0.15).log_prob(distances).sum(-1)


exact_beacons = on_a_grid(torch.linspace(-4, 4, 801), torch.linspace(-5, 5, 1001), log_beacons, ("u", "v"))
two, flows = run("two modes", beacon_model, {"r": distances}, exact_beacons)

# %%
plot_pair(two)
plot_marginals(two)

# %% [markdown]
# Whoever finds one of the two places, stays there. The Gaussian guides lose a mode, as they must. The flows could in
# principle hold both, with a thin bridge between them, but the ELBO sees only what the guide's draws see, and gives
# them no reason to look for the other place. NUTS cannot cross the gap, nor can NeuTra from a flow that has lost one.
# Worse: neither the weights nor the ESS of a chain need see any of this (the tutorial
# [Can I trust this posterior?](can_i_trust_this_posterior.ipynb) explains why). The weights of the Gaussian guides look all
# but perfect. Those of a flow do until, by luck, a stray draw of its tail comes near the other place and gets a huge weight;
# then k-hat is large, or the ESS small. What the flows' verdicts say:

# %%
for name, posterior in flows.items():
    print(f"{name}: {posterior.verdict}\n")
shares = {method: float((draws["v"] > 0).double().mean()) for method, draws in two.items()}
display(pd.DataFrame({"share of v > 0": shares}).T)
assert all(SCORES["two modes"].loc[method, "ESS/N"] > 0.9 for method in ("mean field", "full rank"))
assert not any(posterior.verdict.ok for posterior in flows.values())

# %% [markdown]
# Besides the weights, the verdict of `fit_posterior` rests on a census of the modes, and that is what speaks here. Left to
# choose its guide by itself, `fit_posterior` takes a mixture:

# %%
start = time.process_time()
automatic = pf.fit_posterior(beacon_model, kwargs={"r": distances}, progress=False)
seconds = time.process_time() - start
print(automatic.verdict)
draws = automatic.sample(DRAWS, seed=1)
found = errors(draws, exact_beacons(100_000, seed=0))
print(f"mean error {found['mean error']:.3f}, sd error {found['sd error']:.3f}, {seconds:.1f} CPU s")
print(f"share of v > 0: {float((draws['v'] > 0).double().mean()):.3f}, exact {shares['exact']:.3f}")

# %% [markdown]
# ## In sum
#
# The larger of the two errors, for every method and posterior, in colour on a logarithmic scale:

# %%
worst = pd.DataFrame({name: table[["mean error", "sd error"]].astype(float).max(axis=1) for name, table in SCORES.items()})
fig, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
image = ax.imshow(np.log10(worst), cmap="RdYlGn_r", vmin=-2, vmax=0.3, aspect="auto")
ax.set_xticks(range(worst.shape[1]), worst.columns)
ax.set_yticks(range(worst.shape[0]), worst.index)
for (i, j), value in np.ndenumerate(worst.to_numpy()):
    ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 1 or value < 0.02 else "black")
ax.spines[:].set_visible(False)
bar = fig.colorbar(image, ticks=[-2, -1, 0])
bar.ax.set_yticklabels(["0.01", "0.1", "1"])
bar.set_label("larger of mean error and sd error")
plt.show()
total = pd.DataFrame({name: table["seconds"] for name, table in SCORES.items()}).astype(float)
display(total.drop(index="exact draws").rename_axis("CPU seconds"))

# %% [markdown]
# What to take home:
#
# - **Mean field** is quick, and too narrow wherever there is correlation, by an amount that is known beforehand.
# - **Full rank** is right for a Gaussian posterior, and a good start for everything else.
# - **Flows** bend to what Gaussians cannot follow. Which of them is best depends on the posterior: autoregressive
#   flows are strong in few steps and slow to invert, couplings are fast in both directions, splines bend most and want
#   more steps. None of them makes two hills well.
# - **NUTS** is exact in the limit. In a funnel the limit is far away, and a low ESS says so; with modes far apart it is
#   further, and nothing says so.
# - **NeuTra** repairs what a flow has slightly wrong. It inherits the modes that the flow has lost.
# - **Look at the diagnostics, and at more than one.** In the first three problems, the ESS of the weights or of the chain
#   calls out what is badly wrong. In the fourth it is blind, or sees by luck.

# %%
badly = 0.5
for name, table in SCORES.items():
    wrong = table.index[table[["mean error", "sd error"]].astype(float).max(axis=1) > badly]
    for method in wrong:
        ess = table.loc[method, "ESS/N"]
        print(f"{name:12} {method:11} has an error above {badly} of a standard deviation, and an ESS/N of {ess:.3f}")

# %% [markdown]
# ## Exercises
#
# 1. **More budget.** Which entries of the last picture improve with ten times the steps or draws, and which do not? Guess
#    before you try.
#
# 2. **The correction.** The last column of the tables is about `posterior.sample`, which resamples by the weights where
#    k-hat allows it. Do the same for the Gaussian guides by hand. Where does weighting repair them, and how would k-hat
#    have told you?
#
# 3. **Another coordinate.** Write `saturation` with the slope $s = v_{\max} / K$ and $K$ as its parameters (mind the prior).
#    What happens to the bend, and to the errors of the full-rank Gaussian?
#
# 4. **A bridge.** Give the distances a noise of 0.3 in place of 0.15. The modes now touch. What do the three flows do, and
#    NUTS?
#
# 5. **A prior that decides.** How strongly must the prior of `v` prefer one side, before losing the other mode stops
#    mattering? Compute the share of the lost mode as a function of the prior's mean, and compare with what the verdict
#    tolerates.
