"""How training goes on, is undone and ends, and that an interrupted one ends where it would have; in both frameworks."""

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from flowppl import fitting, flows, optim, refining, tree
from flowppl.backend import get_backend
from flowppl.checkpoint import Checkpoint
from flowppl.errors import CheckpointError, MissingExtraError
from flowppl.fitting import Fit, Problem, default_flow, fit_flow, sampler
from flowppl.flows.affine_end import rescaled, whitening
from flowppl.laplace import NormalApproximation
from flowppl.objectives.control import Control, no_control
from flowppl.objectives.covering import chi_square
from flowppl.objectives.minibatches import anchored
from flowppl.objectives.neutra import Points, both_ways, visited
from flowppl.objectives.reverse_kl import Estimate, reverse_kl
from flowppl.posterior import WeightedPosterior
from flowppl.training import Move, Options, Record, plan, train

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for a minute

CONSTANT = Move(1.0)
LONG = Options(max_steps=100_000)
SMALL = Options(num_particles=16, max_steps=40, chunk=5)


def record(move=CONSTANT, elbo=0.0, error=0.1, fisher=1.0, kept=True):
    return Record(move, elbo, error, fisher, 0.1, 0.0, 0, 0.0, kept)


def moves(elbos, options=LONG):
    """The plan's moves for a course of ELBOs, and the records; the last ELBO goes on for ever."""
    history = []
    while move := plan(history, options):
        elbo = elbos[min(len(history), len(elbos) - 1)]
        history.append(record(move, elbo))
    return history


def test_training_goes_on_while_it_gains_then_anneals_to_zero():
    history = moves([*range(20), 20])
    levels = [r.move.level for r in history]
    first = next(i for i, r in enumerate(history) if r.move.end > 0)
    assert 20 <= first <= 24 and set(levels) == {1.0}
    assert history[-1].move.end == pytest.approx(1.0)
    assert len(history) == 2 * first
    factors = np.concatenate([r.move.factors(10) for r in history[first:]])
    expected = 0.5 * (1 + np.cos(np.pi * (np.arange(10 * first) + 0.5) / (10 * first)))
    np.testing.assert_allclose(factors, expected, atol=1e-9)


def test_a_falling_fisher_divergence_is_a_gain_too():
    falling = [record(fisher=100.0 / (i + 1)) for i in range(6)]
    assert plan(falling, Options()).end == 0
    assert plan([record() for _ in range(6)], Options()).end > 0


def test_what_annealing_gains_smaller_steps_go_on_with():
    """A plateau at too large a step size: annealing finds two nats, so there is a second round at 0.3 of it, and no third."""
    elbos = [0.0] * 4 + [2.0] * 100
    history = moves(elbos)
    ends = [i for i, r in enumerate(history) if r.move.end == 1.0]
    assert len(ends) == 2 and ends[-1] == len(history) - 1
    assert history[ends[0] + 1].move == Move(0.3)


def test_the_budget_holds():
    options = Options(max_steps=2000, chunk=250)
    assert len(moves(list(range(1000)), options)) == 8
    for few in (100, 250, 400):
        assert [r.move for r in moves([0.0], Options(max_steps=few, chunk=250))] == [Move(1.0, 0.0, 1.0)]
    assert len(moves([0.0], Options(max_steps=500, chunk=250))) == 2


def test_a_chunk_that_was_undone_is_followed_by_smaller_steps():
    history = [record(), record(elbo=-50.0, kept=False)]
    assert plan(history, Options()).level == pytest.approx(0.3)
    hopeless = [record(Move(1e-3), kept=False)]
    assert plan(hopeless, Options()) is None


@pytest.mark.parametrize("name", ["num_particles", "max_steps", "learning_rate", "clip_norm", "chunk"])
def test_options_are_positive(name):
    with pytest.raises(ValueError, match=name):
        Options(**{name: 0})


# The gradient


def banana(xp):
    """The log density of (u, v + u^2 / 2) for normal u, v, without its constant."""
    return lambda x: -0.5 * (x[:, 0] ** 2 + (x[:, 1] - 0.5 * x[:, 0] ** 2) ** 2)


