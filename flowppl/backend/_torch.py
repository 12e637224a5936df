"""The backend protocol for torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch

from flowppl import tree
from flowppl.backend._numpy import call_external
from flowppl.backend._torch_random import (
    bernoulli,
    categorical,
    gamma,
    is_float,
    normal,
    permutation,
    rng,
    split,
    uniform,
)
from flowppl.backend._torch_special import (
    digamma,
    erf,
    gelu,
    lgamma,
    log_i0,
    log_ndtr,
    logsumexp,
    ndtri,
    relu,
    silu,
    softmax,
    softplus,
)
from flowppl.backend._torch_spline import rq_spline
from flowppl.backend._torch_vjp import outline, stop, vjp
from flowppl.backend.protocol import Tree

__all__ = [
    "bernoulli",
    "categorical",
    "digamma",
    "erf",
    "gamma",
    "gelu",
    "lgamma",
    "log_i0",
    "log_ndtr",
    "logsumexp",
    "name",
    "ndtri",
    "normal",
    "permutation",
    "relu",
    "rng",
    "rq_spline",
    "silu",
    "softmax",
    "softplus",
    "split",
    "stop",
    "uniform",
    "vjp",
    "xp",
]

name = "torch"


def machine() -> dict[str, str]:
    """The version, devices, default float and threads, to read."""
    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    threads = f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} beside each other"
    default = str(torch.get_default_dtype()).removeprefix("torch.")
    return {"torch": torch.__version__, "devices": ", ".join(devices), "default float": default, "threads": threads}


# Arrays


def asarray(a: Any, like: Tensor | None = None) -> Tensor:
    """A tensor with the device and, if both are floats, the dtype of `like`; without it, with torch's defaults."""
    if isinstance(a, Tensor) and like is None:
        return a
    if isinstance(a, (np.ndarray, np.generic)):
        a = np.array(a, order="C")  # neither shared with the caller nor read-only nor with negative strides
    out = torch.as_tensor(a, device=torch.get_default_device() if like is None else like.device)
    if not is_float(out) or (isinstance(a, Tensor) and not is_float(like)):
        return out
    dtype = like.dtype if is_float(like) else torch.get_default_dtype()
    if not isinstance(a, (Tensor, np.ndarray)):
        return torch.as_tensor(a, dtype=dtype, device=out.device)  # not by way of the default dtype, which rounds
    return out.to(dtype)


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy, detached and on the host."""
    return x.detach().cpu().numpy().copy() if isinstance(x, Tensor) else np.asarray(x)


def gather(x: Tensor, idx: Tensor, axis: int) -> Tensor:
    """take_along_axis: idx has the rank of x, is not negative and broadcasts against x off `axis`."""
    return torch.take_along_dim(x, idx.long(), axis)


def set_at(x: Tensor, idx: Any, v: Tensor) -> Tensor:
    """A copy of x with x[idx] = v."""
    if _functorch.maybe_current_level() is None:
        out = x.clone()
        out[idx] = v
        return out
    # vmap refuses to write a mapped v into an x that is not mapped, in place
    where = torch.arange(x.numel(), device=x.device).reshape(x.shape)[idx]
    v = torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(where.shape)
    return torch.index_put(x.reshape(-1), (where.reshape(-1),), v.reshape(-1)).reshape(x.shape)


def index_add(x: Tensor, idx: Tensor, v: Tensor, axis: int) -> Tensor:
    """A copy of x with v[i] added at idx[i] along `axis`; idx is 1-D, repeats add up, v has len(idx) on `axis`."""
    return torch.index_add(x, axis, idx, v)


def solve_triangular(a: Tensor, b: Tensor, *, lower: bool, transpose: bool = False, unit: bool = False) -> Tensor:
    """Solves a x = b, or a^T x = b, for a (..., d, d) and b (..., d, k); batch dimensions broadcast."""
    a, upper = (a.mT, lower) if transpose else (a, not lower)
    if a.ndim > 2 or b.ndim == 2:
        return torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unit)
    columns = b.movedim(-2, 0)  # one matrix and many right-hand sides: a solve of many columns copies no matrix
    x = torch.linalg.solve_triangular(a, columns.reshape(a.shape[-1], -1), upper=upper, unitriangular=unit)
    return x.reshape(columns.shape).movedim(0, -2)


# Derivatives


def value_and_grad(loss: Callable, params: Tree, *args: Any, has_aux: bool = False) -> tuple:
    """(value, grads) or ((value, aux), grads), all detached; leaves that the loss does not use have zero gradients."""
    with torch.enable_grad():
        params = tree.map(lambda p: p if p.is_leaf and p.requires_grad else p.detach().requires_grad_(), params)
        out = loss(params, *args)
        value = out[0] if has_aux else out
        leaves = tree.leaves(params)
        if value.requires_grad and leaves:
            grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        else:
            grads = tuple(torch.zeros_like(p) for p in stop(leaves))
    return stop(out), tree.unflatten(params, grads)


def value_and_score(log_prob: Callable, x: Tensor, attached: bool = False) -> tuple[Tensor, Tensor]:
    """log_prob(x) of (..., d) and its gradient in x, detached unless asked for; log_prob is foreign code, so plain autograd."""
    if attached and torch.is_grad_enabled():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = log_prob(x)
        return value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        value = log_prob(x)
        return value.sum(), value

    with torch.inference_mode(False):
        (_, value), score = value_and_grad(total, x.clone() if x.is_inference() else x, has_aux=True)
    return value, score


def shielded(f: Callable, x: Tensor) -> tuple[Tensor, ...]:
    """f(x), arrays of as many rows as x `(n, d)`; no derivative flows back from a row where one is not finite."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return f(x)
    x = x.view_as(x)
    found = f(x)
    fine = torch.stack([a.detach().isfinite().reshape(len(a), -1).all(-1) for a in found]).all(0)[:, None]
    x.register_hook(lambda grad: torch.where(fine, grad, torch.zeros_like(grad)))
    return found


