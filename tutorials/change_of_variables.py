# ---
# jupyter:
#   # The notebook is made from this file, in this folder, by one command of less than two minutes:
#   #     jupytext --to ipynb --execute change_of_variables.py
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
# # From the change of variables to flows
#
# A normalizing flow is the change-of-variables formula of a first course in probability, applied many times. This notebook
# starts at the formula and ends with trained flows. It is meant for those who teach, or learn, Bayesian inference or machine
# learning; what is said in formulas is also shown in pictures, of densities and of *grids*: a regular grid in the space of
# the base distribution, and where the flow takes it.
#
# 1. One dimension: the formula, a transform made by hand, and how to find out whether it is right
# 2. Several dimensions and composition: log-determinants add
# 3. Triangular Jacobians: why flows look the way they do
# 4. Couplings: NICE and RealNVP
# 5. Autoregressive layers: MAF and IAF, and who is fast where
# 6. Planar and radial layers
# 7. Splines
# 8. Training on data: forward KL
# 9. Training on a density: reverse KL
# 10. Which divergence, which flow
#
# You need to know densities, Jacobians, and a little PyTorch. Everything runs on one CPU core in less than two minutes, and
# every number is computed here. Timings are given as ratios, and will differ a little on your machine.

# %%
import itertools
import math
import time
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # a notice on notebook widgets

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from IPython.display import display
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints

import pyroflows as pf

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
pd.set_option("display.float_format", "{:.3f}".format)

# %% [markdown]
# ## 1. One dimension
#
# Let $x$ have density $p(x)$, and let $y = f(x)$ with $f$ increasing and differentiable. No probability is lost on the way:
# what lies in a small interval $dx$ at $x$ arrives in the interval $dy = f'(x)\,dx$ at $y$. Hence $q(y)\,dy = p(x)\,dx$, or
#
# $$
# q(y) = \frac{p(x)}{f'(x)}, \qquad \log q(y) = \log p(x) - \log f'(x), \qquad x = f^{-1}(y).
# $$
#
# Where $f$ stretches, the density is diluted; where it squeezes, it piles up. Note what is needed. To **draw** from $q$ we
# evaluate $f$ at a draw from $p$. To **score** a given $y$, that is to evaluate its density, we need $f^{-1}$ and the
# logarithm of the derivative.
#
# Our example is from classical statistics, Johnson's $S_U$ distribution
# ([Johnson, 1949](https://doi.org/10.1093/biomet/36.1-2.149)): $x \sim N(0, 1)$ and
#
# $$
# y = \sinh(a + b\,x), \qquad b > 0.
# $$
#
# The number $a$ makes it skew, and a large $b$ makes the tails heavy. The inverse is $x = (\operatorname{asinh} y - a) / b$,
# and $\log f'(x) = \log b + \log\cosh(a + b\,x)$.
#
# A transform of pyroflows is a class with two methods, one per direction. Each returns the point and the log-determinant of
# *its own* Jacobian; in one dimension that is the log-derivative, and it is summed over the entries of a vector. Here is a
# first version, copied from the formulas, with the derivative of the inverse, $1 / (b \sqrt{1 + y^2})$:


# %%
class FirstTry(pf.transforms.Transform):
    def __init__(self, features, a=0.0, b=1.0):
        super().__init__(features)
        self.a = nn.Parameter(torch.full((features,), float(a)))
        self.log_b = nn.Parameter(torch.full((features,), math.log(b)))

    def forward_and_log_det(self, x, context=None):
        u = self.a + self.log_b.exp() * x
        return u.sinh(), (self.log_b + u.cosh().log()).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        x = (y.asinh() - self.a) / self.log_b.exp()
        return x, -(self.log_b + 0.5 * torch.log1p(y**2)).sum(-1)


# %% [markdown]
# ### Is it right?
#
# Everything that follows depends on these log-determinants, and a wrong one does not crash: it gives a density that is not a
# density. `pf.check` holds a transform to a list of laws. Among them: the two directions undo each other; the
# log-determinant is that of the Jacobian which automatic differentiation computes; the density integrates to one; numbers
# stay finite far out, in both precisions.


# %%
def verdict(transform):
    report = pf.check(transform, raises=False)
    print(f"{report.subject}: {'all laws hold' if report.ok else 'broken'}")
    for result in report.results:
        if not result.passed:
            print(f"  {result.name}: {result.detail}")


