"""Saving and loading flows; a file from either front loads in both."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from flowppl.flows import Flow, files


def save_flow(path: str | os.PathLike[str], flow: Flow, variables: dict[str, Any]) -> None:
    """Saves a flow with its arrays.

    Args:
        path: Where to; an older file is replaced only when the new one is whole.
        flow: The flow.
        variables: What `flow.init` returned, trained or not.
    """
    files.write(path, flow, variables, {})


def load_flow(path: str | os.PathLike[str]) -> tuple[Flow, dict[str, Any]]:
    """Loads a flow and its arrays, in jax's default float type.

    Raises:
        FlowFileError: the file is missing, foreign, damaged or describes what no flow can be; nothing in it is run.

    Example:
        >>> import jax, os, tempfile
        >>> from flowppl import flows
        >>> from flowppl.numpyro import load_flow, save_flow
        >>> flow = flows.realnvp(layers=2)(dim=3)
        >>> path = os.path.join(tempfile.mkdtemp(), "q.flow")
        >>> save_flow(path, flow, flow.init(jax.random.key(0)))
        >>> load_flow(path)[0] == flow
        True
    """
    flow, arrays, _ = files.read(path)
    return flow, restore(flow, arrays)


def shapes_of(flows: dict[str, Flow]) -> dict[str, Any]:
    """Abstract variables of flows, by name."""
    return {name: jax.eval_shape(flow.init, jax.random.key(0)) for name, flow in flows.items()}


def restore(flow: Flow, arrays: dict[str, Any], like: Any = None) -> dict[str, Any]:
    """A file's arrays as the flow's variables, in the dtype of `like` (None: jax's default)."""
    like = jnp.zeros(()) if like is None else like
    return files.restore(arrays, lambda: jax.eval_shape(flow.init, jax.random.key(0)), like)
