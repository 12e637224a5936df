"""Pathfinder and its polish, on densities with a known answer."""

import numpy as np
import pytest

from flowppl.errors import NonFiniteError
from flowppl.laplace import Evaluations, Root, antithetic, newton
from flowppl.pathfinder import one_turn, pathfinder

pytestmark = pytest.mark.slow  # numpy alone: once is enough


def normal(loc, root):
    """Log density, up to a constant, and score of N(loc, root root^T)."""
    inverse = np.linalg.inv(root)

    def density(x):
        z = (x - loc) @ inverse.T
        return -0.5 * (z * z).sum(-1), -z @ inverse

    return density


def log_z(root):
    return np.linalg.slogdet(root)[1] + 0.5 * len(root) * np.log(2 * np.pi)


def errors(found, loc, root):
    """Of the location, in standard deviations, and of the covariance, in whitened coordinates."""
    whitened = np.linalg.solve(root, found.scale_tril)
    away = np.linalg.solve(root, found.loc - loc)
    return np.abs(away).max(), np.abs(whitened @ whitened.T - np.eye(len(loc))).max()


def units(d, correlation):
    """A root with standard deviations from 1e-6 to 1e6 and one correlation between all coordinates."""
    return 10.0 ** np.linspace(-6, 6, d)[:, None] * np.linalg.cholesky(
        correlation * np.ones((d, d)) + (1 - correlation) * np.eye(d)
    )


@pytest.mark.parametrize(
    "root",
    [
        np.linalg.cholesky([[1.0, 0.99999], [0.99999, 1.0]]),
        units(7, 0.0),
        units(7, 0.99999),
        units(30, 0.9),
        [[1e-6]],
        np.eye(3),
    ],
    ids=["correlated", "units", "units, correlated", "30 units", "one", "standard"],
)
def test_a_normal_is_found_exactly(root):
    root = np.asarray(root)
    loc = 3 * root @ np.random.default_rng(0).standard_normal(len(root))
    found = pathfinder(normal(loc, root), np.zeros(len(root)))
    of_loc, of_covariance = errors(found, loc, root)
    assert of_loc < 1e-6 and of_covariance < 1e-6
    assert np.array_equal(found.scale_tril, np.tril(found.scale_tril)) and (np.diagonal(found.scale_tril) > 0).all()
    assert found.elbo == pytest.approx(log_z(root), abs=1e-6)  # no Monte Carlo error where p and q are parallel


def test_one_path_alone_gets_there_by_newton():
    """Without L-BFGS and without steps on the ELBO: the differences of scores follow the scales."""
    root, loc = units(5, 0.99), 1e3 * units(5, 0.99) @ np.ones(5)
    noise = antithetic(np.random.default_rng(0), 32, 5)
    found = newton(Evaluations(normal(loc, root)), Root(np.zeros(5), np.eye(5)), noise)
    np.testing.assert_allclose(np.linalg.solve(root, found.loc - loc), 0.0, atol=1e-6)
    np.testing.assert_allclose(found.scale_tril(), root, rtol=1e-6)


def test_float32_evaluations_suffice_for_a_tame_density():
    rng = np.random.default_rng(1)
    root = np.linalg.cholesky(np.cov(rng.standard_normal((6, 30))))
    loc = rng.standard_normal(6)
    exact = normal(loc, root)

    def rounded(x):
        value, score = exact(x.astype(np.float32).astype(float))
        return value.astype(np.float32).astype(float) - 1000.0, score.astype(np.float32).astype(float)

    of_loc, of_covariance = errors(pathfinder(rounded, np.zeros(6)), loc, root)
    assert of_loc < 1e-3 and of_covariance < 1e-3
    alone = newton(Evaluations(rounded), Root(np.zeros(6), np.eye(6)), antithetic(rng, 32, 6)).scale_tril()
    np.testing.assert_allclose(alone, root, atol=1e-3)


