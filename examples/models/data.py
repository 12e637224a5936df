"""Data and reference posteriors of the example models, as NumPy arrays: neither PPL is needed here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[1]
Arrays = dict[str, np.ndarray]


def load_data(model: str) -> tuple[np.ndarray, ...]:
    """Positional arguments of a model, in float64.

    Args:
        model: ``"eight_schools"`` or ``"sparse_logistic"``.

    Returns:
        ``(effect, standard_error)``, both of shape ``(8,)``, or ``(x, y)`` of shapes ``(1000, 24)`` and ``(1000,)``,
        with the columns of ``x`` standardised.

    Raises:
        KeyError: If there is no such model.
    """
    return {"eight_schools": _eight_schools, "sparse_logistic": _german_credit}[model]()


def _eight_schools() -> tuple[np.ndarray, np.ndarray]:
    effect, standard_error = np.loadtxt(
        EXAMPLES / "data" / "eight_schools.csv", delimiter=",", skiprows=1, usecols=(1, 2), unpack=True
    )
    return effect, standard_error


def _german_credit() -> tuple[np.ndarray, np.ndarray]:
    table = np.loadtxt(EXAMPLES / "data" / "german_credit.csv", delimiter=",", skiprows=1)
    x, y = table[:, :-1], table[:, -1]
    return (x - x.mean(0)) / x.std(0), y


@dataclass(frozen=True)
class Reference:
    """Posterior of one model from long NUTS runs; every dictionary is keyed by site name.

    Attributes:
        draws: Thinned draws, leading axis the draw.
        mean: Posterior means from all draws; likewise `sd`, and `quantiles` with leading axis `probabilities`.
        mean_mcse: Monte Carlo standard errors of `mean`; likewise `sd_mcse` and `quantiles_mcse`.
        probabilities: Levels of `quantiles`.
        metadata: How the draws were made, with R-hat, effective sample sizes and divergences.
    """

    draws: Arrays
    mean: Arrays
    sd: Arrays
    quantiles: Arrays
    mean_mcse: Arrays
    sd_mcse: Arrays
    quantiles_mcse: Arrays
    probabilities: np.ndarray
    metadata: dict


def load_reference(model: str) -> Reference:
    """Reference posterior of a model, as written by ``examples/references/make_references.py``."""
    with np.load(EXAMPLES / "references" / f"{model}.npz") as file:
        groups: dict[str, Arrays] = {}
        for key in file.files:
            group, _, site = key.partition("/")
            groups.setdefault(group, {})[site] = file[key]
    probabilities = groups.pop("probabilities")[""]
    metadata = json.loads(str(groups.pop("metadata")[""]))
    return Reference(**groups, probabilities=probabilities, metadata=metadata)
