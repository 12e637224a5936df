"""Draws of NumPyro guides and chains for ArviZ."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC

from flowppl.diagnostics import inference_data

_SAMPLE_STATS = {"potential_energy": "lp", "accept_prob": "acceptance_rate", "num_steps": "n_steps"}


def to_arviz(
    source: Any,
    *args: Any,
    params: dict[str, Any] | None = None,
    rng: Any = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Any:
    """Exports a guide's draws or an MCMC run to ArviZ.

    Args:
        source: An `AutoFlow` (or any NumPyro autoguide) or an `MCMC` that has run.
        args: For a guide, the model's arguments.
        params: For a guide, its parameters.
        rng: For a guide, a key; None for a fixed one.
        num_samples: For a guide, the number of draws.
        kwargs: For a guide, the model's keyword arguments.

    Returns:
        `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x) with the groups posterior and, for MCMC, sample_stats.

    Raises:
        TypeError: a guide comes without `params`.
        MissingExtraError: ArviZ is not installed.
    """
    if isinstance(source, MCMC):
        return inference_data({"posterior": _model_sites(source), "sample_stats": _sample_stats(source)})
    if params is None:
        raise TypeError("params: a NumPyro guide keeps no parameters; pass params=result.params of svi.run")
    key = jax.random.key(0) if rng is None else rng
    draws = source.sample_posterior(key, params, *args, sample_shape=(num_samples,), **kwargs)
    return inference_data({"posterior": {name: np.asarray(value)[None] for name, value in draws.items()}})


def _model_sites(mcmc: MCMC) -> dict[str, Any]:
    return {name: np.asarray(value) for name, value in mcmc.get_samples(group_by_chain=True).items()}


def _sample_stats(mcmc: MCMC) -> dict[str, Any]:
    stats = {}
    for name, value in mcmc.get_extra_fields(group_by_chain=True).items():
        name = name.split(".")[-1]
        array = np.asarray(value)
        # ArviZ keeps the log density, not the energy.
        stats[_SAMPLE_STATS.get(name, name)] = -array if name == "potential_energy" else array
    return stats
