"""The verdict on draws: right ones pass, each kind of wrong one is seen by the check that can see it."""

import numpy as np
import pytest
from scipy import stats

from flowppl import weights
from flowppl.diagnostics import diagnose
from flowppl.diagnostics.hmc import drift
from flowppl.errors import DimensionError, NonFiniteError

pytestmark = pytest.mark.slow  # numpy alone: once is enough

INF = np.inf
N = 2000


def normal(loc=0.0, scale=1.0):
    """value_and_score of independent normals; its value is normalised."""

    def value_and_score(u):
        z = (u - loc) / scale
        return -(z**2 + np.log(2 * np.pi)).sum(1) / 2 - u.shape[1] * np.log(scale), -z / scale

    return value_and_score


def student(df):
    return lambda u: (-(df + 1) / 2 * np.log1p(u**2 / df).sum(1), -(df + 1) * u / (df + u**2))


def two_modes(share, distance):
    """Normals at zero and, in the first coordinate, at the distance, the latter with a share of the mass."""

    def value_and_score(u):
        other = u - np.where(np.arange(u.shape[1]) == 0, distance, 0)
        a, b = np.log1p(-share) - (u**2).sum(1) / 2, np.log(share) - (other**2).sum(1) / 2
        value = np.logaddexp(a, b)
        return value, -np.exp(a - value)[:, None] * u - np.exp(b - value)[:, None] * other

    return value_and_score


def funnel(u):
    """Neal's: v of sd 3, x of sd exp(v / 2)."""
    v, x = u[:, 0], u[:, 1:]
    square = (x**2).sum(1) * np.exp(-v)
    value = -(v**2) / 18 - square / 2 - x.shape[1] * v / 2
    score_v = -v / 9 + square / 2 - x.shape[1] / 2
    return value, np.concatenate([score_v[:, None], -x * np.exp(-v)[:, None]], 1)


def judge(target, draws, log_q, **kwargs):
    return diagnose(draws, target(draws)[0] - log_q, value_and_score=target, **kwargs)


def by_normal(target, d, loc=0.0, scale=1.0, n=N, seed=0, **kwargs):
    """The verdict on a normal guide."""
    draws = loc + scale * np.random.default_rng(seed).standard_normal((n, d))
    return judge(target, draws, normal(loc, scale)(draws)[0], **kwargs)


def run(target, d, loc=0.0, scale=1.0, seed=1):
    """Draws and log-weights of another run."""
    draws = loc + scale * np.random.default_rng(seed).standard_normal((N, d))
    return draws, target(draws)[0] - normal(loc, scale)(draws)[0]


# Right draws


@pytest.mark.parametrize("d", [1, 2, 10, 30])
def test_an_exact_guide_is_good(d):
    """20 seeds: each call raises a false alarm with probability 0.011, more than two of 20 do with 0.0013."""
    target = normal()
    alarms = [
        r.reasons for s in range(20) if (r := by_normal(target, d, seed=s, restarts=[run(target, d)])).verdict != "good"
    ]
    assert len(alarms) <= 2, alarms


@pytest.mark.parametrize("df", [5, 10])
def test_exact_heavy_tails_are_good(df):
    draws = np.random.default_rng(0).standard_t(df, (N, 2))
    result = judge(student(df), draws, student(df)(draws)[0])
    assert result.verdict == "good" and result.reasons == () and result.mean_error.max() < 0.3


def test_a_nearly_exact_guide_is_good():
    result = by_normal(normal(), 5, 0.05, 0.97, n=4000)
    assert result.verdict == "good", str(result)
    np.testing.assert_allclose(result.reweighting.mean_shift, 0.05, atol=0.02)


def test_the_hmc_check_keeps_its_false_alarm_rate():
    """Heavy tails, a bad metric, repeated starts: p-values below 0.1 in a tenth of 100 runs (binomial, false alarms 1e-4)."""
    pvalues = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        starts = rng.standard_t(3, (16, 2))[groups := np.arange(48) % 16]
        pvalues.append(drift(student(3), starts, groups, np.zeros(2), np.diag([1.0, 0.3]), rng).pvalue)
    # Twice the smaller of two dependent p-values is a little conservative.
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], 100, [0.05, 0.1])
    assert low <= np.sum(np.array(pvalues) < 0.1) <= high


# Wrong draws