def test_an_improper_direction_stays_finite():
    def flat_in_the_difference(x):
        total = x[:, 0] + x[:, 1] - 3.0
        score = np.stack([-total / 1e-4, -total / 1e-4, -x[:, 2]], -1)
        return -0.5 * total**2 / 1e-4 - 0.5 * x[:, 2] ** 2, score

    found = pathfinder(flat_in_the_difference, np.zeros(3))
    assert np.isfinite(found.scale_tril).all() and np.isfinite(found.elbo)
    total = np.array([1.0, 1.0, 0.0])
    assert total @ found.loc == pytest.approx(3.0, abs=1e-3)  # a tenth of the total's standard deviation
    assert np.linalg.norm(found.scale_tril.T @ total) == pytest.approx(0.01, rel=1e-2)
    assert np.linalg.norm(found.scale_tril[2]) == pytest.approx(1.0, rel=1e-6)
    assert np.abs(found.scale_tril).max() > 100.0  # flat, and known to be


def test_an_angle_counts_once():
    """A von Mises density of concentration 1 at 0.5, beside a normal: the evidence bounds the ELBO."""

    def periodic(x):
        angle, real = x.T
        return np.cos(angle - 0.5) - 0.5 * real**2, np.stack([-np.sin(angle - 0.5), -real], -1)

    density = one_turn(periodic, np.array([True, False]), np.zeros(2))
    turns = np.stack([1.3 + 2 * np.pi * np.arange(-20, 21), np.zeros(41)], -1)
    assert np.logaddexp.reduce(density(turns)[0]) == pytest.approx(periodic(turns[:1])[0][0], abs=1e-9)
    x, step = np.array([[2.0, 1.0], [-300.0, 0.0]]), np.array([1e-6, 0.0])
    slope = (density(x + step)[0] - density(x - step)[0]) / 2e-6
    np.testing.assert_allclose(density(x)[1][:, 0], slope, atol=1e-7)
    found = pathfinder(density, np.zeros(2))
    evidence = np.log(2 * np.pi * np.i0(1.0)) + 0.5 * np.log(2 * np.pi)
    assert evidence - 0.2 < found.elbo < evidence
    assert abs(found.loc[0] - 0.5) < 0.3


def test_no_curvature_at_all():
    found = pathfinder(lambda x: (np.zeros(len(x)), np.zeros_like(x)), np.ones(2))
    assert np.isfinite(found.scale_tril).all() and (np.diagonal(found.scale_tril) > 0).all()


def funnel(x):
    """Neal's funnel: v ~ N(0, 3), nine z ~ N(0, exp(v / 2))."""
    v, z = x[:, 0], x[:, 1:]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (z * z).sum(-1) * np.exp(-v)
        score = np.concatenate([(-v / 9 + 0.5 * squares - 4.5)[:, None], -z * np.exp(-v)[:, None]], -1)
    return -v * v / 18 - 0.5 * squares - 4.5 * v, score


def test_a_funnel():
    found = pathfinder(funnel, np.zeros(10))
    # The log of its integral is log 3 + 5 log(2 pi) = 10.29. Laplace's approximation at the point of the highest ELBO along
    # the climb from the start reaches 4.12; the ELBO of any normal of independent coordinates is at most 8.35.
    assert 8.0 < found.elbo < 8.5
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((20_000, 10))
    log_q = -0.5 * (noise**2).sum(-1) - log_z(found.scale_tril)
    again = funnel(found.loc + noise @ found.scale_tril.T)[0] - log_q
    error = np.std(again) * np.sqrt(1 / 20_000 + 1 / 256)
    assert abs(found.elbo - np.mean(again)) < 4 * error  # false alarms: 6e-5


