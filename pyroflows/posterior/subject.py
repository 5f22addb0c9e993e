"""A guide before its judges: the quantities that checks share, each computed once and only if it is
asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from .._deadline import TimeOver
from ..model.explanation import explain
from ..model.rounding import is_sound
from ..sampling.polishing import polish
from ..sampling.roaming import roam
from .census import Census, has_missed, missed_mass
from .gaussian import Gaussians
from .importance import ImportanceSample, draw_importance_sample, resample
from .verdict import TIME_OVER

if TYPE_CHECKING:
    from ..guides.guide import Guide
    from ..model.density import LogDensity

__all__ = [
    "JUDGE_DRAWS",
    "KHAT_LIMIT",
    "Need",
    "Subject",
    "describe_values",
    "entry_names",
    "gained",
    "known_density",
    "polished_draws",
    "taken_census",
    "usable_draws",
    "usable_trajectories",
]

T = TypeVar("T")

#: Draws by which a guide is judged.
JUDGE_DRAWS = 10_000
#: Up to this k-hat, estimates that use importance weights are reliable.
KHAT_LIMIT = 0.7
# So many chains tell a drift of a tenth of a standard deviation; so many trajectories are a few
# quarters of an orbit.
CHAINS = 2000
TRAJECTORIES = 5
# Chains that roam, and how often they go on while they find more.
ROAMERS = 1000
ROUNDS = 6
# A gain so large that a larger one would change nothing.
ENOUGH = 0.05


@dataclass(eq=False)
class Subject:
    """A guide of a posterior, with the quantities that checks read.

    Args:
        guide: The guide.
        density: The log density of the model; ``None`` if it is not known.
        census: A census of the modes; ``None`` if none was taken.
        trajectories: Hamiltonian trajectories by which draws of the guide are polished.
        remedy: What may mend the guide if it is not exact, in the imperative.
        draws: How many draws of the guide are weighed.
        block: The block of a posterior that it is; ``None`` for a whole posterior.

    Example:
        >>> import torch
        >>> sample = ImportanceSample(torch.randn(100, 1), torch.zeros(100))
        >>> subject = Subject.of_sample(sample, ["x"])
        >>> subject.sample.ess > 0.99, subject.entry_names
        (True, ['x'])
    """

    guide: Guide | None
    density: LogDensity | None
    census: Census | None = None
    trajectories: int = 0
    remedy: str = 'train the guide longer or fit with guide="auto"'
    draws: int = JUDGE_DRAWS
    block: str | None = None

    #: What moves draws of the guide, and what takes them far, in words.
    movers: ClassVar[str] = "Hamiltonian trajectories"
    rovers: ClassVar[str] = "long Hamiltonian trajectories"

    @classmethod
    def of_sample(
        cls, sample: ImportanceSample, entry_names: list[str], block: str | None = None
    ) -> Subject:
        """Returns a subject of which only weighted draws are known.

        Args:
            sample: The draws.
            entry_names: Names of the entries of a draw.
            block: The block of a posterior that the draws are of.
        """
        subject = cls(None, None, block=block)
        subject.sample, subject.entry_names = sample, entry_names
        return subject

    @cached_property
    def entry_names(self) -> list[str]:
        """Names of the entries of the unconstrained vector, such as ``theta[0]``."""
        return [] if self.density is None else entry_names(self.density)

    @property
    def weighable(self) -> bool:
        """Whether draws can be weighed: the density is known, or weighted draws are given."""
        return self.density is not None or self.weighed

    @property
    def weighed(self) -> bool:
        """Whether draws have been weighed."""
        return "sample" in vars(self)

    @cached_property
    def sample(self) -> ImportanceSample:
        """Weighted draws of the guide."""
        return draw_importance_sample(self._guide, self._density, self.draws)

    @cached_property
    def missed(self) -> Tensor:
        """Mass that the guide misses at each fit of the census, relative to the evidence."""
        log_evidence = self.sample.log_evidence
        return missed_mass(self._density, self._guide.log_prob, log_evidence, self.fits)

    @property
    def fits(self) -> Gaussians:
        """The local fits of the census."""
        return _known("census", self.census).fits

    @property
    def flat_entries(self) -> list[str]:
        """Entries that change the most along a direction in which the density is flat, if any."""
        direction = _known("census", self.census).flat_direction
        if direction is None:
            return []
        sizes = direction.abs() / direction.abs().amax()
        return [name for name, size in zip(self.entry_names, sizes, strict=True) if size > 0.3]

    @property
    def reliable(self) -> bool:
        """Whether weights correct the draws: they are reliable, or nothing is wrong so far."""
        return self.sample.khat < KHAT_LIMIT or not self.trajectories

    @cached_property
    def starts(self) -> Tensor:
        """Draws from which trajectories start, corrected where weights are reliable."""
        return resample(self.sample.z, self._start_weights, CHAINS)

    @property
    def effective_starts(self) -> float:
        """Effective number of independent draws among the starts."""
        return 1 / (float(self._start_weights.square().sum()) + 1 / CHAINS)

    @property
    def _start_weights(self) -> Tensor:
        return self.sample.weights if self.reliable else self.sample.even_weights

    @cached_property
    def halfway(self) -> Tensor:
        """The starts after the first half of the trajectories by which draws are polished."""
        return self._move(self.starts, self.trajectories - self.trajectories // 2)

    @cached_property
    def moved(self) -> Tensor:
        """The starts after all trajectories of the polish, or after a few without a polish."""
        if self.trajectories:
            return self._move(self.halfway, self.trajectories // 2)
        return self._move(self.starts, TRAJECTORIES)

    @cached_property
    def roamers(self) -> Tensor:
        """Draws of the posterior, as the user gets them, from which chains roam."""
        return (self.moved if self.trajectories else self.starts)[:ROAMERS]

    @cached_property
    def roamed(self) -> Tensor:
        """The roamers after long trajectories, more of them as long as they find more."""
        z, gain = self.roamers, -math.inf
        for _ in range(ROUNDS):
            z = roam(self._density, self._guide, z)[-1]
            before, gain = gain, gained(self.lies_beyond(self.roamers), self.lies_beyond(z))
            if not (before < gain and 0.0 < gain < ENOUGH):
                break
        return z

    def lies_beyond(self, z: Tensor) -> Tensor:
        """Tells which of some draws lie where the guide has next to no density.

        Args:
            z: Draws of shape ``(n, features)``.
        """
        log_evidence = self.sample.log_evidence
        with torch.no_grad():
            log_p, log_q = self._density.log_prob(z), self._guide.log_prob(z)
        beyond = has_missed(log_p, log_q, log_evidence)
        beyond[beyond.clone()] = is_sound(self._density, z[beyond])
        return beyond

    def _move(self, z: Tensor, trajectories: int) -> Tensor:
        return polish(self._density, self._guide, z, trajectories)

    @property
    def _guide(self) -> Guide:
        return _known("guide", self.guide)

    @property
    def _density(self) -> LogDensity:
        return _known("density", self.density)

    @cached_property
    def forbidden(self) -> str:
        """A draw that the model gives no density, and the site at fault, in words; nothing where
        they are not known."""
        usable = self.sample.usable.to(self.sample.z.device)
        z = self.sample.z[~usable & self.sample.z.isfinite().all(-1)][:1]
        with contextlib.suppress(TimeOver):
            if self.density is not None and not bool(self.density.log_prob(z).isfinite().all()):
                why = explain(self.density, z[0])
                return f", such as one {self.describe(z[0])}, where {why}"
        return ""

    def describe(self, z: Tensor) -> str:
        """Returns a point in words: the values of the first sites."""
        return describe_values(self._density.constrain(z))


def describe_values(values: Mapping[str, Tensor]) -> str:
    """Returns the first numbers of the first sites in words."""
    parts = []
    for name, value in list(values.items())[:3]:
        numbers = ", ".join(f"{float(v):.3g}" for v in value.flatten()[:3])
        parts.append(f"{name} = {numbers}")
    return "near " + "; ".join(parts)


def gained(before: Tensor, after: Tensor) -> float:
    """Returns by how much a share has grown, beyond two standard errors.

    Args:
        before: Which chains were counted at first, as booleans of shape ``(n,)``.
        after: Which of the same chains are counted now.
    """
    entered, left = int((after & ~before).sum()), int((before & ~after).sum())
    return max(0.0, entered - left - 2 * math.sqrt(entered + left)) / len(before)


Need = Callable[[Subject], str | None]


def known_density(subject: Subject) -> str | None:
    """Returns a sentence if draws of the guide cannot be weighed."""
    return None if subject.weighable else "the density of the model is not known."


def taken_census(subject: Subject) -> str | None:
    """Returns a sentence if no census was taken."""
    if subject.census is None:
        return "no census of the modes was taken."
    return None if subject.census.finished else TIME_OVER


def usable_draws(subject: Subject) -> str | None:
    """Returns a sentence if the model forbids every draw of the guide."""
    empty = subject.sample.empty
    return "no draw of the guide has any density under the model." if empty else None


def usable_trajectories(subject: Subject) -> str | None:
    """Returns a sentence if no trajectory can be run, because only draws are known."""
    return None if subject.density is not None else "the density is known at the draws only."


def polished_draws(subject: Subject) -> str | None:
    """Returns a sentence if draws are not polished."""
    return None if subject.trajectories else "the draws are not polished."


def _known(name: str, value: T | None) -> T:
    if value is None:
        raise ValueError(f"Expected a subject with a {name}; got None.")
    return value


def entry_names(density: LogDensity) -> list[str]:
    """Returns names of the entries of the unconstrained vector, such as ``theta[0]``."""
    names = []
    for site in density.sites:
        names += [_scalar_name(site.name, index) for index in site.indices]
    return names


def scalar_names(name: str, shape: Sequence[int]) -> list[str]:
    """Returns names of the scalars of a site: ``mu``, or ``theta[0]``, or ``theta[1, 2]``."""
    return [_scalar_name(name, index) for index in itertools.product(*map(range, shape))]


def _scalar_name(name: str, index: Sequence[int]) -> str:
    return name + (f"[{', '.join(map(str, index))}]" if index else "")
