"""anneal: evidence and moments against closed forms, and what an annealed posterior can be asked."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from flowppl import flows
from flowppl.errors import UnsupportedModelError
from flowppl.pyro import AnnealedPosterior, anneal, fit
from tests import annealed
from tests.annealed import BATCH, OPTIONS, RATE, SHAPE, WIDTH

X, Y = (torch.as_tensor(a) for a in (annealed.X, annealed.Y))


def regress(x, y=None, batch=None):
    tau = pyro.sample("tau", dist.Gamma(x.new_tensor(SHAPE), RATE))
    sd = tau**-0.5
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(2), WIDTH * sd).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=batch) as index:
        mean = pyro.subsample(x, event_dim=1) @ beta
        pyro.sample("y", dist.Normal(mean, sd), obs=None if y is None else y[index])


@pytest.fixture(scope="module")
def posterior():
    return anneal(regress, X, y=Y, **OPTIONS)


def test_evidence_and_moments_are_exact(posterior):
    assert isinstance(posterior, AnnealedPosterior)
    annealed.check_evidence(posterior)
    annealed.check_moments(posterior)
    annealed.check_schedule(posterior)


def test_what_it_can_be_asked(posterior):
    annealed.check_uses(posterior, torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64))


def test_arviz(posterior):
    pytest.importorskip("arviz")
    annealed.check_arviz(posterior)


def test_a_picture(posterior):
    pytest.importorskip("matplotlib")
    assert posterior.plot(["beta"]).axes


@pytest.mark.filterwarnings("ignore::flowppl.errors.FitWarning")  # of the start
def test_a_flow_as_the_start():
    """The flow has hardly been trained; at once, with 98 % of the draws effective, its weights would have no mean."""
    start = fit(
        regress, X, y=Y, flow=flows.realnvp(layers=2, hidden=(8,)), max_steps=250, num_samples=2000, progress_bar=False
    )
    found = anneal(regress, X, y=Y, start=start, **OPTIONS)
    annealed.check_evidence(found)
    annealed.check_moments(found)
    assert found.khat < 0.7


def test_a_plate_that_subsamples_is_annealed_on_all_of_the_data(posterior):
    """And the same seed gives the same draws."""
    found = anneal(regress, X, y=Y, batch=BATCH, **OPTIONS)
    np.testing.assert_allclose(found.unconstrained, posterior.unconstrained, rtol=1e-6)
    assert found.log_evidence == pytest.approx(posterior.log_evidence, abs=1e-6)


def test_angles_are_an_error():
    def model():
        pyro.sample("angle", dist.VonMises(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match=r"'angle' is an angle.*use fit"):
        anneal(model, **OPTIONS)
