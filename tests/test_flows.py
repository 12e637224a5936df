"""Flows as densities: draws against quadrature of log_prob, bases, contexts, the registry and its errors.

A stochastic test draws with a fixed seed and rejects where a chi-square statistic has a p-value below ALARM: that is
its false-alarm rate, should the seed ever change. 24 statistics are computed: one false alarm in 400,000 changes of
all seeds.
"""

import numpy as np
import pytest
import scipy.stats

from flowppl import flows, tree
from flowppl.bijections import Affine, Chain, Elementwise, LULinear, MaskedAutoregressive, RQSpline
from flowppl.errors import DimensionError, UnknownFlowError
from flowppl.flows import CircularUniform, Flow, Mixture, Normal, Product, StudentT, Uniform, registry
from flowppl.flows.affine_end import place
from tests.registry import HIDDEN, compiled, gradient, on, registered, variables

ALARM = 1e-7
DRAWS = 20_000


def log_prob_on(backend, flow, v, x, context=None):
    """log q at numpy points, by way of the framework."""
    if context is None:
        f, args = lambda v, x: flow.log_prob(v, x), (v, *on(backend, (x,)))
    else:
        f, args = lambda v, x, c: flow.log_prob(v, x, c), (v, *on(backend, (x, context)))
    return backend.to_numpy(compiled(backend, f)(*args))


def draw(backend, flow, v, rng, shape, context=None):
    return backend.to_numpy(compiled(backend, lambda v: flow.sample(rng, v, shape, context).x)(v))


def chi_square(counts, probabilities):
    """p-value of counts in cells that cover everything."""
    expected = probabilities * counts.sum()
    assert np.all(expected > 5)
    statistic = np.sum((counts - expected) ** 2 / expected)
    return scipy.stats.chi2.sf(statistic, counts.size - 1)


# 1-D: x = sinh(s) on an even grid in s resolves the mass and reaches far into the tails
S = np.linspace(-14.0, 14.0, 8001)
FLOWS_1D = {
    **{name: registered(name, 1) for name in flows.names()},
    "maf": Flow(MaskedAutoregressive(1, RQSpline(4, 3.0), 0, HIDDEN)),
    "student-t": registered("nsf", 1, base=StudentT(2.5)),
}


@pytest.mark.parametrize("name", FLOWS_1D)
def test_density_and_draws_agree_in_one_dimension(name, backend, make_rng):
    """The density integrates to one, and draws fall into 40 cells as its integral says."""
    flow = FLOWS_1D[name]
    v = on(backend, variables(flow, seed=3, noise=0.3))
    x = np.sinh(S)
    mass = np.exp(log_prob_on(backend, flow, v, x[:, None])) * np.cosh(S)
    cumulative = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2 * np.diff(S))])
    assert abs(cumulative[-1] - 1) < 1e-4
    edges = np.interp(np.arange(1, 40) / 40, cumulative, x)
    x = draw(backend, flow, v, make_rng(0), (DRAWS,))[:, 0]
    counts = np.bincount(np.searchsorted(edges, x), minlength=40)
    assert chi_square(counts, np.full(40, 1 / 40)) > ALARM


@pytest.mark.parametrize("name", ["nsf", "planar"])
def test_density_and_draws_agree_in_two_dimensions(name, backend, make_rng):
    """Given a context: the same on a plane, in 7 x 7 cells and the rest."""
    flow = registered(name, 2, 1)
    v = on(backend, variables(flow, seed=4, noise=0.3))
    context = np.float64([0.7])
    fine, n = 15.0, 420
    centres = fine * ((np.arange(n) + 0.5) / n * 2 - 1)
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)
    mass = np.exp(log_prob_on(backend, flow, v, grid, context)) * (2 * fine / n) ** 2
    assert abs(mass.sum() - 1) < 1e-3
    x = draw(backend, flow, v, make_rng(1), (DRAWS,), on(backend, context))
    assert x.shape == (DRAWS, 2)

    def cell(x):
        i = np.floor(x + 3.5).astype(int)  # unit squares around the origin
        return np.where(np.all((i >= 0) & (i < 7), axis=-1), i[..., 0] * 7 + i[..., 1], 49)

    probabilities = np.bincount(cell(grid).ravel(), weights=mass.ravel(), minlength=50)
    counts = np.bincount(cell(x), minlength=50)
    rare = probabilities * DRAWS < 10  # go to the rest
    probabilities, counts = (np.append(a[~rare], a[rare].sum()) for a in (probabilities, counts))
    assert counts.size > 15
    assert chi_square(counts, probabilities / probabilities.sum()) > ALARM


