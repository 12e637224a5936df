"""anneal: evidence and moments against closed forms, and what an annealed posterior can be asked."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import init_to_value

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro import AnnealedPosterior, anneal, fit
from tests import annealed
from tests.annealed import BATCH, RATE, SHAPE, WIDTH

pytestmark = pytest.mark.slow  # jax compiles all along

X, Y = jnp.asarray(annealed.X), jnp.asarray(annealed.Y)
START = init_to_value(values={"tau": 1.0, "beta": jnp.zeros(2)})  # a gamma's median takes seconds to compile
OPTIONS = {**annealed.OPTIONS, "init_loc_fn": START}


def regress(x, y=None, batch=None):
    tau = numpyro.sample("tau", dist.Gamma(SHAPE, RATE))
    sd = tau**-0.5
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), WIDTH * sd).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=batch) as index:
        mean = numpyro.subsample(x, event_dim=1) @ beta
        numpyro.sample("y", dist.Normal(mean, sd), obs=None if y is None else y[index])


@pytest.fixture(scope="module")
def posterior():
    return anneal(regress, X, y=Y, batch=BATCH, **OPTIONS)


def test_evidence_and_moments_are_exact(posterior):
    """Of all of the data, though a plate subsamples."""
    assert isinstance(posterior, AnnealedPosterior)
    annealed.check_evidence(posterior)
    annealed.check_moments(posterior)
    annealed.check_schedule(posterior)


def test_what_it_can_be_asked(posterior):
    annealed.check_uses(posterior, np.array([[1.0, 0.0], [1.0, 2.0]]))


def test_arviz(posterior):
    pytest.importorskip("arviz")
    annealed.check_arviz(posterior)


def test_a_picture(posterior):
    pytest.importorskip("matplotlib")
    assert posterior.plot(["beta"]).axes


@pytest.mark.filterwarnings("ignore::flowppl.errors.FitWarning")  # of the start
def test_a_flow_as_the_start(small):
    """The flow has hardly been trained; at once, with 98 % of the draws effective, its weights would have no mean."""
    start = fit(regress, X, y=Y, flow=small, max_steps=250, num_samples=2000, progress_bar=False, init_loc_fn=START)
    found = anneal(regress, X, y=Y, start=start, **OPTIONS)
    annealed.check_evidence(found)
    annealed.check_moments(found)
    assert found.khat < 0.7


def test_angles_are_an_error():
    def model():
        numpyro.sample("angle", dist.VonMises(0.0, 1.0))
        numpyro.sample("x", dist.Normal())

    with pytest.raises(UnsupportedModelError, match=r"'angle' is an angle.*use fit"):
        anneal(model, **OPTIONS)


def test_no_draws_are_an_error():
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        anneal(regress, X, y=Y, **{**OPTIONS, "num_samples": 0})
