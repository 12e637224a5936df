"""A diffusion with a learned drift as a layer: Euler-Maruyama there, Brownian bridges back.

Zhang & Chen 2022, "Path integral sampler", section 3; Vargas, Grathwohl & Doucet 2023, "Denoising diffusion samplers".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import Array, backend_of
from flowppl.config import Configured
from flowppl.networks import MLP


@dataclass(frozen=True)
class Diffusion(Configured):
    """A stochastic map: a Brownian motion with a drift that a network learns, and that without one seen backwards.

    The clock is the variance v of the Brownian motion that starts at zero, which at `start` is a normal base of that variance:

        there  x' = x + drift(x, v) dv + sqrt(dv) noise,    back  x = x' v / v' + sqrt(dv v / v') noise.

    The drift starts at zero, where paths from that base and back from N(0, end) are the same.

    Attributes:
        dim: Length of the vectors.
        end: The variance at the end.
        start: That at the start, one after a standard normal base.
        steps: How many.
        hidden: Widths of the network.

    Raises:
        ValueError: the variances do not increase from above zero, or there are no steps.
    """

    dim: int
    end: float = 4.0
    start: float = 1.0
    steps: int = 16
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end:
            raise ValueError(f"expected 0 < start < end, got start={self.start}, end={self.end}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def _network(self) -> MLP:
        return MLP(self.dim + 1, (self.dim,), self.hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """The network's weights."""
        return {"params": self._network.init(rng), "const": {}}

    def forward(self, rng: Any, params: Any, x: Array) -> tuple[Array, Array]:
        """Points `(n, dim)` at the end, and the log density of the way back over that of the way there, `(n,)`."""
        return self._walk(rng, params, x, back=False)

    def backward(self, rng: Any, params: Any, x: Array) -> tuple[Array, Array]:
        """Points at the start, and the log density of the way there over that of the way back."""
        return self._walk(rng, params, x, back=True)

    def _walk(self, rng: Any, params: Any, x: Array, back: bool) -> tuple[Array, Array]:
        backend = backend_of(x)
        xp = backend.xp
        dv = (self.end - self.start) / self.steps
        clock = backend.asarray([self.start + k * dv for k in range(self.steps)], x)

        def log_normal(gap: Array, variance: Array) -> Array:
            return -0.5 * xp.sum(gap * gap, axis=-1) / variance - 0.5 * self.dim * xp.log(2 * math.pi * variance)

        def one(carry: tuple, v: Array) -> tuple[tuple, Array]:
            x, ratio, rng = carry
            key, rng = backend.split(rng, 2)
            noise = backend.normal(key, tuple(x.shape), like=x)
            shrink = v / (v + dv)
            old, new = x, x
            if back:
                old = shrink * x + xp.sqrt(dv * shrink) * noise
            drift = dv * self._drift(params, old, v)
            if not back:
                new = old + drift + math.sqrt(dv) * noise
            there = log_normal(new - old - drift, dv + 0 * v)
            home = log_normal(old - shrink * new, dv * shrink)
            return (old if back else new, ratio + (there - home if back else home - there), rng), v

        (x, ratio, _), _ = backend.scan(one, (x, xp.zeros_like(x[:, 0]), rng), clock, reverse=back)
        return x, ratio

    def _drift(self, params: Any, x: Array, v: Array) -> Array:
        xp = backend_of(x).xp
        clock = xp.zeros_like(x[:, :1]) + xp.log(v)
        return self._network(params, xp.concat([x, clock], axis=-1)).T
