"""Paths of maps and moves: their weights are exact in both directions, and each gradient is that of what it says."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from flowppl import flows, tree, weights
from flowppl.backend import backend_of
from flowppl.config import build, describe
from flowppl.errors import DimensionError
from flowppl.stochastic import Diffusion, Moves, Path, by_energy, by_layer, by_samples, snf, train_path
from flowppl.stochastic.draws import draw
from flowppl.training import Options

KERNELS = ("metropolis", "mala", "hmc", "langevin", "underdamped")
N = 20_000


def double_well(x):
    """Two wells of unequal depth in the first coordinate, one in three times as often."""
    return 0.5 * x[:, 0] + 3 * x[:, 0] ** 2 - x[:, 0] ** 4 - 0.5 * x[:, 1] ** 2


def funnel(x):
    xp = backend_of(x).xp
    return 2.0 - 0.5 * x[:, 0] ** 2 - 0.5 * x[:, 1] ** 2 * xp.exp(-x[:, 0]) - 0.5 * x[:, 0]


GRID = np.linspace(-5, 5, 20_001)
WELL = np.exp(0.5 * GRID + 3 * GRID**2 - GRID**4)
LOG_Z = {
    "double well": math.log(np.trapezoid(WELL, GRID)) + 0.5 * math.log(2 * math.pi),
    "funnel": 2.0 + math.log(2 * math.pi),
}
TARGETS = {"double well": double_well, "funnel": funnel}


def exact(name, seed=0, n=N):
    rng = np.random.default_rng(seed)
    if name == "double well":
        return np.stack([np.interp(rng.random(n), np.cumsum(WELL) / WELL.sum(), GRID), rng.standard_normal(n)], 1)
    v = rng.standard_normal(n)
    return np.stack([v, np.exp(v / 2) * rng.standard_normal(n)], 1)


def bent(backend, path, like, size=0.1):
    """Variables of a path whose maps are no identities and whose step sizes are off."""
    rng = np.random.default_rng(7)
    variables = path.init(backend.rng(0, like), like)
    move = lambda a: a + backend.asarray(backend.xp.asarray(size * rng.standard_normal(tuple(a.shape))), like)
    return {**variables, "params": tree.map(move, variables["params"])}


def check_evidence(log_w, log_z):
    """The mean weight is Z within four of its errors, which is small: a wrong sign or a missing term is seen."""
    w = np.exp(log_w - log_z)
    error = w.std() / len(w) ** 0.5
    assert error < 0.05
    assert abs(w.mean() - 1) < 4 * error


def check_pair(there, back):
    """E[w h(w)] over paths there is E[h(w)] over paths back, here with h(w) = 1 / (1 + w), which bounds both."""
    left, right = expit(there), expit(-back)
    error = math.hypot(left.std(), right.std()) / len(left) ** 0.5
    assert error < 0.005
    assert abs(left.mean() - right.mean()) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TARGETS])
def test_weights_are_exact_in_both_directions(backend, f64, make_rng, name):
    """With all kinds of moves between maps that are far from what they should be, at learned betas."""
    moves = [Moves(kernel, repeats=2, step_size=0.3, leapfrog=2) for kernel in KERNELS]
    diffusion = Diffusion(2, end=1.5, steps=3, hidden=(4,))
    path = snf([flows.realnvp(layers=2, hidden=(4,)), *moves, diffusion, flows.affine()], dim=2, learned=True)
    variables, log_prob = bent(backend, path, f64(0.0), 0.05), TARGETS[name]
    run = backend.jit(lambda rng: path.forward(rng, variables, log_prob, N))(make_rng(0))
    check_evidence(backend.to_numpy(run.log_w), LOG_Z[name])
    back = backend.jit(lambda rng, x: path.backward(rng, variables, log_prob, x))(make_rng(1), f64(exact(name)))
    check_pair(backend.to_numpy(run.log_w) - LOG_Z[name], backend.to_numpy(back.log_w) - LOG_Z[name])


@pytest.mark.slow
def test_resampled_paths_have_the_same_mean_weight(backend, f64, make_rng):
    """Over forty islands, since paths of one depend on each other."""
    path = snf([Moves("hmc", step_size=0.3, leapfrog=2)] * 4, dim=2)
    variables = path.init(make_rng(0), f64(0.0))
    run = backend.jit(lambda rng: path.forward(rng, variables, double_well, 200, resample_below=0.9))
    log_z = np.array([weights.log_mean_exp(backend.to_numpy(run(make_rng(i)).log_w)) for i in range(40)])
    check_evidence(log_z, LOG_Z["double well"])


def test_the_energy_gradient_is_that_of_the_mean_log_weight(backend, f64, make_rng):
    """By differences with the same noise, through two kinds of Langevin dynamics, in step sizes, maps and betas."""
    layers = [Moves("langevin", 2), flows.affine(), Moves("underdamped", 1, leapfrog=2)]
    path = snf(layers, dim=2, learned=True)
    variables = bent(backend, path, f64(0.0))
    _, grads = backend.jit(lambda rng: by_energy(path, variables, double_well, rng, 50))(make_rng(3))
    elbo = backend.jit(lambda params, rng: path.forward(rng, {**variables, "params": params}, double_well, 50).log_w)
    leaves = tree.leaves(variables["params"])

    def value(i, step):
        moved = [a + (step if j == i else 0.0) * direction[j] for j, a in enumerate(leaves)]
        params = tree.unflatten(variables["params"], moved)
        return -backend.to_numpy(elbo(params, make_rng(3))).mean()

    rng = np.random.default_rng(0)
    direction = [f64(rng.standard_normal(tuple(a.shape))) for a in leaves]
    for i, (g, d) in enumerate(zip(tree.leaves(grads), direction, strict=True)):
        difference = (value(i, 1e-5) - value(i, -1e-5)) / 2e-5
        np.testing.assert_allclose(float(backend.to_numpy(backend.xp.sum(g * d))), difference, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_decisions_are_counted(backend, f64, make_rng):
    """A map before moves that often refuse: only with the score of the decisions is the gradient that of the mean."""
    path = snf([flows.affine(), Moves("metropolis", 2, step_size=1.5), flows.affine()], dim=1, betas=(0.5,))
    variables = bent(backend, path, f64(0.0), 0.4)
    log_prob = lambda x: -2 * (x[:, 0] - 1) ** 2
    n, step = 400_000, 0.02

    def at(delta):
        first, *rest = variables["params"]["layers"]
        return {**variables, "params": {**variables["params"], "layers": (tree.map(lambda a: a + delta, first), *rest)}}

    mean = backend.jit(lambda delta, rng: path.forward(rng, at(delta), log_prob, n).log_w)
    pairs = backend.to_numpy(mean(f64(-step), make_rng(5)) - mean(f64(step), make_rng(5))) / (2 * step)
    error = pairs.std() / n**0.5
    found = []
    for decisions in (False, True):
        one = backend.jit(
            lambda rng, d=decisions: by_energy(path, variables, log_prob, rng, n, decisions=d)[1]["layers"][0]
        )
        found.append(sum(float(backend.to_numpy(backend.xp.sum(a))) for a in tree.leaves(one(make_rng(6)))))

    assert error < 0.025
    assert abs(found[1] - pairs.mean()) < 4 * error + 0.02
    assert abs(found[0] - pairs.mean()) > 0.2


def test_a_map_that_is_right_has_no_gradient(backend, f64, make_rng):
    """Between normals: by layer with any draws; and the likelihood of paths does not vary."""
    path = snf([flows.affine(), Moves("hmc", step_size=0.3), flows.affine()], 1, betas=(0.4,))
    sd, loc = 0.5, 1.0
    log_prob = lambda x: -0.5 * ((x[:, 0] - loc) / sd) ** 2
    log_z = math.log(sd) + 0.5 * math.log(2 * math.pi)
    precision = 0.6 + 0.4 / sd**2
    first = (0.4 * loc / sd**2 / precision, precision**-0.5)
    second = (loc - sd / first[1] * first[0], sd / first[1])
    variables = path.init(make_rng(0), f64(0.0))
    layers = list(variables["params"]["layers"])
    for i, (shift, scale) in ((0, first), (2, second)):
        layers[i] = path.layers[i].from_cholesky(f64([shift]), f64([[scale]]))
    variables = {**variables, "params": {**variables["params"], "layers": tuple(layers)}}

    def everything(rng, x):
        estimate, grads = by_layer(path, variables, log_prob, rng, 50)
        back, _ = by_samples(path, variables, log_prob, rng, x)
        return (
            estimate.fisher,
            (grads["layers"][0], grads["layers"][2]),
            path.forward(rng, variables, log_prob, 50).log_w,
            back.elbo,
        )

    x = f64(loc + sd * np.random.default_rng(0).standard_normal((50, 1)))
    fisher, grads, log_w, back = backend.jit(everything)(make_rng(1), x)
    for g in tree.leaves(grads):
        np.testing.assert_allclose(backend.to_numpy(g), 0.0, atol=1e-7)
    assert float(backend.to_numpy(fisher)) < 1e-14
    np.testing.assert_allclose(backend.to_numpy(log_w), log_z, atol=1e-7)
    np.testing.assert_allclose(float(backend.to_numpy(back)), -log_z, atol=1e-7)


@pytest.mark.parametrize(
    "backend", ["torch"], indirect=True, scope="session"
)  # jax compiles each for as long as it trains
@pytest.mark.parametrize(("by", "kernel"), [("layer", "hmc"), ("energy", "langevin"), ("samples", "mala")])
def test_training(backend, f64, make_rng, by, kernel):
    """The objective gets better, and step sizes come to their acceptance."""
    path = snf([flows.realnvp(layers=2, hidden=(16,)), Moves(kernel, 3, leapfrog=3)], dim=2)
    variables = path.init(make_rng(0), f64(0.0))
    samples = f64(exact("double well", 1, 5000)) if by == "samples" else None
    options = Options(num_particles=100, max_steps=150, chunk=50, learning_rate=1e-2)
    how = {"by": by} if samples is None else {"samples": samples, "share": 1.0}
    trained, history = train_path(path, variables, double_well, options=options, **how)
    run = path.forward(make_rng(1), trained, double_well, 4000)
    assert len(history) == 3
    if by == "layer":
        assert history[-1].fisher < 0.3 * history[0].fisher
        assert np.all(np.abs(backend.to_numpy(run.acceptance) - 0.8) < 0.12)
    else:
        assert history[-1].elbo > history[0].elbo + 0.05


def test_a_diffusion_without_drift_is_a_brownian_motion(backend, f64, make_rng):
    """From N(0, 1) to N(0, end), whatever the way: weights know only where it ends, and by how much it is missed."""
    path = snf([Diffusion(1, end=2.0, steps=3), Diffusion(1, start=2.0, end=3.0, steps=2)], dim=1)
    variables = path.init(make_rng(0), f64(0.0))
    log_prob = lambda x: -0.5 * x[:, 0] ** 2 / 2.5
    run = path.forward(make_rng(1), variables, log_prob, 2000)
    x = backend.to_numpy(run.x)[:, 0]
    expected = -0.5 * x**2 / 2.5 + 0.5 * x**2 / 3 + 0.5 * math.log(2 * math.pi * 3)
    np.testing.assert_allclose(backend.to_numpy(run.log_w), expected, atol=1e-9)
    assert abs(x.var() / 3 - 1) < 4 * (2 / 2000) ** 0.5
    back = path.backward(make_rng(2), variables, log_prob, run.x)
    np.testing.assert_allclose(backend.to_numpy(back.log_w), expected, atol=1e-9)
    assert abs(backend.to_numpy(back.x).var() - 1) < 4 * (2 / 2000) ** 0.5
    with pytest.raises(ValueError, match="0 < start < end"):
        Diffusion(1, end=0.5)
    with pytest.raises(ValueError, match="at least 1"):
        Diffusion(1, steps=0)


@pytest.mark.parametrize("backend", ["torch"], indirect=True, scope="session")  # jax runs what was traced
def test_the_target_is_evaluated_where_it_has_to_be(backend, f64, make_rng):
    """Where moves start, in each of their steps, and at the end unless they end there: not at the base, nor between maps."""
    calls = []

    def counted(x):
        calls.append(len(x))
        return double_well(x)

    def count(layers, ask):
        path = snf(layers, dim=2)
        calls.clear()
        ask(path, path.init(make_rng(0), f64(0.0)))
        assert set(calls) <= {8}
        return len(calls)

    def forward(path, variables):
        path.forward(make_rng(1), variables, counted, 8)

    def backward(path, variables):
        path.backward(make_rng(1), variables, counted, f64(np.ones((8, 2))))

    def drawn(path, variables):
        draw(make_rng(1), path, variables, counted, 8, f64([1.0, 2.0]), f64(np.eye(2)))

    def layerwise(path, variables):
        by_layer(path, variables, counted, make_rng(1), 8)

    flow, langevin, hmc = flows.affine(), Moves("langevin", 3), Moves("hmc", leapfrog=4)
    for ask in (forward, drawn):
        assert count([flow, langevin], ask) == 1 + 3
        assert count([langevin, hmc], ask) == 1 + 3 + 4
        assert count([flow, flow, Moves("metropolis", 2), hmc, flow, flow], ask) == 1 + 2 + 4 + 1
        assert count([flow, Diffusion(2)], ask) == 1
    assert count([flow, langevin, flow, hmc], backward) == 1 + 4 + 1 + 3
    assert count([flow, langevin, flow], backward) == 1 + 1 + 3
    assert count([flow, hmc, flow], layerwise) == 1 + 4 + 1


def test_a_draw_has_the_density_of_the_target(backend, f64, make_rng):
    """log q + log_w is log p at x, in whatever coordinates the path goes, with its derivatives."""
    path = snf([flows.affine(), Moves("langevin", 2)], dim=2)
    variables, loc = bent(backend, path, f64(0.0)), f64([0.5, -1.0])
    scale_tril = f64([[0.5, 0.0], [0.3, 2.0]])

    weight = f64(np.random.default_rng(0).standard_normal(20))

    def total(params, asked):
        scale = params["scale"] * scale_tril
        found = draw(make_rng(2), path, {**variables, **params}, double_well, 20, loc, scale)
        return backend.xp.sum(weight * (double_well(found.x) if asked else found.log_q + found.log_w))

    def both(params):
        return [backend.value_and_grad(lambda p, a=asked: total(p, a), params) for asked in (False, True)]

    known, asked = backend.jit(both)({"params": variables["params"], "scale": f64(1.1)})
    for a, b in zip(tree.leaves(known), tree.leaves(asked), strict=True):
        np.testing.assert_allclose(backend.to_numpy(a), backend.to_numpy(b), rtol=1e-9, atol=1e-12)


WALL = 1.5


def harsh(x):
    """A standard normal before a wall, beyond which nothing is a number, nor is any derivative."""
    xp = backend_of(x).xp
    return -0.5 * xp.sum(x * x, axis=1) + 0 * xp.sqrt(WALL - x[:, 0])


def mild(x):
    """The same density, by a choice, through which no derivative flows."""
    xp = backend_of(x).xp
    return xp.where(x[:, 0] < WALL, -0.5 * xp.sum(x * x, axis=1), xp.nan)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["langevin", "underdamped", "hmc"])
def test_paths_that_went_astray_count_for_nothing(backend, f64, make_rng, kernel):
    """By energy and in the ELBO of a guide: the gradient is that of the mean over the other paths."""
    path = snf([flows.affine(), Moves(kernel, 2, step_size=0.5, leapfrog=2)], dim=2)
    variables, scale_tril = bent(backend, path, f64(0.0)), f64([[1.2, 0.0], [0.3, 0.8]])

    def elbo(params, log_prob):
        """As the losses of the languages have it: not finite, which its derivatives are."""
        at = {**variables, "params": params["path"]}
        found = draw(make_rng(4), path, at, log_prob, 100, f64([0.2, 0.0]), params["scale"] * scale_tril)
        return backend.xp.sum(log_prob(found.x) - found.log_q)

    def both(params):
        at = {**variables, "params": params["path"]}
        energies = [by_energy(path, at, f, make_rng(3), 100) for f in (harsh, mild)]
        return energies, [backend.value_and_grad(lambda p, f=f: elbo(p, f), params)[1] for f in (harsh, mild)]

    energies, elbos = backend.jit(both)({"path": variables["params"], "scale": f64(1.1)})
    assert 0.02 < float(backend.to_numpy(energies[0][0].lost)) < 0.5
    for found, expected in (energies, elbos):
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            assert np.isfinite(backend.to_numpy(b)).all()
            np.testing.assert_allclose(backend.to_numpy(a), backend.to_numpy(b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch"], indirect=True, scope="session")
@pytest.mark.parametrize("kernel", ["langevin", "underdamped", "hmc"])
def test_training_goes_on_beside_paths_that_went_astray(backend, f64, make_rng, kernel):
    path = snf([flows.affine(), Moves(kernel, 2, step_size=0.5, leapfrog=2)], dim=2)
    options = Options(num_particles=50, max_steps=20, chunk=10)
    _, history = train_path(path, path.init(make_rng(0), f64(0.0)), harsh, by="energy", options=options)
    assert all(record.skipped == 0 and 0 < record.lost < 0.5 for record in history)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["langevin", "underdamped", "hmc"])
def test_weights_are_exact_where_paths_go_astray(backend, f64, make_rng, kernel):
    """Those that come back from where there is no density count, by what they have gone through."""
    path = snf([Moves(kernel, 3, step_size=0.6, leapfrog=2)] * 2, dim=2)
    variables = path.init(make_rng(0), f64(0.0))
    run = backend.jit(lambda rng: path.forward(rng, variables, harsh, N))(make_rng(1))
    log_w = backend.to_numpy(run.log_w)
    assert log_w[np.isfinite(log_w)].min() > -100
    check_evidence(log_w, math.log(2 * math.pi) + math.log(norm.cdf(WALL)))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["langevin", "underdamped", "hmc"])
def test_steps_that_are_too_long_have_finite_gradients(backend, f32, make_rng, kernel):
    """An exponential wall throws them out of what float32 holds, dynamics and all."""
    path = snf([flows.affine(), Moves(kernel, 8, step_size=3.0, leapfrog=3), flows.affine()], dim=2)
    variables = path.init(make_rng(0), f32(0.0))

    def log_prob(x):
        xp = backend.xp
        return -xp.exp(x[:, 0]) - 0.5 * xp.sum(x * x, axis=1)

    def gradient(rng):
        return by_energy(path, variables, log_prob, rng, 200, decisions=True)[1]

    for g in tree.leaves(backend.jit(gradient)(make_rng(1))):
        assert np.isfinite(backend.to_numpy(g)).all()


def test_configuration():
    """A path describes itself, and refuses layers that do not fit."""
    path = snf(["realnvp", Moves("mala", 2)], dim=3, betas=(0.7,))
    assert build(describe(path)) == path and path.num_moves == 1
    with pytest.raises(DimensionError, match="expected maps of dim=2"):
        Path((flows.affine()(3).bijection,), dim=2)
    for bad in ((0.5,), (0.7, 0.3), (0.5, 1.5)):
        with pytest.raises(ValueError, match="2 increasing numbers"):
            snf([Moves(), Moves()], 2, betas=bad)
    with pytest.raises(ValueError, match="kernel must be one of"):
        Moves("gibbs")
    with pytest.raises(ValueError, match="repeats must be positive"):
        Moves("hmc", repeats=0)
    with pytest.raises(ValueError, match="by must be"):
        train_path(path, {}, double_well, by="magic")
