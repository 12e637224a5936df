"""Programs in both frameworks: their weights, dead particles, and the gradients that they give through a flow."""

import numpy as np
import pytest

from flowppl import tree
from flowppl.backend import get_backend
from flowppl.bijections import Affine, Chain, Coupling, LULinear
from flowppl.flows import Flow
from flowppl.objectives import path_log_prob, programs, score
from flowppl.objectives.control import Control
from tests.conftest import FRAMEWORKS
from tests.registry import assert_close, compiled, gradient, on, variables

pytestmark = pytest.mark.slow  # once for both fronts is enough

ALL = {
    **{name: make() for name, make in programs.PROGRAMS.items()},
    "renyi": programs.renyi(0.4),
    "cubo 3": programs.cubo(3.0),
    "renyi -1": programs.renyi(-1.0),
    "alpha": programs.alpha_divergence(0.5),
    "mixture": programs.mixture([(0.7, programs.elbo()), (0.3, programs.jensen_shannon())]),
}
UNBIASED = {name: program for name, program in ALL.items() if program.unbiased}
LOG_W = np.random.default_rng(0).standard_normal((5, 3)) * [0.3, 1.0, 4.0]


@pytest.mark.parametrize("name", [name for name, program in UNBIASED.items() if program.weights is not None])
def test_closed_weights_are_the_derived_ones(backend, name):
    """Those that programs write down are what the rule gives for their values."""
    program, log_w = UNBIASED[name], on(backend, LOG_W)
    found = program(log_w)[1], programs.derived(program.value, log_w)
    assert_close(*(tree.map(backend.to_numpy, tuple(w)) for w in found), 1e-12)


def test_cubo_draws_towards_what_the_guide_lacks(backend):
    """Its weights are those of the gradient of the mean squared weight, over that mean: none is negative, and they add up."""
    _, (model, guide) = programs.cubo(3.0)(on(backend, LOG_W))
    expected = np.exp(3 * LOG_W) / np.exp(3 * LOG_W).sum(0)
    assert_close(*(np.asarray(backend.to_numpy(a)) for a in (guide, 2 * on(backend, expected))), 1e-12)
    assert_close(*(np.asarray(backend.to_numpy(a)) for a in (model, -on(backend, expected))), 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_particles_of_no_weight(backend, name):
    """What multiplies gradients stays finite where the model has no density."""
    log_w = LOG_W.copy()
    log_w[1, 0] = log_w[:, 1] = -np.inf  # one of five, and all
    value, weights = ALL[name](on(backend, log_w))
    assert all(np.all(np.isfinite(backend.to_numpy(w))) for w in weights)
    assert not np.any(np.isnan(backend.to_numpy(value)))


def test_baselines_leave_one_out(backend):
    """The mean log-weight of the others stands for a particle's own; what is not finite has no part in it."""
    log_w = LOG_W.copy()
    log_w[1, 0] = log_w[1:, 1] = log_w[:, 2] = -np.inf  # one of five, all but one, and all
    square = lambda log_w: log_w * backend.xp.sum(log_w, axis=0)
    for credit, each in ((programs.iwae().value, lambda a: np.log(np.exp(a).mean())), (square, lambda a: a * a.sum())):
        for kept in (LOG_W, log_w, LOG_W[:1]):
            expected = np.zeros_like(kept)
            for k, b in np.ndindex(kept.shape):
                others = np.delete(kept[:, b], k)
                without = kept[:, b].copy()
                without[k] = np.append(others[np.isfinite(others)], [] if np.isfinite(others).any() else 0.0).mean()
                with np.errstate(divide="ignore", invalid="ignore"):
                    both = (np.broadcast_to(each(a), len(a))[k] for a in (kept[:, b], without))
                    expected[k, b] = np.nan_to_num(np.subtract(*both), nan=0.0, posinf=0.0, neginf=0.0)
            found = backend.to_numpy(score.leave_one_out(credit, on(backend, kept)))
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", UNBIASED)
def test_scores_have_no_weight_where_particles_are_alike(backend, name):
    alike, free = (on(backend, a) for a in (0 * LOG_W + 0.3, LOG_W))
    for coefficient in (0.0, 0.4, 1.0):
        assert (
            np.abs(backend.to_numpy(programs.cotangents(ALL[name], alike, coefficient, scored=True).score)).max()
            < 1e-12
        )
        assert (
            np.abs(backend.to_numpy(programs.cotangents(ALL[name], free, coefficient, scored=True).score)).min() > 1e-6
        )


FLOW = Flow(Chain((Coupling(2, Affine(), 1, (4,)), LULinear(2))))
RNG = np.random.default_rng(3)
Z, CONTEXT = RNG.standard_normal((5, 2)), RNG.standard_normal((5, 1))


def log_p(xp, x):
    """A Student's t times the density of a ring."""
    return -3 * xp.sum(xp.log(1 + x * x / 5), axis=-1) - (xp.sum(x * x, axis=-1) - 2) ** 2 / 4


def gradients(backend, program, coefficient):
    """Of the program in the flow's parameters and the context, from given base draws; and those that autodiff has."""
    v, z, context = on(backend, (variables(FLOW), Z, CONTEXT))

    def surrogate(params, context):
        sample = FLOW.push({**v, "params": params}, z, context, with_score=True)
        log_prob, xp = log_p(backend.xp, sample.x), backend.xp
        c = programs.cotangents(program, backend.stop(log_prob - sample.log_prob), coefficient)
        path = path_log_prob(sample, sample.x, context)
        value = xp.sum(c.latents * log_prob + c.frozen * path + c.plain * sample.log_prob)
        return value, c.value

    def direct(params, context):
        sample = FLOW.push({**v, "params": params}, z, context, with_log_prob=True)
        return program.value(log_p(backend.xp, sample.x) - sample.log_prob), ()

    def both(params, context):
        return gradient(backend, surrogate, params, context), gradient(backend, direct, params, context)[1]

    return tree.map(backend.to_numpy, compiled(backend, both)(v["params"], context))


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="needs torch and jax")
@pytest.mark.parametrize("name", ALL)
def test_torch_and_jax_agree(name):
    coefficient = 0.3 if ALL[name].unbiased else 0.0
    (torch_, _), (jax_, _) = (gradients(get_backend(f), ALL[name], coefficient) for f in FRAMEWORKS)
    assert max(np.abs(g).max() for g in tree.leaves(torch_[1])) > 1e-3
    assert_close(torch_, jax_, 1e-8)


@pytest.mark.parametrize("name", UNBIASED)
def test_at_coefficient_one_the_gradient_is_that_of_autodiff(name):
    (_, found), expected = gradients(get_backend(FRAMEWORKS[0]), UNBIASED[name], 1.0)
    assert_close(found, expected, 1e-10)


def test_the_control_forgets_nothing_over_what_is_not_finite(backend):
    one = on(backend, np.ones(2))
    control = Control(one[0], one[0])
    same = control.updated([one * np.inf], [one])
    assert [float(a) for a in same] == [1.0, 1.0]
    assert [float(a) for a in control.updated([one], [-one])] == pytest.approx([0.9 - 0.2, 0.9 + 0.2])
