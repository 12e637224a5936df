"""Objectives of NumPyro's SVI: right in the mean against quadrature, of no variance at the posterior, for any guide."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform
from numpyro.infer import SVI, RenyiELBO
from numpyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value
from scipy.stats import f

from flowppl.bijections import Affine, Coupling, Planar
from flowppl.errors import UnsupportedModelError
from flowppl.flows import Flow
from flowppl.flows.affine_end import place
from flowppl.numpyro import AutoFlow, Objective, PathELBO, flow_module, objective
from flowppl.numpyro.objective import coefficient
from flowppl.numpyro.particles import Particles
from flowppl.objectives import programs
from flowppl.objectives.control import Control

pytestmark = pytest.mark.slow  # compilation; the example in the docstring runs where the front is alone

FLOW, CONDITIONAL = (Flow(Coupling(2, Affine(), context_dim, (4,))) for context_dim in (0, 2))  # quick to compile


def smooth(log_w):
    """A user's objective, in which particles have different parts."""
    return jnp.tanh(log_w).mean(0) + 0.3 * jax.nn.sigmoid(log_w[0])


PROGRAMS = {
    "elbo": "elbo",
    "iwae": "iwae",
    "renyi": programs.renyi(0.4),
    "renyi -1": programs.renyi(-1.0),
    "jensen_shannon": "jensen_shannon",
    "user": smooth,
}
BIASED = {name: name for name in ("cubo", "vis", "rws", "tail_adaptive")}


def chosen(shares, names=(*PROGRAMS,)):
    """The sum of programs with these shares, as an array: all of them need one compilation."""
    each = [programs.get({**PROGRAMS, **BIASED}[name]) for name in names]
    return programs.mixture(list(zip(shares, each, strict=True)))


def for_every_program(f, num_keys, seed=1, names=(*PROGRAMS,)):
    """What f(program, key) gives, arrays `(programs, keys, ...)`."""
    both = jax.vmap(jax.vmap(lambda shares, key: f(chosen(shares, names), key), (None, 0)), (0, None))
    return jax.jit(both)(jnp.eye(len(names)), jax.random.split(jax.random.key(seed), num_keys))


def value_and_gradient(loss, model, guide, params, key, *args):
    """One estimate of the loss, and its gradient."""
    return jax.value_and_grad(lambda params: loss.loss(key, params, model, guide, *args))(params)


def gradient(*args):
    return value_and_gradient(*args)[1]


def flat(tree):
    return ravel_pytree(tree)[0]


def pair(program, model, guide, params, key, *args, k=3):
    """Values with path and plain gradients, and the same draws."""
    losses = (Objective(program, k, gradient=kind) for kind in ("path", "reparam"))
    return tuple(value_and_gradient(loss, model, guide, params, key, *args) for loss in losses)


def params_of(guide, *args):
    found = handlers.trace(handlers.seed(guide, 0)).get_trace(*args)
    return {name: site["value"] for name, site in found.items() if site["type"] == "param"}


def moved_params(guide, scramble, *args):
    """Parameters of a guide of flows, off the identity."""
    return scramble(jax.tree.map(lambda a: jnp.zeros(a.shape), jax.eval_shape(lambda: params_of(guide, *args))))


def assert_mean_zero(draws, k=4):
    """Hotelling's test on a few directions, with a floor against rounding: one false alarm in a thousand."""
    n, dim = draws.shape
    if dim > k:
        draws = draws @ np.random.default_rng(1).standard_normal((dim, k))
    k = min(dim, k)
    mean, covariance = draws.mean(0), np.cov(draws.T).reshape(k, k) + 1e-12 * np.eye(k)
    assert n * mean @ np.linalg.solve(covariance, mean) * (n - k) / (k * (n - 1)) < f.isf(1e-3, k, n - k)


# In the mean


def log_joint(x):
    return dist.StudentT(5.0, 0.3, 1.0).log_prob(x) + dist.Normal(x, 0.8).log_prob(1.2)


def replicas_model(n):
    with numpyro.plate("replicas", n):
        x = numpyro.sample("x", dist.StudentT(5.0, 0.3, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.8), obs=jnp.full(n, 1.2))


