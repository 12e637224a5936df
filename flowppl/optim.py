"""Optimizers as pairs of pure functions over trees: state = init(params), and updates, state = update(grads, state).

Nothing here reads a value back to the host, so a step compiles, and maps over independent fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowppl import tree
from flowppl.backend import Array, Tree, backend_of

Schedule = Callable[[Array], Array]


class Optimizer(NamedTuple):
    """`init(params) -> state`, and `update(grads, state) -> (updates, state)` with updates for `apply` to add."""

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any], tuple[Tree, Any]]


class AdamState(NamedTuple):
    """The number of steps taken and the running means of the gradients and of their squares."""

    step: Array
    mean: Tree
    square: Tree


class SkipState(NamedTuple):
    """The state of the optimizer inside, and how many steps were skipped."""

    inner: Any
    skipped: Array


def apply(params: Tree, updates: Tree) -> Tree:
    """Gives params + updates, detached from how the parameters were made."""
    if not tree.leaves(params):
        return params
    return tree.map(lambda p, u: p + u, backend_of(params).stop(params), updates)


def adam(learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam; a schedule gets the number of steps taken before this one. Kingma and Ba 2015, algorithm 1."""

    def init(params: Tree) -> AdamState:
        backend = backend_of(params)
        zeros = tree.map(backend.xp.zeros_like, backend.stop(params))
        return AdamState(_zero(params), zeros, zeros)

    def update(grads: Tree, state: AdamState) -> tuple[Tree, AdamState]:
        xp = backend_of(grads).xp
        mean = tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, grads)
        taken = xp.astype(state.step, _real(grads))
        # 1 - b^t without cancellation: in float32 the plain difference is wrong by 1e-5 at the first steps
        correct1, correct2 = (-xp.expm1((taken + 1) * (math.log(b) if b > 0 else -math.inf)) for b in (b1, b2))
        rate = learning_rate(taken) if callable(learning_rate) else learning_rate
        size = -rate / correct1
        root = xp.sqrt(correct2)

        def step(m: Array, v: Array) -> Array:
            return xp.astype(size, m.dtype) * m / (xp.sqrt(v) / xp.astype(root, m.dtype) + eps)

        return tree.map(step, mean, square), AdamState(state.step + 1, mean, square)

    return Optimizer(init, update)


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """Scales the gradients so that the norm of all of them together is at most max_norm; first in a `chain`."""

    def update(grads: Tree, state: tuple) -> tuple[Tree, tuple]:
        xp = backend_of(grads).xp
        norm = global_norm(grads)
        scale = xp.where(norm > max_norm, max_norm / norm, xp.ones_like(norm))
        return tree.map(lambda g: g * xp.astype(scale, g.dtype), grads), state

    return Optimizer(lambda params: (), update)


def global_norm(grads: Tree) -> Array:
    """The Euclidean norm of all leaves together; finite where the norm is, even if its square is not."""
    xp = backend_of(grads).xp
    dtype = _real(grads)
    leaves = [xp.astype(g, dtype) for g in tree.leaves(grads)]
    largest = xp.max(xp.stack([xp.max(xp.abs(g)) for g in leaves]))
    unit = xp.where(largest > 0, largest, xp.ones_like(largest))
    return unit * xp.sqrt(sum(xp.sum((g / unit) ** 2) for g in leaves))


def chain(*optimizers: Optimizer) -> Optimizer:
    """The updates of one are the gradients of the next."""

    def init(params: Tree) -> tuple:
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def update(grads: Tree, state: tuple) -> tuple[Tree, tuple]:
        states = []
        for optimizer, inner in zip(optimizers, state, strict=True):
            grads, inner = optimizer.update(grads, inner)
            states.append(inner)
        return grads, tuple(states)

    return Optimizer(init, update)


def skip_nonfinite(optimizer: Optimizer) -> Optimizer:
    """Updates of zero and an unchanged state where any gradient is infinite or NaN; such steps are counted."""

    def init(params: Tree) -> SkipState:
        return SkipState(optimizer.init(params), _zero(params))

    def update(grads: Tree, state: SkipState) -> tuple[Tree, SkipState]:
        xp = backend_of(grads).xp
        finite = xp.all(xp.stack([xp.all(xp.isfinite(g)) for g in tree.leaves(grads)]))
        updates, inner = optimizer.update(grads, state.inner)
        updates = tree.map(lambda u: xp.where(finite, u, xp.zeros_like(u)), updates)
        inner = tree.map(lambda new, old: xp.where(finite, new, old), inner, state.inner)
        return updates, SkipState(inner, xp.where(finite, state.skipped, state.skipped + 1))

    return Optimizer(init, update)


def constant(value: float) -> Schedule:
    """The same learning rate at every step."""
    return lambda step: 0.0 * step + value


def cosine(peak: float, steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `final` at step `steps`, and flat.

    Raises:
        ValueError: the warm up leaves no step to decay over.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup is {warmup} and steps {steps}: expected 0 <= warmup < steps")

    def schedule(step: Array) -> Array:
        xp = backend_of(step).xp
        progress = xp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        decayed = final + (peak - final) * 0.5 * (1 + xp.cos(math.pi * progress))
        return xp.where(step < warmup, peak * step / max(warmup, 1), decayed)

    return schedule


def _zero(params: Tree) -> Array:
    return backend_of(params).asarray(0, like=tree.leaves(params)[0])


def _real(grads: Tree) -> Any:
    """The dtype for scalars: double if any leaf is, else single, however short the leaves are."""
    xp = backend_of(grads).xp
    return xp.float64 if any(g.dtype == xp.float64 for g in tree.leaves(grads)) else xp.float32
