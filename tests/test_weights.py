import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flowppl import weights

INF = np.inf
LOG_W = np.array([[0.0, 1.0, -INF, 2.0], [-INF] * 4, [-INF, 5.0, -INF, -INF], [700.0, 701.0, 702.0, -800.0]])

log_weights = st.lists(st.floats(-50, 50) | st.just(-INF), min_size=1, max_size=12)


def test_log_mean_exp(backend, f64):
    expected = [np.log((1 + np.e + np.e**2) / 4), -INF, 5 - np.log(4), 702 + np.log((1 + np.exp(-1) + np.exp(-2)) / 4)]
    np.testing.assert_allclose(backend.to_numpy(weights.log_mean_exp(f64(LOG_W))), expected, rtol=1e-14)
    np.testing.assert_allclose(backend.to_numpy(weights.log_mean_exp(f64(LOG_W.T), axis=0)), expected, rtol=1e-14)


def test_log_mean_exp_has_finite_derivatives_where_none_counts(backend, f64):
    _, pull = backend.vjp(weights.log_mean_exp, f64(LOG_W))
    (grad,) = pull(f64(np.ones(4)))
    expected = backend.to_numpy(weights.normalize(f64(LOG_W)))
    np.testing.assert_allclose(backend.to_numpy(grad), expected, rtol=1e-13)


def test_normalize(backend, f64):
    w = backend.to_numpy(weights.normalize(f64(LOG_W)))
    np.testing.assert_allclose(w.sum(-1), [1, 0, 1, 1], rtol=1e-14)
    np.testing.assert_allclose(w[0], np.array([1, np.e, 0, np.e**2]) / (1 + np.e + np.e**2), rtol=1e-14)
    np.testing.assert_allclose(backend.to_numpy(weights.normalize(f64(LOG_W.T), axis=0)).T, w, rtol=1e-14)


def test_ess(backend, f64):
    e = np.exp([0.0, 1.0, 2.0])
    kish = e.sum() ** 2 / (e**2).sum()
    np.testing.assert_allclose(backend.to_numpy(weights.ess(f64(LOG_W))), [kish, 0, 1, kish], rtol=1e-13)
    np.testing.assert_allclose(backend.to_numpy(weights.ess(f64(LOG_W.T), axis=0)), [kish, 0, 1, kish], rtol=1e-13)


def test_ess_in_float32_far_from_zero(backend, f32):
    """2 logsumexp(w) - logsumexp(2 w) would lose all digits here."""
    np.testing.assert_allclose(backend.to_numpy(weights.ess(f32([1e6, 1e6, -1e6, 1e6]))), 3.0, rtol=1e-6)
    assert weights.ess(f32([0.0])).dtype == weights.log_mean_exp(f32([0.0])).dtype == f32(0.0).dtype


@given(log_weights)
@settings(max_examples=50, deadline=None)
def test_ess_is_between_one_and_the_number_of_particles(log_w):
    value = float(weights.ess(np.array(log_w)))
    assert value == 0 if max(log_w) == -INF else 1 - 1e-12 <= value <= len(log_w) * (1 + 1e-12)