class NoJacobian(FirstTry):
    """The beginner's mistake: change the variable and forget the derivative."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x)
        return y, torch.zeros_like(log_det)

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        return x, torch.zeros_like(log_det)


verdict(NoJacobian(1, a=0.5, b=0.8))
verdict(FirstTry(1, a=0.5, b=0.8))

# %% [markdown]
# The missing derivative is found, as expected. But our own version is broken too: the formulas are right, and the computer's
# numbers end. The square of a large $y$ overflows to infinity, and so does $\cosh u$, long before their logarithms get
# large. The remedy is to compute $\log\cosh u = |u| + \log(1 + e^{-2|u|}) - \log 2$ as one function, and to use it in both
# directions, as $\sqrt{1 + y^2} = \cosh(\operatorname{asinh} y)$.


# %%
def log_cosh(u):
    return u.abs() + nn.functional.softplus(-2 * u.abs()) - math.log(2)


class JohnsonSU(FirstTry):
    def forward_and_log_det(self, x, context=None):
        u = self.a + self.log_b.exp() * x
        return u.sinh(), (self.log_b + log_cosh(u)).sum(-1)

    def inverse_and_log_det(self, y, context=None):
        u = y.asinh()
        return (u - self.a) / self.log_b.exp(), -(self.log_b + log_cosh(u)).sum(-1)


johnson = JohnsonSU(1, a=0.5, b=0.8)
print(pf.check(johnson))

# %% [markdown]
# An experiment at randomly chosen points is not a proof, but few mistakes survive it. (`starts_at_identity`
# and `compiles` are laws one has to ask for, and `context` is for transforms that depend on further inputs.)
#
# A `Flow` puts transforms on top of a base distribution, the standard normal unless told otherwise. Called, it is a Pyro
# distribution. We draw from it, and look at what becomes of eight slices of the base, each of probability 1/8.

# %%
flow = pf.Flow([johnson])

grid = torch.linspace(-60, 200, 200_001).unsqueeze(-1)
with torch.no_grad():
    draws = flow().sample((20_000,)).squeeze(-1)
    density = flow().log_prob(grid).exp()
    without = dist.Normal(0.0, 1.0).log_prob(johnson.inv(grid).squeeze(-1)).exp()
print(f"integral of the density:           {torch.trapezoid(density, grid.squeeze(-1)):.4f}")
print(f"integral without the derivative:   {torch.trapezoid(without, grid.squeeze(-1)):.4f}")

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.45"
edges = dist.Normal(0.0, 1.0).icdf(torch.linspace(0, 1, 9)).clamp(-3.2, 3.2)
x = torch.linspace(-3, 3, 601).unsqueeze(-1)
with torch.no_grad():
    y, _ = johnson.forward_and_log_det(x)
    p, q = flow.base.log_prob(x).exp(), flow().log_prob(y).exp()
    stops, _ = johnson.forward_and_log_det(edges.unsqueeze(-1))
shades = ["#9CC9E6", "#DCEBF5"]

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
middle.plot(x, y, color="black")
for k in range(8):
    inside = ((x >= edges[k]) & (x <= edges[k + 1])).squeeze(-1)
    left.fill_between(x[inside, 0], p[inside], color=shades[k % 2])
    right.fill_between(y[inside, 0], q[inside], color=shades[k % 2])
for start, stop in zip(edges[1:-1], stops[1:-1, 0], strict=True):
    middle.plot([start, start, -3], [-5, stop, stop], color=BLUE, lw=0.8)
left.plot(x, p, color="black")
right.plot(y, q, color="black")
bins = torch.linspace(-5, 9, 71)
heights = torch.histogram(draws, bins).hist / len(draws) / (bins[1] - bins[0])
right.stairs(heights, bins, color=ORANGE, lw=1, label="draws")
left.set(title="base density $p(x)$", xlabel="$x$", ylim=(0, None))
middle.set(title="the map $y = f(x)$", xlabel="$x$", ylabel="$y$", xlim=(-3, 3), ylim=(-5, 9))
right.set(title="density $q(y) = p(x)\\,/\\,f'(x)$", xlabel="$y$", xlim=(-5, 9), ylim=(0, None))
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Eight slices of equal probability go in, eight come out. Where the curve is steep, a slice arrives wide and low.
#
# ## 2. Several dimensions, and composition
#
# In $D$ dimensions the derivative becomes the Jacobian matrix $J = \partial y / \partial x$, and what matters of it is the
# factor by which it changes volumes, $|\det J|$:
#
# $$
# \log q(y) = \log p(x) - \log\left|\det J(x)\right|.
# $$
#
# If $f = f_K \circ \dots \circ f_1$, the chain rule says that the Jacobians multiply; so do their determinants, and the
# **log-determinants add**:
#
# $$
# \log q(y) = \log p(x_0) - \sum_{k=1}^{K} \log\left|\det \frac{\partial x_k}{\partial x_{k-1}}\right|,
# \qquad x_0 = x, \quad x_k = f_k(x_{k-1}), \quad y = x_K.
# $$
#
# This sum is the whole idea of a flow: each $f_k$ may be simple, as long as it can be inverted and has a cheap
# log-determinant; the composition is not simple. As an example, take a rotation, our map in both coordinates, another
# rotation, and the *inverse* of our map (`inv`), which squeezes what is far out. A rotation moves volumes without changing
# them, so its log-determinant is zero.


# %%
class Rotate(pf.transforms.Transform):
    def __init__(self, degrees):
        super().__init__(2)
        angle = math.radians(degrees)
        turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        self.register_buffer("matrix", torch.tensor(turn))

    def forward_and_log_det(self, x, context=None):
        return x @ self.matrix.T, torch.zeros_like(x[..., 0])

    def inverse_and_log_det(self, y, context=None):
        return y @ self.matrix, torch.zeros_like(y[..., 0])


stages = [Rotate(30), JohnsonSU(2, a=0.4, b=0.9), Rotate(-60), JohnsonSU(2, a=-0.3, b=1.2).inv]
composed = pf.transforms.Compose(stages)
verdict(composed)

# %% [markdown]
# To see what a map does, take a regular grid of the base space through it. Blue lines have a constant first coordinate,
# orange lines a constant second one. The shading is the density, relative to its peak. The green square
# is one cell of the base grid.


# %%
def grid_lines(extent=2.4, step=0.4, points=161):
    """The lines of a square grid, two tensors of shape (lines, points, 2)."""
    levels = torch.arange(-extent, extent + step / 2, step)
    along = torch.linspace(-extent, extent, points)
    level, moving = torch.meshgrid(levels, along, indexing="ij")
    return torch.stack([level, moving], -1), torch.stack([moving, level], -1)


@torch.no_grad()
def draw_grid(ax, transforms=(), **options):
    for lines, colour in zip(grid_lines(**options), (BLUE, ORANGE), strict=True):
        for layer in transforms:
            lines, _ = layer.forward_and_log_det(lines)
        ax.plot(*lines.permute(2, 1, 0), color=colour, lw=0.8)


@torch.no_grad()
def draw_density(ax, log_density, box, points=160):
    left, right, bottom, top = box
    xs, ys = torch.linspace(left, right, points), torch.linspace(bottom, top, points)
    plane = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    density = log_density(plane).exp()
    levels = torch.linspace(0.03, 1.0, 9) * density.max()
    ax.contourf(xs, ys, density, levels=levels.tolist(), cmap="Greys")


def density_after(transforms):
    """The log density of a standard normal in the plane after some transforms."""
    return pf.Flow([Rotate(0), *transforms])().log_prob


def frame(ax, box, title=""):
    ax.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[], aspect="equal")
    ax.spines[["top", "right"]].set_visible(True)
    ax.set_title(title, fontsize=11)


def along_square(corner, side, points=400):
    """Points along the edges of a square, counter-clockwise."""
    t = torch.linspace(0, 1, points // 4 + 1)[:-1].unsqueeze(-1)
    corners = torch.tensor(corner) + side * torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    return torch.cat([start + t * (stop - start) for start, stop in itertools.pairwise(corners)])


def area(polygon):
    x, y = polygon.T
    return 0.5 * float((x * y.roll(-1) - x.roll(-1) * y).sum())


names = ["base", "rotated", "then sinh", "rotated back", "then asinh"]
cell, box = along_square([0.4, -0.8], 0.4), (-4.5, 4.5, -4.5, 4.5)
fig, axes = plt.subplots(1, 5, figsize=(11.5, 2.6), layout="constrained")
for k, ax in enumerate(axes):
    draw_density(ax, density_after(stages[:k]), box)
    draw_grid(ax, stages[:k])
    with torch.no_grad():
        image, _ = pf.transforms.Compose([Rotate(0), *stages[:k]]).forward_and_log_det(cell)
    ax.fill(*image.T, color=GREEN)
    frame(ax, box, names[k])
plt.show()

# %% [markdown]
# The picture gives the determinant a meaning that one can measure: the area of the green cell, divided by the area that it
# had in the base, is the average of $|\det J|$ over the cell. In a smaller cell it approaches the determinant at its centre.

# %%
for side in (0.4, 0.1, 0.02):
    centre = torch.tensor([0.6, -0.6])
    square = along_square((centre - side / 2).tolist(), side)
    with torch.no_grad():
        image, _ = composed.forward_and_log_det(square)
        _, log_det = composed.forward_and_log_det(centre)
    print(f"side {side:<5}  ratio of the areas {area(image) / area(square):.5f}   |det J| at the centre {log_det.exp():.5f}")

# %% [markdown]
# ## 3. Triangular Jacobians
#
# For a general map of $D$ entries, the Jacobian takes $D$ passes of automatic differentiation and its determinant $O(D^3)$
# operations. That is too much for every point in every step of a training. But the determinant of a **triangular** matrix is
# the product of its diagonal,
#
# $$
# \log|\det J| = \sum_{i=1}^{D} \log\left|\frac{\partial y_i}{\partial x_i}\right|,
# $$
#
# and that takes $D$ additions. It only asks that $y_i$ depend on no entry after $x_i$, in some order of the entries. *How*
# the entries before it come in is left free, and there one puts a neural network. Most flows are built on this. The others
# have another structure with a cheap determinant, such as the identity plus a matrix of low rank.
#
# Below are four Jacobians by automatic differentiation, at a random point, with random weights: dark is large, white is
# zero. Each layer's own log-determinant is compared with that of the full matrix.


# %%
def randomise(module, size):
    """Gives all parameters random values; layers start at the identity, which makes for dull pictures."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=size)
    return module


