"""Perceptrons whose Lipschitz constant is bounded by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.config import Configured

Array = Any
Layers = tuple[tuple[Array, Array], ...]  # (weight, bias) of each

_SQUARINGS = 5


def spectral_bound(weight: Array) -> Array:
    """An upper bound of the largest singular value, of a matrix with m rows or columns at most m^(1/128) times too large.

    Gram iteration: ||W||^2 = ||A|| for A = W^T W, and ||A|| <= ||A^(2^k)||_F^(2^-k), here with k = 5. The powers are rescaled on
    the way. Deterministic, without a state, and differentiable to any order, at zero too. Delattre et al. 2023, "Efficient bound
    of Lipschitz constant for convolutional layers by Gram iteration", theorem 3.1 and algorithm 1.
    """
    backend = backend_of(weight)
    xp = backend.xp
    size = backend.stop(xp.max(xp.abs(weight)))  # no derivative: the bound is homogeneous, so the size cancels
    w = weight / xp.where(size > 0, size, xp.ones_like(size))
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    log_bound = xp.zeros_like(size)
    for k in range(_SQUARINGS + 1):
        square = xp.sum(gram * gram)
        norm = xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))
        log_bound = log_bound + xp.log(norm) / 2**k
        gram = gram / norm
        gram = gram @ gram
    return size * xp.exp(log_bound / 2)


@dataclass(frozen=True)
class LipschitzMLP(Configured):
    """g(x) = W_n s(... s(W_1 x + b_1) ...) + b_n from `(*batch, dim)` to itself, with |g(x) - g(x')| <= lipschitz |x - x'|.

    Each weight matrix is divided by max(1, bound / limit), where `spectral_bound` bounds its norm and the limits' product is
    `lipschitz`; s(a) = a sigmoid(a) / 1.1 has slopes within one. The last layer starts at zero. Behrmann et al. 2019,
    "Invertible residual networks", equation 2; Chen et al. 2019, "Residual flows", section 3.3.

    Attributes:
        dim: Length of the vectors.
        hidden: Widths of the hidden layers, at least one.
        lipschitz: The bound, positive.
    """

    dim: int
    hidden: tuple[int, ...] = (64, 64)
    lipschitz: float = 0.9

    def __post_init__(self) -> None:
        if not self.hidden:
            raise ValueError("hidden must name the width of at least one hidden layer, got ()")
        if not self.lipschitz > 0:
            raise ValueError(f"lipschitz must be positive, got {self.lipschitz}")

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws weights uniformly within the inverse root of the fan-in; zeros in the last layer."""
        backend = backend_of_rng(rng)
        widths = (self.dim, *self.hidden)
        layers = []
        for fan_in, fan_out, key in zip(widths, self.hidden, backend.split(rng, len(self.hidden)), strict=False):
            u = (2 * backend.uniform(key, (fan_out, fan_in + 1)) - 1) / math.sqrt(fan_in)
            layers.append({"weight": u[:, :-1], "bias": u[:, -1]})
        zeros = backend.xp.zeros((self.dim, widths[-1]))
        layers.append({"weight": zeros, "bias": zeros[:, 0]})
        return {"layers": tuple(layers)}

    def constrain(self, params: dict[str, Any]) -> Layers:
        """The weights within their limits, and the biases."""
        limit = self.lipschitz ** (1 / len(params["layers"]))
        layers = []
        for i, layer in enumerate(params["layers"]):
            weight = layer["weight"]
            if i == len(self.hidden):
                # Adam moves every weight alike, so without this a step would move g in proportion to the width.
                weight = weight * (1 / math.sqrt(weight.shape[1]))
            excess = spectral_bound(weight) / limit
            xp = backend_of(weight).xp
            layers.append((weight / xp.maximum(excess, xp.ones_like(excess)), layer["bias"]))
        return tuple(layers)

    @staticmethod
    def apply(layers: Layers, x: Array) -> tuple[Array, tuple[Array, ...]]:
        """g(x), and the slopes of the activations of each hidden layer: dg/dx = W_n diag(s_(n-1)) ... diag(s_1) W_1."""
        xp = backend_of(x).xp
        slopes = []
        for weight, bias in layers[:-1]:
            a = x @ weight.T + bias
            sigmoid = 0.5 + 0.5 * xp.tanh(0.5 * a)
            x = a * sigmoid / 1.1  # sup of the slope below: 1.0999
            slopes.append(sigmoid * (1 + a * (1 - sigmoid)) / 1.1)
        weight, bias = layers[-1]
        return x @ weight.T + bias, tuple(slopes)

    @staticmethod
    def pull(layers: Layers, slopes: tuple[Array, ...], u: Array, first: int = 0, last: int | None = None) -> Array:
        """Takes u at the outputs of layer `last` (None: the last one) through the transposed Jacobian to the inputs of `first`.

        The inputs of a layer that is not the first one are counted in front of their activation.
        """
        last = len(layers) - 1 if last is None else last
        for i in range(last, first - 1, -1):
            u = u @ layers[i][0]
            u = u * slopes[i - 1] if i else u
        return u