@pytest.mark.parametrize("d", [2, 20])
@pytest.mark.parametrize("shift", [0.35, 0.5])
def test_a_shifted_guide_is_usable_and_reweighting_mends_it(d, shift):
    loc = np.where(np.arange(d) == d - 1, shift, 0)
    draws = loc + np.random.default_rng(0).standard_normal((N, d))
    result = judge(normal(), draws, normal(loc)(draws)[0])
    assert result.verdict == "usable after reweighting"
    assert any(r.startswith(f"by the weights, the raw mean of x[{d - 1}]") for r in result.reasons)
    assert any(r.startswith(f"by HMC, the raw mean of x[{d - 1}]") for r in result.reasons)
    assert np.abs(result.evidence.weight @ draws).max() < 0.2
    assert result.mean_error[-1] > shift - 0.1
    np.testing.assert_allclose(result.reweighting.mean_shift[-1], shift, atol=0.1)
    assert result.reweighting.mean_z[-1] > 10
    # Log evidence zero; the ELBO is lower by the Kullback-Leibler divergence.
    assert abs(result.evidence.log_evidence) < 4 * result.evidence.log_evidence_error
    assert abs(result.evidence.elbo + shift**2 / 2) < 4 * result.evidence.elbo_error


@pytest.mark.parametrize(
    ("target", "d", "loc", "scale", "reason"),
    [
        (normal(), 2, 4.0, 1.0, "k-hat"),
        (normal(), 10, 0.0, 0.4, "k-hat"),
        (normal(), 10, 0.0, 0.4, "HMC carries raw draws away"),
        (normal(), 50, 0.5, 1.0, "HMC carries raw draws away"),
        (student(2), 10, 0.0, 1.0, "HMC carries"),
        (funnel, 5, 1.0, 1.0, "k-hat"),
        (two_modes(0.5, 5.0), 2, 0.0, 1.0, "k-hat"),
    ],
)
def test_a_guide_that_is_far_off_is_not_to_be_trusted(target, d, loc, scale, reason):
    result = by_normal(target, d, loc, scale)
    assert result.verdict == "not to be trusted"
    assert any(r.startswith(reason) for r in result.reasons), result.reasons


@pytest.mark.parametrize(("scale", "what"), [(1.6, "log sd"), (1.6, "lower 5 % tail"), (0.75, "upper 5 % tail")])
def test_a_wrong_spread_is_not_good(scale, what):
    result = by_normal(normal(), 1, scale=scale)
    assert result.verdict == "usable after reweighting"
    sign = "-" if scale > 1 else "+"
    assert any(r.startswith(f"reweighting changes the {what} of x[0] by {sign}") for r in result.reasons), (
        result.reasons
    )


def test_even_weights_do_not_hide_a_missing_half():
    """A guide that draws x > 0 only: all weights are equal, and HMC walks out."""
    draws = np.random.default_rng(0).standard_normal((N, 3))
    draws[:, 1] = np.abs(draws[:, 1])
    result = judge(normal(), draws, normal()(draws)[0] + np.log(2))
    assert result.evidence.ess == pytest.approx(N) and result.verdict == "not to be trusted"
    assert any(r.startswith("HMC carries reweighted draws away") for r in result.reasons)
    assert any(r.startswith("HMC takes the reweighted mean of x[1]") for r in result.reasons)
    assert result.drift.mean[1] == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_the_missing_neck_of_a_funnel_is_not_good(seed):
    """Exact but for v < -1.5: half a sd off in v; the weights are even, and HMC is slow to enter the neck."""
    rng = np.random.default_rng(seed)
    v = 3 * stats.truncnorm.rvs(-0.5, INF, size=N, random_state=rng)
    draws = np.stack([v, np.exp(v / 2) * rng.standard_normal(N)], 1)
    assert judge(funnel, draws, funnel(draws)[0]).verdict != "good"


@pytest.mark.parametrize("share", [0.002, 0.01, 0.05])
def test_a_mode_that_is_too_rare_is_seen_by_its_weights(share):
    """HMC sees nothing, and smoothing would make the few large weights small: a mode of half the mass gets few draws."""
    rng, target = np.random.default_rng(0), two_modes(0.5, 10.0)
    draws = rng.standard_normal((N, 2)) + 10 * np.stack([rng.random(N) < share, np.zeros(N)], 1)
    result = judge(target, draws, two_modes(share, 10.0)(draws)[0])
    assert result.verdict != "good" and result.mean_error[0] > 1


def test_a_mode_that_only_a_restart_found():
    target = two_modes(0.3, 12.0)
    assert by_normal(target, 2).verdict == "good"  # no check can see it
    result = by_normal(target, 2, restarts=[run(target, 2), run(target, 2, loc=np.array([12.0, 0.0]))])
    assert result.verdict == "not to be trusted" and "anneal" in result.advice
    assert [r for r in result.reasons if r.startswith("restart")] == [result.reasons[0]]
    assert result.reasons[0].startswith("restart 1 has the mean of x[0] 1")
    # A poor fit there tells as well; a mode of no mass does not.
    assert by_normal(target, 2, restarts=[run(target, 2, np.array([12.0, 0.5]), 0.3)]).verdict == "not to be trusted"
    rare = two_modes(1e-6, 12.0)
    assert by_normal(rare, 2, restarts=[run(rare, 2, loc=np.array([12.0, 0.0]))]).verdict == "good"


