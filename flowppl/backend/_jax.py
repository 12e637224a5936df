"""The backend protocol for jax. Random numbers come from a key: `split` before every draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as xp
import numpy as np
from jax import Array, lax

from flowppl.backend._jax_spline import rq_spline
from flowppl.backend._numpy import call_external
from flowppl.backend.protocol import Rng, Tree

__all__ = ["name", "rq_spline", "xp"]

name = "jax"


def machine() -> dict[str, str]:
    """The version, devices and default float, to read; XLA does not tell its threads."""
    devices = ", ".join(f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices())
    default = f"{xp.zeros(()).dtype} (jax_enable_x64 is {jax.config.jax_enable_x64})"
    return {"jax": jax.__version__, "devices": devices, "default float": default}


# Arrays


def stop(x: Tree) -> Tree:
    """No derivative flows through any leaf."""
    return jax.tree.map(lax.stop_gradient, x)


def asarray(a: Any, like: Array | None = None) -> Array:
    """An array; floats take the dtype of `like`, integers and booleans keep theirs."""
    a = xp.asarray(a)
    if like is not None and xp.issubdtype(like.dtype, xp.floating) and xp.issubdtype(a.dtype, xp.floating):
        return xp.asarray(a, like.dtype)
    return xp.asarray(a, a.dtype)  # a given dtype is never a weak one


def to_numpy(x: Array) -> np.ndarray:
    """The values on the host."""
    return np.asarray(x)


def gather(x: Array, idx: Array, axis: int) -> Array:
    """take_along_axis: idx has the rank of x, is not negative and broadcasts against x off `axis`."""
    return xp.take_along_axis(x, idx, axis)


def set_at(x: Array, idx: Any, v: Array) -> Array:
    """A copy of x with x[idx] = v."""
    return x.at[idx].set(v)


def index_add(x: Array, idx: Array, v: Array, axis: int) -> Array:
    """A copy of x with v[i] added at idx[i] along `axis`; idx is 1-D, repeats add up, v has len(idx) on `axis`."""
    return x.at[(slice(None),) * (axis % x.ndim) + (idx,)].add(v)


# Special functions

erf, ndtri = jax.scipy.special.erf, jax.scipy.special.ndtri
log_ndtr = partial(jax.scipy.special.log_ndtr, series_order=10)  # the default, 3, is off by 2e-11 at -20
lgamma, digamma = jax.scipy.special.gammaln, jax.scipy.special.digamma
relu, silu, softplus = jax.nn.relu, jax.nn.silu, jax.nn.softplus
gelu = partial(jax.nn.gelu, approximate=False)


def softmax(x: Array, axis: int = -1) -> Array:
    """Softmax along an axis."""
    return jax.nn.softmax(x, axis)


def logsumexp(x: Array, axis: int = -1) -> Array:
    """Log of the sum of exponentials along an axis, which is dropped."""
    return jax.nn.logsumexp(x, axis)


def log_i0(x: Array) -> Array:
    """Log of the modified Bessel function I0; finite for any finite x."""
    return xp.log(jax.scipy.special.i0e(x)) + x * xp.sign(x)  # jax's derivative of |x| at zero is one


def solve_triangular(a: Array, b: Array, *, lower: bool, transpose: bool = False, unit: bool = False) -> Array:
    """Solves a x = b, or a^T x = b, for a (..., d, d) and b (..., d, k); batch dimensions broadcast."""
    options = {"lower": lower, "transpose_a": transpose, "unit_diagonal": unit}
    if a.ndim == 2 and b.ndim > 2:
        columns = xp.moveaxis(b, -2, 0)  # one matrix and many right-hand sides: a solve of many columns
        solve = _solve_small if a.shape[-1] <= 64 else partial(lax.linalg.triangular_solve, left_side=True)
        return xp.moveaxis(solve(a, columns.reshape(a.shape[-1], -1), **options).reshape(columns.shape), 0, -2)
    batch = xp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = xp.broadcast_to(a, batch + a.shape[-2:]), xp.broadcast_to(b, batch + b.shape[-2:])
    return lax.linalg.triangular_solve(a, b, left_side=True, **options)


def _solve_small(a: Array, b: Array, *, lower: bool, transpose_a: bool, unit_diagonal: bool) -> Array:
    """A solve of many columns that on CPUs keeps off LAPACK, whose threads spin for a while and hold up XLA's."""
    a = xp.tril(a, -int(unit_diagonal)) if lower else xp.triu(a, int(unit_diagonal))
    a = a + xp.eye(a.shape[-1], dtype=a.dtype) if unit_diagonal else a
    a, lower = (a.T, not lower) if transpose_a else (a, lower)

    def solve(a: Array, lower: bool, y: Array) -> Array:
        n, diagonal = len(a), xp.sum(a * xp.eye(len(a), dtype=a.dtype), axis=-1)  # a gather's derivative is a scatter

        def substitute(y: Array) -> Array:
            def body(k: Array, x: Array) -> Array:
                i = k if lower else n - 1 - k
                return x.at[i].set((y[i] - a[i] @ x) / diagonal[i])

            return lax.fori_loop(0, n, body, xp.zeros_like(y))

        library = partial(lax.linalg.triangular_solve, a, left_side=True, lower=lower)
        return lax.platform_dependent(y, cpu=substitute, default=library)

    return lax.custom_linear_solve(
        lambda x: a @ x, b, lambda _, y: solve(a, lower, y), lambda _, y: solve(a.T, not lower, y)
    )