def replicas_guide(n):
    loc, scale = numpyro.param("loc", jnp.array(0.4)), numpyro.param("scale", jnp.array(0.9))
    with numpyro.plate("replicas", n):
        numpyro.sample("x", dist.Normal(loc, scale))


def by_quadrature(program, params):
    """The exact gradient of minus the objective of two particles."""
    z = jnp.linspace(-8, 8, 301)
    weight = jnp.exp(dist.Normal(0.0, 1.0).log_prob(z)) * (z[1] - z[0])

    def loss(params):
        x = params["loc"] + params["scale"] * z
        log_w = log_joint(x) - dist.Normal(params["loc"], params["scale"]).log_prob(x)
        pairs = jnp.stack([jnp.broadcast_to(a, (len(z), len(z))) for a in (log_w[:, None], log_w)])
        return -jnp.sum(program.value(pairs) * weight * weight[:, None])

    return jax.grad(loss)(params)


def test_gradient_is_that_of_quadrature():
    n, params = 400, {"loc": jnp.array(0.4), "scale": jnp.array(0.9)}
    draws = for_every_program(lambda p, key: pair(p, replicas_model, replicas_guide, params, key, n, k=2), 40)
    exact = for_every_program(lambda p, key: by_quadrature(p, params), 1)
    for program in range(len(PROGRAMS)):
        for _, kind in draws:
            found, expected = (np.stack([g["loc"][program], g["scale"][program]], -1) for g in (kind, exact))
            assert_mean_zero(found / n - expected)


def hierarchy_model(n):
    shift = numpyro.param("shift", jnp.array(0.3))
    with numpyro.plate("replicas", n):
        a = numpyro.sample("a", dist.StudentT(5.0, shift * jnp.ones(2), 1.0).to_event(1))
        b = numpyro.sample("b", dist.Normal(jnp.sin(a), 0.8).to_event(1))
        numpyro.sample("y", dist.Normal(a.sum(-1) + b.prod(-1), 0.7), obs=jnp.ones(n))


def flow_guide(n):
    with numpyro.plate("replicas", n):
        a = numpyro.sample("a", flow_module("qa", FLOW))
        context = jnp.stack([a.sum(-1) + numpyro.param("c", jnp.array(0.1)), a.prod(-1)], -1)
        numpyro.sample("b", flow_module("qb", CONDITIONAL, context))


def test_mean_of_a_hierarchy_of_flows(scramble):
    """Path and plain gradients have one mean in all parameters of the guide; the model's, and the values, are the same."""
    n = 30
    params = {**moved_params(flow_guide, scramble, n), "shift": jnp.array(0.3)}
    draw = lambda p, key: pair(p, hierarchy_model, flow_guide, params, key, n)
    (values, path), (plain_values, plain) = for_every_program(draw, 30)
    np.testing.assert_allclose(values, plain_values, rtol=1e-12)
    np.testing.assert_allclose(path.pop("shift"), plain.pop("shift"), rtol=1e-9)
    path, plain = (np.concatenate([a.reshape(*a.shape[:2], -1) for a in jax.tree.leaves(g)], -1) for g in (path, plain))
    for difference in (path - plain) / n:
        assert np.abs(difference).max() > 1e-3
        assert_mean_zero(difference)


def small_model():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    s = numpyro.sample("s", dist.LogNormal(0.2, 0.7))
    numpyro.sample("y", dist.Normal(x, s), obs=1.0)


OF_NUMPYRO = {
    "normal": partial(AutoNormal, init_scale=0.6),
    "multivariate": partial(AutoMultivariateNormal, init_scale=0.6),
    "iaf": partial(AutoIAFNormal, num_flows=1),
}


@pytest.mark.parametrize("of", OF_NUMPYRO.values(), ids=OF_NUMPYRO)
def test_mean_of_the_guides_of_numpyro(of, scramble):
    """Sites that are maps of one auxiliary site, with log-determinants of their own, count once."""
    guide = of(small_model)
    params = scramble(params_of(guide), 0.1)
    lower = lambda tree: {name: jnp.tril(a) if name.endswith("scale_tril") else a for name, a in tree.items()}
    draw = lambda key: [flat(lower(g)) for _, g in pair("iwae", small_model, guide, lower(params), key)]
    path, plain = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 300))
    assert np.abs(path - plain).max() > 1e-3
    assert_mean_zero(np.asarray(path - plain))


