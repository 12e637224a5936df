"""AmortizedFlow in NumPyro: gradients, minibatches, unseen data, many kinds of sites, and what it refuses."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_uniform
from numpyro.infer.util import log_density

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError, UnsupportedModelError
from flowppl.numpyro import AmortizedFlow, AutoFlow

KEY = jax.random.key(0)
AFFINE = flows.affine(hidden=(8,))


def model(y, batch_size=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("groups", len(y), subsample_size=batch_size):
        batch = numpyro.subsample(y, event_dim=1)
        theta = numpyro.sample("theta", dist.Normal(mu, 1.0))
        numpyro.sample("obs", dist.Normal(theta[:, None], 1.0).to_event(1), obs=batch)


def rich(y, batch_size=None):
    """Several local sites of different supports and shapes in a plate at dim -2, a plate of globals, a latent on its own."""
    numpyro.sample("alone", dist.Gamma(2.0, 1.0))
    with numpyro.plate("kinds", 2):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("groups", len(y), subsample_size=batch_size, dim=-2):
        batch = numpyro.subsample(y, event_dim=0)
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        r = numpyro.sample("r", dist.Uniform(jnp.zeros((1, 1)), 2.0))
        v = numpyro.sample("v", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("kinds", 2):
            loc = r + p[..., 0] + v[..., 0]
            numpyro.sample("obs", dist.Normal(loc, scale), obs=batch)


def features(y, batch_size=None):
    return y


def data(n, k=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(1.0 + rng.standard_normal((n, 1)) + rng.standard_normal((n, k)))


def small_guide(target=model, read=features, **options):
    options = {"flow": AFFINE, "global_flow": AFFINE, "hidden": (8,), "embedding": 4, **options}
    return AmortizedFlow(target, read, "groups", **options)


def params_of(guide, scramble, *args, target=model, **kwargs):
    svi = SVI(target, guide, optax.adam(1e-2), Trace_ELBO())
    return scramble(svi.get_params(svi.init(KEY, *args, **kwargs)))


@pytest.fixture(scope="module")
def ready(scramble):
    """A guide that has met the model, and its parameters: most of a test's time would go into that."""
    guide = small_guide()
    return guide, params_of(guide, scramble, data(6), batch_size=2)


def shapes(draws):
    return {name: value.shape for name, value in draws.items()}


def exact(y, prior_of=None):
    """Mean and sd of each theta, and those of mu from the data `prior_of`."""
    prior_of = np.asarray(y if prior_of is None else prior_of)
    y, k = np.asarray(y), y.shape[1]
    precision = 1 / 9 + len(prior_of) / (1 + 1 / k)
    mu = prior_of.mean(1).sum() / (1 + 1 / k) / precision
    w = k / (k + 1)
    return w * y.mean(1) + (1 - w) * mu, np.sqrt(1 / (k + 1) + (1 - w) ** 2 / precision), mu, precision**-0.5


@pytest.mark.slow
def test_a_conjugate_hierarchy_from_minibatches():
    y, guide = data(60), small_guide(gradient="path", embedding=8)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-2, 300))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=2))
    params = svi.run(KEY, 300, y, batch_size=20, progress_bar=False).params
    draw = jax.jit(lambda y: guide.sample_posterior(jax.random.key(1), params, y, sample_shape=(4000,)))
    for here in (y, data(60, seed=1)):  # unseen ones too
        draws = draw(here)
        mean, sd, mu, mu_sd = exact(here, y)
        # The mean over groups of the absolute Monte Carlo error is 0.013 sds; training leaves about 0.02 more.
        assert np.abs((draws["theta"].mean(0) - mean) / sd).mean() < 0.1
        np.testing.assert_allclose((draws["theta"].std(0) / sd).mean(), 1.0, atol=0.05)
        assert abs(draws["mu"].mean() - mu) < 0.5 * mu_sd


