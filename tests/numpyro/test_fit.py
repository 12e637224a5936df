"""fit: one call from a model to a posterior."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax

from flowppl.errors import FitWarning, FlowFileError, UnsupportedModelError
from flowppl.numpyro import AutoFlow, Posterior, fit
from flowppl.numpyro.model_posterior import View

QUICK = {"flow": "affine", "max_steps": 500, "num_samples": 2000, "progress_bar": False}
RNG = np.random.default_rng(0)
YEAR = 1950.0 + np.arange(40)
Y = (3e5 + 1e3 * (YEAR - 1950) + 2e3 * RNG.standard_normal(40)).astype(np.float32)


def trend(year, y=None):
    # Neither centred nor scaled: the correlation is above 0.99999, and scales differ by six orders.
    slope = numpyro.sample("slope", dist.Normal(0.0, 1e4))
    level = numpyro.sample("level", dist.Normal(0.0, 1e8))
    mean = numpyro.deterministic("mean_2000", level + slope * 2000.0)
    del mean
    numpyro.sample("y", dist.Normal(level + slope * year, 2e3), obs=y)


def exact():
    """Mean, sd and log evidence of (level, slope), in closed form."""
    design, prior = np.stack([np.ones(40), YEAR], 1), np.diag([1e16, 1e8])
    covariance = np.linalg.inv(np.linalg.inv(prior) + design.T @ design / 4e6)
    mean = covariance @ design.T @ Y.astype(float) / 4e6
    marginal = design @ prior @ design.T + 4e6 * np.eye(40)
    log_evidence = -0.5 * (Y @ np.linalg.solve(marginal, Y) + np.linalg.slogdet(2 * np.pi * marginal)[1])
    return mean, np.sqrt(np.diagonal(covariance)), log_evidence


@pytest.fixture(scope="module")
def posterior():
    return fit(trend, YEAR, y=Y, **QUICK)


def test_a_regression_in_raw_units(posterior):
    """The flow is exact for a normal posterior: 2000 draws err by 0.023 sds."""
    mean, sd, log_evidence = exact()
    found_mean, found_sd = posterior.mean(), posterior.sd()
    for i, site in enumerate(["level", "slope"]):
        assert abs(found_mean[site] - mean[i]) < 0.1 * sd[i]
        assert found_sd[site] == pytest.approx(sd[i], rel=0.08)
    value, error = posterior.log_evidence
    assert abs(value - log_evidence) < 5 * error + 0.01
    assert posterior.samples["mean_2000"].shape == (2000,)
    assert posterior.diagnose().verdict == "good"
    assert "k-hat" in repr(posterior)


def test_the_guide_is_as_any_other(posterior):
    draws = posterior.guide.sample_posterior(jax.random.key(0), posterior.params, sample_shape=(500,))
    assert abs(np.mean(draws["slope"]) - exact()[0][1]) < 0.3 * exact()[1][1]
    assert isinstance(posterior.guide, AutoFlow)
    values = {name: posterior.samples[name][:5] for name in ("level", "slope")}
    log_prob = posterior.log_prob(values)
    assert log_prob.shape == (5,)
    log_p, _ = posterior._value_and_score(posterior.unconstrained[:5])
    ratio = np.exp(log_p - log_prob - posterior.log_weights[:5])  # of the mixture with wider draws over the flow
    assert np.all(ratio > 0.9 - 1e-6) and np.all(ratio[1:] < 1.2)


def test_predictions_and_arviz(posterior):
    pytest.importorskip("arviz")
    predicted = posterior.predict(np.array([2000.0, 2010.0]), num_samples=300)["y"]
    assert predicted.shape == (300, 2)
    np.testing.assert_allclose(predicted.mean(0), 3e5 + 1e3 * np.array([50, 60]), atol=1500)
    data = posterior.to_arviz(num_samples=400, log_likelihood=True)
    assert data.posterior["slope"].shape == (1, 400)
    assert set(data.sample_stats.data_vars) == {"lp", "log_weight"}
    assert data.log_likelihood["y"].shape == (1, 400, 40)


def test_a_file_comes_back_with_the_same_posterior(posterior, tmp_path):
    path = tmp_path / "trend.flow"
    posterior.save(path)
    again = Posterior.load(path, trend, YEAR, y=Y, num_samples=2000)
    for site, mean in posterior.mean().items():
        assert again.mean()[site] == pytest.approx(mean, abs=0.15 * posterior.sd()[site])
    assert again.log_evidence[0] == pytest.approx(posterior.log_evidence[0], abs=0.01)

    def other(year, y=None):
        numpyro.sample("slope", dist.Normal())

    with pytest.raises(FlowFileError):
        Posterior.load(path, other, YEAR, y=Y)


@pytest.mark.slow
def test_a_fit_goes_on_from_another(posterior):
    """Ten more numbers move the posterior: from the old one on, one chunk of steps will do."""
    more = fit(trend, YEAR[:30], y=Y[:30], start=posterior, seed=1, **{**QUICK, "max_steps": 250})
    assert more.diagnose().verdict == "good"


@pytest.mark.slow
def test_an_optimizer_of_the_users():
    found = fit(trend, YEAR, Y, optimizer=optax.sgd(1e-2), **{**QUICK, "max_steps": 250})
    assert found.khat < 0.7 or found.ess > 1900


@pytest.mark.slow
def test_two_modes_are_not_to_be_trusted():
    """Either mode alone looks perfect; the search for a start has seen the other."""

    def model():
        x = numpyro.sample("x", dist.Uniform(-30, 30))
        y = numpyro.sample("y", dist.Normal())
        numpyro.factor("two", jnp.logaddexp(-0.5 * (x - 4) ** 2 / 0.01, -0.5 * (x + 4 + 0 * y) ** 2 / 0.01))

    with pytest.warns(FitWarning, match="not to be trusted"):
        found = fit(model, **QUICK)
    assert found.diagnose().verdict == "not to be trusted"
    assert "anneal" in found.diagnose().advice


@pytest.mark.slow
def test_a_model_that_insists_on_float32():
    """A loop whose state starts in float32 cannot take float64 latents."""

    def walk(y):
        drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))

        def step(x, y):
            x = x + drift
            return x, -0.5 * (y - x) ** 2

        _, terms = lax.scan(step, jnp.zeros((), jnp.float32), y)
        numpyro.factor("path", terms.sum())

    with jax.enable_x64(False):
        y = jnp.arange(10, dtype=jnp.float32) * 0.5
        found = fit(walk, y, **{**QUICK, "max_steps": 250})
        assert found._view.precise.dtype == np.float32
        assert found.mean()["drift"] == pytest.approx(0.5, abs=0.1)


def test_what_cannot_be_fitted_is_an_error():
    def discrete():
        numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal())

    with pytest.raises(UnsupportedModelError, match="discrete"):
        fit(discrete, **QUICK)
    with pytest.raises(ValueError, match="num_particles"):
        fit(trend, YEAR, Y, **QUICK, num_particles=0)


def test_a_picture(posterior):
    pytest.importorskip("matplotlib")
    figure = posterior.plot(["slope"])
    assert len(figure.axes) == 2


def test_names_of_coordinates():
    def model():
        with numpyro.plate("n", 2):
            numpyro.sample("theta", dist.HalfNormal())
        numpyro.sample("mu", dist.Normal())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = View(model, (), {}, "affine", numpyro.infer.init_to_median)
    from flowppl.posterior import coordinates

    assert coordinates(view.density.shapes) == ["mu", "theta[0]", "theta[1]"]