def local_level(y):
    """Log density, up to a constant, and score of log noise, log drift and the levels of a random walk behind y: a funnel.

    The walk begins at N(1000, 500^2); noise and drift are half-normal with scale 200.
    """
    n = len(y)

    def density(points):
        logs, x = points[:, :2], points[:, 2:]
        with np.errstate(all="ignore"):
            noise, drift = np.exp(logs.T)
            rest, steps = (y - x) / noise[:, None], np.diff(x, axis=1) / drift[:, None]
            score = rest / noise[:, None]
            score[:, 1:] -= steps / drift[:, None]
            score[:, :-1] += steps / drift[:, None]
            score[:, 0] -= (x[:, 0] - 1000) / 500**2
            of_noise = (rest**2).sum(1) - (noise / 200) ** 2 - (n - 1)
            of_drift = (steps**2).sum(1) - (drift / 200) ** 2 - (n - 2)
            squares = (rest**2).sum(1) + (steps**2).sum(1) + (noise**2 + drift**2) / 200**2
            value = -0.5 * (squares + ((x[:, 0] - 1000) / 500) ** 2) - (n - 1) * logs[:, 0] - (n - 2) * logs[:, 1]
        return value, np.concatenate([of_noise[:, None], of_drift[:, None], score], axis=1)

    return density


def evidence_of_local_level(y):
    """By quadrature over noise and drift; the levels are normal given those."""
    n, at = len(y), np.linspace(np.log(1e-2), np.log(1e3), 150)
    together = np.minimum.outer(np.arange(n), np.arange(n))
    covariance = (
        500**2 + np.exp(2 * at)[None, :, None, None] * together + np.exp(2 * at)[:, None, None, None] * np.eye(n)
    )
    half = np.linalg.slogdet(covariance)[1] / 2 + ((y - 1000) @ np.linalg.inv(covariance) @ (y - 1000)) / 2
    prior = at - np.exp(2 * at) / (2 * 200**2)
    log_p = -half + prior[:, None] + prior + n / 2 * np.log(2 * np.pi) + np.log(500)  # what `density` leaves out
    return np.log(np.exp(log_p - log_p.max()).sum()) + log_p.max() + 2 * np.log(at[1] - at[0])


def test_a_spike_of_little_mass():
    """All paths run to a drift of about one, where the best normal is 9 nats below the evidence; elsewhere it is 1.3."""
    rng = np.random.default_rng(0)
    y = 1000 + np.cumsum(40 * rng.standard_normal(20)) + 120 * rng.standard_normal(20)
    start = np.concatenate([np.log([135.0, 135.0]), np.full(20, 1000.0)])
    log_evidence = evidence_of_local_level(y)
    for seed in range(3):
        found = pathfinder(local_level(y), start, seed)
        assert log_evidence - 2.0 < found.elbo < log_evidence


def two_modes(x):
    """0.9 N(5, 1) + 0.1 N(-3, 1), in two dimensions; zero lies in the worse one's basin."""
    a, b = (np.log(w) - 0.5 * ((x - m) ** 2).sum(-1) for w, m in ((0.9, 5.0), (0.1, -3.0)))
    both = np.logaddexp(a, b)
    share = np.exp(a - both)[:, None]
    return both, -share * (x - 5.0) - (1 - share) * (x + 3.0)


def test_the_better_of_two_modes():
    for seed in range(4):  # of eight seeds one has all of its starts in the worse basin
        found = pathfinder(two_modes, np.zeros(2), seed)
        np.testing.assert_allclose(found.loc, 5.0, atol=1e-3)
        assert found.elbo == pytest.approx(np.log(0.9) + np.log(2 * np.pi), abs=1e-3)


def test_a_collinear_regression():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 1)) * [1.0, 1.0, 1e3] + [0.0, 0.0, 1e5]
    x = np.column_stack([np.ones(50), x[:, 0], x[:, 0] + 1e-4 * rng.standard_normal(50), x[:, 2]])
    y = rng.standard_normal(50)
    precision = x.T @ x + 1e-8 * np.eye(4)
    loc = np.linalg.solve(precision, x.T @ y)
    root = np.linalg.inv(np.linalg.cholesky(precision)).T

    def density(b):
        residual = y - b @ x.T
        return -0.5 * (residual**2).sum(-1) - 0.5e-8 * (b * b).sum(-1), residual @ x - 1e-8 * b

    of_loc, of_covariance = errors(pathfinder(density, np.zeros(4)), loc, root)
    assert of_loc < 1e-2 and of_covariance < 1e-2