def in_direction(f, params, direction):
    """The slope of f along a direction, by central differences."""
    step = 1e-5
    ahead, back = (f(jax.tree.map(lambda a, b, s=s: a + s * step * b, params, direction)) for s in (1, -1))
    return (ahead - back) / (2 * step)


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_gradients_agree_with_finite_differences(gradient, ready, scramble):
    """Of the ELBO with fixed noise; in path mode with log q's parameters held where they are."""
    y, (guide, params) = data(6), ready
    guide = guide if gradient == "reparam" else small_guide(gradient=gradient)

    @jax.jit
    def loss(p):
        return Trace_ELBO().loss(KEY, p, model, guide, y)

    @jax.jit
    def by_value(p):
        key = jax.random.split(KEY)[1]  # as Trace_ELBO does
        trace = handlers.trace(handlers.seed(handlers.substitute(guide, p), key)).get_trace(y)
        drawn = {name: trace[name]["value"] for name in ("_auto_global", "_auto_local")}
        held = handlers.seed(handlers.substitute(guide, {**drawn, **(p if gradient == "reparam" else params)}), KEY)
        log_q, trace = log_density(held, (y,), {}, {})
        log_p, _ = log_density(handlers.seed(handlers.replay(model, trace), KEY), (y,), {}, {})
        return log_q - log_p

    grads, zero = jax.jit(jax.grad(loss))(params), jax.tree.map(jnp.zeros_like, params)
    net = params["auto_local$params"]["bijection"]["net"]
    directions = {"encoder": {**zero, "auto_local$params": {**zero["auto_local$params"]}}}
    directions["encoder"]["auto_local$params"]["bijection"] = {
        **zero["auto_local$params"]["bijection"],
        "net": scramble(jax.tree.map(jnp.zeros_like, net)),
    }
    directions["global"] = {**zero, "auto_global$params": scramble(zero["auto_global$params"])}
    for direction in directions.values():
        slope = in_direction(by_value, params, direction)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
        np.testing.assert_allclose(jax.tree.reduce(jnp.add, products), slope, rtol=1e-6)
        assert abs(slope) > 1e-3


def test_minibatches_add_up(ready):
    """The mean ELBO over all minibatches is the one of all data, at given values of the guide's latents."""
    y, (guide, params) = data(4), ready
    u, g = jax.random.normal(KEY, (4, 1)), jnp.ones(1)

    @jax.jit
    def elbo(indices):
        batch = {"groups": indices, "_auto_global": g, "_auto_local": u[indices]}
        size = len(indices)
        held = handlers.substitute(guide, {**params, **batch})
        log_q, trace = log_density(handlers.seed(held, KEY), (y, size), {}, {})
        log_p, _ = log_density(handlers.seed(handlers.replay(model, trace), KEY), (y, size), {}, {})
        return log_p - log_q

    batches = [elbo(jnp.array(pair)) for pair in itertools.combinations(range(4), 2)]
    np.testing.assert_allclose(np.mean(batches), elbo(jnp.arange(4)), rtol=1e-10)
    assert np.std(batches) > 0.1


