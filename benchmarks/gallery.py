"""The gallery of flows: every family fitted to the same densities by the same training, in pictures and numbers.

Run `python -m benchmarks.gallery`. It writes `tutorials/gallery.md` with its pictures and `benchmarks/results/gallery.json`,
from which alone the page is made: `--page` makes it anew without training. `--families` runs a part, whose numbers and
pictures replace those that are there; with other settings than the stored ones, a part goes to another folder, `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import pyroflows as pf
from benchmarks.posteriors import _choose, _finite, machine

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = (32, 32)
BATCH, TRAIN, VALIDATION, TEST = 256, 12800, 2048, 8192
EPOCH = TRAIN // BATCH
LEARNING_RATE = 5e-3
#: What is timed: points, the sizes of an event, repetitions, and CPU seconds after which a slow flow is not repeated.
POINTS, SIZES, REPEATS, LIMIT = 512, (2, 16), (3, 21), 6.0
WARM_UP = 100
CELLS, GAP, TITLE = 176, 8, 24
WORDS = {
    "both": "fast in both directions",
    "inverse": "fast to score",
    "forward": "fast to sample",
    "neither": "no direction is faster than the other",
}


# The densities


@dataclass(frozen=True)
class Density:
    """A density of two entries that is known exactly.

    Args:
        title: Its name in pictures and tables.
        formula: What it is, in words.
        sample: Draws so many points, `(N, 2)`, from torch's random state.
        log_prob: Its logarithm at points `(N, 2)`.
        window: Half-width of the square that is drawn.
    """

    title: str
    formula: str
    sample: Callable[[int], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    window: float = 3.5


def mixture(title: str, formula: str, means: Tensor, sd: float) -> Density:
    """A mixture of equal normals.

    Args:
        title: See `Density`.
        formula: See `Density`.
        means: Their means, `(components, 2)`.
        sd: Their standard deviation.
    """

    def sample(n: int) -> Tensor:
        return means[torch.randint(len(means), (n,))] + sd * torch.randn(n, 2)

    def log_prob(x: Tensor) -> Tensor:
        squares = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        return (-0.5 * squares / sd**2).logsumexp(-1) - math.log(len(means) * 2 * math.pi * sd**2)

    return Density(title, formula, sample, log_prob)


def _moons() -> Tensor:
    angle = torch.linspace(0.0, math.pi, 200)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    return 1.6 * (torch.cat([upper, lower]) - torch.tensor([0.5, 0.25]))


def _ring() -> Tensor:
    angle = torch.arange(8) * math.pi / 4
    return 2.2 * torch.stack([angle.cos(), angle.sin()], -1)


def _spiral() -> Tensor:
    radius = torch.linspace(0.3, 2.6, 300)
    angle = 1.9 * radius
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return torch.cat([arm, -arm])


def _funnel_sd(v: Tensor) -> Tensor:
    return 0.7 * (0.8 * v).exp()


def _funnel_sample(n: int) -> Tensor:
    v = torch.randn(n)
    return torch.stack([v, _funnel_sd(v) * torch.randn(n)], -1)


def _funnel_log_prob(x: Tensor) -> Tensor:
    v, y = x.unbind(-1)
    normal = torch.distributions.Normal
    return normal(0.0, 1.0).log_prob(v) + normal(0.0, _funnel_sd(v)).log_prob(y)


def _wave(
    angle: Tensor,
) -> tuple[torch.distributions.Distribution, torch.distributions.Distribution]:
    """The first angle's distribution, and the second's given the first."""
    von_mises = torch.distributions.VonMises
    first = von_mises(torch.tensor(math.pi), torch.tensor(0.8))
    return first, von_mises(math.pi + 1.5 * (2 * angle).sin(), torch.tensor(6.0))


def _wave_sample(n: int) -> Tensor:
    first = _wave(torch.zeros(()))[0].sample((n,))
    return torch.stack([first, _wave(first)[1].sample()], -1)


def _wave_log_prob(x: Tensor) -> Tensor:
    first, second = _wave(x[:, 0])
    return first.log_prob(x[:, 0]) + second.log_prob(x[:, 1])


DENSITIES = {
    "moons": mixture("two moons", "a normal of standard deviation 0.16 moved along two half circles", _moons(), 0.16),
    "gaussians": mixture("eight Gaussians", "an equal mixture of normals of standard deviation 0.25", _ring(), 0.25),
    "spiral": mixture("spiral", "a normal of standard deviation 0.14 moved along two arms of a spiral", _spiral(), 0.14),
    "funnel": Density(
        "funnel", "x₁ ~ N(0, 1) and x₂ ~ N(0, sd = 0.7 exp(0.8 x₁))", _funnel_sample, _funnel_log_prob
    ),
}  # fmt: skip
CIRCULAR = {
    "wave": Density(
        "wave on a torus",
        "two angles: x₁ ~ von Mises(π, 0.8) and x₂ ~ von Mises(π + 1.5 sin 2x₁, 6)",
        _wave_sample,
        _wave_log_prob,
        math.pi,
    )
}
ALL = DENSITIES | CIRCULAR


# The families

#: Two entries leave couplings one choice: each conditions the other in turn.
IN_TURN = (("network", pf.nn.mlp(HIDDEN)), ("mask", "half"))


@dataclass(frozen=True)
class Family:
    """A kind of ready-made flow.

    Args:
        title: Its name on the page.
        preset: The class in `pyroflows.flows`.
        use: When to use it.
        avoid: When not to.
        options: The preset's options, beside the size of an event.
        densities: What it is fitted to.
    """

    title: str
    preset: str
    use: str
    avoid: str
    options: tuple[tuple[str, Any], ...] = (("hidden", HIDDEN),)
    densities: tuple[str, ...] = tuple(DENSITIES)

    def make(self, features: int) -> pf.Flow:
        """Return a new flow for events of so many entries."""
        return getattr(pf.flows, self.preset)(features, **dict(self.options))

    @property
    def call(self) -> str:
        """The code that makes the flow."""
        options = "".join(f", {name}={_code(value)}" for name, value in self.options)
        return f"pf.{self.preset}(features=2{options})".replace("'", '"')


def _code(option: Any) -> str:
    return f"pf.nn.mlp({HIDDEN})" if callable(option) else repr(option)


FAMILIES = {
    "nice": Family(
        "NICE",
        "NICE",
        "The cheapest coupling: it only shifts, so its layers keep volume and cannot overflow. Take it as a baseline, "
        "or where a volume-preserving map is what you want.",
        "Its only scaling is one constant per entry at the end, so a density whose width changes from place to place "
        "asks more of it than of other couplings. A symmetric density can hold it at a normal, as the eight Gaussians "
        "do here: where the mean of one entry given the other is zero, a shift gains nothing at first.",
        IN_TURN,
    ),
    "realnvp": Family(
        "RealNVP",
        "RealNVP",
        "The default where time is short, above all as a guide: cheap both ways, robust in training, and `reversible=True` "
        "saves memory when it is deep.",
        "Each layer is affine in the entries that it moves, so modes stay joined by thin bridges, and sharp shapes take "
        "many layers: splines need fewer.",
        IN_TURN,
    ),
    "maf": Family(
        "MAF",
        "MAF",
        "Density estimation and neural likelihoods or posteriors, where points are given and scored: one pass of a masked "
        "network scores a point, whatever its size.",
        "A sample takes one pass per entry, so it is a poor guide for a model of many parameters: take IAF or couplings.",
    ),
    "iaf": Family(
        "IAF",
        "IAF",
        "Guides: one pass draws a sample, and its own samples are scored at no further cost: all that an ELBO needs.",
        "Data: fitting it to given points, as on this page, runs the slow direction, one entry after the other. Its "
        "layers are affine as those of MAF and RealNVP, with the same trouble with sharp shapes.",
    ),
    "nsf_coupling": Family(
        "NSF, coupling",
        "NSF",
        "The best first choice where accuracy matters and both directions are used: splines bend, split and join "
        "modes in few layers, with an exact inverse.",
        "Beyond its box (`bound`) the splines are the identity: standardise the data, and give heavy tails to "
        "`tails=`. Its density has kinks at the knots, the faint lines in the picture, and a layer costs more than an "
        "affine one.",
        IN_TURN,
    ),
    "nsf_autoregressive": Family(
        "NSF, autoregressive",
        "NSF",
        "Density estimation at its most accurate for tables of moderate size: each entry bends, given those before it.",
        "Sampling takes one pass per entry; and the box of the splines asks for standardised data.",
        (("hidden", HIDDEN), ("coupling", False)),
    ),
    "nsf_circular": Family(
        "NSF, circular",
        "NSF",
        "Angles and phases: the flow lives on the torus, its base is uniform, and no seam shows where -π meets π.",
        "It cannot wind one angle around another (`x₂ = 2x₁ + noise` is out of reach), and it is for angles alone.",
        (*IN_TURN, ("spline", "circular")),
        tuple(CIRCULAR),
    ),
    "naf": Family(
        "NAF",
        "NAF",
        "Density estimation without a box: a small monotone network per entry is universal on the whole line, so it "
        "needs no `bound`.",
        "It has no inverse in closed form: sampling searches for every entry in turn, so it is no guide.",
    ),
    "unaf": Family(
        "UNAF",
        "UNAF",
        "As NAF, but the derivative is a free positive network: the shape has no further restriction, and it is smooth.",
        "Every score is a quadrature, and every sample a search over quadratures: dear in both directions once an "
        "event is large.",
    ),
    "bnaf": Family(
        "BNAF",
        "BNAF",
        "As NAF with far fewer parameters: one network with positive diagonal blocks takes the place of a conditioner "
        "and its monotone maps. Good for scoring with small models.",
        "Its derivative is a product of matrices per entry, so wide blocks are dear; sampling is a search, entry by entry.",
        (),
    ),
    "sospf": Family(
        "SOSPF",
        "SOSPF",
        "A smooth polynomial per entry, found without constraints; good for skewed, humped densities with one mode or few.",
        "Polynomials grow fast: points far outside of the training data get tiny densities, and gaps between modes stay "
        "filled unless the degree is high. Sampling searches.",
    ),
    "bpf": Family(
        "BPF",
        "BPF",
        "A Bernstein polynomial per entry: increasing by simple constraints, stable at any degree, linear beyond its box.",
        "It is smoother than a spline of as many parameters, so sharp edges blur; sampling searches.",
    ),
    "planar": Family(
        "PlanarFlow",
        "PlanarFlow",
        "A light correction of a normal guide: a handful of parameters per layer, and with a context those parameters are "
        "amortised.",
        "Each layer bends along one direction only: enough for shapes of two entries, but the layers needed grow with the "
        "size of an event. Scoring given points, as training here does, searches along each ridge.",
        (),
    ),
    "radial": Family(
        "RadialFlow",
        "RadialFlow",
        "A light correction of a normal guide where mass gathers around, or is pushed from, a few centres; exact both ways.",
        "A layer only widens or tightens a ball, and what is not round takes more of them than is worth it.",
        (),
    ),
    "sylvester": Family(
        "SylvesterFlow",
        "SylvesterFlow",
        "As planar flows with several directions per layer: a compact guide, or the posterior of an amortised model.",
        "It has only as many ridges as layers times `units`, and they move points along the span of their own "
        "directions, where a planar layer may move them anywhere. Scoring given points searches, one direction at a "
        "time.",
        (),
    ),
    "glow": Family(
        "Glow",
        "Glow",
        "Couplings with a learned linear map between them and normalisation inside: strongly correlated entries, or "
        "data that nobody standardised.",
        "In a few dimensions the normalisation adds cost and hardly any power over RealNVP, which has linear maps too.",
        IN_TURN,
    ),
    "residual": Family(
        "ResidualFlow",
        "ResidualFlow",
        "Free-form networks without masks: every entry moves given all others in every layer, which keeps shapes smooth. "
        "Scoring is one pass.",
        "Layers of Lipschitz constant below one stretch little, so sharp shapes take many; log-determinants grow dear with "
        "the size of an event, and sampling iterates.",
    ),
    "ffjord": Family(
        "FFJORD",
        "FFJORD",
        "Smooth fits without filaments from few parameters, of any density that has no hard edges; sampling costs the "
        "same as scoring.",
        "It asks for more training than this page gives it to separate modes, and every evaluation solves a "
        "differential equation, whose cost grows as training sharpens the flow.",
    ),
    "flowplusplus": Family(
        "FlowPlusPlus",
        "FlowPlusPlus",
        "Couplings by mixtures of logistics: flexible, smooth and without a box, for points that are given and scored.",
        "Sampling searches for each entry, so a spline coupling is the better guide.",
        IN_TURN,
    ),
}


# Fitting and timing


def fit_family(name: str, steps: int, seed: int) -> tuple[dict[str, Any], dict[str, pf.Flow]]:
    """Fit a family to its densities.

    Args:
        name: A key of `FAMILIES`.
        steps: Gradient steps, a multiple of those of an epoch.
        seed: Seed of the data, of the networks and of the batches.

    Returns:
        The numbers, and the fitted flows by density.
    """
    family = FAMILIES[name]
    flows, fits = {}, {}
    for key in family.densities:
        train, validation, test = data(ALL[key], seed)
        flow = fresh(family, 2, seed)
        start = time.process_time()
        report = train_flow(flow, train, validation, steps // EPOCH, seed)
        seconds = time.process_time() - start
        with torch.no_grad():
            gap = ALL[key].log_prob(test) - flow().log_prob(test)
        fits[key] = {
            "gap": float(gap.mean()),
            "error": float(gap.std() / math.sqrt(len(gap))),
            "seconds": seconds,
            "skipped": report.skipped,
        }
        flows[key] = flow
    parameters = sum(p.numel() for p in flow.parameters() if p.requires_grad)
    return {"parameters": parameters, "fast": flow.transform.fast, "fits": fits}, flows


def train_flow(flow: pf.Flow, train: Tensor, validation: Tensor, epochs: int, seed: int) -> Any:
    """Fit a flow by maximum likelihood, in the same way for all families.

    Args:
        flow: The flow.
        train: Training points.
        validation: Held-out points.
        epochs: Passes through the training points; none is left out.
        seed: Seed of the batches.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The flow starts far")
        return pf.fit_density(
            flow,
            train,
            validation=validation,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            max_epochs=epochs,
            patience=epochs,
            seed=seed,
            progress=False,
        )


