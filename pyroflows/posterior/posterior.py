"""A fitted posterior: draws, verdict, tables."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._checks import check_flag, check_size, list_names
from .._random import forked
from ..guides.guide import Guide
from ..model import prediction as simulate
from ..model.density import LogDensity
from ..model.handlers import DetachedCopies
from ..model.simulator import Conditioned
from ..report import statistics
from ..sampling.polishing import polish
from .files import describe_sites, is_plain, write_state
from .fingerprint import take_fingerprint
from .importance import ImportanceSample, draw_importance_sample, resample
from .prior import SitesPrior, learn_prior
from .subject import KHAT_LIMIT, entry_names, scalar_names
from .verdict import Verdict

if TYPE_CHECKING:
    import pandas

__all__ = ["Attempt", "Posterior", "check_posterior"]

# Candidates per draw where draws are corrected, so that a draw is seldom taken twice.
CANDIDATES = 4
LEAST_CANDIDATES = 1000
LEAST_POLISHED = 64
# Above this share of effective draws a correction changes nothing.
EXACT_ESS = 0.999


class Attempt(NamedTuple):
    """An attempt of the ladder that :func:`fit_posterior` climbs.

    Attributes:
        name: The rung and the steps of training.
        seconds: Wall-clock time from the beginning of the fit until the verdict.
        verdict: The verdict on it.
    """

    name: str
    seconds: float
    verdict: Verdict


class Posterior:
    r"""The record that :func:`fit_posterior` and :func:`judge` return; making one computes nothing.

    Args:
        guide: A guide that has met its model; that of a fit is an :class:`AutoFlow`, ready for
            ``Predictive``, ``NeuTraReparam`` and more SVI, or an :class:`AutoMixture`.
        density: The log density of the model; ``None`` if it is not known, so that draws are
            unconstrained vectors.
        verdict: The verdict; by default one that says that nothing has been judged.
        trajectories: Hamiltonian trajectories by which draws are polished.
        name: The attempt of the ladder that it is of.
        rungs: The attempts of the ladder, in order.
        history: ELBO of each training step.
        seconds: Wall-clock time of the fit.
        interrupted: Whether the fit was cut short.

    Attributes:
        learned: Parameters of the model that the fit has learned, by name; files do not hold them.

    Raises:
        TypeError: If ``guide`` is no guide.

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
        guide: Guide,
        density: LogDensity | None = None,
        verdict: Verdict | None = None,
        trajectories: int = 0,
        name: str = "",
        rungs: Sequence[Attempt] = (),
        history: Sequence[float] = (),
        seconds: float = 0.0,
        interrupted: bool = False,
    ) -> None:
        if not isinstance(guide, Guide):
            raise TypeError(
                "Expected guide to be a Guide, as pyroflows.guides.as_guide makes one; got "
                f"{type(guide).__name__}."
            )
        self.guide = guide
        self._density = density
        self.verdict = Verdict() if verdict is None else verdict
        self.trajectories = trajectories
        self.name = name
        self.rungs = list(rungs)
        self.history = list(history)
        self.seconds = seconds
        self.interrupted = interrupted
        self.learned: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        interrupted = " The fit was interrupted." if self.interrupted else ""
        names = list_names(list(self.learned))
        learned = f" Parameters were learned: {names}." if names else ""
        return f"<Posterior of {self._sites}. {self.verdict}{learned}{interrupted}>"

    def with_learned(self, parameters: Mapping[str, Tensor]) -> Posterior:
        """Notes parameters of the model that were learned, as they are now.

        Args:
            parameters: The leaves by name; a constrained one of the param store is noted as its
                constrained value.

        Returns:
            This posterior.
        """
        store = pyro.get_param_store()
        for name, leaf in parameters.items():
            value = store[name] if name in store else leaf  # noqa: SIM401, the store has no get
            self.learned[name] = value.detach().clone()
        return self

    @property
    def _sites(self) -> str:
        if self._coordinates is None:
            return f"a vector of {self.guide.features} features"
        sites = self._coordinates.sites
        return ", ".join(f"{site.name}{list(site.shape) or ''}" for site in sites)

    @property
    def _coordinates(self) -> LogDensity | None:
        """A density with the sites of the posterior, and their maps to the reals."""
        return self._density

    @property
    def density(self) -> LogDensity:
        """The log density of the model.

        Raises:
            ValueError: If it is not known.
        """
        if self._density is None:
            raise ValueError("Expected a posterior of a model whose density is known; got none.")
        return self._density

    @property
    def log_evidence(self) -> float:
        """Logarithm of the marginal likelihood, by importance sampling."""
        return self.verdict.log_evidence

    @property
    def corrects(self) -> bool:
        """Whether draws are resampled: where weights are reliable and change something."""
        verdict = self.verdict
        reliable = verdict.khat < KHAT_LIMIT or (verdict.ok and not self.trajectories)
        return self._density is not None and reliable and verdict.ess < EXACT_ESS

    @property
    def site_dims(self) -> dict[str, tuple[str | None, ...]]:
        """For each latent site the plates of its dimensions; ``None`` where there is none."""
        sites = (self._coordinates or self.density).sites
        return {site.name: site.plates for site in sites}

    @property
    def entry_names(self) -> list[str]:
        """Names of the entries of the unconstrained vector, such as ``theta[0]``."""
        return entry_names(self._coordinates or self.density)

    def sample(
        self, n: int = 4000, seed: int | None = None, discrete: bool = False
    ) -> dict[str, Tensor]:
        r"""Draws from the posterior, on the constrained scale.

        Where importance weights are reliable the draws are resampled by them, which corrects the
        guide's errors.

        Args:
            n: How many draws.
            seed: Seed of the draws; ``None`` takes them from torch's random state.
            discrete: Whether to draw the discrete latent sites too, which the fit sums out, each
                from its posterior given the continuous ones.

        Returns:
            For each latent and deterministic site a tensor of shape ``(n, *site_shape)``, with NaN
            at latent entries that a mask switches off, and angles in :math:`[-\pi, \pi)`; where
            the density is not known, so that the sites are not known either, unconstrained vectors
            by the name ``"latent"``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        check_flag("discrete", discrete)
        z = self.sample_unconstrained(n, seed)
        if self._coordinates is None:
            return {"latent": z}
        with forked(seed):
            return simulate.site_draws(self._coordinates, z, discrete)

    def sample_unconstrained(self, n: int = 4000, seed: int | None = None) -> Tensor:
        """Draws from the posterior as unconstrained vectors.

        Args:
            n: How many draws.
            seed: Seed of the draws.

        Returns:
            Tensor of shape ``(n, features)``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        check_size("n", n)
        with forked(seed):
            if not self.trajectories:
                return self._sample_corrected(n)
            # The adapted step size would depend on a few draws too much.
            z = self._sample_corrected(max(n, LEAST_POLISHED))
            return polish(self.density, self.guide, z, self.trajectories)[:n]

    @torch.no_grad()
    def _sample_corrected(self, n: int) -> Tensor:
        if not self.corrects:
            return self.guide.sample(n)
        sample = self.propose(max(self._count_candidates(n), LEAST_CANDIDATES))
        return resample(sample.z, sample.weights, n)

    def _count_candidates(self, n: int) -> int:
        """How many draws to resample from."""
        # Draws that take evaluations of the model are no more than their weights make necessary.
        dear = 1 + (CANDIDATES - 1) * (1 - self.verdict.ess)
        return math.ceil(n * (dear if self.guide.has_marginal else CANDIDATES))

    def propose(self, n: int, seed: int | None = None) -> ImportanceSample:
        """Draws from the guide, with importance weights.

        Args:
            n: How many draws.
            seed: Seed of the draws.

        Returns:
            The weighted draws.

        Raises:
            ValueError: If ``n`` is not positive, or if the density is not known.
        """
        check_size("n", n)
        with forked(seed):
            return draw_importance_sample(self.guide, self.density, n)

    def summary(self, n: int = 4000, seed: int | None = 0) -> pandas.DataFrame:
        r"""Returns a table with mean, sd and 94 % interval of highest density of each scalar.

        Those of an angle are taken on the circle: the mean direction, the circular standard
        deviation :math:`\sqrt{-2 \log R}` with the length :math:`R` of the mean of the points on
        the unit circle, and an interval that may run across :math:`\pm\pi`. Entries that a mask
        switches off have NaN.

        Args:
            n: How many draws it rests on.
            seed: Seed of these draws.

        Returns:
            A data frame, one row a scalar, columns ``mean``, ``sd``, ``hdi_3%``, ``hdi_97%``.
        """
        draws = {name: value.cpu().numpy() for name, value in self.sample(n, seed).items()}
        return statistics.summary(
            draws, circular=[] if self._coordinates is None else self._coordinates.centres
        )

    def covariance(
        self, n: int = 4000, seed: int | None = 0, sites: Sequence[str] | None = None
    ) -> pandas.DataFrame:
        r"""Returns the covariance matrix of the scalars, on the constrained scale.

        .. math:: \hat\Sigma_{ij} = \frac{1}{n - 1} \sum_{k=1}^n
            (\theta_i^{(k)} - \bar\theta_i) (\theta_j^{(k)} - \bar\theta_j),

        whose diagonal holds the squares of the ``sd`` of :meth:`summary` for as many draws of the
        same seed. Of an angle, :math:`\theta - \bar\theta` is the deviation from its mean
        direction, on the circle; its square is on average less than that of the circular ``sd``.

        Args:
            n: How many draws it rests on.
            seed: Seed of these draws.
            sites: Names of the sites, deterministic ones among them; all latent sites by default.

        Returns:
            A square data frame whose rows and columns are named as the rows of :meth:`summary`.

        Raises:
            TypeError: If ``sites`` is no sequence of names.
            ValueError: If ``n`` is below 2, or if ``sites`` is empty, has a name twice, or one of
                no site.

        Example:
            >>> import pyro, pyro.distributions as dist, pyroflows as pf
            >>> def model():
            ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(x, 1.0))
            >>> covariance = pf.fit_posterior(model, steps=0, progress=False).covariance()
            >>> list(covariance.columns), bool(covariance.loc["x", "y"] > 0)
            (['x', 'y'], True)
        """
        import pandas

        check_size("n", n, least=2)
        draws = self.sample(n, seed)
        chosen = self._latent_names if sites is None else _check_sites(sites, draws)
        names = [scalar for name in chosen for scalar in scalar_names(name, draws[name].shape[1:])]
        values = torch.cat([self._on_a_line(name, draws[name]) for name in chosen], -1)
        matrix = values.mT.cov().reshape(len(names), len(names))
        return pandas.DataFrame(matrix.numpy(), index=names, columns=names)

    def _on_a_line(self, name: str, draws: Tensor) -> Tensor:
        """Draws of a site as columns; of angles their deviations from the mean direction."""
        columns = draws.reshape(len(draws), -1).double().cpu()
        if self._coordinates is None or name not in self._coordinates.centres:
            return columns
        return torch.from_numpy(statistics.deviations(columns.numpy()))

    @property
    def _latent_names(self) -> list[str]:
        known = self._coordinates
        return ["latent"] if known is None else [site.name for site in known.sites]

    def to_arviz(self, draws: int = 4000, seed: int | None = 0) -> Any:
        """Returns the posterior in ArviZ's container, with all groups that the model allows.

        The groups are ``posterior``; ``sample_stats`` (``lp``, the log joint, and ``log_weight``,
        log joint less log guide, of these draws on the unconstrained scale); ``log_likelihood``,
        ``posterior_predictive`` and ``observed_data``; ``prior`` where the priors are proper.
        Dimensions are named by the plates. Of data from a loader, the groups of the data hold the
        first batch. The attributes hold the verdict and each finding.

        Args:
            draws: How many draws.
            seed: Seed of the draws.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
        """
        density = self.density
        z = self.sample_unconstrained(draws, seed)
        with torch.no_grad():
            lp = density.log_prob(z)
            log_weight = lp - self.guide.log_prob(z)
        sample_stats = {"lp": lp.unsqueeze(0), "log_weight": log_weight.unsqueeze(0)}
        attrs = {
            "inference_library": "pyroflows",
            **self.verdict.attributes(),
            "importance_resampled": int(self.corrects),
        }
        with forked(seed):
            return simulate.inference_data(density, z.unsqueeze(0), sample_stats, attrs)

    def as_prior(
        self, sites: Sequence[str] | None = None, draws: int = 8000, seed: int | None = 0
    ) -> SitesPrior:
        r"""Makes a prior of the posterior: the joint distribution of some sites.

        Where the guide is one flow over all sites and needs no correction, its density is taken;
        otherwise a flow :math:`q` is fitted to draws by forward KL,
        :math:`\max_q \sum_k \log q(\theta^{(k)})`.

        Args:
            sites: Names of latent sites; all of them by default.
            draws: How many draws a marginal is learned from.
            seed: Seed of the draws and of the fit.

        Returns:
            A distribution of vectors that hold the values of the sites, each on its support.

        Raises:
            TypeError: If ``sites`` is no sequence of names.
            ValueError: If ``sites`` is empty, has a name twice, or one of no latent site or of one
                with masked entries; if there are fewer than 100 draws, or the density is not known.

        Example:
            >>> import pyro, pyro.distributions as dist, pyroflows as pf
            >>> def model(y):
            ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
            >>> first = pf.fit_posterior(model, (torch.tensor(1.0),), steps=0, progress=False)
            >>> prior = first.as_prior(["scale"], draws=200)
            >>> prior.event_shape, list(prior.split(prior.sample()))
            (torch.Size([1]), ['scale'])
            >>> today = prior.replace(model)
        """
        if sites is not None:
            _check_sites(sites, {name: None for name in self._latent_names})
        check_size("draws", draws, least=100)
        exact = not self.corrects and not self.trajectories
        guide = self.guide if exact else None
        return learn_prior(
            self.density, guide, lambda: self.sample_unconstrained(draws, seed), sites, seed
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the posterior to a file that :func:`load_posterior` reads.

        The file holds plain data only: the parameters, the verdict, how to make the guide, and the
        arguments of the model where they are numbers and tensors (no loader).

        Args:
            path: Where to write.

        Raises:
            TypeError: If ``path`` is no path.
            ValueError: If the file cannot be written, or if the density of the model is not known.
        """
        write_state(self._to_plain(), path)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "Expected Posterior.save and pyroflows.load_posterior, because a pickle cannot hold "
            "the model; got a posterior to pickle."
        )

    # Without these two, copies would go by way of a pickle.

    def __copy__(self) -> Posterior:
        return self._with(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Posterior:
        with DetachedCopies():
            return self._with(copy.deepcopy(vars(self), memo))

    def _with(self, fields: Mapping[str, Any]) -> Posterior:
        made = type(self).__new__(type(self))
        vars(made).update(fields)
        return made

    def _to_plain(self) -> dict[str, Any]:
        density = self.density
        arguments = None if density.streamed else [list(density.args), density.kwargs]
        return {
            "sites": describe_sites(density),
            "guide": self.guide.spec(),
            "parameters": self.guide.state_dict(),
            "arguments": arguments if is_plain(arguments) else None,
            "given_data": isinstance(density.unwrapped_model, Conditioned),
            "fingerprint": list(take_fingerprint(density)),
            "verdict": self.verdict.to_plain(),
            "trajectories": self.trajectories,
            "name": self.name,
            "rungs": [[name, seconds, v.to_plain()] for name, seconds, v in self.rungs],
            "history": list(self.history),
            "seconds": self.seconds,
            "interrupted": self.interrupted,
        }


def _check_sites(sites: Any, draws: Mapping[str, Any]) -> list[str]:
    if isinstance(sites, (str, bytes)) or not isinstance(sites, Sequence):
        raise TypeError(f"Expected sites to be a sequence of names; got {sites!r}.")
    for name in sites:
        if not isinstance(name, str) or name not in draws:
            raise ValueError(f"Expected sites to be among {', '.join(draws)}; got {name!r}.")
    if len(set(sites)) != len(sites) or not sites:
        raise ValueError(f"Expected sites to name one site or more, each once; got {sites!r}.")
    return list(sites)


def check_posterior(name: str, value: Any) -> None:
    """Raises ``TypeError`` unless ``value`` is a posterior."""
    if not isinstance(value, Posterior):
        raise TypeError(
            f"Expected {name} to be a Posterior, as fit_posterior returns it; got "
            f"{type(value).__name__}."
        )