def ready(backend, make_rng):
    """A small flow, its variables, and `estimate(rng, target, control)` at 64 draws, compiled."""
    flow = flows.nsf(layers=1, hidden=(4,), bins=3)(2)
    like = backend.asarray(backend.xp.zeros(2, dtype=backend.xp.float64))
    variables = backend.jit(lambda rng: flow.init(rng, like))(make_rng(0))

    def compiled(target, n=64, look=True):
        see = backend.xp.asarray(look)
        return backend.jit(lambda rng, control: reverse_kl(flow, variables, target, rng, n, control, see))

    return flow, variables, like, compiled


@pytest.mark.parametrize("c", [0.0, 0.4, 1.0])
def test_the_gradient_is_unbiased_at_any_coefficient(backend, make_rng, c):
    """Against the plain estimator at the same draws: they differ by c - 1 times the score term, of mean zero.

    24 batches of 512 draws; one chi-square on 4 random projections, false alarms below 1e-4.
    """
    flow, variables, like, compiled = ready(backend, make_rng)
    target = banana(backend.xp)
    control = Control(*(backend.asarray(x, like) for x in (-c, 1.0)))
    mixed = compiled(target, 512, look=False)

    @backend.jit
    def plain(rng):
        def loss(params):
            draw = flow.sample(rng, {**variables, "params": params}, (512,), with_log_prob=True)
            return backend.xp.mean(draw.log_prob - target(draw.x))

        return backend.value_and_grad(loss, variables["params"])[1]

    rng, rows = np.random.default_rng(0), []
    size = sum(int(np.prod(a.shape)) for a in tree.leaves(variables["params"]))
    directions = rng.standard_normal((4, size))
    for i in range(24):
        both = plain(make_rng(i)), mixed(make_rng(i), control)[1]
        flat = [np.concatenate([backend.to_numpy(a).ravel() for a in tree.leaves(g)]) for g in both]
        rows.append(directions @ (flat[0] - flat[1]))
        if c == 1.0:
            np.testing.assert_allclose(flat[0], flat[1], rtol=1e-8, atol=1e-10)
    rows = np.array(rows)
    if c < 1:
        assert rows.std() > 1e-4  # the score term is there
        mean, covariance = rows.mean(0), np.cov(rows.T) / len(rows)
        statistic = mean @ np.linalg.solve(covariance, mean) * (24 - 4) / (4 * 23)  # Hotelling: F with 4 and 20 degrees
        assert statistic < 9.5  # 1e-4 is at 9.16


def test_the_gradient_of_a_flow_that_is_the_posterior_vanishes(backend, make_rng):
    flow, variables, like, compiled = ready(backend, make_rng)
    estimate, grads, _ = compiled(lambda x: flow.log_prob(variables, x))(make_rng(1), no_control(like))
    assert float(estimate.fisher) < 1e-18 and abs(float(estimate.elbo)) < 1e-10
    assert max(float(backend.xp.max(backend.xp.abs(g))) for g in tree.leaves(grads)) < 1e-10


def test_draws_without_a_density_are_left_out_and_counted(backend, make_rng):
    _, _, like, compiled = ready(backend, make_rng)
    xp = backend.xp

    def half_plane(x):
        return xp.where(x[:, 0] > 0, banana(xp)(x), -math.inf)

    estimate, grads, _ = compiled(half_plane)(make_rng(1), no_control(like))
    assert 0.3 < float(estimate.lost) < 0.7 and math.isfinite(float(estimate.elbo))
    assert all(bool(xp.all(xp.isfinite(g))) for g in tree.leaves(grads))


def test_the_coefficient_falls_from_plain_to_path_where_the_fit_is_good(backend, make_rng):
    """The score term is all that is left of the plain gradient's noise at the posterior: the mixture takes none of it."""
    flow, variables, like, compiled = ready(backend, make_rng)
    control = Control(*(backend.asarray(x, like) for x in (-1.0, 1.0)))  # plain at first
    step = compiled(lambda x: flow.log_prob(variables, x))
    for i in range(30):
        estimate, _, control = step(make_rng(i), control)
    assert float(estimate.coefficient) < 0.2


