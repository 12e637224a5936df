"""Contractive residual maps: the certificate, the determinant's shortcuts, the sweeps' bound, and the roulette."""

import math

import numpy as np
import pytest
from scipy.stats import chi2

from flowppl import tree
from flowppl.bijections import bind, watch_solves
from flowppl.bijections.residual import Residual
from flowppl.bijections.roulette import roulette_log_det
from flowppl.networks.lipschitz import LipschitzMLP, spectral_bound
from tests.registry import gradient, on, to_numpy

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for minutes


def bound_of(bijection, scale=1.0, noise=0.5):
    rng = np.random.default_rng(0)
    params = bind(bijection.init(rng))
    return tree.map(lambda p: scale * (p + noise * rng.standard_normal(p.shape)), params)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (40, 3), (30, 30)])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_spectral_bound_is_one_and_is_tight(shape, size):
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal(shape), np.ones(shape), np.eye(*shape)]  # the last: all singular values alike
    for w in matrices:
        ratio = spectral_bound(size * w) / (size * np.linalg.norm(w, 2))
        assert 1 - 1e-13 <= ratio <= min(shape) ** (1 / 128) + 1e-13


def test_spectral_bound_has_the_norms_gradient_and_none_at_zero(backend):
    rng = np.random.default_rng(0)
    w = 1e-3 * rng.standard_normal((4, 6)) + np.outer([1, 2, 0, 0], [1, 0, 0, 0, 0, 1])  # one large singular value
    u, _, v = np.linalg.svd(w)
    _, (g,) = gradient(backend, lambda w: (spectral_bound(w), 0), on(backend, w))
    np.testing.assert_allclose(backend.to_numpy(g), np.outer(u[:, 0], v[0]), atol=1e-6)
    value, (g,) = gradient(backend, lambda w: (spectral_bound(w),) * 2, on(backend, 0 * w))
    assert value == 0 and not backend.to_numpy(g).any()


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_lipschitz_constant_is_certified(scale):
    """The largest singular value over many points is within the bound, and at large weights not far below the limits' product."""
    g = LipschitzMLP(6, (32, 32), 0.9)
    rng = np.random.default_rng(0)
    params = tree.map(lambda p: scale * (p + rng.standard_normal(p.shape)), g.init(rng))
    layers = g.constrain(params)
    norms = [np.linalg.norm(w, 2) for w, _ in layers]
    assert math.prod(norms) <= 0.9 * (1 + 1e-12)
    assert scale < 1 or math.prod(norms) > 0.85
    x = 3 * rng.standard_normal((200, 6))
    _, slopes = g.apply(layers, x)
    assert all(np.all(s <= 1) and np.all(s > -0.1) for s in slopes)
    ends = g.apply(layers, x)[0], g.apply(layers, x[::-1])[0]
    assert np.all(np.linalg.norm(ends[0] - ends[1], axis=-1) <= 0.9 * np.linalg.norm(x - x[::-1], axis=-1))


@pytest.mark.parametrize("hidden", [(4,), (9,), (4, 9), (9, 4), (9, 4, 7), (9, 9, 8)])
def test_log_det_at_every_cut(hidden):
    """The determinant of the narrowest matrix is that of the whole one."""
    bijection = Residual(5, 2, hidden)
    params, rng = bound_of(bijection), np.random.default_rng(1)
    x, context = rng.standard_normal((7, 5)), rng.standard_normal((7, 2))
    layers = bijection.layers(params, context)
    _, slopes = bijection._g.apply(layers, x)
    jacobian = layers[0][0]
    for (weight, _), slope in zip(layers[1:], slopes, strict=True):
        jacobian = weight @ (slope[..., None] * jacobian)
    exact = np.linalg.slogdet(np.eye(5) + jacobian)[1]
    assert bijection._turned(layers, slopes).shape[-1] == min(5, *hidden)
    np.testing.assert_allclose(bijection.forward(params, x, context)[1], exact, atol=1e-13)
    u = rng.standard_normal((7, 5))
    np.testing.assert_allclose(bijection._g.pull(layers, slopes, u), np.einsum("nij,ni->nj", jacobian, u), atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_inverse_converges_within_its_bound(dtype, scale):
    bijection = Residual(4, hidden=(16, 16), contraction=0.97)
    params = tree.map(lambda p: p.astype(dtype), bound_of(bijection, scale))
    x = np.random.default_rng(1).standard_normal((50, 4)).astype(dtype)
    x = np.concatenate([x, 1e3 * x, 1e6 * x, np.full((1, 4), -1e6, dtype)])
    y, log_det = bijection.forward(params, x)
    with watch_solves() as solves:
        back, inverse_log_det = bijection.inverse(params, y)
    assert len(solves) == 1
    size = 1 + np.max(np.abs(x), axis=-1)
    error = np.max(np.abs(back - x), axis=-1) / size
    assert back.dtype == dtype and np.all(error <= 100 * np.finfo(dtype).eps)
    assert np.all(np.isfinite(log_det)) and np.all(np.isfinite(inverse_log_det))


def test_slow_contraction_converges_within_the_steps():
    """Each sweep shrinks the error by 0.9 / 1.1 only, the activation's slope far out: still as exact."""
    bijection = Residual(1, hidden=(1,), contraction=0.9)
    weight = np.float64([[1e3]])
    layers = {"weight": weight, "bias": np.float64([1e3])}, {"weight": -weight, "bias": np.zeros(1)}
    params = {"g": {"layers": layers}}
    x = np.float64([[0.3], [20.0]])
    y, _ = bijection.forward(params, x)
    with watch_solves() as solves:
        back, _ = bijection.inverse(params, y)
    assert 100 < solves[0].steps < 364 and solves[0].unsolved == 0
    np.testing.assert_allclose(back, x, atol=1e-10)


@pytest.mark.parametrize("options", [{"contraction": 1.0}, {"contraction": 0.0}, {"hidden": ()}])
def test_refusals(options):
    with pytest.raises(ValueError, match=r"contraction must|hidden must"):
        Residual(3, **options)


# Roulette


def steep(context_dim=0):
    """A map whose power series needs many terms: J is not far from -0.8 times the identity."""
    bijection = Residual(3, context_dim, (8,), contraction=0.9)
    params, rng = bound_of(bijection, noise=0.2), np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((8, 3)))
    first, last = params["g"]["layers"]
    first = {"weight": 20 * q + first["weight"], "bias": first["bias"] + 1}
    params["g"]["layers"] = (first, {**last, "weight": last["weight"] - 20 * q.T})
    return bijection, params


