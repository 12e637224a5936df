"""The trainable affine layer at the data end, where a guide puts what it knows of location and scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowppl.bijections import Chain, LULinear
from flowppl.bijections.base import Array
from flowppl.flows.flow import Flow


def with_affine_end(flow: Flow) -> Flow:
    """Returns the flow, with an affine layer appended unless it ends with one."""
    bijection = flow.bijection
    if isinstance(_last(bijection), LULinear):
        return flow
    return replace(flow, bijection=Chain((bijection, LULinear(flow.dim))))


def place(flow: Flow, variables: dict[str, Any], loc: Array, scale_tril: Array) -> dict[str, Any]:
    """Returns the variables with the affine end set to x -> loc + scale_tril x.

    Args:
        flow: A flow that ends with an affine layer.
        variables: What its `init` returned.
        loc: `(dim,)`.
        scale_tril: `(dim, dim)`, lower triangular with a positive diagonal.
    """
    end = LULinear.from_cholesky(loc, scale_tril)
    params = variables["params"]["bijection"]
    placed = end if isinstance(flow.bijection, LULinear) else (*params[:-1], end)
    return {**variables, "params": {**variables["params"], "bijection": placed}}


def _last(bijection: Any) -> Any:
    return bijection.bijections[-1] if isinstance(bijection, Chain) else bijection
