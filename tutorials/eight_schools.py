# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of about two minutes:
#   #     jupytext --to ipynb --execute eight_schools.py
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
# # Eight schools with a flow guide
#
# Variational inference in Pyro is quick, but an automatic guide is usually a Gaussian, and a Gaussian can be badly wrong
# without a word of warning. This notebook takes the best-known small example of that, the *eight schools*, and shows
#
# 1. the **exact** posterior, computed here from scratch, so that every claim below can be checked;
# 2. where Pyro's Gaussian guides go wrong, and why;
# 3. a **normalizing flow** as the guide: one call of `pyroflows.fit_posterior`, how to read its verdict, and which guide
#    the same call takes by default;
# 4. a flow guide in the `pyro.infer.SVI` loop that you already know;
# 5. the way into ArviZ, and what to do when the verdict is "no".
#
# You need to know Pyro's `sample` and `plate`, and what an ELBO is. Everything runs on one CPU core in about two minutes.

# %%
import inspect
import math
import time
import warnings

# Notices of other packages that would only distract here: on notebook widgets, and on a future ArviZ.
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
from pyro.distributions import HalfCauchy, Normal
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyroflows as pf
from pyroflows.examples import load_example

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
pd.set_option("display.precision", 3)

# %% [markdown]
# ## 1. The data and the model
#
# In eight schools, students were coached for a college entrance test (the verbal part of the SAT). Each school $j$ was an
# experiment of its own, and reported an estimated effect of the coaching, $y_j$ points, with a standard error $\sigma_j$
# ([Rubin, 1981](https://doi.org/10.3102/10769986006004377)). The example comes with the package.

# %%
example = load_example("eight_schools")
model, data = example.model, example.kwargs
y, sigma = data["y"], data["sigma"]

schools = list("ABCDEFGH")
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.errorbar(range(8), y, yerr=sigma, fmt="o", color="#0072B2", capsize=4, lw=2)
pooled = (y / sigma**2).sum() / (1 / sigma**2).sum()
ax.axhline(0, color="0.8", lw=1, zorder=0)
ax.axhline(pooled, color="0.3", ls="--", lw=1.5, zorder=0, label=f"weighted mean, {pooled:.1f} points")
ax.set_xticks(range(8), schools)
ax.set_xlabel("school")
ax.set_ylabel("effect $y_j \\pm \\sigma_j$")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# How much does coaching help in school A: as much as A itself reports, or as much as the schools do on average? A
# hierarchical model lets the data decide. The true effects $\theta_j$ scatter around a common mean $\mu$ with a standard
# deviation $\tau$, which is unknown as well:
#
# $$
# \mu \sim N(0, 5), \qquad \tau \sim \text{HalfCauchy}(5), \qquad
# \theta_j \sim N(\mu, \tau), \qquad y_j \sim N(\theta_j, \sigma_j).
# $$
#
# (The second argument of $N$ is a standard deviation, as in Pyro.) The packaged model is an ordinary Pyro function:

# %%
print(inspect.getsource(model))

# %% [markdown]
# ## 2. The exact posterior
#
# Ten unknowns look like a job for MCMC, but eight of them can be integrated out by hand. Given $\mu$ and $\tau$, the sum of
# the two Gaussian errors is Gaussian again,
#
# $$
# y_j \mid \mu, \tau \;\sim\; N\!\left(\mu, \sqrt{\sigma_j^2 + \tau^2}\right),
# $$
#
# which leaves a density in two dimensions, and two dimensions fit on a grid. We lay the grid over $\mu$ and $\log \tau$;
# the change of variables from $\tau$ to $\log \tau$ adds the factor $\tau$:
#
# $$
# p(\mu, \log \tau, y) \;=\; N(\mu \mid 0, 5) \;\, \text{HalfCauchy}(\tau \mid 5) \;\, \tau \;\,
# \prod_{j=1}^{8} N\!\left(y_j \,\middle|\, \mu, \sqrt{\sigma_j^2 + \tau^2}\right).
# $$
#
# Its sum over the grid, times the area of a cell, is the **evidence** $p(y)$, also known as the marginal likelihood.

# %%
grid_mu = torch.linspace(-25, 35, 601)
grid_log_tau = torch.linspace(-12, 6, 1801)
mu, log_tau = torch.meshgrid(grid_mu, grid_log_tau, indexing="ij")
tau = log_tau.exp()