def test_a_restart_with_more_mass_or_a_better_fit():
    draws = np.random.default_rng(0).standard_normal((N, 2))
    even = np.zeros(N)
    more = diagnose(draws, even, value_and_score=normal(), restarts=[(draws, even + 0.5)])
    assert any("finds more mass: its log evidence is 0.50 higher" in r for r in more.reasons)
    assert more.verdict == "not to be trusted"
    noisy = np.random.default_rng(1).normal(size=N) * 1.5
    better = diagnose(draws, noisy - weights.log_mean_exp(noisy), value_and_score=normal(), restarts=[(draws, even)])
    assert any("restart 0 fits better: its ELBO is 1." in r for r in better.reasons)


def test_few_draws_cannot_be_good():
    result = by_normal(normal(), 5, n=100)
    assert result.verdict == "not to be trusted" and "draw about" in result.advice


def test_without_hmc_nothing_is_good():
    draws = np.random.default_rng(0).standard_normal((N, 2))
    result = diagnose(draws, np.zeros(N))
    assert result.verdict == "usable after reweighting" and "no HMC check" in result.reasons[0] and result.drift is None


# The HMC check


@pytest.mark.parametrize(("loc", "scale"), [(0.4, 1.0), (0.0, 0.75), (0.0, 1.35)])
def test_hmc_drifts_from_wrong_starts_to_the_target(loc, scale):
    """Correlated target and a shift or a scale missing: the p-value is the smallest, the mean and the sds are found."""
    rng = np.random.default_rng(0)
    tril = np.linalg.cholesky(0.1 * np.eye(3) + 0.9)
    precision = np.linalg.inv(tril @ tril.T)

    def target(u):
        return -np.einsum("ni,ij,nj->n", u, precision, u) / 2, -u @ precision

    starts = (loc + scale * rng.standard_normal((256, 3))) @ tril.T
    result = drift(target, starts, np.arange(256), starts.mean(0), scale * tril, rng)
    assert result.pvalue <= 0.002
    assert 0.6 < result.acceptance < 1
    assert np.all(np.abs(result.mean) < 4 * result.mean_error) and np.all(result.mean_error < 0.1)
    np.testing.assert_allclose(result.sd, 1, rtol=0.1)
    assert np.all(np.abs(result.persistence) < 0.3)


def test_hmc_extrapolates_slow_chains():
    """A metric nine times too small: the second half of a chain is still near its start, its mean between start and target."""
    rng = np.random.default_rng(0)
    starts = 1.0 + rng.standard_normal((1000, 1))
    result = drift(normal(), starts, np.arange(1000), starts.mean(0), np.diag([0.11]), rng)
    assert 0.3 < result.persistence[0] < 0.9
    assert abs(result.mean[0]) < 4 * result.mean_error[0] < 0.8


def test_hmc_is_unsure_where_it_does_not_mix():
    rng, target = np.random.default_rng(0), two_modes(0.5, 12.0)
    starts = rng.standard_normal((256, 2)) + 12 * np.stack([rng.random(256) < 0.5, np.zeros(256)], 1)
    result = drift(target, starts, np.arange(256), np.array([6.0, 0.0]), np.diag([6.1, 1.0]), rng)
    assert result.pvalue > 0.01
    assert result.persistence[0] > 0.9 and result.mean_error[0] > 0.3 and result.mean_error[1] < 0.1


def test_the_hmc_check_repeats_with_its_seed():
    a, b, c = (by_normal(normal(), 2, **{"seed": 0}).drift, by_normal(normal(), 2).drift, None)
    draws = np.random.default_rng(0).standard_normal((N, 2))
    c = diagnose(draws, np.zeros(N), value_and_score=normal(), seed=1).drift
    np.testing.assert_array_equal(a.mean, b.mean)
    assert np.any(a.mean != c.mean)


# Odd input


def test_draws_outside_the_support_and_undefined_ones():
    """A guide of a half-normal: half of its weights are -inf. NaN and infinite ones are counted and left out."""
    rng = np.random.default_rng(0)

    def half(u):
        return np.where(u[:, 0] > 0, normal()(u)[0] + np.log(2), -INF), -u

    draws = rng.standard_normal((N, 2))
    log_w = half(draws)[0] - normal()(draws)[0]
    result = diagnose(draws, log_w, value_and_score=half)
    assert result.verdict == "usable after reweighting" and result.num_undefined == 0
    assert result.evidence.elbo == -INF and result.evidence.log_evidence == pytest.approx(0, abs=0.1)
    assert result.reweighting.mean_reweighted[0] == pytest.approx(np.sqrt(2 / np.pi), abs=0.1)

    draws, log_w = rng.standard_normal((N, 2)), np.zeros(N)
    log_w[:2], log_w[2], draws[3, 1] = np.nan, INF, np.nan
    result = diagnose(draws, log_w, value_and_score=normal())
    assert result.num_draws == N and result.num_undefined == 4 and result.evidence.weight.shape == (N - 4,)
    assert result.verdict == "usable after reweighting" and result.reasons == (
        "0.20% of the draws have no finite log-weight",
    )
    log_w[:50] = np.nan
    result = diagnose(draws, log_w, value_and_score=normal())
    assert result.verdict == "not to be trusted" and "find out" in result.advice


