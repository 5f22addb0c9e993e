"""The evidence of a model, by importance sampling and by bridge sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_size, check_tensor
from .._random import forked
from ..model.density import LogDensity
from ..report import statistics
from .chains import Chains, flow_mc
from .checks import Weights
from .posterior import Posterior, check_posterior

__all__ = [
    "DRAWS",
    "LEAST_DRAWS",
    "METHODS",
    "Evidence",
    "bridge",
    "bridge_evidence",
    "evidence",
    "importance_evidence",
]

METHODS = {"bridge": "bridge sampling", "importance": "importance sampling"}
DRAWS = 4000
# Fewer draws say little about their own error.
LEAST_DRAWS = 100
# Chains that draw from the posterior; each is long enough to show whether they mix.
CHAINS = 64
WARM_UP = 64
# ArviZ judges no shorter chain.
LEAST_LENGTH = 4
# From here on the weights have no variance, which the standard error estimates.
VARIANCE_KHAT = 0.5
RHAT_LIMIT = 1.05
# The error of a logarithm is the relative error of its argument, as long as it is small.
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
            f"The log evidence is {self.log_evidence:.3f} with a standard error of "
            f"{self.log_evidence_error:.2g}, by {METHODS[self.method]} with {self.draws} draws of "
            "the guide."
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

    the largest of them Pareto-smoothed: where their tail is heavy that halves the error, for a
    smaller bias. It relies on the guide to reach wherever the posterior has mass. Bridge sampling
    also takes :math:`M` draws :math:`z_j^*` of the posterior and solves for the one :math:`\hat Z`
    with

    .. math:: \hat Z = \frac{\tfrac{1}{N} \sum_i w(z_i) / (s\, w(z_i) + (1 - s) \hat Z)}
        {\tfrac{1}{M} \sum_j 1 / (s\, w(z_j^*) + (1 - s) \hat Z)},
        \qquad s = \frac{M_\mathrm{eff}}{M_\mathrm{eff} + N},

    the best of all bridges between guide and posterior. Its terms are bounded, so that a guide with
    too light tails does no harm. The draws of the posterior are those given, or come from
    :func:`flow_mc`. The standard errors are those of the logarithm, by the delta method; that of
    the bridge counts dependent draws by their effective number. They know nothing of a mode that
    neither the guide nor the samples have seen.

    A constant that a prior leaves open, as an improper one does, is open in the evidence too.

    Args:
        posterior: The posterior.
        method: ``"bridge"`` or ``"importance"``.
        draws: How many draws of the guide, and how many of the posterior where none are given.
        samples: For the bridge, draws of the posterior: what :func:`neutra` or :func:`flow_mc`
            returns; unconstrained vectors of shape ``(chains, draws, features)``; or for each
            latent site values of shape ``(chains, draws, *site_shape)``, as Pyro's
            ``MCMC.get_samples(group_by_chain=True)`` gives them.
        seed: Seed of the draws; ``None`` takes them from torch's random state.

    Returns:
        The log evidence with its standard error.

    Raises:
        TypeError: If ``posterior``, ``draws`` or ``samples`` is of the wrong type.
        ValueError: If there is no such method, if there are too few draws, if the samples have
            another shape or lie where the posterior has no density, or if they are given to
            importance sampling.

    Reference:
        Meng, Wong, "Simulating ratios of normalizing constants via a simple identity: A theoretical
        exploration", 1996, https://www3.stat.sinica.edu.tw/statistica/j6n4/j6n43/j6n43.htm

        Frühwirth-Schnatter, "Estimating marginal likelihoods for mixture and Markov switching
        models using bridge sampling techniques", 2004,
        https://doi.org/10.1111/j.1368-423X.2004.00125.x

        Gronau, Sarafoglou, Matzke, Ly, Boehm, Marsman, Leslie, Forster, Wagenmakers, Steingroever,
        "A tutorial on bridge sampling", 2017, https://arxiv.org/abs/1703.05984

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
    sample = posterior.propose(draws, seed)
    if sample.empty:
        return _no_evidence("importance", draws)
    error = sample.log_evidence_error
    caution = _warn_of_weights(sample.khat, sample.ess, error)
    return Evidence(sample.log_evidence, error, "importance", draws, caution)


def bridge_evidence(
    posterior: Posterior,
    draws: int = DRAWS,
    samples: Chains | Tensor | Mapping[str, Tensor] | None = None,
    seed: int | None = 0,
) -> Evidence:
    """The log evidence by bridge sampling between guide and posterior; see :func:`evidence`."""
    given = None if samples is None else _read_samples(samples, posterior.density)
    with forked(seed):
        sample = posterior.propose(draws)
        if sample.empty:
            return _no_evidence("bridge", draws)
        z = _draw_chains(posterior, draws) if given is None else given
        of_posterior = _weigh(posterior, z)
    log_evidence, error = bridge(sample.log_weights, of_posterior)
    caution = _warn_of_bridge(_rhat(of_posterior), error)
    return Evidence(log_evidence, error, "bridge", draws, caution)


def bridge(of_guide: Tensor, of_posterior: Tensor) -> tuple[float, float]:
    r"""Solves the optimal bridge.

    With :math:`\eta = \log Z + \log \tfrac{1 - s}{s}` and the logistic function :math:`\sigma` it
    says

    .. math:: (1 - s)\, \mathbb{E}_q[\sigma(\log w - \eta)]
        = s\, \mathbb{E}_p[\sigma(\eta - \log w)],

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
    # How many draws are effective depends on the bridge, though hardly, and is known once a first
    # bridge stands.
    for _ in range(2):
        log_odds = math.log(n / effective)
        eta = _balance(of_guide, of_posterior, log_odds)
        on_posterior = (eta - of_posterior).sigmoid()
        effective = _effective(on_posterior)
    error_of_guide = _relative_error((of_guide - eta).sigmoid(), n)
    return eta - log_odds, math.hypot(
        error_of_guide, _relative_error(on_posterior.flatten(), effective)
    )