# Sites that draw without derivatives


def mixed_model(n):
    with numpyro.plate("replicas", n):
        d = numpyro.sample("d", dist.Bernoulli(0.4))
        x = numpyro.sample("x", dist.StudentT(5.0, 0.3 + d, 1.0))
        e = numpyro.sample("e", dist.Bernoulli(logits=x - 0.2))
        numpyro.sample("y", dist.Normal(x - d + 1.5 * e, 0.8), obs=jnp.full(n, 1.2))


def mixed_guide(n):
    """A scored site before a reparametrised one, and one after it."""
    a, b, m, c, s, w = (numpyro.param(name, value) for name, value in MIXED.items())
    with numpyro.plate("replicas", n):
        d = numpyro.sample("d", dist.Bernoulli(logits=a))
        x = numpyro.sample("x", dist.Normal(m + c * d, s))
        numpyro.sample("e", dist.Bernoulli(logits=b + w * x))


MIXED = dict(zip("abmcsw", map(jnp.array, (0.3, -0.2, 0.4, 0.7, 0.9, 0.8)), strict=True))


def mixed_by_quadrature(program, params, k=2):
    """The exact gradient of minus the objective of one or two particles: by quadrature over normals, enumeration over bits."""
    z = jnp.linspace(-8, 8, 81)
    d, z, e = (a.ravel() for a in jnp.meshgrid(jnp.arange(2), z, jnp.arange(2), indexing="ij"))
    width = 0.2 * jnp.exp(dist.Normal(0.0, 1.0).log_prob(z))

    def loss(p):
        x = p["m"] + p["c"] * d + p["s"] * z
        bits = [dist.Bernoulli(logits=p["a"]).log_prob(d), dist.Bernoulli(logits=p["b"] + p["w"] * x).log_prob(e)]
        log_q = sum(bits) + dist.Normal(p["m"] + p["c"] * d, p["s"]).log_prob(x)
        log_p = dist.Bernoulli(0.4).log_prob(d) + dist.StudentT(5.0, 0.3 + d, 1.0).log_prob(x)
        log_p = log_p + dist.Bernoulli(logits=x - 0.2).log_prob(e) + dist.Normal(x - d + 1.5 * e, 0.8).log_prob(1.2)
        weight, log_w = width * jnp.exp(sum(bits)), log_p - log_q
        if k == 1:
            return -jnp.sum(program.value(log_w[None]) * weight)
        pairs = jnp.stack([jnp.broadcast_to(a, (len(z), len(z))) for a in (log_w[:, None], log_w)])
        return -jnp.sum(program.value(pairs) * weight * weight[:, None])

    return jax.grad(loss)(params)


@pytest.mark.parametrize("k", [1, 2])
def test_gradient_of_scored_sites_is_that_of_quadrature(k):
    n, names = 400, (*PROGRAMS,) if k > 1 else ("user",)
    draws = for_every_program(lambda p, key: pair(p, mixed_model, mixed_guide, MIXED, key, n, k=k), 40, names=names)
    exact = for_every_program(lambda p, key: mixed_by_quadrature(p, MIXED, k), 1, names=names)
    np.testing.assert_allclose(draws[0][0], draws[1][0], rtol=1e-12)
    for program in range(len(names)):
        for _, kind in draws:
            found, expected = (np.stack([g[name][program] for name in MIXED], -1) for g in (kind, exact))
            assert_mean_zero(found / n - expected, k=6)


def test_continuous_sites_that_are_marked():
    """What a transform drew on the way has no part in the score."""

    def guide(n):
        loc, scale = numpyro.param("loc", jnp.array(0.4)), numpyro.param("scale", jnp.array(0.9))
        q = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(loc, scale))
        with numpyro.plate("replicas", n):
            numpyro.sample("x", q, infer={"grad": "score"})

    n, params, names = 400, {"loc": jnp.array(0.4), "scale": jnp.array(0.9)}, ("elbo", "iwae", "user")
    draws = for_every_program(lambda p, key: pair(p, replicas_model, guide, params, key, n, k=2), 40, names=names)
    exact = for_every_program(lambda p, key: by_quadrature(p, params), 1, names=names)
    for program in range(len(names)):
        for _, kind in draws:
            found, expected = (np.stack([g["loc"][program], g["scale"][program]], -1) for g in (kind, exact))
            assert_mean_zero(found / n - expected)


