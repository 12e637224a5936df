"""Draws as ArviZ data, for both generations of ArviZ."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowppl.errors import DimensionError, MissingExtraError


def inference_data(groups: dict[str, dict[str, Any]]) -> Any:
    """Builds what the installed ArviZ works with: an `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x).

    Args:
        groups: Arrays `(chain, draw, *shape)` by group ("posterior", "sample_stats", ...) and variable; "observed_data"
            holds plain arrays. Empty groups are left out.

    Raises:
        DimensionError: an array lacks the axes of chains and draws.
        MissingExtraError: ArviZ is not installed.
    """
    groups = {group: {k: np.asarray(v) for k, v in arrays.items()} for group, arrays in groups.items() if arrays}
    for group, arrays in groups.items():
        for name, array in arrays.items():
            if group != "observed_data" and array.ndim < 2:
                raise DimensionError(f"{group}[{name!r}]: expected shape (chain, draw, ...), got {array.shape}")
    try:
        import arviz
    except ModuleNotFoundError as error:
        raise MissingExtraError("arviz", "arviz") from error
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)
