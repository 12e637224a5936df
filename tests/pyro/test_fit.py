"""fit: one call from a model to a posterior."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_median

from flowppl import optim, tree
from flowppl.errors import FitWarning, FlowFileError, UnsupportedModelError
from flowppl.pyro import AutoFlow, Posterior, fit
from flowppl.pyro.model_posterior import View

QUICK = {"flow": "affine", "max_steps": 500, "num_samples": 2000, "progress_bar": False}
RNG = np.random.default_rng(0)
NUMBERS = (3e5 + 1e3 * np.arange(40) + 2e3 * RNG.standard_normal(40)).astype(np.float32)
YEAR, Y = 1950.0 + torch.arange(40), torch.as_tensor(NUMBERS)


def trend(year, y=None):
    # Neither centred nor scaled: the correlation is above 0.99999, and scales differ by six orders.
    slope = pyro.sample("slope", dist.Normal(0.0, 1e4))
    level = pyro.sample("level", dist.Normal(0.0, 1e8))
    mean = pyro.deterministic("mean_2000", level + slope * 2000.0)
    del mean
    with pyro.plate("years", len(year)):
        pyro.sample("y", dist.Normal(level + slope * year, 2e3), obs=y)


def exact():
    """Mean, sd and log evidence of (level, slope), in closed form."""
    design, prior = np.stack([np.ones(40), YEAR.numpy()], 1), np.diag([1e16, 1e8])
    covariance = np.linalg.inv(np.linalg.inv(prior) + design.T @ design / 4e6)
    mean = covariance @ design.T @ NUMBERS.astype(float) / 4e6
    marginal = design @ prior @ design.T + 4e6 * np.eye(40)
    log_evidence = -0.5 * (NUMBERS @ np.linalg.solve(marginal, NUMBERS) + np.linalg.slogdet(2 * np.pi * marginal)[1])
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
    draws = posterior.guide.sample_posterior(sample_shape=(500,))["slope"].numpy()
    assert abs(draws.mean() - exact()[0][1]) < 0.3 * exact()[1][1]
    assert isinstance(posterior.guide, AutoFlow)
    values = {name: posterior.samples[name][:5] for name in ("level", "slope")}
    log_prob = posterior.log_prob(values)
    assert log_prob.shape == (5,)
    log_p, _ = posterior._value_and_score(posterior.unconstrained[:5])
    del log_p  # the guide has the model's own precision, in which values of this correlation mean nothing


def test_predictions_and_arviz(posterior):
    pytest.importorskip("arviz")
    predicted = posterior.predict(torch.tensor([2000.0, 2010.0]), num_samples=300)["y"]
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
        pyro.sample("slope", dist.Normal(0.0, 1.0))

    with pytest.raises(FlowFileError):
        Posterior.load(path, other, YEAR, y=Y)


@pytest.mark.slow
def test_a_fit_goes_on_from_another(posterior):
    """Ten more numbers move the posterior: from the old one on, one chunk of steps will do."""
    more = fit(trend, YEAR[:30], y=Y[:30], start=posterior, seed=1, **{**QUICK, "max_steps": 250})
    assert more.diagnose().verdict == "good"


@pytest.mark.slow
def test_an_optimizer_of_the_users():
    plain = optim.Optimizer(lambda params: (), lambda grads, state: (tree.map(lambda g: -1e-2 * g, grads), state))
    found = fit(trend, YEAR, Y, optimizer=plain, **{**QUICK, "max_steps": 250})
    assert found.khat < 0.7 or found.ess > 1900


def test_two_modes_are_not_to_be_trusted():
    """Either mode alone looks perfect; the search for a start has seen the other."""

    def model():
        x = pyro.sample("x", dist.Uniform(-30, 30))
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.factor("two", torch.logaddexp(-0.5 * (x - 4) ** 2 / 0.01, -0.5 * (x + 4 + 0 * y) ** 2 / 0.01))

    with pytest.warns(FitWarning, match="not to be trusted"):
        found = fit(model, **QUICK)
    assert found.diagnose().verdict == "not to be trusted"
    assert "anneal" in found.diagnose().advice


@pytest.mark.slow
def test_a_model_that_insists_on_float32():
    layer = torch.nn.Linear(1, 1, bias=False).float().requires_grad_(False)
    torch.nn.init.ones_(layer.weight)

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(layer(x[..., None])[..., 0], 0.1), obs=y)

    found = fit(model, torch.tensor(0.3), **{**QUICK, "max_steps": 250})
    assert found._view.precise.start.dtype is torch.float32
    assert found.mean()["x"] == pytest.approx(0.3, abs=0.03)


def test_what_cannot_be_fitted_is_an_error():
    def discrete():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0))

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
        with pyro.plate("n", 2):
            pyro.sample("theta", dist.HalfNormal(1.0))
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = View(model, (), {}, "affine", init_to_median)
    from flowppl.posterior import coordinates

    assert coordinates(view.precise.density.shapes) == ["mu", "theta[0]", "theta[1]"]
