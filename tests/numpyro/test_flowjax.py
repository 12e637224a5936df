"""Flows of flowjax as ours: the same densities, draws and gradients, in every place that takes a flow."""

import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.reparam import NeuTraReparam
from numpyro.infer.util import log_density

from flowppl.errors import DimensionError, FlowFileError, MissingExtraError, UnsupportedFlowError
from flowppl.flows import files
from flowppl.flows.flow import part_of
from flowppl.numpyro import AutoFlow, FlowDistribution, FlowTransform, flow_module, from_flowjax, save_flow

pytest.importorskip("flowjax")

import equinox
import paramax
from flowjax import flows as of_flowjax
from flowjax.bijections import Affine, Coupling, RationalQuadraticSpline
from flowjax.distributions import LogNormal, Normal, StandardNormal, StudentT, Transformed

SMALL = {"nn_width": 4, "flow_layers": 2}
BASE = StandardNormal((3,))


def coupling(context=None):
    return of_flowjax.coupling_flow(jax.random.key(0), base_dist=BASE, cond_dim=context, **SMALL)


def layer(context=None, base=BASE, **options):
    """One layer, which compiles in less time."""
    options = {"transformer": Affine(), "untransformed_dim": 1, "nn_width": 4, "nn_depth": 1, **options}
    return Transformed(base, Coupling(jax.random.key(0), dim=3, cond_dim=context, **options))


def spline(context=None):
    """Over a base with arrays of its own."""
    transformer = RationalQuadraticSpline(knots=3, interval=4)
    return layer(context, Normal(jnp.zeros(3), jnp.ones(3)), transformer=transformer)


@pytest.fixture(scope="module", params=[(coupling, None), (coupling, 2), (spline, 2)])
def case(request):
    """flowjax's distribution and ours of it, with arrays off the start in both, points and a context."""
    make, context = request.param
    distribution = make(context)
    rng = np.random.default_rng(0)
    move = lambda a: a + 0.2 * rng.standard_normal(a.shape) if equinox.is_inexact_array(a) else a
    moved = jax.tree.map(move, distribution)
    variables = from_flowjax(moved).init(jax.random.key(0))  # another's arrays: names and structure are the same
    x, z = rng.standard_normal((2, 5, 3))
    c = None if context is None else rng.standard_normal((5, context))
    return moved, from_flowjax(distribution), variables, jnp.asarray(x), jnp.asarray(z), c


