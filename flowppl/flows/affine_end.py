"""The trainable affine layer at the data end, where a guide puts what it knows of location and scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flowppl.bijections import Affine, Bijection, Chain, Elementwise, Embedded, LULinear, TorusEnd
from flowppl.bijections.base import Array
from flowppl.errors import DimensionError
from flowppl.flows.flow import Flow


def with_affine_end(flow: Flow) -> Flow:
    """Returns the flow, with an affine layer appended unless it ends with one."""
    if isinstance(_last(flow.bijection), LULinear | TorusEnd):
        return flow
    return replace(flow, bijection=Chain((flow.bijection, LULinear(flow.dim))))


def with_encoder(flow: Flow, inputs: int, hidden: tuple[int, ...] | None) -> Flow:
    """Returns a conditional flow with an affine end, and with a network before its context.

    Real coordinates are first shifted and scaled by what is linear in the context: where each element's posterior lies is the
    most of what an encoder has to say, and no work for couplings.

    Args:
        flow: A conditional flow.
        inputs: Length of what the network sees.
        hidden: Widths of its hidden layers; None for no network.
    """
    end, bijection = _last(flow.bijection), flow.bijection
    if not isinstance(end, TorusEnd):
        moved = Elementwise(flow.dim, Affine(), flow.context_dim, ())
        bijection = Chain((bijection, moved, LULinear(flow.dim)))
    return replace(flow, bijection=bijection if hidden is None else Embedded(bijection, inputs, hidden))


def without_encoder(flow: Flow) -> tuple[Flow, tuple[int, ...], int]:
    """What `with_encoder` was given: the flow, the hidden widths and the length of the flow's context.

    Raises:
        DimensionError: it was given no widths.
    """
    if not isinstance(embedded := flow.bijection, Embedded):
        raise DimensionError(f"flow: expected one with an encoder, an Embedded, got a {type(embedded).__name__}")
    inner = embedded.bijection
    if isinstance(inner, Chain) and not isinstance(_last(inner), TorusEnd):
        inner = inner.bijections[0]
    return replace(flow, bijection=inner), embedded.hidden, embedded.bijection.context_dim


def place(flow: Flow, variables: dict[str, Any], loc: Array, scale_tril: Array) -> dict[str, Any]:
    """Returns the variables with the affine end set to x -> loc + scale_tril x (angles are shifted alone).

    Args:
        flow: A flow that ends with an affine layer.
        variables: What its `init` returned.
        loc: `(dim,)`.
        scale_tril: `(dim, dim)`, lower triangular with a positive diagonal.
    """
    end = _last(flow.bijection).from_cholesky(loc, scale_tril)
    placed = _with_end(flow.bijection, variables["params"]["bijection"], end)
    return {**variables, "params": {**variables["params"], "bijection": placed}}


def has_angles(flow: Flow) -> bool:
    """Whether some of the flow's coordinates are angles to it."""
    return isinstance(_last(flow.bijection), TorusEnd)


def as_boxed(flow: Flow, boxed: bool) -> Flow:
    """The flow with its angles, if it knows any, in the unconstrained form of one language or the other: see `TorusEnd.boxed`."""
    end, bijection = _last(flow.bijection), flow.bijection
    if not isinstance(end, TorusEnd) or isinstance(bijection, Embedded):
        return flow
    end = replace(end, boxed=boxed)
    return replace(flow, bijection=Chain((*bijection.bijections[:-1], end)) if isinstance(bijection, Chain) else end)


def whitening(flow: Flow, loc: Array, scale_tril: Array) -> tuple[Array, Array]:
    """The part of x -> loc + scale_tril x that the end can take in by `rescaled`: angles stay as they are."""
    end = _last(flow.bijection)
    return end.whitening(loc, scale_tril) if isinstance(end, TorusEnd) else (loc, scale_tril)


def rescaled(flow: Flow, variables: dict[str, Any], loc: Array, scale_tril: Array) -> dict[str, Any]:
    """The variables of the flow followed by x -> loc + scale_tril x, whose `whitening` is itself."""
    params = variables["params"]["bijection"]
    end = _last(flow.bijection).rescaled(_end_of(flow.bijection, params), loc, scale_tril)
    return {**variables, "params": {**variables["params"], "bijection": _with_end(flow.bijection, params, end)}}


def centred(flow: Flow, draws: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Draws `(n, dim)` whose quantiles make sense, angles counted from their mean direction, and the way back."""
    end = _last(flow.bijection)
    return end.centred(draws) if isinstance(end, TorusEnd) else (draws, lambda x: x)


def _last(bijection: Bijection) -> Any:
    if isinstance(bijection, Embedded):
        return _last(bijection.bijection)
    return bijection.bijections[-1] if isinstance(bijection, Chain) else bijection


def _end_of(bijection: Bijection, params: Any) -> Any:
    """The parameters of the last map."""
    if isinstance(bijection, Embedded):
        return _end_of(bijection.bijection, params["inner"])
    return params[-1] if isinstance(bijection, Chain) else params


def _with_end(bijection: Bijection, params: Any, end: Any) -> Any:
    """The parameters with those of the last map exchanged."""
    if isinstance(bijection, Embedded):
        return {**params, "inner": _with_end(bijection.bijection, params["inner"], end)}
    return (*params[:-1], end) if isinstance(bijection, Chain) else end
