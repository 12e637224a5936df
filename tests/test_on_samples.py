"""Objectives on samples of the target: forward KL with scores, Fisher divergence, sliced MMD."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import special, stats

from flowppl import flows, tree
from flowppl.backend import get_backend
from flowppl.bijections import LULinear
from flowppl.errors import DimensionError
from flowppl.flows import CircularUniform, Flow, Mixture, Normal, Product, StudentT
from flowppl.flows.bases import Base
from flowppl.objectives import fisher_divergence, forward_kl, sliced_mmd
from tests.conftest import FRAMEWORKS
from tests.registry import CASES, assert_close, compiled, gradient, on, registered, variables

pytestmark = pytest.mark.slow  # once for both fronts is enough

PAIRS = {  # small ones, with a context and without
    "affine": flows.affine()(2),
    "spline": registered("nsf", 2, 1),
    "learned-base": Flow(LULinear(3), Product((Mixture(2, 0.5), StudentT(3.0, trainable=True)), (2, 1))),
}
FITTED = [name for name in CASES if not name.startswith("permutation")]  # which has nothing to fit
SECOND = ["nsf-2-0", "maf-5-3", "planar-5-3", "residual-2-0", "learned-base-3-0", "torus-4-1"]  # derivatives
IN_JAX = ["learned-base-3-0", "learned-base"]  # compilation dominates


@pytest.fixture(scope="module")
def backend(request):
    return get_backend(request.param)


def pytest_generate_tests(metafunc):
    """Each framework, and with it some flows: few of them in jax."""
    of = {"case": FITTED, "second": SECOND, "pair": list(PAIRS)}
    name = next((n for n in of if n in metafunc.fixturenames), None)
    if name:
        pairs = [(f, n) for f in FRAMEWORKS for n in of[name] if f == "torch" or n in IN_JAX]
        metafunc.parametrize(("backend", name), pairs, indirect=["backend"], scope="module")
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", FRAMEWORKS, indirect=True, scope="module")


def draw_points(flow, n, seed=0):
    """Points of no density in particular, angles on the circle, and a context."""
    rng = np.random.default_rng(seed)
    x = 1.2 * rng.standard_normal((n, flow.dim))
    if isinstance(flow.base, CircularUniform | Product) and "learned" not in str(flow.base):
        angles = flow.dim if isinstance(flow.base, CircularUniform) else flow.base.dims[0]
        x[:, :angles] = (x[:, :angles] + np.pi) % (2 * np.pi) - np.pi
    return x, rng.standard_normal((n, flow.context_dim)) if flow.context_dim else None


def score_of(backend, flow, v, x, context):
    """d log q / dx by autodiff of `log_prob` alone, not by the pass that carries scores."""

    def log_prob(x):
        return flow.log_prob(v, x, context).sum(), ()

    return gradient(backend, log_prob, x)[1][0]


def value_and_grads(backend, objective, flow, v, *args, context=None):
    """(value, gradients in the parameters and the context)."""

    def loss(params, context, args):
        value = objective(flow, {**v, "params": params}, *args, context=context)
        return value, value

    def both(params, context, args):
        if backend.name == "torch":
            value, (grads, from_context, _) = gradient(backend, loss, params, context, args)
        else:
            value, (grads, from_context) = gradient(backend, lambda p, c: loss(p, c, args), params, context)
        return value, (grads, from_context)

    return tree.map(backend.to_numpy, compiled(backend, both)(v["params"], context, args))


def largest(grads):
    return max((float(np.max(np.abs(g))) for g in tree.leaves(grads) if g.size), default=0.0)


# Forward KL


def test_no_gradient_at_the_target_whatever_the_points(case, backend):
    """Sixteen points of another law: the value is that of the likelihood, whose gradient is not zero, and the gradient is."""
    flow = CASES[case]
    v, x, context = on(backend, (variables(flow), *draw_points(flow, 16)))

    def both(v, x, context):
        return score_of(backend, flow, v, x, context), flow.log_prob(v, x, context)

    score, log_prob = compiled(backend, both)(v, x, context)
    value, grads = value_and_grads(backend, forward_kl, flow, v, x, score, context=context)
    assert largest(grads) <= 1e-9
    assert_close(value, -np.mean(backend.to_numpy(log_prob)), 1e-14)
    plain, other = value_and_grads(backend, forward_kl, flow, v, x, context=context)
    assert_close(value, plain, 1e-14)
    assert largest(other) > 1e-3


def test_unbiased_away_from_the_target(pair, backend):
    """The mean over x ~ p of the path gradient is that of the plain one: Hotelling's test on eight random projections of the
    differences, point by point. Parameters, the base's own among them, and a context that all points share, as an encoder."""
    flow, n = PAIRS[pair], 10_000
    of_p, other = variables(flow, 1), variables(flow, 2)
    of_q = {
        "base": tree.map(lambda a: a + np.linspace(0.9, 0.6, a.size).reshape(a.shape), of_p["params"]["base"]),
        "bijection": tree.map(lambda a, b: a + 0.3 * (b - a), *(v["params"]["bijection"] for v in (of_p, other))),
    }
    rng = np.random.default_rng(3)
    context = rng.standard_normal(flow.context_dim) if flow.context_dim else None
    every = None if context is None else np.broadcast_to(context, (n, flow.context_dim))
    x = flow.sample(rng, of_p, (n,) if context is None else (), every).x
    context = None if context is None else context + 1.5
    p, params, x, context, every = on(backend, (of_p, of_q, x, context, every))
    score = score_of(backend, flow, p, x, every)

    def both(x, score):
        def gradients(*scores):
            def loss(params, context):
                return forward_kl(flow, {**p, "params": params}, x[None], *scores, context=context)

            value, pull = backend.vjp(loss, params, context)
            return pull(backend.xp.ones_like(value))

        return gradients(score[None]), gradients()

    found = tree.map(backend.to_numpy, compiled(backend, backend.vmap(both))(x, score))
    path, plain = (tree.paths(dict(zip(("params", "context"), f, strict=True))) for f in found)
    for name in plain:  # each leaf by itself, so that a small one does not hide among the others
        path_, plain_ = path[name].reshape(n, -1), plain[name].reshape(n, -1)
        k = min(8, path_.shape[1])
        onto = rng.standard_normal((path_.shape[1], k))
        inverse = np.linalg.pinv(np.atleast_2d(np.cov(((path_ - plain_) @ onto).T)) / n, rcond=1e-10)
        statistic = lambda each, onto=onto, inverse=inverse: (m := (each @ onto).mean(0)) @ inverse @ m
        alarm = stats.chi2.isf(1e-3 / len(plain), k)
        assert statistic(path_ - plain_) < alarm, name
        assert statistic(plain_) > alarm, f"{name}: an estimate of zero would pass"


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="needs torch and jax")
def test_torch_and_jax_agree():
    """Values and gradients of forward KL, with scores that are not the flow's, and of the Fisher divergence."""
    flow = PAIRS["spline"]
    x, context = draw_points(flow, 5)
    found = []
    for backend in map(get_backend, FRAMEWORKS):
        v, x_, context_ = on(backend, (variables(flow), x, context))
        both = lambda flow, *args, context: (
            forward_kl(flow, *args, context) + 0.3 * fisher_divergence(flow, *args, context)
        )
        found.append(value_and_grads(backend, both, flow, v, x_, -x_, context=context_))
    assert_close(found[0], found[1], 1e-8)