def jacobian(transform, x):
    return torch.func.jacrev(lambda x: transform.forward_and_log_det(x)[0])(x)


D = 8
first_half = torch.arange(D) < D // 2
pyro.set_rng_seed(1)
examples = {
    "coupling": randomise(pf.transforms.AffineCoupling(D, mask=first_half, network=pf.nn.mlp((16, 16))), 0.5),
    "autoregressive": randomise(pf.transforms.AffineAutoregressive(D, hidden=(16, 16)), 0.6),
    "planar": randomise(pf.transforms.Planar(D), 0.8),
    "stack of 6 couplings": randomise(pf.RealNVP(D, transforms=6, network=pf.nn.mlp((16, 16)), mixing=None).transform, 0.35),
}
point = torch.randn(D)
fig, axes = plt.subplots(1, 4, figsize=(10.5, 2.9), layout="constrained")
for ax, (name, transform) in zip(axes, examples.items(), strict=True):
    with torch.no_grad():
        J = jacobian(transform, point)
        log_det = transform.forward_and_log_det(point)[1]
    print(f"{name:22} log|det J| = {log_det:8.4f}   off by {abs(log_det - torch.linalg.slogdet(J)[1]):.0e}")
    ax.imshow(J.abs() ** 0.4, cmap="Greys", vmin=0, vmax=1.2)
    ax.spines[["top", "right"]].set_visible(True)
    ax.set(title=name, xticks=[], yticks=[], xlabel="$x_j$", ylabel="$y_i$")
plt.show()

# %% [markdown]
# The last picture is the point of composing: each coupling's Jacobian is triangular in *some* order of the entries, but the
# order changes from layer to layer, and the product is a full matrix, whose determinant is still a sum of diagonals.
#
# What the structure saves, measured on 32 points of 64 entries:


