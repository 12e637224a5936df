"""Block neural autoregressive maps: one monotone network for all coordinates, that inverts at every point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast
from flowppl.bijections.elementwise import event_first, event_last
from flowppl.bijections.nilpotent import nilpotent_solve
from flowppl.bijections.root import solve_increasing
from flowppl.bijections.solves import iterate
from flowppl.networks.block_autoregressive import MIN_SLOPE, Block, BlockMLP
from flowppl.networks.mlp import MLP


@dataclass(frozen=True)
class BlockAutoregressive(Bijection):
    """y_i = f_i(x_1 ... x_i; context), increasing in x_i, with all f_i in one network: sampling is one pass.

    De Cao, Titov and Aziz 2019, "Block neural autoregressive flow"; for what differs see `BlockMLP`. Every point has an inverse.

    Attributes:
        dim: Length of the vectors.
        context_dim: Length of the context; given one, a network shifts the first hidden layer and y.
        hidden: Units of each hidden layer for each coordinate.
        context_hidden: Widths of the hidden layers of the context's network.
    """

    dim: int
    context_dim: int = 0
    hidden: tuple[int, ...] = (8, 8)
    context_hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        _ = self._f  # checks the widths

    @property
    def _f(self) -> BlockMLP:
        return BlockMLP(self.dim, self.hidden)

    @property
    def _net(self) -> MLP:
        return MLP(self.context_dim, (self.dim * (self.hidden[0] + 1),), self.context_hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        key, net_key = backend_of_rng(rng).split(rng, 2)
        params = {"f": self._f.init(key)}
        if self.context_dim:
            params["net"] = self._net.init(net_key)
        return {"params": params, "const": {}}

    def _blocks(self, params: Params, context: Array | None) -> tuple[Block, ...]:
        """The layers, with the context's shifts in the first and the last bias."""
        blocks = self._f.constrain(params["f"])
        if context is None:
            return blocks
        shift = self._net(params["net"], backend_of(context).xp.reshape(context, (-1, self.context_dim)))
        rows = self.dim * self.hidden[0]
        first, *middle, last = blocks
        return (
            first._replace(bias=first.bias + shift[:rows]),
            *middle,
            last._replace(bias=last.bias + shift[rows:]),
        )

    def _apply(self, blocks: tuple[Block, ...], x: Array) -> tuple[Array, Array]:
        """y and the slopes, of x `(*batch, dim)`."""
        xp = backend_of(x).xp
        y, slope, _ = self._f.apply(blocks, _flat(x))
        return xp.reshape(event_last(y), x.shape), xp.reshape(event_last(slope), x.shape)

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`: one pass."""
        x, context = broadcast(x, context, self.context_dim)
        xp = backend_of(x).xp
        y, slope = self._apply(self._blocks(params, context), x)
        return y, xp.sum(xp.log(slope), axis=-1)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: Jacobi sweeps, each of which solves all coordinates' equations given the others' last values.

        Sweep i makes coordinate i exact, and the sweeps end as soon as none changes. Derivatives are implicit, through one step
        of Newton's method on the diagonal.
        """
        backend = backend_of(y)
        xp = backend.xp
        y, context = broadcast(y, context, self.context_dim)
        blocks = self._blocks(params, context)

        def newton(args: tuple[tuple[Block, ...], Array], x: Array) -> Array:
            blocks, y = args
            value, slope = self._apply(blocks, x)
            return x - (value - y) / slope

        x = xp.reshape(event_last(self._solve(*backend.stop((blocks, _flat(y))))), y.shape)
        eps = float(xp.finfo(y.dtype).eps)
        x = backend.implicit(newton, (blocks, y), x, max_steps=self.dim, tol=4 * eps)
        return x, -xp.sum(xp.log(self._apply(blocks, x)[1]), axis=-1)

    def _solve(self, blocks: tuple[Block, ...], y: Array) -> Array:
        """The values of the inverse of y `(dim, n)`."""
        xp = backend_of(y).xp
        eps, apply = float(xp.finfo(y.dtype).eps), self._f.apply
        largest = float(xp.finfo(y.dtype).max) ** 0.4  # a mask's zero times infinity would spoil the exact coordinates

        def sweep(x: Array) -> Array:
            value, _, offsets = apply(blocks, x)
            # slopes are at least MIN_SLOPE; the rest is for rounding
            reach = xp.abs(y - value) * (1.1 / MIN_SLOPE) + 16 * eps * (1 + xp.abs(x) + xp.abs(y))
            x = solve_increasing(lambda x: apply(blocks, x, offsets)[:2], y, x - reach, x + reach)
            return xp.clip(x, -largest, largest)

        start, tol = xp.clip(y, -largest, largest), 4 * eps / MIN_SLOPE
        return iterate(sweep, start, max_steps=self.dim, tol=tol, method="jacobi", exact=True)

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Solves J^T g' = g - d log|det J| / dx by Jacobi sweeps, pullbacks through the network: J is triangular."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        fixed = backend.stop(params)

        def evaluate(x: Array, *context: Array) -> tuple[tuple[Array, Array], Array]:
            y, slope = self._apply(self._blocks(fixed, context[0] if context else None), x)
            return (y, xp.log(slope)), slope

        primals = backend.stop((x,) if own_context is None else (x, own_context))
        _, pull, slope = backend.vjp(evaluate, *primals, has_aux=True, once=True)
        ones = xp.ones_like(slope)
        rest = backend.stop(score) - pull((0 * ones, ones))[0]
        score = nilpotent_solve(lambda u: pull((u, 0 * ones))[0] - slope * u, slope, rest)
        y, log_det = self.forward(params, x, own_context)
        if own_context is not None:
            score_context = backend.stop(score_context - pull((score, ones))[1])
        return y, log_det, score, score_context


def _flat(x: Array) -> Array:
    """`(*batch, dim)` to `(dim, n)`."""
    return event_first(backend_of(x).xp.reshape(x, (-1, x.shape[-1])))
