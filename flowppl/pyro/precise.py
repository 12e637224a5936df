"""A model's log density for numpy code, evaluated in float64 also where the model runs in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from flowppl.pyro.density import LogDensity


def value_and_score(
    model: Callable, args: tuple, kwargs: dict[str, Any], *, rng: torch.Generator | None, init_loc_fn: Callable
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Points `(n, dim)` to log densities `(n,)` and gradients `(n, dim)`, all of them numpy's float64.

    Floating arguments are widened, and what the model makes itself is float64 by torch's default type of the moment. A model that
    insists on float32, such as one with a network of that type, is evaluated as it is.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rng: A `torch.Generator` (None: torch's global one).
        init_loc_fn: How each site starts.
    """
    try:
        with _default(torch.float64):
            return _evaluator(model, _widen(args), _widen(kwargs), rng, init_loc_fn, torch.float64)
    except Exception:  # anything may happen; what is wrong in float32 too is raised there
        return _evaluator(model, args, kwargs, rng, init_loc_fn, torch.get_default_dtype())


def _evaluator(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    rng: torch.Generator | None,
    init_loc_fn: Callable,
    dtype: torch.dtype,
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    density = LogDensity(model, args, kwargs, rng=rng, init_loc_fn=init_loc_fn)
    start = density.init if dtype is not torch.float64 else density.init.double()

    def evaluate(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with _default(dtype):
            found = density.value_and_score(torch.as_tensor(points).to(start))
        values, scores = (a.detach().double().cpu().numpy() for a in found)
        return values, scores

    evaluate(start[None].cpu().numpy())
    return evaluate


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widen(tree: Any) -> Any:
    """Floating tensors in float64, the rest as it is."""
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _widen(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_widen, tree))
    return tree