# %%
@torch.no_grad()
def seconds(function, repeats=5):
    """The shortest of several timings, which is the least disturbed one."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


wide = pf.RealNVP(64, transforms=6, network=pf.nn.mlp((32, 32)), mixing=None).transform
batch = torch.randn(32, 64)
by_structure = seconds(lambda: wide.forward_and_log_det(batch))
by_force = seconds(lambda: torch.linalg.slogdet(torch.func.vmap(lambda x: jacobian(wide, x))(batch)), repeats=2)
print(f"full Jacobian and its determinant: {by_force / by_structure:.0f} times as long")

# %% [markdown]
# ## 4. Couplings: NICE and RealNVP
#
# A **coupling** splits the entries into two groups. The entries $x_A$ stay as they are; the others are moved, by an amount
# that a network computes from $x_A$. Because $x_A$ is still there afterwards, the network can compute the same amount again,
# and the move can be undone without inverting the network. Both directions are equally fast.
#
# **NICE** ([Dinh et al., 2014](https://arxiv.org/abs/1410.8516)) adds:
#
# $$
# y_A = x_A, \qquad y_B = x_B + t(x_A), \qquad \log|\det J| = 0.
# $$
#
# **RealNVP** ([Dinh et al., 2016](https://arxiv.org/abs/1605.08803)) also scales:
#
# $$
# y_A = x_A, \qquad y_B = e^{s(x_A)} \odot x_B + t(x_A), \qquad \log|\det J| = \sum_i s_i(x_A).
# $$
#
# One layer of each, with random weights, on the grid of the plane. The first coordinate stays, so blue lines stay on
# themselves; the second moves.

# %%
stay_first = torch.tensor([True, False])
pyro.set_rng_seed(2)
small = pf.nn.mlp((16, 16))
layers = {
    "base": None,
    "additive coupling (NICE)": randomise(pf.transforms.AdditiveCoupling(2, mask=stay_first, network=small), 0.9),
    "affine coupling (RealNVP)": randomise(pf.transforms.AffineCoupling(2, mask=stay_first, network=small), 0.6),
}
box = (-4, 4, -4, 4)


def draw_layer(ax, title, transform, box=box):
    chosen = [] if transform is None else [transform]
    draw_density(ax, density_after(chosen), box)
    draw_grid(ax, chosen)
    frame(ax, box, title)


fig, axes = plt.subplots(1, 3, figsize=(8.2, 3.0), layout="constrained")
for ax, (title, layer) in zip(axes, layers.items(), strict=True):
    draw_layer(ax, title, layer)
plt.show()

# %% [markdown]
# The additive coupling slides the blue lines along themselves, and every cell keeps its area. The affine coupling also
# stretches them, each by its own factor. One layer leaves half of the entries alone, so the roles must change from layer to
# layer.
#
# In NICE no cell *ever* changes its area, however many layers there are; only a fixed scale for each coordinate, after the
# last coupling, changes all of them by the same factor. So the largest density of the flow is that of the base times a
# constant, and it has one peak for each peak of the base. We will see that below.

# %% [markdown]
# ## 5. Autoregressive layers: MAF and IAF
#
# A coupling uses a triangular Jacobian sparingly: half of its rows are those of the identity. An **autoregressive** layer
# uses all of it: every entry is moved by an amount that depends on *all* entries before it. There are two ways to read
# "before it", and they differ in which space the network looks at.
#
# **MAF**, the masked autoregressive flow ([Papamakarios et al., 2017](https://arxiv.org/abs/1705.07057)), lets the network
# read the event $y$, and moves from event to base; **IAF**, the inverse autoregressive flow
# ([Kingma et al., 2016](https://arxiv.org/abs/1606.04934)), lets it read the base point $x$, and moves from base to event:
#
# $$
# \text{MAF:}\quad x_i = e^{s_i(y_{<i})}\, y_i + t_i(y_{<i}), \qquad\qquad
# \text{IAF:}\quad y_i = e^{s_i(x_{<i})}\, x_i + t_i(x_{<i}).
# $$
#
# For one layer these are the same formula with $x$ and $y$ exchanged. A *masked* network (MADE,
# [Germain et al., 2015](https://arxiv.org/abs/1502.03509)) computes $s_i$ and $t_i$ for all $i$ in one pass, with weights
# set to zero wherever an output would see an entry it must not see. So one direction takes one pass. The other direction is
# a recursion: $y_1$ first, then $s_2(y_1)$ and from it $y_2$, and so on, $D$ steps in a row.
#
# | | one pass | $D$ steps |
# |---|---|---|
# | **MAF** | score a given point | draw |
# | **IAF** | draw, and score what was just drawn | score a given point |
# | RealNVP | both | |
#
# Every transform says which of its directions is fast, and `inv` exchanges them:

# %%
maf_layer = pf.transforms.AffineAutoregressive(3)
print("AffineAutoregressive:    fast =", maf_layer.fast)
print("AffineAutoregressive.inv: fast =", maf_layer.inv.fast)

# %% [markdown]
# ("inverse" is from event to base, to score; "forward" is from base to event, to draw.) The cost in time, as a ratio to
# scoring with the MAF of the same size, for 256 points (the layers alone, `mixing=None`):

# %%
rows = {}
for features in (4, 16, 64):
    times = {}
    for make in (pf.MAF, pf.IAF, pf.RealNVP):
        transform = randomise(make(features, transforms=5, mixing=None).transform, 0.1)
        z = torch.randn(256, features)
        times[make.__name__, "score"] = seconds(lambda z=z, t=transform: t.inverse_and_log_det(z))
        times[make.__name__, "draw"] = seconds(lambda z=z, t=transform: t.forward_and_log_det(z))
    rows[f"{features} entries"] = {key: value / times["MAF", "score"] for key, value in times.items()}
costs = pd.DataFrame(rows).T
print(costs.to_string(float_format="{:.1f}".format))

# %% [markdown]
# The slow direction of an autoregressive flow is not a matter of a better implementation: its steps depend on
# each other. Its cost grows with the number of entries, though here by less than in proportion, because no hidden unit is
# computed twice. It is as exact as the fast one, and when it is needed rarely (a few draws from a trained MAF, say) it does
# no harm. What decides is the direction that the *training* needs; see sections 8 and 9.

# %% [markdown]
# ## 6. Planar and radial layers
#
# The first flows for variational inference ([Rezende and Mohamed, 2015](https://arxiv.org/abs/1505.05770)) have no networks
# at all. A **planar** layer moves points along one direction $u$, by an amount that depends on the position along another
# direction $w$; its Jacobian is the identity plus a matrix of rank one. A **radial** layer pulls points towards a centre
# $x_0$, or pushes them away, by an amount that depends on the distance $r = |x - x_0|$:
#
# $$
# \text{planar:}\quad y = x + u \tanh(w^\top x + b), \qquad\qquad
# \text{radial:}\quad y = x + \frac{\beta\,(x - x_0)}{\alpha + r}.
# $$
#
# $$
# |\det J_\text{planar}| = 1 + u^\top w \left(1 - \tanh^2(w^\top x + b)\right), \qquad
# |\det J_\text{radial}|
# = \left(1 + \tfrac{\beta}{\alpha + r}\right)^{D-1} \left(1 + \tfrac{\alpha\beta}{(\alpha + r)^2}\right).
# $$
#
# Both need a condition to be invertible, $u^\top w > -1$ and $\beta > -\alpha$, which pyroflows builds into the parameters.


# %%
def with_parameters(layer, *raw):
    """Sets the numbers that the layer would learn."""
    with torch.no_grad():
        layer.raw.copy_(torch.tensor(raw))
    return layer


pictures = {
    "planar, splits": with_parameters(pf.transforms.Planar(2), 1.5, 0.5, 2.0, 0.5, 0.0),  # u, w, b
    "planar, squeezes": with_parameters(pf.transforms.Planar(2), -0.6, -0.3, 1.2, 0.3, 0.5),
    # centre, alpha and k = beta / alpha, raw
    "radial, pushes away": with_parameters(pf.transforms.Radial(2), 0.5, 0.5, 0.0, 1.5),
    "radial, pulls in": with_parameters(pf.transforms.Radial(2), 0.5, 0.5, 1.0, -0.8),
}
fig, axes = plt.subplots(1, 4, figsize=(10.5, 2.9), layout="constrained")
for ax, (title, layer) in zip(axes, pictures.items(), strict=True):
    draw_layer(ax, title, layer)
plt.show()

# %% [markdown]
# A planar layer makes one cut or one fold, along one line; a radial layer makes one hole or one heap. That is little for a
# layer, and it does not grow with $D$, so such flows need many layers, above all in high dimension.
#
# To score a point one must invert. The radial layer has a closed form: $r$ is the root of a quadratic. The planar one has
# none, but it takes only one number to be found, $w^\top x$, as the root of an increasing function. pyroflows does that, so
# both can score any point. Pyro's own version of the planar layer can only score points that it has just drawn itself:

# %%
somewhere = torch.tensor([[1.0, -1.0], [0.3, 2.0]])
for planar in (dist.transforms.planar(2), pf.transforms.Planar(2)):
    package = type(planar).__module__.split(".")[0]
    try:
        log_prob = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [planar]).log_prob(somewhere)
        print(f"{package}: log density {log_prob.tolist()}")
    except Exception as error:
        print(f"{package}: {type(error).__name__}: {error}")

points = torch.randn(1000, 2)
for layer in (pictures["planar, splits"], pictures["radial, pushes away"]):
    with torch.no_grad():
        error = (layer.inv(layer(points).clone()) - points).abs().max()
    ratio = seconds(lambda t=layer: t.inverse_and_log_det(points)) / seconds(lambda t=layer: t.forward_and_log_det(points))
    print(
        f"{type(layer).__name__}: largest round-trip error {error:.0e}; scoring takes {ratio:.1f} times as long as drawing"
    )

# %% [markdown]
# ## 7. Splines
#
# Shifting and scaling are the simplest increasing maps of one number. Nothing in a coupling or an autoregressive layer needs
# them to be that simple: any increasing map will do that has an inverse, a derivative, and a few parameters for the network
# to set. In a **neural spline flow** (NSF, [Durkan et al., 2019](https://arxiv.org/abs/1906.04032)) it is a monotone
# *rational-quadratic spline*. A box $[-B, B]$ is cut into $K$ bins, with knots $(x_k, y_k)$ that increase and slopes
# $d_k > 0$ at the knots. Within a bin of width $w$, height $h$ and mean slope $s = h / w$, with $p = (x - x_k) / w$,
#
# $$
# y = y_k + h\, \frac{s\,p^2 + d_k\, p\,(1 - p)}{s + (d_k + d_{k+1} - 2 s)\, p\,(1 - p)} .
# $$
#
# It takes the value and the slope that it should at both ends, it increases in between, and its inverse is the root of a
# quadratic. Outside of the box it is the identity. A network would give raw numbers; widths and heights are made from them
# by a softmax, slopes by a function near the exponential. Here we choose some:

# %%
K, B = 6, 3.0
spline = pf.univariate.RationalQuadraticSpline(bins=K, bound=B)
raw_widths = torch.tensor([0.0, 0.2, -0.1, 0.1, -0.1, 0.2])
raw_heights = torch.tensor([0.2, -0.6, 0.6, 0.3, -0.7, 0.6])
raw_slopes = torch.tensor([-0.3, -0.6, 0.9, -0.4, -0.5])
raw = torch.cat([raw_widths, raw_heights, raw_slopes]).unsqueeze(-1)


def knots_of(raw):
    sizes = spline.min_size + (1 - K * spline.min_size) * raw.softmax(0)
    return torch.cat([torch.tensor([-B]), -B + 2 * B * sizes.cumsum(0)])


knots_x, knots_y = knots_of(raw_widths), knots_of(raw_heights)
x = torch.linspace(-4, 4, 1601).unsqueeze(-1)
y, log_slope = spline.forward_and_log_det(x, raw)
at_knots, log_slope_at_knots = spline.forward_and_log_det(knots_x.unsqueeze(-1), raw)
back, _ = spline.inverse_and_log_det(y, raw)
print(f"distance of the curve from the knots: {(at_knots.squeeze(-1) - knots_y).abs().max():.0e}")
print(f"largest round-trip error:             {(back - x).abs().max():.0e}")

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
left.plot(x, x, color="0.8", lw=1)
left.plot(x, y, color=BLUE)
left.plot(knots_x, knots_y, "o", color=ORANGE, ms=5, label="knots")
left.set(title="the spline", xlabel="$x$", ylabel="$y$", aspect="equal")
left.legend(frameon=False)
middle.plot(x, log_slope.exp(), color=BLUE)
middle.plot(knots_x, log_slope_at_knots.exp(), "o", color=ORANGE, ms=5)
middle.set(title="its derivative", xlabel="$x$", ylim=(0, None))
base = dist.Normal(0.0, 1.0)
right.plot(x, base.log_prob(x).exp(), color="0.6", ls="--", label="base")
right.plot(y, (base.log_prob(x) - log_slope).exp(), color=BLUE, label="after the spline")
for knot in knots_y:
    right.axvline(knot, color=ORANGE, lw=0.6, alpha=0.6)
right.set(title="the density", xlabel="$y$", ylim=(0, None))
right.legend(frameon=False)
plt.show()

# %% [markdown]
# One spline makes several modes from one. Its derivative is continuous, with kinks at the knots, and so is the density. The
# orange lines are the knots on the side of the event.
#
# In a flow, such a spline replaces the straight line of the affine coupling, with a new set of knots for each value of
# $x_A$. As the spline moves points only within the box, data should be of unit scale, or be standardised first.

# %% [markdown]
# ## 8. Training on data: forward KL
#
# Let $p$ be the distribution that data come from, and $q_\phi$ the flow. **Maximum likelihood** minimises the *forward*
# Kullback-Leibler divergence, up to a constant:
#
# $$
# \text{KL}(p \,\|\, q_\phi) = \underbrace{\mathbb{E}_{p}[\log p(y)]}_{\text{not ours to change}}
# - \mathbb{E}_{p}\left[\log q_\phi(y)\right].
# $$
#
# It takes samples of $p$, not its density, and it *scores* them: the direction from event to base must be fast.
#
# As data we take two interlocking half circles with noise. In this case the density can be computed as well: a half circle
# with Gaussian noise is a mixture of Gaussians whose centres run along the arc, and an average over many centres gives the
# integral. So we know the best mean log-likelihood that any model can have, and how far each flow is from it.

# %%
RADIUS, NOISE = 1.5, 0.15


def arcs(angle):
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    shift = torch.tensor([0.5, 0.25])
    return RADIUS * (upper - shift), RADIUS * (shift - upper)


def draw_moons(n):
    upper, lower = arcs(math.pi * torch.rand(n))
    return torch.where(torch.rand(n, 1) < 0.5, upper, lower) + NOISE * torch.randn(n, 2)


CENTRES = torch.cat(arcs(math.pi * (torch.arange(200) + 0.5) / 200))


def moons_log_prob(y):
    squares = (y.unsqueeze(-2) - CENTRES).square().sum(-1)
    return (-0.5 * squares / NOISE**2).logsumexp(-1) - math.log(2 * math.pi * NOISE**2 * len(CENTRES))


def integral(log_density, extent=5.0, points=501):
    axis = torch.linspace(-extent, extent, points)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        total = torch.cat([log_density(rows) for rows in plane.split(20_000)]).logsumexp(0).exp()
    return float(total) * float(axis[1] - axis[0]) ** 2


pyro.set_rng_seed(0)
train, test = draw_moons(10_000), draw_moons(20_000)
best = moons_log_prob(test)
print(f"integral of the density: {integral(moons_log_prob):.6f}")
print(f"mean log density of {len(test)} new points: {best.mean():.3f} nats")

# %% [markdown]
# Four flows of about the same size, trained by `pf.fit_density`, which holds out a tenth of the points,
# lowers the step size as it goes, and keeps the parameters that were best on the points held out. (`mask="half"` lets the
# couplings move the two coordinates in turn; `mixing=None` leaves out the learned linear maps that these flows have between
# two layers otherwise.) The table gives the estimate of $\text{KL}(p \| q)$ on new points: it is the
# mean of $\log p(y) - \log q(y)$, with its standard error.

# %%
makers = {
    "NICE": lambda: pf.NICE(2, transforms=6, network=pf.nn.mlp((32, 32)), mask="half"),
    "RealNVP": lambda: pf.RealNVP(2, transforms=6, network=pf.nn.mlp((32, 32)), mask="half", mixing=None),
    "MAF": lambda: pf.MAF(2, transforms=5, hidden=(32, 32), mixing=None),
    "NSF": lambda: pf.NSF(2, transforms=3, network=pf.nn.mlp((32, 32)), mask="half", mixing=None),
}
flows, rows = {}, {}
for name, make in makers.items():
    pyro.set_rng_seed(0)
    flows[name] = make()
    report = pf.fit_density(flows[name], train, learning_rate=5e-3, max_epochs=50, progress=False)
    with torch.no_grad():
        gap = best - flows[name]().log_prob(test)
        _, log_det = flows[name].transform.inverse_and_log_det(test)
    rows[name] = {
        "parameters": sum(parameter.numel() for parameter in flows[name].parameters()),
        "KL(p || q)": float(gap.mean()),
        "standard error": float(gap.std()) / len(gap) ** 0.5,
        "integral of q": integral(flows[name]().log_prob),
        "sd of log|det J|": float(log_det.std()),
    }
display(pd.DataFrame(rows).T.astype({"parameters": int}))

# %%
box = (-3.2, 3.2, -2.4, 2.4)
fig, axes = plt.subplots(2, 5, figsize=(12, 4.2), layout="constrained")
draw_density(axes[0, 0], moons_log_prob, box)
frame(axes[0, 0], box, "true density")
axes[1, 0].scatter(*train[:3000].T, s=1, color="black")
frame(axes[1, 0], box, "some of the data")
for (name, flow), (top, bottom) in zip(flows.items(), axes.T[1:], strict=True):
    draw_density(top, flow().log_prob, box)
    frame(top, box, name)
    draw_grid(bottom, flow.transform.layers, step=0.3)
    frame(bottom, box)
plt.show()

# %% [markdown]
# The upper row shows densities, the lower row the learned grids. In the grid of NICE all cells have the same area (the last
# column of the table: $\log|\det J|$ does not vary). It can only fold the round base into the shape of the data. The others
# make cells narrow where the data are dense, and wide in the gap between.
#
# All of them leave some probability between the two arcs, most visibly as a bridge. A flow is a continuous map with a
# continuous inverse: it can stretch the plane, but not tear it. Where the target is in pieces, or nearly so, some
# probability is left in between.
#
# The layers of the RealNVP one by one show how such a grid comes about. Each coupling moves points either up and down or
# left and right:

# %%
layers = flows["RealNVP"].transform.layers
fig, axes = plt.subplots(1, 7, figsize=(12.5, 2.2), layout="constrained")
for k, ax in enumerate(axes):
    draw_grid(ax, layers[:k])
    frame(ax, (-5, 5, -5, 5), "base" if k == 0 else f"after layer {k}")
plt.show()

# %% [markdown]
# ## 9. Training on a density: reverse KL
#
# In Bayesian inference it is the other way round. We have no samples, but we can evaluate the target up to a constant:
# $\pi(z) = e^{-U(z)} / Z$, where $Z$ is the evidence and $e^{-U}$ the joint density of data and parameters. Variational
# inference minimises the *reverse* divergence, by maximising the ELBO:
#
# $$
# \text{ELBO}(\phi) = \mathbb{E}_{q_\phi}\left[-U(z) - \log q_\phi(z)\right] = \log Z - \text{KL}(q_\phi \,\|\, \pi).
# $$
#
# It *draws* from the flow and scores its own draws: the direction from base to event must be fast. With the draws written
# as $z = f_\phi(x)$, $x \sim N(0, I)$, gradients pass through the map (the reparametrisation trick).
#
# As the ELBO falls short of $\log Z$ by the divergence, a target with a known $Z$ tells how good the flow is. Here are two,
# a banana and a ring:
#
# $$
# U_\text{banana} = \frac{z_1^2}{2 \cdot 1.5^2} + \frac{\left(z_2 - \tfrac12 (z_1^2 - 1.5^2)\right)^2}{2 \cdot 0.4^2},
# \qquad Z = 2\pi \cdot 1.5 \cdot 0.4,
# $$
#
# $$
# U_\text{ring} = \frac{(|z| - R)^2}{2 \sigma^2}, \qquad
# Z = 2\pi \int_0^\infty r\, e^{-(r - R)^2 / 2\sigma^2} dr
# = 2\pi \left[\sigma^2 e^{-R^2 / 2\sigma^2} + R\,\sigma \sqrt{\tfrac{\pi}{2}}
# \left(1 + \operatorname{erf} \tfrac{R}{\sigma\sqrt 2}\right)\right].
# $$

# %%
R, SIGMA = 2.0, 0.3


def banana(z):
    first, second = z.unbind(-1)
    return 0.5 * (first / 1.5) ** 2 + 0.5 * ((second - 0.5 * (first**2 - 1.5**2)) / 0.4) ** 2


def ring(z):
    return 0.5 * ((z.norm(dim=-1) - R) / SIGMA) ** 2


inner = SIGMA**2 * math.exp(-(R**2) / (2 * SIGMA**2))
outer = R * SIGMA * math.sqrt(math.pi / 2) * (1 + math.erf(R / (SIGMA * math.sqrt(2))))
log_Z = {"banana": math.log(2 * math.pi * 1.5 * 0.4), "ring": math.log(2 * math.pi * (inner + outer))}
energies = {"banana": banana, "ring": ring}
for name, energy in energies.items():
    on_grid = math.log(integral(lambda z, energy=energy: -energy(z), extent=20.0, points=2001))
    print(f"{name:8} log Z = {log_Z[name]:.5f}, on a grid {on_grid:.5f}")

# %% [markdown]
# Any Pyro model will do in place of the energy, and any flow in place of a guide. This is an ordinary Pyro `SVI` loop: the
# model says that $z$ is a vector, and adds $-U(z)$ to the log density; the guide draws $z$ from the flow. (Without Pyro it
# would be three lines: `z, log_q = flow().rsample_and_log_prob((128,))`, `(energy(z) + log_q).mean().backward()`, and a step
# of an optimiser.)


# %%
def train_by_svi(energy, flow, steps, step_size=1e-2, particles=128):
    """Returns the ELBO of each step."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("energy", -energy(z))

    def guide():
        pyro.sample("z", flow())

    pyro.clear_param_store()
    optim_args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": step_size}, "T_max": steps}
    optimizer = pyro.optim.CosineAnnealingLR(optim_args, clip_args={"clip_norm": 10.0})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0))
    history = []
    for _ in range(steps):
        history.append(-svi.step())
        optimizer.step()  # lowers the step size along a cosine
    return torch.tensor(history)


