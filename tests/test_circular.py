"""Maps of the circle and splines with other ends. Points and parameters come from fixed seeds."""

import numpy as np
import pytest

from flowppl.bijections import Coupling, Elementwise, MaskedAutoregressive, RQSpline, bind
from flowppl.bijections.circular import CircularSpline
from flowppl.bijections.wrap import wrap
from flowppl.config import build, describe
from tests.registry import HIDDEN, assert_close, compiled, gradient, on, own_variables, to_numpy

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for minutes

K = 5
CIRCLE = CircularSpline(K)
FREE = RQSpline(K, 3.0, "free")
RING = RQSpline(K, 3.0, "circular")


def theta_of(transformer, shape=(), scale=1.5, seed=0):
    return scale * np.random.default_rng(seed).standard_normal((transformer.num_params, *shape))


def apart(a, b, half=np.pi):
    """Distance on the circle."""
    return np.abs(np.mod(a - b + half, 2 * half) - half)


# wrap


@pytest.mark.parametrize("half", [np.pi, 3.0, 0.7])
@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")
def test_wrap(backend, half):
    """In [-half, half), x itself where it is there, and right within a rounding of x elsewhere."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        h = dtype(half)
        ends = np.array([-h, h, np.nextafter(h, dtype(0)), np.nextafter(-h, dtype(-9)), 0, 3 * h, -3 * h], dtype)
        inside = rng.uniform(-0.999 * half, 0.999 * half, 100).astype(dtype)
        x = np.concatenate([ends, inside, (10.0 ** rng.uniform(0, 6, 200) * rng.choice([-1, 1], 200)).astype(dtype)])
        y = backend.to_numpy(wrap(on(backend, x, dtype), half))
        assert y.dtype == dtype and np.all(y >= -h) and np.all(y < h)
        assert np.array_equal(y[7:107], inside) and y[0] == -h and y[2] == ends[2]
        assert np.all(apart(y.astype(np.float64), x.astype(np.float64), half) <= 2 * np.spacing(np.abs(x) + 6))
        assert np.array_equal(backend.to_numpy(wrap(on(backend, y, dtype), half)), y)


def test_wrap_has_derivative_one(backend):
    x = on(backend, np.float64([-100.0, -np.pi, -1.0, 0.0, np.pi, 4.0]))
    _, (slope,) = gradient(backend, lambda x: (wrap(x).sum(), ()), x)
    assert np.array_equal(backend.to_numpy(slope), np.ones(6))


# Ends of the spline


@pytest.mark.parametrize(("ends", "more"), [("identity", -1), ("free", 1), ("circular", 0)])
def test_ends(backend, ends, more):
    spline = RQSpline(K, 3.0, ends)
    assert spline.num_params == 3 * K + more and build(describe(spline)) == spline
    x = np.float64([-1e6, -3.5, -3.0, -1.2, 0.0, 2.9, 3.0, 40.0])
    x = x[2:6] if ends == "circular" else x
    args = on(backend, (np.zeros((spline.num_params, 1)), x))
    both = compiled(backend, lambda theta, x: [spline.forward(theta, x), spline.inverse(theta, x)])
    for value, log_slope in to_numpy(backend, both(*args)):
        assert_close(value, x, 1e-15)
        assert_close(log_slope, np.zeros(len(x)), 1e-14)


def test_an_old_description_has_identity_ends():
    assert build({"type": "RQSpline", "bins": 4, "bound": 2.0}) == RQSpline(4, 2.0, "identity")


def test_refuses_unknown_ends():
    with pytest.raises(ValueError, match="ends must be one of identity, free, circular"):
        RQSpline(ends="periodic")


def test_free_ends_go_on_along_tangents(backend):
    """Value and slope meet at the box; outside the slope is the end's, and the box is mapped onto itself."""
    theta = theta_of(FREE, (50,))
    x = np.float64([-1e6, -5.0, -3 - 1e-9, -3.0, -3 + 1e-9, 3 - 1e-9, 3.0, 3 + 1e-9, 5.0, 1e6])[:, None] + np.zeros(50)
    y, log_slope = to_numpy(backend, compiled(backend, FREE.forward)(*on(backend, (theta[:, None], x))))
    slopes = FREE._knots(theta)[2]
    for side, end, at in ((slice(0, 4), slopes[0], -3.0), (slice(6, 10), slopes[-1], 3.0)):
        np.testing.assert_allclose(y[side], at + end * (x[side] - at), rtol=1e-12)
        assert_close(log_slope[side], np.broadcast_to(np.log(end), (4, 50)), 1e-12)
    assert np.max(np.abs(log_slope[[4, 5]] - log_slope[[3, 6]])) < 1e-5
    assert np.min(np.abs(np.log(slopes[[0, -1]]))) > 1e-3  # so not one