def shifted(x):
    """An unnormalised log density of p = N(0.2, 1.1^2)."""
    return -0.5 * ((x[:, 0] - 0.2) / 1.1) ** 2 + 3.0


LOG_Z = 3.0 + math.log(1.1) + 0.5 * math.log(2 * math.pi)


def pulled(backend, flow, variables, like, weight_of):
    """E_q weight_of(log p / q) (s_q - s_p) pulled back through the flow, for q = N(0, 1), and E_q log p / q, by quadrature."""
    z, share = np.polynomial.hermite_e.hermegauss(80)
    share = share / share.sum()
    log_w = -0.5 * ((z - 0.2) / 1.1) ** 2 + 0.5 * z**2 - math.log(1.1)
    cotangent = weight_of(log_w) * (-z + (z - 0.2) / 1.21) * share
    nodes = backend.asarray(z[:, None], like)
    _, pull = backend.vjp(lambda p: flow.push({**variables, "params": p}, nodes).x, variables["params"])
    (exact,) = pull(backend.asarray(cotangent[:, None], like))
    exact = [float(a.sum()) for a in tree.leaves(exact)]
    assert max(map(abs, exact)) > 0.1
    return exact, share @ log_w


def test_chi_square_is_the_gradient_of_its_divergence(backend):
    """Half of d E_q (p/q)^2, and a tenth of reverse KL's. 200 000 draws: standard errors are 1 % of the larger entry."""
    like = backend.asarray(backend.xp.zeros(1, dtype=backend.xp.float64))
    flow = flows.affine()(1)
    variables = flow.init(backend.rng(0, like), like)
    estimate, grads = chi_square(flow, variables, shifted, backend.rng(1, like), 200_000)
    exact, elbo = pulled(backend, flow, variables, like, lambda log_w: np.exp(2 * log_w) + 0.1)
    assert [float(a.sum()) for a in tree.leaves(grads)] == pytest.approx(exact, abs=0.01)
    assert float(estimate.elbo) == pytest.approx(elbo + LOG_Z, abs=0.01)


def test_learning_from_points_is_the_gradient_of_both_divergences(backend):
    """With 200 000 points of p: reverse KL's and half of d E_q (p/q)^2."""
    like = backend.asarray(backend.xp.zeros(1, dtype=backend.xp.float64))
    flow = flows.affine()(1)
    variables = flow.init(backend.rng(0, like), like)
    x = 0.2 + 1.1 * backend.normal(backend.rng(2, like), (200_000, 1), like)
    points = Points(x, *backend.value_and_score(shifted, x))
    control, look = no_control(like), backend.xp.asarray(False)
    _, grads, _ = both_ways(flow, variables, shifted, backend.rng(1, like), 200_000, control, look, points, LOG_Z)
    exact, _ = pulled(backend, flow, variables, like, lambda log_w: np.exp(2 * log_w) + 1)
    assert [float(a.sum()) for a in tree.leaves(grads)] == pytest.approx(exact, abs=0.01)


def test_chains_leave_a_flow_that_is_elsewhere(backend):
    """From a bent flow near zero to normals with means 1 and sds 0.5 and 1.5: 5000 points, of which some 1000 are independent."""
    like = backend.asarray(backend.xp.zeros(2, dtype=backend.xp.float64))
    flow = flows.nsf(layers=2, hidden=(8,), bins=4)(2)
    variables = flow.init(backend.rng(0, like), like)
    rng = np.random.default_rng(0)
    bent = tree.map(lambda p: p + backend.asarray(rng.normal(0, 0.25, tuple(p.shape)), p), variables["params"])
    variables = {**variables, "params": bent}
    sd = backend.asarray(np.array([0.5, 1.5]), like)
    target = lambda x: -0.5 * backend.xp.sum(((x - 1) / sd) ** 2, axis=-1)
    points = backend.jit(lambda rng: visited(flow, variables, target, rng, 100, 67))(backend.rng(1, like))
    x, log_p, score = map(backend.to_numpy, points)
    assert x.shape == score.shape == (5100, 2)
    np.testing.assert_allclose(x.mean(0), 1, atol=0.15)
    np.testing.assert_allclose(x.std(0), [0.5, 1.5], rtol=0.1)
    np.testing.assert_allclose(score, (1 - x) / np.array([0.5, 1.5]) ** 2, rtol=1e-10)
    np.testing.assert_allclose(log_p, -0.5 * ((x - 1) ** 2 / np.array([0.25, 2.25])).sum(1), rtol=1e-10)


