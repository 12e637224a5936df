"""Trees of arrays: nested dicts, tuples (named ones too) and lists. Dict keys are visited in sorted order, as jax does.

None is an empty node; empty dicts, tuples and lists are kept. Everything else is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import array_api_compat

Tree = Any


def map(f: Callable, tree: Tree, *rest: Tree) -> Tree:
    """A tree like `tree` with f(leaf, *leaves of rest) at its leaves.

    Raises:
        ValueError: a tree of `rest` lacks the structure of the first.
    """
    if tree is None or isinstance(tree, (dict, tuple, list)):
        for other in rest:
            _check_same(tree, other)
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {k: map(f, tree[k], *[r[k] for r in rest]) for k in sorted(tree)}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [map(f, *children) for children in zip(tree, *rest, strict=True)])
    return f(tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """The leaves in order."""
    return list(_walk(tree))


def paths(tree: Tree) -> dict[str, Any]:
    """The leaves in order under their paths, such as "layers.0.weight".

    Raises:
        ValueError: two leaves share a path, because a key has a dot in it.
    """
    names = list(_names(tree, ()))
    if len(set(names)) < len(names):
        raise ValueError(f"tree has two leaves of the same path among {names}: use keys without dots")
    return dict(zip(names, leaves(tree), strict=True))


def unflatten(template: Tree, values: Mapping[str, Any] | Sequence[Any]) -> Tree:
    """A tree like `template` with the given leaves: a mapping from paths, or a sequence in the order of `leaves`.

    Raises:
        ValueError: leaves are missing or too many.
    """
    if isinstance(values, Mapping):
        names = list(paths(template))
        missing, extra = sorted(set(names) - set(values)), sorted(set(values) - set(names))
        if missing or extra:
            raise ValueError(f"values do not fit the template: missing {missing}, not in the template {extra}")
        values = [values[name] for name in names]
    remaining = iter(values)
    try:
        tree = map(lambda _: next(remaining), template)
    except StopIteration:
        raise ValueError(f"values has {len(values)} leaves: fewer than the template") from None
    if next(remaining, _END) is not _END:
        raise ValueError(f"values has {len(values)} leaves: more than the template")
    return tree


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of leaves stacked on a new leading axis, from trees of the same structure."""
    if not trees:
        raise ValueError("trees is empty: nothing to stack")
    return map(lambda *xs: array_api_compat.array_namespace(*xs).stack(xs), *trees)


def index(tree: Tree, i: Any) -> Tree:
    """A tree of leaf[i] for every leaf; index(stack(trees), i) is trees[i]."""
    return map(lambda x: x[i], tree)


_END = object()


def _like(node: tuple | list, children: list) -> tuple | list:
    if hasattr(node, "_fields"):
        return type(node)(*children)
    return children if isinstance(node, list) else tuple(children)


def _walk(tree: Tree) -> Iterator[Any]:
    if isinstance(tree, dict):
        for k in sorted(tree):
            yield from _walk(tree[k])
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            yield from _walk(child)
    elif tree is not None:
        yield tree


def _names(tree: Tree, prefix: tuple[str, ...]) -> Iterator[str]:
    if isinstance(tree, dict):
        for k in sorted(tree):
            yield from _names(tree[k], (*prefix, str(k)))
    elif isinstance(tree, (tuple, list)):
        for i, child in enumerate(tree):
            yield from _names(child, (*prefix, str(i)))
    elif tree is not None:
        yield ".".join(prefix)


def _check_same(tree: Tree, other: Tree) -> None:
    """ValueError unless two nodes have the same kind and the same children."""
    if isinstance(tree, dict):
        same = isinstance(other, dict) and tree.keys() == other.keys()
    elif tree is None:
        same = other is None
    else:
        same = isinstance(other, (tuple, list)) and isinstance(other, tuple) == isinstance(tree, tuple)
        same = same and len(tree) == len(other)
    if not same:
        raise ValueError(f"trees differ in structure: {_brief(tree)} beside {_brief(other)}")


def _brief(node: Tree) -> str:
    if isinstance(node, dict):
        return f"a dict of {sorted(node)}"
    if isinstance(node, (tuple, list)):
        return f"a {type(node).__name__} of {len(node)}"
    return "None" if node is None else f"a {type(node).__name__}"
