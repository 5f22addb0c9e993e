"""A fitted posterior: draws, judgement, tables, files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike, fsdecode, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import flows
from .._checks import check_size
from .._files import save_whole
from .._random import forked
from ..guides import AutoFlow, AutoMixture
from ..guides.auto import FlowGuide
from ..model import prediction as simulate
from ..model.checks import check_arguments
from ..model.density import LogDensity
from ..model.minibatch import log_density_of
from ..report import arviz_bridge as arviz
from ..sampling.polishing import autocorrelation, drift, polish
from .census import missed_mass
from .gaussian import Gaussians
from .rungs import flow_of_fit, wide_flow_of_fit
from .verdict import KHAT_LIMIT, MISSED_LIMIT, Verdict, drifted, improper, judge, missing, polished

if TYPE_CHECKING:
    import pandas

__all__ = ["Posterior", "load_posterior"]

FORMAT = 3
PARTS = ("sites", "flow", "parameters", "arguments", "history", "seconds", "interrupted")
#: What format 2 has added, with what a file of format 1 stands for.
LATER_PARTS: dict[str, Any] = {
    "components": None,
    "fits": None,
    "trajectories": 0,
    "rungs": [],
    "endless": None,
}
JUDGE_DRAWS = 10_000
# What looks for a drift: as many chains as tell a tenth of a standard deviation, a few quarters of an orbit long.
DRIFT_CHAINS = 2000
DRIFT_TRAJECTORIES = 5
# Candidates per draw when draws are corrected: enough that a draw is seldom taken twice.
CANDIDATES = 4
LEAST_CANDIDATES = 1000
LEAST_POLISHED = 64


def _plain_realnvp(features: int) -> flows.Flow:
    return flows.RealNVP(features, mixing=None)


def _plain_maf(features: int) -> flows.Flow:
    return flows.MAF(features, mixing=None)


_OWN_FLOWS: dict[str, Any] = {
    "default": None,
    "fit": flow_of_fit,
    "wide": wide_flow_of_fit,
    "plain RealNVP": _plain_realnvp,
    "plain MAF": _plain_maf,
}
#: What presets of these names were before format 3.
_FORMER_FLOWS = {"RealNVP": "plain RealNVP", "MAF": "plain MAF"}


class Rung(NamedTuple):
    """A step of the ladder that :func:`fit_posterior` climbs.

    Attributes:
        name: What was tried.
        seconds: Wall-clock time until then.
        verdict: What came of it.
    """

    name: str
    seconds: float
    verdict: Verdict


class Posterior:
    r"""The posterior that :func:`fit_posterior` returns.

    Args:
        guide: A guide that has met its model.
        density: The log density of the model.
        history: ELBO of each training step.
        seconds: Wall-clock time of the fit.
        interrupted: Whether the fit was cut short.
        fits: Local fits of a census of the modes, by which the verdict looks for what the guide misses.
        trajectories: Hamiltonian trajectories by which draws are polished.
        rungs: What was tried, with what verdict.
        endless: A direction in which the density does not fall off, of shape ``(features,)``, if there is one.

    Attributes:
        guide: The trained :class:`AutoFlow`, ready for ``Predictive``, ``NeuTraReparam`` and more SVI; or an
            :class:`AutoMixture`.
        verdict: The :class:`Verdict`; its ``str`` is a sentence.
        rungs: What was tried, each with its seconds and verdict.
        history: ELBO of each training step.
        seconds: Wall-clock time of the fit.
        interrupted: Whether the fit was cut short.

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> posterior = pf.fit_posterior(model, steps=0, progress=False)
        >>> posterior.verdict.ok
        True
        >>> posterior.sample(3)["x"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        guide: FlowGuide,
        density: LogDensity,
        history: Sequence[float] = (),
        seconds: float = 0.0,
        interrupted: bool = False,
        fits: Gaussians | None = None,
        trajectories: int = 0,
        rungs: Sequence[Rung] = (),
        endless: Tensor | None = None,
    ) -> None:
        self.guide = guide
        self.density = density
        self.history = list(history)
        self.seconds = seconds
        self.interrupted = interrupted
        self.fits = fits
        self.trajectories = trajectories
        self.rungs = list(rungs)
        self.endless = endless
        self.surprises: Tensor | None = None
        with forked(0):
            self.verdict = self._judged()

    def _judged(self) -> Verdict:
        """The verdict: by the weights, then by the census, and by a drift where these find no fault."""
        names = self.entry_names
        z, log_weights = self._propose(JUDGE_DRAWS, seed=None)
        verdict, smoothed = judge(log_weights, z, names)
        self.surprises = _heaviest(log_weights, z)
        if self.endless is not None:
            return improper(verdict, self._along(self.endless))
        if self.fits is not None and math.isfinite(verdict.log_evidence):
            law = self.guide.get_posterior()
            missed = missed_mass(self.density, law.log_prob, verdict.log_evidence, self.fits)
            worst = int(missed.argmax())
            verdict = missing(verdict, float(missed[worst]), self._where(self.fits.loc[worst]))
            if verdict.missed > MISSED_LIMIT:
                return verdict
        if not (verdict.ok or self.trajectories):
            return verdict
        weights = smoothed.exp() if self._reliable(verdict) else _even(z, log_weights)
        effective = 1 / (float(weights.square().sum()) + 1 / DRIFT_CHAINS)
        start = z[_systematic(weights, DRIFT_CHAINS).to(z.device)]
        if not self.trajectories:
            moved = polish(self.density, self.guide, start, DRIFT_TRAJECTORIES)
            return drifted(verdict, drift(start, moved, effective), names)
        half = polish(self.density, self.guide, start, self.trajectories - self.trajectories // 2)
        moved = polish(self.density, self.guide, half, self.trajectories // 2)
        # With reliable weights the start is right, and need not be forgotten.
        remembered = (
            torch.zeros_like(z[0]) if self._reliable(verdict) else autocorrelation(half, moved)
        )
        return polished(
            verdict, drift(half, moved, DRIFT_CHAINS), remembered, self.trajectories, names
        )

    def _along(self, direction: Tensor) -> str:
        """A direction in words: the entries that change the most."""
        shares = direction.abs() / direction.abs().amax()
        return "along " + " and ".join(
            name for name, share in zip(self.entry_names, shares, strict=True) if share > 0.3
        )

    def _where(self, z: Tensor) -> str:
        """A point in words: the values of the first sites."""
        values = {name: value.flatten() for name, value in self.density.constrain(z).items()}
        parts = [
            f"{name} = {', '.join(f'{float(v):.3g}' for v in value[:3])}"
            for name, value in list(values.items())[:3]
        ]
        return "near " + "; ".join(parts)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name}{list(site.shape) or ''}" for site in self.density.sites)
        return f"<Posterior of {sites}. {self.verdict}{' The fit was interrupted.' if self.interrupted else ''}>"

    @property
    def log_evidence(self) -> float:
        """Logarithm of the marginal likelihood, by importance sampling."""
        return self.verdict.log_evidence

    @property
    def corrects(self) -> bool:
        """Whether draws are corrected by importance resampling: where the weights can be relied on, and matter."""
        return self._reliable(self.verdict) and self.verdict.ess < 0.999

    def _reliable(self, verdict: Verdict) -> bool:
        return verdict.khat < KHAT_LIMIT or (verdict.ok and not self.trajectories)

    @property
    def site_dims(self) -> dict[str, tuple[str | None, ...]]:
        """For each latent site the names of the plates that its dimensions belong to; ``None`` where there is none."""
        return {site.name: site.plates for site in self.density.sites}

    @property
    def entry_names(self) -> list[str]:
        """Names of the entries of the unconstrained vector, such as ``theta[0]``."""
        names = []
        for site in self.density.sites:
            shape = site.unconstrained_shape
            for index in range(shape.numel()):
                position = torch.unravel_index(torch.tensor(index), shape) if shape else ()
                names.append(
                    site.name + (f"[{', '.join(str(int(i)) for i in position)}]" if shape else "")
                )
        return names

    def sample(self, n: int = 4000, seed: int | None = None) -> dict[str, Tensor]:
        """Draws from the posterior, on the constrained scale.

        Where importance weights are reliable the draws are resampled by them, which corrects what the guide misses.

        Args:
            n: How many draws.
            seed: A seed of their own; without one they come from torch's random state.

        Returns:
            For each latent and deterministic site a tensor of shape ``(n, *site_shape)``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        z = self.sample_unconstrained(n, seed)
        return {**self.density.constrain(z), **simulate.deterministic_sites(self.density, z)}

    def sample_unconstrained(self, n: int = 4000, seed: int | None = None) -> Tensor:
        """Draws from the posterior as unconstrained vectors.

        Args:
            n: How many draws.
            seed: A seed of their own.

        Returns:
            Tensor of shape ``(n, features)``.
        """
        check_size("n", n)
        with forked(seed):
            if not self.trajectories:
                return self._corrected(n)
            # The step size that a few draws agree on would hang on where each of them goes.
            z = self._corrected(max(n, LEAST_POLISHED))
            return polish(self.density, self.guide, z, self.trajectories)[:n]

    def _corrected(self, n: int) -> Tensor:
        """Draws of the guide, resampled where the weights are reliable."""
        if not self.corrects:
            return self._propose(n, seed=None, weigh=False)[0]
        z, log_weights = self._propose(max(CANDIDATES * n, LEAST_CANDIDATES), seed=None)
        smoothed = judge(log_weights, z, self.entry_names)[1]
        return z[_systematic(smoothed.exp(), n).to(z.device)]

    def summary(self, n: int = 4000, seed: int | None = 0) -> pandas.DataFrame:
        """A table with mean, sd and 94 % highest-density interval of every scalar parameter.

        Args:
            n: Draws that it rests on.
            seed: Seed of these draws.

        Returns:
            A data frame, one row a scalar, columns ``mean``, ``sd``, ``hdi_3%``, ``hdi_97%``.
        """
        draws = {name: _numpy(value) for name, value in self.sample(n, seed).items()}
        return arviz.summary(draws)

    def to_arviz(self, draws: int = 4000, seed: int | None = 0) -> Any:
        """The posterior in ArviZ's container, with all that the model allows.

        Groups: ``posterior``; ``sample_stats`` (``lp``, the log joint, and ``log_weight``, log joint less log guide, of
        these draws on the unconstrained scale); ``log_likelihood``, ``posterior_predictive`` and ``observed_data``;
        ``prior`` where the priors are proper. Dimensions are named by the plates. Of data from a loader, the groups of
        the data hold the first batch.

        Args:
            draws: How many draws.
            seed: Their seed.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
        """
        density = self.density
        z = self.sample_unconstrained(draws, seed)
        with torch.no_grad():
            lp = density.log_prob(z)
            log_weight = lp - self.guide.get_posterior().log_prob(z)
        verdict = self.verdict
        attrs = {
            "inference_library": "pyroflows",
            "verdict": str(verdict),
            "khat": verdict.khat,
            "ess_fraction": verdict.ess,
            "elbo": verdict.elbo,
            "log_evidence": verdict.log_evidence,
            "log_evidence_error": verdict.log_evidence_error,
            "importance_resampled": int(self.corrects),
        }
        sample_stats = {"lp": lp.unsqueeze(0), "log_weight": log_weight.unsqueeze(0)}
        with forked(seed):
            return simulate.inference_data(density, z.unsqueeze(0), sample_stats, attrs)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the posterior to a file that :func:`load_posterior` reads.

        The file holds numbers only: the parameters, and the arguments of the model where they are numbers and tensors (no
        loader).

        Args:
            path: Where to write.

        Raises:
            TypeError: If ``path`` is no path.
            ValueError: If the file cannot be written.
        """
        state = {
            "format": FORMAT,
            "sites": [(site.name, list(site.shape)) for site in self.density.sites],
            "flow": _preset_name(self.guide),
            "components": len(self.guide.flows) if isinstance(self.guide, AutoMixture) else None,
            "parameters": self.guide.state_dict(),
            "arguments": None
            if self.density.streamed
            else _plain((list(self.density.args), self.density.kwargs)),
            "history": self.history,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "fits": None if self.fits is None else list(self.fits),
            "trajectories": self.trajectories,
            "endless": self.endless,
            "rungs": [(rung.name, rung.seconds, asdict(rung.verdict)) for rung in self.rungs],
        }
        name = fsdecode(fspath(path))
        try:
            save_whole(state, name)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"Expected a path that can be written; got {name!r} ({error})."
            ) from None

    @torch.no_grad()
    def _propose(self, n: int, seed: int | None, weigh: bool = True) -> tuple[Tensor, Tensor]:
        """Draws of the guide, with their log weights."""
        guide = self.guide.get_posterior()
        with forked(seed):
            z, log_q = guide.rsample_and_log_prob((n,))
        log_weights = self.density.log_prob(z) - log_q if weigh else torch.zeros_like(log_q)
        return z, log_weights