def test_baselines_lower_the_variance(monkeypatch):
    draw = lambda p, key: flat(gradient(Objective(p, 4), mixed_model, mixed_guide, MIXED, key, 1))
    found = for_every_program(draw, 300, names=("elbo", "iwae"))
    monkeypatch.setattr(programs, "leave_one_out", lambda credit, log_w: credit(log_w))
    without = for_every_program(draw, 300, names=("elbo", "iwae"))
    assert np.all(found.var(1).sum(-1) < 0.7 * without.var(1).sum(-1))


def clusters_model(size):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", size):
        d = numpyro.sample("d", dist.Bernoulli(logits=x))
        numpyro.sample("y", dist.Normal(jnp.stack([x + d, x - d], -1), 0.8).to_event(1), obs=jnp.ones((size, 2)))


def clusters_guide(size):
    x = numpyro.sample("x", dist.Normal(numpyro.param("m", jnp.array(0.2)), numpyro.param("s", jnp.array(0.8))))
    with numpyro.plate("rows", size):
        numpyro.sample("d", dist.Bernoulli(logits=numpyro.param("w", jnp.array(0.5)) * x))


def test_mean_of_scored_sites_in_a_plate_beside_others():
    params = {"m": jnp.array(0.2), "s": jnp.array(0.8), "w": jnp.array(0.5)}
    draw = lambda key: [
        flat(g) for p in ("elbo", "iwae") for _, g in pair(p, clusters_model, clusters_guide, params, key, 3)
    ]
    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 4000))
    for path, plain in (found[:2], found[2:]):
        assert np.abs(path - plain).max() > 1e-3
        assert_mean_zero(np.asarray(path - plain))


def test_scored_sites_in_subsampled_plates():
    """Of the ELBO too they answer for their own elements alone, and are scaled up."""

    def model(size):
        with numpyro.plate("rows", size, subsample_size=2):
            d = numpyro.sample("d", dist.Bernoulli(0.5))
            numpyro.sample("y", dist.Normal(d, 0.5), obs=jnp.array([1.0, 2.0]))

    def guide(size):
        with numpyro.plate("rows", size, subsample_size=2):
            numpyro.sample("d", dist.Bernoulli(logits=numpyro.param("m", jnp.array(0.2))))

    def estimate(program, kind, size):
        loss = Objective(program, 4, gradient=kind)
        of = lambda m: loss.loss(jax.random.key(1), {"m": m}, model, guide, size)
        return jnp.stack(jax.value_and_grad(of)(jnp.array(0.2)))

    apart = programs.Program(programs.elbo().value)
    kinds = ("path", "reparam")
    each = jax.jit(
        lambda: [[[estimate(p, kind, n) for n in (2, 6)] for p in ("iwae", "elbo", apart)] for kind in kinds]
    )
    for iwae, elbo, same in each():
        for one, three in (iwae, elbo):
            np.testing.assert_allclose(three, 3 * one, rtol=1e-10)
        np.testing.assert_allclose(elbo, same, rtol=1e-10)


# No variance at the posterior


def conjugate_model():
    """Both posteriors, of x and of log s, have scale one half."""
    x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("s", dist.LogNormal(0.2, 0.5))
    numpyro.sample("y", dist.Normal(x, 3**-0.5).to_event(1), obs=jnp.array([1.0, -2.0]))


POSTERIOR = {"x": jnp.array([0.75, -1.5]), "s": jnp.exp(0.2)}
EVIDENCE = float(dist.Normal(0.0, (4 / 3) ** 0.5).log_prob(jnp.array([1.0, -2.0])).sum())


def assert_no_variance(model, guide, params, names=(*PROGRAMS,)):
    """Path gradients of all draws vanish at these parameters, and not beside them."""
    point, unravel = ravel_pytree(params)
    beside = point + 0.1 * np.random.default_rng(1).standard_normal(point.shape)

    def each(program, key):
        loss = Objective(program, 3, biased=True)
        return jax.vmap(lambda p: flat(gradient(loss, model, guide, unravel(p), key)))(jnp.stack([point, beside]))

    found = np.abs(for_every_program(each, 2, names=names)).max(-1)  # (programs, keys, points)
    assert found[..., 0].max() < 1e-9
    assert found[..., 1].min() > 1e-4


