"""The prior, truncated to where a posterior has mass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guides.guide import Guide
from ..model.density import LogDensity
from ..model.prediction import prior_draws

__all__ = ["propose_within"]

#: Mass of the posterior beyond the region to which the prior is truncated.
EPSILON = 1e-4
#: Draws of the posterior by which the edge of the region is found.
DRAWS = 20_000
#: Draws of the prior at a time, and how often so many are drawn at most.
BATCH, TRIES = 10_000, 500


@torch.no_grad()
def propose_within(guide: Guide, density: LogDensity, n: int) -> dict[str, Tensor]:
    r"""Draws from the prior within the region of highest density of a posterior.

    .. math:: \tilde p(\theta) \propto p(\theta)\, 1[q(\theta) \ge \tau], \qquad
        q(q(\theta) < \tau) = 10^{-4}.

    Where the region holds the posterior, the posterior under :math:`\tilde p` is that under
    :math:`p`, so that a flow trained on such draws needs no correction.

    Args:
        guide: The posterior :math:`q` of unconstrained vectors.
        density: A log density of the model, from whose prior it draws.
        n: How many draws.

    Returns:
        For each site a tensor of shape ``(n, *shape)``.

    Raises:
        ValueError: If the region is too small for the prior to hit it.

    Reference:
        Deistler, Goncalves, Macke, "Truncated proposals for scalable and hassle-free
        simulation-based inference", 2022, https://arxiv.org/abs/2210.04815

    Example:
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model():
        ...     pyro.sample("x", dist.Uniform(0.0, 1.0))
        >>> density = pf.model.LogDensity(model)
        >>> guide = pf.AutoFlow(model, init_scale=0.01)
        >>> density.introduce(guide)
        >>> x = propose_within(guide, density, 100)["x"]
        >>> x.shape, bool(x.std() < 0.01)
        (torch.Size([100]), True)
    """
    _, log_q = guide.sample_and_log_prob(DRAWS)
    threshold = log_q.sort().values[int(EPSILON * DRAWS)]
    kept: list[dict[str, Tensor]] = []
    found = tried = 0
    while found < n and tried < TRIES * BATCH:
        draws = prior_draws(density, BATCH)
        if not draws:
            raise ValueError("Expected proper priors, which can be drawn from.")
        inside = guide.log_prob(density.unconstrain(draws)) >= threshold
        kept.append({name: value[inside] for name, value in draws.items()})
        found, tried = found + int(inside.sum()), tried + BATCH
    if found < n:
        raise ValueError(
            f"Expected a posterior that draws of the prior hit; got {found} hits of {tried} draws, "
            f"and {n} are needed. Ask for fewer rounds."
        )
    return {name: torch.cat([each[name] for each in kept])[:n] for name in kept[0]}