def test_no_draw_has_weight():
    result = diagnose(np.random.default_rng(0).standard_normal((N, 2)), np.full(N, -INF), value_and_score=normal())
    assert result.verdict == "not to be trusted" and "the model has no density at any draw" in result.reasons
    assert result.drift is None and result.evidence.ess == 0


def test_constrained_sites_are_compared_too():
    """exp(3 u) moves with the weights in its own sds; equal columns, fixed ones and overflows do not disturb."""
    draws = 0.3 + np.random.default_rng(0).standard_normal((N, 2))
    log_w = normal()(draws)[0] - normal(0.3)(draws)[0]
    matrix = np.zeros((N, 2, 2))
    matrix[:, 0, 0], matrix[:, 1, 0] = 1, np.tanh(draws[:, 0])
    sites = {"a": draws[:, 0], "b": np.exp(draws[:, 1] / 2), "c": matrix}
    result = diagnose(draws, log_w, ["a", "b"], constrained=sites, value_and_score=normal())
    assert result.names == ("a", "b", "b", "c[1, 0]") and result.reweighting.mean.shape == (4,)
    assert result.reweighting.mean_reweighted[2] == pytest.approx(np.exp(1 / 8), rel=0.1)
    sites["b"] = np.where(np.arange(N) == 7, INF, sites["b"])
    assert diagnose(draws, log_w, constrained=sites, value_and_score=normal()).num_undefined == 1


def test_sums_that_overflow_are_not_good():
    draws = np.random.default_rng(0).standard_normal((N, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        result = diagnose(draws, np.zeros(N), constrained={"huge": 1e200 * draws}, value_and_score=normal())
    assert result.verdict == "not to be trusted" and result.mean_error[1] == INF


def test_collinear_and_collapsed_coordinates_do_not_break_the_metric():
    draws = np.random.default_rng(0).standard_normal((N, 3))
    draws[:, 1], draws[:, 2] = draws[:, 0], 0.5
    assert judge(normal(), draws, np.zeros(N)).verdict == "not to be trusted"


def test_the_report():
    result = by_normal(normal(), 12, np.where(np.arange(12) == 3, 0.5, 0), restarts=[run(normal(), 12)])
    text = str(result)
    lines = text.splitlines()
    assert (
        lines[0] == result.verdict
        and all(f"  - {r}" in lines for r in result.reasons)
        and f"next: {result.advice}" in lines
    )
    for number in (f"{result.evidence.elbo:.3f}", f"{result.evidence.khat:.2f}", f"{result.drift.acceptance:.2f}"):
        assert number in text
    head = next(i for i, line in enumerate(lines) if "HMC mean" in line)
    assert lines[head + 1].startswith("x[3]") and lines[-1] == "and 2 coordinates in less doubt"
    assert len({len(line) for line in lines[head : head + 11]}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": np.zeros(5)}, r"draws has shape \(5,\): expected \(n, d\)"),
        ({"draws": np.zeros((5, 0))}, r"draws has shape \(5, 0\)"),
        ({"log_weights": np.zeros((5, 1))}, r"log-weights of draws have shape \(5, 1\): expected \(5,\)"),
        ({"names": ["a"]}, "names has length 1: expected 2"),
        ({"constrained": {"s": np.zeros((4, 2))}}, r"constrained\['s'\] has shape \(4, 2\): expected \(5, ...\)"),
        ({"restarts": [(np.zeros((5, 3)), np.zeros(5))]}, r"restarts\[0\] has shape \(5, 3\): expected \(n, 2\)"),
        ({"restarts": [(np.zeros((5, 2)), np.zeros(4))]}, r"log-weights of restarts\[0\] have shape \(4,\)"),
        ({"value_and_score": lambda u: (u, u)}, r"value_and_score gave shapes \(5, 2\), \(5, 2\) at \(5, 2\)"),
    ],
)
def test_wrong_shapes(change, message):
    draws = np.random.default_rng(0).standard_normal((5, 2))
    with pytest.raises(DimensionError, match=message):
        diagnose(**{"draws": draws, "log_weights": np.zeros(5)} | change)


def test_nothing_defined():
    with pytest.raises(NonFiniteError, match="draws: 1 of 5 are finite"):
        diagnose(np.zeros((5, 2)), np.array([np.nan, np.nan, INF, np.nan, 0.0]))
