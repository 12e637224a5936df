"""Learnable flows inside models and guides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from flowppl import tree
from flowppl.flows import Flow, Recipe
from flowppl.flows.registry import resolve
from flowppl.numpyro.distributions import FlowDistribution
from flowppl.stochastic import Path

Array = Any


def flow_module(
    name: str,
    flow: str | Recipe | Flow,
    context: Array | None = None,
    *,
    dim: int | None = None,
    gradient: str = "reparam",
) -> FlowDistribution:
    """Registers a learnable flow in a model or guide and returns its distribution.

    Args:
        name: Its parameters are the param site "{name}$params"; constant arrays, if it has any, are "{name}$const".
        flow: A name or recipe (give `dim`), or a flow.
        context: `(*batch, context_dim)`, attached to whatever it was computed from, or None.
        dim: Length of the flow's vectors, where `flow` does not say.
        gradient: "reparam" or "path", see `FlowDistribution`.

    Raises:
        TypeError: `flow` is a name or recipe and `dim` is missing.

    Example:
        >>> import numpyro
        >>> from numpyro.handlers import seed
        >>> from flowppl.numpyro import flow_module
        >>> def guide():
        ...     return numpyro.sample("z", flow_module("q", "realnvp", dim=2))
        >>> seed(guide, rng_seed=0)().shape
        (2,)
    """
    flow = resolve(flow, dim, context)
    return FlowDistribution(flow, register(name, flow), context, gradient=gradient)


def register(name: str, flow: Flow | Path, init: Callable[[Array], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Param sites for the arrays of a flow or a path, drawn by `init(key)` (default: the flow's own).

    NumPyro's optimizers differentiate every param, which integers do not survive: constants travel as floats. They get
    no gradient, but an optimizer that decays weights would decay them too: mask "{name}$const" there.
    """
    init = flow.init if init is None else init
    shapes = jax.eval_shape(init, jax.random.key(0))
    site = lambda site: numpyro.param(site, lambda key: as_params(name, init(key))[site])
    values = {kind: site(f"{name}${kind}") if tree.leaves(shapes[kind]) else shapes[kind] for kind in shapes}
    const = tree.map(
        lambda a, s: a if jnp.issubdtype(s.dtype, jnp.floating) else jnp.round(a).astype(s.dtype),
        values["const"],
        shapes["const"],
    )
    return {"params": values["params"], "const": jax.lax.stop_gradient(const)}


def as_params(name: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The values of the param sites that `register` makes, as `init_params` of `SVI` and as its results have them."""
    as_floats = {"params": variables["params"], "const": tree.map(lambda a: a * 1.0, variables["const"])}
    return {f"{name}${kind}": arrays for kind, arrays in as_floats.items() if tree.leaves(arrays)}
