"""The evidence of a model, and models compared by it and by leave-one-out cross-validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .._checks import check_choice, check_size, check_tensor
from .._random import forked
from ..model import prediction as simulate
from ..report import arviz_bridge as arviz
from .chains import Chains, flow_mc
from .posterior import Posterior, check_posterior
from .verdict import ESS_LIMIT, judge

if TYPE_CHECKING:
    import pandas

__all__ = ["Evidence", "compare", "evidence"]

METHODS = {"bridge": "bridge sampling", "importance": "importance sampling"}
CRITERIA = ("evidence", "loo", "both")
DRAWS = 4000
# Fewer say little about their own error.
LEAST_DRAWS = 100
# Of the chains that draw from the posterior; each is long enough to show whether they mix.
CHAINS = 64
WARM_UP = 64
# ArviZ judges no shorter chain.
LEAST_LENGTH = 4
# From here on the weights have no variance, which the standard error estimates.
VARIANCE_KHAT = 0.5
# Beyond it cross-validation of an observation is unreliable.
LOO_KHAT = 0.7
RHAT_LIMIT = 1.05
# The error of a logarithm is that of its argument, relative, as long as it is small.
ERROR_LIMIT = 0.25


@dataclass(frozen=True)
class Evidence:
    """The log evidence of a model, and how well it is known.

    Attributes:
        log_evidence: Logarithm of the marginal likelihood.
        log_evidence_error: Its Monte Carlo standard error.
        method: ``"bridge"`` or ``"importance"``.
        draws: How many draws of the guide it rests on.
        caution: Why not to rely on the standard error; empty if nothing speaks against it.
    """

    log_evidence: float
    log_evidence_error: float
    method: str
    draws: int
    caution: str = ""

    def __str__(self) -> str:
        sentence = (
            f"The log evidence is {self.log_evidence:.3f} with a standard error of {self.log_evidence_error:.2g}, by "
            f"{METHODS[self.method]} with {self.draws} draws of the guide."
        )
        return f"{sentence} {self.caution}".rstrip()


def evidence(
    posterior: Posterior,
    method: str = "bridge",
    draws: int = DRAWS,
    samples: Chains | Tensor | Mapping[str, Tensor] | None = None,
    seed: int | None = 0,
) -> Evidence:
    r"""The log evidence :math:`\log \int p(z, \mathrm{data}) \, dz` of a model.

    Both methods draw :math:`z_i \sim q` from the guide. Importance sampling averages their weights,

    .. math:: \hat Z = \frac{1}{N} \sum_i w(z_i), \qquad w(z) = \frac{p(z, \mathrm{data})}{q(z)},

    the largest of them Pareto-smoothed: where their tail is heavy that halves the error, for a smaller bias. It relies on
    the guide to reach wherever the posterior has mass. Bridge sampling also takes :math:`M` draws :math:`z_j^*` of the
    posterior and solves for the one :math:`\hat Z` with

    .. math:: \hat Z = \frac{\tfrac{1}{N} \sum_i w(z_i) / (s\, w(z_i) + (1 - s) \hat Z)}
        {\tfrac{1}{M} \sum_j 1 / (s\, w(z_j^*) + (1 - s) \hat Z)}, \qquad s = \frac{M_\mathrm{eff}}{M_\mathrm{eff} + N},

    the best of all bridges between guide and posterior. Its terms are bounded, so that a guide with too light tails does
    no harm. The draws of the posterior are those given, or come from :func:`flow_mc`. The standard errors are those of the
    logarithm, by the delta method; that of the bridge counts dependent draws by their effective number. They know nothing
    of a mode that neither the guide nor the samples have seen.

    A constant that a prior leaves open, as an improper one does, is open in the evidence too.

    Args:
        posterior: The posterior.
        method: ``"bridge"`` or ``"importance"``.
        draws: How many draws of the guide, and how many of the posterior where none are given.
        samples: For the bridge, draws of the posterior: what :func:`neutra` or :func:`flow_mc` returns; unconstrained
            vectors of shape ``(chains, draws, features)``; or for each latent site values of shape
            ``(chains, draws, *site_shape)``, as Pyro's ``MCMC.get_samples(group_by_chain=True)`` gives them.
        seed: Seed of the draws; ``None`` takes them from torch's random state.

    Returns:
        The log evidence with its standard error.

    Raises:
        TypeError: If ``posterior``, ``draws`` or ``samples`` is of the wrong type.
        ValueError: If there is no such method, if there are too few draws, if the samples have another shape or lie where
            the posterior has no density, or if they are given to importance sampling.

    Reference:
        Meng, Wong, "Simulating ratios of normalizing constants via a simple identity: A theoretical exploration", 1996,
        https://www3.stat.sinica.edu.tw/statistica/j6n4/j6n43/j6n43.htm

        Frühwirth-Schnatter, "Estimating marginal likelihoods for mixture and Markov switching models using bridge sampling
        techniques", 2004, https://doi.org/10.1111/j.1368-423X.2004.00125.x

        Gronau, Sarafoglou, Matzke, Ly, Boehm, Marsman, Leslie, Forster, Wagenmakers, Steingroever, "A tutorial on bridge
        sampling", 2017, https://arxiv.org/abs/1703.05984

        Jia, Seljak, "Normalizing constant estimation with Gaussianized bridge sampling", 2020,
        https://arxiv.org/abs/1912.06073

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> posterior = pf.fit_posterior(model, steps=0, progress=False)
        >>> result = evidence(posterior)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0))
        >>> bool(abs(result.log_evidence - exact) < 0.01)
        True
    """
    check_posterior("posterior", posterior)
    check_choice("method", method, tuple(METHODS))
    check_size("draws", draws, least=LEAST_DRAWS)
    if method == "importance":
        if samples is not None:
            raise ValueError(
                "Expected samples with method='bridge' only; got them with method='importance'."
            )
        return importance_evidence(posterior, draws, seed)
    return bridge_evidence(posterior, draws, samples, seed)


def importance_evidence(posterior: Posterior, draws: int = DRAWS, seed: int | None = 0) -> Evidence:
    """The log evidence by importance sampling from the guide; see :func:`evidence`."""
    z, log_weights = posterior._propose(draws, seed)
    verdict = judge(log_weights, z, posterior.entry_names)[0]
    if verdict.log_evidence == -math.inf:
        return _nothing("importance", draws)
    caution = _importance_caution(verdict.khat, verdict.ess, verdict.log_evidence_error)
    return Evidence(verdict.log_evidence, verdict.log_evidence_error, "importance", draws, caution)


def bridge_evidence(
    posterior: Posterior,
    draws: int = DRAWS,
    samples: Chains | Tensor | Mapping[str, Tensor] | None = None,
    seed: int | None = 0,
) -> Evidence:
    """The log evidence by bridge sampling between guide and posterior; see :func:`evidence`."""
    given = None if samples is None else _check_samples(samples, posterior)
    with forked(seed):
        of_guide = _log_weights(posterior, draws, seed=None)
        if not bool(of_guide.isfinite().any()):
            return _nothing("bridge", draws)
        of_posterior = _log_weights_at(
            posterior, _chains(posterior, draws) if given is None else given
        )
    log_evidence, error = bridge(of_guide, of_posterior)
    return Evidence(
        log_evidence, error, "bridge", draws, _bridge_caution(_rhat(of_posterior), error)
    )


def bridge(of_guide: Tensor, of_posterior: Tensor) -> tuple[float, float]:
    r"""Solves the optimal bridge.

    With :math:`\eta = \log Z + \log \tfrac{1 - s}{s}` and the logistic function :math:`\sigma` it says

    .. math:: (1 - s)\, \mathbb{E}_q[\sigma(\log w - \eta)] = s\, \mathbb{E}_p[\sigma(\eta - \log w)],

    whose left side falls and whose right side rises with :math:`\eta`.

    Args:
        of_guide: Log weights :math:`\log w` of draws of the guide, of shape ``(draws,)``.
        of_posterior: Log weights of draws of the posterior, of shape ``(chains, draws)``.

    Returns:
        The log evidence and its standard error.

    Reference:
        Bennett, "Efficient estimation of free energy differences from Monte Carlo data", 1976,
        https://doi.org/10.1016/0021-9991(76)90078-4
    """
    n, effective = len(of_guide), float(of_posterior.numel())
    # How many draws are effective depends on the bridge, though hardly, and is known once a first bridge stands.
    for _ in range(2):
        log_odds = math.log(n / effective)
        eta = _balance(of_guide, of_posterior, log_odds)
        on_posterior = (eta - of_posterior).sigmoid()
        effective = _effective(on_posterior)
    error_of_guide = _relative_error((of_guide - eta).sigmoid(), n)
    return eta - log_odds, math.hypot(
        error_of_guide, _relative_error(on_posterior.flatten(), effective)
    )


def compare(
    posteriors: Mapping[str, Posterior],
    by: str = "both",
    method: str = "bridge",
    draws: int = DRAWS,
    seed: int | None = 0,
) -> pandas.DataFrame:
    r"""Ranks models of the same data by their evidence and by leave-one-out cross-validation.

    The evidence gives the probabilities of the models, all of the same prior probability,
    :math:`\Pr(k \mid \mathrm{data}) = Z_k / \sum_l Z_l`; it hangs on the priors. Cross-validation estimates how well a model
    predicts an observation that it has not seen,

    .. math:: \mathrm{elpd} = \sum_i \log p(y_i \mid y_{-i}),

    by Pareto-smoothed importance sampling, where :math:`y_i` are the entries of the observed sites as the model factors
    them.

    Args:
        posteriors: Name -> posterior.
        by: ``"evidence"``, ``"loo"`` or ``"both"``; rows are sorted by the evidence, or by ``elpd_loo`` without it.
        method: How :func:`evidence` is computed.
        draws: How many draws of each posterior.
        seed: Their seed.

    Returns:
        A data frame, one row a model, the best first. ``log_evidence`` and ``log_evidence_error``; ``log_bayes_factor``
        against the best, with ``log_bayes_factor_error``; ``probability``. ``elpd_loo`` and ``elpd_loo_error``; ``p_loo``,
        the effective number of parameters; ``elpd_difference`` to the best, with ``elpd_difference_error`` over the
        observations in pairs; ``bad_khat``, the number of observations so influential (k-hat above 0.7) that ``elpd_loo``
        is unreliable. ``ok``, whether the verdict trusts the posterior. A model whose likelihood is not made of observed
        sites, or has discrete latents, has NaN for its cross-validation, with a warning.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there are no posteriors, if they are of different data, or if ``by`` or ``method`` is unknown; for
            cross-validation, if the models split the data into different numbers of observations.

    Reference:
        Kass, Raftery, "Bayes factors", 1995, https://doi.org/10.1080/01621459.1995.10476572

        Vehtari, Gelman, Gabry, "Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC", 2017,
        https://arxiv.org/abs/1507.04544

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model(scale):
        ...     x = pyro.sample("x", dist.Normal(0.0, scale))
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.1, -0.4, 0.6]))
        >>> posteriors = {name: pf.fit_posterior(model, (scale,), steps=0, progress=False)
        ...               for name, scale in [("narrow", 1.0), ("wide", 100.0)]}
        >>> list(compare(posteriors, by="evidence").index)
        ['narrow', 'wide']
    """
    import pandas

    check_choice("by", by, CRITERIA)
    check_choice("method", method, tuple(METHODS))
    check_size("draws", draws, least=LEAST_DRAWS)
    _check_posteriors(posteriors)
    _refuse_different_data(posteriors)
    columns: dict[str, Any] = {}
    if by != "loo":
        columns |= _evidence_columns(posteriors, method, draws, seed)
    if by != "evidence":
        columns |= _loo_columns(posteriors, draws, seed)
    columns["ok"] = [posterior.verdict.ok for posterior in posteriors.values()]
    table = pandas.DataFrame(columns, index=pandas.Index(list(posteriors), name="model"))
    return table.sort_values(
        "elpd_loo" if by == "loo" else "log_evidence", ascending=False, kind="stable"
    )


# Weights


def _log_weights(posterior: Posterior, draws: int, seed: int | None) -> Tensor:
    log_weights = posterior._propose(draws, seed)[1].to("cpu", torch.float64)
    return log_weights.masked_fill(~log_weights.isfinite(), -math.inf)


@torch.no_grad()
def _log_weights_at(posterior: Posterior, z: Tensor) -> Tensor:
    """Log weights of draws of the posterior; infinite where the guide has no density."""
    log_q = posterior.guide.get_posterior().log_prob(z)
    log_weights = posterior.density.log_prob(z) - log_q.masked_fill(~log_q.isfinite(), -math.inf)
    return log_weights.to("cpu", torch.float64)


def _relative_error(values: Tensor, effective: float) -> float:
    """Standard error of a mean, as a fraction of it: by the delta method that of its logarithm."""
    mean = float(values.mean())
    return float(values.std()) / mean / math.sqrt(effective) if mean > 0 else math.inf


def _nothing(method: str, draws: int) -> Evidence:
    caution = (
        "No draw of the guide has any density under the model; look at its priors and supports."
    )
    return Evidence(-math.inf, math.inf, method, draws, caution)


def _importance_caution(khat: float, ess: float, error: float) -> str:
    if khat >= VARIANCE_KHAT and ess <= ESS_LIMIT:
        return f"k-hat is {khat:.2f} (below {VARIANCE_KHAT} is fine), so do not rely on the standard error; use the bridge."
    return (
        ""
        if error < ERROR_LIMIT
        else "So large a standard error is itself not reliable; use the bridge."
    )


def _bridge_caution(rhat: float, error: float) -> str:
    if not error < ERROR_LIMIT:
        return "Guide and posterior hardly overlap, so do not rely on the standard error; fit a better guide."
    if rhat > RHAT_LIMIT:
        return (
            f"R-hat of the chains is {rhat:.2f} (at most {RHAT_LIMIT} is fine), so do not rely on the standard error; fit a "
            "better guide, or give longer chains as samples."
        )
    return ""


# The bridge


def _chains(posterior: Posterior, draws: int) -> Tensor:
    """Draws of the posterior, of shape ``(chains, draws, features)``."""
    chains = min(CHAINS, draws // (2 * LEAST_LENGTH))
    return flow_mc(
        posterior, -(-draws // chains), chains, WARM_UP, seed=None, progress=False
    ).unconstrained


def _effective(values: Tensor) -> float:
    """How many independent draws the values of chains, of shape ``(chains, draws)``, are worth for their mean."""
    error = _diagnose(values, "mcse_mean")
    std = float(values.std())
    # Equal values have no error.
    return std**2 / error**2 if std > 0 and error > 0 else float(values.numel())


def _rhat(log_weights: Tensor) -> float:
    # Only its rank matters here, and draws at which the guide vanishes come first.
    return _diagnose(log_weights.clamp(max=torch.finfo(log_weights.dtype).max), "rhat")


def _diagnose(values: Tensor, kind: str) -> float:
    return float(arviz.diagnostics({"values": values.numpy()})[kind]["values"])


def _balance(of_guide: Tensor, of_posterior: Tensor, log_odds: float) -> float:
    """The root of the bridge's equation, by bisection; ``log_odds`` is the logit of ``1 - s``."""
    finite = torch.cat([of_guide, of_posterior.flatten()])
    finite = finite[finite.isfinite()]
    # This far out the logistic function has reached its limits, whatever the odds.
    low, high = float(finite.min()) - 100.0, float(finite.max()) + 100.0
    odds = math.exp(log_odds)
    while low < (middle := (low + high) / 2) < high:
        excess = (
            odds * (of_guide - middle).sigmoid().mean() - (middle - of_posterior).sigmoid().mean()
        )
        low, high = (middle, high) if excess > 0 else (low, middle)
    return low