# Derivatives


def vjp(f: Callable, *primals: Tree, has_aux: bool = False, once: bool = False) -> tuple:
    """(out, pullback) or (out, pullback, aux); pullback(cotangent of out) is a tuple, one entry per primal.

    `once` says that what is pulled back needs no derivatives of its own: nothing to jax, which never makes unused ones.
    """
    return jax.vjp(f, *primals, has_aux=has_aux)


def value_and_grad(loss: Callable, params: Tree, *args: Any, has_aux: bool = False) -> tuple:
    """(value, grads) or ((value, aux), grads)."""
    return jax.value_and_grad(loss, has_aux=has_aux)(params, *args)


def value_and_score(log_prob: Callable, x: Array, attached: bool = False) -> tuple[Array, Array]:
    """log_prob(x) of (..., d) and its gradient in x; no derivative flows through them unless asked for."""
    value, pull = jax.vjp(log_prob, x if attached else stop(x))
    score = pull(xp.ones_like(value))[0]
    return (value, score) if attached else stop((value, score))


def shielded(f: Callable, x: Array) -> tuple[Array, ...]:
    """f(x), arrays of as many rows as x `(n, d)`; no derivative flows back from a row where one is not finite.

    f is asked twice for the same, which the compiler sees.
    """
    fine = xp.ones(x.shape[:1], bool)
    for a in stop(f(stop(x))):
        fine = fine & xp.all(xp.isfinite(a.reshape(len(a), -1)), axis=-1)
    return f(xp.where(fine[:, None], x, stop(x)))


def implicit(step: Callable, args: Tree, x: Array, *, max_steps: int, tol: float) -> Array:
    """The solution x of x = step(args, x), found in whatever way, with its implicit derivatives, which are of any order.

    Derivatives are in `args` alone. The linear equation behind them is iterated until no element changes by more than tol times
    its size.
    """

    def linear(matvec: Callable, y: Array) -> Array:  # solves w = y + J w, where matvec(w) = w - J w
        scale = xp.max(xp.abs(y), axis=-1, keepdims=True)

        def body(state: tuple) -> tuple:
            i, w, _ = state
            new = y + (w - matvec(w))
            return i + 1, new, xp.any(xp.abs(new - w) > tol * (scale + xp.abs(new)))

        return lax.while_loop(lambda s: s[2] & (s[0] < max_steps), body, (0, y, xp.asarray(True)))[1]

    return lax.custom_root(
        lambda x: x - step(args, x),
        lax.stop_gradient(x),
        lambda _, x: x,
        lambda g, y: lax.custom_linear_solve(g, y, linear, linear),
    )