def load_posterior(
    path: str | PathLike[str],
    model: Callable[..., Any],
    args: Sequence[Any] | DataLoader | None = None,
    kwargs: Mapping[str, Any] | None = None,
    guide: FlowGuide | None = None,
) -> Posterior:
    """Reads a posterior that :meth:`Posterior.save` wrote.

    Args:
        path: The file.
        model: The model that was fitted.
        args: Its positional arguments, or their loader, where the file does not hold them.
        kwargs: Its keyword arguments, where the file does not hold them.
        guide: A fresh guide as the one that was fitted, where that was none of pyroflows' presets.

    Returns:
        The posterior, judged anew.

    Raises:
        ValueError: If the file is missing or no saved posterior, if the model is another one, or if something is needed
            that the file does not hold.

    Example:
        >>> import tempfile, pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pf.fit_posterior(model, steps=0, progress=False).save(f"{folder}/x.pt")
        ...     pf.load_posterior(f"{folder}/x.pt", model).verdict.ok
        True
    """
    if not callable(model):
        raise TypeError(f"Expected model to be a callable with Pyro statements; got {model!r}.")
    if guide is not None and not isinstance(guide, FlowGuide):
        raise TypeError(f"Expected guide to be an AutoFlow or AutoMixture; got {guide!r}.")
    state = _read(path)
    if args is None and kwargs is None:
        if state["arguments"] is None:
            raise ValueError(
                f"Expected args and kwargs of the model, for {str(path)!r} could not hold them; got neither."
            )
        args, kwargs = state["arguments"]
    if not isinstance(args, DataLoader):
        args, kwargs = check_arguments(() if args is None else args, kwargs)
    density = log_density_of(model, args, kwargs).full
    of_file = [(name, tuple(shape)) for name, shape in state["sites"]]
    of_model = [(site.name, tuple(site.shape)) for site in density.sites]
    if of_file != of_model:
        raise ValueError(
            f"Expected the model of the saved posterior, with latent sites {of_file}; got one with {of_model}."
        )
    if guide is None:
        if state["flow"] is None:
            raise ValueError(
                f"Expected a guide made as the one saved in {str(path)!r}, whose flow is no preset; got None."
            )
        flow = (
            _OWN_FLOWS[state["flow"]]
            if state["flow"] in _OWN_FLOWS
            else getattr(flows, state["flow"])
        )
        if state["components"] is None:
            guide = AutoFlow(density.continuous_model, flow=flow)
        else:
            guide = AutoMixture(density.continuous_model, state["components"], flow=flow)
    density.introduce(guide)
    try:
        guide.load_state_dict(state["parameters"])
    except RuntimeError as error:
        raise ValueError(
            f"Expected a guide made as the one saved in {str(path)!r}; {' '.join(str(error).split())}"
        ) from None
    return Posterior(
        guide,
        density,
        state["history"],
        state["seconds"],
        state["interrupted"],
        fits=None
        if state["fits"] is None
        else Gaussians(*(part.to(density.initial) for part in state["fits"])),
        trajectories=state["trajectories"],
        endless=state["endless"],
        rungs=[
            Rung(name, seconds, Verdict(**verdict)) for name, seconds, verdict in state["rungs"]
        ],
    )


