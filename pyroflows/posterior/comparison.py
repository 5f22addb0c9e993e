"""Models compared by their evidence and by leave-one-out cross-validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice, check_size
from ..model import prediction as simulate
from ..model.sites import is_improper
from ..report import arviz_bridge as arviz
from .evidence import DRAWS, LEAST_DRAWS, METHODS, evidence
from .posterior import Posterior, check_posterior

if TYPE_CHECKING:
    import pandas

__all__ = ["compare"]

CRITERIA = ("evidence", "loo", "both")
# Beyond it cross-validation of an observation is unreliable.
LOO_KHAT = 0.7


def compare(
    posteriors: Mapping[str, Posterior],
    by: str = "both",
    method: str = "bridge",
    draws: int = DRAWS,
    seed: int | None = 0,
) -> pandas.DataFrame:
    r"""Ranks models of the same data by their evidence and by leave-one-out cross-validation.

    The evidence gives the probabilities of the models, all of the same prior probability,
    :math:`\Pr(k \mid \mathrm{data}) = Z_k / \sum_l Z_l`; it hangs on the priors. Cross-validation
    estimates how well a model predicts an observation that it has not seen,

    .. math:: \mathrm{elpd} = \sum_i \log p(y_i \mid y_{-i}),

    by Pareto-smoothed importance sampling, where :math:`y_i` are the entries of the observed sites
    as the model factors them.

    Args:
        posteriors: Name -> posterior.
        by: ``"evidence"``, ``"loo"`` or ``"both"``; rows are sorted by the evidence, or by
            ``elpd_loo`` without it.
        method: How :func:`evidence` is computed.
        draws: How many draws of each posterior.
        seed: Their seed.

    Returns:
        A data frame, one row a model, the best first. ``log_evidence`` and ``log_evidence_error``;
        ``log_bayes_factor`` against the best, with ``log_bayes_factor_error``; ``probability``.
        ``elpd_loo`` and ``elpd_loo_error``; ``p_loo``, the effective number of parameters;
        ``elpd_difference`` to the best, with ``elpd_difference_error`` over the observations in
        pairs; ``bad_khat``, the number of observations so influential (k-hat above 0.7) that
        ``elpd_loo`` is unreliable. ``ok``, whether the verdict trusts the posterior. A model whose
        likelihood is not made of observed sites, or has discrete latents that observations share,
        has NaN for its cross-validation, with a warning.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there are no posteriors, if they are of different data, or if ``by`` or
            ``method`` is unknown; for cross-validation, if the models split the data into different
            numbers of observations.

    Reference:
        Kass, Raftery, "Bayes factors", 1995, https://doi.org/10.1080/01621459.1995.10476572

        Vehtari, Gelman, Gabry, "Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC", 2017, https://arxiv.org/abs/1507.04544

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
            f"Expected models that split the data into the same observations; got {counts}. Use "
            "by='evidence'."
        )
    best = max(known, key=lambda result: result.elpd.sum(), default=None)
    rows = [_loo_row(result, best) for result in results]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _loo(name: str, posterior: Posterior, draws: int, seed: int | None) -> arviz.Loo | None:
    z = posterior.sample_unconstrained(draws, seed)
    density = posterior.density
    log_likelihood = simulate.log_likelihood(density, z)
    arrays = {site: value.detach().cpu().numpy()[None] for site, value in log_likelihood.items()}
    left_out = set(simulate.observed_data(density)) - set(log_likelihood)
    if left_out or sum(array[0, 0].size for array in arrays.values()) == 0:
        shared = "has discrete latent sites that observations share"
        what = shared if left_out else "has no observed site"
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


# Checks of the posteriors


def _check_posteriors(posteriors: Any) -> None:
    if not isinstance(posteriors, Mapping):
        raise TypeError(
            "Expected posteriors to be a mapping of names to posteriors; got "
            f"{type(posteriors).__name__}."
        )
    if not posteriors:
        raise ValueError("Expected at least one posterior; got none.")
    for name, posterior in posteriors.items():
        check_posterior(f"posteriors[{name!r}]", posterior)


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
                f"Expected models of the same data; got other observed values for {name!r} than "
                f"for {first!r}."
            )


def _same_data(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether values are the same, by name, or in order where models name them differently."""
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
        improper = [
            site.name for site in density.sites if is_improper(trace.nodes[site.name]["fn"])
        ]
        if improper:
            warnings.warn(
                f"Model {name!r} has an improper prior at site {improper[0]!r}, so that its "
                "evidence is known up to a constant only; compare by='loo'.",
                stacklevel=4,
            )
