"""A posterior and the training that led to it, as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowppl.errors import MissingExtraError

_MOST = 16  # scalars


def picture(samples: Mapping[str, np.ndarray], weights: np.ndarray, history: Sequence[Any]) -> Any:
    """Histograms of up to sixteen scalars, raw draws in outline and reweighted ones filled, and the ELBO by chunks of steps.

    Args:
        samples: Arrays `(n, *shape)` by site.
        weights: `(n,)`, summing to one.
        history: Records of training.

    Returns:
        A matplotlib figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise MissingExtraError("matplotlib", "plots") from missing

    scalars = [
        (site + (f"[{', '.join(map(str, index))}]" if index else ""), np.asarray(x)[(slice(None), *index)])
        for site, x in samples.items()
        for index in np.ndindex(np.shape(x)[1:])
    ][:_MOST]
    panels = len(scalars) + bool(history)
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(3 * columns, 2.2 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, x) in zip(axes, scalars, strict=False):
        low, high = np.quantile(x, [0.001, 0.999])
        bins = np.linspace(low, high, 50) if high > low else 10
        axis.hist(x, bins, weights=weights, density=True, color="C0", alpha=0.5, label="reweighted")
        axis.hist(x, bins, density=True, histtype="step", color="C1", label="draws of the flow")
        axis.set(title=name, yticks=[])
    if history:
        axis = axes[panels - 1]
        kept = [(i + 1, record.elbo, record.elbo_error) for i, record in enumerate(history) if record.kept]
        chunk, elbo, error = zip(*kept, strict=True)
        axis.errorbar(chunk, elbo, np.multiply(2, error), color="C2", marker=".")
        axis.set(title="ELBO by chunks of steps")
    for axis in axes[panels:]:
        axis.set_axis_off()
    axes[0].legend(fontsize="small")
    return figure