def fresh(family: Family, features: int, seed: int) -> pf.Flow:
    """Return a new flow whose networks depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.make(features)


def data(density: Density, seed: int, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return points to train, to validate and to test by.

    Args:
        density: Where they come from.
        seed: Their seed.
        copies: How many independent points stand side by side in an event.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [
            density.sample(n * copies).reshape(n, 2 * copies) for n in (TRAIN, VALIDATION, TEST)
        ]
    return parts[0], parts[1], parts[2]


def to_time(name: str, features: int, seed: int, fitted: pf.Flow) -> tuple[pf.Flow, Tensor]:
    """Return a flow of a family to time, and points to score.

    Args:
        name: A key of `FAMILIES`.
        features: Entries of an event; of two, the fitted flow is taken, else one is trained for `WARM_UP` steps on copies
            of its first density, for the cost of some flows depends on how far they are from the identity.
        seed: The seed.
        fitted: The flow fitted to the first density.
    """
    family = FAMILIES[name]
    train, validation, test = data(ALL[family.densities[0]], seed, features // 2)
    flow = fitted
    if features > 2:
        flow = fresh(family, features, seed)
        train_flow(flow, train, validation[:BATCH], WARM_UP // EPOCH, seed)
    return flow, test[:POINTS]


def measure(subjects: dict[str, tuple[pf.Flow, Tensor]]) -> dict[str, dict[str, float]]:
    """Time flows in turn, round by round; return medians of CPU milliseconds to score and to sample.

    Args:
        subjects: Flows with points to score.
    """
    times: dict[tuple[str, str], list[float]] = {
        (name, step): [] for name in subjects for step in ("score", "sample")
    }
    with torch.no_grad():
        for turn in range(REPEATS[1] + 1):
            for (name, step), seen in times.items():
                if len(seen) >= REPEATS[0] and sum(seen) > LIMIT:
                    continue
                flow, x = subjects[name]
                x = x.clone()  # what was scored before is remembered
                start = time.process_time()
                flow().log_prob(x) if step == "score" else flow().sample((POINTS,))
                if turn > 0:
                    seen.append(time.process_time() - start)
    medians = {key: 1e3 * statistics.median(seen) for key, seen in times.items()}
    return {name: {step: medians[name, step] for step in ("score", "sample")} for name in subjects}


# Pictures


def grid(window: float) -> Tensor:
    """Return the centres of the cells of a square, row by row from below, `(CELLS * CELLS, 2)`."""
    axis = window * (2 * (torch.arange(CELLS) + 0.5) / CELLS - 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def heat(log_prob: Callable[[Tensor], Tensor], window: float) -> np.ndarray:
    """Return a density on the grid.

    Args:
        log_prob: Its logarithm.
        window: Half-width of the square.
    """
    with torch.no_grad():
        values = torch.cat([log_prob(part) for part in grid(window).split(4096)])
    return values.exp().reshape(CELLS, CELLS).double().numpy()


def draw(panels: Sequence[tuple[str, np.ndarray, float]], path: Path) -> None:
    """Draw densities side by side, a pixel per cell.

    Args:
        panels: Titles, densities and the value of the brightest colour.
        path: The PNG file.
    """
    width, height = len(panels) * (CELLS + GAP) - GAP, CELLS + TITLE
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for i, (title, values, top) in enumerate(panels):
        left = i * (CELLS + GAP)
        axes = figure.add_axes((left / width, 0.0, CELLS / width, CELLS / height))
        norm = PowerNorm(0.5, 0.0, top, clip=True)
        axes.imshow(
            values, origin="lower", cmap="magma", norm=norm, interpolation="nearest", aspect="auto"
        )
        axes.set_axis_off()
        middle = (left + CELLS / 2) / width
        figure.text(
            middle,
            1 - 0.45 * TITLE / height,
            title,
            ha="center",
            va="center",
            fontsize=9,
            color="#333333",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.draw()
    _image(np.asarray(canvas.buffer_rgba())).save(path, optimize=True)


def _image(rgba: np.ndarray) -> Image.Image:
    """The picture in the colours of the map and some greys, at a fraction of the size of full colour."""
    greys = np.repeat(np.linspace(0, 255, 16)[:, None], 3, 1)
    colours = np.concatenate([255 * colormaps["magma"](np.linspace(0, 1, 240))[:, :3], greys])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.round().astype(np.uint8).tobytes())
    return Image.fromarray(rgba).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)


def brightest(key: str) -> float:
    """Return the density of the brightest colour, the truth's largest."""
    return float(heat(ALL[key].log_prob, ALL[key].window).max())