@dataclass(frozen=True)
class Scaled(Base):
    """Normals whose scale is learned, and which do not say how their draws move with it."""

    def init(self, rng, dim):
        return {"params": {"log_scale": np.zeros(dim)}, "const": {}}

    def log_prob(self, params, z):
        scaled = z * get_backend(FRAMEWORKS[0]).xp.exp(-params["log_scale"])
        return (-0.5 * scaled * scaled - params["log_scale"]).sum(-1)


@pytest.mark.parametrize("base", [Scaled(), Product((Normal(), Scaled()), (1, 2))])
def test_a_base_that_does_not_know_has_the_plain_gradient(base):
    """Its own parameters only: the bijection's gradient is zero at the target still."""
    backend, flow = get_backend(FRAMEWORKS[0]), Flow(LULinear(3), base)
    v, x = on(backend, (variables(flow), draw_points(flow, 16)[0]))
    _, (path, _) = value_and_grads(backend, forward_kl, flow, v, x, score_of(backend, flow, v, x, None))
    _, (plain, _) = value_and_grads(backend, forward_kl, flow, v, x)
    assert largest(path["bijection"]) <= 1e-9
    assert_close(path["base"], plain["base"], 1e-14)
    assert largest(path["base"]) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("df", [0.4, 4.0, 100.0])
