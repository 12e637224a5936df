"""Flow annealed importance sampling bootstrap: its gradient, its buffer, and what it finds."""

import importlib
import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from flowppl import flows, tree, weights
from flowppl.backend import backend_of
from flowppl.checkpoint import Checkpoint
from flowppl.flows.affine_end import place
from flowppl.kernels import hmc
from flowppl.stochastic import Bridge, anneal, bootstrap
from flowppl.stochastic.buffer import Buffer
from flowppl.stochastic.passes import gradient, powers

pytestmark = pytest.mark.slow  # once for both fronts is enough

SHARE = 0.7  # of the mode at the start
LOG_Z = 1.5


def two_modes(x):
    """At (2.5, 0) and (-2.5, 0), with sd 0.7."""
    backend = backend_of(x)
    xp = backend.xp
    logs = [
        math.log(share) - 0.5 * ((x[:, 0] - at) ** 2 + x[:, 1] ** 2) / 0.49
        for share, at in ((SHARE, 2.5), (1 - SHARE, -2.5))
    ]
    return LOG_Z + backend.logsumexp(xp.stack(logs), axis=0) - math.log(2 * math.pi * 0.49)


def log_p(x):
    """A skewed density on the line, lighter than a normal of sd 1."""
    return x[:, 0] - 1.5 * x[:, 0] ** 2 - 0.2 * x[:, 0] ** 4


def test_gradient_is_that_of_the_divergence(backend, f64, make_rng):
    """By quadrature of the integral of p^2 / q; annealing to p itself, as with other powers, gives another one."""
    like, n, runs = f64([0.0]), 2000, 24
    xp, flow = backend.xp, flows.affine()(1)
    before = place(flow, flow.init(make_rng(0), like), f64([0.3]), f64([[1.1]]))
    after = place(flow, before, f64([0.2]), f64([[1.0]]))  # as if training had gone on since the draws
    grid = f64(np.linspace(-6, 6, 4001)[:, None])

    def integral(params):
        log_q = flow.log_prob({**before, "params": params}, grid)
        return backend.logsumexp(2 * log_p(grid) - log_q, axis=0)

    size, exact = backend.value_and_grad(integral, after["params"])
    ratio = np.exp(backend.to_numpy(size - integral(backend.stop(before["params"]))))
    exact = ratio * np.concatenate([backend.to_numpy(g).reshape(-1) for g in tree.leaves(exact)])
    schedule = f64([0.5, 1.0]), f64([0.5, 0.4])

    def estimate(rng, power):
        first, second, third = backend.split(rng, 3)
        log_q = partial(flow.log_prob, before)
        own = flow.sample(first, before, (n,)).x
        bridge = Bridge(lambda rng, n: own, log_q, log_p, lambda beta: xp.stack([1 - power * beta, power * beta]))
        found = anneal(second, bridge, partial(hmc.step, num_steps=2), schedule, n, resample_below=0.0)
        slots = backend.asarray(xp.arange(n), like)
        buffer = Buffer.empty(n, 1, like).with_draws(slots, found.x, found.log_w, log_q(found.x))
        at = buffer.draw(third, n)
        _, grads = gradient(flow, after, buffer.x[at], buffer.log_q[at])
        return grads

    run = backend.jit(estimate)

    def distance(power):
        """Of the mean over runs from the exact gradient, in standard errors."""
        found = [tree.leaves(backend.stop(run(make_rng(i), f64(power)))) for i in range(runs)]
        found = np.stack([np.concatenate([backend.to_numpy(g).reshape(-1) for g in row]) for row in found])
        return np.abs(found.mean(0) - exact) / (found.std(0, ddof=1) / runs**0.5)

    assert np.abs(exact).max() > 0.1
    np.testing.assert_array_equal(backend.to_numpy(powers(f64(0.75))), [-0.5, 1.5])
    assert distance(2.0).max() < 4
    assert distance(1.0).max() > 10