def draw_truth(path: Path) -> None:
    """Draw the densities themselves.

    Args:
        path: The PNG file.
    """
    truths = {key: heat(density.log_prob, density.window) for key, density in ALL.items()}
    draw([(ALL[key].title, values, values.max()) for key, values in truths.items()], path)


def draw_family(name: str, flows: dict[str, pf.Flow], path: Path) -> None:
    """Draw a family's fits.

    Args:
        name: A key of `FAMILIES`.
        flows: The fitted flows by density.
        path: The PNG file.
    """
    draw(
        [
            (
                ALL[key].title,
                heat(lambda x, flow=flow: flow().log_prob(x), ALL[key].window),
                brightest(key),
            )
            for key, flow in flows.items()
        ],
        path,
    )


# The page


def page(results: dict[str, Any]) -> str:
    """Return the page.

    Args:
        results: What `run` returns.
    """
    families = {name: results["families"][name] for name in FAMILIES if name in results["families"]}
    parts = [_introduction(results), _table(results, families), _costs(families)]
    parts += [_section(name, results, row) for name, row in families.items()]
    return "\n".join(parts)


def _introduction(results: dict[str, Any]) -> str:
    s = results["settings"]
    about = "\n".join(f"- **{density.title}**: {density.formula}." for density in ALL.values())
    return f"""# A gallery of flows

Every family of ready-made flow, fitted to the same densities of two entries by the same training: what it can bend, what it
cannot, what it costs, and when to use it. This page, its numbers and its pictures are made by
`python -m benchmarks.gallery`, the numbers from [gallery.json](../benchmarks/results/gallery.json).

## The densities

![The densities]({PICTURES}/truth.png)

{about}

All are known exactly, so the truth can stand beside each fit. The colours are those of the density's square root, from zero
to the truth's maximum, the same for a density in every picture. The circular flow has a density of its own, on angles.

## How well they fit

Every flow has the number of layers that its preset has by default and networks of {" and ".join(map(str, HIDDEN))} units
(planar, radial and Sylvester flows without context have no network; BNAF has its own default). In couplings the two entries
condition each other in turn, `mask="half"`. Each flow is trained by `pf.fit_density` for {s["steps"]} steps of {s["batch"]}
points out of {s["train"]}, with a learning rate of {s["learning_rate"]:g}, and judged by {s["test"]} held-out points. It is
one run per family, seed {s["seed"]}, without any tuning, and far from convergence for some: small differences say little,
and this is a picture of the families, not a contest.

The first row has the mean log-likelihood of the held-out points under the truth, in nats. Each row below has the flow's, and
in brackets what it loses against the truth, which estimates the Kullback–Leibler divergence.
"""


