"""The data sets of `density`, their splits, and the flows that flowppl brings to them.

All sets come inside packages (scikit-learn and plotnine): nothing is downloaded. A value measured to a resolution has no
density, so uniform noise of the resolution (the smallest gap between two values of the column) is added, the same for all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowppl import flows
from flowppl.bijections import (
    Affine,
    Bijection,
    Chain,
    Composed,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Rotation,
    RQSpline,
    Stack,
)
from flowppl.flows import Flow

LAYERS, HIDDEN, BINS, BOUND = 5, (64, 64), 8, 5.0
FOLDS, VALIDATION = 5, 0.15
ARCHITECTURES = {
    "nsf": "spline coupling",
    "maf": "affine autoregressive",
    "nsf_ar": "spline autoregressive",
}
_COMMONEST = 0.05  # of the rows: a column whose commonest value takes more is discrete


class Adam(NamedTuple):
    """The rate at the first step; it falls as half a cosine to zero at step `steps`."""

    rate: float
    steps: int


class Split(NamedTuple):
    """Rows to fit, to stop by and to judge by, standardised by the mean and the deviation of those to fit."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def _diabetes() -> np.ndarray:
    """Ten baseline measurements of 442 patients: sex is binary, s4 (a ratio of s1 and s3) mostly 2, 3 or 4; both are dropped."""
    from sklearn.datasets import load_diabetes

    return load_diabetes(scaled=False).data


def _breast_cancer() -> np.ndarray:
    """Thirty measurements of the cell nuclei in 569 images; radius, perimeter and area almost determine each other."""
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer().data


def _txhousing() -> np.ndarray:
    """Monthly house sales in Texan cities, 7126 rows, as logarithms. Inventory is dropped: it is listings over sales."""
    table = _plotnine("txhousing")[["sales", "volume", "median", "listings"]].dropna()
    return _log(table.to_numpy()[table["listings"] > 0])


def _diamonds() -> np.ndarray:
    """Weight, three lengths and price of 10 000 of 53 940 diamonds; weight and price as logarithms.

    Table is dropped as discrete, depth because it is computed from the lengths; so are rows with a length of zero or of over 11 mm.
    """
    table = _plotnine("diamonds")[["carat", "price", "x", "y", "z"]].to_numpy(float)
    lengths = table[:, 2:]
    table = table[(lengths > 0).all(1) & (lengths < 11).all(1)]
    table = table[np.random.default_rng(0).permutation(len(table))[:10_000]]
    return np.concatenate([_log(table[:, :2]), table[:, 2:]], axis=1)


class DataSet(NamedTuple):
    """How to load one, and the number of rows of a step of Adam."""

    load: Callable[[], np.ndarray]
    batch: int


DATA = {
    "diabetes": DataSet(_diabetes, 64),
    "breast_cancer": DataSet(_breast_cancer, 64),
    "txhousing": DataSet(_txhousing, 256),
    "diamonds": DataSet(_diamonds, 256),
}


def table(name: str) -> np.ndarray:
    """The rows of a set, continuous columns only."""
    x = DATA[name].load()
    commonest = [np.unique(column, return_counts=True)[1].max() / len(x) for column in x.T]
    return _dequantised(x[:, np.array(commonest) <= _COMMONEST])


def splits(x: np.ndarray) -> Iterator[Split]:
    """Folds: each row is judged by once; of the others, 15 % are to stop by."""
    shuffled = x[np.random.default_rng(1).permutation(len(x))]
    folds = np.array_split(shuffled, FOLDS)
    for i, test in enumerate(folds):
        rest = np.concatenate(folds[:i] + folds[i + 1 :])
        rest = rest[np.random.default_rng(i).permutation(len(rest))]
        held = int(VALIDATION * len(rest))
        loc, scale = rest[held:].mean(0), rest[held:].std(0)
        yield Split(*(((part - loc) / scale).astype(np.float32) for part in (rest[held:], rest[:held], test)))


def our_flow(architecture: str, dim: int) -> Flow:
    """The recipe of that name as it comes, but for depth, widths and bins; "maf" and "nsf_ar" by hand where there is no recipe."""
    options: dict[str, Any] = {"layers": LAYERS, "hidden": HIDDEN}
    if architecture in flows.names():
        options |= {} if architecture == "maf" else {"bins": BINS}
        return flows.Recipe(architecture, tuple(sorted(options.items())))(dim)
    transformer = Affine() if architecture == "maf" else Composed(RQSpline(BINS, BOUND), Affine())
    return Flow(_autoregressive(dim, transformer))


def _autoregressive(dim: int, transformer: Any) -> Bijection:
    """Density in one pass: each layer is the inverse of an autoregressive map, between linear maps and rotations."""
    layer = Inverse(MaskedAutoregressive(dim, transformer, hidden=HIDDEN))
    block = Chain((LULinear(dim), layer, Rotation(dim, dim // 2)))
    return Chain((Stack(block, LAYERS), LULinear(dim)))


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(_dequantised(x))


def _dequantised(x: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.stack([column + (rng.random(len(x)) - 0.5) * _resolution(column) for column in x.T], axis=1)


def _resolution(column: np.ndarray) -> float:
    gaps = np.diff(np.unique(column))
    return float(gaps[gaps > 1e-9 * np.ptp(column)].min())


def _plotnine(name: str) -> Any:
    """One of its tables, without importing the package."""
    import pandas

    spec = importlib.util.find_spec("plotnine")
    assert spec and spec.submodule_search_locations
    return pandas.read_csv(Path(spec.submodule_search_locations[0]) / "data" / f"{name}.csv")