POINTS = 0.3 * np.random.default_rng(2).standard_normal((4, 3))


def draws(backend, make_rng, calls, copies=10):
    """Means over the copies of log-det and of its gradients in x and the first weight: (calls, numbers), and the exact ones."""
    (bijection, params), x, points = steep(), POINTS, len(POINTS)
    params, x = on(backend, (params, x))
    xp = backend.xp

    def summary(estimate):
        def total(params, x):
            log_det = estimate(params, x)
            return xp.sum(log_det), xp.mean(xp.reshape(log_det, (-1, points)), axis=0)

        return total

    def flat(values, grads, n):
        in_x = xp.reshape(grads[1], (n, -1, 3)).sum(0) / n if n > 1 else grads[1]
        parts = values, in_x, grads[0]["g"]["layers"][0]["weight"] / n
        return xp.concat([xp.reshape(a, (-1,)) for a in parts])

    exact = flat(*gradient(backend, summary(lambda p, x: bijection.forward(p, x)[1]), params, x), 1)
    many = xp.concat([x] * copies, axis=0)

    def one(key):
        estimate = summary(lambda p, x: roulette_log_det(key, bijection, p, x, exact_terms=0))
        return flat(*gradient(backend, estimate, params, many), copies)

    if backend.name == "jax":
        import jax

        estimates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), calls))
    else:
        key = make_rng(0)
        estimates = xp.stack([one(key) for _ in range(calls)])
    return to_numpy(backend, estimates), to_numpy(backend, exact)


def statistic(estimates, exact):
    """Hotelling's: about a chi-square of as many degrees of freedom as there are numbers, where the mean is right."""
    error = estimates.mean(0) - exact
    return len(estimates) * error @ np.linalg.solve(np.cov(estimates.T), error)


def without_weights():
    """What the series would average to, were its terms not divided by their probabilities."""
    bijection, params = steep()
    layers = bijection.layers(params, None)
    _, (slope,) = bijection._g.apply(layers, POINTS)
    jacobian = layers[1][0] @ (slope[..., None] * layers[0][0])
    eigenvalues = np.linalg.eigvals(jacobian)
    return np.sum(np.log1p(0.9 * eigenvalues), axis=-1).real  # P(N >= k) = 0.9^k


def test_roulette_is_unbiased_with_its_gradients(backend, make_rng):
    estimates, exact = draws(backend, make_rng, 400)
    assert statistic(estimates[:, :16], exact[:16]) < chi2.ppf(1 - 1e-3, 16)
    # The weights' gradients are dependent, hence one by one: |z| beyond 4.5 has probability 7e-6.
    rest = estimates[:, 16:]
    assert np.all(np.abs(rest.mean(0) - exact[16:]) < 4.5 * rest.std(0) / math.sqrt(len(rest)))
    # The same draws would tell if the weights were missing.
    assert statistic(estimates[:, :4], without_weights()) > 2 * chi2.ppf(1 - 1e-3, 4)


def test_roulette_takes_a_context_and_numpy():
    bijection, params = steep(2)
    rng = np.random.default_rng(0)
    x, context = np.zeros((5, 3)), rng.standard_normal((2, 1, 2))
    estimates = np.stack([roulette_log_det(rng, bijection, params, x, context, exact_terms=30) for _ in range(300)])
    assert estimates.shape == (300, 2, 5)
    exact = bijection.forward(params, x, context)[1]
    assert np.all(np.abs(estimates.mean(0) - exact) < 4.5 * estimates.std(0) / math.sqrt(300))
