"""AutoSNF and SNFDistribution: ELBO, evidence and moments against closed forms, gradients against differences, refusals."""

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from flowppl.errors import DimensionError, PathDensityError, UnknownFlowError, UnsupportedModelError
from flowppl.pyro import AutoSNF, SNFDistribution
from flowppl.stochastic import snf as path_of
from tests import annealed, snf
from tests.annealed import BATCH, RATE, SHAPE, WIDTH

X, Y = (torch.as_tensor(a) for a in (annealed.X, annealed.Y))


def regress(x, y=None, batch=None):
    tau = pyro.sample("tau", dist.Gamma(x.new_tensor(SHAPE), RATE))
    sd = tau**-0.5
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(2), WIDTH * sd[..., None]).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=batch) as index:
        mean = (pyro.subsample(x, event_dim=1) * beta).sum(-1)
        pyro.sample("y", dist.Normal(mean, sd), obs=None if y is None else y[index])


def elbo(num_particles):
    return Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)


@pytest.fixture(scope="module")
def trained():
    """A guide and its training."""
    pyro.set_rng_seed(0)
    guide = AutoSNF(regress, snf.LAYERS, init_scale=snf.SCALE).setup(X, y=Y)
    optimizer, losses = torch.optim.Adam(guide.parameters(), snf.RATE), []
    for _ in range(snf.STEPS):
        loss = elbo(snf.PARTICLES).differentiable_loss(regress, guide, X, y=Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return guide, losses


@pytest.fixture(scope="module")
def posterior(trained):
    return trained[0].weighted(torch.Generator().manual_seed(1), snf.PATHS)


def test_the_loss_is_minus_the_mean_log_weight_and_weights_are_exact(trained, posterior):
    guide, losses = trained
    snf.check_training(losses)
    pyro.set_rng_seed(2)
    with torch.no_grad():
        found = -elbo(snf.PATHS).loss(regress, guide, X, y=Y)
        pyro.set_rng_seed(2)
        _, log_w = guide.get_posterior(X, y=Y).sample_weighted(None, snf.PATHS)
    assert found == pytest.approx(log_w.mean().item(), abs=1e-9)  # the same paths
    snf.check_weights(posterior, found)
    snf.check_uses(posterior, X[:2])


def test_arviz(posterior):
    pytest.importorskip("arviz")
    snf.check_arviz(posterior)


def test_the_gradient_is_that_of_the_loss(trained):
    """In a direction, with the same random numbers, through Langevin dynamics of which each step takes a score."""
    guide = copy.deepcopy(trained[0])
    params, rng = list(guide.parameters()), torch.Generator().manual_seed(0)
    way = [1e-5 * torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in params]

    def loss(share):
        pyro.set_rng_seed(3)
        with torch.no_grad():
            for p, step in zip(params, way, strict=True):
                p.add_(share * step)
        return elbo(4).differentiable_loss(regress, guide, X, y=Y)

    grads = torch.autograd.grad(loss(0.0), params)
    slope = sum((g * step).sum() for g, step in zip(grads, way, strict=True))
    difference = (loss(1.0) - loss(-2.0)) / 2
    np.testing.assert_allclose(slope.item(), difference.item(), rtol=1e-5)


def test_draws_without_weights_and_predictions(trained):
    """A call that leaves data open, as for predictions, takes those that the guide met first."""
    guide, _ = trained
    found = Predictive(guide, num_samples=500, parallel=True)(X[:2])
    np.testing.assert_allclose(found["beta"].mean(0), annealed.BETA, atol=0.1)
    assert Predictive(regress, guide=guide, num_samples=5)(X[:2])["y"].shape == (5, 2)
    draws = guide.sample_posterior(sample_shape=(100, 2))
    assert draws["beta"].shape == (100, 2, 2) and draws["tau"].shape == (100, 2)


def test_the_start_is_a_normal_approximation():
    guide = AutoSNF(regress, snf.LAYERS)
    svi = SVI(regress, guide.precondition(None, X, y=Y), pyro.optim.Adam({"lr": 0.01}), elbo(64))
    assert guide.preconditioned.elbo > annealed.LOG_EVIDENCE - 0.5
    assert -svi.step(X, y=Y) > annealed.LOG_EVIDENCE - 2


def test_decisions_have_a_score():
    path, rng = snf.undecided(), torch.Generator().manual_seed(0)
    variables = path.init(rng, X)
    shift = variables["params"]["layers"][0]["bias"]
    shift.fill_(snf.SHIFT).requires_grad_()

    def slopes(gradient):
        q = SNFDistribution(path, variables, snf.log_target, gradient=gradient)
        elbos = [q.sample_weighted(rng, 2000)[1].mean() for _ in range(50)]
        return np.array([torch.autograd.grad(value, shift)[0].item() for value in elbos])

    snf.check_score(slopes("score"), slopes("reparam"))


def wave():
    width = pyro.param("width", X.new_tensor(1.0))
    a = pyro.sample("a", dist.Normal(X.new_zeros(()), 1.0))
    pyro.sample("b", dist.Normal(torch.cos(2 * a), width))
    pyro.factor("edge", -0.25 * a**4)


def test_training_by_layer():
    """Of the layers alone, for the model's parameter as it is given; where the base is counts, and stays."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoSNF(wave, snf.WAVE, init_scale=1.0).setup()
    pyro.get_param_store()["width"] = X.new_tensor(snf.WIDTH)
    place = {name: guide.path_parameters.variables["params"][name] for name in snf.PLACE}
    with torch.no_grad():
        for name, value in snf.PLACE.items():
            place[name].copy_(torch.tensor(value))
    expected = {name: value.clone() for name, value in place.items()}

    def log_w():
        with torch.no_grad():
            return guide.get_posterior().sample_weighted(torch.Generator().manual_seed(1), snf.PATHS)[1].numpy()

    before = log_w()
    guide.train_path(options=snf.OPTIONS, progress_bar=False)
    snf.check_layers(before, log_w(), guide.history)
    assert pyro.param("width") == snf.WIDTH
    for name, value in expected.items():
        assert torch.equal(place[name], value)
    with pytest.raises(ValueError, match="by must be"):
        guide.train_path(by="map", progress_bar=False)


def test_a_value_that_was_not_drawn_has_no_density():
    path = snf.undecided()
    variables = path.init(torch.Generator(), X)
    q = SNFDistribution(path, variables, snf.log_target, X.new_ones(1), 2 * torch.eye(1).to(X)).expand((2,))
    x = q.rsample((3,))
    assert x.shape == (3, 2, 1) and q.log_prob(x).shape == (3, 2)
    for other in (x.clone(), x[0]):
        with pytest.raises(PathDensityError, match="integral over paths"):
            q.log_prob(other)
    with pytest.raises(PathDensityError, match="AutoFlow"):
        AutoSNF(regress, path).get_transform()


def test_a_pickle_has_no_model(trained):
    guide = pickle.loads(pickle.dumps(trained[0]))
    with pytest.raises(RuntimeError, match="without its model"):
        guide(X, y=Y)


@config_enumerate
def mixture(y):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    if bool((share < 0).any()):  # what torch's vmap cannot run: points go into a plate, inside of that of particles
        raise ValueError
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(3.0 * pyro.sample("of", dist.Bernoulli(share)), 1.0), obs=y)


def test_enumerated_sites():
    """One datum: p(y) is an even mixture of two normals."""
    y = torch.tensor([2.0])
    guide = AutoSNF(mixture, snf.LAYERS, init_scale=1.0)
    loss = TraceEnum_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss
    found, posterior = -loss(mixture, guide, y), guide.weighted(None, 2000, y)
    exact = np.log(0.5 * np.exp(-2.0) + 0.5 * np.exp(-0.5)) - 0.5 * np.log(2 * np.pi)
    value, error = posterior.log_evidence
    own, own_error = posterior.elbo
    assert abs(value - exact) < 4 * error and error < 0.1
    assert abs(found - own) < 4 * 5**0.5 * own_error


def walled(mild):
    """A normal before a wall, beyond which derivatives are no numbers, unless it is a mild one."""
    x = pyro.sample("x", dist.Normal(X.new_zeros(()), 1.0))
    pyro.factor("wall", torch.where(x < 1.0, 0.0, -torch.inf) if mild else torch.log((x < 1.0) + 0 * x))


@pytest.mark.filterwarnings("ignore:Encountered .inf")
def test_paths_that_went_astray_count_for_nothing():
    """Their derivatives, in the ELBO of Pyro; the gradient is that of the other paths."""

    def gradient(mild):
        pyro.set_rng_seed(0)
        guide = AutoSNF(walled, snf.LAYERS, init_scale=1.0).setup(mild)
        pyro.set_rng_seed(1)
        loss = Trace_ELBO(50, vectorize_particles=True, max_plate_nesting=0).differentiable_loss(walled, guide, mild)
        assert not torch.isfinite(loss)
        return torch.autograd.grad(loss, list(guide.parameters()))

    for found, expected in zip(gradient(False), gradient(True), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert torch.isfinite(expected).all() and expected.abs().max() > 1e-5


def minibatches():
    regress(X, Y, BATCH)


def angles():
    pyro.sample("x", dist.VonMises(torch.tensor(0.0), 1.0))


def discrete():
    pyro.sample("x", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("model", "message"), [(minibatches, "'rows' subsamples"), (angles, "an angle"), (discrete, "discrete")]
)
def test_models_that_no_path_covers(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        AutoSNF(model, snf.LAYERS).setup()


def test_wrong_arguments():
    with pytest.raises(UnknownFlowError):
        AutoSNF(regress, ["nfs"])
    with pytest.raises(ValueError, match="gradient"):
        AutoSNF(regress, gradient="path")
    with pytest.raises(ValueError, match="init_scale"):
        AutoSNF(regress, init_scale=0.0)
    with pytest.raises(DimensionError, match="dim=1, got one of dim=3"):
        AutoSNF(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), path_of(["affine"], 3)).setup()