def test_attached_student_t(backend, df, dtype):
    """dz / d df at a fixed distribution function, far out too: differences of scipy's quantiles."""
    base, h, tol = StudentT(df, trainable=True), 1e-5 * df, {"float32": 1e-3, "float64": 1e-6}[dtype]
    z = np.float64([-30.0, -2.0, 0.0, 0.1, 1.0, 1e4])  # coordinates, each with degrees of freedom of its own
    tail = stats.t.sf(np.abs(z), df)
    expected = df * np.sign(z) * (stats.t.isf(tail, df + h) - stats.t.isf(tail, df - h)) / (2 * h)

    def loss(params):
        attached = base.attach(params, on(backend, z, dtype))
        return attached.sum(), attached

    attached, (grads,) = gradient(backend, loss, {"log_df": on(backend, 0 * z, dtype)})
    np.testing.assert_array_equal(backend.to_numpy(attached), z.astype(dtype))
    np.testing.assert_allclose(backend.to_numpy(grads["log_df"]), expected, rtol=10 * tol, atol=tol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attached_mixture_far_out(backend, dtype):
    """Nine scales from the modes, where the distribution function is one to the last digit, data lie still."""
    base, z = Mixture(2), np.float64([[-11.0], [0.5], [11.0]])
    params = {
        "loc": np.float64([[-2.0], [2.0]]),
        "log_scale": np.float64([[0.0], [0.1]]),
        "logits": np.float64([0.2, 0]),
    }
    weight = special.softmax(params["logits"])[:, None]
    scale = np.exp(params["log_scale"])
    standard = (z[:, 0] - params["loc"]) / scale
    share = weight * stats.norm.pdf(standard) / scale
    share = share / share.sum(0)  # of each component in the density at z

    def loss(params, w):
        return (base.attach(params, on(backend, z, dtype)) * w).sum(), ()

    for i in range(len(z)):
        w = np.eye(len(z))[i][:, None]
        grads = compiled(backend, lambda *args: gradient(backend, loss, *args)[1][0])(*on(backend, (params, w), dtype))
        assert_close(backend.to_numpy(grads["loc"])[:, 0], share[:, i], {"float32": 1e-4, "float64": 1e-12}[dtype])
        tails = weight[:, 0] * stats.norm.sf(standard[:, i] * np.sign(z[i, 0])) * np.sign(z[i, 0])
        tails = tails - weight[:, 0] * tails.sum()
        expected = tails / np.sum(weight[:, 0] * stats.norm.pdf(standard[:, i]) / scale[:, 0])
        assert_close(backend.to_numpy(grads["logits"]), expected, {"float32": 1e-4, "float64": 1e-12}[dtype])


# Fisher divergence


def test_fisher_divergence(second, backend):
    """Zero at the target, wherever the points lie, and so is its gradient; elsewhere differences of its values, context and all."""
    flow = PAIRS.get(second) or CASES[second]
    v, direction, x, context = on(backend, (variables(flow), variables(flow, 4), *draw_points(flow, 4)))
    score = compiled(backend, lambda v, x, c: score_of(backend, flow, v, x, c))(v, x, context)
    value, grads = value_and_grads(backend, fisher_divergence, flow, v, x, score, context=context)
    assert value <= 1e-18 and largest(grads) <= 1e-9
    score = score + 1 + x
    value, grads = value_and_grads(backend, fisher_divergence, flow, v, x, score, context=context)
    assert value > 0.1
    h, along = 1e-5, (direction["params"], None if context is None else 0.5 + context)

    def divergence(params, context):
        return fisher_divergence(flow, {**v, "params": params}, x, score, context)

    at = lambda step: float(divergence(*tree.map(lambda a, d: a + step * d, (v["params"], context), along)))
    pairs = zip(tree.leaves(grads), tree.leaves(tree.map(backend.to_numpy, along)), strict=True)
    slope = sum(np.sum(g * d) for g, d in pairs)
    assert abs(slope) > 0.01 and slope == pytest.approx((at(h) - at(-h)) / (2 * h), rel=1e-6)


def test_points_and_scores_have_no_derivative(backend):
    flow = PAIRS["affine"]
    v, x = on(backend, (variables(flow), draw_points(flow, 4)[0]))
    likelihood = lambda flow, v, x, score: forward_kl(flow, v, x)
    for objective in (forward_kl, likelihood, fisher_divergence):
        loss = lambda x, s, f=objective: (f(flow, v, x, s) + (x + s).sum(), ())
        _, grads = compiled(backend, lambda *args, loss=loss: gradient(backend, loss, *args))(x, -x)
        assert all(np.all(backend.to_numpy(g) == 1) for g in grads)


def test_errors_of_shapes(backend):
    flow = PAIRS["spline"]
    v, x, context = on(backend, (variables(flow), *draw_points(flow, 4)))
    for objective in (forward_kl, fisher_divergence):
        with pytest.raises(DimensionError, match="x: expected shape"):
            objective(flow, v, x[:, :1], x[:, :1], context)
        with pytest.raises(DimensionError, match="score: expected the shape of x"):
            objective(flow, v, x, x[:3], context)
        with pytest.raises(DimensionError, match="context: expected"):
            objective(flow, v, x, x)


# Sliced MMD


def energy(x, y):
    """The energy distance of two samples by all pairs, those of a point with itself included."""
    mean = lambda a, b: np.mean(np.linalg.norm(a[:, None] - b[None], axis=-1))
    return mean(x, y) - 0.5 * mean(x, x) - 0.5 * mean(y, y)


def test_sliced_mmd_on_a_line(backend):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 1)), 1 + 2 * rng.standard_normal((4, 1))
    y[:2] = x[:2]  # ties do not matter
    found = sliced_mmd(*on(backend, (x, y)), backend.rng(0), 3)
    assert float(found) == pytest.approx(energy(x, y), rel=1e-12)
    assert float(sliced_mmd(*on(backend, (x, x[::-1])), backend.rng(0))) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("dim", [2, 10])