def test_an_anchored_minibatch_is_exact_at_zero_and_unbiased_elsewhere(backend):
    """Four quartic terms, one in each of four minibatches: the mean of what they say is their sum, and so are gradients."""
    xp = backend.xp
    like = backend.asarray(xp.zeros(2, dtype=xp.float64))
    centres = np.random.default_rng(0).standard_normal((4, 2))
    x = backend.asarray(np.concatenate([np.zeros((1, 2)), np.random.default_rng(1).standard_normal((3, 2))]), like)
    term = lambda x, i: -xp.sum((x - backend.asarray(centres[i], like)) ** 4, axis=-1)
    whole = backend.value_and_score(lambda x: sum(term(x, i) for i in range(4)), x)
    parts = [anchored(lambda x, i=i: 4 * term(x, i), whole[0][0], whole[1][0]) for i in range(4)]
    found = [backend.value_and_score(part, x) for part in parts]
    for k in (0, 1):
        each = np.stack([backend.to_numpy(one[k]) for one in found])
        np.testing.assert_allclose(each.mean(0), backend.to_numpy(whole[k]), rtol=1e-10)
        np.testing.assert_allclose(each[:, 0], np.tile(backend.to_numpy(whole[k][0]), (4, *[1] * k)), rtol=1e-10)
        assert (each[:, 1:].std(0) > 0.1).all()


def test_a_minibatch_without_a_density_at_zero_is_taken_as_it_is(backend):
    x = backend.asarray(np.ones((2, 1)), backend.asarray(backend.xp.zeros(1, dtype=backend.xp.float64)))
    value, score = backend.value_and_score(
        anchored(lambda x: backend.xp.log(x[:, 0]), backend.xp.sum(x), backend.xp.sum(x, axis=0)), x
    )
    np.testing.assert_allclose(backend.to_numpy(value), 0, atol=1e-12)
    np.testing.assert_allclose(backend.to_numpy(score), 1)


# Training


def problem(backend, flow="affine"):
    like = backend.asarray(backend.xp.zeros(2, dtype=backend.xp.float64))
    normal = NormalApproximation(np.array([0.0, 0.5]), np.diag([0.9, 1.1]), -1.0, 0)
    return Problem(flows.get(flow)(2), banana(backend.xp), lambda seed: normal, like)


def test_a_banana_is_learned(backend):
    options = Options(num_particles=64, max_steps=400, chunk=50, learning_rate=1e-2)
    fit = fit_flow(problem(backend, flows.nsf(layers=2, hidden=(8,), bins=4)), 0, options, num_samples=2000)
    log_w = fit.draws[1] - math.log(2 * math.pi)
    # The draws that reach further cost up to 0.08.
    assert np.mean(log_w) > -0.1 > np.mean(fit.start[1]) - math.log(2 * math.pi) + 0.05
    assert fit.history[-1].move.end == pytest.approx(1.0)


def test_it_is_never_behind_its_start(backend):
    """With steps so large that every chunk ruins the flow, the start is what is left."""
    options = Options(num_particles=8, max_steps=20, chunk=10, optimizer=optim.adam(3.0))
    fit = fit_flow(problem(backend), 0, options, num_samples=500)
    assert np.mean(fit.draws[1]) >= np.mean(fit.start[1]) - 1e-9


