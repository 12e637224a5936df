"""precondition: a flow starts at a normal approximation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO, init_to_value

from flowppl import flows
from flowppl.errors import NonFiniteError
from flowppl.numpyro import AutoFlow

KEY = jax.random.key(0)


def regression(x, y, scale):
    # The sites' names are not in the model's order, nor is their order in the vector.
    w = numpyro.sample("w", dist.Normal(0.0, scale).to_event(1))
    b = numpyro.sample("b", dist.Normal(0.0, 10.0))
    numpyro.sample("y", dist.Normal(x @ w + b, 0.5).to_event(1), obs=y)


def exact(x, y, scale):
    """Mean and covariance of (b, w)."""
    design = np.column_stack([np.ones(len(y)), x])
    precision = np.diag(1 / np.concatenate([[10.0], scale]) ** 2) + design.T @ design / 0.25
    covariance = np.linalg.inv(precision)
    return covariance @ design.T @ y / 0.25, covariance


def moments(guide, params):
    """Mean and root of the covariance of a flow that is affine."""
    bijection = guide.get_posterior(params).transforms[0]
    zero = jnp.zeros(guide.latent_dim)
    return jax.jit(lambda: (bijection(zero), jax.jacfwd(bijection)(zero)))()


@pytest.mark.parametrize("flow", ["affine", flows.nsf(layers=1, hidden=(4,), bins=3), flows.planar(layers=2)])
def test_a_gaussian_posterior_is_found_exactly(flow):
    rng = np.random.default_rng(0)
    x, y, scale = rng.standard_normal((20, 3)), rng.standard_normal(20), np.ones(3)
    x[:, 2] += 3 * x[:, 1]
    guide = AutoFlow(regression, flow)
    params = guide.precondition(KEY, x, y, scale)
    loc, root = moments(guide, params)
    mean, covariance = exact(x, y, scale)
    np.testing.assert_allclose(loc, mean, atol=1e-4)
    np.testing.assert_allclose(root @ root.T, covariance, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(root, np.linalg.cholesky(covariance), rtol=1e-5, atol=1e-8)


def test_predictors_in_units_of_1e_minus_6_to_1e6():
    rng = np.random.default_rng(1)
    units = np.array([1e-6, 1e-3, 1.0, 1e6])
    x, y = rng.standard_normal((30, 4)) * units, rng.standard_normal(30)
    guide = AutoFlow(regression, "affine")
    params = guide.precondition(KEY, x, y, 10 / units)
    loc, root = moments(guide, params)
    mean, covariance = exact(x, y, 10 / units)
    exact_root = np.linalg.cholesky(covariance)
    np.testing.assert_allclose(np.linalg.solve(exact_root, loc - mean), 0.0, atol=0.1)  # posterior standard deviations
    np.testing.assert_allclose(np.linalg.solve(exact_root, root), np.eye(5), atol=1e-3)


def eight_schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def test_a_funnel_gets_finite_and_trains_from_there(small):
    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    guide = AutoFlow(eight_schools, small)
    params = guide.precondition(KEY, y, sigma)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    svi = SVI(eight_schools, guide, optax.adam(1e-3), Trace_ELBO(num_particles=32))
    result = svi.run(KEY, 20, y, sigma, progress_bar=False, init_params=params)
    plain = SVI(eight_schools, AutoFlow(eight_schools, small), optax.adam(1e-3), Trace_ELBO(num_particles=32))
    start = plain.run(KEY, 1, y, sigma, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert result.losses[0] < start.losses[0]  # better than the prior's median with a small scale


def test_the_elbo_of_a_gaussian_posterior_is_the_evidence():
    rng = np.random.default_rng(2)
    x, y, scale = rng.standard_normal((20, 3)), rng.standard_normal(20), np.ones(3)
    guide = AutoFlow(regression, "affine")
    assert guide.preconditioned is None
    guide.precondition(KEY, x, y, scale)
    covariance = x @ x.T + 100.0 + 0.25 * np.eye(20)
    evidence = -0.5 * (y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert guide.preconditioned.elbo == pytest.approx(evidence, abs=1e-6)
    assert 0 < guide.preconditioned.num_evals < 10_000


def test_a_model_in_float32_is_evaluated_in_float64():
    """The years' posterior has a correlation of 1 - 3e-6: float32 would leave a tenth of a nat of noise on every evaluation."""

    def trend(year, y):
        a = numpyro.sample("a", dist.Normal(0.0, 1e6))
        b = numpyro.sample("b", dist.Normal(0.0, 1e3))
        numpyro.sample("y", dist.Normal(a + b * year, 0.01).to_event(1), obs=y)

    year = np.arange(1990.0, 2010.0)
    y = np.float32(0.25 * (year - 2000.0))
    design = np.column_stack([np.ones(20), year])
    precision = design.T @ design / 0.01**2 + np.diag([1e-12, 1e-6])
    with jax.enable_x64(False):
        guide = AutoFlow(trend, "affine")
        params = guide.precondition(KEY, jnp.asarray(year), jnp.asarray(y))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    whitened = np.linalg.cholesky(precision).T @ guide.preconditioned.scale_tril
    np.testing.assert_allclose(whitened @ whitened.T, np.eye(2), atol=1e-3)
    away = guide.preconditioned.loc - np.linalg.solve(precision, design.T @ y / 0.01**2)
    assert away @ precision @ away < 1e-4


def test_a_model_that_insists_on_float32():
    def walk(y):
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        levels = jax.lax.scan(lambda level, y: (level + sigma * y, level), jnp.zeros((), jnp.float32), y)[1]
        numpyro.sample("y", dist.Normal(levels, 1.0).to_event(1), obs=y)

    with jax.enable_x64(False):
        guide = AutoFlow(walk, "affine")
        guide.precondition(KEY, jnp.array([0.5, -0.2, 1.0]))
    assert np.isfinite(guide.preconditioned.elbo)


def test_other_starts_where_the_first_has_no_density():
    def far_from_zero():
        z = numpyro.sample("z", dist.Normal(2.0, 0.1))
        numpyro.factor("f", jnp.where(z < 1.0, -jnp.inf, 0.0))

    guide = AutoFlow(far_from_zero, "affine", init_loc_fn=init_to_value(values={"z": 0.0}))
    guide.precondition(KEY)
    np.testing.assert_allclose(guide.preconditioned.loc, 2.0, atol=1e-5)


def test_no_start_with_a_density_is_an_error(small):
    def impossible():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("f", jnp.where(z < 1e6, -jnp.inf, 0.0))

    guide = AutoFlow(impossible, small, init_loc_fn=init_to_value(values={"z": 0.0}))
    with pytest.raises(NonFiniteError, match="choose another init_loc_fn"):
        guide.precondition(KEY)
