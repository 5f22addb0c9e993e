"""How well a guide matches its posterior, and whether to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..report import arviz_bridge as arviz

__all__ = ["Verdict", "drifted", "improper", "judge", "missing", "polished"]

KHAT_LIMIT = 0.7
ESS_LIMIT = 0.9
SHIFT_LIMIT = 0.1
ZERO_LIMIT = 0.01
OUTLIER_LIMIT = 0.05
MISSED_LIMIT = 0.02
DRIFT_LIMIT = 0.1
MEMORY_LIMIT = 0.5


@dataclass(frozen=True)
class Verdict:
    r"""What importance sampling says about a guide :math:`q` of a posterior :math:`p`.

    From draws :math:`z_i \sim q` with weights :math:`w_i = p(z_i, \mathrm{data}) / q(z_i)`. Importance sampling sees what
    the guide covers; what it does not cover is looked for by a census of modes, and by Hamiltonian trajectories from its
    draws.

    Attributes:
        ok: Whether to trust the posterior.
        reason: Why, and what to do if not.
        khat: Shape of the Pareto tail of the weights; above 0.7 estimates that use them are unreliable.
        ess: Effective sample size of the smoothed weights, as a fraction of the draws.
        elbo: Evidence lower bound, the mean of :math:`\log w_i`.
        log_evidence: :math:`\log \tfrac{1}{N} \sum_i w_i`, with smoothed weights.
        log_evidence_error: Its Monte Carlo standard error; what no draw of the guide reaches is not in it.
        shift: The furthest that weighting moves the mean of an unconstrained entry, in standard deviations, or the log
            width of its central 90 % interval.
        draws: How many draws this rests on.
        missed: Mass of the posterior, relative to the evidence, that the census sees where the guide has next to none;
            NaN if not looked for.
        drift: The furthest that a few Hamiltonian trajectories from the corrected draws move a mean or the log width of a
            central 90 % interval, in standard deviations, beyond its sampling error; NaN if not looked for.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646

        Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational inference", 2018,
        https://arxiv.org/abs/1802.02538
    """

    ok: bool
    reason: str
    khat: float
    ess: float
    elbo: float
    log_evidence: float
    log_evidence_error: float
    shift: float
    draws: int
    missed: float = math.nan
    drift: float = math.nan

    def __str__(self) -> str:
        return (
            "Trust this posterior: " if self.ok else "Do not trust this posterior: "
        ) + self.reason


def judge(log_weights: Tensor, z: Tensor, names: list[str]) -> tuple[Verdict, Tensor]:
    """Judges a guide by the weights of its draws.

    Args:
        log_weights: Log joint less log guide, of shape ``(draws,)``; NaN and infinity count as zero density.
        z: The unconstrained draws, of shape ``(draws, features)``.
        names: Names of the entries of a draw.

    Returns:
        The verdict, and smoothed log weights of shape ``(draws,)`` whose exponentials sum to one.

    Example:
        >>> z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> verdict, _ = judge(torch.zeros(1000), z, ["x"])
        >>> verdict.ok, verdict.log_evidence
        (True, 0.0)
    """
    n = len(log_weights)
    raw, z = log_weights.detach().to("cpu", torch.float64), z.detach().to("cpu", torch.float64)
    usable = raw.isfinite() & z.isfinite().all(-1)
    raw = raw.masked_fill(~usable, -math.inf)
    zero = float((raw == -math.inf).double().mean())
    if zero == 1.0:
        reason = (
            "the model gives every draw of the guide zero density; look at its priors and supports."
        )
        nothing = Verdict(False, reason, math.inf, 0.0, -math.inf, -math.inf, math.inf, math.inf, n)
        return nothing, torch.full_like(raw, -math.log(n))
    smoothed_array, khat = arviz.psis(raw.numpy())
    smoothed = torch.from_numpy(smoothed_array)
    weights = smoothed.exp()
    ess = float(1 / weights.square().sum()) / n
    # psis normalises; the total is that of the raw weights with their tail smoothed.
    log_evidence = _log_total(raw, smoothed) - math.log(n)
    error = math.sqrt(max(1 / ess - 1, 0.0) / n)
    shifts = _shifts(z[usable], weights[usable])
    worst = int(shifts.argmax())
    # Smoothing a tail hides the few draws that have come upon a narrow mode.
    outliers = 1 - math.exp(log_evidence + math.log(n) - float(raw.logsumexp(0)))
    verdict = _verdict(khat, ess, float(shifts[worst]), names[worst], zero, outliers)
    return (
        Verdict(
            *verdict, khat, ess, float(raw.mean()), log_evidence, error, float(shifts[worst]), n
        ),
        smoothed,
    )


def missing(verdict: Verdict, missed: float, where: str) -> Verdict:
    """Adds what a census found to a verdict.

    Args:
        verdict: The verdict by the weights.
        missed: Mass that the guide misses, relative to the evidence.
        where: A sentence's part that says where it is.

    Returns:
        The verdict, no longer ok if the mass is more than a little.
    """
    verdict = replace(verdict, missed=missed)
    if not missed > MISSED_LIMIT:
        return verdict
    return replace(
        verdict,
        ok=False,
        reason=(
            f"the guide misses a region with about {missed / (1 + missed):.0%} of the posterior's mass, {where}, which "
            "importance sampling cannot see. If that is a mode of its own, break the model's symmetry or fit with "
            'guide="auto"; if it lies next to what the guide covers, as the neck of a funnel does, reparametrise, or give '
            "the guide more steps or a wider flow."
        ),
    )


def improper(verdict: Verdict, where: str) -> Verdict:
    """The verdict on a posterior whose density does not fall off.

    Args:
        verdict: The verdict by the weights.
        where: In which direction.

    Returns:
        The verdict, not ok.
    """
    reason = (
        f"the posterior cannot be normalised: its density does not fall off {where}. Give the site a proper prior, or look "
        "for a parameter that the data say nothing of."
    )
    return replace(verdict, ok=False, reason=reason)


def drifted(verdict: Verdict, drifts: Tensor, names: list[str]) -> Verdict:
    """Adds to a verdict how far Hamiltonian trajectories have moved the draws.

    Args:
        verdict: The verdict by the weights.
        drifts: For each entry the drift, of shape ``(features,)``.
        names: Names of the entries.

    Returns:
        The verdict, no longer ok if a moment has moved by more than a little.
    """
    worst = int(drifts.argmax())
    verdict = replace(verdict, drift=float(drifts[worst]))
    if verdict.drift <= DRIFT_LIMIT or not verdict.ok:
        return verdict
    return replace(
        verdict,
        ok=False,
        reason=(
            f"the weights see nothing wrong, but Hamiltonian trajectories from the guide's draws move {names[worst]} by "
            f"more than {verdict.drift:.2f} of its standard deviation, so the guide misses a region next to what it covers. "
            f"Give it more steps or a wider flow, or reparametrise {names[worst]}."
        ),
    )


def polished(
    verdict: Verdict, drifts: Tensor, remembered: Tensor, trajectories: int, names: list[str]
) -> Verdict:
    """Judges draws that were polished.

    Args:
        verdict: The verdict on the guide.
        drifts: How far the second half of the trajectories has moved each entry, of shape ``(features,)``.
        remembered: Correlation of each entry with where that half began, of shape ``(features,)``.
        trajectories: How many there were.
        names: Names of the entries.

    Returns:
        The verdict on the polished draws.
    """
    worst = int(drifts.argmax())
    verdict = replace(verdict, drift=float(drifts[worst]))
    if not verdict.drift <= DRIFT_LIMIT:
        return replace(verdict, ok=False)
    slowest = int(remembered.argmax())
    if not float(remembered[slowest]) <= MEMORY_LIMIT:
        reason = (
            f"the guide is not exact (k-hat {verdict.khat:.2f}), and polished draws of {names[slowest]} remember where they "
            "began, so that modes may have the wrong weights. Give the guide more steps or a wider flow, or draw by "
            "flow Monte Carlo."
        )
        return replace(verdict, ok=False, reason=reason)
    return replace(
        verdict,
        ok=True,
        reason=(
            f"the guide alone is not exact (k-hat {verdict.khat:.2f}, {verdict.ess:.0%} of the importance draws are "
            f"effective), but its draws are polished by {trajectories} Hamiltonian trajectories, the second half of which "
            f"moves no mean or width by more than {max(verdict.drift, 0.005):.2f} standard deviations beyond its error."
        ),
    )


def _log_total(raw: Tensor, smoothed: Tensor) -> float:
    # The smallest finite weights are never smoothed, so that they show the constant that was divided out.
    least = int(raw.masked_fill(raw == -math.inf, math.inf).argmin())
    return float(raw[least] - smoothed[least])


def _shifts(z: Tensor, weights: Tensor) -> Tensor:
    """How far weights move each mean, and the log width of each central 90 % interval, in standard deviations."""
    mean_shift = (weights @ z - z.mean(0)).abs() / z.std(0)
    # Widths by quantiles: under heavy tails a standard deviation hangs on a few draws.
    width_shift = (
        (_width(z, weights) / _width(z, torch.full_like(weights, 1 / len(weights)))).log().abs()
    )
    return torch.maximum(mean_shift, width_shift)


def _width(z: Tensor, weights: Tensor) -> Tensor:
    values, order = z.sort(0)
    levels = torch.tensor([0.05, 0.95], dtype=z.dtype) * weights.sum()
    index = torch.searchsorted(
        weights[order].cumsum(0).mT.contiguous(), levels.expand(z.shape[1], 2).contiguous()
    )
    ends = values.mT.gather(1, index.clamp(max=len(z) - 1))
    return ends[:, 1] - ends[:, 0]


def _verdict(
    khat: float, ess: float, shift: float, name: str, zero: float, outliers: float
) -> tuple[bool, str]:
    facts = f"k-hat is {khat:.2f} and {ess:.0%} of the importance draws are effective"
    if khat == -math.inf:
        kind = "all of equal weight" if ess > 0.999 else "their weights bounded"
        facts = f"{ess:.0%} of the importance draws are effective, {kind}"
    if zero > ZERO_LIMIT:
        return False, (
            f"{zero:.0%} of the guide's draws have zero density under the model; look at its supports. "
            f"{facts[0].upper()}{facts[1:]}."
        )
    if khat >= KHAT_LIMIT and ess <= ESS_LIMIT:
        return False, (
            f"{facts} (k-hat below {KHAT_LIMIT} or {ESS_LIMIT:.0%} would do), so the guide misses part of it, most at "
            f"{name}. Give it more steps or a wider flow, or reparametrise {name}."
        )
    if outliers > OUTLIER_LIMIT:
        return False, (
            f"a handful of the guide's draws carry {outliers:.0%} of all weight, so there is a narrow region that it misses "
            f"({facts} otherwise). Give it more steps or a wider flow, or look at the draws of greatest weight."
        )
    if not shift <= SHIFT_LIMIT:
        return False, (
            f"{facts}, but weighting moves {name} by {shift:.2f} of its standard deviation (at most {SHIFT_LIMIT} is "
            "fine). Give it more steps or a wider flow."
        )
    if math.isfinite(khat) and khat >= KHAT_LIMIT:
        facts = f"{ess:.0%} of the importance draws are effective (k-hat {khat:.2f}: a far tail of little weight is off)"
    return (
        True,
        f"{facts}, and weighting moves no mean or width by more than {max(shift, 0.005):.2f}.",
    )
