"""A model's log density for numpy code, evaluated in float64 also where the model runs in float32."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from flowppl.numpyro.density import LogDensity
from flowppl.pathfinder import NUM_PATHS

_ROWS, _HIGH = 256, 500  # at a time, beyond so many dimensions: there another compilation is worth it
_enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8


class Precise:
    """Points `(n, dim)` to log densities `(n,)` and gradients `(n, dim)`, all of them numpy's float64.

    Latents in float64 promote what a model computes from them and float32 data. A model that insists on float32, such as one whose
    loops have states of that type, is evaluated as it is.

    Args:
        density: Of the model.

    Attributes:
        dtype: In which the model is evaluated.
    """

    def __init__(self, density: LogDensity) -> None:
        self._evaluate = jax.jit(density.value_and_score)
        self._wide, self.dtype = True, np.dtype(np.float64)
        start = np.asarray(density.init)[None]
        try:
            self(start)
        except Exception:  # anything may happen; what is wrong in float32 too is raised there
            self._wide, self.dtype = False, start.dtype

    def context(self) -> Any:
        """The precision in which jax is to compute with the model."""
        return _enable_x64(True) if self._wide else contextlib.nullcontext()

    def __call__(self, points: np.ndarray, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Evaluates the points, `rows` at a time: each number of rows is compiled once. None for few, or many where there are."""
        if rows is None:
            rows = _ROWS if len(points) >= _ROWS and points.shape[1] > _HIGH else NUM_PATHS
        padded = np.concatenate([points, np.repeat(points[-1:], -len(points) % rows, axis=0)])
        with self.context():
            blocks = [self._evaluate(jnp.asarray(b, self.dtype)) for b in np.split(padded, len(padded) // rows)]
            values, scores = (
                np.concatenate([np.asarray(a, np.float64) for a in part]) for part in zip(*blocks, strict=True)
            )
        return values[: len(points)], scores[: len(points)]