# Columns of the comparison


def _evidence_columns(
    posteriors: Mapping[str, Posterior], method: str, draws: int, seed: int | None
) -> dict[str, Any]:
    _warn_of_improper_priors(posteriors)
    results = {
        name: evidence(posterior, method, draws, seed=seed)
        for name, posterior in posteriors.items()
    }
    for name, result in results.items():
        if result.caution:
            warnings.warn(
                f"The evidence of model {name!r} is not reliable. {result.caution}", stacklevel=3
            )
    values = np.array([result.log_evidence for result in results.values()])
    errors = np.array([result.log_evidence_error for result in results.values()])
    best = int(values.argmax())
    relative = np.exp(values - values[best])
    differences_errors = np.hypot(errors, errors[best])
    differences_errors[best] = 0.0
    return {
        "log_evidence": values,
        "log_evidence_error": errors,
        "log_bayes_factor": values - values[best],
        "log_bayes_factor_error": differences_errors,
        "probability": relative / relative.sum(),
    }


def _loo_columns(
    posteriors: Mapping[str, Posterior], draws: int, seed: int | None
) -> dict[str, Any]:
    results = [_loo(name, posterior, draws, seed) for name, posterior in posteriors.items()]
    known = [result for result in results if result is not None]
    counts = {
        name: len(r.elpd) for name, r in zip(posteriors, results, strict=True) if r is not None
    }
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"Expected models that split the data into the same observations; got {counts}. Use by='evidence'."
        )
    best = max(known, key=lambda result: result.elpd.sum(), default=None)
    rows = [_loo_row(result, best) for result in results]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _loo(name: str, posterior: Posterior, draws: int, seed: int | None) -> arviz.Loo | None:
    z = posterior.sample_unconstrained(draws, seed)
    log_likelihood = simulate.log_likelihood(posterior.density, z)
    arrays = {site: value.detach().cpu().numpy()[None] for site, value in log_likelihood.items()}
    if sum(array[0, 0].size for array in arrays.values()) == 0:
        what = "has discrete latent sites" if posterior.density.discrete else "has no observed site"
        warnings.warn(
            f"Model {name!r} {what}, so that there is no cross-validation of it.", stacklevel=5
        )
        return None
    return arviz.loo(arrays)


