"""Maximum likelihood with jax: flowppl and flowjax, an epoch in one compiled scan."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import StandardNormal
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from paramax import NonTrainable

from benchmarks.tabular import BINS, BOUND, HIDDEN, LAYERS, Adam, our_flow
from flowppl.flows import Flow


class Ours(eqx.Module):
    """flowppl's flow and its arrays, scored the way flowjax's are."""

    flow: Flow = eqx.field(static=True)
    params: Any
    const: Any

    def log_prob(self, x: jax.Array) -> jax.Array:
        return self.flow.log_prob({"params": self.params, "const": self.const}, x)


_FUNCTIONS: dict[tuple[str, int], Any] = {}


def _optimizer(adam: Adam) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(adam.rate, adam.steps))


@eqx.filter_jit
def _epoch(params: Any, static: Any, state: Any, batches: jax.Array, adam: Adam) -> tuple[Any, Any]:
    optimizer = _optimizer(adam)

    def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: -jnp.mean(eqx.combine(p, static).log_prob(x)))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), batches)[0]


@eqx.filter_jit
def _log_prob(params: Any, static: Any, x: jax.Array) -> jax.Array:
    return eqx.combine(params, static).log_prob(x)


class Fit:
    """A flow in training: `epoch` takes steps of Adam, `log_prob` scores rows."""

    def __init__(self, flow: Any, adam: Adam) -> None:
        trained = eqx.is_inexact_array
        self._params, self._static = eqx.partition(flow, trained, is_leaf=lambda leaf: isinstance(leaf, NonTrainable))
        self._adam = Adam(jnp.float32(adam.rate), adam.steps)  # an array: one compilation serves all rates
        self._state = _optimizer(self._adam).init(self._params)
        self.params = sum(leaf.size for leaf in jax.tree.leaves(self._params))

    def epoch(self, batches: np.ndarray) -> None:
        """A step for each of `(steps, batch, dim)`."""
        self._params, self._state = _epoch(self._params, self._static, self._state, batches, self._adam)

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Log density of each row."""
        return np.asarray(_log_prob(self._params, self._static, x))


def flowppl(architecture: str, dim: int, seed: int, adam: Adam) -> Fit:
    flow = our_flow(architecture, dim)
    variables = flow.init(jax.random.key(seed))
    return Fit(Ours(flow, variables["params"], variables["const"]), adam)


def flowjax(architecture: str, dim: int, seed: int, adam: Adam) -> Fit:
    spline = None if architecture == "maf" else RationalQuadraticSpline(knots=BINS - 1, interval=BOUND)  # inner knots
    make = coupling_flow if architecture == "nsf" else masked_autoregressive_flow
    flow = make(
        jax.random.key(seed),
        base_dist=StandardNormal((dim,)),
        transformer=spline,
        flow_layers=LAYERS,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
    )
    # Functions made anew with each flow would compile anew: take those of the first.
    arrays, rest = eqx.partition(flow, eqx.is_array)
    return Fit(eqx.combine(arrays, _FUNCTIONS.setdefault((architecture, dim), rest)), adam)


PROGRAMS = {"flowppl-jax": flowppl, "flowjax": flowjax}
