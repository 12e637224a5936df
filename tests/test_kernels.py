"""Markov kernels: from exact draws of a target they give exact draws, and the ratios of those that do not make up for it."""

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from flowppl.kernels import hmc, independence, init, langevin, mala, metropolis, target
from flowppl.stochastic import Bridge

N, STEPS, LEVEL = 20_000, 12, 1e-3

pytestmark = pytest.mark.slow  # once for both fronts is enough


def log_prob(x):
    """A funnel: x0 is standard normal, x1 normal with sd exp(x0 / 2)."""
    from flowppl.backend import backend_of

    xp = backend_of(x).xp
    return -0.5 * x[:, 0] ** 2 - 0.5 * x[:, 1] ** 2 * xp.exp(-x[:, 0]) - 0.5 * x[:, 0] - math.log(2 * math.pi)


def exact(seed, n=N):
    z = np.random.default_rng(seed).standard_normal((n, 2))
    return np.stack([z[:, 0], z[:, 1] * np.exp(z[:, 0] / 2)], 1)


def log_wide(x):
    from flowppl.backend import backend_of

    return backend_of(x).xp.sum(-0.5 * (x / 2) ** 2, axis=1) - math.log(2 * math.pi * 4)


def propose_wide(backend, like):
    def propose(rng, n):
        x = 2 * backend.normal(rng, (n, 2), like=like)
        return x, log_wide(x)

    return propose


KERNELS = {
    "metropolis": lambda b, like: partial(metropolis.step, step_size=1.0),
    "mala": lambda b, like: partial(mala.step, step_size=0.9),
    "hmc": lambda b, like: partial(hmc.step, step_size=0.7, num_steps=3),
    "independence": lambda b, like: partial(independence.step, propose=propose_wide(b, like), log_proposal=log_wide),
    "isir": lambda b, like: partial(
        independence.isir, propose=propose_wide(b, like), log_proposal=log_wide, num_proposals=5
    ),
}


def run(backend, step, target, x, rng, steps=STEPS):
    """Walkers after some steps, with the acceptance of the last one."""

    def one(carry, _):
        walkers, rng = carry
        key, rng = backend.split(rng, 2)
        walkers, info = step(key, target, walkers)
        return (walkers, rng), info.acceptance

    def many(x, rng):
        (walkers, _), acceptance = backend.scan(one, (init(target, x), rng), backend.xp.zeros(steps))
        return walkers.x, acceptance[-1]

    return [backend.to_numpy(a) for a in backend.jit(many)(x, rng)]


def p_value(x):
    """That x are draws of the target, by tests of both of its normal coordinates; smallest of all, times their number."""
    z0, z1 = x[:, 0], x[:, 1] * np.exp(-x[:, 0] / 2)
    found = [stats.kstest(z, "norm").pvalue for z in (z0, z1)]
    found += [2 * stats.norm.sf(abs(z.mean()) * len(z) ** 0.5) for z in (z0, z1, z0 * z1)]
    found += [2 * min(chi := stats.chi2(len(z)).cdf((z**2).sum()), 1 - chi) for z in (z0, z1)]
    return min(found) * len(found)


@pytest.mark.parametrize("name", [*KERNELS])
def test_exact_draws_stay_exact(backend, f64, make_rng, name):
    x = f64(exact(1))
    step = KERNELS[name](backend, x)
    after, acceptance = run(backend, step, target(log_prob, x), x, make_rng(2))
    assert p_value(after) > LEVEL
    assert 0.2 < acceptance.mean() < 0.95  # so that rejections are part of it
    assert np.mean(np.all(after == exact(1), 1)) < 0.05  # walkers have moved


def test_the_check_sees_dynamics_without_acceptance(backend, f64, make_rng):
    x = f64(exact(1))
    for step in (partial(langevin.step, step_size=0.9), partial(langevin.underdamped, step_size=0.7, num_steps=3)):
        assert p_value(run(backend, step, target(log_prob, x), x, make_rng(2))[0]) < 1e-6