def implicit(step: Callable, args: Tree, x: Tensor, *, max_steps: int, tol: float) -> Tensor:
    """The solution x of x = step(args, x), found in whatever way, with its implicit derivatives, which are of any order.

    Derivatives are in `args` alone: not in what `step` closes over. The linear equation behind them is iterated until no element
    changes by more than tol times its size.
    """
    if torch.compiler.is_compiling():  # not a decorator, which would import the compiler: seconds, for everyone
        return torch.compiler.disable(implicit)(step, args, x, max_steps=max_steps, tol=tol)

    def at(*tensors: Tensor) -> Callable:
        return partial(step, _refill(args, torch.is_tensor, tensors))

    return _Implicit.apply(at, None, max_steps, tol, x.detach(), *filter(torch.is_tensor, tree.leaves(args)))


class _Implicit(torch.autograd.Function):
    """x with the derivatives of x = at(*tensors)(x). Its backward solves w = v + J^T w by another one, differentiable again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(at: Callable, scale: Tensor | None, max_steps: int, tol: float, x: Tensor, *tensors: Tensor) -> Tensor:
        if scale is None:
            return x.clone()
        step = at(*tensors)

        def body(state: tuple) -> tuple:
            new = step(state[0])
            return new, torch.any(torch.abs(new - state[0]) > tol * (scale + torch.abs(new)))

        start = (x.clone(), torch.ones((), dtype=torch.bool, device=x.device))
        return while_loop(lambda state: state[1], body, start, max_steps=max_steps)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.at, _, ctx.max_steps, ctx.tol, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple:
        at = ctx.at
        x, *tensors = ctx.saved_tensors

        def linear(x: Tensor, v: Tensor, *tensors: Tensor) -> Callable:
            _, pull = vjp(at(*tensors), x)
            return lambda w: v + pull(w)[0]

        scale = torch.amax(torch.abs(v.detach()), -1, keepdim=True)
        w = _Implicit.apply(linear, scale, ctx.max_steps, ctx.tol, v.detach(), x, v, *tensors)
        _, pull = vjp(lambda *floats: at(*_refill(tensors, is_float, floats))(x), *filter(is_float, tensors))
        grads = _refill([a if is_float(a) else None for a in tensors], is_float, pull(w))
        return None, None, None, None, None, *grads


def external(value_and_grad_np: Callable, x: Tensor) -> Tensor:
    """Values (batch,) at x (batch, ...) of a foreign function of float64 numpy arrays; differentiable once.

    Raises:
        NotImplementedError: at a second derivative.
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: an external function takes (batch, d)")
    if torch.compiler.is_compiling():
        return torch.compiler.disable(external)(value_and_grad_np, x)
    return _External.apply(value_and_grad_np, x)[0]