def external(value_and_grad_np: Callable, x: Array) -> Array:
    """Values (batch,) at x (batch, ...) of a foreign function of float64 numpy arrays; differentiable once.

    Raises:
        NotImplementedError: at a second derivative.
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}: an external function takes (batch, d)")
    event = x.shape[1:]
    shapes = jax.ShapeDtypeStruct(x.shape[:1], x.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype)

    def on_host(x: Array) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(x)  # vmap puts axes in front of the batch
        values, grads = call_external(value_and_grad_np, np.array(x, np.float64).reshape(-1, *event))
        return values.reshape(x.shape[: x.ndim - len(event)]).astype(x.dtype), grads.reshape(x.shape).astype(x.dtype)

    @jax.custom_jvp
    def forward(x: Array) -> tuple[Array, Array]:
        return jax.pure_callback(on_host, shapes, x, vmap_method="expand_dims")

    @forward.defjvp
    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError("an external function has no second derivative: it gives values and gradients")

    values = jax.custom_vjp(lambda x: forward(x)[0])
    values.defvjp(forward, lambda grads, v: (v.reshape(v.shape + (1,) * len(event)) * grads,))
    return values(x)


# Control flow and transformations


def scan(body: Callable, carry: Tree, xs: Tree, *, reverse: bool = False) -> tuple[Tree, Tree]:
    """Runs carry, y = body(carry, x) over the leading axis of the leaves of xs, and stacks the ys in the order of the xs."""
    return lax.scan(body, carry, xs, reverse=reverse)


def while_loop(cond: Callable, body: Callable, state: Tree, *, max_steps: int) -> Tree:
    """Repeats state = body(state) while the scalar cond(state) holds, at most max_steps times; no derivatives."""
    state = jax.tree.map(lambda a: lax.stop_gradient(asarray(a)), state)
    # what the functions close over may be under differentiation, which a loop of unknown length refuses
    cond, cond_consts = jax.closure_convert(cond, state)
    body, body_consts = jax.closure_convert(body, state)
    cond_consts, body_consts = stop((cond_consts, body_consts))
    return lax.while_loop(
        lambda s: (s[0] < max_steps) & cond(s[1], *cond_consts),
        lambda s: (s[0] + 1, body(s[1], *body_consts)),
        (0, state),
    )[1]


def cond(pred: Any, a: Callable, b: Callable, *operands: Any) -> Any:
    """a(*operands) if the scalar pred else b(*operands); under vmap both run."""
    return lax.cond(pred, a, b, *operands)


def jit(f: Callable) -> Callable:
    """Compiles f."""
    return jax.jit(f)


def each(f: Callable, rngs: Sequence[Rng]) -> Iterator[Tree]:
    """f(rng) for each of these in order, compiled, on as many devices at a time as there are."""
    size = jax.local_device_count()
    if size == 1:
        yield from map(jax.jit(f), rngs)
        return
    together = jax.pmap(f)
    for i in range(0, len(rngs), size):
        group = list(rngs[i : i + size])
        found = together(xp.stack(group + group[-1:] * (size - len(group))))
        yield from (jax.tree.map(lambda a, k=k: a[k], found) for k in range(len(group)))


def vmap(f: Callable, in_axes: Any = 0) -> Callable:
    """Maps f over an axis of its arguments: an int or None for all, or a tuple with one for each; out axes lead."""
    return jax.vmap(f, in_axes=in_axes)


# Random numbers


def rng(seed: int, like: Array | None = None) -> Rng:
    """A key."""
    return jax.random.key(seed)


def split(rng: Rng, n: int = 2) -> Sequence[Rng]:
    """An array of n independent keys."""
    return jax.random.split(rng, n)


def normal(rng: Rng, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """Standard normal draws."""
    return jax.random.normal(rng, shape, _float(like))


def uniform(rng: Rng, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """Uniform draws in [0, 1)."""
    return jax.random.uniform(rng, shape, _float(like))


def gamma(rng: Rng, concentration: Any, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """Gamma draws of unit rate, differentiable in the concentration, which broadcasts to `shape`."""
    like = concentration if like is None and isinstance(concentration, Array) else like
    return jax.random.gamma(rng, concentration, shape, _float(like))


def categorical(rng: Rng, logits: Array, shape: tuple[int, ...] = ()) -> Array:
    """Indices of shape `shape + logits.shape[:-1]`, with probabilities softmax(logits)."""
    return jax.random.categorical(rng, logits, shape=(*shape, *logits.shape[:-1]))


def bernoulli(rng: Rng, p: Array, shape: tuple[int, ...] | None = None) -> Array:
    """Booleans, true with probability p, which broadcasts to `shape` (None: p's own)."""
    return jax.random.bernoulli(rng, p, shape)


def permutation(rng: Rng, n: int) -> Array:
    """A random order of range(n)."""
    return jax.random.permutation(rng, n)


def _float(like: Array | None) -> Any:
    """The dtype of `like` if that is a float's, else jax's default float."""
    return like.dtype if like is not None and xp.issubdtype(like.dtype, xp.floating) else float
