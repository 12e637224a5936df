"""FlowDistribution and FlowTransform are ordinary NumPyro citizens."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density

from flowppl import flows
from flowppl.errors import DimensionError
from flowppl.flows.flow import part_of
from flowppl.numpyro import FlowDistribution, FlowTransform

log_prob = jax.jit(lambda q, *value: q.log_prob(*value))
draw = jax.jit(lambda q, key, shape: q.sample_with_intermediates(key, shape), static_argnums=2)


@pytest.fixture(scope="module")
def flow(small):
    return small(dim=3)


@pytest.fixture(scope="module")
def variables(flow, scramble):
    return scramble(jax.jit(flow.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def q(flow, variables):
    return FlowDistribution(flow, variables)


@pytest.fixture(scope="module")
def conditional(small, scramble):
    flow = small(dim=2, context_dim=1)
    return flow, scramble(jax.jit(flow.init)(jax.random.key(1)))


def test_shapes_and_support(q):
    assert q.batch_shape == () and q.event_shape == (3,)
    assert q.support == constraints.real_vector
    assert q.has_rsample
    x, _ = draw(q, jax.random.key(0), (4, 5))
    assert x.shape == (4, 5, 3) and log_prob(q, x).shape == (4, 5)


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_drawing_with_intermediates_agrees_with_scoring_the_value(flow, variables, gradient):
    q = FlowDistribution(flow, variables, gradient=gradient)
    x, intermediates = draw(q, jax.random.key(3), (7,))
    np.testing.assert_allclose(x, jax.jit(lambda q: q.sample(jax.random.key(3), (7,)))(q), rtol=1e-12)
    np.testing.assert_allclose(log_prob(q, x, intermediates), log_prob(q, x), rtol=1e-10)


def test_it_equals_the_transformed_distribution_of_its_parts(flow, variables, q):
    t = FlowTransform(flow.bijection, part_of(variables, "bijection"))
    plain = dist.TransformedDistribution(dist.Normal(jnp.zeros(3)).to_event(1), t)
    x, _ = draw(plain, jax.random.key(0), (6,))
    np.testing.assert_allclose(log_prob(plain, x), log_prob(q, x), rtol=1e-10)
    y, intermediates = draw(plain, jax.random.key(0), (6,))
    np.testing.assert_allclose(log_prob(plain, y, intermediates), log_prob(q, y), rtol=1e-10)


def test_transform_inverse_and_log_det(flow, variables):
    @jax.jit
    def everything(t, x):
        y = t(x)
        log_dets = t.log_abs_det_jacobian(x, y), t.inv.log_abs_det_jacobian(y, x)
        return t.inv(y), log_dets, jnp.linalg.slogdet(jax.jacfwd(t)(x))[1]

    t = FlowTransform(flow.bijection, part_of(variables, "bijection"))
    x = jax.random.normal(jax.random.key(1), (3,))
    back, (forward, backward), expected = everything(t, x)
    np.testing.assert_allclose(back, x, atol=1e-10)
    np.testing.assert_allclose([forward, -backward], [expected, expected], rtol=1e-10)
    assert t.forward_shape((5, 3)) == t.inverse_shape((5, 3)) == (5, 3)


def test_transform_equality_and_pytree(flow, variables, small):
    t = FlowTransform(flow.bijection, part_of(variables, "bijection"))
    leaves, treedef = jax.tree.flatten(t)
    assert len(leaves) == len(jax.tree.leaves(variables))
    again = jax.tree.unflatten(treedef, leaves)
    assert t == again and t.eq(again)
    copied, moved = (jax.tree.map(lambda a, by=by: a + by, t) for by in (0, 1))
    assert t.eq(copied) and t != copied  # NumPyro's == compares arrays by identity
    assert not t.eq(moved) and t != moved
    other = small(dim=4)
    assert not t.eq(FlowTransform(other.bijection, part_of(variables, "bijection")))
    assert t != dist.transforms.ExpTransform()


def test_it_is_a_pytree_argument_of_jit_grad_and_vmap(flow, q):
    x = jnp.ones((2, 3))
    score = lambda q, x: q.log_prob(x).sum()
    gradient = jax.jit(jax.grad(score))(q, x)
    assert isinstance(gradient, FlowDistribution)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    stacked = jax.jit(jax.vmap(flow.init))(jax.random.split(jax.random.key(0), 4))
    many = jax.vmap(lambda v: FlowDistribution(flow, v))(stacked)
    values = jax.jit(jax.vmap(lambda q: q.log_prob(x)))(many)
    assert values.shape == (4, 2)
    first = FlowDistribution(flow, jax.tree.map(lambda a: a[0], stacked))
    np.testing.assert_allclose(values[0], log_prob(first, x), rtol=1e-10)


def test_expand_to_event_and_mask(q):
    expanded = q.expand([4, 2])
    assert expanded.batch_shape == (4, 2) and q.expand_by((5,)).batch_shape == (5,)
    x, intermediates = draw(expanded, jax.random.key(0), (3,))
    assert x.shape == (3, 4, 2, 3)
    np.testing.assert_allclose(log_prob(expanded, x, intermediates), log_prob(q, x), rtol=1e-10)
    event = expanded.to_event(1)
    assert event.batch_shape == (4,) and event.event_shape == (2, 3)
    np.testing.assert_allclose(log_prob(event, x), log_prob(q, x).sum(-1), rtol=1e-10)
    masked = expanded.mask(jnp.array([True, False]))
    np.testing.assert_allclose(log_prob(masked, x), log_prob(q, x) * jnp.array([1, 0]), rtol=1e-10)


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_context_batches_expand_between_their_axes(conditional, gradient):
    flow, variables = conditional
    context = jnp.linspace(-1, 1, 3)[:, None, None]  # batch (3, 1)
    q = FlowDistribution(flow, variables, context, gradient=gradient)
    assert q.batch_shape == (3, 1)
    x, intermediates = draw(q.expand([3, 4]), jax.random.key(0), (2,))
    assert x.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(log_prob(q.expand([3, 4]), x, intermediates), log_prob(q, x), rtol=1e-10)
    np.testing.assert_allclose(log_prob(q, x)[:, 1], log_prob(FlowDistribution(flow, variables, context[1]), x[:, 1]))


def test_gradients_reach_the_context(conditional):
    flow, variables = conditional
    x = jnp.array([0.3, -0.2])
    of_density = jax.jit(jax.grad(lambda c: FlowDistribution(flow, variables, c).log_prob(x)))(jnp.array([0.5]))
    total = lambda c: FlowDistribution(flow, variables, c).sample(jax.random.key(0)).sum()
    of_draw = jax.jit(jax.grad(total))(jnp.array([0.5]))
    assert np.abs(of_density).min() > 1e-4 and np.abs(of_draw).min() > 1e-4


def test_a_flow_without_context_refuses_one(flow, variables):
    with pytest.raises(DimensionError, match="expected none, since the flow takes none, got shape"):
        FlowDistribution(flow, variables, jnp.ones((5, 2)))


def test_student_t_base_has_its_tails():
    flow = flows.realnvp(layers=1, hidden=(4,), base=flows.StudentT(df=3.0))(dim=2)
    q = FlowDistribution(flow, jax.jit(flow.init)(jax.random.key(0)))  # the identity
    x = jnp.array([[0.5, -100.0], [20.0, 3.0]])
    np.testing.assert_allclose(log_prob(q, x), dist.StudentT(3.0).log_prob(x).sum(-1), rtol=1e-10)
    draws, intermediates = draw(q, jax.random.key(0), (5,))
    np.testing.assert_allclose(log_prob(q, draws, intermediates), log_prob(q, draws), rtol=1e-10)


def test_unknown_gradient(flow, variables):
    with pytest.raises(ValueError, match="gradient must be one of reparam, path, auto, got 'plain'"):
        FlowDistribution(flow, variables, gradient="plain")


def test_wrong_event_shape_is_an_error(q):
    with pytest.raises(ValueError, match=r"expected shape \(\*batch, 3\)"):
        q.log_prob(jnp.zeros(4))


def test_prior_in_a_plate_under_nuts_and_as_likelihood(q):
    def model(x=None):
        with numpyro.plate("n", 2):
            z = numpyro.sample("z", q)
            numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = jnp.ones((2, 3))
    mcmc = MCMC(NUTS(model), num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), x)
    assert mcmc.get_samples()["z"].shape == (20, 2, 3)
    z = jnp.zeros((2, 3))
    expected = log_prob(q, z).sum() + dist.Normal(z, 0.5).log_prob(x).sum()
    np.testing.assert_allclose(log_density(model, (x,), {}, {"z": z})[0], expected, rtol=1e-10)

    def likelihood(x=None):
        with numpyro.plate("n", 2):
            numpyro.sample("x", q, obs=x)

    np.testing.assert_allclose(log_density(likelihood, (z,), {}, {})[0], log_prob(q, z).sum(), rtol=1e-10)
    assert Predictive(likelihood, num_samples=4)(jax.random.key(0))["x"].shape == (4, 2, 3)


def test_plates_inside_vmapped_particles(flow, variables):
    def model():
        with numpyro.plate("n", 2):
            return numpyro.sample("z", FlowDistribution(flow, variables, gradient="path"))

    keys = jax.random.split(jax.random.key(0), 5)
    draws = jax.jit(jax.vmap(lambda key: handlers.seed(model, key)()))(keys)
    assert draws.shape == (5, 2, 3) and len(np.unique(draws[..., 0])) == 10


def test_float32_arrays_give_float32_draws(flow, variables):
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    q = FlowDistribution(flow, narrow)
    x, intermediates = draw(q, jax.random.key(0), (2,))
    assert x.dtype == log_prob(q, x, intermediates).dtype == log_prob(q, x).dtype == jnp.float32
    assert q.base_dist.sample(jax.random.key(0)).dtype == jnp.float32


def test_a_mixture_of_flows_is_numpyros_own(small):
    """One conditional flow, its contexts one-hot vectors: a batch of flows, which MixtureSameFamily mixes."""
    flow = small(dim=2, context_dim=3)
    weights = jnp.array([0.2, 0.5, 0.3])
    components = FlowDistribution(flow, flow.init(jax.random.key(0)), jnp.eye(3))
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), components)
    x = mixture.sample(jax.random.key(1), (5,))
    expected = jax.nn.logsumexp(jnp.log(weights) + components.log_prob(x[:, None]), axis=-1)
    assert x.shape == (5, 2)
    np.testing.assert_allclose(mixture.log_prob(x), expected, rtol=1e-9)