def planted(guide, params):
    """A model whose posterior is the guide."""
    hide = lambda site: site["type"] == "param"  # or the loss would train them too
    return handlers.block(handlers.substitute(guide, params), hide_fn=hide)


@pytest.mark.parametrize(
    ("of", "names"), [(AutoNormal, (*PROGRAMS, *BIASED)), (AutoMultivariateNormal, ("iwae", "jensen_shannon"))]
)
def test_no_variance_at_a_gaussian_posterior(of, names):
    guide = of(conjugate_model, init_loc_fn=init_to_value(values=POSTERIOR), init_scale=0.5)
    assert_no_variance(conjugate_model, guide, params_of(guide), names)


@pytest.mark.parametrize("bijection", [Coupling(2, Affine(), 0, (4,)), Planar(2)], ids=["coupling", "planar"])
def test_no_variance_at_a_planted_flow(bijection, scramble):
    guide = lambda: numpyro.sample("x", flow_module("q", Flow(bijection)))
    params = moved_params(guide, scramble)
    assert_no_variance(planted(guide, params), guide, params, ("elbo", "iwae", "jensen_shannon"))


def hierarchy_of_flows():
    a = numpyro.sample("a", flow_module("qa", FLOW))
    with numpyro.plate("rows", 3):
        shift = numpyro.param("shift", jnp.array([-0.5, 0.0, 0.5]))
        b = numpyro.sample("b", flow_module("qb", CONDITIONAL, jnp.stack([a.sum() + shift, a.prod() - shift], -1)))
        numpyro.sample("c", flow_module("qc", CONDITIONAL, b).mask(jnp.array([True, False, True])))


def test_no_variance_at_a_planted_hierarchy_of_flows(scramble):
    """Densities of children depend on their parents, and on parameters, through contexts; also under a mask."""
    params = moved_params(hierarchy_of_flows, scramble)
    model = planted(hierarchy_of_flows, params)
    assert_no_variance(model, hierarchy_of_flows, params, ("elbo", "iwae"))


def test_flows_are_not_inverted(monkeypatch):
    monkeypatch.delattr(Flow, "log_prob")
    shapes(Objective("iwae", 3), lambda: hierarchy_model(3), lambda: flow_guide(3))


def levels_model():
    z1 = numpyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = numpyro.sample("z2", dist.Normal(z1, 1.0))
    numpyro.sample("y", dist.Normal(z2, 0.5), obs=0.7)


LEVELS = {"a": 0.7 / 2.25, "s1": (1.25 / 2.25) ** 0.5, "b": 0.2, "c": 2.8 / 5, "s2": 0.2**0.5}


def levels_guide():
    a, s1, b, c, s2 = (numpyro.param(name, value) for name, value in LEVELS.items())
    z1 = numpyro.sample("z1", dist.Normal(a, s1))
    numpyro.sample("z2", dist.Normal(b * z1 + c, s2))


def test_no_variance_at_the_posterior_of_two_levels():
    """Freezing also the parent's value, as stopping each distribution does, would leave the parent's parameters some."""
    assert_no_variance(levels_model, levels_guide, LEVELS, ("elbo", "iwae", "cubo"))


def test_no_variance_at_a_planted_guide_with_scored_sites():
    guide = partial(mixed_guide, 2)
    assert_no_variance(planted(guide, MIXED), guide, MIXED, ("elbo", "iwae"))


# Values, models, plates


def plate_model(n=3):
    shift = numpyro.param("shift", jnp.array(0.3))
    with numpyro.plate("rows", n):
        x = numpyro.sample("x", dist.Normal(shift, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=jnp.arange(float(n)))


def plate_guide(n=3):
    with numpyro.plate("rows", n):
        numpyro.sample("x", dist.Normal(numpyro.param("m", jnp.array(0.2)), numpyro.param("s", jnp.array(0.8))))


PLATE_PARAMS = {"shift": jnp.array(0.3), "m": jnp.array(0.2), "s": jnp.array(0.8)}


class WithKeysOfRenyi(Particles):
    """Particles that draw what those of NumPyro's `RenyiELBO` do."""

    def __init__(self, rng_key, model, guide, args, kwargs, num_particles):
        super().__init__(rng_key, model, guide, args, kwargs, num_particles)
        keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.split(rng_key)[1], num_particles))
        self._keys = [keys[:, 1], keys[:, 0]]


