"""A model's log density for numpy code, evaluated in float64 also where the model runs in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from flowppl.numpyro.density import LogDensity

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8


def value_and_score(density: LogDensity, rows: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Points `(n, dim)` to log densities `(n,)` and gradients `(n, dim)`, all of them numpy's float64.

    Latents in float64 promote what a model computes from them and float32 data. A model that insists on float32, such as one whose
    loops have states of that type, is evaluated as it is.

    Args:
        density: Of the model.
        rows: Points are evaluated so many at a time: the function is compiled once.
    """
    function = jax.jit(density.value_and_score)
    start = np.asarray(density.init)
    precise = True

    def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.concatenate([points, np.repeat(points[-1:], -len(points) % rows, axis=0)])
        with enable_x64(precise or jax.config.jax_enable_x64):
            dtype = np.float64 if precise else start.dtype
            blocks = [function(jnp.asarray(b, dtype)) for b in np.split(padded, len(padded) // rows)]
            values, scores = (
                np.concatenate([np.asarray(a, np.float64) for a in part]) for part in zip(*blocks, strict=True)
            )
        return values[: len(points)], scores[: len(points)]

    try:
        evaluate(start[None])
    except Exception:  # anything may happen; what is wrong in float32 too is raised there
        precise = False
    return evaluate