def _table(results: dict[str, Any], families: dict[str, Any]) -> str:
    titles = [density.title for density in DENSITIES.values()]
    lines = [
        f"| family | parameters | {' | '.join(titles)} | mean loss | training, CPU s |",
        "|---|" + "---:|" * 7,
    ]
    truths = [f"{results['truth'][key]:.2f}" for key in DENSITIES]
    lines.append(f"| truth | | {' | '.join(truths)} | | |")
    for name, row in families.items():
        if FAMILIES[name].densities == tuple(DENSITIES):
            lines.append(_table_row(name, results["truth"], row))
    others = [
        _other(name, results["truth"], row)
        for name, row in families.items()
        if set(row["fits"]) != set(DENSITIES)
    ]
    return "\n".join([*lines, "", *others])


def _table_row(name: str, truth: dict[str, float], row: dict[str, Any]) -> str:
    cells = [_cell(truth[key], row["fits"][key]) for key in DENSITIES]
    seconds = statistics.fmean(fit["seconds"] for fit in row["fits"].values())
    return (
        f"| [{FAMILIES[name].title}](#{_anchor(name)}) | {row['parameters']} | {' | '.join(cells)} | "
        f"{mean_gap(row):.2f} | {seconds:.0f} |"
    )


def _cell(truth: float, fit: dict[str, Any]) -> str:
    gap = float(fit["gap"])
    return f"{truth - gap:.2f} ({gap:.2f})"