def test_covering_tails_does_not_put_it_behind_its_start_either(backend, monkeypatch):
    """Steps so large that they ruin the flow, in a phase whose k-hat always falls."""
    khats = itertools.count(1)  # a later look sees a heavier tail, and the new one is looked at first
    evidence = refining.evidence_of
    monkeypatch.setattr(refining, "evidence_of", lambda draws: evidence(draws)._replace(khat=next(khats), ess=500.0))
    monkeypatch.setattr(refining, "_COVERING", [refining.annealed(2, 1000.0)])
    options = Options(num_particles=8, max_steps=40, chunk=10)
    fit = fit_flow(problem(backend), 0, options, num_samples=500)
    assert fit.history[-1].move.level == 1000.0
    assert np.mean(fit.draws[1]) >= np.mean(fit.start[1]) - 1e-9


@pytest.mark.parametrize("fuller", [True, False])
def test_chains_come_in_place_of_tails_where_few_draws_count(backend, monkeypatch, fuller):
    """What they taught is kept where more draws count, and the end of the training before them otherwise."""
    draws = []
    monkeypatch.setattr(refining, "_HEAVY", -math.inf)
    monkeypatch.setattr(refining, "_FEW", 2.0)
    monkeypatch.setattr(refining, "_fuller", lambda new, old: draws.extend([old, new]) or fuller)
    options = Options(num_particles=8, max_steps=80, chunk=10)
    fit = fit_flow(problem(backend), 0, options, num_samples=200)
    assert [record.move.level for record in fit.history][-8:] == [0.1] * 8
    np.testing.assert_array_equal(fit.draws[1], draws[int(fuller)][1])


@pytest.mark.parametrize(("lighter", "levels"), [((True,), [0.2]), ((False, True), [0.2, 0.05])])
def test_smaller_steps_follow_where_covering_tails_fails(backend, monkeypatch, lighter, levels):
    """And only there; what is kept is the end of the last attempt."""
    answers, draws = iter(lighter), []
    monkeypatch.setattr(refining, "_HEAVY", -math.inf)
    monkeypatch.setattr(refining, "_FEW", 0.0)
    monkeypatch.setattr(refining, "_lighter", lambda new, old: draws.append(new) or next(answers))
    options = Options(num_particles=8, max_steps=80, chunk=10)
    fit = fit_flow(problem(backend), 0, options, num_samples=200)
    assert [record.move.level for record in fit.history][-4 * len(levels) :: 4] == levels
    np.testing.assert_array_equal(fit.draws[1], draws[-1][1])


def test_a_mode_counts_by_the_mass_that_the_flow_misses(backend):
    """One percent of the mass far out is no mode, however far it is; five percent are."""
    xp = backend.xp
    like = backend.asarray(xp.zeros(2, dtype=xp.float64))
    flow = flows.affine()(2)
    variables = flow.init(backend.rng(0, like), like)
    target = lambda x: -0.5 * xp.minimum(xp.sum(x * x, axis=-1), 100.0 + 0 * x[:, 0]) - math.log(2 * math.pi)
    x = np.random.default_rng(0).standard_normal((1000, 2))
    task = Problem(flow, target, lambda seed: None, like)
    own = Fit(variables, (x, np.zeros(1000)), [], [], None)
    for share, expected in ((0.01, 0), (0.05, 1)):
        mode = np.where(np.arange(1000)[:, None] < 1000 * share, 50.0, x)
        assert len(fitting._missed(task, own, [(mode, np.zeros(1000))])) == expected


def test_a_mode_that_the_flow_misses_is_kept(backend):
    """Two modes of equal mass, six sds apart: the flow stays in one of them, and draws of the other are there to be judged."""
    xp = backend.xp

    def two(x):
        return backend.logsumexp(xp.stack([-0.5 * xp.sum((x - m) ** 2, axis=-1) for m in (-6.0, 6.0)]), axis=0)

    near, far = (NormalApproximation(np.full(2, m), np.eye(2), 0.0, 0) for m in (-6.0, 6.0))
    start = near._replace(others=(far, near))
    found = fit_flow(problem(backend)._replace(log_prob=two, normal=lambda seed: start), 0, SMALL, num_samples=500)
    assert len(found.others) == 1 and np.mean(found.others[0][0]) > 5


