"""The trainable affine layer at the data end, where a guide puts what it knows of location and scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flowppl.bijections import Chain, LULinear, TorusEnd
from flowppl.bijections.base import Array
from flowppl.flows.flow import Flow


def with_affine_end(flow: Flow) -> Flow:
    """Returns the flow, with an affine layer appended unless it ends with one."""
    if isinstance(_last(flow.bijection), LULinear | TorusEnd):
        return flow
    return replace(flow, bijection=Chain((flow.bijection, LULinear(flow.dim))))


def place(flow: Flow, variables: dict[str, Any], loc: Array, scale_tril: Array) -> dict[str, Any]:
    """Returns the variables with the affine end set to x -> loc + scale_tril x (angles are shifted alone).

    Args:
        flow: A flow that ends with an affine layer.
        variables: What its `init` returned.
        loc: `(dim,)`.
        scale_tril: `(dim, dim)`, lower triangular with a positive diagonal.
    """
    return _with_end(flow, variables, _last(flow.bijection).from_cholesky(loc, scale_tril))


def whitening(flow: Flow, loc: Array, scale_tril: Array) -> tuple[Array, Array]:
    """The part of x -> loc + scale_tril x that the end can take in by `rescaled`: angles stay as they are."""
    end = _last(flow.bijection)
    return end.whitening(loc, scale_tril) if isinstance(end, TorusEnd) else (loc, scale_tril)


def rescaled(flow: Flow, variables: dict[str, Any], loc: Array, scale_tril: Array) -> dict[str, Any]:
    """The variables of the flow followed by x -> loc + scale_tril x, whose `whitening` is itself."""
    params = variables["params"]["bijection"]
    chain = isinstance(flow.bijection, Chain)
    end = _last(flow.bijection).rescaled(params[-1] if chain else params, loc, scale_tril)
    return _with_end(flow, variables, end)


def centred(flow: Flow, draws: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Draws `(n, dim)` whose quantiles make sense, angles counted from their mean direction, and the way back."""
    end = _last(flow.bijection)
    return end.centred(draws) if isinstance(end, TorusEnd) else (draws, lambda x: x)


def _with_end(flow: Flow, variables: dict[str, Any], end: Any) -> dict[str, Any]:
    params = variables["params"]["bijection"]
    placed = (*params[:-1], end) if isinstance(flow.bijection, Chain) else end
    return {**variables, "params": {**variables["params"], "bijection": placed}}


def _last(bijection: Any) -> Any:
    return bijection.bijections[-1] if isinstance(bijection, Chain) else bijection
