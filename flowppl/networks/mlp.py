"""Multilayer perceptrons, plain and masked, whose outputs lead and whose batch trails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from flowppl.backend import backend_of, backend_of_rng
from flowppl.config import Configured

Array = Any
ACTIVATIONS = {"relu": 0.5, "silu": 0.3556, "gelu": 0.4252}  # the mean of f(z)^2 at a standard normal z


@dataclass(frozen=True)
class MLP(Configured):
    """A perceptron from `(*batch, inputs)` to `(*outputs, *batch)`.

    The outputs come first, so that each of them is one contiguous block over the batch: what follows is element-wise and runs
    over long rows. The last layer starts at zero, so a bijection that is the identity at zero parameters starts as one.

    Attributes:
        inputs: Length of the input vector; 0 gives learnable constants.
        outputs: Shape of the output.
        hidden: Widths of the hidden layers.
        activation: One of "relu", "silu", "gelu".
    """

    inputs: int
    outputs: tuple[int, ...]
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "silu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws uniform weights that keep signals' scale, so that no activation starts nearly linear; zeros in the last layer.

        Where the inputs are standard normal, so is, in mean and variance, what enters each activation, but for the bias.
        He et al. 2015, "Delving deep into rectifiers", equation 9.
        """
        backend = backend_of_rng(rng)
        widths = (self.inputs, *self.hidden)
        keys, layers, of_square = backend.split(rng, len(widths)), [], 1.0
        for fan_in, fan_out, seen, key in zip(widths, widths[1:], self._seen(), keys, strict=False):
            u = 2 * backend.uniform(key, (fan_out, fan_in + 1)) - 1
            u = u * backend.asarray([[1 / math.sqrt(max(n, 1))] for n in seen], u)
            layers.append({"weight": math.sqrt(3 / of_square) * u[:, :-1], "bias": u[:, -1]})
            of_square = ACTIVATIONS[self.activation]
        rows = math.prod(self.outputs)
        layers.append({"weight": backend.xp.zeros((rows, widths[-1])), "bias": backend.xp.zeros((rows,))})
        return {"layers": tuple(layers)}

    def _seen(self) -> list[list[int]]:
        """For each unit of each hidden layer, how many units of the layer before it sees."""
        return [[fan_in] * fan_out for fan_in, fan_out in zip((self.inputs, *self.hidden), self.hidden, strict=False)]

    def __call__(self, params: dict[str, Any], x: Array) -> Array:
        """Maps x `(*batch, inputs)` to `(*outputs, *batch)`."""
        return self.apply(params, x)

    def apply(self, params: dict[str, Any], x: Array) -> Array:
        """The same from weights as they are, which a masked network masks first: for loops that mask once."""
        xp = backend_of(x).xp
        batch = x.shape[:-1]
        h = self.hidden_units(params, xp.reshape(x, (math.prod(batch), x.shape[-1])).T)
        return xp.reshape(self.last_layer(params["layers"][-1], h), (*self.outputs, *batch))

    def hidden_units(self, params: dict[str, Any], x: Array) -> Array:
        """Maps x `(inputs, n)` to the last hidden layer `(width, n)`."""
        activation = getattr(backend_of(x), self.activation)
        for layer in params["layers"][:-1]:
            x = activation(layer["weight"] @ x + layer["bias"][:, None])
        return x

    @staticmethod
    def last_layer(layer: dict[str, Any], h: Array) -> Array:
        """Maps hidden units `(width, n)` to as many outputs as the layer has rows."""
        return _spread(layer["weight"]) @ h + layer["bias"][:, None]


