"""Linear maps, ActNorm, radial and Sylvester flows: known matrices, limits, and what each claims beyond the common suite."""

import numpy as np
import pytest

from flowppl import tree
from flowppl.backend import get_backend
from flowppl.bijections import Affine, Chain, Elementwise, Inverse, LULinear, Permutation, Planar, Stack, bind
from flowppl.bijections.actnorm import ActNorm, calibrate
from flowppl.bijections.householder import Householder, QRLinear, householder
from flowppl.bijections.linear import Orthogonal, TriangularLinear
from flowppl.bijections.radial import Radial
from flowppl.bijections.sylvester import Sylvester
from flowppl.errors import DimensionError
from flowppl.flows import Flow
from tests.registry import assert_close, compiled, gradient, of_flow, on, own_variables, to_numpy

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for minutes


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def reflections(vectors):
    """The product of the reflections, one after the other."""
    q = np.eye(vectors.shape[1])
    for v in vectors:
        q = q @ (np.eye(len(v)) - 2 * np.outer(v, v) / (v @ v))
    return q


def matrix(backend, bijection, v, dtype="float64", inverse=False):
    """W of y = W x + b, or its inverse, in numpy."""
    eye = on(backend, np.eye(bijection.dim), dtype)
    f = bijection.inverse if inverse else bijection.forward
    return backend.to_numpy(f(bind(v), eye)[0] - f(bind(v), 0 * eye)[0]).T