def _other(name: str, truth: dict[str, float], row: dict[str, Any]) -> str:
    """A sentence on a family that has a density of its own."""
    return "".join(
        f"{FAMILIES[name].title}, {row['parameters']} parameters, reaches {_cell(truth[key], fit)} on the {ALL[key].title}, "
        f"whose truth is {truth[key]:.2f}, in {fit['seconds']:.0f} CPU seconds of training.\n"
        for key, fit in row["fits"].items()
    )


def mean_gap(row: dict[str, Any]) -> float:
    """Return what a family loses against the truth in the mean over its densities, in nats."""
    return statistics.fmean(float(fit["gap"]) for fit in row["fits"].values())


def _costs(families: dict[str, Any]) -> str:
    head = " | ".join(f"{step}, D = {size}" for size in SIZES for step in ("score", "sample"))
    lines = [
        "## What they cost\n",
        f"CPU milliseconds to score and to sample {POINTS} points of D entries, without gradients, by one thread: medians,",
        f"the flows in turn. Of two entries, the fitted flow is timed; of more, one that was trained for {WARM_UP} steps on",
        "independent copies of the first density. Data are scored, which takes a flow that is fast to score.",
        "So times of different D do not compare where the cost grows with training, as that of FFJORD does.",
        "A guide is sampled, and scored at its own samples, which a flow that is fast to sample does at no further cost.\n",
        f"| family | fast direction | {head} |",
        "|---|---|" + "---:|" * 2 * len(SIZES),
    ]
    for name, row in families.items():
        cells = [
            f"{row['cost'][str(size)][step]:.3g}" for size in SIZES for step in ("score", "sample")
        ]
        lines.append(f"| {FAMILIES[name].title} | {WORDS[row['fast']]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "## The families\n"])


def _section(name: str, results: dict[str, Any], row: dict[str, Any]) -> str:
    family = FAMILIES[name]
    cost = row["cost"][str(SIZES[-1])]
    skipped = sum(fit["skipped"] for fit in row["fits"].values())
    steps = (
        f" {skipped} training steps were skipped because they were not finite." if skipped else ""
    )
    return f"""### {family.title}

`{family.call}`

![{family.title}]({PICTURES}/{name}.png)

Loss {mean_gap(row):.2f} nats{"" if len(row["fits"]) == 1 else " in the mean"}, {row["parameters"]} parameters,
{WORDS[row["fast"]]}: {POINTS} points of {SIZES[-1]} entries are scored in {cost["score"]:.3g} ms and sampled in
{cost["sample"]:.3g} ms.{steps}

*When to use it.* {family.use}

*When not.* {family.avoid}
"""


PICTURES = "gallery"


def _anchor(name: str) -> str:
    """The anchor that Markdown gives the family's heading."""
    return FAMILIES[name].title.lower().replace(",", "").replace(" ", "-")


# The command


@dataclass(frozen=True)
class Places:
    """Where the results go.

    Args:
        results: The numbers.
        page: The page; the pictures' folder stands beside it.
    """

    results: Path
    page: Path

    @property
    def pictures(self) -> Path:
        """The folder of pictures."""
        return self.page.parent / PICTURES

    def read(self) -> dict[str, Any] | None:
        """Return the stored numbers, if there are any."""
        return (
            json.loads(self.results.read_text(encoding="utf-8")) if self.results.is_file() else None
        )

    def write(self, results: dict[str, Any]) -> None:
        """Store numbers, and the page made from them."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_finite(results), indent=1, ensure_ascii=False) + "\n"
        self.results.write_text(text, encoding="utf-8")
        self.write_page()

    def write_page(self) -> None:
        """Make the page from the stored numbers."""
        self.page.write_text(
            page(json.loads(self.results.read_text(encoding="utf-8"))), encoding="utf-8"
        )


def places(out: str | None) -> Places:
    """Return where results go: their places in the repository, or all in one folder."""
    if out is None:
        return Places(
            ROOT / "benchmarks" / "results" / "gallery.json", ROOT / "tutorials" / "gallery.md"
        )
    return Places(Path(out) / "gallery.json", Path(out) / "gallery.md")


def run(names: Sequence[str], steps: int, seed: int, pictures: Path) -> Iterator[dict[str, Any]]:
    """Fit, draw and time families; the results so far, after each family and at the end with the times.

    Args:
        names: Keys of `FAMILIES`.
        steps: Gradient steps of each fit.
        seed: The seed.
        pictures: The folder of pictures.
    """
    results: dict[str, Any] = {
        "settings": settings(steps, seed),
        "machine": machine(),
        "truth": truths(seed),
        "families": {},
    }
    draw_truth(pictures / "truth.png")
    subjects: dict[int, dict[str, tuple[pf.Flow, Tensor]]] = {size: {} for size in SIZES}
    for name in names:
        results["families"][name], flows = fit_family(name, steps, seed)
        draw_family(name, flows, pictures / f"{name}.png")
        for size in SIZES:
            subjects[size][name] = to_time(name, size, seed, next(iter(flows.values())))
        yield results
    costs = {size: measure(subjects[size]) for size in SIZES}
    for name in names:
        results["families"][name]["cost"] = {str(size): costs[size][name] for size in SIZES}
    yield results


def settings(steps: int, seed: int) -> dict[str, Any]:
    """Return what the fits depend on."""
    return {
        "steps": steps,
        "batch": BATCH,
        "train": TRAIN,
        "validation": VALIDATION,
        "test": TEST,
        "learning_rate": LEARNING_RATE,
        "hidden": list(HIDDEN),
        "seed": seed,
    }


def truths(seed: int) -> dict[str, float]:
    """Return the mean log-likelihood of the test points under the densities that they come from."""
    return {
        key: float(density.log_prob(data(density, seed)[2]).mean()) for key, density in ALL.items()
    }


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Return new results, with the old ones of families that are not among them.

    Args:
        old: Stored results of the same settings, if any.
        new: Results.
    """
    rows = ({} if old is None else old["families"]) | new["families"]
    return new | {"families": {name: rows[name] for name in FAMILIES if name in rows}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help="families by commas; all by default"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help=f"gradient steps of each fit, a multiple of {EPOCH}"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data, networks and batches")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for all that is written, in place of the repository's"
    )
    parser.add_argument(
        "--page", action="store_true", help="only make the page anew from the stored numbers"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The command's arguments; None takes the process's own.

    Returns:
        0, or 2 where the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    where = places(args.out)
    try:
        names = _choose(args.families, list(FAMILIES), "--families")
        old = _check(args, names, where)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.page:
        where.write_page()
        return 0
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for results in run(names, args.steps, args.seed, where.pictures):
        name, row = list(results["families"].items())[-1]
        if "cost" not in row:
            print(f"{name}: loses {mean_gap(row):.3f} nats in the mean", flush=True)
    where.write(merged(old, results))
    return 0


def _check(args: argparse.Namespace, names: Sequence[str], where: Places) -> dict[str, Any] | None:
    """Check the arguments; return the stored results that are to be kept."""
    old = where.read()
    if args.page:
        if old is None:
            raise ValueError(f"Expected stored numbers in {where.results}; there are none.")
        return old
    if args.steps < 1 or args.steps % EPOCH:
        raise ValueError(
            f"Expected --steps to be a positive multiple of {EPOCH}; got {args.steps}."
        )
    if set(names) == set(FAMILIES) or old is None:
        return None
    if old["settings"] != settings(args.steps, args.seed):
        raise ValueError(
            f"Expected a part of the families to have the settings of the stored ones in {where.results}; got others. "
            "Write to another folder with --out."
        )
    return old


if __name__ == "__main__":
    sys.exit(main())
