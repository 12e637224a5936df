"""Where an interrupted run goes on from: one file, replaced as a whole after every chunk of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.errors import CheckpointError
from flowppl.flows.files import on_host, replace
from flowppl.training import Move, Record

FORMAT = "flowppl-checkpoint-1"


class Checkpoint:
    """A file with the state of a run, a tree of arrays, and the records of training that led to it.

    A process may be killed at any time: the file is whole, and a rerun ends where an uninterrupted run would have.

    Args:
        path: The file.
        task: What runs and how, as JSON types: a file of another task is an error.
    """

    def __init__(self, path: str | os.PathLike[str], task: Any) -> None:
        self._path, self._task = Path(path), json.loads(json.dumps(task))

    def beside(self, name: str) -> Checkpoint:
        """The checkpoint of another part of the same task, in a file of its own."""
        return Checkpoint(f"{self._path}.{name}", self._task)

    def save(self, state: Any, history: Sequence[Record]) -> None:
        """Replaces the file.

        Raises:
            OSError: it cannot be written; the older one is still there.
        """
        text = json.dumps({"task": self._task, "history": history})
        replace(self._path, save(on_host(state), {"format": FORMAT, "description": text}))

    def load(self, template: Any) -> tuple[Any, list[Record]] | None:
        """Reads the file into the arrays of `template`; None if there is none.

        Raises:
            CheckpointError: it is no checkpoint, or one of another task.
        """
        if not self._path.exists():
            return None
        try:
            with safe_open(str(self._path), framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{self._path} is not a checkpoint: its format is {header.get('format')!r}")
            found = json.loads(header["description"])
            history = [Record(Move(*row[0]), *row[1:]) for row in found["history"]]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self._path} cannot be read as a checkpoint: {error}") from error
        if found["task"] != self._task:
            differs = sorted(k for k in {*found["task"], *self._task} if found["task"].get(k) != self._task.get(k))
            raise CheckpointError(
                f"{self._path} is of another fit: {', '.join(differs)} differ. Remove it, or name another file"
            )
        leaves = tree.paths(template)
        if {k: a.shape for k, a in arrays.items()} != {k: tuple(a.shape) for k, a in leaves.items()}:
            raise CheckpointError(f"{self._path} is of another fit: its arrays have other shapes")
        values = {k: backend_of(a).asarray(arrays[k], a) for k, a in leaves.items()}
        return tree.unflatten(template, values), history