def test_moments_of_an_affine_flow(backend, make_rng):
    """Mean and covariance of a normal of full rank, by two chi-square statistics: x'x of whitened means, and of variances."""
    flow = flows.affine()(3)
    scale_tril = np.float64([[2.0, 0, 0], [-1.0, 0.5, 0], [0.3, 4.0, 1.5]])
    loc = np.float64([10.0, -3.0, 0.1])
    v = place(flow, flow.init(make_rng(0)), *on(backend, (loc, scale_tril)))
    x = draw(backend, flow, v, make_rng(2), (DRAWS,))
    white = np.linalg.solve(scale_tril, (x - loc).T).T
    assert scipy.stats.chi2.sf(DRAWS * np.sum(white.mean(0) ** 2), 3) > ALARM
    second = (white.T @ white / DRAWS - np.eye(3))[np.triu_indices(3)] * np.sqrt(DRAWS)
    variance = np.where(np.equal(*np.triu_indices(3)), 2.0, 1.0)
    assert scipy.stats.chi2.sf(np.sum(second**2 / variance), 6) > ALARM
    exact = scipy.stats.multivariate_normal(loc, scale_tril @ scale_tril.T).logpdf(x[:100])
    np.testing.assert_allclose(log_prob_on(backend, flow, v, x[:100]), exact, rtol=1e-12)


# Bases


def test_bases_have_the_densities_of_their_names(backend):
    z = np.random.default_rng(0).standard_normal((50, 3)) * 5
    (z_,) = on(backend, (z,))
    for base, reference in (
        (Normal(), scipy.stats.norm()),
        (StudentT(2.5), scipy.stats.t(2.5)),
        (StudentT(30.0), scipy.stats.t(30.0)),
    ):
        np.testing.assert_allclose(backend.to_numpy(base.log_prob({}, z_)), reference.logpdf(z).sum(-1), rtol=1e-12)
        h = 1e-6
        score = (reference.logpdf(z + h) - reference.logpdf(z - h)) / (2 * h)
        np.testing.assert_allclose(backend.to_numpy(base.score({}, z_)), score, rtol=1e-6, atol=1e-7)


def test_student_t_draws(backend, make_rng):
    """Each coordinate is Student-t, in 40 cells of equal mass, and the two are independent, in 5 x 5."""
    (like,) = on(backend, (np.zeros(1),))
    z = backend.to_numpy(StudentT(1.5).sample(make_rng(3), {}, (10 * DRAWS, 2), like))
    u = scipy.stats.t(1.5).cdf(z)
    counts = np.bincount(np.minimum(40 * u, 39).astype(int).ravel(), minlength=40)
    assert chi_square(counts, np.full(40, 1 / 40)) > ALARM
    fifths = np.minimum(5 * u, 4).astype(int)
    counts = np.bincount(fifths[:, 0] * 5 + fifths[:, 1], minlength=25)
    assert chi_square(counts, np.full(25, 1 / 25)) > ALARM


# Every kind of base with parameters, which a draw carries derivatives of.
LEARNED = {
    "student-t": StudentT(4.0, trainable=True),
    "mixture": Mixture(3),
    "product": Product((Normal(), StudentT(3.0, trainable=True)), (1, 1)),
}


