"""Deep sigmoids and sums of squares: closed forms, extremes, inverses. Points and parameters come from fixed seeds."""

import numpy as np
import pytest
from scipy import integrate, special

from flowppl.bijections import Composed, watch_solves
from flowppl.bijections.deep_sigmoid import DeepSigmoid
from flowppl.bijections.polynomial import SumOfSquares
from tests.registry import assert_close, compiled, gradient, on, to_numpy

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for minutes

SIGMOID, SQUARES = DeepSigmoid(4), SumOfSquares()
ALL = {
    "sigmoid": SIGMOID,
    "squares": SQUARES,
    "cubes": SumOfSquares(3, 3),
    "deep": Composed(DeepSigmoid(3), DeepSigmoid(2)),
}


def theta_of(transformer, shape=(1,), scale=1.0, seed=0):
    return scale * np.random.default_rng(seed).standard_normal((transformer.num_params, *shape))


def mixture(theta, x):
    """logit of the mixture of sigmoids as one would write it: right where nothing saturates."""
    ratios = 2 * np.arange(1, 5)[:, None] / 5
    clip = lambda t, bound: t / (1 + np.abs(t) / bound)
    a, b, w = (t * ratios for t in theta.reshape(3, 4, -1))
    a, b, w = np.exp(clip(a, np.log(100))), clip(b, 20), clip(w, np.log(1e3) / 2)
    return special.logit(np.sum(special.softmax(w, axis=0) * special.expit(a * x + b), axis=0))


def squares(theta, x):
    """The integral by quadrature."""
    clip = lambda t: t / (1 + np.abs(t) / 30)
    q = clip(theta[:-1, 0].reshape(3, 2))

    def slope(u):
        roots = [1 + sum(q[i, k] * (u / (k + 2)) ** i for i in range(3)) for k in range(2)]
        return 1e-3 + (1 - 1e-3) * np.mean(np.square(roots))

    return np.float64([theta[-1, 0] + integrate.quad(slope, 0, u, epsrel=1e-13)[0] for u in x])


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")
@pytest.mark.parametrize(("name", "oracle"), [("sigmoid", mixture), ("squares", squares)])
def test_value(backend, name, oracle):
    x, theta = np.linspace(-4, 4, 41), theta_of(ALL[name])
    y = backend.to_numpy(backend.jit(ALL[name].forward)(*on(backend, (theta, x)))[0])
    assert_close(y, oracle(theta, x), 1e-10)
    assert np.max(np.abs(y - x)) > 0.5


@pytest.mark.parametrize("name", ALL)
def test_zero_parameters_are_the_identity(backend, name):
    x = np.float64([-1e6, -40.0, -1.0, 0.0, 1e-3, 7.0, 1e3])
    args = on(backend, (np.zeros((ALL[name].num_params, 1)), x))
    both = compiled(backend, lambda theta, x: [ALL[name].forward(theta, x), ALL[name].inverse(theta, x)])
    for value, log_slope in to_numpy(backend, both(*args)):
        np.testing.assert_allclose(value, x, rtol=1e-13, atol=1e-14)
        assert_close(log_slope, 0 * x, 1e-13)