@dataclass(frozen=True)
class MaskedMLP(MLP):
    """A perceptron whose output i along the last output axis depends on the inputs j < i and on the context (MADE).

    The input is `(*batch, dim + context_dim)` and `outputs` is `(..., dim)`. Germain et al. 2015, "MADE", equations 8 and 9.

    Attributes:
        context_dim: Length of the context, which every output may use.
    """

    context_dim: int = 0

    def _degrees(self) -> list[list[int]]:
        """One number for each unit of each layer: a unit sees the units of the layer before whose degree is not larger."""
        dim = self.outputs[-1]
        lowest = 0 if self.context_dim or dim == 1 else 1  # degree 0 sees the context alone
        hidden = [[lowest + i % (dim - lowest) for i in range(width)] for width in self.hidden]
        last = list(range(dim)) * math.prod(self.outputs[:-1])
        return [[*range(1, dim + 1), *[0] * self.context_dim], *hidden, last]

    def _seen(self) -> list[list[int]]:
        return [[sum(b <= a for b in before) for a in after] for before, after in pairwise(self._degrees()[:-1])]

    def __call__(self, params: dict[str, Any], x: Array) -> Array:
        """Maps x `(*batch, dim + context_dim)` to `(..., dim, *batch)`."""
        return self.apply(self.mask(params), x)

    def mask(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters with zeros where a unit must not look."""
        like = params["layers"][0]["weight"]
        backend = backend_of(like)
        # From lists, not numpy arrays: torch.compile would trace those.
        degrees = [backend.asarray(d, like) for d in self._degrees()]
        layers = []
        for layer, before, after in zip(params["layers"], degrees, degrees[1:], strict=False):
            mask = backend.xp.astype(after[:, None] >= before[None], like.dtype)
            layers.append({"weight": layer["weight"] * mask, "bias": layer["bias"]})
        return {"layers": tuple(layers)}

    def by_blocks(self, masked: dict[str, Any], context: Array | None, blocks: int) -> tuple[BlockLayer, ...]:
        """The layers by blocks of coordinates, to which the units belong that see some of them and no later ones.

        Args:
            masked: What `mask` returns.
            context: `(context_dim, n)` or None; it enters the first bias.
            blocks: How many; coordinates stay in order, and rows and columns of zeros fill up the blocks.
        """
        like, dim = masked["layers"][0]["weight"], self.outputs[-1]
        backend = backend_of(like)
        xp, size = backend.xp, -(-dim // blocks)
        groups = [backend.asarray(list(indices), like) for indices in _grouped(self, size)]

        def take(a: Array, indices: Array, axis: int) -> Array:
            zeros = xp.zeros_like(a[:1] if axis == 0 else a[:, :1])
            return xp.take(xp.concat([a, zeros], axis=axis), indices, axis=axis)

        # not xp.eye with a device, which jax's tracers do not have
        eye = backend.asarray([[float(i == j) for j in range(blocks)] for i in range(blocks)], like)[:, None, :, None]
        layers = []
        for layer, before, after in zip(masked["layers"], groups, groups[1:], strict=False):
            weight, bias = layer["weight"], layer["bias"][:, None]
            if layer is masked["layers"][-1]:
                weight = _spread(weight)
            if layer is masked["layers"][0] and context is not None:
                weight, bias = weight[:, :dim], bias + weight[:, dim:] @ context
            weight = take(take(weight, after, 0), before, 1)
            own = xp.sum(xp.reshape(weight, (blocks, -1, blocks, weight.shape[1] // blocks)) * eye, axis=2)
            bias = xp.reshape(take(bias, after, 0), (*own.shape[:2], bias.shape[1]))
            layers.append(BlockLayer(own, xp.reshape(weight, (blocks, -1, weight.shape[1])), bias))
        return tuple(layers)


class BlockLayer(NamedTuple):
    """One layer of a masked network by blocks, which lead."""

    own: Array  # (blocks, u, v): from a block's units to its own
    all: Array  # (blocks, u, blocks v): from the units of all blocks
    bias: Array  # (blocks, u, 1 or n)


def _grouped(net: MaskedMLP, size: int) -> list[tuple[int, ...]]:
    """For the coordinates and each layer's units: their indices, block by block, and one past the last where a block has fewer.

    A unit belongs to the block of the last coordinate that it sees, an output to that of the coordinate that it is for.
    """
    inputs, *hidden, last = net._degrees()
    dim = net.outputs[-1]
    owners = [[d - 1 for d in inputs[:dim]], *([max(d - 1, 0) for d in degrees] for degrees in hidden), last]
    grouped = []
    for owner in owners:
        blocks: list[list[int]] = [[] for _ in range(-(-dim // size))]
        for i, coordinate in enumerate(owner):
            blocks[coordinate // size].append(i)
        width = max(map(len, blocks))
        grouped.append(tuple(i for block in blocks for i in (*block, *[len(owner)] * (width - len(block)))))
    return grouped


def _spread(weight: Array) -> Array:
    """The last layer's weights: Adam moves each alike, and so, without this, the outputs in proportion to the width."""
    return weight * (1 / math.sqrt(weight.shape[1] or 1))