class _External(torch.autograd.Function):
    """Values and gradients; backward hands on the gradients as outputs of this node, and so sees second derivatives."""

    @staticmethod
    def forward(f: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = call_external(f, to_numpy(x.double()))
        return asarray(values, x), asarray(grads, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, second: Tensor | None) -> tuple:
        if second is not None:
            raise NotImplementedError("an external function has no second derivative: it gives values and gradients")
        (grads,) = ctx.saved_tensors
        return None, None if v is None else v.reshape(v.shape + (1,) * (grads.ndim - 1)) * grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple, f: Callable, x: Tensor) -> tuple:
        x = x.movedim(in_dims[1], 0)
        values, grads = _External.apply(f, x.reshape(-1, *x.shape[2:]))
        return (values.reshape(x.shape[:2]), grads.reshape(x.shape)), (0, 0)


# Control flow and transformations


def scan(body: Callable, carry: Tree, xs: Tree, *, reverse: bool = False) -> tuple[Tree, Tree]:
    """Runs carry, y = body(carry, x) over the leading axis of the leaves of xs, and stacks the ys in the order of the xs."""
    columns = [x.unbind(0) for x in tree.leaves(xs)]
    if not columns or not columns[0]:
        raise ValueError("xs has no rows: scan needs at least one leaf with a leading axis of at least one")
    ys = []
    rows = list(zip(*columns, strict=True))
    for row in reversed(rows) if reverse else rows:
        carry, y = body(carry, tree.unflatten(xs, row))
        ys.append(y)
    return carry, tree.stack(ys[::-1] if reverse else ys)


def while_loop(cond: Callable, body: Callable, state: Tree, *, max_steps: int) -> Tree:
    """Repeats state = body(state) while the scalar cond(state) holds, at most max_steps times; no derivatives.

    Leaves early where Python can see cond's value; else (vmap, compilation) runs all steps and masks.
    """
    state = stop(state)
    with torch.no_grad():
        for _ in range(max_steps):
            go = cond(state)
            if not _concrete(go):
                state = _select(go, body(state), state)
            elif go:
                state = body(state)
            else:
                break
    return state


def cond(pred: Any, a: Callable, b: Callable, *operands: Any) -> Any:
    """a(*operands) if the scalar pred else b(*operands); under vmap and compilation both run."""
    if _concrete(pred):
        return a(*operands) if pred else b(*operands)
    return _select(pred, a(*operands), b(*operands))


def jit(f: Callable) -> Callable:
    """Gives f itself: torch runs eagerly, and `torch.compile` is the user's choice."""
    return f


def each(f: Callable, rngs: Sequence[torch.Generator]) -> Iterator[Tree]:
    """f(rng) for each of these in order, detached; of a process group, such as `torchrun` makes, each process takes its part."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield from (stop(f(rng)) for rng in rngs)
        return
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mine = [tree.map(lambda a: a.cpu(), stop(f(rng))) for rng in rngs[rank::size]]
    parts: list[Any] = [None] * size
    torch.distributed.all_gather_object(parts, mine)
    yield from (parts[i % size][i // size] for i in range(len(rngs)))


def vmap(f: Callable, in_axes: Any = 0) -> Callable:
    """Maps f over an axis of its arguments: an int or None for all, or a tuple with one for each; out axes lead."""

    def mapped(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
        dims = tuple(axis for arg, axis in zip(args, axes, strict=True) for _ in tree.leaves(arg))
        spec: list[Tree] = []

        def flat(*leaves: Any) -> tuple:
            out = f(*tree.unflatten(args, leaves))
            spec.append(outline(out))
            return tuple(torch.as_tensor(a) for a in tree.leaves(out))

        out = torch.func.vmap(flat, dims, randomness="different")(*tree.leaves(args))
        return tree.unflatten(spec[0], out)

    return mapped


def _concrete(pred: Any) -> bool:
    """Whether Python may branch on pred: not mapped, compiled, traced or without data."""
    if not isinstance(pred, Tensor):
        return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or pred.is_meta:
        return False
    while _functorch.is_functorch_wrapped_tensor(pred):
        if _functorch.is_batchedtensor(pred):
            return False
        pred = _functorch.get_unwrapped(pred)
    return True


def _select(pred: Tensor, a: Tree, b: Tree) -> Tree:
    return tree.map(lambda u, v: torch.where(pred, u, v), a, b)


def _refill(x: Tree, which: Callable, values: Sequence[Any]) -> Tree:
    """A tree like x with the values, in order, in the places of the leaves that `which` picks."""
    given = iter(values)
    return tree.map(lambda a: next(given) if which(a) else a, x)