settings = {
    ("banana", "Gaussian"): (lambda: pf.Flow([pf.transforms.LowerTriangularAffine(2)]), 500),
    ("banana", "IAF"): (lambda: pf.IAF(2, transforms=3, hidden=(32, 32)), 1200),
    ("ring", "Gaussian"): (lambda: pf.Flow([pf.transforms.LowerTriangularAffine(2)]), 500),
    ("ring", "IAF"): (lambda: pf.IAF(2, transforms=4, hidden=(32, 32)), 1200),
}
guides, histories, rows = {}, {}, {}
for (target, name), (make, steps) in settings.items():
    pyro.set_rng_seed(0)
    guides[target, name] = flow = make()
    histories[target, name] = train_by_svi(energies[target], flow, steps)
    with torch.no_grad():
        z, log_q = flow().rsample_and_log_prob((20_000,))
        log_weights = -energies[target](z) - log_q
    gap = log_Z[target] - log_weights
    rows[target, name] = {
        "log Z": log_Z[target],
        "ELBO": float(log_weights.mean()),
        "log Z - ELBO": float(gap.mean()),
        "standard error": float(gap.std()) / len(gap) ** 0.5,
        "log mean weight": float(log_weights.logsumexp(0)) - math.log(len(z)),
        "effective sample size": float(((2 * log_weights.logsumexp(0)) - (2 * log_weights).logsumexp(0)).exp()) / len(z),
    }
