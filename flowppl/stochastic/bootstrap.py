"""Training of a flow by annealed importance sampling of where it is worst, with a buffer of what that found.

Midgley et al. 2023, "Flow annealed importance sampling bootstrap" (arXiv:2208.01893), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flowppl import optim, tree
from flowppl.backend import Array, backend_of
from flowppl.flows import Flow
from flowppl.kernels import hmc
from flowppl.kernels.target import LogProb
from flowppl.stochastic.annealing import Kernel
from flowppl.stochastic.passes import Passes
from flowppl.training import Memory, seed_of

_NORM = 100.0  # the largest norm of a gradient
_WARMUP = 0.05  # of the steps, while the buffer fills
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
    memory: Memory | None = None,
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
        memory: Where to keep the state from time to time, and whence to go on, such as a `flowppl.checkpoint.Checkpoint`.
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
    passes = Passes(
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
    params, history = _trained(passes, seed, num_steps, draws, memory, progress)
    return {**variables, "params": backend.stop(params)}, history


def _trained(
    passes: Passes,
    seed: int,
    num_steps: int,
    draws: tuple[Array, Array] | None,
    memory: Memory | None,
    progress: Callable[[History], None],
) -> tuple[Any, History]:
    """The params after so many steps, by calls of one compiled function. The draws of a call depend on the seed and its number."""
    backend, like = backend_of(passes.betas), passes.betas
    run = backend.jit(lambda state, rng, rows: backend.scan(passes.one, (state, rng), rows))
    calls = -(-num_steps // (passes.num_updates * _PASSES))
    length = -(-num_steps // (passes.num_updates * calls))  # the same in all calls: one compilation
    shapes = [(), (), (), like.shape, (), ()]  # of the fields, for each pass
    history = History(*(np.zeros((calls * length, *shape)) for shape in shapes))
    state, done = passes.start(draws), np.zeros(())
    if memory and (found := memory.load((state, history, done))):
        state, history, done = found[0]
    for call in range(int(done), calls):
        at = np.arange(call * length, (call + 1) * length)
        rng, rows = backend.rng(seed_of(seed, call), like), backend.asarray(backend.xp.asarray(at), like)
        (state, _), seen = run(state, rng, rows)
        for every, new in zip(history, seen, strict=True):
            every[at] = backend.to_numpy(new)
        if memory:
            memory.save((state, history, np.asarray(call + 1.0)), [])
        progress(History(*(every[at] for every in history)))
    return state.params, history
