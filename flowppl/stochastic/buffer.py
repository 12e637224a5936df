"""A buffer of weighted draws that goes along with the flow that it trains."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowppl import weights
from flowppl.backend import Array, backend_of


class Buffer(NamedTuple):
    """Weighted draws of p^2 / q, a ring of fixed size.

    Where q has moved since, a draw's weight goes along as 1 / q. So what is kept of it is log w + log q, which does not change,
    and the log q that it was last seen with.

    Attributes:
        x: `(size, dim)`.
        fixed: log w + log q, `(size,)`; -inf where there is no draw.
        log_q: `(size,)`.
    """

    x: Array
    fixed: Array
    log_q: Array

    @staticmethod
    def empty(size: int, dim: int, like: Array) -> Buffer:
        """A buffer without draws."""
        backend = backend_of(like)
        zeros = backend.asarray(backend.xp.zeros((size,)), like)
        return Buffer(backend.asarray(backend.xp.zeros((size, dim)), like), zeros - backend.xp.inf, zeros)

    @property
    def log_w(self) -> Array:
        """The priorities, `(size,)`."""
        return self.fixed - self.log_q

    def with_draws(self, at: Array, x: Array, log_w: Array, log_q: Array) -> Buffer:
        """The buffer with draws in the slots `at`; those without a finite weight and density leave their slots empty."""
        backend = backend_of(x)
        xp = backend.xp
        fine = xp.isfinite(log_w) & xp.isfinite(log_q) & xp.all(xp.isfinite(x), axis=-1)
        x = xp.where(fine[:, None], x, xp.zeros_like(x))
        fixed = xp.where(fine, log_w + log_q, -xp.inf)
        log_q = xp.where(fine, log_q, xp.zeros_like(log_q))
        return Buffer(*(backend.set_at(a, at, v) for a, v in zip(self, (x, fixed, log_q), strict=True)))

    def refreshed(self, at: Array, log_q: Array) -> Buffer:
        """The buffer after a look at the draws in the slots `at`, which may repeat; those without a density are not drawn again."""
        backend = backend_of(log_q)
        log_q = backend.xp.where(backend.xp.isfinite(log_q), log_q, backend.xp.inf)
        return self._replace(log_q=backend.set_at(self.log_q, at, log_q))

    def draw(self, rng: Any, n: int) -> Array:
        """n slots in random order, each one n times its share of all weights on average, or one more or less than that."""
        backend = backend_of(self.x)
        choice, order = backend.split(rng, 2)
        at = weights.resample_systematic(choice, self.log_w, n=n)
        return at[backend.asarray(backend.permutation(order, n), at)]
