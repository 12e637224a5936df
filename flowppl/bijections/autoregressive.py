"""Masked-autoregressive maps: coordinate i depends on the coordinates before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.base import Array, Bijection, Params, broadcast, join
from flowppl.bijections.elementwise import Transformer, event_first, event_last
from flowppl.bijections.nilpotent import nilpotent_solve
from flowppl.bijections.solves import iterate
from flowppl.networks import MaskedMLP


@dataclass(frozen=True)
class MaskedAutoregressive(Bijection):
    """y_i = tau(x_i; net_i(x_1 ... x_{i-1}, context)): sampling is one pass (an inverse autoregressive flow).

    Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow". `Inverse` of it scores in one pass
    instead (a masked autoregressive flow, Papamakarios et al. 2017).

    Attributes:
        dim: Length of the vectors.
        transformer: The monotone map of each coordinate.
        context_dim: Length of the context, 0 for none.
        hidden: Widths of the masked network's hidden layers.
        activation: Its activation, "relu", "silu" or "gelu".
        tol: The inverse's sweeps end when no coordinate changes by more than tol (1 + |x|); at least four units of rounding.
    """

    dim: int
    transformer: Transformer
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "silu"
    tol: float = 0.0

    @property
    def _net(self) -> MaskedMLP:
        outputs = (self.transformer.num_params, self.dim)
        return MaskedMLP(self.dim + self.context_dim, outputs, self.hidden, self.activation, self.context_dim)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        return {"params": {"net": self._net.init(rng)}, "const": {}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`: one network call."""
        x, context = broadcast(x, context, self.context_dim)
        y, log_slope = self.transformer.forward(self._net(params["net"], join(x, context)), event_first(x))
        return event_last(y), backend_of(x).xp.sum(log_slope, axis=0)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: blocks of coordinates one after the other, each by Jacobi sweeps.

        A sweep inverts all coordinates of a block given what the last sweep left. Coordinate i of a block is exact after sweep i
        whatever the others are, so as many sweeps as the block has coordinates are the sequential inverse; they end as soon as none
        changes by more than `tol`, which is far earlier where the dependence is not extreme. Derivatives are implicit. Song et al.
        2021, "Accelerating feedforward computation via parallel nonlinear equation solving", algorithms 1 and 3.
        """
        backend = backend_of(y)
        xp = backend.xp
        y, context = broadcast(y, context, self.context_dim)
        masked = self._net.mask(params["net"])

        def invert(masked: Params, y: Array, context: Array | None, x: Array) -> tuple[Array, Array]:
            theta = self._net.apply(masked, join(x, context))
            return self.transformer.inverse(theta, event_first(y))

        x = self._solve(*backend.stop((masked, y, context)))
        x = backend.implicit(
            lambda args, x: event_last(invert(args[0], args[1], args[2], x)[0]),
            (masked, y, context),
            x,
            max_steps=self.dim,
            tol=4 * float(xp.finfo(y.dtype).eps),
        )
        return x, xp.sum(invert(masked, y, context, x)[1], axis=0)

    def _solve(self, masked: Params, y: Array, context: Array | None) -> Array:
        """The inverse's values; coordinates lead and the batch is flat. A block's sweeps run that block's hidden units alone."""
        backend, net = backend_of(y), self._net
        xp, blocks, size = backend.xp, self._blocks, -(-self.dim // self._blocks)
        largest = float(xp.finfo(y.dtype).max) ** 0.4  # a mask's zero times infinity would spoil the exact coordinates
        tol = max(self.tol, 4 * float(xp.finfo(y.dtype).eps))
        activation = getattr(backend, self.activation)

        def flat(a: Array) -> Array:
            return event_first(xp.reshape(a, (-1, a.shape[-1])))

        target = flat(y)
        n = target.shape[-1]
        zero = xp.zeros_like(target[:1])
        target = xp.reshape(xp.concat([target] + [zero] * (blocks * size - self.dim), axis=0), (blocks, size, n))
        layers = net.by_blocks(masked, None if context is None else flat(context), blocks)
        which = backend.asarray(list(range(blocks)), y)

        def block(state: tuple[Array, ...], row: tuple[Array, Any, Array]) -> tuple[tuple[Array, ...], None]:
            # the state: coordinates, then units of each hidden layer, zeros from this block on
            index, layers, target = row
            here = (which == index)[:, None, None]
            fixed = [
                layer.all @ xp.reshape(a, (layer.all.shape[-1], n)) + layer.bias
                for layer, a in zip(layers, state, strict=True)
            ]

            def units(own: Array) -> list[Array]:
                found = [own]
                for layer, offset in zip(layers[:-1], fixed, strict=False):
                    found.append(activation(layer.own @ found[-1] + offset))
                return found

            def sweep(own: Array) -> Array:
                theta = xp.reshape(layers[-1].own @ units(own)[-1] + fixed[-1], (self.transformer.num_params, size, n))
                return xp.clip(self.transformer.inverse(theta, target)[0], -largest, largest)

            own = iterate(
                sweep, xp.clip(target, -largest, largest), max_steps=size, tol=tol, method="jacobi", exact=True
            )
            return tuple(xp.where(here, new, old) for new, old in zip(units(own), state, strict=True)), None

        widths = [layer.own.shape[-1] for layer in layers]
        start = tuple(xp.broadcast_to(zero, (blocks, width, n)) for width in widths)
        (x, *_), _ = backend.scan(block, start, (which, layers, target))
        return xp.reshape(event_last(xp.reshape(x, (blocks * size, n))[: self.dim]), tuple(y.shape))

    @property
    def _blocks(self) -> int:
        """Small blocks take few sweeps, large ones make full use of a call: where the maps are cheap, those of the network."""
        return max(1, min(self.dim // (32 if self.transformer.num_params <= 4 else 16), 16))

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Solves J^T g' = g - d log|det J| / dx; J^T is diagonal plus nilpotent, so Jacobi sweeps end after dim at the latest."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        inputs = join(x, own_context)
        fixed, at = backend.stop(params), backend.stop(x)

        def through_net(inputs: Array) -> tuple[tuple[Array, Array], Array]:
            theta = self._net(fixed["net"], inputs)
            y, log_slope, curvature = self.transformer.forward_with_curvature(theta, event_first(at))
            return (y, log_slope), (log_slope, curvature)

        _, pull, (log_slope, curvature) = backend.vjp(through_net, backend.stop(inputs), has_aux=True, once=True)
        ones, slope = xp.ones_like(log_slope), event_last(xp.exp(log_slope))

        def from_net(score: Array, log_slope: Array) -> Array:
            return pull((event_first(score), log_slope))[0]

        rest = score - event_last(curvature) - from_net(0 * score, ones)[..., : self.dim]
        score = nilpotent_solve(lambda u: from_net(u, 0 * ones)[..., : self.dim], slope, rest)
        y, log_det = self.forward(params, x, own_context)
        if own_context is not None:
            score_context = backend.stop(score_context - from_net(score, ones)[..., self.dim :])
        return y, log_det, score, score_context
