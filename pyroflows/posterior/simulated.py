"""The posterior of a simulator whose likelihood is not known."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from ..guides.guide import Guide
from ..model.density import LogDensity
from ..report import arviz_bridge as arviz
from .posterior import Posterior
from .verdict import NOT_JUDGED, Finding, Verdict

__all__ = ["SimulatedPosterior"]

NO_LIKELIHOOD = Finding(
    "likelihood",
    NOT_JUDGED,
    None,
    None,
    "a function has no likelihood to judge it by.",
    grounds=True,
)


class SimulatedPosterior(Posterior):
    r"""A posterior learned from the simulations of a function.

    It can do all that a :class:`Posterior` can but what takes a likelihood: there are no importance
    weights, so that draws are those of the guide, and no check has been made.

    Args:
        guide: The guide, at the data at hand.
        prior: The log density of the prior, which has the names and supports of the parameters.
        x: The data by name.

    Example:
        >>> import torch, pyro.distributions as dist, pyroflows as pf
        >>> def simulator(theta):
        ...     return theta + 0.1 * torch.randn(())
        >>> amortized = pf.fit_amortized(
        ...     simulator, dist.Uniform(0.0, 1.0), 200, ensemble=1, max_epochs=2, progress=False
        ... )
        >>> amortized.posterior_for(0.5)
        <Posterior of theta. Do not trust this posterior: it has not been judged, because a function
        has no likelihood to judge it by.>
    """

    def __init__(self, guide: Guide, prior: LogDensity, x: Mapping[str, Tensor]) -> None:
        super().__init__(guide, verdict=Verdict((NO_LIKELIHOOD,)))
        self._prior, self.x = prior, dict(x)

    @property
    def _coordinates(self) -> LogDensity:
        return self._prior

    def to_arviz(self, draws: int = 4000, seed: int | None = 0) -> Any:
        """Returns draws, the data, and the verdict in the attributes, in ArviZ's container.

        Args:
            draws: How many draws.
            seed: Seed of the draws.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x) with the groups
            ``posterior`` and ``observed_data``.
        """
        posterior = {n: v.unsqueeze(0).cpu().numpy() for n, v in self.sample(draws, seed).items()}
        observed = {name: value.cpu().numpy() for name, value in self.x.items()}
        attrs = {"inference_library": "pyroflows", **self.verdict.attributes()}
        return arviz.to_inference_data(
            {"posterior": posterior, "observed_data": observed}, attrs=attrs
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Refused: a file has no place for the function.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Expected a posterior of a Pyro model to save; got one of a function. Save what "
            "fit_amortized returned, by torch.save."
        )