@pytest.mark.parametrize("name", LEARNED)
def test_draws_of_learned_bases_carry_the_derivative_of_expectations(name, backend, make_rng):
    """d E[f(z)] / d params, from draws and by quadrature: one chi-square over all parameters. Stopped draws fail it."""
    base = LEARNED[name]
    v = tree.map(
        lambda p: p + 0.3 * np.random.default_rng(1).standard_normal(p.shape), base.init(np.random.default_rng(0), 2)
    )
    params = on(backend, v["params"])
    xp = backend.xp
    f = lambda z: xp.tanh(z[..., 0] - 0.5) + xp.tanh(z[..., 0]) * xp.tanh(z[..., 1] + 0.3)
    axis = np.sinh(np.linspace(-9, 9, 601))
    cell = np.gradient(axis)
    grid, area = on(backend, (np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1), np.outer(cell, cell)))
    by_quadrature = lambda p: (xp.sum(xp.exp(base.log_prob(p, grid)) * f(grid) * area), ())
    _, (exact,) = gradient(backend, by_quadrature, params)
    rng, batches = make_rng(5), []
    like = grid[0, 0]
    key = rng if backend.name != "jax" else None
    one = compiled(
        backend, lambda p, k: gradient(backend, lambda p: (xp.mean(f(base.sample(k, p, (4000, 2), like))), ()), p)[1][0]
    )
    for k in backend.split(rng, 50):
        batches.append(
            np.concatenate([backend.to_numpy(g).ravel() for g in tree.leaves(one(params, k if key is None else rng))])
        )
    exact = np.concatenate([backend.to_numpy(g).ravel() for g in tree.leaves(exact)])
    mean, covariance = np.mean(batches, axis=0), np.cov(np.transpose(batches)) / len(batches)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance))
    keep = values > 1e-9 * values[-1]  # directions that change nothing: all logits together
    statistic = np.sum(((mean - exact) @ vectors[:, keep]) ** 2 / values[keep])
    n, k = len(batches), int(keep.sum())
    assert scipy.stats.f(k, n - k).sf(statistic * (n - k) / (k * (n - 1))) > ALARM  # Hotelling


@pytest.mark.parametrize("name", LEARNED)
def test_learned_bases_score_and_draw_the_same_density(name, backend, make_rng):
    base = LEARNED[name]
    v = tree.map(lambda p: p + 0.3, base.init(np.random.default_rng(0), 2))
    params = on(backend, v["params"])
    (z,) = on(backend, (np.random.default_rng(1).standard_normal((20, 2)) * 3,))
    _, (slope,) = gradient(backend, lambda z: (backend.xp.sum(base.log_prob(params, z)), ()), z)
    np.testing.assert_allclose(backend.to_numpy(base.score(params, z)), backend.to_numpy(slope), rtol=1e-9, atol=1e-12)
    draws = base.sample(make_rng(2), params, (DRAWS, 2), z)
    edges = np.linspace(-2.5, 2.5, 9)
    fine = np.sinh(np.linspace(-8, 8, 2001))
    (grid,) = on(backend, (np.stack(np.meshgrid(fine, np.sinh(np.linspace(-8, 8, 401)), indexing="ij"), axis=-1),))
    mass = (
        np.exp(backend.to_numpy(base.log_prob(params, grid)))
        @ np.gradient(np.sinh(np.linspace(-8, 8, 401)))
        * np.gradient(fine)
    )
    assert abs(mass.sum() - 1) < 1e-3
    cumulative = np.interp(edges, fine + np.gradient(fine) / 2, np.cumsum(mass))
    probabilities = np.diff([0.0, *(cumulative / mass.sum()), 1.0])
    counts = np.bincount(np.searchsorted(edges, backend.to_numpy(draws)[:, 0]), minlength=10)
    assert chi_square(counts, probabilities) > ALARM


def test_bounded_bases_have_no_density_outside(backend):
    (z,) = on(backend, (np.float64([[0.5, 0.5], [0.5, 2.5], [-1.0, 2.0]]),))
    np.testing.assert_allclose(
        backend.to_numpy(Uniform(-1.0, 2.0).log_prob({}, z)), [-2 * np.log(3), -np.inf, -2 * np.log(3)]
    )
    np.testing.assert_allclose(backend.to_numpy(CircularUniform().log_prob({}, z)), -2 * np.log(2 * np.pi))


def test_bases_that_do_not_fit():
    with pytest.raises(DimensionError, match=r"dims=\(1, 2\) add up to 3, and the flow has dim=2"):
        flows.affine(base=Product((Normal(), StudentT()), (1, 2)))(2).init(np.random.default_rng(0))
    with pytest.raises(DimensionError, match="a positive dim for each base"):
        Product((Normal(),), (1, 2))
    with pytest.raises(ValueError, match="low must be less than high"):
        Uniform(1.0, 1.0)
    with pytest.raises(ValueError, match="components >= 1"):
        Mixture(0)