display(pd.DataFrame(rows).T)

# %% [markdown]
# The difference between $\log Z$ and the ELBO is $\text{KL}(q \| \pi)$. The last columns ask a second question: with the
# weights $w = e^{-U(z)} / q(z)$, whose mean estimates $Z$, how far is the flow from a set of equally weighted draws? The
# effective sample size, $(\sum w)^2 / (n \sum w^2)$, is 1 if all weights are equal. ELBO and weights need not agree, as the
# two Gaussians show. The one for the ring puts many draws into the hole: that is costly for the ELBO, and harmless for the
# weights, which are then small. The one for the banana has hardly any draws in the arms: that is cheap for the ELBO, and bad
# for the weights, of which a few are huge.

# %%
boxes = {"banana": (-4.5, 4.5, -3.2, 5.8), "ring": (-3.2, 3.2, -3.2, 3.2)}
fig, axes = plt.subplots(2, 4, figsize=(10, 4.9), layout="constrained")
for (target, energy), row in zip(energies.items(), axes, strict=True):
    box = boxes[target]
    draw_density(row[0], lambda z, energy=energy: -energy(z), box)
    frame(row[0], box, f"{target}: target")
    draw_density(row[1], guides[target, "Gaussian"]().log_prob, box)
    frame(row[1], box, "Gaussian")
    draw_density(row[2], guides[target, "IAF"]().log_prob, box)
    frame(row[2], box, "IAF")
    draw_grid(row[3], guides[target, "IAF"].transform.layers, step=0.3)
    frame(row[3], box, "its grid")