def test_values_and_gradients_are_those_of_flowjax(case):
    """Log densities, draws and their gradients in arrays and contexts, under jit."""
    distribution, flow, variables, x, z, c = case
    assert (flow.dim, flow.context_dim) == (3, 0 if c is None else 2)
    c = jnp.zeros((5, 2)) if c is None else jnp.asarray(c)
    given = c if flow.context_dim else None
    frozen = lambda node: isinstance(node, paramax.NonTrainable)
    arrays, static = equinox.partition(distribution, equinox.is_inexact_array, is_leaf=frozen)

    def ours(params, c):
        context = c if flow.context_dim else None
        v = {**variables, "params": params}
        log_prob, draws = flow.log_prob(v, x, context), flow.push(v, z, context).x
        return jnp.sum(log_prob * jnp.arange(5)) + jnp.sum(jnp.sin(draws)), (log_prob, draws)

    def theirs(arrays, c):
        d = paramax.unwrap(equinox.combine(arrays, static)).merge_transforms()
        context = c if flow.context_dim else None
        log_prob = d.log_prob(x, context)
        push = jax.vmap(d.bijection.transform, (0, None if context is None else 0))
        draws = push(z, context)
        return jnp.sum(log_prob * jnp.arange(5)) + jnp.sum(jnp.sin(draws)), (log_prob, draws)

    both = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(a, c)
        for f, a in ((ours, variables["params"]), (theirs, arrays))
    ]
    mine, reference = map(jax.tree.leaves, both)
    by_size = lambda leaves: sorted((np.asarray(a) for a in leaves), key=lambda a: (a.shape, float(a.sum())))
    for a, b in zip(by_size(mine), by_size(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
    assert given is None or np.abs(both[0][1][1]).max() > 1e-2


def test_scores_are_gradients_of_the_log_density(case):
    _, flow, variables, _, z, c = case
    c = None if c is None else jnp.asarray(c)

    @jax.jit
    def both(variables, z, c):
        draw = flow.push(variables, z, c, with_score=True)
        log_prob = lambda x, c: flow.log_prob(variables, x, c)
        value, pull = jax.vjp(log_prob, draw.x, c)
        return draw[1:], (value, *pull(jnp.ones(5)))

    for a, b in zip(*both(variables, z, c), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_init_has_the_arrays_as_they_are():
    distribution = coupling()
    flow = from_flowjax(distribution)
    assert flow == from_flowjax(distribution) and hash(flow) == hash(from_flowjax(distribution))
    assert flow != from_flowjax(coupling())
    variables = flow.init(jax.random.key(0))
    leaves = jax.tree.leaves(equinox.filter(distribution, equinox.is_inexact_array))
    assert {id(a) for a in variables["params"]["bijection"].values()} == {id(a) for a in leaves}
    assert all("." not in name for kind in variables.values() for name in kind["bijection"])
    assert {a.dtype.kind for a in variables["const"]["bijection"].values()} == {"i"}  # permutations


def test_what_does_not_train_is_constant():
    base = paramax.non_trainable(Normal(jnp.ones(2)))
    flow = from_flowjax(Transformed(base, Affine(jnp.ones(2), 2 * jnp.ones(2))))
    variables = flow.init(jax.random.key(0))
    assert {k: len(v["bijection"]) for k, v in variables.items()} == {"params": 2, "const": 2}
    # x = 1 + 2 (1 + z)
    np.testing.assert_allclose(flow.log_prob(variables, jnp.full(2, 3.0)), -np.log(2 * np.pi) - 2 * np.log(2))


def test_contexts_broadcast():
    flow = from_flowjax(coupling(2))
    variables = flow.init(jax.random.key(0))
    q = FlowDistribution(flow, variables, jnp.ones((4, 2)))
    shape = jax.eval_shape(lambda: q.sample(jax.random.key(0), (5,))).shape
    assert q.batch_shape == (4,) and shape == (5, 4, 3)
    assert jax.eval_shape(q.log_prob, jnp.ones((5, 4, 3))).shape == (5, 4)
    assert jax.eval_shape(q.log_prob, jnp.ones(3)).shape == (4,)
    with pytest.raises(DimensionError, match="context"):
        FlowDistribution(flow, variables, jnp.ones((4, 3)))


# In NumPyro


def model():
    loc = numpyro.sample("loc", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=jnp.array([2.0, -1.0]))


def test_guide():
    guide = AutoFlow(model, flow=from_flowjax(layer()), gradient="path")
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=16))
    result = svi.run(jax.random.key(0), 60, progress_bar=False)
    assert result.losses[-10:].sum() < result.losses[:10].sum() - 5.0
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(7,))
    assert draws["scale"].shape == (7,)
    neutra = NeuTraReparam(guide, result.params).reparam(model)
    latent = {"auto_shared_latent": jnp.ones(3)}
    assert np.isfinite(log_density(handlers.seed(neutra, 0), (), {}, latent)[0])


def test_encoder_learns():
    """Gradients reach what computes the condition."""
    flow = from_flowjax(layer(2))
    observed = jnp.linspace(-1.0, 1.0, 6)

    def model():
        with numpyro.plate("rows", 6):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=observed)

    def guide():
        weight = numpyro.param("weight", jnp.array([1.0, -0.5]))
        with numpyro.plate("rows", 6):
            numpyro.sample("z", flow_module("q", flow, observed[:, None] * weight, gradient="path"))

    svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))
    grads = jax.jit(jax.grad(lambda p: Trace_ELBO().loss(jax.random.key(1), p, model, guide)))(params)
    assert np.abs(grads["weight"]).max() > 1e-3