log_joint = Normal(0.0, 5.0).log_prob(mu) + HalfCauchy(5.0).log_prob(tau) + log_tau
for y_j, sigma_j in zip(y, sigma, strict=True):
    log_joint += Normal(mu, (sigma_j**2 + tau**2).sqrt()).log_prob(y_j)

cell = (grid_mu[1] - grid_mu[0]) * (grid_log_tau[1] - grid_log_tau[0])
exact_log_evidence = float(log_joint.flatten().logsumexp(0) + cell.log())
print(f"log evidence on the grid: {exact_log_evidence:.4f}")

# %% [markdown]
# To draw from the posterior we pick cells of the grid with the right probabilities (and a random point within the cell),
# and then draw each $\theta_j$ from its distribution given $\mu$ and $\tau$, which is conjugate:
#
# $$
# \theta_j \mid \mu, \tau, y \sim N\!\left(m_j, \sqrt{V_j}\right), \qquad
# \frac{1}{V_j} = \frac{1}{\sigma_j^2} + \frac{1}{\tau^2}, \qquad
# m_j = V_j \left(\frac{y_j}{\sigma_j^2} + \frac{\mu}{\tau^2}\right).
# $$
#
# These draws are independent, and exact but for the width of a cell. They are our reference.


# %%
def exact_draws(n, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (log_joint - log_joint.max()).exp().flatten()
    cells = torch.multinomial(probabilities, n, replacement=True, generator=generator)
    jitter = torch.rand(2, n, generator=generator) - 0.5
    mu_draws = mu.flatten()[cells] + jitter[0] * (grid_mu[1] - grid_mu[0])
    tau_draws = (log_tau.flatten()[cells] + jitter[1] * (grid_log_tau[1] - grid_log_tau[0])).exp()
    precision = 1 / sigma**2 + 1 / tau_draws.unsqueeze(1) ** 2
    mean = (y / sigma**2 + mu_draws.unsqueeze(1) / tau_draws.unsqueeze(1) ** 2) / precision
    theta_draws = mean + torch.randn(n, 8, generator=generator) / precision.sqrt()
    return {"mu": mu_draws, "tau": tau_draws, "theta": theta_draws}


def table_of(draws):
    """A data frame with one column for each scalar: mu, tau, theta[0], ..., theta[7]."""
    columns = {}
    for name in ("mu", "tau", "theta"):
        values = draws[name].detach().reshape(len(draws[name]), -1)
        for i, column in enumerate(values.T):
            columns[f"theta[{i}]" if name == "theta" else name] = column.numpy()
    return pd.DataFrame(columns)


reference = table_of(exact_draws(200_000, seed=0))
display(reference.describe(percentiles=[0.05, 0.5, 0.95]).T[["mean", "std", "5%", "50%", "95%"]])

# %% [markdown]
# ## 3. Why this form is hard: the funnel
#
# The model is written in its *centred* form: $\theta_j$ is drawn around $\mu$ with standard deviation $\tau$. Look at what
# that does to the posterior of one school's effect and $\log \tau$:

# %%
COLOURS = {"exact": "#777777", "AutoNormal": "#009E73", "AutoMultivariateNormal": "#0072B2", "AutoFlow": "#D55E00"}
some = reference[:3000]

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
left.scatter(some["theta[0]"], np.log(some["tau"]), s=5, alpha=0.4, color=COLOURS["exact"], lw=0)
left.set_xlim(-25, 45)
left.set_xlabel("$\\theta_0$ (school A)")
left.set_ylabel("$\\log\\,\\tau$")
left.set_title("as the model is written: a funnel", fontsize=11)
right.scatter(
    (some["theta[0]"] - some["mu"]) / some["tau"], np.log(some["tau"]), s=5, alpha=0.4, color=COLOURS["exact"], lw=0
)
right.set_xlabel("$(\\theta_0 - \\mu)\\,/\\,\\tau$")
right.set_title("the same draws, standardised", fontsize=11)
right.set_ylim(-7, 4)
plt.show()

# %% [markdown]
# On the left is a funnel. Where $\tau$ is large, the schools are free to differ and $\theta_0$ has room; where $\tau$ is
# small, they must all agree, and $\theta_0$ is confined to a strip around $\mu$ whose width is $\tau$ itself. The formula
# for $V_j$ says the same: as $\tau \to 0$, $\sqrt{V_j} \to \tau$.
#
# No single width is right for both ends. NUTS, which has one step size, either misses the neck or crawls through the mouth.
# A Gaussian guide has the same trouble in another guise: under a Gaussian over $(\mu, \log\tau, \theta)$, the standard
# deviation of $\theta_0$ given $\log\tau$ is *a constant*.
#
# (On the right is the classical cure: divide by $\tau$, and the funnel is gone. Reparametrise like this whenever you can; we
# come back to it. But one has to know the funnel first, and in larger models there is often no such formula.)

# %% [markdown]
# ## 4. Two Gaussian guides
#
# A guide $q$ is trained by maximising the ELBO, which falls short of the log evidence by exactly the Kullback-Leibler
# divergence that we want to be small:
#
# $$
# \text{ELBO}(q) \;=\; \mathbb{E}_{q(z)}\!\left[\log p(z, y) - \log q(z)\right]
# \;=\; \log p(y) - \text{KL}\!\left(q \,\|\, p(\cdot \mid y)\right).
# $$
#
# As we know $\log p(y)$ from the grid, we can read the divergence off the training. Here is an ordinary SVI loop, with
# three settings that make it a good one: 256 particles per step, all in one go (`vectorize_particles=True`); a step size
# that decays to zero along a cosine; and gradients clipped by their norm, so that one wild draw cannot wreck the fit.


# %%
def train(guide, step_size, steps=2500, particles=256):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim_args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": step_size, "betas": (0.9, 0.99)}, "T_max": steps}
    optimizer = pyro.optim.CosineAnnealingLR(optim_args, clip_args={"clip_norm": 10.0})
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    start = time.process_time()
    history = []
    for _ in range(steps):
        history.append(-svi.step(**data))
        optimizer.step()  # moves the step size along its cosine
    print(f"{type(guide).__name__}: {steps} steps in {time.process_time() - start:.0f} CPU s")
    return history


DRAWS = 20_000
guides = {"AutoNormal": AutoNormal(model), "AutoMultivariateNormal": AutoMultivariateNormal(model)}
histories, tables = {}, {}
for name, guide in guides.items():
    histories[name] = train(guide, step_size=0.03)
    tables[name] = table_of(Predictive(guide, num_samples=DRAWS, parallel=True)(**data))

# %% [markdown]
# `AutoNormal` is a Gaussian with independent coordinates, `AutoMultivariateNormal` one with a full covariance matrix. Both
# live on the unconstrained scale, where the positive $\tau$ has become $\log \tau$. We shall see below how they did; first
# their rival.

# %% [markdown]
# ## 5. A flow guide, in one call
#
# A normalizing flow bends a Gaussian into another shape. Draw $x \sim N(0, I)$ and push it through a chain of invertible
# maps, $z = f_K(\cdots f_2(f_1(x)))$; the density of $z$ follows by the change of variables,
#
# $$
# \log q(z) = \log N(x \mid 0, I) - \sum_{k=1}^{K} \log \left|\det \frac{\partial f_k}{\partial x_{k-1}}\right|,
# \qquad x_0 = x, \quad x_k = f_k(x_{k-1}).
# $$
#
# In a RealNVP ([Dinh et al., 2016](https://arxiv.org/abs/1605.08803)), each $f_k$ leaves half of the coordinates as they
# are, and shifts and *scales* the others by amounts that small neural networks compute from the first half. A scale that
# depends on another coordinate is just what a funnel needs.
#
# `pf.fit_posterior` does the rest. With `guide=pf.RealNVP` it fits one flow over all ten latents. The flow starts at a
# Gaussian, fitted at the best of the modes that ascents from many starts have found. It is then trained in rounds, and
# judged after each, until it can be trusted: after 150 steps, enough for most posteriors; after 1500; and, where that is
# not enough, after more. (Left to itself, the call takes another guide for this model: see the end of this section.)

# %%
start = time.process_time()
posterior = pf.fit_posterior(model, kwargs=data, guide=pf.RealNVP, seed=0, progress=False)
print(posterior.verdict)
print(f"{time.process_time() - start:.0f} CPU s")

# %% [markdown]
# The rounds, with the share of effective draws that each reached:

# %%
for rung in posterior.rungs:
    verdict = rung.verdict
    print(f"{rung.name:16}  ESS {verdict.ess:4.0%}  {'trust' if verdict.ok else 'do not trust'}")

# %%
display(posterior.summary())

# %% [markdown]
# ### What the verdict says
#
# How can a guide be judged when the truth is not known? By importance sampling
# ([Yao et al., 2018](https://arxiv.org/abs/1802.02538); [Vehtari et al., 2024](https://arxiv.org/abs/1507.02646)). Draw
# $z_1, \dots, z_N$ from the guide and compare its density with the model's,
#
# $$
# w_i = \frac{p(z_i, y)}{q(z_i)}.
# $$
#
# If $q$ were the posterior, all weights would be equal (to $p(y)$, in fact: their mean estimates the evidence). Two numbers
# say how far from equal they are. The **effective sample size**, $\text{ESS} = (\sum_i w_i)^2 / \sum_i w_i^2$, is given as
# a fraction of $N$: near 100 % the draws are nearly as good as draws from the posterior, at 1 % a few draws carry all the
# weight. **$\hat k$** (k-hat) looks at the largest weights only. It is the shape of a Pareto distribution fitted to them,
# and tells how heavy their tail is: up to 0.5 the weights have a finite variance; up to 0.7 they can be relied on in
# practice; above that there may be regions that the guide hardly ever visits, so that averages over the draws may not have
# settled yet. Last, the verdict applies the weights to the draws and looks whether any mean, or the width of any 90 %
# interval, moves. If one does, the guide was off by at least that much. For a "yes", $\hat k$ or the ESS must be good, and
# nothing may move by more than a trifle.
#
# Weights can only see places that some draw has reached. So the verdict looks elsewhere, too: the ascents from many starts
# may have found a region where the posterior has mass and the guide has none (`missed`), and a few Hamiltonian trajectories
# from the draws may move a mean or a width (`drift`). Either turns a "yes" into a "no".
#
# A large $\hat k$ beside an ESS near 100 % is no contradiction, and a funnel is where you meet it: deep in the neck the
# weights are large, but the neck holds little of the mass. And a good verdict is no proof:
# [Can I trust this posterior?](can_i_trust_this_posterior.ipynb) takes each check apart and shows what none of them sees.
#
# Where the weights are good enough, `posterior.sample` uses them: it resamples the guide's draws, which corrects most of
# what was left to correct.
# Where they are not, more training or a better guide is needed.

# %%
tables["AutoFlow"] = table_of(posterior.sample(DRAWS, seed=1))
histories["AutoFlow"] = posterior.history

# %% [markdown]
# ### The evidence
#
# The mean weight is an estimate of $p(y)$, so the fit comes with a number for model comparison. Here we know the right
# one.

# %%
verdict = posterior.verdict
print(f"log evidence, fit_posterior  {posterior.log_evidence:.4f} (Monte Carlo error {verdict.log_evidence_error:.4f})")
print(f"log evidence, exact          {exact_log_evidence:.4f}")
missing = 1 - math.exp(posterior.log_evidence - exact_log_evidence)
print(f"share of the evidence that is missing: {missing:.2%}")
floor = tables["AutoFlow"]["tau"].min()
print(f"share of the exact posterior below {floor:.2g}, the smallest tau drawn: {(reference['tau'] < floor).mean():.2%}")

# %% [markdown]
# The two values are very close, and what little is missing has a place: the tip of the funnel's neck, which no draw has
# reached. This is the fine print of every importance-sampling estimate: its Monte Carlo error counts only what the draws
# have seen. For most purposes the tip does not matter; for the principle it does, and section 8 reaches it.

# %% [markdown]
# ### In pictures
#
# First the pair that makes the trouble. Grey is exact; the guides are in colour.

# %%
fig, axes = plt.subplots(1, 4, figsize=(11.5, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, (name, table) in zip(axes, {"exact": reference, **tables}.items(), strict=True):
    some = table[:3000]
    ax.scatter(some["theta[0]"], np.log(some["tau"]), s=5, alpha=0.4, color=COLOURS[name], lw=0)
    ax.set_title(name, fontsize=11)
    ax.set_xlabel("$\\theta_0$ (school A)")
axes[0].set(ylabel="$\\log\\,\\tau$", xlim=(-25, 45), ylim=(-7, 4.5))
plt.show()

# %% [markdown]
# An ellipse cannot follow a funnel, whether its axes are those of the plot or not. To see why the Gaussians settle for
# such a short piece of it, look at the ELBO again: it is an average over the *guide's* draws, so a draw outside of the
# funnel costs dearly, while a part of the funnel without draws costs little. So they stay where their one width fits. The
# flow widens and narrows with $\tau$.
#
# The same in marginals:

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
STYLES = {"AutoNormal": ":", "AutoMultivariateNormal": "--", "AutoFlow": "-"}
panels = (("tau", "$\\tau$", np.linspace(0, 20, 61)), ("theta[0]", "$\\theta_0$ (school A)", np.linspace(-15, 35, 61)))
for ax, (column, label, bins) in zip(axes, panels, strict=True):
    centres = (bins[1:] + bins[:-1]) / 2
    per_unit = 1 / (bins[1] - bins[0])
    counts = np.histogram(reference[column], bins)[0] * per_unit / len(reference)
    ax.fill_between(centres, counts, color="0.85", label="exact")
    for name, table in tables.items():
        counts = np.histogram(table[column], bins)[0] * per_unit / len(table)
        ax.plot(centres, counts, STYLES[name], color=COLOURS[name], lw=2, label=name)
    ax.set_xlabel(label)
    ax.set_ylim(bottom=0)
axes[0].set_ylabel("posterior density")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
plt.show()

# %% [markdown]
# The school's own effect looks almost right under all three guides: look at $\tau$ before you trust a fit like that.
#
# And in numbers. For each of the ten scalars we take the error of the mean, in units of the reference's standard deviation
# (sd), and the logarithm of the ratio of the two standard deviations: 0 is right, $-0.7$ is half as wide as it should be.
# The last row is what other exact draws score, as many as the guides get: the noise in this table.


# %%
def errors(table):
    mean = (table.mean() - reference.mean()) / reference.std()
    spread = np.log(table.std() / reference.std())
    row = {}
    for what, error in (("error of the mean (sd)", mean), ("log ratio of the sd", spread)):
        row |= {(what, "tau"): error["tau"], (what, "theta[0]"): error["theta[0]"]}
        row[what, "worst of 10"] = error[error.abs().idxmax()]
    return row


def show_errors(tables):
    rows = {**tables, "exact, other draws": table_of(exact_draws(DRAWS, seed=1))}
    display(pd.DataFrame({name: errors(table) for name, table in rows.items()}).T.round(3))


show_errors(tables)

# %% [markdown]
# ### The default: a guide that follows the model
#
# Section 2 did not fight the funnel, it went around it: $\mu$ and $\tau$ alone had to be searched, because every $\theta_j$
# is normal given the two. When you name no guide, `pf.fit_posterior` looks for such a structure in the second derivatives of
# the log density, and if there is one, tries a guide that follows it first: an `AutoStructuredFlow`, which is a flow over
# the few *globals*, here $\mu$ and $\log \tau$. The *locals* $\theta_j$ follow from one Newton step, which is exact where
# they are normal. (Other models, and those where this guide is not trusted, get the rest of the ladder: a Gaussian, a
# mixture, flows over all latents, and draws moved by Hamiltonian trajectories.)

# %%
start = time.process_time()
default = pf.fit_posterior(model, kwargs=data, seed=0, progress=False)
print(f"{time.process_time() - start:.0f} CPU s, {type(default.guide).__name__}")
for rung in default.rungs:
    print(f"{rung.name}  ESS {rung.verdict.ess:4.0%}  {'trust' if rung.verdict.ok else 'do not trust'}")
print(default.verdict)
structured = {"default": table_of(default.sample(DRAWS, seed=1))}
show_errors({"AutoFlow": tables["AutoFlow"], **structured})

# %% [markdown]
# It needs a small fraction of the time, as its flow has two dimensions in place of ten, and nothing about the $\theta_j$ is
# trained. The same holds with thousands of groups. (From a shell, with files for ArviZ and a picture:
# `python -m pyroflows fit eight_schools`.) The rest of this notebook stays with the flow over all latents, which asks for no
# structure at all.

# %% [markdown]
# ## 6. A flow guide in plain SVI
#
# The guide above is an `AutoFlow`: a Pyro autoguide like the others, so the training loop of section 4 takes it as it is.
# By default its flow is a RealNVP with smaller networks. Nothing of `fit_posterior` is used here: there is no Gaussian to
# start from, there are no importance weights, and Pyro's effect handlers run the model and the guide at every step.

# %%
svi_guide = pf.AutoFlow(model)
histories["AutoFlow, SVI"] = train(svi_guide, step_size=0.01)
tables["AutoFlow, SVI"] = table_of(Predictive(svi_guide, num_samples=DRAWS, parallel=True)(**data))
show_errors(tables)

# %% [markdown]
# How close did it come? `fit_posterior` also judges a guide that you have trained yourself: with `steps=0` it
# leaves the guide as it is.

# %%
judged = pf.fit_posterior(model, kwargs=data, guide=svi_guide, steps=0, progress=False)
print(judged.verdict)
print()
for name, fitted in {"fit_posterior": posterior, "plain SVI": judged}.items():
    gap = exact_log_evidence - fitted.verdict.elbo
    print(f"{name:14} ELBO {fitted.verdict.elbo:.3f}, short of the exact log evidence by {gap:.3f}")

# %% [markdown]
# The means and widths of its draws are nearly as good, and they are the guide's own, without any weights. The ELBO is a
# little further from the evidence, although it had more steps: it had no Gaussian to start from, and smaller networks. It
# comes close to the limits of the verdict: with another seed it can land on the other side, and would need more steps.
# The gap between the evidence and the ELBO shows the whole training:

# %%
fig, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
for name, history in histories.items():
    window = 100
    smooth = np.convolve(history, np.ones(window) / window, mode="valid")
    colour, style = ("#000000", "-.") if name == "AutoFlow, SVI" else (COLOURS[name], STYLES[name])
    label = "AutoFlow, fit_posterior" if name == "AutoFlow" else name
    ax.plot(np.arange(len(smooth)) + window, exact_log_evidence - smooth, style, color=colour, lw=1.8, label=label)
ax.set_yscale("log")
ax.set_ylim(3e-3, 30)
ax.set_xlabel("step")
ax.set_ylabel("log evidence $-$ ELBO")
ax.legend(frameon=False, ncols=2, loc="upper right")
plt.show()

# %% [markdown]
# The Gaussians soon reach a floor, and no number of steps gets them below it: it is the divergence of the best Gaussian of
# their kind. The flow gets far below.
# `fit_posterior` has a head start, as its flow begins at a Gaussian. At step 150 its second round begins, with the step size
# large again.
#
# Two remarks for your own loops. Leave the clipping in: early in the training a single draw deep in the neck can have an
# enormous gradient. And let the step size decay: the last gains come at the end, when the steps are small.

# %% [markdown]
# ## 7. Into ArviZ
#
# `posterior.to_arviz()` gives ArviZ's own container (an `InferenceData`, or a `DataTree` from ArviZ 1.0 on). Besides
# the draws it has the log likelihood, predictions of new data, draws from the prior, and the data, as far as the model
# allows. Its dimensions are named by the plates of the model.

# %%
idata = posterior.to_arviz()
print(idata)

# %%
az.plot_forest(idata, var_names=["mu", "tau", "theta"], combined=True)
plt.show()

# %% [markdown]
# Schools A to H are `theta[0]` to `theta[7]`. Compare this with the first picture: school A reported the largest effect by
# far, and C a negative one; in the posterior all eight are pulled towards $\mu$, the noisiest most. This *shrinkage* is
# what a hierarchical model is for.
#
# Leave-one-out cross-validation needs the log likelihood of each observation, which is there too:

# %%
print(az.loo(idata))

# %% [markdown]
# The Pareto $\hat k$ in this output is the same diagnostic for another question: can the posterior without observation $j$
# be reached from the posterior of all of them, by weighting? `elpd_loo` is the sum, over the schools, of the log density
# that the model gives to a school's result when it has not seen it. Where $\hat k$ is above 0.7, the school's part of that
# sum is uncertain, and a fit without the school would settle it.

# %% [markdown]
# ## 8. When the verdict says no
#
# Let us provoke one. With `steps=0` nothing is trained, and we see the Gaussian that the flow started from:

# %%
gaussian = pf.fit_posterior(model, kwargs=data, guide=pf.RealNVP, steps=0, progress=False)
print(gaussian.verdict)

# %% [markdown]
# A "no" comes with a reason. In the order in which they are worth trying:
#
# 1. **Look at the model.** Draws of zero density, or a parameter that no data inform, point to a prior or a support
#    that was not meant. No guide can mend that.
# 2. **Train on.** `pf.fit_posterior(model, kwargs=data, guide=gaussian.guide)` goes on from where a guide is, in rounds,
#    until the verdict is a "yes"; `steps=20_000` allows more than the usual 6000 steps.
# 3. **Take a wider flow**:
#    `guide=lambda features: pf.RealNVP(features, transforms=10, network=pf.nn.mlp((128, 128)))`.
# 4. **Reparametrise.** A simpler shape is easier for every method.
# 5. **Hand over to MCMC**, with the flow as its map of the terrain: `pf.posterior.neutra(posterior)`, or NUTS (exercise 3).
#
# Number 4 is the classical cure for a funnel, so let us try it. The *non-centred* form has the standardised effects
# of section 3 as its latent variables, $\theta_j = \mu + \tau\,\tilde\theta_j$ with $\tilde\theta_j \sim N(0, 1)$. It is a
# different set of coordinates on the same model, so the evidence must be the same.

# %%
noncentered = load_example("eight_schools_noncentered")
easy = pf.fit_posterior(noncentered.model, kwargs=noncentered.kwargs, guide=pf.RealNVP, progress=False)
print(easy.verdict)
print(f"after {len(easy.history)} steps; the centred form took {len(posterior.history)}")
print()
print(f"log evidence, centred flow      {posterior.log_evidence:.4f}")
print(f"log evidence, non-centred flow  {easy.log_evidence:.4f} (Monte Carlo error {easy.verdict.log_evidence_error:.4f})")
print(f"log evidence, exact             {exact_log_evidence:.4f}")
print()
tip = {"exact": reference, "centred flow": tables["AutoFlow"], **structured}
tip["non-centred flow"] = table_of(easy.sample(DRAWS, seed=1))
for name, table in tip.items():
    print(f"posterior probability of tau < 0.01, {name:17} {(table['tau'] < 0.01).mean():.3%}")

# %% [markdown]
# Now most of the tip of the neck is there as well, which neither the centred flow nor the default guide has reached. The
# choice is not "flow or reparametrisation": reparametrise what you understand, let the flow take the rest, and let the
# verdict tell you whether it did.
#
# A funnel is not all that can go wrong. A posterior may have several modes, of which a guide has found only one: then no
# draw visits the others, and all weights look perfect. How the verdict finds a lost mode all the same, what a mixture of
# flows does about it, and what no check can see: [Can I trust this posterior?](can_i_trust_this_posterior.ipynb)

# %% [markdown]
# ## Exercises
#
# 1. **Another prior.** Copy the model and replace the half-Cauchy prior of $\tau$ by `HalfNormal(5)`. Adapt the grid, and
#    fit again with `pf.fit_posterior`. By how much do the log evidences differ, and do the two ways of computing them agree
#    on the Bayes factor? Which prior do the data prefer, and would you bet on it?
#
# 2. **What a flow needs.** `pf.NICE` has couplings that only shift, and one fixed scale for each coordinate. Fit with
#    `guide=pf.NICE`, and draw the pair $(\theta_0, \log\tau)$. Why is it so hard for NICE to make a funnel? Then fit a
#    RealNVP with 1, 2, 4 and 8 transforms (`guide=lambda features: pf.RealNVP(features, transforms=2)`) and plot the gap
#    between log evidence and ELBO against their number. What does the verdict say of each?
#
# 3. **NUTS with a map.** Pyro's NeuTra ([Hoffman et al., 2019](https://arxiv.org/abs/1903.03704)) runs NUTS in the base
#    space of a flow, where a good guide makes the posterior look like a standard normal:
#
#    ```python
#    from pyro.infer import MCMC, NUTS
#    from pyro.infer.reparam import NeuTraReparam
#
#    neutra = NeuTraReparam(posterior.guide)
#    mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=300, warmup_steps=200)
#    mcmc.run(**data)
#    (latent,) = mcmc.get_samples().values()
#    draws = neutra.transform_sample(latent.unsqueeze(1))  # room for the dimension of the plate
#    ```
#
#    (`pf.posterior.neutra(posterior)` does the like for many chains at once, by Hamiltonian Monte Carlo.) Compare the
#    draws with the reference, in a table as above. How many effective draws of $\tau$ do you get, and how many does plain
#    `NUTS(model)` give you in the same time?
