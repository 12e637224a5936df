"""Which framework an array belongs to. The rest of the core asks here; importing this imports no framework."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from flowppl.backend.protocol import Array, Backend, Rng, Tree

__all__ = ["Array", "Backend", "Rng", "Tree", "backend_of", "backend_of_rng", "get_backend"]

_ROOTS = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "numpy": "numpy"}
# torch.compile reads plain dictionaries, but no lru_cache and no __mro__ of Python's own types.
_KINDS: dict[type, str] = dict.fromkeys((bool, int, float, complex, str, type(None)), "other")
_BACKENDS: dict[str, Backend] = {}


def backend_of(*arrays: Tree) -> Backend:
    """The backend of the arrays (or of the leaves of trees of them); numpy arrays decide only where nothing else does.

    Raises:
        TypeError: torch beside jax, or no array at all.
    """
    found: dict[str, Any] = {}
    _collect(arrays, found)
    if "torch" in found and "jax" in found:
        raise TypeError(
            f"one call got torch ({found['torch'].__name__}) and jax ({found['jax'].__name__}) arrays: convert one of "
            "them first, for example through numpy with torch.as_tensor(numpy.array(x)) or jax.numpy.asarray(x.numpy())"
        )
    for name in ("torch", "jax", "numpy"):
        if name in found:
            return get_backend(name)
    raise TypeError(
        "expected at least one torch, jax or numpy array among the arguments, got "
        + (", ".join(type(a).__name__ for a in arrays) or "none")
    )


def backend_of_rng(rng: Rng) -> Backend:
    """The backend whose draws take `rng`; None means torch and its global generator.

    Raises:
        TypeError: not a random number generator, or None where torch is not installed.
    """
    if rng is None:
        if importlib.util.find_spec("torch") is None:
            raise TypeError(
                "rng is None, torch's global generator, and torch is not installed: pass jax.random.key(seed)"
            )
        return get_backend("torch")
    kind = _kind(type(rng))
    if kind == "jax" or (kind in ("torch", "numpy") and type(rng).__name__ == "Generator"):
        return get_backend(kind)
    raise TypeError(
        f"rng is {type(rng).__name__}: expected a jax.random.key(seed), a torch.Generator (None: torch's global one) "
        "or a numpy.random.Generator"
    )


def get_backend(name: str) -> Backend:
    """The backend by name: "torch", "jax" or "numpy"."""
    if name not in _BACKENDS:
        if name not in ("torch", "jax", "numpy"):
            raise ValueError(f'name is {name!r}: expected "torch", "jax" or "numpy"')
        _BACKENDS[name] = importlib.import_module(f"flowppl.backend._{name}")
    return _BACKENDS[name]


def _collect(nodes: Any, found: dict[str, Any]) -> None:
    for node in nodes:
        kind = _kind(type(node))
        if kind == "dict":
            _collect(node.values(), found)
        elif kind == "sequence":
            _collect(node, found)
        elif kind != "other":
            found.setdefault(kind, type(node))


def _kind(cls: type) -> str:
    """The framework of a type, "dict" or "sequence" for the nodes of a tree, or "other"."""
    kind = _KINDS.get(cls)
    if kind is None:
        if issubclass(cls, dict):
            kind = "dict"
        elif issubclass(cls, (tuple, list)):
            kind = "sequence"
        else:
            kind = next(filter(None, (_ROOTS.get(c.__module__.partition(".")[0]) for c in cls.__mro__)), "other")
        _KINDS[cls] = kind
    return kind