def test_restarts_keep_the_best(backend):
    starts = iter([NormalApproximation(np.zeros(2), np.eye(2) * s, 0.0, 0) for s in (30.0, 1.0)])
    options = Options(num_particles=8, max_steps=10, chunk=10, learning_rate=1e-6)
    fit = fit_flow(problem(backend)._replace(normal=lambda seed: next(starts)), 0, options, restarts=1, num_samples=200)
    assert np.mean(fit.start[1]) > -5 and len(fit.others) == 1


def test_weights_are_those_of_the_mixture_that_was_drawn_from(backend):
    """A standard normal target and flow: the mean weight is one, and the widened draws show in the spread and the weights.

    20 000 draws; the mean weight errs by 0.001, the variance of the draws by 0.01.
    """
    like = backend.asarray(backend.xp.zeros(2, dtype=backend.xp.float64))
    log_2pi = math.log(2 * math.pi)
    target = lambda x: -0.5 * backend.xp.sum(x * x, axis=-1) - log_2pi
    flow = flows.affine()(2)
    variables = flow.init(backend.rng(0, like), like)
    x, log_w = sampler(Problem(flow, target, lambda seed: None, like))(variables, 0, 20_000)
    assert np.mean(np.exp(log_w)) == pytest.approx(1.0, abs=0.004)
    assert np.mean(x**2) == pytest.approx(
        0.95 + 0.05 * 4, abs=0.04
    )  # one draw in ten has one of two coordinates doubled
    assert np.average(x**2, weights=np.tile(np.exp(log_w)[:, None], 2)) == pytest.approx(1.0, abs=0.04)
    assert log_w.max() <= math.log(10 / 9) + 1e-12  # defended: no weight is above that of the plain draws' share


def test_lighter_tails_do_not_cost_most_draws():
    """Weights of which a few count alone have no tail, and are worth less than those with a heavy one."""
    rng, n = np.random.default_rng(0), 10_000
    heavy = (np.zeros((n, 1)), 0.6 * rng.exponential(size=n))
    few = (np.zeros((n, 1)), np.where(rng.random(n) < 0.04, rng.random(n), -20.0))
    most = (np.zeros((n, 1)), rng.random(n))
    assert refining._lighter(most, heavy)
    assert not refining._lighter(few, heavy)
    assert not refining._lighter(heavy, most)


# Interruptions


@pytest.mark.parametrize("few", [0.0, 2.0], ids=["tails", "chains"])
def test_a_killed_run_ends_where_it_would_have(backend, tmp_path, monkeypatch, few):
    """Killed twice while it trains, and once while it covers tails or learns from chains."""
    monkeypatch.setattr(refining, "_HEAVY", -math.inf)
    monkeypatch.setattr(refining, "_FEW", few)
    whole = fit_flow(problem(backend), 3, SMALL, num_samples=100)
    length = len(whole.history)
    path = str(tmp_path / "run.ckpt")

    class Killed(Exception):
        pass

    def kill(history):
        if len(history) in (1, 3, length - 2):
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            fit_flow(problem(backend), 3, SMALL, num_samples=100, checkpoint=path, progress=kill)
    resumed = fit_flow(problem(backend), 3, SMALL, num_samples=100, checkpoint=path)
    assert resumed.history == whole.history
    for a, b in zip(*(tree.leaves(fit.variables) for fit in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))
    np.testing.assert_array_equal(resumed.draws[1], whole.draws[1])


