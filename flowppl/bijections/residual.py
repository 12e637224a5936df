"""Contractive residual maps, of a Jacobian without structure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast
from flowppl.bijections.elementwise import event_last
from flowppl.bijections.solves import fixed_point
from flowppl.networks.lipschitz import Layers, LipschitzMLP
from flowppl.networks.mlp import MLP


@dataclass(frozen=True)
class Residual(Bijection):
    """y = x + g(x; context), where g has a Lipschitz constant in x of at most `contraction`: invertible, all coordinates at once.

    Behrmann et al. 2019, "Invertible residual networks"; Chen et al. 2019, "Residual flows for invertible generative modeling".
    The log-determinant is exact, by the determinant of a matrix as wide as the narrowest of x and the hidden layers; for high
    dimensions see `roulette_log_det`. The inverse is the fixed point of x = y - g(x).

    Attributes:
        dim: Length of the vectors.
        context_dim: Length of the context; given one, a network shifts g's first hidden layer and its values.
        hidden: Widths of the hidden layers, of g and of that network.
        contraction: The bound, less than one. The inverse's sweeps shrink the error by this factor or a smaller one.
    """

    dim: int
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)
    contraction: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.contraction < 1:
            raise ValueError(f"contraction must be between 0 and 1, got {self.contraction}")
        _ = self._g  # checks the widths

    @property
    def _g(self) -> LipschitzMLP:
        return LipschitzMLP(self.dim, self.hidden, self.contraction)

    @property
    def _net(self) -> MLP:
        return MLP(self.context_dim, (self.hidden[0] + self.dim,), self.hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        key, net_key = backend_of_rng(rng).split(rng, 2)
        params = {"g": self._g.init(key)}
        if self.context_dim:
            params["net"] = self._net.init(net_key)
        return {"params": params, "const": {}}

    def layers(self, params: Params, context: Array | None) -> Layers:
        """Those of g, the context's shifts in the first and the last bias."""
        layers = self._g.constrain(params["g"])
        if context is None:
            return layers
        shift = event_last(self._net(params["net"], context))
        inner, outer = shift[..., : self.hidden[0]], shift[..., self.hidden[0] :]
        (weight, bias), *middle, (last_weight, last_bias) = layers
        return ((weight, bias + inner), *middle, (last_weight, last_bias + outer))

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.context_dim)
        layers = self.layers(params, context)
        g, slopes = self._g.apply(layers, x)
        return x + g, _log_det(self._turned(layers, slopes))

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: after n sweeps the error is at most contraction^n / (1 - contraction) times |g(y)|."""
        xp = backend_of(y).xp
        y, context = broadcast(y, context, self.context_dim)
        layers, apply = self.layers(params, context), self._g.apply
        eps = float(xp.finfo(y.dtype).eps)
        x = fixed_point(
            lambda args, x: args[1] - apply(args[0], x)[0],
            (layers, y),
            y,
            max_steps=math.ceil(math.log(eps * (1 - self.contraction)) / math.log(self.contraction)),
            tol=8 * eps,
        )
        return x, -_log_det(self._turned(layers, apply(layers, x)[1]))

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """With J = P Q, (I + J)^-T = I - Q^T (I + Q P)^-T P^T: one small solve (Woodbury's formula)."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        fixed, cut = backend.stop(params), self._cut

        def evaluate(x: Array, *context: Array) -> tuple[tuple[Array, Array], Any]:
            layers = self.layers(fixed, context[0] if context else None)
            g, slopes = self._g.apply(layers, x)
            turned = self._turned(layers, slopes)
            return (g, _log_det(turned)), (layers, slopes, turned)

        primals = backend.stop((x,) if own_context is None else (x, own_context))
        (g, ones), pull, (layers, slopes, turned) = backend.vjp(evaluate, *primals, has_aux=True, once=True)
        ones = xp.ones_like(ones)
        rest = backend.stop(score) - pull((0 * g, ones))[0]
        inner = self._g.pull(layers, slopes, rest, first=cut)
        inner = xp.linalg.solve(turned, inner[..., None])[..., 0]
        score = backend.stop(rest - self._g.pull(layers, slopes, inner, last=cut - 1))
        y, log_det = self.forward(params, x, own_context)
        if own_context is not None:
            score_context = backend.stop(score_context - pull((score, ones))[1])
        return y, log_det, score, score_context

    @property
    def _cut(self) -> int:
        """The layer with the fewest inputs, where J = P Q is cut in two: P is that layer and what follows."""
        widths = (self.dim, *self.hidden)
        return min(range(len(widths)), key=widths.__getitem__)

    def _turned(self, layers: Layers, slopes: tuple[Array, ...]) -> Array:
        """(I + Q P)^T, of the determinant of I + P Q; P and Q are products of the layers' weights and slopes."""
        weights = [weight for weight, _ in layers]
        factors: list[tuple[Array | None, Array]] = list(zip((None, *slopes), weights, strict=True))
        if self._cut:
            # the first layer follows the last one, without an activation in between: one matrix for all points
            factors = [*factors[1:-1], (slopes[-1], weights[0] @ weights[-1])]
            factors = factors[self._cut - 1 :] + factors[: self._cut - 1]
        (slope, weight), *others = factors
        product = weight.T if slope is None else slope[..., :, None] * weight.T
        for slope, weight in others:
            product = (product * slope[..., None, :]) @ weight.T  # type: ignore[index]
        xp = backend_of(product).xp
        return product + xp.tril(xp.triu(xp.ones_like(product)))  # on its device, under tracing too


def _log_det(matrix: Array) -> Array:
    return backend_of(matrix).xp.linalg.slogdet(matrix)[1]
