"""Reader of a posteriordb directory: data, reference draws and Stan's names of scalars.

The layout is that of the posteriordb repository, so a full clone and a part of one are read alike.

References:
    Magnusson, Torgander, Bürkner, Zhang, Carpenter, Vehtari: posteriordb: Testing, Benchmarking and
    Developing Bayesian Inference Algorithms, 2025. https://arxiv.org/abs/2407.04967
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "posterior_database"
_SCALAR = re.compile(r"^(?P<base>[^\[\]]+)(?:\[(?P<index>\d+(?:,\d+)*)\])?$")


@dataclass(frozen=True)
class Reference:
    """One posterior of the database.

    Args:
        name: The posterior's name, such as `"eight_schools-eight_schools_centered"`.
        data: The data as Stan reads them: name -> number or nested list.
        draws: Reference draws on the constrained scale: Stan's scalar name, such as `"theta[1]"`, -> array
            `(N,)`, chains one after another.
    """

    name: str
    data: dict[str, Any]
    draws: dict[str, np.ndarray]


class PosteriorDB:
    """A posteriordb directory.

    Args:
        path: A clone of posteriordb, or its `posterior_database` folder.

    Raises:
        ValueError: If `path` holds no posteriordb.
    """

    def __init__(self, path: str | Path) -> None:
        root = Path(path).expanduser()
        root = root / FOLDER if (root / FOLDER).is_dir() else root
        if not (root / "posteriors").is_dir():
            raise ValueError(
                f"Expected --db to name a posteriordb folder (with {FOLDER}/posteriors in it); got {path}."
            )
        self.root = root

    def names(self) -> list[str]:
        """Return the names of all posteriors in the directory, sorted."""
        return sorted(file.stem for file in (self.root / "posteriors").glob("*.json"))

    def load(self, name: str) -> Reference:
        """Read one posterior's data and reference draws.

        Args:
            name: The posterior's name.

        Returns:
            The data and the draws.

        Raises:
            ValueError: If there is no such posterior, or its data or reference draws are missing.
        """
        file = self.root / "posteriors" / f"{name}.json"
        if not file.is_file():
            raise ValueError(
                f"Expected a posterior of the database ({', '.join(self.names())}); got {name!r}."
            )
        info = json.loads(file.read_text(encoding="utf-8"))
        if not info.get("reference_posterior_name"):
            raise ValueError(f"The posterior {name!r} has no reference draws.")
        data = _read_zip(self.root / "data" / "data" / f"{info['data_name']}.json.zip")
        draws = self.root / "reference_posteriors" / "draws" / "draws"
        chains = _read_zip(draws / f"{info['reference_posterior_name']}.json.zip")
        return Reference(
            name, data, {key: np.concatenate([chain[key] for chain in chains]) for key in chains[0]}
        )


def _read_zip(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"The posterior database lacks the file {file}.")
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def flatten(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Split arrays into scalars under Stan's names, indices from 1.

    Args:
        arrays: Parameter name -> array `(N, *shape)`.

    Returns:
        Scalar name -> array `(N,)`.

    >>> sorted(flatten({"mu": np.zeros(3), "theta": np.zeros((3, 2))}))
    ['mu', 'theta[1]', 'theta[2]']
    """
    scalars = {}
    for name, array in arrays.items():
        for index in np.ndindex(*array.shape[1:]):
            label = ",".join(str(i + 1) for i in index)
            where: tuple[Any, ...] = (slice(None), *index)
            scalars[f"{name}[{label}]" if label else name] = array[where]
    return scalars


def unflatten(scalars: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gather scalars under Stan's names into arrays: the inverse of `flatten`.

    Args:
        scalars: Scalar name -> array `(N,)`.

    Returns:
        Parameter name -> array `(N, *shape)`.

    Raises:
        ValueError: If a name is not one of Stan's.

    >>> unflatten({"theta[1]": np.zeros(3), "theta[2]": np.ones(3)})["theta"].shape
    (3, 2)
    """
    entries: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, values in scalars.items():
        match = _SCALAR.match(name)
        if match is None:
            raise ValueError(f"Expected a scalar's name such as theta[1]; got {name!r}.")
        index = tuple(int(i) - 1 for i in (match["index"] or "").split(",") if i)
        entries.setdefault(match["base"], {})[index] = values
    arrays = {}
    for name, parts in entries.items():
        shape = tuple(max(i) + 1 for i in zip(*parts, strict=True))
        arrays[name] = np.empty((len(next(iter(parts.values()))), *shape))
        for place, values in parts.items():
            where: tuple[Any, ...] = (slice(None), *place)
            arrays[name][where] = values
    return arrays