def test_a_killed_run_of_minibatches_ends_where_it_would_have(tmp_path, monkeypatch):
    """Their random numbers are those of their chunk, too. A fit that takes all of the data is another one."""
    pytest.importorskip("torch")
    backend = get_backend("torch")
    target, xp = banana(backend.xp), backend.xp

    def noisy(rng, x):
        return target(x) + xp.sum(backend.normal(rng, (2,), x) * x**2, axis=-1)

    task = problem(backend)._replace(minibatch=noisy, plates={"rows": (100, 10)})
    covered = []
    monkeypatch.setattr(refining, "chi_square", lambda *args: covered.append(args))
    monkeypatch.setattr(refining, "_HEAVY", -math.inf)
    whole = fit_flow(task, 3, SMALL, num_samples=100)
    path = str(tmp_path / "run.ckpt")

    def kill(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_flow(task, 3, SMALL, num_samples=100, checkpoint=path, progress=kill)
    with pytest.raises(CheckpointError, match="plates differ"):
        fit_flow(problem(backend), 3, SMALL, num_samples=100, checkpoint=path)
    resumed = fit_flow(task, 3, SMALL, num_samples=100, checkpoint=path)
    assert resumed.history == whole.history and not covered
    for a, b in zip(*(tree.leaves(fit.variables) for fit in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))


def test_kill_9(tmp_path):
    """A process that kills itself while it writes leaves the last whole checkpoint."""
    pytest.importorskip("torch")
    code = f"""
    import os, signal, sys
    sys.path.insert(0, {os.getcwd()!r})
    from tests.test_training import SMALL, problem
    from flowppl.backend import get_backend
    from flowppl.fitting import fit_flow
    sync, calls = os.fsync, []
    def fsync(descriptor):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)
    os.fsync = fsync
    fit_flow(problem(get_backend("torch")), 3, SMALL, num_samples=100, checkpoint={str(tmp_path / "run.ckpt")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    seen = []
    again = fit_flow(
        problem(get_backend("torch")),
        3,
        SMALL,
        num_samples=100,
        checkpoint=str(tmp_path / "run.ckpt"),
        progress=lambda history: seen.append(len(history)),
    )
    whole = fit_flow(problem(get_backend("torch")), 3, SMALL, num_samples=100)
    assert seen[0] == 3 and again.history == whole.history


def test_checkpoints_of_other_fits_and_other_files_are_refused(backend, tmp_path):
    path = str(tmp_path / "run.ckpt")
    fit_flow(problem(backend), 3, SMALL, num_samples=100, checkpoint=path)
    with pytest.raises(CheckpointError, match="seed differ"):
        fit_flow(problem(backend), 4, SMALL, num_samples=100, checkpoint=path)
    other = problem(backend)
    moved = other._replace(normal=lambda seed: other.normal(seed)._replace(elbo=-2.0))
    with pytest.raises(CheckpointError, match="data differ"):
        fit_flow(moved, 3, SMALL, num_samples=100, checkpoint=path)
    (tmp_path / "other").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(tmp_path / "other", {}).load(None)


def descend(backend, elbo):
    """Training of one number with a gradient of one and no momentum, whose ELBO is a function of the number."""
    like = backend.asarray(backend.xp.zeros(1, dtype=backend.xp.float64))

    def gradient(variables, rng, control, refresh):
        value, zero = elbo(variables["params"]["w"][0]), backend.xp.zeros_like(like[0])
        return Estimate(value, zero, zero, zero), tree.map(backend.xp.ones_like, variables["params"]), control

    plain = optim.Optimizer(lambda params: (), lambda grads, state: (tree.map(lambda g: -g, grads), state))
    options = Options(max_steps=200, chunk=10, optimizer=plain)
    found, history = train(gradient, {"params": {"w": like}, "const": {}}, 0, options)
    return float(found["params"]["w"][0]), history


def averaged(history):
    """The running mean of the iterates of those chunks that were kept."""
    w = average = 0.0
    for factor in np.concatenate([r.move.factors(10) for r in history if r.kept]):
        w -= factor
        average = 0.98 * average + 0.02 * w
    return average


def test_the_average_of_the_iterates_is_returned(backend):
    found, history = descend(backend, lambda w: 0 * w)
    assert all(r.kept for r in history)
    assert found == pytest.approx(averaged(history))


def test_chunks_that_make_it_worse_are_undone(backend):
    """Every step loses a hundred nats: all chunks but the first, beside which there is nothing yet, are taken back."""
    found, history = descend(backend, lambda w: 100 * w)
    assert [r.kept for r in history] == [True] + [False] * (len(history) - 1) and len(history) > 3
    assert found == pytest.approx(averaged(history))


@pytest.mark.parametrize("flow", [flows.affine()(3), flows.nsf(layers=1, hidden=(4,), circular=(1,), boxed=True)(3)])
def test_an_affine_map_goes_into_the_end(backend, make_rng, flow):
    """The flow followed by x -> loc + scale x is the flow with the variables that `rescaled` returns."""
    like = backend.asarray(backend.xp.zeros(3, dtype=backend.xp.float64))
    rng = np.random.default_rng(0)
    noise = lambda a: backend.asarray(backend.xp.asarray(0.3 * rng.standard_normal(tuple(a.shape))), like)
    variables = flow.init(make_rng(0), like)
    variables = {**variables, "params": tree.map(lambda a: a + noise(a), variables["params"])}
    scale = np.tril(rng.standard_normal((3, 3)), -1) + np.diag([0.5, 2.0, 1e3])
    loc, scale = whitening(flow, noise(like), backend.asarray(backend.xp.asarray(scale), like))
    z = noise(backend.xp.stack([like] * 5))
    expected = loc + flow.push(variables, z).x @ scale.T
    found = flow.push(rescaled(flow, variables, loc, scale), z).x
    np.testing.assert_allclose(backend.to_numpy(found), backend.to_numpy(expected), rtol=1e-9, atol=1e-9)


def test_default_flows():
    assert default_flow(3)(3).dim == 3
    assert default_flow(500).name == "affine"


# The posterior


def test_draws_without_a_value_do_not_count():
    """One draw of two hundred overflowed: means and sds are those of the others, whether or not weights can be trusted."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((200, 1))
    u[3] = np.nan
    for log_w in (np.zeros(200), 5 * rng.standard_cauchy(200)):
        found = WeightedPosterior(Fit({}, (u, log_w), [], [], None), {"x": np.exp(u[:, 0])}, ["x"], None)
        assert np.isfinite(found.mean()["x"]) and np.isfinite(found.sd()["x"])
        assert found.weights.sum() == pytest.approx(1.0) and found.weights[3] == 0
        assert np.isfinite(found.resample(50)["x"]).all()


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = WeightedPosterior(
        Fit({}, (np.zeros((20, 1)), np.zeros(20)), [], [], None), {"x": np.zeros(20)}, ["x"], None
    )
    with pytest.raises(MissingExtraError, match="plots"):
        found.plot()


def test_flows_are_compared_by_their_own_draws():
    """A draw that reaches further, into a place of next to no density, says nothing against a flow."""
    log_w = np.random.default_rng(0).standard_normal(1000)
    far = np.where(np.arange(1000) == 30, -1e6, log_w)
    x = np.zeros((1000, 1))
    assert fitting._elbo((x, far)) == fitting._elbo((x, log_w)) == pytest.approx(log_w.mean(), abs=0.05)
    log_w[31] = -np.inf
    assert fitting._elbo((x, log_w)) == -np.inf


def test_moments_do_not_heed_draws_without_density():
    """What a warm start whitens by: draws that lie far out, where p has next to nothing, once spoilt it."""
    rng = np.random.default_rng(0)
    scale = np.linalg.cholesky(np.array([[4.0, 1.0], [1.0, 1.0]]))
    x, log_w = 3.0 + rng.normal(size=(20_000, 2)) @ scale.T, 0.1 * rng.normal(size=20_000)
    wild = rng.random(20_000) < 0.03
    x[wild], log_w[wild] = 1e9 * rng.normal(size=(wild.sum(), 2)), -1e15
    loc, scale_tril = fitting._moments((x, log_w))
    np.testing.assert_allclose(loc, 3.0, atol=0.1)
    np.testing.assert_allclose(scale_tril, scale, atol=0.1)
