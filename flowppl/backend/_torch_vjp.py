"""Pullbacks for torch: by `torch.func`, or plainly where that gives the same for less."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch

from flowppl import tree
from flowppl.backend.protocol import Tree


def stop(x: Tree) -> Tree:
    """No derivative flows through any leaf."""
    return tree.map(lambda a: a.detach() if isinstance(a, Tensor) else a, x)


def vjp(f: Callable, *primals: Tree, has_aux: bool = False, once: bool = False) -> tuple:
    """(out, pullback) or (out, pullback, aux); pullback(cotangent of out) is a tuple, one entry per primal.

    `once` says that what is pulled back needs no derivatives of its own, which saves recording it, and torch.func's wrappers where
    no transformation of functions is under way.
    """
    if once and _is_plain():
        return _vjp_once(f, primals, has_aux)
    spec: list[Tree] = []

    def flat(*leaves: Tensor) -> tuple:  # torch.func takes no None in a tree
        values = tree.unflatten(primals, leaves)
        out, aux = f(*values) if has_aux else (f(*values), ())
        spec.extend((outline(out), outline(aux)))
        return tuple(tree.leaves(out)), tuple(torch.as_tensor(a) for a in tree.leaves(aux))

    out, pull, aux = torch.func.vjp(flat, *tree.leaves(primals), has_aux=True)

    def pullback(cotangent: Tree) -> tuple:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not once):
            return tree.unflatten(primals, pull(tuple(tree.leaves(cotangent))))

    out = tree.unflatten(spec[0], out)
    return (out, pullback, tree.unflatten(spec[1], aux)) if has_aux else (out, pullback)


def _vjp_once(f: Callable, primals: tuple, has_aux: bool) -> tuple:
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: what f closes over may be the same tensors, whose derivatives are not asked for.
        primals = tree.map(lambda p: p.view_as(p) if p.requires_grad else p.detach().requires_grad_(), primals)
        out, *aux = f(*primals) if has_aux else (f(*primals),)

    def pullback(cotangent: Tree) -> tuple:
        pairs = [(o, c) for o, c in zip(tree.leaves(out), tree.leaves(cotangent), strict=True) if o.requires_grad]
        leaves = tree.leaves(primals)
        if not pairs:
            return tree.map(torch.zeros_like, stop(primals))
        outs, cotangents = zip(*pairs, strict=True)
        grads = torch.autograd.grad(
            outs, leaves, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return tree.unflatten(primals, grads)

    return (out if recording else stop(out), pullback, *(aux if recording else stop(aux)))


def _is_plain() -> bool:
    """Whether tensors are what they seem: nothing is mapped, differentiated as a function, compiled or traced."""
    hidden = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_inference_mode_enabled()
    return _functorch.maybe_current_level() is None and not hidden


def outline(x: Tree) -> Tree:
    """The structure of a tree, without holding on to its leaves."""
    return tree.map(lambda _: 0, x)
