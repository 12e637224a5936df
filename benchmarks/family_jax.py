"""The jax side of `family`: flowppl, flowjax and NumPyro, compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.family import BATCH, BINS, BOUND, DIM, HIDDEN, LAYERS, SIMPLE_LAYERS, Row, points
from benchmarks.parameters import drawn

Steps = dict[str, Callable[[], Any]]


def _steps(log_prob: Callable, sample: Callable, params: Any) -> Steps:
    """Both tasks, from log_prob(params, x) and a sampler (params, key) of (x, log q(x))."""

    def density(params: Any, x: jax.Array) -> jax.Array:
        return -jnp.mean(log_prob(params, x))

    def draw(params: Any, key: jax.Array) -> jax.Array:
        x, log_q = sample(params, key)
        return jnp.mean(log_q + 0.5 * jnp.sum(x * x, axis=-1))

    def step(loss: Callable, argument: jax.Array) -> Callable[[], Any]:
        f = jax.jit(jax.value_and_grad(loss))
        return lambda: jax.block_until_ready(f(params, argument))

    return {"density": step(density, jnp.asarray(points())), "draw": step(draw, jax.random.key(1))}


def flowppl(row: Row) -> Steps:
    flow = row.ours
    variables = flow.init(jax.random.key(0))
    params = jax.tree.map(jnp.asarray, drawn(flow.bijection, 0, row.scale))

    def full(params: Any) -> Any:
        return {**variables, "params": {**variables["params"], "bijection": params}}

    def sample(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        draws = flow.sample(key, full(params), (BATCH,), with_log_prob=True)
        return draws.x, draws.log_prob

    return _steps(lambda params, x: flow.log_prob(full(params), x), sample, params)


def _flowjax(name: str, **options: Any) -> Callable[[], Steps]:
    def make() -> Steps:
        import equinox as eqx
        from flowjax import flows
        from flowjax.bijections import RationalQuadraticSpline
        from flowjax.distributions import StandardNormal
        from paramax import NonTrainable

        if name == "coupling_flow":
            options["transformer"] = RationalQuadraticSpline(knots=BINS - 1, interval=BOUND)  # inner knots
        flow = getattr(flows, name)(jax.random.key(0), base_dist=StandardNormal((DIM,)), **options)
        params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, NonTrainable))
        return _steps(
            lambda params, x: eqx.combine(params, static).log_prob(x),
            lambda params, key: eqx.combine(params, static).sample_and_log_prob(key, (BATCH,)),
            params,
        )

    return make


def _numpyro(block: bool, depth: int) -> Callable[[], Steps]:
    def make() -> Steps:
        import numpyro.distributions as dist
        from numpyro.distributions import flows, transforms
        from numpyro.nn import AutoregressiveNN, BlockNeuralAutoregressiveNN

        init, network = BlockNeuralAutoregressiveNN(DIM, [8, 8]) if block else AutoregressiveNN(DIM, list(HIDDEN))
        transform = flows.BlockNeuralAutoregressiveTransform if block else flows.InverseAutoregressiveTransform
        params = [init(key, (DIM,))[1] for key in jax.random.split(jax.random.key(0), depth)]
        base = dist.Normal(jnp.zeros(DIM), 1.0).to_event(1)
        reverse = jnp.arange(DIM)[::-1]

        def flow(params: Any) -> Any:
            layers = [(transform(partial(network, p)), transforms.PermuteTransform(reverse)) for p in params]
            return dist.TransformedDistribution(base, [part for layer in layers for part in layer])

        def sample(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            x, intermediates = flow(params).sample_with_intermediates(key, (BATCH,))
            return x, flow(params).log_prob(x, intermediates)

        return _steps(lambda params, x: flow(params).log_prob(x), sample, params)

    return make


_SHAPE = {"flow_layers": LAYERS, "nn_width": HIDDEN[0], "nn_depth": len(HIDDEN)}
PEERS: dict[tuple[str, str], Callable[[], Steps]] = {
    ("flowjax", "spline coupling"): _flowjax("coupling_flow", **_SHAPE),
    ("flowjax", "affine autoregressive (MAF)"): _flowjax("masked_autoregressive_flow", **_SHAPE),
    ("flowjax", "block autoregressive (BNAF)"): _flowjax(
        "block_neural_autoregressive_flow", flow_layers=2, nn_depth=2, nn_block_dim=8
    ),
    ("flowjax", "planar"): _flowjax("planar_flow", flow_layers=SIMPLE_LAYERS, invert=False),
    ("numpyro", "affine autoregressive (IAF)"): _numpyro(False, LAYERS),
    ("numpyro", "block autoregressive (BNAF)"): _numpyro(True, 2),
}
