"""Passes of annealing and training, which flow annealed importance sampling bootstrap is made of.

Midgley et al. 2023, "Flow annealed importance sampling bootstrap" (arXiv:2208.01893), algorithm 2.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

from flowppl import optim, weights
from flowppl.backend import Array, backend_of
from flowppl.flows import Flow
from flowppl.kernels.target import LogProb
from flowppl.stochastic.annealing import Bridge, Kernel, anneal
from flowppl.stochastic.buffer import Buffer

_CLIP = 10.0  # the largest correction of a draw's weight
_GAIN = 0.5  # of the step sizes' logarithms, per pass, times the error of the acceptance


class State(NamedTuple):
    """What a pass starts from."""

    params: Any
    optimizer: Any
    buffer: Buffer
    log_steps: Array


def powers(beta: Array) -> Array:
    """Of q and p on the way from q to p^2 / q: q^(1 - 2 beta) p^(2 beta)."""
    return backend_of(beta).xp.stack([1 - 2 * beta, 2 * beta])


def gradient(
    flow: Flow, variables: dict[str, Any], x: Array, log_q: Array
) -> tuple[tuple[Array, Array], dict[str, Any]]:
    """The gradient of -mean(w log q(x)) in the flow's params: for x from p^2 / q, the direction of that of E_p[p / q].

    Were q still the flow that x was drawn for, w would be one: the gradient of the integral of p^2 / q is that of (p^2 / q) times
    -d log q. As the flow moves on, w = (p^2 / q_now) / (p^2 / q) corrects for that; it is cut off at 10.

    Args:
        flow: q.
        variables: Its variables now.
        x: Draws of p^2 / q, `(n, dim)`.
        log_q: Their log densities when they were drawn, `(n,)`.

    Returns:
        Mean -log q and the log densities now `(n,)`, and gradients like `variables["params"]`.
    """
    backend = backend_of(x)
    xp = backend.xp

    def loss(params: Any) -> tuple[Array, tuple[Array, Array]]:
        now = flow.log_prob({**variables, "params": params}, x)
        w = xp.exp(xp.clip(log_q - backend.stop(now), None, math.log(_CLIP)))
        return -xp.mean(w * now), (-xp.mean(now), now)

    (_, seen), grads = backend.value_and_grad(loss, variables["params"], has_aux=True)
    return backend.stop(seen), grads


class Passes(NamedTuple):
    """Passes of annealing and training: what they start from, and what each one does. See `bootstrap` for the fields."""

    flow: Flow
    variables: dict[str, Any]
    log_prob: LogProb
    kernel: Kernel
    optimizer: optim.Optimizer
    betas: Array
    num_particles: int
    num_updates: int
    size: int  # of the buffer
    acceptance: float

    def start(self, draws: tuple[Array, Array] | None) -> State:
        """The state before the first pass, with draws of p and their log-weights in the buffer."""
        backend, like = backend_of(self.betas), self.betas
        xp, size = backend.xp, self.size
        params = backend.stop(self.variables["params"])
        buffer = Buffer.empty(size, self.flow.dim, like)
        if draws is not None:
            x, log_w = (backend.asarray(a, like)[:size] for a in draws)
            # Weighted draws of p have the weights p / q more as draws of p^2 / q.
            log_q = backend.stop(backend.jit(partial(self.flow.log_prob, self.variables))(x))
            at = backend.asarray(size - 1 - xp.arange(len(x)), like)  # the last slots are the last to be used again
            buffer = buffer.with_draws(at, x, log_w + backend.stop(self.log_prob(x)) - log_q, log_q)
        log_steps = xp.zeros_like(like) + math.log(0.3 * self.flow.dim**-0.25)
        return State(params, self.optimizer.init(params), buffer, log_steps)

    def one(self, carry: tuple, i: Array) -> tuple[tuple, tuple]:
        """One pass: the next state, and what `History` has of it."""
        (state, rng), n = carry, self.num_particles
        backend = backend_of(self.betas)
        xp = backend.xp
        first, second, rng = backend.split(rng, 3)
        at = {**self.variables, "params": backend.stop(state.params)}
        found, log_q, seen = backend.stop(self._annealed(first, at, state.log_steps))
        slots = backend.asarray(xp.arange(n), self.betas)
        buffer = state.buffer.with_draws((i * n + slots) % self.size, found.x, found.log_w, log_q)
        log_steps = state.log_steps + _GAIN * (found.acceptance - self.acceptance)

        chosen = buffer.draw(second, n * self.num_updates)
        params, inner, loss, now = self._trained(state, buffer.x[chosen], buffer.log_q[chosen])
        buffer = buffer.refreshed(chosen, now)
        lost = 1 - xp.mean(xp.astype(xp.isfinite(found.log_w + log_q), self.betas.dtype))
        seen = (*seen, loss, found.acceptance, lost, inner.skipped)
        return (State(params, inner, buffer, log_steps), rng), seen

    def _annealed(self, rng: Any, at: dict[str, Any], log_steps: Array) -> tuple[Any, Array, tuple]:
        """Draws of p^2 / q, their log q, and what the flow's own draws say."""
        backend, n = backend_of(self.betas), self.num_particles
        xp = backend.xp
        first, second = backend.split(rng, 2)
        log_q = partial(self.flow.log_prob, at)
        own = backend.stop(self.flow.sample(first, at, (n,), with_log_prob=True))
        log_w = self.log_prob(own.x) - own.log_prob
        log_w = xp.where(xp.isfinite(log_w), log_w, -xp.inf)
        bridge = Bridge(lambda rng, n: own.x, log_q, self.log_prob, powers)
        found = anneal(second, bridge, self.kernel, (self.betas, xp.exp(log_steps)), n, resample_below=0.0)
        return found, log_q(found.x), (weights.log_mean_exp(log_w), weights.ess(log_w) / n)

    def _trained(self, state: State, x: Array, log_q: Array) -> tuple[Any, Any, Array, Array]:
        """Params and optimizer after all updates, the mean loss, and the log densities as they were in each."""
        backend, shape = backend_of(x), (self.num_updates, self.num_particles)
        xp = backend.xp

        def update(carry: tuple, row: tuple[Array, Array]) -> tuple[tuple, tuple]:
            params, inner = carry
            seen, grads = gradient(self.flow, {**self.variables, "params": params}, *row)
            updates, inner = self.optimizer.update(grads, inner)
            return (optim.apply(params, updates), inner), seen

        rows = tuple(xp.reshape(a, (*shape, *a.shape[1:])) for a in (x, log_q))
        (params, inner), (loss, now) = backend.scan(update, (state.params, state.optimizer), rows)
        return params, inner, xp.mean(loss), xp.reshape(now, (-1,))
