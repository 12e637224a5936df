"""fit with plates that subsample: minibatches in training, all of the data elsewhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from flowppl.errors import UnsupportedModelError
from flowppl.pyro import LogDensity, fit
from tests import regression
from tests.regression import BATCH, QUICK, ROWS

SEEN = []
X, Y = (torch.as_tensor(a) for a in (regression.X, regression.Y))


def regress(x, y=None, batch=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    c = pyro.sample("c", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x), subsample_size=batch) as index:
        SEEN.append(tuple(index.tolist()))
        mean = pyro.deterministic("mean", pyro.subsample(x, event_dim=1) @ beta + c)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=None if y is None else y[index])


@pytest.fixture
def u(float64):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [3, 8], ids=["a third", "not a divisor"])
@pytest.mark.parametrize("by", ["_by_vmap", "_by_plate", "_by_row"])
def test_the_density_is_that_of_all_of_the_data(u, batch, by):
    def model(x, y, batch=None):
        # Written for a plate in front of its own, too.
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        c = pyro.sample("c", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x), subsample_size=batch) as index:
            mean = pyro.deterministic("mean", (x[index] * beta).sum(-1) + c)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=pyro.subsample(y, event_dim=0))

    x, y = X[:9], Y[:9]
    whole, density = LogDensity(model, (x, y)), LogDensity(model, (x, y, batch))
    assert density.plates == {"rows": (9, batch)} and whole.plates == {}
    density._rows, density._terms = 2, getattr(density, by)  # points at a time, of five
    torch.testing.assert_close(density.log_prob(u), whole.log_prob(u))
    for name in ("value_and_score", "split"):
        for found, expected in zip(getattr(density, name)(u), getattr(whole, name)(u), strict=True):
            torch.testing.assert_close(found, expected)
    assert set(density.constrain(u)) == {"beta", "c"}  # and not the means of nine rows each
    torch.testing.assert_close(whole.minibatch(None, u), whole.log_prob(u))
    assert density.minibatch(None, u).shape == (5,)


def test_a_minibatch_estimates_it_without_bias(u):
    """400 minibatches: five standard errors, at points that see the same ones."""
    density = LogDensity(regress, (X[:9], Y[:9], 3))
    rng = torch.Generator().manual_seed(0)
    found = torch.stack([density.minibatch(rng, u) for _ in range(400)])
    error = found.std(0) / len(found) ** 0.5
    assert torch.all((found.mean(0) - density.log_prob(u)).abs() < 5 * error) and torch.all(error > 0)
    twice = density.minibatch(rng, torch.stack([u[0], u[0]]))
    assert twice[0] == twice[1]


@pytest.mark.slow
def test_a_regression_in_batches(monkeypatch):
    during = regression.while_training(monkeypatch, SEEN)
    monkeypatch.setattr("flowppl.pyro.model_posterior.pathfinder", regression.poor_start)
    posterior = fit(regress, X.float(), Y.float(), batch=BATCH, **QUICK)
    assert {len(index) for index in during} == {BATCH}
    assert len(set(during)) == len(during) == 500  # a fresh one in every step
    regression.check_fit(posterior)
    assert posterior.predict(X[:7].float(), batch=3, num_samples=4)["y"].shape == (4, 7)
    some = {name: draws[:3] for name, draws in posterior.samples.items()}
    assert posterior._log_likelihood(some)["y"].shape == (3, ROWS)


def test_what_minibatches_do_not_estimate_is_an_error():
    def local(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=2) as index:
            theta = pyro.sample("theta", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

    def enumerated(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=2) as index:
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(k, 1.0), obs=y[index])

    def cut_already(y, **how):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, **how):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[:2])

    with pytest.raises(
        UnsupportedModelError, match=r"'theta' is in plate 'rows', which subsamples 2 of 10.*AmortizedFlow"
    ):
        fit(local, torch.zeros(10), **QUICK)
    with pytest.raises(UnsupportedModelError, match=r"'k' is enumerated.*MixtureSameFamily"):
        fit(enumerated, torch.zeros(10), **QUICK)
    with pytest.raises(UnsupportedModelError, match="fails where 'rows' does not subsample"):
        fit(cut_already, torch.zeros(10), subsample_size=2, **QUICK)
    with pytest.raises(UnsupportedModelError, match="which subsamples 2 of 10 that it is told"):
        fit(cut_already, torch.zeros(10), subsample=torch.arange(2), **QUICK)


def test_plates_are_their_own_again_after_an_error():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=2) as index:
            assert len(index) == 2

    with pytest.raises(AssertionError):
        LogDensity(model)
    model()
