"""AutoSNF and SNFDistribution: ELBO, evidence and moments against closed forms, gradients against differences, refusals."""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.example_libraries import optimizers
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO, init_to_value

from flowppl.errors import DimensionError, PathDensityError, UnknownFlowError, UnsupportedModelError
from flowppl.numpyro import AutoSNF, SNFDistribution
from flowppl.numpyro.modules import as_params
from flowppl.stochastic import snf as path_of
from tests import annealed, snf
from tests.annealed import BATCH, RATE, SHAPE, WIDTH

pytestmark = pytest.mark.slow  # jax compiles all along

X, Y = jnp.asarray(annealed.X), jnp.asarray(annealed.Y)
START = init_to_value(values={"tau": 1.0, "beta": jnp.zeros(2)})  # a gamma's median takes seconds to compile


def regress(x, y=None, batch=None):
    tau = numpyro.sample("tau", dist.Gamma(SHAPE, RATE))
    sd = tau**-0.5
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(2), WIDTH * sd).to_event(1))
    with numpyro.plate("rows", len(x), subsample_size=batch) as index:
        mean = numpyro.subsample(x, event_dim=1) @ beta
        numpyro.sample("y", dist.Normal(mean, sd), obs=None if y is None else y[index])


def recording(rate):
    """Adam, whose state keeps the gradient."""
    init, update, get = optimizers.adam(rate)

    def with_gradient(params):
        return init(params), jax.tree.map(jnp.zeros_like, params)

    return numpyro.optim._NumPyroOptim(
        lambda: (with_gradient, lambda i, g, state: (update(i, g, state[0]), g), lambda state: get(state[0]))
    )


class Trained(NamedTuple):
    """A guide, what has trained it, and its parameters. Data are traced in each step, which is compiled once for all tests."""

    guide: Any
    svi: Any
    update: Any
    state: Any
    losses: list
    params: dict

    def loss_and_gradient(self, params, seed):
        """Of these parameters, by the particles of one step."""
        state = self.state._replace(optim_state=self.svi.optim.init(params), rng_key=jax.random.key(seed))
        after, loss = self.update(state, X, y=Y)
        return loss, after.optim_state[1][1]


@pytest.fixture(scope="module")
def trained():
    guide = AutoSNF(regress, snf.LAYERS, init_loc_fn=START, init_scale=snf.SCALE)
    svi = SVI(regress, guide, recording(snf.RATE), Trace_ELBO(num_particles=snf.PARTICLES))
    state, update, losses = svi.init(jax.random.key(0), X, y=Y), jax.jit(svi.update), []
    for _ in range(snf.STEPS):
        state, loss = update(state, X, y=Y)
        losses.append(loss)
    return Trained(guide, svi, update, state, losses, svi.get_params(state))


@pytest.fixture(scope="module")
def posterior(trained):
    return trained.guide.weighted(jax.random.key(1), trained.params, snf.PATHS)