def test_plates_and_models_as_in_renyi(monkeypatch):
    """NumPyro's own loss has the same value and, of the model and of the guide, the same plain gradient."""
    monkeypatch.setattr(objective, "Particles", WithKeysOfRenyi)
    alpha = 0.4
    ours = (Objective(programs.renyi(alpha), 4, gradient=kind) for kind in ("reparam", "path"))
    losses, key = (RenyiELBO(alpha=alpha, num_particles=4), *ours), jax.random.key(3)
    each = lambda params: [
        jax.value_and_grad(lambda p, loss=loss: loss.loss(key, p, plate_model, plate_guide))(params) for loss in losses
    ]
    expected, plain, path = jax.jit(each)(PLATE_PARAMS)
    np.testing.assert_allclose([plain[0], path[0]], expected[0], rtol=1e-12)
    np.testing.assert_allclose(flat(plain[1]), flat(expected[1]), rtol=1e-10)
    np.testing.assert_allclose(path[1]["shift"], expected[1]["shift"], rtol=1e-10)
    assert abs(path[1]["m"] / plain[1]["m"] - 1) > 1e-3


def test_subsampled_plates_are_scaled_outside_of_the_objective():
    def model(size):
        with numpyro.plate("rows", size, subsample_size=2):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 0.5), obs=jnp.array([1.0, 2.0]))

    def guide(size):
        with numpyro.plate("rows", size, subsample_size=2):
            numpyro.sample("x", dist.Normal(numpyro.param("m", jnp.array(0.2)), 0.8))

    def estimate(program, size):
        loss = lambda m: Objective(program, 4).loss(jax.random.key(1), {"m": m}, model, guide, size)
        return jnp.stack(jax.value_and_grad(loss)(jnp.array(0.2)))

    each = jax.jit(lambda: [[estimate(program, size) for size in (2, 6)] for program in ("iwae", "elbo")])
    for one, three in each():
        np.testing.assert_allclose(three, 3 * one, rtol=1e-10)


def test_particles_share_subsamples():
    def model():
        with numpyro.plate("rows", 5, subsample_size=1) as rows:
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)) * 0, 1.0), obs=1.0 * rows)

    def guide():
        with numpyro.plate("rows", 5, subsample_size=1):
            numpyro.sample("x", dist.Normal(0.0, 1.0))

    losses = [Objective(f, 4) for f in (lambda log_w: log_w.max(0) - log_w.min(0), lambda log_w: log_w.mean(0))]
    each = jax.vmap(lambda key: [loss.loss(key, {}, model, guide) for loss in losses])
    spread, mean = jax.jit(each)(jax.random.split(jax.random.key(0), 10))
    assert np.abs(spread).max() < 1e-10
    assert np.ptp(mean) > 1


def regression(subsample_size):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 6, subsample_size=subsample_size):
        numpyro.sample("y", dist.Normal(slope, 0.5), obs=1.0)


def slope_guide(subsample_size):
    numpyro.sample("slope", dist.Normal(numpyro.param("m", jnp.array(0.2)), 0.8))


def test_other_subsampled_plates():
    key, params = jax.random.key(0), {"m": jnp.array(0.2)}
    refused(Objective("iwae"), lambda: regression(2), lambda: slope_guide(2), "plate 'rows' subsamples", params)
    each = jax.jit(lambda: [Objective("elbo", 4).loss(key, params, regression, slope_guide, n) for n in (2, 6)])
    np.testing.assert_allclose(*each(), rtol=1e-12)


# The mixture


