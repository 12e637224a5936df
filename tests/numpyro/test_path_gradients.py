"""Path gradients through NumPyro's own losses: unbiased, of no variance at the posterior, and biased where documented."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from scipy.stats import chi2

from flowppl import flows
from flowppl.flows.affine_end import place
from flowppl.numpyro import AutoFlow, FlowDistribution, flow_module

pytestmark = pytest.mark.filterwarnings("ignore:Failed to verify mean field")

SMALL = flows.realnvp(layers=1, hidden=(4,), linear=False)
SPLINE = flows.nsf(layers=1, hidden=(4,), bins=3, linear=False)
NUM_KEYS = 2000


def params_of(guide, scramble, scale=0.3):
    @jax.jit
    def init():
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
        return {k: site["value"] for k, site in trace.items() if site["type"] == "param"}

    return scramble(init(), scale)


def gradients(elbo, model, guide, params, num_keys=NUM_KEYS, seed=1):
    """One flat gradient for each key."""
    keys = jax.random.split(jax.random.key(seed), num_keys)
    flat, unravel = ravel_pytree(params)
    one = jax.grad(lambda flat, key: elbo.loss(key, unravel(flat), model, guide))
    return np.asarray(jax.jit(jax.vmap(one, (None, 0)))(flat, keys))


def hierarchy(gradient, learn_context=False):
    """A parent, three children in a plate conditional on it, and grandchildren as one event, conditional on the children."""

    def guide():
        a = numpyro.sample("a", flow_module("qa", "affine", dim=2, gradient=gradient))
        with numpyro.plate("rows", 3):
            shift = jnp.array([-0.5, 0.0, 0.5])
            shift = numpyro.param("shift", shift) if learn_context else shift
            context = jnp.stack([a.sum() + shift, a.prod() - shift], -1)
            b = numpyro.sample("b", flow_module("qb", SMALL, context, dim=2, gradient=gradient))
        numpyro.sample("c", flow_module("qc", SMALL, b, dim=2, gradient=gradient).to_event(1))
        with numpyro.plate("copies", 2):
            numpyro.sample("d", flow_module("qd", SMALL, a, dim=2, gradient=gradient))

    return guide


def target():
    a = numpyro.sample("a", dist.StudentT(5.0, jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("rows", 3):
        b = numpyro.sample("b", dist.Normal(a, 1.0).to_event(1))
    numpyro.sample("c", dist.Normal(jnp.sin(b), 0.7).to_event(2))
    with numpyro.plate("copies", 2):
        numpyro.sample("d", dist.Normal(a**2, 0.9).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO()], ids=lambda e: type(e).__name__
)
def test_the_mean_gradient_is_that_of_reparametrisation(elbo, scramble):
    """Hotelling's statistic of the paired differences against a chi-square: false alarms in 1e-3 of seeds, for each loss.

    A variance floor keeps directions without noise from deciding; it makes the test conservative.
    """
    params = params_of(hierarchy("path", learn_context=True), scramble)
    path, reparam = (gradients(elbo, target, hierarchy(g, True), params) for g in ("path", "reparam"))
    difference = path - reparam
    assert np.abs(difference).max() > 1e-2  # they are different estimators
    covariance = np.cov(difference.T)
    floor = 1e-8 * np.diagonal(covariance).max() * np.eye(len(covariance))
    mean = difference.mean(0)
    statistic = NUM_KEYS * mean @ np.linalg.solve(covariance + floor, mean)
    assert statistic < chi2.ppf(1 - 1e-3, len(mean))


def test_values_agree_draw_by_draw(scramble):
    params = params_of(hierarchy("path"), scramble)
    elbo = Trace_ELBO(num_particles=5)
    loss = lambda gradient: jax.jit(lambda p: elbo.loss(jax.random.key(3), p, target, hierarchy(gradient)))(params)
    np.testing.assert_allclose(loss("path"), loss("reparam"), rtol=1e-10)


def planted(guide_of, params):
    """A model whose posterior is the guide: its own flows, at parameters of its own."""
    own = handlers.substitute(guide_of("reparam"), params)
    return handlers.block(own, hide_fn=lambda site: site["type"] == "param")  # or the loss would train them too


def check_no_variance(model, guide_of, params, *elbos):
    for elbo in (*elbos, Trace_ELBO()):
        assert np.abs(gradients(elbo, model, guide_of("path"), params, num_keys=20)).max() < 1e-8
    assert np.abs(gradients(elbo, model, guide_of("reparam"), params, num_keys=20)).max() > 1e-2


@pytest.mark.parametrize(
    "recipe", [SPLINE, flows.realnvp(layers=2, hidden=(4,)), flows.planar(layers=2)], ids=lambda r: r.name
)
def test_no_variance_where_the_posterior_is_the_flow(recipe, scramble):
    guide_of = lambda gradient: lambda: numpyro.sample("z", flow_module("q", recipe, dim=2, gradient=gradient))
    params = params_of(guide_of("path"), scramble)
    check_no_variance(planted(guide_of, params), guide_of, params)


def test_no_variance_at_an_exact_gaussian_posterior():
    """The model is conjugate; the affine guide stands at its posterior."""
    precision = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, -0.4], [0.0, -0.4, 3.0]])
    y = np.array([0.5, -1.0, 2.0])
    covariance = np.linalg.inv(precision + np.eye(3) / 0.25)
    mean = covariance @ y / 0.25

    def model():
        z = numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(3), precision_matrix=jnp.asarray(precision)))
        numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=jnp.asarray(y))

    def guide_of(gradient):
        guide = AutoFlow(model, "affine", gradient=gradient)
        handlers.seed(guide, 0)()
        return guide

    guide = guide_of("path")
    variables = guide._flow.init(jax.random.key(0))
    placed = place(guide._flow, variables, jnp.asarray(mean), jnp.asarray(np.linalg.cholesky(covariance)))
    check_no_variance(model, guide_of, {"auto_flow$params": placed["params"]})


@pytest.mark.slow
def test_no_variance_through_contexts_plates_events_and_expansion(scramble):
    """Needs the score of the context: a parent moves the density of its children."""
    params = params_of(hierarchy("path"), scramble)
    check_no_variance(planted(hierarchy, params), hierarchy, params, TraceGraph_ELBO())


def conditional(gradient, transform):
    def guide():
        a = numpyro.sample("a", flow_module("qa", "affine", dim=1, gradient=gradient))
        q = flow_module("qb", SMALL, a[..., None, :], dim=2, gradient=gradient)  # of batch (1,)
        numpyro.sample("b", transform(q).to_event(1))

    return guide


def test_no_variance_under_explicit_expansion(scramble):
    guide_of = lambda gradient: conditional(gradient, lambda q: q.expand([4]))
    params = params_of(guide_of("path"), scramble)
    check_no_variance(planted(guide_of, params), guide_of, params)


@pytest.mark.slow
def test_under_a_mask_the_gradient_is_the_total_one(scramble):
    """NumPyro's masks drop what was drawn beside the value: no path gradient, and nothing wrong."""
    guide_of = lambda gradient: conditional(gradient, lambda q: q.expand([3]).mask(jnp.array([True, True, False])))
    params = params_of(guide_of("path"), scramble)
    model = planted(guide_of, scramble(params))
    freeze_parent = lambda flat: flat[:, 2:]  # the parent is not masked
    path, reparam = (gradients(Trace_ELBO(), model, guide_of(g), params, num_keys=5) for g in ("path", "reparam"))
    np.testing.assert_allclose(freeze_parent(path), freeze_parent(reparam), rtol=1e-8, atol=1e-12)


