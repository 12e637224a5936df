"""Heavy tails: quantiles and tail indices in closed form, both frameworks. Nothing here is random."""

import numpy as np
import pytest
from scipy import special, stats

from flowppl.bijections.tails import ExtremeTails
from tests.registry import assert_close, compiled, gradient, on, to_numpy

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for minutes

TAILS = ExtremeTails()
UNIT = np.sqrt(np.pi / 2)
EVERYWHERE = pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")


def theta_of(left, right):
    """Parameters of the tail indices: exp(t / (1 + |t| / log 15)) / 10 is the index."""
    s = np.log(10 * np.float64([left, right]))
    return (s / (1 - np.abs(s) / np.log(15)))[:, None]


INDICES = [(0.1, 0.1), (0.02, 1.4), (1.0, 0.5), (0.25, 0.01)]


@EVERYWHERE
@pytest.mark.parametrize("index", INDICES)
def test_quantiles(backend, index):
    """The value at a normal quantile is the generalised Pareto quantile, on each side with its own index."""
    p = np.float64([0.9, 0.5, 0.1, 1e-3, 1e-6, 1e-9, 1e-14])  # of a larger |z|
    z = -special.ndtri(p / 2)
    theta = on(backend, theta_of(*index))
    forward, inverse = backend.jit(TAILS.forward), backend.jit(TAILS.inverse)
    for side, lam in ((-1, index[0]), (1, index[1])):
        y, _ = to_numpy(backend, forward(theta, on(backend, side * z)))
        np.testing.assert_allclose(side * y, stats.genpareto.isf(p, lam, scale=UNIT), rtol=1e-10)
        back, _ = to_numpy(backend, inverse(theta, on(backend, y)))
        np.testing.assert_allclose(back, side * z, rtol=1e-12)


@pytest.mark.parametrize("index", INDICES)
def test_tail_index(backend, index):
    """d log Pr(|Y| > y) / d log y tends to -1 / lam: exact for log(1 + lam y / u), here at the end of the curved part."""
    z = np.float64([7.9, 7.91])
    theta, forward = on(backend, theta_of(*index)), compiled(backend, TAILS.forward)
    for side, lam in ((-1, index[0]), (1, index[1])):
        y, _ = to_numpy(backend, forward(theta, on(backend, side * z)))
        slope = np.diff(special.log_ndtr(-z)) / np.diff(np.log(1 + lam * np.abs(y) / UNIT))
        np.testing.assert_allclose(slope, -1 / lam, rtol=1e-8)


def test_start(backend):
    """Ten degrees of freedom on both sides, slope one at the origin, and no identity."""
    theta = on(backend, np.zeros((2, 1)))
    y, log_slope = to_numpy(backend, TAILS.forward(theta, on(backend, np.float64([0.0, 1.0, -1.0, 4.0]))))
    at_one = stats.genpareto.isf(2 * special.ndtr(-1.0), 0.1, scale=UNIT)
    np.testing.assert_allclose(y[1:3], [at_one, -at_one], rtol=1e-13)
    assert y[0] == 0 and abs(log_slope[0]) < 1e-15 and y[3] > 15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("index", INDICES)
def test_continuously_differentiable_and_finite(backend, index, dtype):
    """At zero, where |z| has a kink, at the start of the linear part, and far out; with the round trip."""
    eps = np.finfo(dtype).eps
    z = np.array([0, 8, -8], dtype)
    z = np.concatenate([np.nextafter(z, z.dtype.type(-9)), z, np.nextafter(z, z.dtype.type(9))])
    z = np.concatenate([z, np.array([0.5, -2, 7, -7.5, 9, 100, -1e3, 1e6, -1e6], dtype)])
    theta = theta_of(*index)

    def value(theta, z):
        y, log_slope, curvature = TAILS.forward_with_curvature(theta, z)
        return log_slope.sum(), (y, log_slope, curvature, *TAILS.inverse(theta, y))

    def total(theta, z):
        return TAILS.forward(theta, z)[0].sum(), ()

    both = compiled(backend, lambda t, z: (gradient(backend, value, t, z), gradient(backend, total, t, z)[1]))
    out = to_numpy(backend, both(*on(backend, (theta, z), dtype)))
    ((y, log_slope, curvature, back, inverse), (for_theta, by_autodiff)), (value_theta, slope) = out
    for a in (y, log_slope, curvature, back, inverse, for_theta, by_autodiff, value_theta, slope):
        assert a.dtype == dtype and np.all(np.isfinite(a))
    assert_close(curvature, by_autodiff, 300 * eps)
    np.testing.assert_allclose(np.log(slope), log_slope, atol=200 * eps)
    assert np.max(np.abs(back - z) / (1 + np.abs(z))) < 200 * eps
    assert_close(inverse, -log_slope, 1000 * eps)
    for i in range(3):  # below, at and above a seam
        np.testing.assert_allclose(y[i + 3], y[[i, i + 6]], rtol=100 * eps, atol=100 * eps)
        np.testing.assert_allclose(log_slope[i + 3], log_slope[[i, i + 6]], atol=1000 * eps)


def test_inverse_has_derivatives_at_zero_and_beyond(backend):
    """Of x and of the log-slope, in the value and in the tail index, against differences."""
    y = np.float64([-1e4, -2.0, 0.0, 1e-9, 0.7, 20.0, 1e8])
    theta = theta_of(0.3, 0.2) + np.zeros((2, len(y)))

    def loss(theta, y):
        x, log_slope = TAILS.inverse(theta, y)
        return (x + 0.1 * log_slope).sum(), ()

    grads = to_numpy(
        backend, compiled(backend, lambda t, y: gradient(backend, loss, t, y)[1])(*on(backend, (theta, y)))
    )
    total = lambda theta, y: (lambda x, s: x + 0.1 * s)(*TAILS.inverse(theta, y))
    h = 1e-6
    for i in range(2):
        step = h * (np.arange(2) == i)[:, None]
        assert_close(grads[0][i], (total(theta + step, y) - total(theta - step, y)) / (2 * h), 1e-7)
    k = np.array([1, 4, 5])  # not where the log-slope has a kink
    assert_close(grads[1][k], ((total(theta, y + h) - total(theta, y - h)) / (2 * h))[k], 1e-7)