plt.show()

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
for ax, target in zip(axes, energies, strict=True):
    for name, colour, style in (("Gaussian", GREY, "--"), ("IAF", BLUE, "-")):
        smooth = (log_Z[target] - histories[target, name]).unfold(0, 50, 1).mean(-1)
        ax.plot(torch.arange(len(smooth)) + 50, smooth, style, color=colour, label=name)
    ax.set(yscale="log", xlabel="step", title=target)
axes[0].set_ylabel("$\\log Z\\, -$ ELBO")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The banana is a smooth bend of a Gaussian, and the flow finds it nearly exactly. The ring has a hole, where its density is
# not zero but tiny, and the Gaussian has none. A disc cannot be bent into a ring without a tear; a continuous map can only
# come close to it, by being very steep somewhere. So the flow cuts the ring open, and the two ends of the grid meet without
# joining. Next to nothing is drawn in the cut, which is why the mean weight falls a little short of $Z$. A larger flow can
# make the cut narrower; that is what remains of the gap on the right.

# %% [markdown]
# ## 10. Which divergence, which flow
#
# If the family contains the target, both divergences lead to it. If not, they fail in different ways. $\text{KL}(p \| q)$
# punishes $q$ for being small where $p$ is not, so the fit *covers* all of $p$, and what lies between its parts.
# $\text{KL}(q \| p)$ punishes $q$ for being large where $p$ is not, so the fit *stays inside* of $p$, and may ignore some of
# it. The same target, the two moons, with a Gaussian and with a RealNVP, each trained both ways:

# %%
pyro.set_rng_seed(0)
gaussians = {way: pf.Flow([pf.transforms.LowerTriangularAffine(2)]) for way in ("forward", "reverse")}
pf.fit_density(gaussians["forward"], train, learning_rate=2e-2, max_epochs=10, progress=False)
train_by_svi(lambda z: -moons_log_prob(z), gaussians["reverse"], steps=400, step_size=2e-2, particles=32)
reverse = pf.RealNVP(2, transforms=6, network=pf.nn.mlp((32, 32)), mask="half", mixing=None)
train_by_svi(lambda z: -moons_log_prob(z), reverse, steps=1000, step_size=5e-3, particles=64)
fits = {
    "Gaussian, forward KL": gaussians["forward"],
    "Gaussian, reverse KL": gaussians["reverse"],
    "RealNVP, forward KL": flows["RealNVP"],
    "RealNVP, reverse KL": reverse,
}
box = (-3.2, 3.2, -2.4, 2.4)
fig, axes = plt.subplots(1, 4, figsize=(12, 2.4), layout="constrained")
rows = {}
for ax, (name, flow) in zip(axes, fits.items(), strict=True):
    with torch.no_grad():
        z, log_q = flow().rsample_and_log_prob((20_000,))
        forward = best - flow().log_prob(test)
        backward = log_q - moons_log_prob(z)
    rows[name] = {"KL(p || q)": float(forward.mean()), "KL(q || p)": float(backward.mean())}
    draw_density(ax, flow().log_prob, box)
    ax.plot(*CENTRES[:200].T, color=ORANGE, lw=1)
    ax.plot(*CENTRES[200:].T, color=ORANGE, lw=1)
    frame(ax, box, name)
plt.show()
display(pd.DataFrame(rows).T)

# %% [markdown]
# The orange lines are the centres of the two arcs. The Gaussians behave as the formulas say: each is the better one by the
# divergence that it was trained by, and the one from the forward KL is the wider.
#
# With the RealNVP, training on data does better by both divergences. That is not the fault of the family, which is the
# same, but of the training: a draw tells something about the target only at the place where it fell. The reverse fit starts
# from the base, and what it leaves out early it may never see again; here parts of an arc are left almost empty. Its
# $\text{KL}(q \| p)$, which is all that an ELBO can tell, looks moderate; its $\text{KL}(p \| q)$ does not. So do not trust
# an ELBO alone: look at importance weights, start from several seeds, and use data where you have them.
#
# A summary of the families, with their fast directions as the flows themselves report them (linear maps between layers add
# their own log-determinants):

# %%
words = {"both": "score and draw", "inverse": "score", "forward": "draw", "neither": "neither"}
families = {
    "NICE": (pf.NICE, "zero, for each coupling", "constant volume; a first example"),
    "RealNVP": (pf.RealNVP, "sum of log-scales", "the plain choice for either training"),
    "NSF": (pf.NSF, "sum of log-slopes", "sharp shapes, within a box"),
    "MAF": (pf.MAF, "sum of log-scales", "data, forward KL"),
    "IAF": (pf.IAF, "sum of log-scales", "guides, reverse KL"),
    "PlanarFlow": (pf.PlanarFlow, "one scalar", "few dimensions; teaching"),
    "RadialFlow": (pf.RadialFlow, "one scalar", "few dimensions; teaching"),
}
rows = {}
for name, (make, log_det, use) in families.items():
    rows[name] = {"fast to": words[make(4).transform.fast], "log-determinant": log_det, "use for": use}
display(pd.DataFrame(rows).T)

# %% [markdown]
# ### When to use which
#
# - **You have data and want their density** (a likelihood, a prior learned from simulations): forward KL, and a flow that is
#   fast to score: RealNVP, NSF, or MAF. MAF gets more from each layer than a coupling; if you also need many draws from
#   it, take a coupling.
# - **You have a model and want its posterior**: reverse KL, and a flow that is fast to draw from: RealNVP, NSF, or IAF. If
#   other points than its own draws must be scored as well (draws of MCMC, to compare, say), take a coupling.
# - **Shape**: affine layers are smooth and safe far out. Splines bend more in each layer, but only within their box, so
#   standardise the data. Neither makes a light tail heavy: change the base, or end with a tail layer (`tails="student"`,
#   `tails="gpd"`).
# - **Separated modes or holes**: every flow on this page leaves bridges or cuts; larger flows make them thinner. A
#   mixture as the base, or other coordinates, can do away with them.
# - **Planar and radial** layers are good to think with, and fine in two dimensions.
# - **Your own transform**: write the two methods, and let `pf.check` judge them before you trust a density.
#
# To go on:
#
# - Reverse KL for any Pyro model in one call, and a verdict on the result: `pf.fit_posterior`, in the tutorial on the eight
#   schools in this folder.
# - Conditional densities, $p(y \mid c)$: give a flow `context_features=...` and call it with the context.
# - Families that are not on this page: `pf.NAF`, `pf.BNAF`, `pf.Glow`, `pf.ResidualFlow`, `pf.FFJORD` and others.
# - The review by [Papamakarios et al., 2021](https://arxiv.org/abs/1912.02762) has the theory, and the one by
#   [Kobyzev et al., 2020](https://arxiv.org/abs/1908.09257) a map of the families.
#
# ### Exercises
#
# 1. **Another map by hand.** Write a transform for $y = x + c \tanh x$. For which $c$ is it increasing? It has no closed
#    inverse: find the root by bisection, and let `pf.check` tell you how precise it has to be.
# 2. **Areas.** In the picture of the four learned grids, NICE has cells of one size. Show from the formula that its density
#    has exactly one peak. What could be done about it without giving up the additive couplings? (`pf.NICE` takes a `base`.)
# 3. **Fast where?** Train the IAF of section 9 on the two moons by `pf.fit_density`, and a MAF on the banana by SVI. In two
#    dimensions both work. How do the times of a step compare with those of a RealNVP when the target has 50 dimensions?
# 4. **The ring in other coordinates.** The ring is simple in polar coordinates. Write a flow for $(\log r, \text{angle})$,
#    with `pf.NSF(..., spline="circular")` for the angle, and the change of variables to $z$ by hand. What becomes of the
#    gap?
