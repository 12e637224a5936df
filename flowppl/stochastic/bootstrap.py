"""Training of a flow by annealed importance sampling of where it is worst, with a buffer of what that found.

Midgley et al. 2023, "Flow annealed importance sampling bootstrap" (arXiv:2208.01893), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flowppl import optim, tree, weights
from flowppl.backend import Array, backend_of
from flowppl.flows import Flow
from flowppl.kernels import hmc
from flowppl.kernels.target import LogProb
from flowppl.stochastic.annealing import Bridge, Kernel, anneal
from flowppl.stochastic.buffer import Buffer

_CLIP = 10.0  # the largest correction of a draw's weight
_NORM = 100.0  # the largest norm of a gradient
_WARMUP = 0.05  # of the steps, while the buffer fills
_GAIN = 0.5  # of the step sizes' logarithms, per pass, times the error of the acceptance
_PASSES = 50  # in one call of a compiled function


class History(NamedTuple):
    """How training went, in numpy arrays with one entry for each pass of annealed importance sampling.

    Attributes:
        log_z: The evidence from the pass's draws of the flow alone, `(passes,)`: from below while modes are missing.
        ess: Their effective share, which does not see what is missing, `(passes,)`.
        loss: Mean -log q over what was drawn from the buffer, `(passes,)`.
        acceptance: Of the kernel, `(passes, temperatures)`.
        lost: The share of annealed draws without a finite density or weight, `(passes,)`.
        skipped: Steps so far whose gradient was not finite, `(passes,)`.
    """

    log_z: np.ndarray
    ess: np.ndarray
    loss: np.ndarray
    acceptance: np.ndarray
    lost: np.ndarray
    skipped: np.ndarray


class _State(NamedTuple):
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


class _Passes(NamedTuple):
    """Passes of annealing and training: what they start from, and what each one does. See `bootstrap`."""

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

    def start(self, draws: tuple[Array, Array] | None) -> _State:
        """The state before the first pass, with draws of p and their log-weights in the buffer."""
        backend, like = backend_of(self.betas), self.betas
        xp, size = backend.xp, self.size
        params = backend.stop(self.variables["params"])
        shapes = ((size, self.flow.dim), (size,), (size,))
        empty = Buffer(*(backend.asarray(xp.zeros(shape), like) for shape in shapes))
        buffer = empty._replace(fixed=empty.fixed - xp.inf)
        if draws is not None:
            x, log_w = (backend.asarray(a, like)[:size] for a in draws)
            # Weighted draws of p have the weights p / q more as draws of p^2 / q.
            log_q = backend.stop(backend.jit(partial(self.flow.log_prob, self.variables))(x))
            at = backend.asarray(size - 1 - xp.arange(len(x)), like)  # the last slots are the last to be used again
            buffer = buffer.with_draws(at, x, log_w + backend.stop(self.log_prob(x)) - log_q, log_q)
        log_steps = xp.zeros_like(like) + math.log(0.3 * self.flow.dim**-0.25)
        return _State(params, self.optimizer.init(params), buffer, log_steps)

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
        return (_State(params, inner, buffer, log_steps), rng), seen

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

    def _trained(self, state: _State, x: Array, log_q: Array) -> tuple[Any, Any, Array, Array]:
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


def bootstrap(
    flow: Flow,
    variables: dict[str, Any],
    log_prob: LogProb,
    seed: int,
    *,
    num_steps: int = 4000,
    learning_rate: float = 2e-3,
    num_particles: int = 256,
    num_temperatures: int = 4,
    num_updates: int = 8,
    buffer_size: int = 16_384,
    kernel: Kernel | None = None,
    acceptance: float = 0.65,
    draws: tuple[Array, Array] | None = None,
    progress: Callable[[History], None] = lambda history: None,
) -> tuple[dict[str, Any], History]:
    """Trains a flow to minimise the alpha-divergence with alpha = 2, that is E_p[p / q], which covers every mode that it finds.

    Each pass draws from the flow and anneals the draws to p^2 / q, where the flow has too little mass, by annealed importance
    sampling over q^(1 - 2 beta) p^(2 beta). They go to a buffer, which is drawn from by weight for a number of gradient steps on
    E[w log q(x)]. A draw with no finite density or weight is left out. Kernels move in the space of x, so a target whose scales
    differ much should be given in coordinates where they do not.

    Args:
        flow: q. Most of the work is its density of given points: couplings ("nsf", "realnvp") and "maf" have a fast one.
        variables: Where to start, best as wide as the target: modes that annealing does not reach from there are not found.
        log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
        seed: Of everything.
        num_steps: Gradient steps.
        learning_rate: Of Adam at its peak; it rises over the first steps and falls along half a cosine.
        num_particles: Draws in each pass, and in each gradient step.
        num_temperatures: From q to p^2 / q, in equal steps.
        num_updates: Gradient steps after each pass.
        buffer_size: Draws in the buffer, rounded to whole passes.
        kernel: See `anneal`; None for HMC with four leapfrog steps.
        acceptance: That the kernel's step sizes are led to, one for each temperature.
        draws: Points `(m, dim)` and log-weights `(m,)` with which the buffer starts: of p, such as `anneal` gives, with its
            evidence as their mean weight; of exact draws, log-weights are log Z.
        progress: Called from time to time with what was seen since.

    Returns:
        Trained variables, and how it went.

    Raises:
        ValueError: a number is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flowppl import flows
        >>> from flowppl.stochastic import bootstrap
        >>> def two_modes(x):
        ...     return jax.nn.logsumexp(-0.5 * jnp.stack([(x - 3) ** 2, (x + 3) ** 2]).sum(-1), axis=0)
        >>> flow = flows.nsf(layers=4)(dim=2)
        >>> variables, history = bootstrap(flow, flow.init(jax.random.key(0)), two_modes, seed=0, num_steps=800)
        >>> bool(history.ess[-10:].mean() > 0.5)
        True
    """
    given = {"num_steps": num_steps, "learning_rate": learning_rate, "num_particles": num_particles}
    given |= {"num_temperatures": num_temperatures, "num_updates": num_updates, "buffer_size": buffer_size}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    like = tree.leaves(variables["params"])[0]
    backend = backend_of(like)
    schedule = optim.cosine(learning_rate, num_steps, warmup=int(_WARMUP * num_steps))
    passes = _Passes(
        flow,
        variables,
        log_prob,
        kernel or partial(hmc.step, num_steps=4),
        optim.skip_nonfinite(optim.chain(optim.clip_by_global_norm(_NORM), optim.adam(schedule))),
        backend.asarray(np.arange(1, num_temperatures + 1) / num_temperatures, like),
        num_particles,
        num_updates,
        num_particles * max(1, round(buffer_size / num_particles)),
        acceptance,
    )
    run = backend.jit(lambda state, rng, rows: backend.scan(passes.one, (state, rng), rows))
    state, rng = passes.start(draws), backend.rng(seed, like)
    calls = -(-num_steps // (num_updates * _PASSES))
    length = -(-num_steps // (num_updates * calls))  # the same in all calls: one compilation
    history: list[History] = []
    for call in range(calls):
        rows = backend.asarray(backend.xp.arange(call * length, (call + 1) * length), like)
        (state, rng), seen = run(state, rng, rows)
        history.append(History(*(np.asarray(backend.to_numpy(a), np.float64) for a in seen)))
        progress(history[-1])
    joined = History(*(np.concatenate(parts) for parts in zip(*history, strict=True)))
    return {**variables, "params": backend.stop(state.params)}, joined