def test_without_intermediates_the_gradient_is_the_total_one(scramble):
    """A replayed value was not drawn by this distribution: scoring it differentiates the density itself."""
    flow = SMALL(2)
    variables = scramble(jax.jit(flow.init)(jax.random.key(0)))
    score = jax.jit(
        jax.grad(lambda v, g: FlowDistribution(flow, v, gradient=g).log_prob(jnp.ones(2))), static_argnums=1
    )
    jax.tree.map(np.testing.assert_allclose, score(variables, "path"), score(variables, "reparam"))


@pytest.mark.slow
def test_renyi_is_biased_with_path_and_right_with_reparam(scramble):
    """Documented: RenyiELBO weighs draws by the density ratio, and is no linear function of log q."""
    model = lambda: numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
    guide_of = lambda gradient: lambda: numpyro.sample("z", flow_module("q", "affine", dim=1, gradient=gradient))
    affine = {"lu": jnp.array([[-0.5]]), "bias": jnp.array([0.8])}
    params = {"q$params": {"base": {}, "bijection": affine}}
    elbo = RenyiELBO(alpha=0.0, num_particles=8)
    path, reparam = (gradients(elbo, model, guide_of(g), params, num_keys=4000) for g in ("path", "reparam"))
    keys = jax.random.split(jax.random.key(1), 4000)
    flat, unravel = ravel_pytree(params)
    mean = jax.jit(lambda f: jax.vmap(lambda k: elbo.loss(k, unravel(f), model, guide_of("reparam")))(keys).mean())
    numeric = [(mean(flat + step) - mean(flat - step)) / 2e-5 for step in 1e-5 * jnp.eye(2)]
    np.testing.assert_allclose(reparam.mean(0), numeric, rtol=1e-6)
    difference = path - reparam
    error = difference.std(0) / np.sqrt(len(difference))
    assert (np.abs(difference.mean(0)) > 10 * error).any()