def test_buffer_draws_by_weight(backend, f64, make_rng):
    like = f64([0.0])
    log_w = np.log([0.5, 2.0, 1.0, 0.25, 1.0, 0.0 + 1e-300, 3.0])
    log_q = np.array([0.3, -1.0, 2.0, 0.0, np.nan, 0.0, 1.0])
    x = np.arange(7.0)[:, None]
    x[2] = np.inf
    slots = backend.asarray(np.array([3, 1, 0, 2, 4, 7, 6]), like)
    buffer = Buffer.empty(8, 1, like).with_draws(slots, f64(x), f64(log_w), f64(log_q))
    assert np.isfinite(backend.to_numpy(buffer.x)).all()

    def shares(buffer):
        """Of the slots: among the first of many draws, since what a step takes must be a fair part; and among all."""
        run = backend.jit(lambda rng: buffer.draw(rng, 10))
        found = np.stack([backend.to_numpy(run(make_rng(i))) for i in range(1500)])
        return np.bincount(found[:, 0], minlength=8), np.bincount(found.reshape(-1), minlength=8) / found.size

    def check(buffer, expected):
        expected = expected / expected.sum()
        first, every = shares(buffer)
        seen = expected > 0
        assert not first[~seen].any()
        assert not every[~seen].any()
        assert stats.chisquare(first[seen], first.sum() * expected[seen]).pvalue > 1e-3
        assert np.abs(every - expected).max() < 5e-3

    w = np.zeros(8)
    w[[3, 1, 2, 6]] = 0.5, 2.0, 0.25, 3.0
    check(buffer, w)
    # Where q has doubled, p^2 / q has halved; where it is not a number, nothing is drawn again.
    looked, doubled = backend.asarray(np.array([1, 6, 1]), like), -1.0 + math.log(2)
    check(buffer.refreshed(looked, f64([doubled, np.nan, doubled])), w * [1, 0.5, 1, 1, 1, 1, 0, 1])


def test_finds_the_other_mode_and_the_evidence(backend, f64, make_rng):
    like = f64([0.0])
    flow = flows.nsf(layers=2, hidden=(16,), affine=False)(2)
    start = place(flow, flow.init(make_rng(0), like), f64([2.5, 0.0]), f64(np.eye(2)))

    def half(x):
        """Not a number where there is no mass, as models can be: such draws do not count."""
        xp = backend.xp
        return xp.where(x[:, 1] > 4, xp.full_like(x[:, 0], math.nan), two_modes(x))

    variables, history = bootstrap(
        flow, start, half, 1, num_steps=240, num_particles=128, num_temperatures=2, learning_rate=1e-2, buffer_size=4096
    )
    assert history.skipped[-1] == 0
    n = 10_000
    sample = backend.stop(flow.sample(make_rng(2), variables, (n,), with_log_prob=True))
    log_w = backend.to_numpy(two_modes(sample.x) - sample.log_prob)
    right = backend.to_numpy(sample.x)[:, 0] > 0
    ratio = np.exp(log_w - LOG_Z)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / n**0.5
    assert abs((ratio * right).mean() - SHARE) < 4 * (ratio * right).std() / n**0.5
    assert weights.ess(log_w) > 0.5 * n
    assert history.acceptance[-10:].mean() == pytest.approx(0.65, abs=0.1)


def test_starts_from_given_draws(backend, f64, make_rng):
    """Those are weighted as draws of p^2 / q; what has no density is left out."""
    like = f64([0.0])
    flow = flows.affine()(1)
    variables = flow.init(make_rng(0), like)
    x = np.random.default_rng(0).normal(0, 0.3, (64, 1))
    x[0] = np.nan
    draws = f64(x), f64(np.zeros(64))
    options = {"num_steps": 4, "num_particles": 16, "num_updates": 4, "num_temperatures": 1, "buffer_size": 64}
    trained, history = bootstrap(flow, variables, log_p, 0, draws=draws, **options)
    assert history.skipped[-1] == 0
    assert np.isfinite(history.loss).all()
    with pytest.raises(ValueError, match="num_steps"):
        bootstrap(flow, trained, log_p, 0, num_steps=0)


def test_an_interrupted_run_ends_alike(backend, f64, make_rng, tmp_path, monkeypatch):
    """To the last bit, with other random numbers in each pass: what a flow that hardly moves says of the evidence differs."""
    monkeypatch.setattr(importlib.import_module("flowppl.stochastic.bootstrap"), "_PASSES", 2)
    flow = flows.affine()(1)
    variables = flow.init(make_rng(0), f64([0.0]))
    options = {"num_steps": 12, "num_particles": 16, "num_updates": 2, "num_temperatures": 1, "buffer_size": 64}
    options |= {"learning_rate": 1e-6}
    run = partial(bootstrap, flow, variables, log_p, 0, **options)

    def interrupt(history):
        raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(memory=Checkpoint(tmp_path / "run", options), progress=interrupt)
    again = run(memory=Checkpoint(tmp_path / "run", options), progress=seen.append)
    whole = run()
    assert [len(part.loss) for part in seen] == [2, 2] and whole[1].acceptance.shape == (6, 1)
    assert len(np.unique(whole[1].log_z.round(3))) == 6
    for found, expected in zip(tree.leaves(again), tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(backend_of(found).to_numpy(found), backend_of(expected).to_numpy(expected))