@pytest.mark.slow
def test_many_kinds_of_sites(scramble):
    y, guide = data(6, 2), small_guide(rich, init_loc_fn=init_to_uniform)  # the median would compile gamma draws
    params = params_of(guide, scramble, y, 3, target=rich)

    @jax.jit
    def run(params):
        trace = handlers.trace(handlers.seed(handlers.substitute(guide, params), KEY)).get_trace(y, 3)
        log_p, _ = log_density(handlers.seed(handlers.replay(rich, trace), KEY), (y, 3), {}, {})
        sites = {name: trace[name] for name in supports}
        values = {name: site["value"] for name, site in sites.items()}
        log_probs = {name: jnp.sum(site["fn"].log_prob(site["value"])) for name, site in sites.items()}
        assert {name: site["scale"] for name, site in sites.items() if site["scale"]} == dict.fromkeys(local, 2.0)
        return log_p, values, log_probs, guide.sample_posterior(KEY, params, y, sample_shape=(3, 2))

    supports = {
        "alone": constraints.positive,
        "scale": constraints.positive,
        "p": constraints.simplex,
        "r": constraints.interval(0.0, 2.0),
        "v": constraints.independent(constraints.positive, 1),
    }
    local = {"p": (3,), "r": (), "v": (2,)}
    log_p, values, log_probs, draws = run(params)
    assert np.isfinite(log_p)
    for name, support in supports.items():
        bijection = biject_to(support)
        log_det = bijection.log_abs_det_jacobian(bijection.inv(values[name]), values[name])
        np.testing.assert_allclose(log_probs[name], -jnp.sum(log_det), rtol=1e-8)
        assert bool(jnp.all(support(draws[name])))
    shapes_of_local = {name: (3, 2, 6, 1, *event) for name, event in local.items()}
    assert shapes(draws) == {"alone": (3, 2), "scale": (3, 2, 2), **shapes_of_local}


