"""A model's log density for numpy code, evaluated in float64 also where the model runs in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowppl.numpyro.density import LogDensity

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # before jax 0.8
    from jax.experimental import enable_x64

Array = Any


def value_and_score(
    model: Callable, args: tuple, kwargs: dict[str, Any], *, rng: Array, init_loc_fn: Callable, rows: int
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Points `(n, dim)` to log densities `(n,)` and gradients `(n, dim)`, all of them numpy's float64.

    Floating arguments are widened; arrays that the model holds itself are promoted. A model that insists on float32, such as one
    whose loops have states of that type, is evaluated as it is.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rng: A key.
        init_loc_fn: How each site starts.
        rows: Points are evaluated so many at a time: the function is compiled once.
    """
    try:
        with enable_x64(True):
            return _evaluator(model, *jax.tree.map(_widen, (args, kwargs)), rng, init_loc_fn, rows, jnp.float64)
    except Exception:  # anything may happen; what is wrong in float32 too is raised there
        return _evaluator(model, args, kwargs, rng, init_loc_fn, rows, None)


def _evaluator(
    model: Callable, args: tuple, kwargs: dict[str, Any], rng: Array, init_loc_fn: Callable, rows: int, dtype: Any
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    density = LogDensity(model, args, kwargs, rng=rng, init_loc_fn=init_loc_fn)
    function = jax.jit(density.value_and_score)
    function(jnp.broadcast_to(density.init, (rows, density.dim)))  # does it compile?

    def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with enable_x64(dtype is not None or jax.config.jax_enable_x64):
            padded = np.concatenate([points, np.repeat(points[-1:], -len(points) % rows, axis=0)])
            blocks = [function(jnp.asarray(b, density.init.dtype)) for b in np.split(padded, len(padded) // rows)]
            values, scores = (np.concatenate([np.asarray(a, np.float64) for a in part]) for part in zip(*blocks))
        return values[: len(points)], scores[: len(points)]

    return evaluate


def _widen(leaf: Any) -> Any:
    """Floating arrays in float64, the rest as it is."""
    if isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(leaf, jnp.float64)
    return leaf
