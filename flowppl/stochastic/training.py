"""Training the layers of a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flowppl import tree
from flowppl.backend import Array, backend_of
from flowppl.kernels.target import LogProb, Placed
from flowppl.stochastic.draws import PLACE, ends
from flowppl.stochastic.gradients import by_energy, by_layer, by_samples
from flowppl.stochastic.path import Path
from flowppl.training import Memory, Options, Record, train

OPTIONS = Options(num_particles=256, max_steps=2000, chunk=100)


def train_path(
    path: Path,
    variables: dict[str, Any],
    log_prob: LogProb,
    *,
    by: str = "layer",
    samples: Array | None = None,
    share: float = 0.5,
    seed: int = 0,
    options: Options = OPTIONS,
    memory: Memory | None = None,
    progress: Callable[[Sequence[Record]], None] = lambda history: None,
) -> tuple[dict[str, Any], list[Record]]:
    """Trains a path. Whatever it ends with, the weights of its paths are exact.

    Args:
        path: What to train.
        variables: Where to start, of the path.
        log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
        by: "layer" trains each map alone between the densities beside it, which is cheap, takes any moves, and is the default;
            "energy" all layers together, through the dynamics: Langevin's step sizes and learned betas need it.
        samples: Draws of the target `(m, dim)`, from elsewhere, such as data: `share` of the gradient is then that of the
            likelihood of paths back from a random batch of them, all layers together.
        share: Of samples; at one nothing else counts.
        seed: Of all draws.
        options: How.
        memory: See `flowppl.training.train`.
        progress: Called after each chunk with the records so far.

    Returns:
        Trained variables, and a record of each chunk of steps.

    Raises:
        ValueError: `by` is no such name, or the share not from zero to one.
    """
    if by not in ("layer", "energy"):
        raise ValueError(f"by must be 'layer' or 'energy', got {by!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    one = by_layer if by == "layer" else by_energy
    n = options.num_particles

    def gradient(variables: dict[str, Any], rng: Any, control: Any, refresh: Array) -> Any:
        backend = backend_of(control.square)
        choice, back, rng = backend.split(rng, 3)
        found = []
        if samples is None or share < 1:
            found.append((1.0 if samples is None else 1 - share, one(path, variables, log_prob, rng, n)))
        if samples is not None and share > 0:
            at = backend.categorical(choice, backend.xp.zeros_like(samples[:, 0]), (n,))
            found.append((share, by_samples(path, variables, log_prob, back, samples[at])))
        estimate, grads = (
            tree.map(lambda *each: sum(p * a for (p, _), a in zip(found, each, strict=True)), *parts)
            for parts in zip(*(result for _, result in found), strict=True)
        )
        return estimate, grads, control

    return train(gradient, variables, seed, options, memory, progress)


def train_placed(
    path: Path, variables: dict[str, Any], log_prob: LogProb, **how: Any
) -> tuple[dict[str, Any], list[Record]]:
    """Trains a path whose arrays are those of `placed`, to a density of x = loc + scale_tril w.

    It is trained in w, where steps mean the same for all densities, and what places it there stays as it is.

    Args:
        path: What to train, a path of w.
        variables: Where to start, from `placed`.
        log_prob: Log density of x, unnormalised: `(n, dim)` to `(n,)`.
        how: Further arguments of `train_path`.

    Returns:
        As `train_path` does, with all of the variables.
    """
    loc, scale_tril = backend_of(variables["const"]["loc"]).stop(ends(variables))
    own = {kind: {k: a for k, a in arrays.items() if k not in PLACE} for kind, arrays in variables.items()}
    trained, history = train_path(path, own, Placed(log_prob, loc, scale_tril), **how)
    return {kind: {**arrays, **trained[kind]} for kind, arrays in variables.items()}, history