@pytest.mark.parametrize("name", ALL)
def test_units_part(backend, name):
    """Parameters that do the same at the start have gradients that are not the same, or they would stay together."""
    transformer = ALL[name]
    x = on(backend, np.linspace(-2, 3, 50))

    def loss(theta):
        y, log_slope = transformer.forward(theta, x)
        return (0.5 * y * y - log_slope).mean(), ()

    theta = np.zeros((transformer.num_params, 1))
    step = compiled(backend, lambda theta: gradient(backend, loss, theta)[1][0])
    for _ in range(3):
        theta = theta - 0.1 * backend.to_numpy(step(on(backend, theta)))
    n = getattr(transformer, "units", getattr(transformer, "polynomials", 3))
    alike = theta[n : 2 * n, 0]  # shifts of units, or linear coefficients
    assert np.min(np.abs(np.diff(alike))) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_curvature_and_inverse(backend, name):
    """Against autodiff, at points near and far, each with parameters of its own."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-6, 6, 300), [0.0, -1e3, 1e4]])
    theta = theta_of(ALL[name], x.shape, 0.7)

    def value(theta, x):
        y, log_slope, curvature = ALL[name].forward_with_curvature(theta, x)
        return log_slope.sum(), (y, log_slope, curvature, *ALL[name].forward(theta, x), *ALL[name].inverse(theta, y))

    (y, log_slope, curvature, *again, back, inverse), (_, exact) = to_numpy(
        backend, compiled(backend, lambda t, x: gradient(backend, value, t, x))(*on(backend, (theta, x)))
    )
    assert_close(curvature, exact, 1e-10)
    assert_close((y, log_slope), tuple(again), 1e-12)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-10 * float(np.exp(-np.min(log_slope))))
    assert_close(inverse, -log_slope, 1e-8)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("name", ["sigmoid", "squares"])
def test_float32_is_finite(backend, name, direction):
    """Values and gradients, also at parameters in the hundreds, far out and at the values that far points have."""
    x = np.float32([-1e6, -1e3, -30, -1, -1e-6, 0, 1e-6, 0.3, 5, 200, 1e6])[:, None] + np.zeros(200, np.float32)

    def loss(theta, x):
        y, log_slope = getattr(ALL[name], direction)(theta, x)
        return log_slope.sum() + (y / (1 + abs(y))).sum(), (y, log_slope)

    f = compiled(backend, lambda t, x: gradient(backend, loss, t, x))
    for scale in (1.0, 10.0, 300.0):
        out = to_numpy(backend, f(*on(backend, (theta_of(ALL[name], (1, 200), scale), x), np.float32)))
        for a in (*out[0], *out[1]):
            assert a.dtype == np.float32 and np.all(np.isfinite(a)), scale


def test_sigmoids_do_not_saturate(backend):
    """A thousand units out, where S is one in any precision, the slope is that of the widest unit and the inverse is exact."""
    theta = theta_of(SIGMOID, (50,))
    for dtype, tol in (("float64", 1e-13), ("float32", 1e-5)):
        x = np.float64([-1e6, -1e3, 1e3, 1e6])[:, None] + np.zeros(50)

        def there_and_back(theta, x):
            y, log_slope = SIGMOID.forward(theta, x)
            return log_slope, SIGMOID.inverse(theta, y)[0], SIGMOID._unpack(theta).scale

        f = compiled(backend, there_and_back)
        log_slope, back, scale = to_numpy(backend, f(*on(backend, (theta[:, None], x), dtype)))
        assert_close(log_slope[[0, 3]], np.log(np.broadcast_to(np.min(scale, axis=0), (2, 50))), tol)
        np.testing.assert_allclose(back, x, rtol=10 * tol)


@pytest.mark.parametrize("backend", ["torch", "numpy"], indirect=True, scope="session")  # eager: somebody watches
def test_the_search_of_the_sum_of_squares_finds_its_bracket(backend):
    """Values of all sizes, none unsolved, where no bracket is given."""
    y = np.float64([-1e30, -1e9, -30.0, -1e-3, 0.0, 1e-12, 2.0, 1e4, 1e20, 1e30])
    theta = on(backend, theta_of(SQUARES))
    with watch_solves() as solves:
        x, _ = SQUARES.inverse(theta, on(backend, y))
    assert [s.unsolved for s in solves] == [0] and solves[0].steps < 40
    np.testing.assert_allclose(backend.to_numpy(SQUARES.forward(theta, x)[0]), y, rtol=1e-10, atol=1e-12)


def test_every_slope_is_positive(backend):
    """Also where a polynomial is -1 and its square adds nothing."""
    theta = np.zeros((SumOfSquares(1, 1).num_params, 1))
    theta[1] = 1.0  # 1 + q(u) = 1 + u / 2 / (1 + 1 / 30)
    x = on(backend, np.float64([-2 * (1 + 1 / 30)]))
    _, log_slope = SumOfSquares(1, 1).forward(on(backend, theta), x)
    assert_close(backend.to_numpy(log_slope), np.log([1e-3]), 1e-12)


def test_refuses_what_is_none():
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        DeepSigmoid(0)
    with pytest.raises(ValueError, match="polynomials and degree must be at least 1"):
        SumOfSquares(degree=0)