def positive_part(x):
    value, score = normal(np.full(2, 3.0), 0.1 * np.eye(2))(x)
    return np.where(x[:, 0] < 1.0, -np.inf, value), score


def test_other_starts_where_the_first_has_no_density():
    of_loc, of_covariance = errors(pathfinder(positive_part, np.zeros(2)), np.full(2, 3.0), 0.1 * np.eye(2))
    assert of_loc < 1e-6 and of_covariance < 1e-6


def test_starts_around_zero_where_the_first_is_absurdly_far_out():
    """Paths from deep in a funnel's neck, where the median of a Gamma(0.01, 0.01) prior may be, do not come back."""

    def density(x):
        log_scale, theta = x[:, 0], x[:, 1:]
        with np.errstate(over="ignore"):
            precision = np.exp(-2 * log_scale)
        squares = (theta**2).sum(-1)
        value = -4 * log_scale - 0.5 * squares * precision - 0.5 * ((theta - 2) ** 2).sum(-1) - 1e-3 * log_scale**2
        of_scale = -4 + squares * precision - 2e-3 * log_scale
        score = np.concatenate([of_scale[:, None], -theta * precision[:, None] - (theta - 2)], -1)
        return value, score

    found = pathfinder(density, np.array([-100.0, 0.0, 0.0, 0.0, 0.0]))
    assert np.abs(found.loc[0]) < 3
    assert found.elbo == pytest.approx(pathfinder(density, np.zeros(5)).elbo, abs=0.1)


def test_a_density_that_ends_beside_its_mode():
    """Every normal has an ELBO of minus infinity; what is returned has its draws where the density is."""

    def half(x):
        return np.where(x[:, 0] < 1.0, -np.inf, -0.5 * (x * x).sum(-1)), -x

    found = pathfinder(half, np.zeros(3))
    assert np.isfinite(found.elbo)
    draws = found.loc + np.random.default_rng(3).standard_normal((1000, 3)) @ found.scale_tril.T
    assert np.isfinite(half(draws)[0]).mean() > 0.98


@pytest.mark.parametrize("nothing", [-np.inf, np.nan, np.inf])
def test_no_start_has_a_density(nothing):
    with pytest.raises(NonFiniteError, match=r"at 127 points.*choose another init_loc_fn"):
        pathfinder(lambda x: (np.full(len(x), nothing), np.zeros_like(x)), np.zeros(2))


def test_a_seed_gives_the_same_twice():
    first, again, other = (pathfinder(funnel, np.zeros(10), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    assert [m.elbo for m in first.others] == [m.elbo for m in again.others]
    assert not np.array_equal(first.loc, other.loc)


def test_evaluations_are_counted():
    rows = []

    def counting(x):
        rows.append(len(x))
        return funnel(x)

    assert pathfinder(counting, np.zeros(10)).num_evals == sum(rows) < 30_000


def many(d):
    rng = np.random.default_rng(4)
    scale, loadings = np.exp(rng.standard_normal(d)), rng.standard_normal((d, 3))
    return 3 * rng.standard_normal(d), np.linalg.cholesky(np.diag(scale**2) + loadings @ loadings.T)


def test_hundreds_of_dimensions():
    """Above 500 of them: L-BFGS's low rank plus diagonal, and steps on the ELBO over all normals."""
    loc, root = many(520)
    found = pathfinder(normal(loc, root), np.zeros(520))
    assert errors(found, loc, root)[0] < 1e-3
    # Without the steps on the ELBO 190 nats below the best, and with the scale of the start 5000.
    assert log_z(root) - 0.1 < found.elbo < log_z(root) + 1e-6


def test_thousands_of_dimensions(monkeypatch):
    """Where twice as many gradients as dimensions are too many, the steps on the ELBO correct a diagonal alone."""
    monkeypatch.setattr("flowppl.pathfinder._DENSE", 500)
    loc, root = many(520)
    found = pathfinder(normal(loc, root), np.zeros(520))
    assert errors(found, loc, root)[0] < 0.05
    assert log_z(root) - 40 < found.elbo < log_z(root)  # 20 nats below the best
    assert found.num_evals < 10_000