@pytest.mark.parametrize("df", [0.0, -1.0, float("nan")])
def test_student_t_needs_positive_df(df):
    with pytest.raises(ValueError, match="df must be positive"):
        StudentT(df)


# Shapes, dtypes and contexts


def outline(backend, f, *args):
    """f(*args), or in jax its shapes and dtypes alone: they need no compilation."""
    if backend.name == "torch":
        return f(*args)
    import jax

    return jax.eval_shape(f, *args)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sample_shapes(backend, make_rng, dtype):
    flow, plain = registered("realnvp", 2, 3), registered("realnvp", 2)
    v, plain_v, context = on(backend, (variables(flow), variables(plain), np.ones((5, 1, 3))), dtype)
    for shape in ((), (4,), (0,), (2, 4)):

        def scored(v, c, shape=shape):
            return flow.sample(make_rng(0), v, shape, c, with_score=True)

        def unconditional(v, c, shape=shape):
            return plain.sample(make_rng(0), v, shape, c, with_log_prob=True)

        x, log_prob, score, score_context = outline(backend, scored, v, context)
        assert x.shape == score.shape == (*shape, 5, 1, 2)
        assert log_prob.shape == (*shape, 5, 1)
        assert score_context.shape == (*shape, 5, 1, 3)
        assert {a.dtype for a in (x, log_prob, score, score_context)} == {context.dtype}
        for c in (None, context):  # a flow without a context ignores the one it is given
            x, log_prob, score, score_context = outline(backend, unconditional, plain_v, c)
            assert x.shape == (*shape, 2) and log_prob.shape == shape
            assert x.dtype == context.dtype
            assert score is None and score_context is None
    bare = outline(backend, lambda v, c: flow.sample(make_rng(0), v, (), c), v, context)
    assert bare.log_prob is None and bare.x.shape == (5, 1, 2)


def test_draws_follow_the_generator(backend, make_rng):
    flow = registered("realnvp", 2)
    v = on(backend, variables(flow))
    x, again, other = (backend.to_numpy(flow.sample(make_rng(seed), v, (3,)).x) for seed in (0, 0, 1))
    assert np.array_equal(x, again) and not np.any(x == other)


def test_layers_start_apart(backend, make_rng):
    """Each layer draws arrays of its own, and each seed gives others."""
    flow = registered("nsf", 4)
    first, second = (flow.init(make_rng(seed))["params"] for seed in (0, 1))
    weight = backend.to_numpy(tree.paths(first)["bijection.0.1.net.layers.0.weight"])
    assert not np.any(weight[0] == weight[1])
    assert not np.any(weight == backend.to_numpy(tree.paths(second)["bijection.0.1.net.layers.0.weight"]))


def test_dimension_errors(backend, make_rng):
    flow = registered("nsf", 3, 2)
    v = on(backend, variables(flow))
    x, context = on(backend, (np.zeros((4, 3)), np.zeros((4, 2))))
    with pytest.raises(DimensionError, match=r"x: expected shape \(\*batch, 3\), got \(4, 2\)"):
        flow.log_prob(v, context, context)
    with pytest.raises(DimensionError, match=r"context: expected shape \(\*batch, 2\), got none"):
        flow.log_prob(v, x)
    with pytest.raises(DimensionError, match=r"context: expected shape \(\*batch, 2\), got shape \(4, 3\)"):
        flow.log_prob(v, x, x)
    with pytest.raises(DimensionError, match="context"):
        flow.sample(make_rng(0), v, (4,))
    for dim, context_dim in ((0, 0), (-1, 0), (2, -1)):
        with pytest.raises(DimensionError, match="expected dim >= 1 and context_dim >= 0"):
            flows.nsf()(dim, context_dim)
    with pytest.raises(DimensionError, match="all of one dim"):
        Chain((LULinear(2), LULinear(3)))
    with pytest.raises(DimensionError, match="at most one context_dim"):
        Chain((Elementwise(2, Affine(), 1), Elementwise(2, Affine(), 2)))
    with pytest.raises(DimensionError, match="expected at least one"):
        Chain(())


