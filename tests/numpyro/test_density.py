"""LogDensity against NumPyro's own log_density."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to
from numpyro.infer.util import log_density

from flowppl.numpyro import LogDensity


def model(x, scale=1.0):
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("n", 2):
        z = numpyro.sample("z", dist.Normal(0, s))
    numpyro.deterministic("twice", 2 * z)
    numpyro.factor("f", -0.1 * p[0])
    numpyro.sample("x", dist.Normal(z.sum(), scale), obs=x)


X = jnp.array(0.7)


@pytest.fixture(scope="module")
def density():
    return LogDensity(model, (X,), {"scale": 0.5})


@pytest.fixture(scope="module")
def u(density):
    return jnp.asarray(np.random.default_rng(0).standard_normal((4, density.dim)))


def test_coordinates(density):
    assert density.names == ["p", "s", "z"] and density.dim == 2 + 1 + 2
    assert density.init.shape == (5,)


def test_log_prob_is_the_models_with_the_jacobian(density, u):
    @jax.vmap
    def expected(u):
        p, s, z = u[:2], u[2], u[3:]
        values = {"p": biject_to(dist.constraints.simplex)(p), "s": jnp.exp(s), "z": z}
        to_free = lambda p: biject_to(dist.constraints.simplex)(p)[:-1]
        jacobian = jnp.linalg.slogdet(jax.jacfwd(to_free)(p))[1] + s
        return log_density(model, (X,), {"scale": 0.5}, values)[0] + jacobian

    value, score = jax.jit(density.value_and_score)(u)
    np.testing.assert_allclose(value, jax.jit(expected)(u), rtol=1e-10)
    np.testing.assert_allclose(score, jax.jit(jax.vmap(jax.grad(lambda u: expected(u[None])[0])))(u), rtol=1e-8)


def test_prior_and_likelihood_add_up(density, u):
    prior, likelihood = jax.jit(density.split)(u)
    np.testing.assert_allclose(prior + likelihood, jax.jit(density.log_prob)(u), rtol=1e-10)
    z = density.unpack(u)["z"].sum(-1)
    p = jax.jit(density.constrain)(u)["p"]
    np.testing.assert_allclose(likelihood, dist.Normal(z, 0.5).log_prob(X) - 0.1 * p[:, 0], rtol=1e-10)


def test_constrain_has_the_deterministic_sites_and_any_batch(density, u):
    values = jax.jit(density.constrain)(u.reshape(2, 2, 5))
    assert {k: v.shape for k, v in values.items()} == {"s": (2, 2), "p": (2, 2, 3), "z": (2, 2, 2), "twice": (2, 2, 2)}
    np.testing.assert_allclose(values["twice"], 2 * values["z"])
    np.testing.assert_allclose(values["p"].sum(-1), 1)
    one = jax.jit(density.constrain)(u[3])
    np.testing.assert_allclose(one["s"], values["s"][1, 1])


def test_nan_is_no_density_and_is_counted():
    def broken():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("f", jnp.log(z))  # NaN where z < 0

    density = LogDensity(broken, init_loc_fn=numpyro.infer.init_to_value(values={"z": 1.0}))
    u = jnp.array([[-1.0], [1.0], [-2.0]])
    value = density.log_prob(u)
    assert list(np.isneginf(value)) == [True, False, True] and np.isfinite(value[1])
    assert density.num_nan(u) == 2


def test_enumerated_sites_are_summed_out():
    x = jnp.array([-1.0, 0.5, 2.0])

    def mixture(x):
        w = numpyro.sample("w", dist.Beta(2.0, 3.0))
        with numpyro.plate("n", 3):
            k = numpyro.sample("k", dist.Bernoulli(w), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    density = LogDensity(mixture, (x,))
    assert density.names == ["w"] and density.dim == 1
    u = jnp.array([[-0.4], [1.3]])
    w = jax.nn.sigmoid(u)
    normal = lambda m: jnp.exp(dist.Normal(m, 1.0).log_prob(x))
    marginal = jnp.log((1 - w) * normal(0.0) + w * normal(2.0)).sum(-1)
    expected = marginal + dist.Beta(2.0, 3.0).log_prob(w[:, 0]) + jnp.log(w * (1 - w))[:, 0]
    np.testing.assert_allclose(jax.jit(density.log_prob)(u), expected, rtol=1e-10)
    prior, likelihood = jax.jit(density.split)(u)
    np.testing.assert_allclose(likelihood, marginal, rtol=1e-10)
    np.testing.assert_allclose(prior + likelihood, expected, rtol=1e-10)
