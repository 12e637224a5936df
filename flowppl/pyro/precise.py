"""A model's log density for numpy code, evaluated in float64 also where the model runs in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from flowppl.pyro.density import LogDensity


class Precise:
    """Points `(n, dim)` to log densities `(n,)` and gradients `(n, dim)`, all of them numpy's float64.

    Floating arguments are widened, and what the model makes itself is float64 by torch's default type of the moment. A model that
    insists on float32, such as one with a network of that type, is evaluated as it is.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rng: A `torch.Generator` (None: torch's global one).
        init_loc_fn: How each site starts.

    Attributes:
        density: In this precision.
        args: The model's arguments in this precision.
        kwargs: Its keyword arguments.
        start: A start `(dim,)`, whose dtype and device are those of the evaluation.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        rng: torch.Generator | None = None,
        init_loc_fn: Callable,
    ) -> None:
        for dtype in (torch.float64, torch.get_default_dtype()):
            self._dtype, wide = dtype, dtype is torch.float64
            self.args: Any
            self.kwargs: Any
            self.args, self.kwargs = (_widen(args), _widen(kwargs)) if wide else (args, kwargs)
            try:
                with self.context():
                    self.density = LogDensity(model, self.args, self.kwargs, rng=rng, init_loc_fn=init_loc_fn)
                    self.start = self.density.init.double() if wide else self.density.init
                    self(self.start[None].cpu().numpy())
                return
            except Exception:  # anything may happen; what is wrong in float32 too is raised there
                if not wide or torch.get_default_dtype() is dtype:
                    raise

    @contextmanager
    def context(self) -> Iterator[None]:
        """The precision in which torch is to compute with the model."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def __call__(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Evaluates the points."""
        with self.context():
            found = self.density.value_and_score(torch.as_tensor(points).to(self.start))
        values, scores = (a.detach().double().cpu().numpy() for a in found)
        return values, scores


def _widen(tree: Any) -> Any:
    """Floating tensors in float64, the rest as it is."""
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _widen(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_widen, tree))
    return tree