@pytest.mark.parametrize(
    ("model", "guide", "params"),
    [
        (levels_model, levels_guide, {name: jnp.array(1.2 * value) for name, value in LEVELS.items()}),
        (lambda: mixed_model(2), lambda: mixed_guide(2), MIXED),
    ],
    ids=["levels", "scored"],
)
def test_auto_is_the_mixture_that_it_says(model, guide, params):
    """At whatever coefficient the state holds; every tenth step this is learnt from both gradients."""
    key, c = jax.random.key(1), 0.3

    def loss(params, kind, step):
        control = {"cross": jnp.array(-c), "square": jnp.array(1.0), "step": step}
        loss = Objective("iwae", 3, gradient=kind)
        params = {**params, objective.CONTROL: control}
        out = loss.loss_with_mutable_state(key, params, model, guide)
        return out["loss"], out["mutable_state"]

    of = jax.value_and_grad(loss, has_aux=True)

    @jax.jit
    def each(params):
        at = lambda kind, step: of(params, kind, step)
        return at("path", 0), at("reparam", 0), jax.vmap(partial(at, "auto"))(jnp.array([20, 21]))

    ((value, _), path), (_, plain), ((values, states), mixed) = each(params)
    np.testing.assert_allclose(values, [value, value], rtol=1e-12)
    for i in range(2):
        found = flat(jax.tree.map(lambda a, i=i: a[i], mixed))
        np.testing.assert_allclose(found, (1 - c) * flat(path) + c * flat(plain), rtol=1e-9, atol=1e-12)
    control = states[objective.CONTROL]
    new = Control(jnp.array(-c), jnp.array(1.0)).updated(path, jax.tree.map(jnp.subtract, plain, path))
    np.testing.assert_allclose(control["cross"], [new.cross, -c], rtol=1e-9)
    np.testing.assert_allclose(control["square"], [new.square, 1.0], rtol=1e-9)
    np.testing.assert_array_equal(control["step"], [21, 22])
    assert abs(new.square - 1) > 0.01


def test_auto_lands_at_the_posterior():
    guide = AutoFlow(conjugate_model, "affine", gradient="auto")
    handlers.seed(guide, 0)()
    at = {"x": POSTERIOR["x"], "s": jnp.log(POSTERIOR["s"])[None]}
    loc = jnp.concatenate([at[name] for name in guide._layout.names])
    placed = place(guide._flow, guide._variables(jax.random.key(0)), loc, 0.5 * jnp.eye(3))
    params = {"auto_flow$params": placed["params"]}
    svi = SVI(conjugate_model, guide, numpyro.optim.Adam(1e-9), Objective("iwae", 4, gradient="auto"))
    state = svi.run(jax.random.key(0), 12, progress_bar=False, init_params=params).state
    assert state.mutable_state[objective.CONTROL]["step"] == 12
    assert state.mutable_state[objective.CONTROL]["square"] > 0.01
    assert coefficient(state) < 1e-5


def test_any_guide_can_keep_the_coefficient():
    guide = AutoNormal(small_model)
    svi = SVI(small_model, objective.keeping(guide), numpyro.optim.Adam(1e-2), Objective("elbo", 4, gradient="auto"))
    result = svi.run(jax.random.key(0), 12, progress_bar=False)
    assert result.state.mutable_state[objective.CONTROL]["step"] == 12
    assert result.state.mutable_state[objective.CONTROL]["square"] > 0
    assert 0 <= coefficient(result.state) <= 1
    assert set(guide.sample_posterior(jax.random.key(1), result.params)) >= {"x"}


def test_training_reaches_the_evidence():
    guide = AutoFlow(conjugate_model, "affine", gradient="auto")
    rate = lambda step: 0.1 * 0.985**step
    svi = SVI(conjugate_model, guide, numpyro.optim.Adam(rate), Objective("elbo", 8, gradient="auto"))
    result = svi.run(jax.random.key(0), 350, progress_bar=False)
    np.testing.assert_allclose(result.losses[-10:], -EVIDENCE, atol=0.01)
    assert result.state.mutable_state[objective.CONTROL]["step"] == 350
    assert 0 <= coefficient(result.state) <= 1