def _loo_row(result: arviz.Loo | None, best: arviz.Loo | None) -> dict[str, float]:
    if result is None or best is None:
        names = (
            "elpd_loo",
            "elpd_loo_error",
            "p_loo",
            "elpd_difference",
            "elpd_difference_error",
            "bad_khat",
        )
        return dict.fromkeys(names, math.nan)
    difference = result.elpd - best.elpd
    root = math.sqrt(len(difference))
    return {
        "elpd_loo": float(result.elpd.sum()),
        "elpd_loo_error": float(result.elpd.std()) * root,
        "p_loo": result.p_loo,
        "elpd_difference": float(difference.sum()),
        "elpd_difference_error": float(difference.std()) * root,
        "bad_khat": float((result.khat > LOO_KHAT).sum()),
    }


# What users pass in


def _check_posteriors(posteriors: Any) -> None:
    if not isinstance(posteriors, Mapping):
        raise TypeError(
            f"Expected posteriors to be a mapping of names to posteriors; got {type(posteriors).__name__}."
        )
    if not posteriors:
        raise ValueError("Expected at least one posterior; got none.")
    for name, posterior in posteriors.items():
        check_posterior(f"posteriors[{name!r}]", posterior)


def _check_samples(samples: Any, posterior: Posterior) -> Tensor:
    density = posterior.density
    chains = samples if isinstance(samples, Chains) else None
    if chains is not None:
        samples = chains.unconstrained
    elif isinstance(samples, Mapping):
        samples = _unconstrained(samples, posterior)
    check_tensor("samples", samples, (density.features,))
    if samples.dim() != 3:
        raise ValueError(
            f"Expected samples of shape (chains, draws, {density.features}); got {tuple(samples.shape)}."
        )
    if samples.shape[0] < 1 or samples.shape[1] < LEAST_LENGTH:
        raise ValueError(
            f"Expected samples of at least {LEAST_LENGTH} draws a chain; got shape {tuple(samples.shape)}."
        )
    samples = samples.to(density.initial)
    if bool((samples == samples[:1, :1]).all()):
        raise ValueError("Expected samples from the posterior; got the same vector in every draw.")
    log_density = density.log_prob(samples)
    if chains is not None and not torch.allclose(
        log_density, chains.log_density.to(log_density), rtol=1e-3, atol=0.1
    ):
        raise ValueError(
            "Expected chains of this model and its data; got some whose log densities are others."
        )
    inside = log_density.isfinite()
    if not bool(inside.all()):
        raise ValueError(
            f"Expected samples from the posterior; got {int((~inside).sum())} of {inside.numel()} where it has no density. "
            "A tensor holds unconstrained vectors; values of the sites are given by name."
        )
    return samples