def check_posterior(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is a posterior."""
    if not isinstance(value, Posterior):
        raise TypeError(
            f"Expected {name} to be a Posterior, as fit_posterior returns it; got {type(value).__name__}."
        )


def _heaviest(log_weights: Tensor, z: Tensor, count: int = 8) -> Tensor:
    """The draws of greatest weight, of shape ``(count, features)``."""
    finite = log_weights.isfinite() & z.isfinite().all(-1)
    order = log_weights.masked_fill(~finite, -math.inf).argsort(descending=True)[
        : min(count, int(finite.sum()))
    ]
    return z[order]


def _even(z: Tensor, log_weights: Tensor) -> Tensor:
    """Equal weights of the draws at which guide and model have a density, or of all if there are none."""
    usable = (z.isfinite().all(-1) & log_weights.isfinite()).to("cpu", torch.float64)
    return usable / usable.sum() if bool(usable.any()) else torch.full_like(usable, 1 / len(usable))


def _systematic(weights: Tensor, n: int) -> Tensor:
    """Systematic resampling, in random order: each index comes ``n w_i`` times, rounded up or down."""
    offset, order = torch.rand((), dtype=weights.dtype), torch.randperm(n)
    positions = (torch.arange(n, dtype=weights.dtype) + offset) / n
    return torch.searchsorted(weights.cumsum(0), positions).clamp(max=len(weights) - 1)[order]


def _preset_name(guide: FlowGuide) -> str | None:
    made_by = guide._make_flow
    for name, flow in _OWN_FLOWS.items():
        if made_by is flow:
            return name
    name = getattr(made_by, "__name__", "")
    return name if getattr(flows, name, None) is made_by else None


def _plain(value: Any) -> Any:
    """The value if it is made of numbers, strings and tensors only; else ``None``."""

    def plain(item: Any) -> bool:
        if isinstance(item, (list, tuple)):
            return all(map(plain, item))
        if isinstance(item, dict):
            return all(isinstance(key, str) for key in item) and all(map(plain, item.values()))
        return item is None or type(item) in (bool, int, float, str, Tensor)

    return value if plain(value) else None


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise ValueError(
            f"Expected the file of a saved posterior; {str(path)!r} cannot be read ({error})."
        ) from None
    except Exception:
        # What the bytes of another file make the reader do is anyone's guess.
        state = None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"Expected the file of a saved posterior; {str(path)!r} is none.")
    if state["format"] not in (1, 2, FORMAT):
        raise ValueError(
            f"Expected a saved posterior of format {FORMAT}; {str(path)!r} has format {state['format']}."
        )
    state = {**LATER_PARTS, **state}
    if state["format"] < FORMAT and state.get("flow") in _FORMER_FLOWS:
        state["flow"] = _FORMER_FLOWS[state["flow"]]
    missing = [part for part in PARTS if part not in state]
    if missing:
        raise ValueError(
            f"Expected the file of a saved posterior; {str(path)!r} lacks {', '.join(missing)}."
        )
    return state


def _numpy(value: Tensor) -> Any:
    return value.detach().cpu().numpy()
