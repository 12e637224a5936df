"""AutoFlow in the workflows of NumPyro: SVI, Predictive, NeuTra, pickling, and jax's transformations."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, init_to_value
from numpyro.infer.autoguide import AutoGuideList
from numpyro.infer.reparam import NeuTraReparam

from flowppl import flows
from flowppl.errors import UnknownFlowError, UnsupportedModelError
from flowppl.numpyro import AutoFlow

X = jnp.array([0.5, -1.0, 2.0])
KEY = jax.random.key(0)


def model(x=None):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(2)))
    with numpyro.plate("n", 3):
        z = numpyro.sample("z", dist.Normal(a, s))
        numpyro.sample("x", dist.Normal(z * p[0], 1.0), obs=x)
    numpyro.deterministic("twice", 2 * a)


SHAPES = {"a": (), "s": (), "p": (2,), "z": (3,), "twice": ()}


def shapes(draws):
    return {name: value.shape for name, value in draws.items()}


def svi_of(guide, target=model, **kwargs):
    return SVI(target, guide, optax.adam(1e-2), Trace_ELBO(num_particles=4, **kwargs))


@pytest.fixture(scope="module")
def trained(small):
    guide = AutoFlow(model, small)
    return guide, svi_of(guide).run(KEY, 20, X, progress_bar=False)


def test_training_lowers_the_loss(trained):
    _, result = trained
    assert np.isfinite(result.losses).all() and result.losses[-5:].mean() < result.losses[:5].mean()


@pytest.mark.parametrize("sample_shape", [(), (3,), (3, 2)])
def test_sample_posterior_has_any_shape(trained, sample_shape):
    guide, result = trained
    draws = jax.jit(lambda p: guide.sample_posterior(KEY, p, sample_shape=sample_shape))(result.params)
    assert shapes(draws) == {name: (*sample_shape, *shape) for name, shape in SHAPES.items()}
    np.testing.assert_allclose(draws["twice"], 2 * draws["a"])


def test_the_guides_trace_has_the_density_of_log_prob(trained):
    guide, result = trained

    @jax.jit
    def run(params):
        trace = handlers.trace(handlers.seed(handlers.substitute(guide, params), 3)).get_trace(X)
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        total = sum(site["fn"].log_prob(site["value"]).sum() for site in sites.values())
        values = {name: site["value"] for name, site in sites.items() if not site["infer"].get("is_auxiliary")}
        return total, guide.log_prob(params, values), guide.log_prob(params, jax.tree.map(lambda v: v[None], values))

    total, log_prob, batched = run(result.params)
    np.testing.assert_allclose([log_prob, batched[0]], total, rtol=1e-8)


def test_predictive(trained):
    guide, result = trained
    prediction = Predictive(model, guide=guide, params=result.params, num_samples=4)(KEY)
    assert prediction["x"].shape == (4, 3)
    draws = Predictive(guide, params=result.params, num_samples=4)(KEY)
    assert shapes(draws) == {"_auto_latent": (4, 6)} | {k: (4, *s) for k, s in SHAPES.items() if k != "twice"}


def test_neutra_reparametrises_nuts(trained):
    guide, result = trained
    neutra = NeuTraReparam(guide, result.params)
    mcmc = MCMC(NUTS(neutra.reparam(model)), num_warmup=10, num_samples=10, progress_bar=False)
    mcmc.run(KEY, X)
    draws = mcmc.get_samples()
    assert draws["p"].shape == (10, 2)
    again = neutra.transform_sample(draws["auto_shared_latent"])
    np.testing.assert_allclose(again["z"], draws["z"], rtol=1e-6)


def test_pickling_before_and_after_training(trained):
    guide, result = trained
    again = pickle.loads(pickle.dumps(guide))
    draw = lambda g: g.sample_posterior(KEY, result.params, sample_shape=(2,))
    jax.tree.map(np.testing.assert_array_equal, draw(guide), draw(again))
    fresh = pickle.loads(pickle.dumps(AutoFlow(model, again._choice)))
    with pytest.raises(RuntimeError, match="the guide has not seen its model yet"):
        draw(fresh)
    from_arguments = fresh.sample_posterior(KEY, result.params, X, sample_shape=(2,))
    jax.tree.map(np.testing.assert_array_equal, draw(guide), from_arguments)


@pytest.mark.slow
def test_seeds_under_vmap_give_different_flows_and_leak_nothing(small):
    guide = AutoFlow(model, small)
    svi = svi_of(guide)
    keys = jax.random.split(KEY, 3)
    states = jax.jit(jax.vmap(lambda key: svi.init(key, X)))(keys)
    states, losses = jax.jit(jax.vmap(lambda s: svi.update(s, X)))(states)
    params = svi.get_params(states)
    weights = params["auto_flow$params"]["bijection"][0][1]["net"]["layers"][0]["weight"]
    assert losses.shape == (3,) and weights.shape[0] == 3
    assert not np.allclose(weights[0], weights[1]) and not np.allclose(weights[1], weights[2])
    # The guide serves outside of vmap too: with the parameters of one seed, and for another run.
    second = jax.tree.map(lambda a: a[1], params)
    assert guide.sample_posterior(KEY, second, sample_shape=(2,))["z"].shape == (2, 3)
    pickle.dumps(guide)
    many = jax.vmap(lambda key, p: guide.sample_posterior(key, p, sample_shape=(2,)))(keys, params)
    assert many["z"].shape == (3, 2, 3)
    assert np.isfinite(svi.run(KEY, 2, X, progress_bar=False).losses).all()


def test_training_under_jit_with_traced_data_leaks_nothing(small):
    guide = AutoFlow(model, small)
    svi = svi_of(guide)
    result = jax.jit(lambda key, x: svi.run(key, 3, x, progress_bar=False))(KEY, X)
    assert np.isfinite(result.losses).all()
    assert np.isfinite(guide.log_prob(result.params, guide.sample_posterior(KEY, result.params, X)))
    assert np.isfinite(jax.jit(svi.init)(jax.random.key(1), X).rng_key is not None)
    assert np.isfinite(svi.run(KEY, 2, X, progress_bar=False).losses).all()


def with_data(x):
    numpyro.deterministic("total", numpyro.sample("a", dist.Normal(0.0, 1.0)) + x)


def test_a_guide_that_met_its_model_under_jit_only(small):
    guide = AutoFlow(with_data, small)
    svi = svi_of(guide, with_data)
    state = jax.jit(svi.init)(KEY, X)
    params = svi.get_params(state)
    fresh = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="has not seen its model yet"):
        fresh.sample_posterior(KEY, params)
    with pytest.raises(RuntimeError, match="pass them to sample_posterior too"):
        guide.sample_posterior(KEY, params)
    for each in (guide, fresh):
        assert shapes(each.sample_posterior(KEY, params, X)) == {"a": (), "total": (3,)}


@pytest.mark.slow
def test_guides_in_a_list_with_different_prefixes(small):
    guide = AutoGuideList(model)
    guide.append(AutoFlow(handlers.block(model, hide=["p", "twice"]), small, prefix="rest"))
    guide.append(AutoFlow(handlers.block(model, expose=["p"]), "affine", prefix="share"))
    result = svi_of(guide).run(KEY, 3, X, progress_bar=False)
    assert set(result.params) == {"rest_flow$params", "share_flow$params"}
    draws = guide.sample_posterior(KEY, result.params, sample_shape=(4,))
    assert shapes(draws) == {name: (4, *shape) for name, shape in SHAPES.items() if name != "twice"}
    assert guide.quantiles(result.params, [0.1, 0.9])["p"].shape == (2, 2)
    assert guide.median(result.params)["z"].shape == (3,)


def test_particles_one_by_one_or_together(small):
    losses = []
    for vectorize in (True, False):
        svi = svi_of(AutoFlow(model, small, gradient="path"), vectorize_particles=vectorize)
        state = svi.init(KEY, X)
        losses.append(jax.jit(svi.evaluate)(state, X))
    np.testing.assert_allclose(*losses, rtol=1e-8)


def mixture(x, marked=True):
    w = numpyro.sample("w", dist.Beta(2.0, 3.0))
    with numpyro.plate("n", 6):
        infer = {"enumerate": "parallel"} if marked else {}
        k = numpyro.sample("k", dist.Bernoulli(w), infer=infer)
        numpyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x)


@pytest.mark.slow
def test_enumerated_sites_beside_the_flow(small):
    """The posterior of the one continuous latent by quadrature; the loss bounds the evidence."""
    x = jnp.array([-0.5, 0.2, 0.4, 2.5, 3.1, 1.4])
    w = (jnp.arange(2000) + 0.5) / 2000
    normal = lambda m: jnp.exp(dist.Normal(m, 1.0).log_prob(x))
    likelihood = jnp.prod((1 - w[:, None]) * normal(0.0) + w[:, None] * normal(3.0), axis=-1)
    joint = likelihood * jnp.exp(dist.Beta(2.0, 3.0).log_prob(w))
    evidence = joint.mean()

    guide = AutoFlow(mixture, small, gradient="path")
    svi = SVI(mixture, guide, optax.adam(1e-2), TraceEnum_ELBO(num_particles=16))
    params = guide.precondition(KEY, x)
    result = svi.run(KEY, 150, x, progress_bar=False, init_params=params)
    assert set(result.params) == {"auto_flow$params"}
    # The path gradient leaves the loss nearly exact: the KL divergence and noise of 50 x 16 draws stay below 0.02.
    assert abs(result.losses[-50:].mean() + jnp.log(evidence)) < 0.02
    draws = guide.sample_posterior(KEY, result.params, sample_shape=(4000,))
    assert set(draws) == {"w"}
    exact = (joint * w).mean() / evidence
    assert abs(draws["w"].mean() - exact) < 0.015  # 5 standard errors are 0.012


def test_unmarked_discrete_sites_are_refused(small):
    guide = AutoFlow(mixture, small)
    with pytest.raises(UnsupportedModelError, match=r"'k' is discrete.*enumerate.*TraceEnum_ELBO") as error:
        handlers.seed(guide, 0)(jnp.zeros(6), marked=False)
    assert isinstance(error.value, NotImplementedError)


def test_subsampled_local_latents_are_refused_again_and_again(small):
    def local(x):
        with numpyro.plate("n", 6, subsample_size=2):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[:2])

    guide = AutoFlow(local, small)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="latents inside a subsampled plate"):
            handlers.seed(guide, 0)(jnp.zeros(6))


def test_subsampled_data_are_welcome(small):
    def minibatches(x):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("n", 6, subsample_size=2) as i:
            numpyro.sample("x", dist.Normal(m, 1.0), obs=x[i])

    guide = AutoFlow(minibatches, small)
    assert np.isfinite(svi_of(guide, minibatches).run(KEY, 3, jnp.arange(6.0), progress_bar=False).losses).all()


def test_constructor_errors_name_the_argument():
    with pytest.raises(UnknownFlowError, match="no flow is called 'nfs': did you mean 'nsf'"):
        AutoFlow(model, "nfs")
    with pytest.raises(ValueError, match="gradient must be one of reparam, path, auto, got 'stl'"):
        AutoFlow(model, gradient="stl")
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="init_scale must be positive"):
            AutoFlow(model, init_scale=scale)


def test_asking_an_unseen_guide():
    guide = AutoFlow(model)
    for ask in (guide.get_posterior, guide.median, lambda p: guide.log_prob(p, {}), lambda p: guide.save("nowhere", p)):
        with pytest.raises(RuntimeError, match="the guide has not seen its model yet"):
            ask({})


def test_a_model_without_latents(small):
    with pytest.raises(RuntimeError, match="no latent variables"):
        handlers.seed(AutoFlow(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.0), small), 0)()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_latents_have_the_models_dtype(dtype, small):
    def typed():
        numpyro.sample("a", dist.Normal(jnp.zeros(2, dtype), jnp.ones((), dtype)).to_event(1))
        numpyro.sample("s", dist.HalfNormal(jnp.ones((), dtype)))

    start = init_to_value(values={"a": jnp.zeros(2, dtype), "s": jnp.ones((), dtype)})
    with jax.enable_x64(dtype == jnp.float64):
        guide = AutoFlow(typed, small, init_loc_fn=start)
        svi = svi_of(guide, typed)

        @jax.jit
        def run(key):
            params = svi.get_params(svi.init(key))
            draws = guide.sample_posterior(key, params, sample_shape=(2,))
            return params, draws, guide.log_prob(params, draws), guide.median(params)

        assert {leaf.dtype for leaf in jax.tree.leaves(run(jax.random.key(0)))} == {jnp.dtype(dtype)}


def test_float32_latents_in_a_float64_session(small):
    """With x64 on, a model that is float32 throughout stays so."""

    def typed():
        numpyro.sample("a", dist.Normal(jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32)).to_event(1))

    guide = AutoFlow(typed, small, init_loc_fn=init_to_value(values={"a": jnp.zeros(2, jnp.float32)}))
    draw = handlers.trace(handlers.seed(guide, 0)).get_trace()
    assert draw["a"]["value"].dtype == draw["_auto_latent"]["value"].dtype == jnp.float32


def test_a_ready_flow_keeps_its_own_affine_end():
    flow = flows.nsf(layers=1, hidden=(4,), bins=3)(6)
    guide = AutoFlow(model, flow)
    handlers.seed(guide, 0)(X)
    assert guide._flow == flow
