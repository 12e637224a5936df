"""Textbook posteriors on public data, each as a user would first write it, once in each PPL with the same sites and priors.

    from benchmarks import posteriors

    for name in posteriors.POSTERIORS:
        arrays = posteriors.load(name)
        model = posteriors.numpyro_model(name)  # or pyro_model, with the arrays as tensors
        truth = posteriors.reference(name)

Nothing is centred, standardised or reparametrised where leaving that out is what makes the posterior hard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import data

REFERENCES = Path(__file__).with_name("references")


@dataclass(frozen=True)
class Posterior:
    """One entry of the catalogue; its models are the functions of its name in `in_numpyro` and `in_pyro`.

    Attributes:
        dim: Number of unconstrained latents.
        load: The models' positional arguments as float64 arrays.
        about: What makes it hard.
    """

    dim: int
    load: Callable[[], tuple[np.ndarray, ...]]
    about: str


POSTERIORS: dict[str, Posterior] = {
    "engel": Posterior(3, data.engel, "regression in raw units"),
    "cars": Posterior(9, data.cars, "interactions of three uncentred predictors"),
    "huron": Posterior(5, data.huron, "cubic trend, uncentred"),
    "longley": Posterior(8, data.longley, "nearly collinear predictors in raw units"),
    "horseshoe": Posterior(23, data.horseshoe, "horseshoe prior, centred"),
    "sunspots": Posterior(4, data.sunspots, "autoregression of order two"),
    "volatility": Posterior(84, data.volatility, "stochastic volatility, centred"),
    "coal": Posterior(31, data.coal, "Gaussian process behind counts, with its hyperparameters, centred"),
    "nile": Posterior(102, data.nile, "local level model, centred"),
    "lynx_hare": Posterior(8, data.lynx_hare, "differential equation of predators and prey"),
    "mpg": Posterior(19, data.mpg, "varying intercepts and slopes of seven groups, centred"),
    "party": Posterior(10, data.party, "ordered logistic regression, uncentred"),
    "heart": Posterior(3, data.heart, "censored Weibull survival, uncentred"),
    "seeds": Posterior(26, data.seeds, "logistic regression with an effect of each plate, centred"),
}


# Sites of which elements have no posterior variance, and are judged by their logarithms.
WITHOUT_VARIANCE = {"horseshoe": ("lam",)}


def load(name: str) -> tuple[np.ndarray, ...]:
    """Positional arguments of a posterior's models, as float64 arrays."""
    return POSTERIORS[name].load()


def numpyro_model(name: str) -> Callable:
    """The model in NumPyro."""
    from . import in_numpyro

    return getattr(in_numpyro, name)


def pyro_model(name: str) -> Callable:
    """The model in Pyro."""
    from . import in_pyro

    return getattr(in_pyro, name)


def has_reference(name: str) -> bool:
    """Whether a reference posterior was made."""
    return (REFERENCES / f"{name}.json").exists()


def reference(name: str) -> dict:
    """The reference posterior that `benchmarks.posteriors.references` wrote."""
    return json.loads((REFERENCES / f"{name}.json").read_text())