@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (2, 6), (7, 1)])
def test_householder_is_the_product_of_reflections(backend, shape, rng):
    vectors = rng.standard_normal(shape)
    q = backend.to_numpy(householder(on(backend, vectors)))
    assert_close(q, reflections(vectors), 1e-13)
    assert_close(backend.to_numpy(householder(on(backend, vectors), 2)), q[:, :2], 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_householder_is_orthogonal_whatever_the_vectors(backend, dtype, rng):
    """Zero, tiny, huge, parallel and many vectors, with finite gradients; a zero one counts as (1, ..., 1)."""
    vectors = rng.standard_normal((40, 3))
    vectors[[0, 3]] = 0
    vectors[1] *= 1e-30
    vectors[2] *= 1e15
    vectors[5:30] = vectors[4]
    weight = on(backend, rng.standard_normal((3, 3)), dtype)

    def loss(vectors):
        q = householder(vectors)
        return (weight * q).sum(), q

    q, (gradients,) = to_numpy(
        backend, compiled(backend, lambda v: gradient(backend, loss, v))(on(backend, vectors, dtype))
    )
    assert_close(q.T @ q, np.eye(3), 100 * np.finfo(dtype).eps)
    assert np.all(np.isfinite(gradients)) and not np.any(gradients[0])
    if dtype == "float64":
        assert_close(q, reflections(np.where(vectors == 0, 1.0, vectors)), 1e-12)


def test_householder_starts_at_the_identity_and_leaves_it(backend, make_rng, rng):
    """The reflections of a pair cancel, and a gradient step turns them apart."""
    flow = Householder(5)
    v = flow.init(make_rng(0))
    assert v["params"]["vectors"].shape == (4, 5)  # a rotation of five dimensions has an axis
    assert_close(matrix(backend, flow, on(backend, to_numpy(backend, v))), np.eye(5), 1e-6)
    weight = on(backend, rng.standard_normal((5, 5)))

    def loss(vectors):
        return (weight * householder(vectors)).sum(), ()

    start = on(backend, to_numpy(backend, v["params"]["vectors"]))
    _, (g,) = compiled(backend, lambda p: gradient(backend, loss, p))(start)
    g = backend.to_numpy(g)
    assert np.min(np.linalg.norm(g, axis=-1)) > 0.1
    assert_close(g[::2], -g[1::2], 1e-6)


def test_every_rotation_is_a_householder_map(rng):
    """The vectors of numpy's QR factorisation of a rotation, in number dim or dim - 1."""
    for dim in (2, 3, 4, 5):
        q = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
        q[:, 0] *= np.linalg.det(q)
        rest, vectors = q.copy(), []
        for k in range(dim):
            v = rest[:, k] - np.eye(dim)[k]
            if np.linalg.norm(v) > 1e-12:
                vectors.append(v)
                rest = reflections(v[None]) @ rest
        vectors += [np.ones(dim)] * (Householder(dim)._count - len(vectors))
        assert_close(householder(np.stack(vectors)), q, 1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_orthogonal_stays_orthogonal_at_large_weights(backend, scale, rng):
    flow = Orthogonal(6)
    v = on(backend, {"params": {"skew": scale * rng.standard_normal((6, 6))}, "const": {}}, "float32")
    q = matrix(backend, flow, v, "float32")
    assert_close(q.T @ q, np.eye(6), 2e-5)
    assert np.linalg.det(q) > 0 and np.max(np.abs(q - np.eye(6))) > 0.5


def test_orthogonal_in_two_dimensions_turns_by_twice_the_arctangent():
    v = {"params": {"skew": np.float64([[0.0, 0.0], [0.3, 0.0]])}, "const": {}}
    angle = 2 * np.arctan(0.3 / (1 + 0.3 / 100))
    expected = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    assert_close(matrix(get_backend("numpy"), Orthogonal(2), v), np.asarray(expected), 1e-14)


def test_known_factors(backend, rng):
    """The matrices of the triangular and the QR map, entry by entry."""
    a = rng.standard_normal((4, 4))
    v = own_variables(TriangularLinear(4))
    v["params"]["lower"] = a
    expected = np.tril(a, -1) + np.diag(np.exp(np.diag(a)))
    assert_close(matrix(backend, TriangularLinear(4), on(backend, v)), expected, 1e-14)
    v = own_variables(QRLinear(4, 6))
    v["params"]["upper"] = a
    expected = reflections(v["params"]["vectors"]) @ (np.triu(a, 1) + np.diag(np.exp(np.diag(a))))
    assert_close(matrix(backend, QRLinear(4, 6), on(backend, v)), expected, 1e-13)


@pytest.mark.parametrize("light", range(5))
def test_light_coordinates_see_themselves_alone(backend, light, rng):
    """In both directions, with no gradient to the entries that are cut off; all else is the plain map's."""
    flow = LULinear(4, light=light)
    v = on(backend, own_variables(flow, noise=1.0))
    v["params"]["bias"] = 0 * v["params"]["bias"]
    w, inverse = matrix(backend, flow, v), matrix(backend, flow, v, inverse=True)
    assert not np.any(w[:light, light:]) and not np.any(inverse[:light, light:])
    plain = matrix(backend, LULinear(4), v)
    assert_close(w[:light, :light], plain[:light, :light], 1e-14)
    if light in (0, 4):
        assert_close(w, plain, 1e-15)
    x = on(backend, rng.standard_normal((3, 4)))
    _, (g,) = gradient(backend, lambda p: ((flow.forward(p, x)[0] ** 2).sum(), ()), v["params"])
    g = backend.to_numpy(g["lu"])
    assert not np.any(g[:light, light:]) and np.count_nonzero(g) == 16 - light * (4 - light)


def test_light_keeps_a_cholesky_factor(backend, rng):
    """It is lower triangular: nothing of it is cut off. Nor are tails: an enormous heavy coordinate leaves the light ones exact."""
    a = rng.standard_normal((3, 3))
    scale = np.linalg.cholesky(a @ a.T + np.eye(3))
    params = LULinear.from_cholesky(*on(backend, (np.arange(3.0), scale)))
    flow = LULinear(3, light=2)
    assert_close(matrix(backend, flow, {"params": params, "const": on(backend, {})}), scale, 1e-14)
    x = on(backend, np.float64([[1.0, 2.0, 1e300], [1.0, 2.0, 0.0]]))
    y = backend.to_numpy(flow.forward(params, x)[0])
    assert np.array_equal(y[0, :2], y[1, :2])


def test_options_are_checked(rng):
    for light in (-1, 3):
        with pytest.raises(DimensionError, match="light: expected a number of coordinates from 0 to 2"):
            LULinear(2, light=light)
    for flow in (Householder, QRLinear):
        with pytest.raises(DimensionError, match="reflections: expected None or an even number from 2 on, got 3"):
            flow(4, 3)
    with pytest.raises(DimensionError, match="rank: expected None or a number from 1 to 2, got 3"):
        Sylvester(2, 3)
    for y in (np.zeros(2), np.zeros((4, 3)), np.zeros((0, 2))):
        with pytest.raises(DimensionError, match=r"y: expected shape \(n, 2\)"):
            calibrate(ActNorm(2), ActNorm(2).init(rng), y)


# ActNorm


def test_calibrate_standardises_at_every_actnorm(backend, rng):
    """Inside every composition, in both directions: what leaves each one on the way to the base has mean zero and deviation one."""
    dim = 3
    bent = Chain((ActNorm(dim), Elementwise(dim, Affine()), Permutation(dim)))
    flow = Chain(
        (ActNorm(dim), Stack(bent, 2), Inverse(Chain((bent, Stack(Inverse(bent), 2)))), Elementwise(dim, Affine(), 2))
    )
    v = on(backend, own_variables(flow, noise=0.5))
    y, context = on(backend, (rng.gamma(2.0, size=(200, dim)) * [1e-3, 1.0, 50.0] + 7, rng.standard_normal((200, 2))))
    v = calibrate(flow, v, y, context)
    left = []

    def walk(bijection, v, y, forward):
        if isinstance(bijection, Inverse):
            return walk(bijection.bijection, v, y, not forward)
        if isinstance(bijection, Chain | Stack):
            if isinstance(bijection, Stack):
                parts = [(bijection.layer, tree.index(v, i)) for i in range(bijection.depth)]
            else:
                pairs = zip(bijection.bijections, v["params"], v["const"], strict=True)
                parts = [(b, {"params": p, "const": c}) for b, p, c in pairs]
            for part, its in parts if forward else parts[::-1]:
                y = walk(part, its, y, forward)
            return y
        y, _ = (bijection.forward if forward else bijection.inverse)(bind(v), y, context)
        if isinstance(bijection, ActNorm):
            left.append(backend.to_numpy(y))
        return y

    z = walk(flow, v, y, forward=False)
    assert len(left) == 6
    for x in left:
        assert_close(np.mean(x, axis=0), np.zeros(dim), 1e-10)
        assert_close(np.std(x, axis=0), np.ones(dim), 1e-10)
    assert_close(backend.to_numpy(flow.inverse(bind(v), y, context)[0]), backend.to_numpy(z), 1e-10)


def test_calibrate_keeps_params_and_dtype(backend, rng):
    """It moves constants only."""
    flow = Chain((Stack(Chain((ActNorm(2), LULinear(2))), 2), ActNorm(2)))
    before = on(backend, own_variables(flow), "float32")
    after = calibrate(flow, before, on(backend, rng.standard_normal((20, 2)), "float32"))
    assert_close(to_numpy(backend, after["params"]), to_numpy(backend, before["params"]), 0.0)
    assert tree.paths(after).keys() == tree.paths(before).keys()
    assert {a.dtype for a in tree.leaves(after)} == {a.dtype for a in tree.leaves(before)}
    _, log_det = flow.forward(bind(after), on(backend, np.zeros((1, 2)), "float32"))
    assert abs(float(log_det[0])) > 0.01


@pytest.mark.parametrize("inverted", [False, True])
def test_constant_columns_are_centred_alone(backend, inverted):
    """0.1 has no exact mean: rounding is no deviation."""
    flow = Inverse(ActNorm(3)) if inverted else ActNorm(3)
    y = on(backend, np.stack([np.full(7, 0.1), np.zeros(7), np.arange(7.0)], axis=-1))
    v = calibrate(flow, on(backend, own_variables(flow)), y)
    x, log_det = to_numpy(backend, flow.inverse(bind(v), y))
    assert_close(x[:, :2], np.zeros((7, 2)), 1e-15)
    assert_close(np.std(x[:, 2]), np.float64(1.0), 1e-14)
    assert_close(log_det, np.full(7, -np.log(2.0)), 1e-14)


# Radial


def radial_params(centre, alpha, slope):
    """Parameters for which alpha and the slope at the centre are about these."""
    bound = np.log(1e3)
    raw = [s / (1 - abs(s) / bound) for s in (np.log(alpha / np.sqrt(len(centre))), np.log(slope))]
    return {
        "params": {"centre": np.float64(centre), "alpha": np.float64(raw[0]), "beta": np.float64(raw[1])},
        "const": {},
    }


@pytest.mark.parametrize("slope", [2e-3, 0.3, 1.0, 20.0, 500.0])
def test_radial_is_the_formula_and_its_inverse(backend, slope):
    centre, alpha = [0.5, -1.0, 2.0], 0.7
    v = on(backend, radial_params(centre, alpha, slope))
    beta = alpha * (slope - 1)
    r = np.concatenate([[0.0], np.logspace(-12, 7, 40)])
    x = np.float64(centre) + r[:, None] * np.float64([2, -1, 2]) / 3
    y, log_det = Radial(3).forward(bind(v), on(backend, x))
    expected = x + (beta / (alpha + r))[:, None] * (x - np.float64(centre))
    assert_close(backend.to_numpy(y), expected, 1e-12)
    expected = 2 * np.log(1 + beta / (alpha + r)) + np.log(1 + alpha * beta / (alpha + r) ** 2)
    assert_close(backend.to_numpy(log_det), expected, 1e-11)
    back, inverse_log_det = to_numpy(backend, Radial(3).inverse(bind(v), y))
    assert np.all(np.max(np.abs(back - x), axis=-1) <= 1e-12 * (1 + r))
    assert_close(inverse_log_det, -expected, 1e-10)  # the inverse is 500 times as steep as the map


@pytest.mark.parametrize("slope", [2e-3, 0.3, 500.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_radial_at_its_centre_and_far_out(backend, dtype, slope):
    """Values, scores and gradients at r = 0, about it, and where squares of 1e6 and alpha meet in one sum."""
    flow = Flow(Radial(2))
    v = on(backend, radial_params([1.0, 1.0], 0.5, slope), dtype)
    r = np.float64([0, 1e-30, 1e-12, 1e-6, 0.5, 1e3, 1e6, 1e9, 1e15])
    x = on(backend, 1 + np.outer(r, [0.6, 0.8]), dtype)

    def loss(params, x):
        full = of_flow({**v, "params": params})
        sample = flow.push(full, x, with_score=True)
        log_prob = flow.log_prob(full, x)
        return sample.x.sum() + sample.log_prob.sum() + log_prob.sum(), (
            sample.x,
            sample.log_prob,
            sample.score,
            log_prob,
        )

    out = compiled(backend, lambda p, x: gradient(backend, loss, p, x))(v["params"], x)
    for path, a in tree.paths(to_numpy(backend, out)).items():
        assert np.all(np.isfinite(a)), path
    back = backend.to_numpy(flow.bijection.inverse(bind(v), flow.bijection.forward(bind(v), x)[0])[0])
    error = np.max(np.abs(back - backend.to_numpy(x)), axis=-1)
    assert np.all(error <= 2e3 * np.finfo(dtype).eps * (1 + r))  # the least slope is 2e-3


# Sylvester


def test_sylvester_of_rank_one_is_planar(backend, rng):
    """Along the vector that its one reflection makes of the first axis."""
    s = own_variables(Sylvester(3, 1))
    s["params"]["factors"] = np.float64([[0.4, -2.0]])  # log r~ and r r~, raw
    q = reflections(s["params"]["vectors"])[:, 0]
    inner = np.exp(0.4 / (1 + 0.4 / np.log(1e3)))
    p = {"params": {"w": inner * q, "u": -2.0 / inner * q, "b": s["params"]["bias"][0]}, "const": {}}
    x = on(backend, 2 * rng.standard_normal((5, 3)))
    sylvester, planar = on(backend, (s, p))

    def both(bijection, v):
        return compiled(backend, lambda v: (bijection.forward(bind(v), x), bijection.inverse(bind(v), x)))(v)

    actual, expected = both(Sylvester(3, 1), sylvester), both(Planar(3), planar)
    assert_close(to_numpy(backend, actual), to_numpy(backend, expected), 1e-11)


def test_sylvester_is_the_formula(rng):
    v = own_variables(Sylvester(5, 3), noise=0.7)
    flow, (parts, x) = Sylvester(5, 3), (Sylvester(5, 3)._unpack(v["params"], None), rng.standard_normal((4, 5)))
    assert_close(parts.basis.T @ parts.basis, np.eye(3), 1e-13)
    for triangle in (parts.outer, parts.inner):
        assert not np.any(np.tril(triangle, -1)) and np.min(np.abs(triangle[np.triu_indices(3)])) > 1e-3
    assert_close(np.diag(parts.outer) * np.diag(parts.inner), parts.dot, 1e-14)
    expected = [x_ + parts.basis @ parts.outer @ np.tanh(parts.inner @ parts.basis.T @ x_ + parts.bias) for x_ in x]
    assert_close(flow.forward(bind(v), x)[0], np.stack(expected), 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sylvester_stays_invertible(backend, dtype, rng):
    """Slopes at their least, strong couplings between the coordinates of the subspace, and points far out."""
    flow = Flow(Sylvester(4, 3))
    v = own_variables(flow.bijection)
    v["params"]["factors"] = np.float64([[0.5, -20, 3, -3], [2, 0.5, -20, 3], [-2, 2, 0.5, -20]])
    v["params"]["bias"] = np.zeros(3)
    x = np.concatenate([[[0.0] * 4, [1e3] * 4, [-1e6] * 4, [1e-3, 0, 0, 1e6]], rng.standard_normal((20, 4))])
    v, x_ = on(backend, (v, x), dtype)

    def loss(params, x):
        full = of_flow({**v, "params": params})
        sample = flow.push(full, x, with_score=True)
        log_prob = flow.log_prob(full, x)
        return sample.x.sum() + log_prob.sum(), (sample.x, sample.log_prob, sample.score, log_prob)

    run = compiled(backend, lambda p, x: gradient(backend, loss, p, x))
    (y, _, score, _), grads = run(v["params"], x_)
    for path, a in tree.paths(to_numpy(backend, ((y, score), grads))).items():
        assert np.all(np.isfinite(a)), path
    # In y: the equation is solved, though slopes of 1e-3 in a row leave x itself uncertain.
    back = flow.bijection.inverse(bind(v), y)[0]
    again, y = to_numpy(backend, (flow.bijection.forward(bind(v), back)[0], y))
    assert np.all(np.max(np.abs(again - y), axis=-1) <= 1e3 * np.finfo(dtype).eps * (1 + np.max(np.abs(y), axis=-1)))


def test_sylvester_trains_off_the_identity(backend, make_rng, rng):
    """R starts at zero, and it is what has a gradient there; its Q differs from draw to draw."""
    flow = Flow(Sylvester(4, 2))
    v = on(backend, to_numpy(backend, flow.init(make_rng(0))))
    x = on(backend, rng.standard_normal((50, 4)))

    def loss(params):
        return (flow.push({**v, "params": params}, x).x * x).sum(), ()

    _, (g,) = compiled(backend, lambda p: gradient(backend, loss, p))(v["params"])
    assert np.all(np.abs(backend.to_numpy(g["bijection"]["factors"])[np.triu_indices(2, 1, 3)]) > 1e-3)


@pytest.mark.parametrize("flow", [QRLinear(2), TriangularLinear(2), Radial(2, 1), Sylvester(2, 2, 1)])
def test_arrays_share_no_memory(flow):
    """An optimiser that writes in place would move two at once."""
    leaves = tree.leaves(flow.init(np.random.default_rng(0)))
    assert not any(np.shares_memory(a, b) for i, a in enumerate(leaves) for b in leaves[:i])
