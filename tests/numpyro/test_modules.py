"""flow_module: learnable flows inside models and guides."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

from flowppl import flows
from flowppl.bijections import Affine, Chain, Coupling, LULinear, Permutation, Stack
from flowppl.errors import DimensionError, UnknownFlowError
from flowppl.numpyro import flow_module

PERMUTED = flows.Flow(Chain((Stack(Chain((Coupling(3, Affine(), 0, (4,)), Permutation(3))), 2), LULinear(3))))


def train(model, guide, steps, *args, optimizer=None, **kwargs):
    svi = SVI(model, guide, optimizer or optax.adam(3e-2), Trace_ELBO(num_particles=8))
    return svi.run(jax.random.key(0), steps, *args, progress_bar=False, **kwargs)


def test_a_learnable_prior_fits_the_data(small):
    """Maximum likelihood: the flow prior itself is the density of the data."""
    data = jnp.array([2.0, -1.0]) + 0.5 * jax.random.normal(jax.random.key(0), (200, 2))

    def model(x=None):
        prior = flow_module("prior", small, dim=2)
        with numpyro.plate("n", 200):
            numpyro.sample("x", prior, obs=x)

    result = train(model, lambda x=None: None, 300, data)
    mean, std = data.mean(0), data.std(0)
    gaussian = -dist.Normal(mean, std).log_prob(data).sum()
    assert result.losses[-1] < gaussian + 2.0  # the flow contains every normal
    draws = Predictive(model, params=result.params, num_samples=1)(jax.random.key(1))["x"][0]
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.25)  # 5 standard errors: false alarms in 1e-6 of seeds


def test_two_flows_one_conditional_in_a_guide(small):
    """q(a) q(b | a) for a correlated normal posterior: the context carries the correlation."""

    def model():
        a = numpyro.sample("a", dist.Normal(1.0, 1.0).expand([1]).to_event(1))
        numpyro.sample("b", dist.Normal(2 * a, 0.5).to_event(1))

    def guide():
        a = numpyro.sample("a", flow_module("qa", "affine", dim=1))
        numpyro.sample("b", flow_module("qb", small, context=a, dim=1))

    result = train(model, guide, 400)
    assert set(result.params) == {"qa$params", "qb$params"}
    # The evidence is one, so the loss is the KL divergence; without the context it stays above log(17) / 2 = 1.4.
    assert result.losses[-50:].mean() < 0.3
    draws = Predictive(guide, params=result.params, num_samples=500)(jax.random.key(0))
    slope = np.polyfit(draws["a"][:, 0], draws["b"][:, 0], 1)[0]
    assert abs(slope - 2) < 0.3


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), numpyro.optim.ClippedAdam(1e-2), numpyro.optim.SGD(1e-2)])
def test_constants_do_not_move(optimizer):
    """Permutations are drawn once, travel as a param site, and no optimizer changes them."""

    def model():
        numpyro.sample("z", dist.Normal(jnp.arange(3.0), 1.0).to_event(1))

    def guide():
        numpyro.sample("z", flow_module("q", PERMUTED, gradient="path"))

    svi = SVI(model, guide, optimizer, Trace_ELBO())
    state = jax.jit(svi.init)(jax.random.key(0))
    before = svi.get_params(state)
    after = svi.get_params(jax.lax.fori_loop(0, 20, lambda _, s: svi.update(s)[0], state))
    assert set(before) == {"q$params", "q$const"}
    jax.tree.map(np.testing.assert_array_equal, before["q$const"], after["q$const"])
    indices = before["q$const"]["bijection"][0][1]["indices"]  # (layers, dim)
    np.testing.assert_array_equal(np.sort(indices, axis=-1), [[0, 1, 2]] * 2)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before["q$params"], after["q$params"])
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_seeds_give_different_constants_and_float32_survives():
    def guide():
        return numpyro.sample("z", flow_module("q", flows.Flow(Chain((Permutation(40), LULinear(40))))))

    def constants(seed):
        trace = handlers.trace(handlers.seed(guide, seed)).get_trace()
        return trace["q$const"]["value"]["bijection"][0]["indices"]

    one, two = constants(0), constants(1)
    assert one.dtype.kind == "f" and not np.array_equal(one, two)


def test_the_flow_says_its_dimension_or_dim_does(small):
    seeded = handlers.seed(lambda flow, **kw: flow_module("q", flow, **kw), 0)
    assert seeded(small(2)).event_shape == (2,)
    with pytest.raises(TypeError, match="dim: expected the length"):
        seeded("realnvp")
    with pytest.raises(DimensionError, match="expected dim=3 and context_dim=0"):
        seeded(small(2), dim=3)
    with pytest.raises(DimensionError, match="context_dim=2"):
        seeded(small(2), context=jnp.ones(2))
    with pytest.raises(UnknownFlowError, match="did you mean 'realnvp'"):
        seeded("real_nvp", dim=2)
