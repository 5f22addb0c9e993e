"""A verdict on a guide, as a whole or by its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checks import judge_subject
from .subject import JUDGE_DRAWS, Subject

if TYPE_CHECKING:
    from ..guides.guide import Guide
    from ..model.density import LogDensity
    from .census import Census
    from .importance import ImportanceSample
    from .verdict import Verdict

__all__ = ["judge_guide"]


def judge_guide(
    guide: Guide,
    density: LogDensity,
    census: Census | None,
    trajectories: int,
    remedy: str,
    draws: int = JUDGE_DRAWS,
) -> tuple[Verdict, ImportanceSample | None]:
    """Judges a guide.

    Args:
        guide: The guide.
        density: The log density of the model.
        census: A census of the modes; ``None`` if none was taken.
        trajectories: Trajectories by which draws of the guide are polished.
        remedy: What may mend the guide if it is not exact, in the imperative.
        draws: How many draws of the guide are weighed.

    Returns:
        The verdict, and the weighted draws; ``None`` for these if there was no time for them.
    """
    subject = Subject(guide, density, census, trajectories, remedy, draws)
    verdict = judge_subject(subject)
    return verdict, subject.sample if subject.weighed else None
