"""Masked perceptrons with a few units for each coordinate, in which each coordinate acts on its own units monotonically."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowppl.backend import backend_of, backend_of_rng
from flowppl.config import Configured

Array = Any

MIN_SLOPE = 0.1  # of the map, and of the activation
_BOUND = 3.0  # of the logarithms of the weights in diagonal blocks


class Block(NamedTuple):
    """One layer from b to a units for each of dim coordinates."""

    diagonal: Array  # (dim, a, b): from a coordinate's units to its own
    earlier: Array  # (dim a, dim b): from units of the coordinates before, zero elsewhere
    bias: Array  # (dim a, 1), or (dim a, n) for n points


@dataclass(frozen=True)
class BlockMLP(Configured):
    """y_i = x_i + h_i(x_1 ... x_i) with slopes dy_i/dx_i between 0.1 and 18.2: in coordinates, triangular and increasing.

    The layers of De Cao, Titov and Aziz 2019, "Block neural autoregressive flow", equations 5 to 11: weights within a coordinate's
    block are positive, those on units of earlier coordinates are free, and the diagonal of the Jacobian is a product of small
    matrices. Two things differ, for the sake of an inverse everywhere. The activation 0.1 a + 0.9 tanh(a) never goes flat, so that
    this product needs no logarithms. And beside x itself, instead of a gate, the last layer's weights in the block are

        w_k = 0.9 / (a s_k) (exp(r_k) - 1) > -0.9 / (a s_k)

    where s_k bounds the slope of unit k of a: negative ones leave the slope above 0.1, and r = 0 is the identity, with gradients.

    Attributes:
        dim: Length of the vectors.
        hidden: Units of each hidden layer for each coordinate; at least one layer.
    """

    dim: int
    hidden: tuple[int, ...] = (8, 8)

    def __post_init__(self) -> None:
        if not self.hidden:
            raise ValueError("hidden must name the units per coordinate of at least one hidden layer, got ()")

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws gains within a factor e and kinks about where a standard normal has its mass; zeros in the last layer."""
        backend = backend_of_rng(rng)
        d, widths = self.dim, (1, *self.hidden)
        layers = []
        for b, a, key in zip(widths, self.hidden, backend.split(rng, len(self.hidden)), strict=False):
            block_key, weight_key, bias_key = backend.split(key, 3)
            layers.append(
                {
                    "diagonal": 2 * backend.uniform(block_key, (d, a, b)) - 1,
                    "weight": (2 * backend.uniform(weight_key, (d * a, d * b)) - 1) / math.sqrt(d * b),
                    "bias": (2 * backend.uniform(bias_key, (d * a,)) - 1) * (2 if b == 1 else 1),
                }
            )
        zeros = backend.xp.zeros((d, d * widths[-1]))
        last = backend.xp.zeros((d, 1, widths[-1]))
        return {"layers": (*layers, {"diagonal": last, "weight": zeros, "bias": zeros[:, 0]})}

    def constrain(self, params: dict[str, Any]) -> tuple[Block, ...]:
        """The layers with their signs, masks and bounds."""
        like = params["layers"][0]["weight"]
        backend = backend_of(like)
        xp = backend.xp
        widths = (1, *self.hidden, 1)
        # From lists, not numpy arrays: torch.compile would trace those.
        owners = [backend.asarray([float(i) for i in range(self.dim) for _ in range(width)], like) for width in widths]
        blocks, largest = [], xp.ones_like(like[: self.dim, :1, None])  # slopes of units, (dim, b, 1)
        for i, layer in enumerate(params["layers"]):
            b, raw = widths[i], layer["diagonal"]
            raw = raw / (1 + xp.abs(raw) * (1 / _BOUND))
            earlier = layer["weight"] * xp.astype(owners[i + 1][:, None] > owners[i][None], like.dtype)
            if i < len(self.hidden):
                diagonal = xp.exp(raw) / b
                largest = diagonal @ largest
            else:
                diagonal = (1 - MIN_SLOPE) / b * xp.expm1(raw) / xp.permute_dims(largest, (0, 2, 1))
                # Adam moves every weight alike, so without this a step would move y in proportion to the width.
                earlier = earlier / math.sqrt(self.dim * b)
            blocks.append(Block(diagonal, earlier, layer["bias"][:, None]))
        return tuple(blocks)

    @staticmethod
    def apply(
        blocks: tuple[Block, ...], x: Array, offsets: tuple[Array, ...] | None = None
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """Maps x `(dim, n)` to y and dy_i/dx_i, both `(dim, n)`, and what earlier coordinates and biases add to each layer.

        Given these offsets, the coordinates are independent of each other, and the cost is linear in their number.
        """
        xp = backend_of(x).xp
        units, used, n = x[:, None, :], [], x.shape[-1]
        slopes = xp.ones_like(units)
        for i, (diagonal, earlier, bias) in enumerate(blocks):
            d, a, b = diagonal.shape
            if offsets is None:
                offset = xp.reshape(earlier @ xp.reshape(units, (d * b, n)) + bias, (d, a, n))
            else:
                offset = offsets[i]
            used.append(offset)
            units, slopes = diagonal @ units + offset, diagonal @ slopes
            if i + 1 < len(blocks):
                bent = xp.tanh(units)
                units = MIN_SLOPE * units + (1 - MIN_SLOPE) * bent
                slopes = (MIN_SLOPE + (1 - MIN_SLOPE) * (1 - bent * bent)) * slopes
        return x + units[:, 0, :], 1 + slopes[:, 0, :], tuple(used)
