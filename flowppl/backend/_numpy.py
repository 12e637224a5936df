"""The backend protocol for numpy: a reference without derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import array_api_compat.numpy as xp
import numpy as np
import scipy

from flowppl import tree
from flowppl.backend.protocol import Rng, Tree

__all__ = ["call_external", "name", "xp"]

name = "numpy"
Array = np.ndarray


def machine() -> dict[str, str]:
    """The version, to read."""
    return {"numpy": np.__version__}


# Arrays


def stop(x: Tree) -> Tree:
    """Gives x itself."""
    return x


def asarray(a: Any, like: Array | None = None) -> Array:
    """An array; floats take the dtype of `like`, integers and booleans keep theirs."""
    a = np.asarray(a)
    if like is not None and np.issubdtype(like.dtype, np.floating) and np.issubdtype(a.dtype, np.floating):
        return a.astype(like.dtype, copy=False)
    return a


def to_numpy(x: Array) -> Array:
    """The values as an array."""
    return np.asarray(x)


def gather(x: Array, idx: Array, axis: int) -> Array:
    """take_along_axis: idx has the rank of x, is not negative and broadcasts against x off `axis`."""
    return np.take_along_axis(x, idx, axis)


def set_at(x: Array, idx: Any, v: Array) -> Array:
    """A copy of x with x[idx] = v."""
    out = np.array(x)
    out[idx] = v
    return out


def index_add(x: Array, idx: Array, v: Array, axis: int) -> Array:
    """A copy of x with v[i] added at idx[i] along `axis`; idx is 1-D, repeats add up, v has len(idx) on `axis`."""
    out = np.array(x)
    at: Any = (slice(None),) * (axis % x.ndim) + (idx,)
    np.add.at(out, at, v)
    return out


# Special functions


def _special(name: str, x: Array) -> Array:
    return getattr(scipy.special, name)(x)


erf, ndtri, log_ndtr = partial(_special, "erf"), partial(_special, "ndtri"), partial(_special, "log_ndtr")
lgamma, digamma = partial(_special, "gammaln"), partial(_special, "digamma")


def softmax(x: Array, axis: int = -1) -> Array:
    """Softmax along an axis."""
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def logsumexp(x: Array, axis: int = -1) -> Array:
    """Log of the sum of exponentials along an axis, which is dropped."""
    return np.logaddexp.reduce(x, axis=axis)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.logaddexp(x, np.zeros_like(x))


def log_i0(x: Array) -> Array:
    """Log of the modified Bessel function I0; finite for any finite x."""
    return np.log(_special("i0e", x)) + np.abs(x)


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, np.zeros_like(x))


def silu(x: Array) -> Array:
    """The product x sigmoid(x)."""
    return x * np.exp(-softplus(-x))


def gelu(x: Array) -> Array:
    """The product x Phi(x), exact."""
    return x * _special("ndtr", x)


def solve_triangular(a: Array, b: Array, *, lower: bool, transpose: bool = False, unit: bool = False) -> Array:
    """Solves a x = b, or a^T x = b, for a (..., d, d) and b (..., d, k); batch dimensions broadcast."""
    a = np.tril(a) if lower else np.triu(a)
    if unit:
        eye = np.eye(a.shape[-1], dtype=a.dtype)
        a = a * (1 - eye) + eye
    return np.linalg.solve(np.swapaxes(a, -1, -2) if transpose else a, b)


# Derivatives


def _no_derivatives(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("numpy arrays have no derivatives: pass torch tensors or jax arrays")


vjp = value_and_grad = value_and_score = _no_derivatives


def shielded(f: Callable, x: Array) -> tuple[Array, ...]:
    """f(x) itself: numpy has no derivatives."""
    return f(x)


def implicit(step: Callable, args: Tree, x: Array, *, max_steps: int, tol: float) -> Array:
    """The solution x itself: numpy has no derivatives."""
    return x


def external(value_and_grad_np: Callable, x: Array) -> Array:
    """Values (batch,) at x (batch, ...) of a foreign function of float64 numpy arrays."""
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}: an external function takes (batch, d)")
    return asarray(call_external(value_and_grad_np, np.array(x, np.float64))[0], x)


def call_external(f: Callable, x: Array) -> tuple[Array, Array]:
    """(values, gradients) of a foreign function, in float64 and with the right shapes, or a ValueError."""
    values, grads = (np.asarray(a, np.float64) for a in f(x))
    if values.shape != x.shape[:1] or grads.shape != x.shape:
        raise ValueError(
            f"an external function got x of shape {x.shape} and gave values of shape {values.shape} and gradients of "
            f"shape {grads.shape}: expected {x.shape[:1]} and {x.shape}"
        )
    return values, grads


# Control flow and transformations


def scan(body: Callable, carry: Tree, xs: Tree, *, reverse: bool = False) -> tuple[Tree, Tree]:
    """Runs carry, y = body(carry, x) over the leading axis of the leaves of xs, and stacks the ys in the order of the xs."""
    lengths = {len(x) for x in tree.leaves(xs)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"xs has leading axes {sorted(lengths)}: scan needs one length, of at least one")
    ys = []
    steps = range(lengths.pop())
    for i in reversed(steps) if reverse else steps:
        carry, y = body(carry, tree.index(xs, i))
        ys.append(tree.map(np.asarray, y))
    return carry, tree.stack(ys[::-1] if reverse else ys)


def while_loop(cond: Callable, body: Callable, state: Tree, *, max_steps: int) -> Tree:
    """Repeats state = body(state) while the scalar cond(state) holds, at most max_steps times."""
    for _ in range(max_steps):
        if not cond(state):
            break
        state = body(state)
    return state


def cond(pred: Any, a: Callable, b: Callable, *operands: Any) -> Any:
    """a(*operands) if the scalar pred else b(*operands)."""
    return a(*operands) if pred else b(*operands)


def jit(f: Callable) -> Callable:
    """Gives f itself."""
    return f


def each(f: Callable, rngs: Sequence[Rng]) -> Iterator[Tree]:
    """f(rng) for each of these in order."""
    return map(f, rngs)


def vmap(f: Callable, in_axes: Any = 0) -> Callable:
    """Maps f over an axis of its arguments: an int or None for all, or a tuple with one for each; out axes lead."""

    def mapped(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
        pairs = list(zip(args, axes, strict=True))
        n = next(x.shape[axis] for a, axis in pairs if axis is not None for x in tree.leaves(a))

        def row(i: int) -> list:
            return [a if axis is None else tree.map(partial(np.take, indices=i, axis=axis), a) for a, axis in pairs]

        return tree.stack([tree.map(np.asarray, f(*row(i))) for i in range(n)])

    return mapped


# Random numbers


def rng(seed: int, like: Array | None = None) -> Rng:
    """A generator."""
    return np.random.default_rng(seed)


def split(rng: Rng, n: int = 2) -> Sequence[Rng]:
    """The same generator n times: it is its own state."""
    return [rng] * n


def normal(rng: Rng, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """Standard normal draws."""
    return asarray(rng.standard_normal(shape), like)


def uniform(rng: Rng, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """Uniform draws in [0, 1)."""
    return rng.random(shape, np.float32 if like is not None and like.dtype == np.float32 else np.float64)


def gamma(rng: Rng, concentration: Any, shape: tuple[int, ...], like: Array | None = None) -> Array:
    """Gamma draws of unit rate; the concentration broadcasts to `shape`."""
    return asarray(rng.standard_gamma(concentration, shape), like)


def categorical(rng: Rng, logits: Array, shape: tuple[int, ...] = ()) -> Array:
    """Indices of shape `shape + logits.shape[:-1]`, with probabilities softmax(logits)."""
    return np.argmax(logits + rng.gumbel(size=(*shape, *logits.shape)), -1)


def bernoulli(rng: Rng, p: Array, shape: tuple[int, ...] | None = None) -> Array:
    """Booleans, true with probability p, which broadcasts to `shape` (None: p's own)."""
    return rng.random(np.shape(p) if shape is None else shape) < p


def permutation(rng: Rng, n: int) -> Array:
    """A random order of range(n)."""
    return rng.permutation(n)
