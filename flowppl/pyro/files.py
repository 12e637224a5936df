"""Saving and loading flows; a file from either front loads in both."""

from __future__ import annotations

import os
from typing import Any

import torch

from flowppl.flows import Flow, files
from flowppl.pyro.modules import template


def save_flow(path: str | os.PathLike[str], flow: Flow, variables: dict[str, Any]) -> None:
    """Saves a flow with its arrays.

    Args:
        path: Where to; an older file is replaced only when the new one is whole.
        flow: The flow.
        variables: What `flow.init` returned, trained or not.
    """
    files.write(path, flow, variables, {})


def load_flow(path: str | os.PathLike[str]) -> tuple[Flow, dict[str, Any]]:
    """Loads a flow and its arrays, in torch's default float type and device.

    Raises:
        FlowFileError: the file is missing, foreign, damaged or describes what no flow can be; nothing in it is run.

    Example:
        >>> import os, tempfile, torch
        >>> from flowppl import flows
        >>> from flowppl.pyro import load_flow, save_flow
        >>> flow = flows.realnvp(layers=2)(dim=3)
        >>> path = os.path.join(tempfile.mkdtemp(), "q.flow")
        >>> save_flow(path, flow, flow.init(torch.Generator()))
        >>> load_flow(path)[0] == flow
        True
    """
    flow, arrays, _ = files.read(path)
    return flow, files.restore(arrays, lambda: template(flow), torch.empty(0))
