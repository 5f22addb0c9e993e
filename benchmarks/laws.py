"""Writes the page of laws, from what the law kit and the classes say of themselves: `python -m benchmarks.laws`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyroflows as pf
from pyroflows.testing import LAWS

ROOMS = (pf.transforms, pf.univariate)
PAGE = Path(__file__).resolve().parent.parent / "tutorials" / "laws.md"
HEAD = """# The laws of transforms and flows

Every transform and every flow of pyroflows obeys these laws, in float64 and in float32, and yours can be held to them:

    import pyroflows as pf
    print(pf.check(MyTransform(3)))              # or a flow; raises a LawError that says which law fails, and where

    import pytest
    from pyroflows.testing import laws

    @pytest.mark.parametrize("law", laws(lambda: MyTransform(3)), ids=str)
    def test_my_transform(law):
        law()

The list is made by `python -m benchmarks.laws`.

"""


def exempt() -> Iterator[tuple[str, str, str]]:
    """Yield class, law and reason for all that a class says cannot hold for it."""
    owners = {name: getattr(room, name) for room in ROOMS for name in room.__all__}
    for name, owner in owners.items():
        laws: Any = getattr(owner, "exempt_laws", {}) if inspect.isclass(owner) else {}
        if isinstance(laws, property):  # it depends on the options
            laws = owner(2).exempt_laws
        if isinstance(laws, Mapping):
            yield from ((name, law, reason) for law, reason in laws.items())


def page() -> str:
    """Return the page as Markdown."""
    lines = [f"- **{name}**. {text}" for name, text in LAWS.items()]
    rows = [f"| `{owner}` | {law} | {reason} |" for owner, law, reason in exempt()]
    table = ["", "## What cannot hold", "", "| class | law | why |", "|---|---|---|", *rows, ""]
    return HEAD + "\n".join([*lines, *table])


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