def _unconstrained(samples: Mapping[str, Any], posterior: Posterior) -> Tensor:
    density = posterior.density
    missing = [site.name for site in density.sites if site.name not in samples]
    if missing:
        raise ValueError(
            f"Expected samples of every latent site; got none of {', '.join(map(repr, missing))}."
        )
    for site in density.sites:
        value = check_tensor(f"samples[{site.name!r}]", samples[site.name], site.shape)
        if value.dim() != 2 + len(site.shape):
            shape = ", ".join(["chains", "draws", *map(str, site.shape)])
            raise ValueError(
                f"Expected samples[{site.name!r}] of shape ({shape}); got {tuple(value.shape)}."
            )
    return density.unconstrain(
        {site.name: samples[site.name].to(density.initial) for site in density.sites}
    )


def _refuse_different_data(posteriors: Mapping[str, Posterior]) -> None:
    """Data of a model that has them in ``pyro.factor`` cannot be seen, and are taken on trust."""
    seen = {
        name: simulate.observed_data(posterior.density) for name, posterior in posteriors.items()
    }
    seen = {name: data for name, data in seen.items() if data}
    first = next(iter(seen), "")
    for name, data in seen.items():
        if not _same_data(seen[first], data):
            raise ValueError(
                f"Expected models of the same data; got other observed values for {name!r} than for {first!r}."
            )


def _same_data(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether the values of the sites are the same, by name, or in their order where models name them differently."""
    if len(a) != len(b):
        return False
    pairs = (
        [(a[name], b[name]) for name in a]
        if a.keys() == b.keys()
        else list(zip(a.values(), b.values(), strict=True))
    )
    flat = [
        (x.detach().cpu().double().flatten(), y.detach().cpu().double().flatten()) for x, y in pairs
    ]
    return all(
        len(x) == len(y) and torch.allclose(x, y, rtol=1e-6, atol=0.0, equal_nan=True)
        for x, y in flat
    )


def _warn_of_improper_priors(posteriors: Mapping[str, Posterior]) -> None:
    for name, posterior in posteriors.items():
        density = posterior.density
        trace = density.trace()
        for site in density.sites:
            fn = trace.nodes[site.name]["fn"]
            while isinstance(fn, torch.distributions.Independent):
                fn = fn.base_dist
            if isinstance(fn, dist.ImproperUniform):
                warnings.warn(
                    f"Model {name!r} has an improper prior at site {site.name!r}, so that its evidence is known "
                    "up to a constant only; compare by='loo'.",
                    stacklevel=4,
                )
                break