@pytest.mark.slow
def test_without_global_latents_and_with_an_encoder_of_ones_own(scramble):
    def local_only(y, batch_size=None):
        with numpyro.plate("groups", len(y), subsample_size=batch_size):
            numpyro.sample("theta", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def encoder(x):
        weight = numpyro.param("weight", jnp.ones((4, x.shape[-1])) / 10)
        return jnp.tanh(x @ weight.T)

    guide, y = small_guide(local_only, encoder=encoder, gradient="path"), data(5)
    params = params_of(guide, lambda p: p, y, 2, target=local_only)
    elbo = Trace_ELBO()
    grads = jax.jit(jax.grad(lambda p: elbo.loss(KEY, p, local_only, guide, y, 2)))(scramble(params))
    assert jnp.abs(grads["weight"]).max() > 1e-3
    draws = jax.jit(lambda p: guide.sample_posterior(KEY, p, y, sample_shape=(3,)))(params)
    assert shapes(draws) == {"theta": (3, 5, 2)}


def test_other_data_and_other_guides(ready):
    guide, params = ready
    drawn = jax.jit(Predictive(model, guide=guide, params=params, num_samples=5))(KEY, data(9))
    assert shapes(drawn)["obs"] == (5, 9, 3)

    def theta(guide, **kwargs):
        return jax.jit(lambda p, y: guide.sample_posterior(KEY, p, y, **kwargs)["theta"])(params, data(9))

    # How much of the plate the model asks for does not matter.
    np.testing.assert_array_equal(theta(guide), theta(small_guide(), batch_size=3))
    assert theta(pickle.loads(pickle.dumps(guide))).shape == (9,)


def test_all_of_it_under_jit():
    guide, y = small_guide(), data(6)

    def run(y):
        svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
        state = svi.init(KEY, y)
        return svi.update(state, y)[1], svi.get_params(state)

    loss, params = jax.jit(run)(y)
    assert np.isfinite(loss)
    draws = jax.jit(lambda p, y: guide.sample_posterior(KEY, p, y))(params, y)  # no tracer of the first is in its way
    assert draws["theta"].shape == (6,)


def in_two_plates(y):
    with numpyro.plate("kinds", 3, dim=-2), numpyro.plate("groups", len(y), dim=-1):
        numpyro.sample("theta", dist.Normal(0.0, 1.0))


def in_another(y):
    with numpyro.plate("others", 10, subsample_size=3):
        numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", len(y)):
        numpyro.sample("theta", dist.Normal(0.0, 1.0))


def discrete(y):
    with numpyro.plate("groups", len(y)):
        numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("theta", dist.Normal(0.0, 1.0))


def bounded_by_the_element(y):
    with numpyro.plate("groups", len(y)):
        numpyro.sample("theta", dist.Uniform(0.0, 1.0 + jnp.arange(len(y))))


def bounded_by_a_global(y):
    top = numpyro.sample("top", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("groups", len(y)):
        numpyro.sample("theta", dist.Uniform(0.0, top))


REFUSED = [
    (lambda y: numpyro.sample("theta", dist.Normal(0.0, 1.0)), "no latent of the model is in a plate 'groups'"),
    (in_two_plates, "'theta' is in plate 'groups' and in plate 'kinds' too"),
    (in_another, "'z' is in plate 'others', which subsamples 3 of 10"),
    (discrete, "'k' is discrete"),
    (bounded_by_the_element, "support of site 'theta' differs between the elements"),
    (bounded_by_a_global, "support of site 'theta' depends on other latents"),
]


@pytest.mark.parametrize(("target", "message"), REFUSED)
def test_models_that_it_cannot_cover(target, message):
    with pytest.raises(UnsupportedModelError, match=message):
        handlers.seed(small_guide(target), 0)(data(4))


@pytest.mark.parametrize("read", [lambda y: y[:, 0], lambda y: y[:-1], lambda y: y[:, :, None]])
def test_features_of_another_shape(read):
    with pytest.raises(DimensionError, match="features: expected an array of shape"):
        handlers.seed(small_guide(read=read), 0)(data(4))


def test_options_are_checked():
    with pytest.raises(ValueError, match="init_scale"):
        small_guide(init_scale=0.0)
    with pytest.raises(ValueError, match="gradient"):
        small_guide(gradient="score")


def log_densities(guide, params, y, u, x):
    """Of the global flow at u `(n, 1)`, and of the local one at x `(n, N, 1)`, given the features y `(N, F)` and u."""

    def both():
        local = guide._of_local(y, u[:, None]) if guide._global else guide._of_local(y, None)
        return guide._of_global(guide._global).log_prob(u), local.log_prob(x)

    return handlers.substitute(handlers.seed(both, 0), params)()


def test_a_file_comes_back_here_and_in_the_other_front(ready, tmp_path):
    guide, params = ready
    path, y = tmp_path / "q.flow", data(6)
    guide.save(path, params)
    again, loaded = AmortizedFlow.load(path, model, features, y[:4], prefix="other")  # other data are fine
    draw = lambda guide, params: jax.jit(lambda: guide.sample_posterior(KEY, params, y, sample_shape=(3,)))()
    jax.tree.map(np.testing.assert_array_equal, draw(guide, params), draw(again, loaded))
    with pytest.raises(FlowFileError, match="of kind 'AmortizedFlow'"):
        AutoFlow.load(path, model, y)

    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("flowppl.pyro")
    from tests.pyro.test_amortized import model as in_pyro

    rng = np.random.default_rng(2)
    u, x = rng.standard_normal((3, 1)), rng.standard_normal((3, 6, 1))
    ours = log_densities(guide, params, y, jnp.asarray(u), jnp.asarray(x))
    their_y, their_u, their_x = (torch.tensor(np.asarray(a)) for a in (y, u, x))
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = theirs.AmortizedFlow.load(path, in_pyro, features, their_y)
        of_global, of_local = found._of_global(), found._of_local(their_y, their_u[:, None])
    finally:
        torch.set_default_dtype(dtype)
    np.testing.assert_allclose(of_global.log_prob(their_u).detach(), ours[0], rtol=1e-10)
    np.testing.assert_allclose(of_local.log_prob(their_x).detach(), ours[1], rtol=1e-10)
    found.save(path)
    jax.tree.map(np.testing.assert_array_equal, AmortizedFlow.load(path, model, features, y)[1], params)


def test_an_encoder_of_ones_own_is_not_saved(ready, tmp_path):
    guide = small_guide(encoder=lambda x: x)
    with pytest.raises(RuntimeError, match="has not seen its model"):
        guide.save(tmp_path / "q.flow", {})
    guide.prototype_trace = {}
    with pytest.raises(FlowFileError, match=r"no encoder of your own.*save params"):
        guide.save(tmp_path / "q.flow", {})
    assert not (tmp_path / "q.flow").exists()