@pytest.mark.parametrize("name", ["langevin", "underdamped", "hmc"])
def test_ratios_make_up_for_the_dynamics(backend, f64, make_rng, name):
    """E[w] = 1 and E[w f(x')] = E f for weights w = p(x') / p(x) times the ratio of the ways back and there."""
    step = {
        "langevin": partial(langevin.step, step_size=0.5),
        "underdamped": partial(langevin.underdamped, step_size=0.4, friction=1.5, num_steps=2),
        "hmc": partial(hmc.step, step_size=0.7, num_steps=2),
    }[name]
    x = f64(exact(3, 4 * N))
    p = target(log_prob, x)

    def one(x, rng):
        walkers = init(p, x)
        new, info = step(rng, p, walkers)
        return new.x, p.log_prob(new) - p.log_prob(walkers), info.log_ratio

    after, log_p, log_ratio = (backend.to_numpy(a) for a in backend.jit(one)(x, make_rng(4)))
    w, z0, z1 = np.exp(log_p + log_ratio), after[:, 0], after[:, 1] * np.exp(-after[:, 0] / 2)
    for f, truth in ((1 + 0 * z0, 1.0), (z0, 0.0), (z0**2, 1.0), (np.abs(z1) < 1, stats.norm.cdf(1) * 2 - 1)):
        terms = w * f - truth
        error = terms.std() / len(terms) ** 0.5
        assert abs(terms.mean()) < 4 * error + 1e-12
        assert error < 0.02
    assert np.exp(log_p - log_ratio).mean() > 2  # the other sign would be seen


def test_powers_need_no_new_evaluation(backend, f64):
    """Walkers of a bridge hold both factors: the density and the score at any temperature are mixtures of them."""
    x = f64(exact(5, 7))
    bridge = Bridge(None, log_wide, log_prob)
    walkers = init(bridge.at(f64(0.3)), x)
    for beta in (0.0, 0.3, 1.0):
        at = bridge.at(f64(beta))
        value, score = backend.value_and_score(lambda x, b=beta: (1 - b) * log_wide(x) + b * log_prob(x), x)
        np.testing.assert_allclose(backend.to_numpy(at.log_prob(walkers)), backend.to_numpy(value), rtol=1e-12)
        np.testing.assert_allclose(backend.to_numpy(at.score(walkers)), backend.to_numpy(score), rtol=1e-10, atol=1e-12)


def test_a_factor_without_a_number_leaves_the_others_alone(backend, f64):
    """Its value and its score are both left out where one of them is not finite; scores are as they come, one array for each."""
    xp = backend.xp
    x = f64([[1.0, 2.0], [0.0, 3.0], [-1.0, 4.0]])

    def root(x):
        return xp.sum(xp.sqrt(x), axis=1)

    walkers = init(Bridge(None, log_wide, root).at(f64(0.5)), x)
    assert [tuple(score.shape) for score in walkers.scores] == [(3, 2), (3, 2)]
    log_probs, (first, second) = backend.to_numpy(walkers.log_probs), map(backend.to_numpy, walkers.scores)
    np.testing.assert_allclose(first, -backend.to_numpy(x) / 4)
    np.testing.assert_allclose(log_probs[:, 0], backend.to_numpy(log_wide(x)))
    np.testing.assert_allclose(second, [[0.5, 0.5 / 2**0.5], [0, 0], [0, 0]])
    assert log_probs[0, 1] == 1 + 2**0.5 and np.all(log_probs[1:, 1] < -1e29)
    with pytest.raises(ValueError, match="with_scores"):
        target(root, x).score(init(target(root, x), x, with_scores=False))


def test_walkers_stay_out_of_where_there_is_no_density(backend, f64, make_rng):
    """A density of the half-line, which is not a number or minus infinity elsewhere."""
    xp = backend.xp

    def half(x):
        return xp.where(x[:, 0] > 0, -x[:, 0], -xp.inf) + 0 * xp.log(x[:, 0])

    x = f64(np.random.default_rng(0).exponential(size=(N, 1)))
    for step in (partial(metropolis.step, step_size=1.0), partial(hmc.step, step_size=0.5, num_steps=3)):
        after, acceptance = run(backend, step, target(half, x), x, make_rng(1))
        assert stats.kstest(after[:, 0], "expon").pvalue > LEVEL
        assert np.isfinite(acceptance).all()