# Weights


@torch.no_grad()
def _weigh(posterior: Posterior, z: Tensor) -> Tensor:
    """Returns log weights of draws of the posterior; infinite where the guide has no density."""
    log_q = posterior.guide.log_prob(z.flatten(0, 1)).reshape(z.shape[:-1])
    log_q = log_q.masked_fill(~log_q.isfinite(), -math.inf)
    return (posterior.density.log_prob(z) - log_q).to("cpu", torch.float64)


def _relative_error(values: Tensor, effective: float) -> float:
    """Standard error of a mean, as a fraction of it: by the delta method that of its logarithm."""
    mean = float(values.mean())
    return float(values.std()) / mean / math.sqrt(effective) if mean > 0 else math.inf


def _no_evidence(method: str, draws: int) -> Evidence:
    caution = (
        "No draw of the guide has any density under the model; look at its priors and supports."
    )
    return Evidence(-math.inf, math.inf, method, draws, caution)


def _warn_of_weights(khat: float, ess: float, error: float) -> str:
    if khat >= VARIANCE_KHAT and ess <= Weights.ess_limit:
        return (
            f"k-hat is {khat:.2f} (below {VARIANCE_KHAT} is fine), so do not rely on the standard "
            "error; use the bridge."
        )
    return (
        ""
        if error < ERROR_LIMIT
        else "So large a standard error is itself not reliable; use the bridge."
    )


def _warn_of_bridge(rhat: float, error: float) -> str:
    if not error < ERROR_LIMIT:
        return (
            "Guide and posterior hardly overlap, so do not rely on the standard error; fit a "
            "better guide."
        )
    if rhat > RHAT_LIMIT:
        return (
            f"R-hat of the chains is {rhat:.2f} (at most {RHAT_LIMIT} is fine), so do not rely on "
            "the standard error; fit a better guide, or give longer chains as samples."
        )
    return ""


# The bridge


def _draw_chains(posterior: Posterior, draws: int) -> Tensor:
    """Draws of the posterior, of shape ``(chains, draws, features)``."""
    chains = min(CHAINS, draws // (2 * LEAST_LENGTH))
    return flow_mc(
        posterior, -(-draws // chains), chains, WARM_UP, seed=None, progress=False
    ).unconstrained


def _effective(values: Tensor) -> float:
    """Effective number of independent values for the mean of chains ``(chains, draws)``."""
    error = _diagnose(values, "mcse_mean")
    std = float(values.std())
    # Equal values have no error.
    return std**2 / error**2 if std > 0 and error > 0 else float(values.numel())


def _rhat(log_weights: Tensor) -> float:
    # Only its rank matters here, and draws at which the guide vanishes come first.
    return _diagnose(log_weights.clamp(max=torch.finfo(log_weights.dtype).max), "rhat")


def _diagnose(values: Tensor, kind: str) -> float:
    return float(statistics.diagnostics({"values": values.numpy()})[kind]["values"])


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


# Samples that users pass in


def _read_samples(samples: Any, density: LogDensity) -> Tensor:
    """Returns samples as unconstrained vectors, of shape ``(chains, draws, features)``."""
    z = _unconstrain_samples(samples, density)
    _check_chains(z, density.features)
    z = z.to(density.initial)
    log_density = density.log_prob(z)
    if isinstance(samples, Chains):
        _check_same_density(samples, log_density)
    _check_moving(z)
    _check_inside(log_density)
    return z


def _unconstrain_samples(samples: Any, density: LogDensity) -> Any:
    if isinstance(samples, Chains):
        return samples.unconstrained
    if not isinstance(samples, Mapping):
        return samples
    missing = [repr(site.name) for site in density.sites if site.name not in samples]
    if missing:
        raise ValueError(
            f"Expected samples of every latent site; got none of {', '.join(missing)}."
        )
    values = {}
    for site in density.sites:
        value = check_tensor(f"samples[{site.name!r}]", samples[site.name], site.shape)
        if value.dim() != 2 + len(site.shape):
            shape = ", ".join(["chains", "draws", *map(str, site.shape)])
            raise ValueError(
                f"Expected samples[{site.name!r}] of shape ({shape}); got {tuple(value.shape)}."
            )
        values[site.name] = value.to(density.initial)
    return density.unconstrain(values)


def _check_chains(z: Any, features: int) -> None:
    check_tensor("samples", z, (features,))
    if z.dim() != 3:
        raise ValueError(
            f"Expected samples of shape (chains, draws, {features}); got {tuple(z.shape)}."
        )
    if z.shape[0] < 1 or z.shape[1] < LEAST_LENGTH:
        raise ValueError(
            f"Expected samples of at least {LEAST_LENGTH} draws a chain; got shape "
            f"{tuple(z.shape)}."
        )


def _check_moving(z: Tensor) -> None:
    if bool((z == z[:1, :1]).all()):
        raise ValueError("Expected samples from the posterior; got the same vector in every draw.")


def _check_same_density(chains: Chains, log_density: Tensor) -> None:
    of_chains = chains.log_density.to(log_density)
    if not torch.allclose(log_density, of_chains, rtol=1e-3, atol=0.1):
        raise ValueError(
            "Expected chains of this model and its data; got some whose log densities are others."
        )


def _check_inside(log_density: Tensor) -> None:
    outside = int((~log_density.isfinite()).sum())
    if outside:
        raise ValueError(
            f"Expected samples from the posterior; got {outside} of {log_density.numel()} where it "
            "has no density. A tensor holds unconstrained vectors; values of the sites are given "
            "by name."
        )
