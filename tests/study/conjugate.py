"""A conjugate model with its posterior in closed form, and posteriors that are wrong in a known way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch

ROWS = 3
NOISE = torch.tensor([0.5, 1.0])


def model(x: torch.Tensor, y: torch.Tensor) -> None:
    """Two means with a covariate; the posterior of each is normal."""
    with pyro.plate("means", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Normal(mu + x, NOISE).to_event(1), obs=y)


ARGS = (torch.arange(float(ROWS))[:, None].expand(ROWS, 2), torch.zeros(ROWS, 2))


@dataclass(frozen=True)
class Exact:
    """The posterior, or one that is narrower by a factor, shifted by so many standard deviations,
    turned into the prior, or of correlated means."""

    width: float = 1.0
    shift: float = 0.0
    prior: bool = False
    correlation: float = 0.0
    draws: int = 199

    def __call__(self, given: Any, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
        data = given.data["y"] - args[0]
        precision = 1 + ROWS / NOISE**2
        loc, scale = data.sum(0) / NOISE**2 / precision, precision**-0.5
        first, second = torch.randn(2, self.draws)
        second = self.correlation * first + (1 - self.correlation**2) ** 0.5 * second
        noise = torch.stack([first, second], -1)
        if self.prior:
            return {"mu": noise}
        return {"mu": loc + scale * (self.shift + self.width * noise)}