@given(log_weights, st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_systematic_resampling_rounds_the_expected_counts(log_w, n, seed):
    log_w = np.array(log_w)
    idx = weights.resample_systematic(np.random.default_rng(seed), log_w, n=n)
    assert idx.shape == (n,) and np.all(np.diff(idx) >= 0)
    counts = np.bincount(idx, minlength=len(log_w))
    w = weights.normalize(log_w) if log_w.max() > -INF else np.full(len(log_w), 1 / len(log_w))
    assert np.all(np.abs(counts - n * w) < 1 + 1e-9)
    assert np.all(counts[w == 0] == 0)


@pytest.mark.parametrize("resample", [weights.resample_systematic, weights.resample_multinomial])
def test_resampling_is_unbiased(backend, f64, make_rng, resample):
    """One index of each of many independent resamplings: its counts are multinomial (chi-square, false alarms 1e-4)."""
    rows, p = 20_000, np.array([0.05, 0.5, 0.0, 0.15, 0.3])
    with np.errstate(divide="ignore"):
        log_w = f64(np.tile(np.log(p) + 3.0, (rows, 1)))
    idx = backend.to_numpy(resample(make_rng(1), log_w, n=4))
    assert idx.shape == (rows, 4)
    one = idx[np.arange(rows), np.random.default_rng(0).integers(0, 4, rows)]
    counts = np.bincount(one, minlength=5)
    assert counts[2] == 0
    assert stats.chisquare(counts[p > 0], rows * p[p > 0]).pvalue > 1e-4


@pytest.mark.parametrize("resample", [weights.resample_systematic, weights.resample_multinomial])
def test_resampling_along_an_axis(backend, f64, make_rng, resample):
    log_w = np.full((5, 2, 3), -INF)
    alive = np.array([[0, 1, 2], [3, 4, 0]])
    for b in range(2):
        for c in range(3):
            log_w[alive[b, c], b, c] = -7.0
    idx = backend.to_numpy(resample(make_rng(0), f64(log_w), n=4, axis=0))
    np.testing.assert_array_equal(idx, np.broadcast_to(alive, (4, 2, 3)))
    assert resample(make_rng(0), f64(log_w)).shape == (5, 2, 3)


@pytest.mark.parametrize("resample", [weights.resample_systematic, weights.resample_multinomial])
def test_dead_particles_all_do_alike(backend, f64, make_rng, resample):
    idx = backend.to_numpy(resample(make_rng(0), f64(np.full((4000, 3), -INF))))
    assert stats.chisquare(np.bincount(idx.ravel(), minlength=3)).pvalue > 1e-4


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")
def test_points_at_the_ends_pick_no_particle_of_weight_zero(backend, f32, monkeypatch):
    """Draws of zero, and of almost one, which added to n - 1 and divided by n rounds to one in float32."""
    log_w = f32([-INF] * 2 + [0.0] * 98 + [-INF] * 3)
    for resample in (weights.resample_systematic, weights.resample_multinomial):
        for draw in (0.0, np.float32(1) - np.finfo(np.float32).eps / 2):
            monkeypatch.setattr(backend, "uniform", lambda rng, shape, like, draw=draw: f32(np.full(shape, draw)))
            idx = backend.to_numpy(resample(None, log_w, n=50))
            assert idx.min() >= 2 and idx.max() <= 99
            assert idx[0] == 2 if draw == 0 else idx[-1] == 99


def test_resampling_repeats_with_its_seed(backend, f64, make_rng):
    log_w = f64(np.linspace(-1, 1, 50))
    first, again, other = (backend.to_numpy(weights.resample_multinomial(make_rng(s), log_w)) for s in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.3, 0.7, 1.2])
def test_psis_finds_the_shape_of_a_generalized_pareto(shape):
    """The tail's 900 excesses: sd (1 + shape) / 30, as by maximum likelihood, less where negative; the prior's pull is 0.01."""
    w = stats.genpareto.rvs(shape, size=90_000, random_state=0)
    assert abs(weights.psis(np.log(w))[1] - shape) < 4 * (1 + max(shape, 0)) / 30 + 0.01


@pytest.mark.parametrize("n", [30, 1000, 5000])
def test_psis_is_arviz_psislw(n):
    arviz = pytest.importorskip("arviz", minversion="0.23", reason="arviz is not installed")
    if not hasattr(arviz, "psislw"):
        pytest.skip("this arviz has no psislw")
    rng = np.random.default_rng(n)
    for log_w in (rng.normal(size=n), 3 * rng.normal(size=n), 700 + rng.exponential(size=n), -rng.exponential(size=n)):
        expected, k = arviz.psislw(log_w.copy(), normalize=False)
        out, own = weights.psis(log_w)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
        assert own == pytest.approx(float(k), rel=1e-10)


def test_psis_smooths_the_tail_only(backend, f64):
    log_w = np.random.default_rng(0).normal(size=1000) * 3 - 1000
    log_w[::10] = -INF
    out, k = weights.psis(f64(log_w))
    assert isinstance(out, np.ndarray) and k == weights.psis(log_w)[1] > 0.5
    order = np.argsort(log_w)
    np.testing.assert_array_equal(out[order[:-95]], log_w[order[:-95]])
    assert (
        np.all(np.diff(out[order[-95:]]) >= 0)
        and out.max() <= log_w.max()
        and np.all(out[order[-50:-1]] != log_w[order[-50:-1]])
    )


def test_psis_without_a_tail():
    assert weights.psis(np.full(100, 3.0))[1] == -INF
    assert weights.psis(np.full(100, -INF))[1] == INF
    assert weights.psis(np.arange(10.0))[1] == INF
    assert weights.psis(np.where(np.arange(100) < 3, 0.0, -INF))[1] == INF
    assert weights.psis_limit(100) == pytest.approx(0.5) and weights.psis_limit(10**6) == 0.7


def test_psis_fits_an_exponential_tail_as_a_limit():
    """This largest excess puts a point of the fit's grid at b = 0 exactly, where the rate b / shape is 0 / 0."""
    shape, scale = weights._fit_pareto(np.array([1.0, 1.2, 1.3, 1.4, 1.8000000000000003]))
    nearby = weights._fit_pareto(np.array([1.0, 1.2, 1.3, 1.4, 1.80000001]))
    assert (shape, scale) == pytest.approx(nearby, rel=1e-6)
