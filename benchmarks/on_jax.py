"""The jax programs: flowppl, flowjax and the bare conditioners, all compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.workload import BATCH, BINS, BOUND, DIM, HIDDEN, KEPT, LAYERS, OUTPUTS, Step, points, spline_couplings

Loss = Callable[..., jax.Array]


def _energy(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(x * x, axis=-1)


def _step(loss: Loss, params: Any, task: str, *args: Any) -> Step:
    """A compiled step, and the gradient with it unless the task is to sample without."""
    f = jax.jit(loss if task == "sample" else jax.value_and_grad(loss))
    return _ready(f, params, params, *args)


def _ready(f: Callable, params: Any, *args: Any) -> Step:
    jax.block_until_ready(args)  # the framework has started: the first call times tracing and compilation
    return Step(lambda: jax.block_until_ready(f(*args)), sum(leaf.size for leaf in jax.tree.leaves(params)))


def flowppl(task: str, layers: int = LAYERS) -> Step:
    from flowppl.objectives import path_log_prob

    flow = spline_couplings(layers)
    variables = flow.init(jax.random.key(0))
    params = _shaken(variables["params"])

    def nll(params: Any, x: jax.Array) -> jax.Array:
        return -jnp.mean(flow.log_prob({**variables, "params": params}, x))

    def sample(params: Any, key: jax.Array) -> jax.Array:
        draws = flow.sample(key, {**variables, "params": params}, (BATCH,), with_log_prob=True)
        return jnp.mean(draws.log_prob + _energy(draws.x))

    def path(params: Any, key: jax.Array) -> jax.Array:
        draws = flow.sample(key, {**variables, "params": params}, (BATCH,), with_score=True)
        return jnp.mean(path_log_prob(draws) + _energy(draws.x))

    if task == "nll":
        return _step(nll, params, task, jnp.asarray(points()))
    return _step(path if task == "path" else sample, params, task, jax.random.key(1))


def flowjax(task: str, layers: int = LAYERS) -> Step:
    import equinox as eqx
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import StandardNormal
    from flowjax.flows import coupling_flow
    from paramax import NonTrainable

    flow = coupling_flow(
        jax.random.key(0),
        base_dist=StandardNormal((DIM,)),
        transformer=RationalQuadraticSpline(knots=BINS - 1, interval=BOUND),  # inner knots
        flow_layers=layers,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
        invert=task == "nll",  # its forward spline, the faster one, runs in the direction that the task needs
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, NonTrainable))

    def nll(params: Any, x: jax.Array) -> jax.Array:
        return -jnp.mean(eqx.combine(params, static).log_prob(x))

    def sample(params: Any, key: jax.Array) -> jax.Array:
        x, log_prob = eqx.combine(params, static).sample_and_log_prob(key, (BATCH,))
        return jnp.mean(log_prob + _energy(x))

    loss, argument = (nll, jnp.asarray(points())) if task == "nll" else (sample, jax.random.key(1))
    return _step(loss, params, task, argument)


def conditioner(task: str, layers: int = LAYERS) -> Step:
    """The networks alone, forward and (unless the task is to sample without a gradient) backward to weights and inputs."""
    widths = (KEPT, *HIDDEN, OUTPUTS)
    keys = jax.random.split(jax.random.key(0), len(HIDDEN) + 1)
    weights = [
        (jax.random.normal(key, (layers, fan_out, fan_in)) / fan_in**0.5, jnp.zeros((layers, fan_out)))
        for key, fan_in, fan_out in zip(keys, widths, widths[1:], strict=False)
    ]
    inputs, cotangents = jnp.asarray(points((layers, BATCH, KEPT))), jnp.asarray(points((layers, BATCH, OUTPUTS)))

    def network(_: None, layer: Any) -> tuple[None, jax.Array]:
        weights, h = layer
        for weight, bias in weights[:-1]:
            h = jax.nn.relu(h @ weight.T + bias)
        weight, bias = weights[-1]
        return None, h @ weight.T + bias

    def networks(weights: Any, inputs: jax.Array) -> jax.Array:
        return jax.lax.scan(network, None, (weights, inputs))[1]

    def both(weights: Any, inputs: jax.Array, cotangents: jax.Array) -> Any:
        outputs, pull = jax.vjp(networks, weights, inputs)
        return outputs, pull(cotangents)

    if task == "sample":
        return _ready(jax.jit(networks), weights, weights, inputs)
    return _ready(jax.jit(both), weights, weights, inputs, cotangents)


def _shaken(params: Any) -> Any:
    """Moves the flow away from the identity, where it starts."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return structure.unflatten([a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


PROGRAMS = {"flowppl-jax": flowppl, "flowjax": flowjax, "conditioner-jax": conditioner}
