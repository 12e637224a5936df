"""Where each site lives in a flat vector."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

Array = Any


class Layout:
    """Sites in the order of their names, each raveled.

    Args:
        example: One array per site, as shapes and dtype.

    Attributes:
        names: The sites.
        sizes: Their numbers of elements.
        dim: Their sum.
    """

    def __init__(self, example: dict[str, Array]) -> None:
        self.names = sorted(example)
        self.shapes = {name: tuple(jnp.shape(example[name])) for name in self.names}
        self.sizes = [math.prod(self.shapes[name]) for name in self.names]
        self.dim = sum(self.sizes)

    def pack(self, values: dict[str, Array]) -> Array:
        """`(*batch, dim)` from arrays `(*batch, *shape)`."""
        batches = {name: jnp.shape(v)[: jnp.ndim(v) - len(self.shapes[name])] for name, v in values.items()}
        return jnp.concatenate([jnp.reshape(values[n], (*batches[n], -1)) for n in self.names], axis=-1)

    def unpack(self, vector: Array) -> dict[str, Array]:
        """Arrays `(*batch, *shape)` from `(*batch, dim)`."""
        batch, values, start = vector.shape[:-1], {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            values[name] = vector[..., start : start + size].reshape(*batch, *self.shapes[name])
            start += size
        return values