# The registry


def test_unknown_flows_name_the_nearest():
    with pytest.raises(UnknownFlowError, match=r"no flow is called 'nfs': did you mean 'nsf'"):
        flows.get("nfs")
    with pytest.raises(UnknownFlowError, match=r"did you mean 'realnvp'"):
        flows.get("real_nvp")
    with pytest.raises(UnknownFlowError, match=r"registered flows are .*nsf.*planar") as caught:
        flows.get("?")
    assert "did you mean" not in str(caught.value)
    assert not str(caught.value).startswith('"')  # a KeyError would show its repr
    assert isinstance(caught.value, KeyError)


def test_unknown_options_name_the_known():
    with pytest.raises(TypeError, match=r"flow 'nsf' has no option 'layer'; it has base, .*layers"):
        flows.nsf(layer=3)


@pytest.mark.parametrize("name", flows.names())
def test_every_registered_flow_takes_what_it_is_given(name):
    for dim in (1, 2, 7):
        for context_dim in (0, 3):
            flow = flows.get(name)(dim, context_dim)
            assert (flow.dim, flow.context_dim) == (dim, context_dim)
            assert flow == flows.get(name)(dim, context_dim) and hash(flow) == hash(flows.get(name)(dim, context_dim))
    recipe = getattr(flows, name)(base=StudentT(3.0))
    assert recipe(2).base == StudentT(3.0)
    assert getattr(flows, name).__doc__ and getattr(flows, name).__name__ == name
    assert flows.get(recipe) is recipe and flows.get(name) == getattr(flows, name)()


def test_recipes_are_values():
    assert flows.nsf(layers=4, bins=5) == flows.nsf(bins=5, layers=4) != flows.nsf(layers=4)
    assert len({flows.nsf(), flows.nsf(), flows.realnvp(), flows.nsf(base=StudentT())}) == 3
    assert flows.nsf(layers=4)(3) == flows.nsf(layers=4)(3) != flows.nsf(layers=5)(3)


def test_options_reach_the_flow(backend, make_rng):
    v = flows.nsf(layers=3, hidden=(7,), bins=5, linear=False, affine=False, activation="gelu")(4).init(make_rng(0))
    shapes = {k: tuple(a.shape) for k, a in tree.paths(v["params"]).items()}
    assert shapes["bijection.0.0.net.layers.0.weight"] == (3, 7, 2)
    assert shapes["bijection.0.0.net.layers.1.weight"] == (3, 2 * 14, 7)
    with pytest.raises(ValueError, match=r"activation must be one of relu, silu, gelu"):
        flows.nsf(activation="tanh")(2).init(make_rng(0))


def test_ready_flows_fit_or_say_so():
    flow = flows.nsf()(3)
    assert flows.get(flow)(3) is flow
    with pytest.raises(DimensionError, match=r"expected dim=4 and context_dim=0, got a flow with dim=3"):
        flows.get(flow)(4)


@pytest.fixture
def throw_away():
    """A flow that is registered for one test, in the two steps that the documentation names."""

    @flows.register("throw-away")
    def build(dim, context_dim, *, bound=2.0):
        """A spline for each coordinate."""
        return Elementwise(dim, RQSpline(4, bound), context_dim, HIDDEN)

    yield build
    del registry._RECIPES["throw-away"]


def test_a_new_flow_is_one_line_in_the_registry(throw_away, backend, make_rng):
    assert "throw-away" in flows.names()
    assert throw_away.__doc__ == "A spline for each coordinate."
    flow = flows.get(throw_away(bound=3.0))(2, 1)
    assert flow.bijection.transformer.bound == 3.0
    v = flow.init(make_rng(0), like=on(backend, np.zeros(1)))
    draws = compiled(backend, lambda v, context: flow.sample(make_rng(0), v, (4,), context, with_score=True))
    sample = draws(v, on(backend, np.ones(1)))
    np.testing.assert_allclose(backend.to_numpy(sample.score), -backend.to_numpy(sample.x))  # the identity
    with pytest.raises(UnknownFlowError, match="throw-away"):
        flows.get("throwaway")