def test_sliced_mmd_in_more_dimensions(backend, dim):
    """By many directions the energy distance itself: within five standard errors, those of |cos| for a pair of points."""
    rng, n = np.random.default_rng(1), 20_000
    x, y = rng.standard_normal((5, dim)), 1 + rng.standard_normal((8, dim))
    v = rng.standard_normal((n, dim))
    cos = np.abs(v[:, 0]) / np.linalg.norm(v, axis=1)
    tol = 5 * np.std(cos) / np.mean(cos) / np.sqrt(n)
    for a, b in ((x, y), (x[:1], y[:1])):  # of two points the distance
        found = float(sliced_mmd(*on(backend, (a, b)), backend.rng(0), n))
        assert found == pytest.approx(energy(a, b), rel=tol)
    assert energy(x[:1], y[:1]) == pytest.approx(np.linalg.norm(x[0] - y[0]))


def test_gradient_of_sliced_mmd(backend):
    rng, h = np.random.default_rng(2), 1e-6
    at, along = ((rng.standard_normal((6, 3)), rng.standard_normal((5, 3))) for _ in range(2))
    f = lambda x, y: sliced_mmd(x, y, backend.rng(0), 16)
    _, grads = gradient(backend, lambda x, y: (f(x, y), ()), *on(backend, at))
    slope = sum(np.sum(backend.to_numpy(g) * d) for g, d in zip(grads, along, strict=True))
    up, down = (float(f(*on(backend, tree.map(lambda a, d, s=s: a + s * h * d, at, along)))) for s in (1, -1))
    assert abs(slope) > 0.01 and slope == pytest.approx((up - down) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sliced_mmd_of_points_that_coincide(backend, dtype):
    x = on(backend, np.repeat(np.arange(3.0), 4)[:, None] * np.ones(2), dtype)
    both = lambda x, y: gradient(backend, lambda x, y: (sliced_mmd(x, y, backend.rng(0)),) * 2, x, y)
    for y in (x, 0 * x):
        value, grads = compiled(backend, both)(x, y)
        assert value.dtype == x.dtype and backend.to_numpy(value) >= 0
        assert all(np.all(np.isfinite(backend.to_numpy(g))) for g in grads)


def test_errors_of_sliced_mmd(backend):
    x = on(backend, np.zeros((3, 2)))
    for y in (x[:, :1], x[0], x[:0]):
        with pytest.raises(DimensionError, match=r"expected shapes \(n, d\) and \(m, d\)"):
            sliced_mmd(x, y, None)
    with pytest.raises(ValueError, match="num_projections must be positive, got 0"):
        sliced_mmd(x, x, None, 0)
