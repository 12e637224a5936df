"""fit with plates that subsample: minibatches in training, all of the data elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro import LogDensity, fit
from tests import regression
from tests.regression import BATCH, QUICK, ROWS, X, Y

SEEN = []


def regress(x, y=None, batch=None):
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    c = numpyro.sample("c", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", len(x), subsample_size=batch) as index:
        SEEN.append(len(index))
        mean = numpyro.deterministic("mean", numpyro.subsample(x, event_dim=1) @ beta + c)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else y[index])


def test_the_density_is_that_of_all_of_the_data_and_minibatches_estimate_it():
    """2000 minibatches: five standard errors, at points that see the same ones."""
    x, y, u = X[:9], Y[:9], np.random.default_rng(1).standard_normal((5, 3))
    density = LogDensity(regress, (x, y, 4))
    assert density.plates == {"rows": (9, 4)}
    density._rows = 2  # points at a time, of five

    @jax.jit
    def everything(u, key):
        assert set(density.constrain(u)) == {"beta", "c"}  # and not the means of nine rows each
        estimate = lambda key: density.minibatch(key, jnp.concatenate([u, u[:1]]))
        return density.value_and_score(u), density.split(u), jax.vmap(estimate)(jax.random.split(key, 2000))

    (value, score), split, estimates = everything(u, jax.random.key(0))
    prior, likelihood, slope = regression.densities(u, x, y)
    for found, expected in zip((value, score, *split), (prior + likelihood, slope, prior, likelihood), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    error = estimates.std(0) / np.sqrt(len(estimates))
    assert np.all(np.abs(estimates.mean(0)[:5] - value) < 5 * error[:5]) and np.all(error > 0)
    np.testing.assert_allclose(estimates[:, 0], estimates[:, 5], rtol=1e-12)


@pytest.mark.slow
def test_a_regression_in_batches(monkeypatch):
    during = regression.while_training(monkeypatch, SEEN)
    monkeypatch.setattr("flowppl.numpyro.model_posterior.pathfinder", regression.poor_start)
    posterior = fit(regress, X, Y, batch=BATCH, **QUICK)
    assert set(during) == {BATCH}
    regression.check_fit(posterior)
    assert posterior.predict(X[:7], batch=3, num_samples=4)["y"].shape == (4, 7)
    some = {name: draws[:3] for name, draws in posterior.samples.items()}
    assert posterior._log_likelihood(some)["y"].shape == (3, ROWS)


def test_what_minibatches_do_not_estimate_is_an_error():
    def local(y):
        mean = numpyro.sample("mean", dist.Normal())
        with numpyro.plate("rows", 10, subsample_size=2) as index:
            theta = numpyro.sample("theta", dist.Normal(mean, 1.0))
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

    def cut_already(y):
        mean = numpyro.sample("mean", dist.Normal())
        with numpyro.plate("rows", 10, subsample_size=2):
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[:2])

    with pytest.raises(
        UnsupportedModelError, match=r"'theta' is in plate 'rows', which subsamples 2 of 10.*AmortizedFlow"
    ):
        fit(local, jnp.zeros(10), **QUICK)
    with pytest.raises(UnsupportedModelError, match="fails where 'rows' does not subsample"):
        fit(cut_already, jnp.zeros(10), **QUICK)
