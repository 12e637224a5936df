"""Neural posterior estimation: simulates, standardises and trains by maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flowppl import flows
from flowppl.backend import backend_of
from flowppl.fitting import shown
from flowppl.flows import Flow, Recipe
from flowppl.networks import MLP
from flowppl.npe import TRAINING, Amortized, initial, like_of, log_q, on_host
from flowppl.objectives.reverse_kl import Estimate
from flowppl.simulations import Scale, Simulator, simulated
from flowppl.training import Options, Record, State, seed_of, train

_HELD_OUT = 10  # every tenth simulation is for judging the others' fit
_STEPS = 500  # between two looks at how it goes: the noise of held-out batches hides what fewer steps gain


def amortize(
    simulator: Simulator,
    flow: str | Recipe | Flow,
    *,
    embedding: int,
    hidden: Sequence[int],
    num_simulations: int,
    seed: int,
    batch_size: int,
    max_steps: int,
    learning_rate: float,
    progress_bar: bool,
) -> Amortized:
    """Simulates, standardises, and trains q(latents | data) by maximum likelihood; the best state by held-out simulations is kept.

    See `npe` for the arguments.

    Raises:
        ValueError: there are fewer than 20 simulations.
    """
    if num_simulations < 2 * _HELD_OUT:
        raise ValueError(f"num_simulations must be at least {2 * _HELD_OUT}, got {num_simulations}")
    options = Options(batch_size, max_steps, learning_rate, chunk=min(_STEPS, max_steps))
    u, features, dropped = simulated(simulator, num_simulations, (seed, TRAINING))
    scales = Scale.of(u), Scale.of(features)
    like = simulator.like
    backend = backend_of(like)
    rows = [like_of(scale.standardise(a), like) for scale, a in zip(scales, (u, features), strict=True)]
    cut = len(u) - max(len(u) // _HELD_OUT, 1)
    seen, held_out = ([a[:cut] for a in rows], [a[cut:] for a in rows])
    net = MLP(features.shape[-1], (embedding,), tuple(hidden)) if embedding else None
    q = flows.get(flow)(u.shape[-1], embedding or features.shape[-1])

    def mean_log_q(variables: dict[str, Any], rows: list) -> Any:
        return backend.xp.mean(log_q(q, net, variables, *rows))

    def gradient(variables: dict[str, Any], rng: Any, control: Any, refresh: Any) -> Any:
        # The record's objective is that of held-out simulations, so training sees when it no longer learns what is general.
        keys = backend.split(rng, 2)
        batch = _choose(seen, keys[0], options.num_particles)
        _, grads = backend.value_and_grad(lambda p: -mean_log_q({**variables, "params": p}, batch), variables["params"])
        value = mean_log_q(backend.stop(variables), _choose(held_out, keys[1], max(options.num_particles // 2, 1)))
        return Estimate(value, 0 * value, 0 * value, 0 * value), grads, control

    start = backend.jit(lambda rng: initial(q, net, rng, like))(backend.rng(seed_of(seed, TRAINING), like))
    best = _Best(backend.jit(lambda params: mean_log_q({**start, "params": params}, held_out)))
    with shown(options, progress_bar, "log q") as progress:
        _, history = train(gradient, start, seed, options, best, progress)
    variables = {**start, "params": best.params}
    each = on_host(backend.jit(lambda v: log_q(q, net, v, *held_out))(variables)) - np.log(scales[0].sd).sum()
    error = float(each.std() / np.sqrt(len(each)))
    return Amortized(simulator, q, net, variables, scales, history, (float(each.mean()), error), dropped)


class _Best:
    """A memory of training that keeps the averaged parameters with the highest score."""

    def __init__(self, score: Callable[[Any], Any]) -> None:
        self._score, self._highest, self.params = score, -np.inf, None

    def load(self, template: State) -> None:
        self.params = template.params

    def save(self, state: State, history: Sequence[Record]) -> None:
        score = float(self._score(state.average))
        if score > self._highest:
            self._highest, self.params = score, state.average


def _choose(rows: list, rng: Any, num: int) -> list:
    """The same random rows of each array."""
    backend, n = backend_of(rows), len(rows[0])
    at = backend.uniform(rng, (num,), rows[0]) * n
    at = backend.xp.clip(backend.xp.astype(at, backend.xp.int32), 0, n - 1)  # n itself by rounding
    return [backend.xp.take(a, at, axis=0) for a in rows]