def test_training_of_discrete_latents_reaches_the_posterior():
    """Without a warning of `SVI`; a mixture's component and its mean, given the component."""

    def model():
        d = numpyro.sample("d", dist.Bernoulli(0.3))
        x = numpyro.sample("x", dist.Normal(2.0 * d, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=1.5)

    def guide():
        d = numpyro.sample("d", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(-1.0))))
        loc, log_scale = numpyro.param("loc", jnp.zeros(2)), numpyro.param("log_scale", jnp.zeros(2))
        numpyro.sample("x", dist.Normal(loc[d], jnp.exp(log_scale)[d]))

    svi = SVI(model, guide, numpyro.optim.Adam(lambda step: 0.1 * 0.99**step), Objective("iwae", 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = svi.run(jax.random.key(0), 700, progress_bar=False)
    each = dist.Normal(jnp.array([0.0, 2.0]), 2**0.5).log_prob(1.5) + jnp.log(jnp.array([0.7, 0.3]))
    np.testing.assert_allclose(result.losses[-10:], -jax.nn.logsumexp(each), atol=0.01)
    np.testing.assert_allclose(result.params["logit"], each[1] - each[0], atol=0.05)
    np.testing.assert_allclose(result.params["loc"], [0.75, 1.75], atol=0.05)


def test_path_elbo_is_an_objective():
    loss = PathELBO(7)
    assert isinstance(loss, Objective)
    assert (loss.num_particles, loss.gradient, loss.program.linear) == (7, "path", True)


# Errors


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="gradient must be one of"):
        Objective(gradient="score")
    with pytest.raises(ValueError, match="an objective must be one of"):
        Objective("elob")
    with pytest.raises(ValueError, match="biased=True"):
        Objective(programs.vis())
    Objective(programs.vis(), biased=True)
    for kind in ("reparam", "auto"):
        with pytest.raises(ValueError, match='has "path"'):
            Objective("rws", gradient=kind)


def shapes(loss, model, guide, params=None):
    """Traces the loss and its gradient."""
    params = jax.eval_shape(lambda: params_of(guide)) if params is None else params
    jax.eval_shape(partial(gradient, loss, model, guide), params, jax.random.key(0))


def refused(loss, model, guide, match, params=None):
    with pytest.raises(UnsupportedModelError, match=match):
        shapes(loss, model, guide, params)


def test_guides_that_cannot_be_used():
    bnaf = BlockNeuralAutoregressiveTransform(lambda x: (x, jnp.zeros_like(x)))
    model = lambda: numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    guide = lambda: numpyro.sample("x", dist.TransformedDistribution(dist.Normal(jnp.zeros(2), 1.0).to_event(1), bnaf))
    refused(Objective(), model, guide, r"site 'x'.*gradient=\"reparam\"")
    shapes(Objective(gradient="reparam"), model, guide)
    for marked, of in (({"grad": "reparam"}, dist.Poisson(1.0)), ({"grad": "score"}, dist.Delta(1.0))):
        guide = lambda marked=marked, of=of: numpyro.sample("n", of, infer=marked)
        refused(Objective(), guide, guide, "site 'n'.*" + type(of).__name__)
    guide = lambda: numpyro.sample("n", dist.Poisson(1.0))
    refused(Objective("rws"), guide, guide, "site 'n' .* score")
    guide = lambda: numpyro.sample("n", dist.Poisson(1.0), infer={"grad": "scroe"})
    with pytest.raises(ValueError, match=r"'n' has .*scroe"):
        shapes(Objective(), guide, guide)
    summed = lambda: numpyro.sample("n", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    refused(Objective(), summed, lambda: None, "'n' of the model is marked for enumeration", {})
    refused(Objective(gradient="auto"), small_model, AutoNormal(small_model), "this guide does not keep", {})


def test_points_without_a_density():
    """The rule of path gradients does not hold for them, but where the objective is linear."""
    guide = AutoDelta(small_model)
    params = jax.tree.map(lambda a: a + 0.3, params_of(guide))
    refused(Objective("iwae"), small_model, guide, "of the guide is a Delta", params)
    (_, path), (_, plain) = jax.jit(lambda: pair("elbo", small_model, guide, params, jax.random.key(0)))()
    np.testing.assert_allclose(flat(path), flat(plain), rtol=1e-10)
    assert np.abs(flat(plain)).min() > 1e-3


def test_scaled_guides():
    """The rule counts a log density once: of a nonlinear objective, the gradient would be biased."""
    guide = handlers.scale(plate_guide, 0.5)
    refused(Objective("iwae"), plate_model, guide, "site 'x' of the guide has its log density scaled", PLATE_PARAMS)
    for loss in (Objective("iwae", gradient="reparam"), Objective("elbo")):
        shapes(loss, plate_model, guide, PLATE_PARAMS)
