"""Parameters away from the identity: networks drawn as torch draws them, and flows fitted briefly to data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.tabular import table
from flowppl import tree
from flowppl.bijections import Bijection, Inverse, bind
from flowppl.flows import Flow

BATCH, RATE, CLIP_NORM = 256, 1e-3, 10.0  # polynomials of outliers overflow at three times the rate


def drawn(bijection: Bijection, seed: int, scale: float) -> Any:
    """Float32 parameters in numpy: every layer of every network as torch draws it, the last one too, times `scale`.

    What is not in a network (the vectors of a planar map, say) is normal times `scale`.
    """
    rng = np.random.default_rng(seed)
    return tree.map(lambda a: np.asarray(a, np.float32), _drawn(bijection.init(rng)["params"], rng, scale))


def _drawn(params: Any, rng: np.random.Generator, scale: float) -> Any:
    if isinstance(params, tuple):
        return tuple(_drawn(p, rng, scale) for p in params)
    if not isinstance(params, dict):
        return scale * rng.standard_normal(np.shape(params))
    layers = params.get("layers", ())
    rest = {k: _drawn(p, rng, scale) for k, p in params.items() if k != "layers"}
    return {**rest, "layers": tuple(_layer(p, rng, scale, p is layers[-1]) for p in layers)} if layers else rest


def _layer(layer: dict[str, Any], rng: np.random.Generator, scale: float, last: bool) -> dict[str, Any]:
    bound = scale / np.sqrt(layer["weight"].shape[-1])
    # flowppl's networks divide the last layer's weights by the root of the width
    bounds = {"weight": scale if last else bound, "bias": bound}
    return {
        k: rng.uniform(-bounds[k], bounds[k], a.shape) if k in bounds else scale * rng.standard_normal(a.shape)
        for k, a in layer.items()
    }


def data(dim: int) -> np.ndarray:
    """Standardised float32 rows: 64 pixels of handwritten digits with uniform noise, or the first columns of a table."""
    if dim == 64:
        from sklearn.datasets import load_digits

        x = load_digits().data
        x = x + np.random.default_rng(2).random(x.shape)
    else:
        x = table("diabetes")[:, :dim]
    x = x[np.random.default_rng(1).permutation(len(x))]
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def fitted(bijection: Bijection, x: np.ndarray, steps: int, seed: int = 0) -> Any:
    """Float32 arguments in numpy for a bijection that takes rows of x to a standard normal, after some steps of Adam."""
    flow = Flow(Inverse(bijection))
    variables = flow.init(torch.Generator().manual_seed(seed))
    leaves = [p.requires_grad_() for p in tree.leaves(variables["params"])]
    adam, rng = torch.optim.Adam(leaves, lr=RATE), np.random.default_rng(seed)
    for _ in range(steps):
        batch = torch.as_tensor(x[rng.integers(len(x), size=BATCH)])
        adam.zero_grad()
        (-flow.log_prob(variables, batch).mean()).backward()
        if torch.nn.utils.clip_grad_norm_(leaves, CLIP_NORM).isfinite():
            adam.step()
    return tree.map(lambda p: p.detach().numpy(), bind(variables)["bijection"])