def test_path_gradients_vanish_at_the_posterior():
    flow = from_flowjax(layer())
    target = FlowDistribution(flow, flow.init(jax.random.key(0)))
    model = lambda: numpyro.sample("z", target)
    largest = {}
    for gradient in ("reparam", "path"):
        guide = lambda gradient=gradient: numpyro.sample("z", flow_module("q", flow, gradient=gradient))
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
        params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        loss = lambda p, guide=guide: Trace_ELBO(num_particles=4).loss(jax.random.key(1), p, model, guide)
        grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params)["q$params"])
        largest[gradient] = max(np.abs(g).max() for g in grads)
    assert largest["path"] < 1e-10 and largest["reparam"] > 1e-2


def test_prior():
    """A trained flow as a prior: sampled by NUTS, approximated by a guide of NumPyro's."""
    flow = from_flowjax(layer())
    variables = flow.init(jax.random.key(0))

    def model():
        x = numpyro.sample("x", FlowDistribution(flow, variables))
        numpyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=1.0)

    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_warmup=3, num_samples=3, progress_bar=False)
    mcmc.run(jax.random.key(0))
    assert mcmc.get_samples()["x"].shape == (3, 3)
    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.02), Trace_ELBO())
    assert np.isfinite(svi.run(jax.random.key(0), 3, progress_bar=False).losses).all()


def test_transform_crosses_jit():
    """The distribution is static to jax, and compared by identity."""
    distribution, count = layer(), []
    variables = from_flowjax(distribution).init(jax.random.key(0))

    @jax.jit
    def call(transform, x):
        count.append(1)
        return transform(x)

    for _ in range(2):
        call(FlowTransform(from_flowjax(distribution).bijection, part_of(variables, "bijection")), jnp.zeros((5, 3)))
    assert len(count) == 1


# What cannot be


def test_no_file_holds_one(tmp_path):
    flow = from_flowjax(layer())
    variables = flow.init(jax.random.key(0))
    with pytest.raises(FlowFileError, match=r"a flow from flowjax cannot be written.*equinox"):
        save_flow(tmp_path / "q.flow", flow, variables)
    assert not list(tmp_path.iterdir())


def test_no_file_names_one(monkeypatch, tmp_path):
    flow = from_flowjax(layer())
    monkeypatch.setattr(files, "describe", lambda flow: {"type": "FlowjaxBijection", "distribution": 1, "dim": 1})
    files.write(tmp_path / "q.flow", flow, flow.init(jax.random.key(0)), {})
    with pytest.raises(FlowFileError, match="FlowjaxBijection, which no flow file holds"):
        files.read(tmp_path / "q.flow")


def test_arrays_can_be_saved_as_the_error_says(tmp_path):
    params = from_flowjax(layer()).init(jax.random.key(0))
    equinox.tree_serialise_leaves(tmp_path / "q.eqx", params)
    again = equinox.tree_deserialise_leaves(tmp_path / "q.eqx", params)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
    assert pickle.loads(pickle.dumps(params)).keys() == params.keys()


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"expected a flowjax\.distributions\.Transformed.* got StandardNormal"):
        from_flowjax(BASE)
    with pytest.raises(UnsupportedFlowError, match="got a _StandardStudentT"):
        from_flowjax(Transformed(StudentT(jnp.ones(2)), Affine(jnp.ones(2))))
    with pytest.raises(UnsupportedFlowError, match=r"expected vectors.* shape \(\)"):
        from_flowjax(LogNormal())


def test_a_missing_flowjax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flowjax.distributions", None)
    with pytest.raises(MissingExtraError, match=r"flowppl\[flowjax\]"):
        from_flowjax(None)
