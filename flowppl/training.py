"""Training a flow until it no longer gets better: chunks of steps, and a plan that reads what they showed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from flowppl import optim, tree
from flowppl.backend import Array, Tree, backend_of
from flowppl.objectives.control import REFRESH, Control, no_control

_NOISE = 2.0  # standard errors below which a change is none
_DECAY = 1.0  # of the steps until the plateau, spent on annealing the step size to zero
_PATIENCE = 2  # chunks without a gain that make a plateau
_FALL = 0.3  # the factor on the step size after a chunk that made things worse
_SMALLEST = 1e-3  # the factor at which training gives up
_WORTH = 0.5  # nats gained by annealing that make it worthwhile to go on with smaller steps
_LOSS = 0.2  # nats that a chunk may lose beside its noise
_MEMORY = 0.98  # of the averaged iterates


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        num_particles: Draws in each step.
        max_steps: The most steps, before those of `flowppl.refining`.
        learning_rate: The step size of Adam at the start, which falls where it proves too large.
        optimizer: Another optimizer than Adam, as a pair of `init(params)` and `update(grads, state)`; its updates are scaled down
            as Adam's would be.
        clip_norm: The largest norm of a gradient.
        chunk: Steps between two looks at how it goes.
    """

    num_particles: int = 128
    max_steps: int = 8000
    learning_rate: float = 5e-3
    optimizer: optim.Optimizer | None = None
    clip_norm: float = 10.0
    chunk: int = 250

    def __post_init__(self) -> None:
        for name in ("num_particles", "max_steps", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Move(NamedTuple):
    """The step sizes of one chunk: level (1 + cos(pi t)) / 2 with t from `begin` to `end`."""

    level: float
    begin: float = 0.0
    end: float = 0.0

    def factors(self, steps: int) -> np.ndarray:
        """The factor on the optimizer's updates at each step."""
        t = self.begin + (self.end - self.begin) * (np.arange(steps) + 0.5) / steps
        return 0.5 * self.level * (1 + np.cos(np.pi * t))


class Record(NamedTuple):
    """What a chunk of steps showed; means are over its second half."""

    move: Move
    elbo: float
    elbo_error: float
    fisher: float  # E |d log q / dx - d log p / dx|^2 in the coordinates of training
    fisher_error: float
    lost: float  # the share of draws without a finite density
    skipped: int  # steps whose gradient was not finite
    coefficient: float  # of the score term: zero is the path gradient, one the plain one
    kept: bool = True  # whether training goes on from its end; if not, from its start, with smaller steps


class Target(Protocol):
    """A loss with its gradient: (variables, rng, control, refresh) -> (Estimate, grads, control)."""

    def __call__(self, variables: Tree, rng: Any, control: Control, refresh: Array) -> tuple[Any, Tree, Control]: ...


class State(NamedTuple):
    """What a chunk of steps starts from."""

    params: Tree
    optimizer: Any
    control: Control
    average: Tree


class Memory(Protocol):
    """What an interrupted run goes on from: its state, a tree of arrays such as `State`, and the records that led to it."""

    def load(self, template: Any) -> tuple[Any, list[Record]] | None: ...

    def save(self, state: Any, history: Sequence[Record]) -> None: ...


def train(
    gradient: Target,
    variables: dict[str, Any],
    seed: int,
    options: Options,
    memory: Memory | None = None,
    progress: Callable[[Sequence[Record]], None] = lambda history: None,
    moves: Sequence[Move] | None = None,
) -> tuple[dict[str, Any], list[Record]]:
    """Trains until neither the objective nor the Fisher divergence gets better by more than its noise, then anneals.

    The step size starts high. A chunk that makes things worse is undone, and the step size falls. Once nothing is gained any more,
    it goes to zero along half a cosine, and the average of the last iterates is the result. If that gained much, the step size was
    too large to see it, and training goes on with a smaller one.

    Args:
        gradient: Estimates the objective and its gradient.
        variables: Where to start.
        seed: Of all draws. Those of a chunk depend on the seed and its number alone, so a run that goes on elsewhere ends alike.
        options: How.
        memory: Where to keep the state after each chunk, and whence to go on.
        progress: Called after each chunk with the records so far.
        moves: The step sizes of each chunk, where they do not depend on what the chunks show; then none is undone.

    Returns:
        Trained variables, and a record of each chunk.
    """
    start = tree.leaves(variables["params"])[0]
    backend = backend_of(start)
    optimizer = _optimizer(options)

    def chunk(state: State, rng: Any, factors: Array, refresh: Array) -> tuple[State, Any]:
        def step(carry: tuple, row: tuple) -> tuple:
            (state, rng), (factor, look) = carry, row
            key, rng = backend.split(rng, 2)
            estimate, grads, control = gradient({**variables, "params": state.params}, key, state.control, look)
            updates, inner = optimizer.update(grads, state.optimizer)
            params = optim.apply(state.params, tree.map(lambda u: factor * u, updates))
            average = tree.map(lambda old, new: _MEMORY * old + (1 - _MEMORY) * new, state.average, params)
            return (State(params, inner, control, average), rng), estimate

        (state, _), seen = backend.scan(step, (state, rng), (factors, refresh))
        return state, seen

    run = backend.jit(chunk)
    params = backend.stop(variables["params"])
    state = State(params, optimizer.init(params), no_control(start), params)
    history: list[Record] = []
    if memory and (found := memory.load(state)):
        state, history = found
    steps = min(options.chunk, options.max_steps)
    refresh = backend.xp.arange(steps) % REFRESH == 0  # on the host, in torch

    def following() -> Move | None:
        if moves is None:
            return plan(history, options)
        return moves[len(history)] if len(history) < len(moves) else None

    while move := following():
        rng = backend.rng(seed_of(seed, len(history)), start)
        after, seen = run(state, rng, backend.asarray(move.factors(steps), start), refresh)
        skipped = int(backend.to_numpy(after.optimizer.skipped - state.optimizer.skipped))
        record = _record(move, tree.map(backend.to_numpy, seen), skipped)
        record = record._replace(kept=_keeps(record, history if moves is None else ()))
        state = after if record.kept else state
        history.append(record)
        if memory:
            memory.save(state, history)
        progress(history)
    return {**variables, "params": state.average}, history


def annealed(chunks: int, level: float) -> list[Move]:
    """Step sizes that fall from a level to zero along half a cosine, in so many chunks."""
    return [Move(level, i / chunks, (i + 1) / chunks) for i in range(chunks)]


def plan(history: Sequence[Record], options: Options) -> Move | None:
    """The step sizes of the next chunk, from the records alone; None at the end."""
    left = options.max_steps // options.chunk - len(history)
    if not history:
        return Move(1.0) if left > 1 else Move(1.0, 0.0, 1.0)
    last, cycle = history[-1], _cycle(history)
    if last.move.end > 1 - 1e-9:
        # What annealing has gained, smaller steps may go on with.
        plateau = next((r for r in reversed(cycle) if r.move.end == 0), last)
        return Move(_FALL * last.move.level) if last.elbo - plateau.elbo > _WORTH and left > _PATIENCE else None
    if last.move.end > 0:
        end = 2 * last.move.end - last.move.begin
        return Move(last.move.level, last.move.end, end if end < 1 - 1e-9 else 1.0)
    level = last.move.level * (1 if last.kept else _FALL)
    if level < _SMALLEST:
        return None
    pieces = max(1, min(math.ceil(_DECAY * len(history)), left))
    if left <= pieces or (last.kept and _plateau([r for r in cycle if r.kept])):
        return Move(level, 0.0, 1 / pieces)
    return Move(level)


def _cycle(history: Sequence[Record]) -> list[Record]:
    """The records since an annealing before the last one ended: those that the next step is judged by."""
    ends = [i + 1 for i, r in enumerate(history[:-1]) if r.move.end > 1 - 1e-9]
    return list(history[ends[-1] if ends else 0 :])


def _plateau(kept: Sequence[Record]) -> bool:
    """Whether the last chunks gained nothing on the one before them."""
    if len(kept) <= _PATIENCE + 1:
        return False
    old, new = kept[-_PATIENCE - 1], kept[-_PATIENCE:]
    gains = [r.elbo - old.elbo > _NOISE * math.hypot(r.elbo_error, old.elbo_error) + 1e-3 for r in new]
    falls = [old.fisher - r.fisher > _NOISE * math.hypot(r.fisher_error, old.fisher_error) for r in new]
    return not any(gains + falls)


def _keeps(record: Record, history: Sequence[Record]) -> bool:
    """Whether a chunk is no worse than those before it."""
    if not math.isfinite(record.elbo):
        return False
    cycle = [] if history and history[-1].move.end > 1 - 1e-9 else _cycle(history)
    best = max((r for r in cycle if r.kept), key=lambda r: r.elbo, default=None)
    return best is None or record.elbo > best.elbo - _LOSS - 4 * math.hypot(record.elbo_error, best.elbo_error)


def _optimizer(options: Options) -> optim.Optimizer:
    inner = options.optimizer or optim.adam(options.learning_rate)
    return optim.skip_nonfinite(optim.chain(optim.clip_by_global_norm(options.clip_norm), inner))


def _record(move: Move, seen: Any, skipped: int) -> Record:
    def summary(values: np.ndarray) -> tuple[float, float]:
        half = np.asarray(values, np.float64)[len(values) // 2 :]
        return float(half.mean()), float(half.std() / math.sqrt(len(half)))

    lost, coefficient = float(np.mean(seen.lost)), float(np.mean(seen.coefficient))
    return Record(move, *summary(seen.elbo), *summary(seen.fisher), lost, skipped, coefficient)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