def check_derivatives(backend, spline, x, scale=1.5):
    """Log-slope and curvature by autodiff; the inverse and its log-slope."""
    theta = theta_of(spline, x.shape, scale)

    def value(theta, x):
        y, log_slope, curvature = spline.forward_with_curvature(theta, x)
        return y.sum(), (y, log_slope, curvature, *spline.forward(theta, x), *spline.inverse(theta, y))

    (y, log_slope, curvature, *again, back, inverse), (_, slope) = to_numpy(
        backend, compiled(backend, lambda t, x: gradient(backend, value, t, x))(*on(backend, (theta, x)))
    )
    bend = compiled(backend, lambda t, x: gradient(backend, lambda t, x: (spline.forward(t, x)[1].sum(), ()), t, x)[1])
    by_autodiff = to_numpy(backend, bend(*on(backend, (theta, x))))[1]
    assert_close((y, log_slope), tuple(again), 1e-14)
    assert_close(log_slope, np.log(slope), 1e-11)
    assert_close(curvature, by_autodiff, 1e-11)
    assert_close(inverse, -log_slope, 1e-9)
    return x, back


def test_free_derivatives(backend):
    x = np.concatenate([np.random.default_rng(1).uniform(-5, 5, 300), [-3.0, 3.0, 1e3, -1e6]])
    x, back = check_derivatives(backend, FREE, x)
    np.testing.assert_allclose(back, x, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("transformer", [CIRCLE, RING])
def test_circular_derivatives(backend, transformer):
    half = np.pi if transformer is CIRCLE else 3.0
    x = np.concatenate([np.random.default_rng(1).uniform(-3 * half, 3 * half, 300), [-half, half, 0.0]])
    x, back = check_derivatives(backend, transformer, x)
    assert np.max(apart(back, x, half)) < 1e-11
    assert np.all(np.abs(back) <= half)


@pytest.mark.parametrize("transformer", [FREE, CIRCLE])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_float32_is_finite(backend, transformer, direction):
    """Values and gradients at large parameters, on the ends and beside them, and far out; the round trip at usual ones."""
    half = np.float32(np.pi if transformer is CIRCLE else 3.0)
    ends = np.float32([half, -half, *(np.nextafter(s * half, s * w) for s in (1, -1) for w in (0, 9)), 1e3, -1e6])
    x = np.concatenate([ends, np.random.default_rng(2).uniform(-5, 5, 200).astype(np.float32)])

    def loss(theta, x):
        y, log_slope = getattr(transformer, direction)(theta, x)
        return y.sum() + log_slope.sum(), (y, log_slope)

    f = compiled(backend, lambda theta, x: gradient(backend, loss, theta, x))
    for scale in (1.0, 20.0):
        out = to_numpy(backend, f(*on(backend, (theta_of(transformer, x.shape, scale), x), np.float32)))
        for a in (*out[0], *out[1]):
            assert a.dtype == np.float32 and np.all(np.isfinite(a))
    there_and_back = compiled(backend, lambda theta, x: transformer.inverse(theta, transformer.forward(theta, x)[0])[0])
    back = backend.to_numpy(there_and_back(*on(backend, (theta_of(transformer, x.shape, 0.5), x), np.float32)))
    error = apart(back, x, np.pi) if transformer is CIRCLE else np.abs(back - x)
    assert np.max(error / (1 + np.abs(x))) < 1e-4


# The circle


def test_is_a_map_of_the_circle(backend):
    """A turn more in x changes nothing; across the seam, value and slope go on; y goes round once."""
    theta = theta_of(CIRCLE, (20,))
    at = np.linspace(-np.pi, np.pi, 2001)[:-1, None] + np.zeros(20)
    f = compiled(backend, CIRCLE.forward)
    y, log_slope = to_numpy(backend, f(*on(backend, (theta[:, None], at))))
    assert np.all(y >= -np.pi) and np.all(y < np.pi)
    for turns in (-3, 1, 20):
        other, other_slope = to_numpy(backend, f(*on(backend, (theta[:, None], at + 2 * np.pi * turns))))
        assert np.max(apart(other, y)) < 1e-11 and np.max(np.abs(other_slope - log_slope)) < 1e-10
    step = 1e-9
    seam = np.float64([np.pi - step, -np.pi, -np.pi + step])[:, None] + np.zeros(20)
    y_seam, slope_seam = to_numpy(backend, f(*on(backend, (theta[:, None], seam))))
    assert np.max(apart(y_seam, y_seam[1])) < 1e3 * step
    assert np.max(np.abs(slope_seam - slope_seam[1])) < 1e4 * step
    assert np.min(np.abs(slope_seam)) > 1e-3  # one learned slope, and no identity
    gone = np.mod(np.diff(np.concatenate([y, y[:1]]), axis=0), 2 * np.pi)
    np.testing.assert_allclose(np.sum(gone, axis=0), 2 * np.pi, rtol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")
def test_density_is_normalised(backend):
    """The uniform density of the circle, pushed through, by the trapezoid rule."""
    n = 40_000
    y = np.linspace(-np.pi, np.pi, n, endpoint=False)
    theta = theta_of(CIRCLE, (4, 1), 1.0)
    _, log_slope = to_numpy(backend, backend.jit(CIRCLE.inverse)(*on(backend, (theta, y))))
    np.testing.assert_allclose(np.mean(np.exp(log_slope), axis=-1), 1, rtol=1e-6)
    assert np.std(log_slope) > 0.1


def test_shift_alone_is_a_rotation(backend):
    theta = np.zeros((CIRCLE.num_params, 1))
    theta[-1] = 20.0
    x = np.linspace(-3, 3, 7)
    y, log_slope = to_numpy(backend, compiled(backend, CIRCLE.forward)(*on(backend, (theta, x))))
    assert np.max(apart(y, x + 20)) < 1e-14 and np.max(np.abs(log_slope)) < 1e-14


BIJECTIONS = {
    "elementwise": Elementwise(2, CIRCLE),
    "elementwise, context": Elementwise(2, CIRCLE, 2, HIDDEN),
    "coupling": Coupling(3, CIRCLE, 2, HIDDEN),
    "autoregressive": MaskedAutoregressive(2, CIRCLE, 0, HIDDEN),
}


@pytest.mark.parametrize("name", BIJECTIONS)
def test_angles_in_flows(name, backend):
    """Round trip, log-det and scores over a base of independent von Mises angles, log p(z) = sum cos z."""
    bijection, rng = BIJECTIONS[name], np.random.default_rng(3)
    v, xp = own_variables(bijection), backend.xp
    z = rng.uniform(-np.pi, np.pi, (6, bijection.dim))
    context = rng.standard_normal((6, bijection.context_dim)) if bijection.context_dim else None

    def both(v, z, c):
        params = bind(v)
        kept = 0 * c if c is not None else None
        y, log_det, score, score_c = bijection.forward_with_score(params, z, -xp.sin(z), c, kept)

        def log_prob(y, c):
            back, inverse = bijection.inverse(params, y, c)
            return xp.sum(xp.cos(back)) + xp.sum(inverse), (back, inverse)

        return (y, log_det, score, score_c), gradient(backend, log_prob, backend.stop(y), c)

    (y, log_det, score, score_c), ((back, inverse), grads) = to_numpy(
        backend, compiled(backend, both)(*on(backend, (v, z, context)))
    )
    assert np.max(apart(back, z)) < 1e-11
    assert_close(inverse, -log_det, 1e-10)
    assert_close(score, grads[0], 1e-9)
    assert np.median(apart(y, z)) > 0.01
    if context is not None:
        assert_close(score_c, grads[1], 1e-9)