def test_the_loss_is_minus_the_mean_log_weight_and_weights_are_exact(trained, posterior):
    snf.check_training(trained.losses)
    losses = [trained.loss_and_gradient(trained.params, seed)[0] for seed in range(snf.PATHS // snf.PARTICLES)]
    snf.check_weights(posterior, -np.mean(losses))
    snf.check_uses(posterior, X[:2])


def test_arviz(posterior):
    pytest.importorskip("arviz")
    snf.check_arviz(posterior)


def test_the_gradient_is_that_of_the_loss(trained):
    """In a direction, with the same random numbers, through Langevin dynamics of which each step takes a score."""
    trains = {name: value for name, value in trained.params.items() if name.endswith("$params")}
    flat, unravel = ravel_pytree(trains)
    way = 1e-5 * jnp.asarray(np.random.default_rng(0).standard_normal(flat.shape))
    middle, high, low = (
        trained.loss_and_gradient({**trained.params, **unravel(flat + share * way)}, 3) for share in (0.0, 1.0, -1.0)
    )
    slope = ravel_pytree({name: middle[1][name] for name in trains})[0] @ way
    np.testing.assert_allclose(slope, (high[0] - low[0]) / 2, rtol=1e-5)


def test_draws_without_weights(trained):
    """A call that leaves data open, as for predictions, takes those that the guide met first."""
    draws = trained.guide.sample_posterior(jax.random.key(5), trained.params, X[:2], sample_shape=(50, 4))
    assert draws["beta"].shape == (50, 4, 2) and draws["tau"].shape == (50, 4)
    np.testing.assert_allclose(draws["beta"].mean((0, 1)), annealed.BETA, atol=0.15)


def test_the_start_is_a_normal_approximation(trained):
    guide = copy.copy(trained.guide)
    params = guide.precondition(jax.random.key(0), X, y=Y)
    np.testing.assert_allclose(params["auto_path$const"]["loc"], guide.preconditioned.loc)
    assert guide.preconditioned.elbo > annealed.LOG_EVIDENCE - 0.5
    assert -trained.loss_and_gradient(params, 0)[0] > annealed.LOG_EVIDENCE - 2


def wave():
    width = numpyro.param("width", 1.0)
    a = numpyro.sample("a", dist.Normal())
    numpyro.sample("b", dist.Normal(jnp.cos(2 * a), width))
    numpyro.factor("edge", -0.25 * a**4)


def test_training_by_layer():
    """Of the layers alone, for the model's parameter as it is given; where the base is counts, and stays."""
    guide = AutoSNF(wave, snf.WAVE, init_loc_fn=init_to_value(values={"a": 0.0, "b": 0.0}), init_scale=1.0)
    guide._setup(jax.random.key(0), (), {})
    params = as_params(guide._path_name, jax.jit(guide._variables)(jax.random.key(0))) | {"width": snf.WIDTH}
    params["auto_path$params"] |= {name: jnp.asarray(value) for name, value in snf.PLACE.items()}
    trained = guide.train_path(params, options=snf.OPTIONS, progress_bar=False)
    before, after = (guide.get_posterior(p).sample_weighted(jax.random.key(1), snf.PATHS)[1] for p in (params, trained))
    snf.check_layers(np.asarray(before), np.asarray(after), guide.history)
    assert trained["width"] == snf.WIDTH
    for name, value in snf.PLACE.items():
        np.testing.assert_array_equal(trained["auto_path$params"][name], value)
    del trained["width"]  # whose own start is taken then
    assert guide.weighted(jax.random.key(2), trained, 100).log_weights.shape == (100,)
    with pytest.raises(ValueError, match="by must be"):
        guide.train_path(params, by="map", progress_bar=False)


def test_a_value_that_was_not_drawn_has_no_density():
    path = snf.undecided()
    q = SNFDistribution(path, path.init(jax.random.key(0), jnp.zeros(1)), snf.log_target, jnp.ones(1), 2 * jnp.eye(1))
    x, intermediates = q.sample_with_intermediates(jax.random.key(1), (3, 2))
    assert x.shape == (3, 2, 1) and q.log_prob(x, intermediates).shape == (3, 2)
    with pytest.raises(PathDensityError, match="integral over paths"):
        q.log_prob(x)
    with pytest.raises(PathDensityError, match="AutoFlow"):
        AutoSNF(regress, path).get_transform({})


def walled(mild):
    """A normal before a wall, beyond which derivatives are no numbers, unless it is a mild one."""
    x = numpyro.sample("x", dist.Normal())
    numpyro.factor("wall", jnp.where(x < 1.0, 0.0, -jnp.inf) if mild else jnp.log((x < 1.0) + 0 * x))


def test_paths_that_went_astray_count_for_nothing():
    """Their derivatives, in the ELBO of NumPyro; the gradient is that of the other paths."""
    start = init_to_value(values={"x": 0.0})

    def gradient(mild):
        guide = AutoSNF(walled, snf.LAYERS, init_loc_fn=start, init_scale=1.0)
        svi = SVI(walled, guide, recording(0.1), Trace_ELBO(num_particles=50))
        state = svi.init(jax.random.key(0), mild)
        after, loss = jax.jit(lambda state: svi.update(state, mild))(state)
        assert not jnp.isfinite(loss)
        return {name: g for name, g in after.optim_state[1][1].items() if name.endswith("$params")}

    found, expected = (ravel_pytree(gradient(mild))[0] for mild in (False, True))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert jnp.isfinite(expected).all() and jnp.abs(expected).max() > 1e-3


def minibatches():
    numpyro.sample("x", dist.Normal())
    with numpyro.plate("rows", 12, subsample_size=BATCH) as index:
        numpyro.sample("y", dist.Normal(), obs=Y[index])


def angles():
    numpyro.sample("x", dist.VonMises(0.0, 1.0))


def discrete():
    numpyro.sample("x", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("model", "message"), [(minibatches, "'rows' subsamples"), (angles, "an angle"), (discrete, "discrete")]
)
def test_models_that_no_path_covers(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        numpyro.handlers.seed(AutoSNF(model, snf.LAYERS, init_loc_fn=START), 0)()


def test_wrong_arguments():
    with pytest.raises(UnknownFlowError):
        AutoSNF(regress, ["nfs"])
    with pytest.raises(ValueError, match="gradient"):
        AutoSNF(regress, gradient="path")
    with pytest.raises(ValueError, match="init_scale"):
        AutoSNF(regress, init_scale=0.0)
    with pytest.raises(DimensionError, match="dim=1, got one of dim=3"):
        numpyro.handlers.seed(AutoSNF(lambda: numpyro.sample("x", dist.Normal()), path_of(["affine"], 3)), 0)()
