"""Flow files: safetensors with a JSON description in the header. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.config import Configured, build, describe
from flowppl.errors import FlowFileError
from flowppl.flows.flow import Flow

FORMAT = "flowppl-1"
_MAX_NODES = (
    10_000  # objects and numbers of a description, repeated layers counted: building it stays a matter of seconds
)


def write(path: str | os.PathLike[str], flow: Flow, variables: dict[str, Any], extra: dict[str, Any]) -> None:
    """Writes a flow and its arrays; an interrupted write leaves an older file as it was.

    Args:
        path: Where to.
        flow: The description.
        variables: What `flow.init` returned, trained or not, of either framework.
        extra: What else belongs to it, as JSON types.
    """
    _write(path, {"flow": describe(flow), "extra": extra}, on_host(variables))


def write_parts(
    path: str | os.PathLike[str], kind: str, parts: Mapping[str, Configured], variables: Any, extra: dict[str, Any]
) -> None:
    """Writes what consists of several flows and networks, as `write` does.

    Args:
        path: Where to.
        kind: What they make up: only what is of this kind reads the file.
        parts: Their descriptions.
        variables: A tree of all arrays.
        extra: What else belongs to it, as JSON types.
    """
    described = {name: describe(part) for name, part in parts.items()}
    _write(path, {"kind": kind, "parts": described, "extra": extra}, on_host(variables))


def _write(path: str | os.PathLike[str], description: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    text = json.dumps(description, sort_keys=True)
    replace(path, save(arrays, {"format": FORMAT, "description": text, "sha256": _digest(text, arrays)}))


def on_host(arrays: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their paths, as safetensors takes them."""
    return {name: np.asarray(backend_of(a).to_numpy(a), order="C") for name, a in tree.paths(arrays).items()}


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all: an older one stays if writing is interrupted or the disk is full."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[Flow, dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `write` wrote: the flow, its arrays by name, and the extra.

    Raises:
        FlowFileError: the file is missing, foreign, truncated or altered, or describes what no flow can be.
    """
    kind, parts, arrays, extra = _read(path)
    if kind is not None:
        raise FlowFileError(f"{path} is of kind {kind!r} and not of a flow: what has saved it loads it")
    flow = parts["flow"]
    if not isinstance(flow, Flow):
        raise FlowFileError(f"{path} describes a {type(flow).__name__}, not a flow")
    return flow, arrays, extra


def read_parts(
    path: str | os.PathLike[str], kind: str, types: Mapping[str, type]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `write_parts` wrote: the parts, their arrays by name, and the extra.

    Args:
        path: The file.
        kind: What it has to be.
        types: Of the parts that there may be; the first has to be there.

    Raises:
        FlowFileError: the file is missing, foreign, truncated or altered, of another kind, or has other parts.
    """
    found, parts, arrays, extra = _read(path)
    if found != kind:
        raise FlowFileError(f"{path} is of {'a flow' if found is None else f'kind {found!r}'} and not of kind {kind!r}")
    fits = next(iter(types)) in parts and all(isinstance(part, types.get(name, ())) for name, part in parts.items())
    if not fits:
        got = ", ".join(f"{name}, a {type(part).__name__}" for name, part in parts.items())
        raise FlowFileError(f"{path} has not the parts of kind {kind!r}: it has {got or 'none'}")
    return parts, arrays, extra


def require(path: str | os.PathLike[str], extra: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares what a file says of the model that it was saved for with a model.

    Raises:
        FlowFileError: they differ.
    """
    for name, value in expected.items():
        if extra.get(name) != value:
            raise FlowFileError(
                f"{path} does not fit the model: its {name} are {extra.get(name)}, those of the model {value}"
            )


def _read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """The kind (None for a flow alone), parts by name, arrays and extra."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                got = header.get("format")
                raise FlowFileError(f"{path} is not a flow file: its format is {got!r}, not {FORMAT!r}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, FlowFileError):
            raise
        raise FlowFileError(f"{path} cannot be read as a flow file: {error}") from error
    text = header.get("description", "")
    if header.get("sha256") != _digest(text, arrays):
        raise FlowFileError(f"{path} is damaged: its checksum does not match; save it again")
    try:
        description = json.loads(text)
        kind, extra = description.get("kind"), description["extra"]
        described = {"flow": description["flow"]} if kind is None else description["parts"]
        nodes = sum(map(_count, described.values()))
        if nodes > _MAX_NODES:
            raise FlowFileError(f"{path} describes a flow of {nodes} parts: more than {_MAX_NODES}")
        largest = max(1024, sum(a.size for a in arrays.values()))
        parts = {name: build(part, largest) for name, part in described.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, FlowFileError):
            raise
        raise FlowFileError(f"{path} has no valid description: {error}") from error
    if not isinstance(extra, dict):
        raise FlowFileError(f"{path} has no valid description: its extra is a {type(extra).__name__}")
    return kind, parts, arrays, extra


def restore(
    arrays: dict[str, np.ndarray], template: dict[str, Any] | Callable[[], dict[str, Any]], like: Any = None
) -> dict[str, Any]:
    """Puts a file's arrays into the tree of `template`, which has the flow's shapes (abstract arrays will do).

    Args:
        arrays: By name, as `read` returns them.
        template: What the flow's `init` returns, or arrays without values; or a function that makes it, whose errors
            are the file's: a description may pass for a flow and still have sizes that no array has.
        like: An array of the framework, dtype and device to convert to.

    Raises:
        FlowFileError: names, shapes or kinds of number differ.
    """
    if callable(template):
        try:
            template = template()
        except Exception as error:  # whatever a hostile description leads to
            raise FlowFileError(f"the file describes a flow that cannot be built: {error}") from error
    expected = {name: (tuple(a.shape), _is_float(a)) for name, a in tree.paths(template).items()}
    found = {name: (a.shape, _is_float(a)) for name, a in arrays.items()}
    if expected != found:
        name = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))[0]
        got, want = (
            "nothing" if k is None else f"{'floats' if k[1] else 'integers'} of shape {k[0]}"
            for k in (found.get(name), expected.get(name))
        )
        raise FlowFileError(f"the file does not fit the flow: {name} is {got} in the file and {want} in the flow")
    return tree.unflatten(template, {k: backend_of(like).asarray(v, like) for k, v in arrays.items()})


def _is_float(a: Any) -> bool:
    return "float" in str(a.dtype)  # of any framework


def _count(description: Any) -> int:
    """Nodes of a description; those inside a stack count as often as it repeats them."""
    if isinstance(description, list):
        return 1 + sum(map(_count, description))
    if isinstance(description, dict):
        depth = description.get("depth", 1)
        return (1 + sum(map(_count, description.values()))) * (max(depth, 1) if isinstance(depth, int) else 1)
    return 1


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()
