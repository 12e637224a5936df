"""Oracles: torch.optim and optax."""

import numpy as np
import pytest

from flowppl import optim, tree

START = {"w": np.array([[1.0, -2.0], [0.5, 3.0]]), "net": (np.array([0.3, -0.1, 2.0]), np.array(1.5))}
STEPS = 60


def gradients(seed=0):
    """Gradients that change scale by orders of magnitude on the way."""
    rng = np.random.default_rng(seed)
    for i in range(STEPS):
        yield tree.map(lambda p, i=i: rng.standard_normal(p.shape) * 10.0 ** (2 * np.sin(i)), START)


def run(backend, f64, optimizer):
    params = tree.map(f64, START)
    state = optimizer.init(params)
    for g in gradients():
        updates, state = optimizer.update(tree.map(f64, g), state)
        params = optim.apply(params, updates)
    return [backend.to_numpy(p) for p in tree.leaves(params)]


def run_optax(transformation):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    params = jax.tree.map(jax.numpy.asarray, START)
    # with a count of 32 bits, optax computes schedules and bias corrections in float32, whatever the parameters are
    state = jax.tree.map(lambda s: s.astype(float), transformation.init(params))
    for g in gradients():
        updates, state = transformation.update(jax.tree.map(jax.numpy.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(p) for p in tree.leaves(params)]


def assert_same(ours, theirs, rtol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_adam_is_torchs(backend, f64, betas):
    torch = pytest.importorskip("torch")
    params = [torch.tensor(p, requires_grad=True) for p in tree.leaves(START)]
    theirs = torch.optim.Adam(params, lr=0.05, betas=betas, eps=1e-6)
    for g in gradients():
        for p, q in zip(params, tree.leaves(g), strict=True):
            p.grad = torch.tensor(q)
        theirs.step()
    ours = run(backend, f64, optim.adam(0.05, *betas, eps=1e-6))
    assert_same(ours, [p.detach().numpy() for p in params])


def test_clipped_scheduled_adam_is_optaxs(backend, f64):
    optax = pytest.importorskip("optax")
    theirs = optax.chain(
        optax.clip_by_global_norm(2.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 50, 0.01)),
    )
    ours = optim.chain(optim.clip_by_global_norm(2.0), optim.adam(optim.cosine(0.1, 50, warmup=10, final=0.01)))
    assert_same(run(backend, f64, ours), run_optax(theirs))


def test_schedules_are_optaxs(backend, f64):
    optax = pytest.importorskip("optax")
    steps = np.arange(80.0)
    for ours, theirs in [
        (optim.cosine(0.1, 50, warmup=10, final=0.01), optax.warmup_cosine_decay_schedule(0, 0.1, 10, 50, 0.01)),
        (optim.cosine(0.1, 50), optax.cosine_decay_schedule(0.1, 50)),
        (optim.constant(0.1), optax.constant_schedule(0.1)),
    ]:
        expected = [float(theirs(s)) for s in steps]
        np.testing.assert_allclose(backend.to_numpy(ours(f64(steps))), expected, rtol=1e-12, atol=1e-15)


def test_schedules_take_whole_steps(backend):
    assert float(optim.cosine(0.1, 10, warmup=4)(backend.asarray(1))) == pytest.approx(0.025)
    assert float(optim.constant(0.1)(backend.asarray(3))) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [-1, 10])
def test_cosine_refuses_a_warmup_that_does_not_fit(warmup):
    with pytest.raises(ValueError, match="warmup"):
        optim.cosine(0.1, 10, warmup=warmup)


def test_first_step_in_float32_has_the_exact_size(backend, f32):
    """Adam's first step is lr * g / (|g| + eps); a bias correction that cancels is wrong by 1e-5 here."""
    optimizer = optim.adam(1e-3, b2=0.99999)
    params = {"x": f32([3.0, -4.0])}
    updates, _ = optimizer.update({"x": f32([0.5, -20.0])}, optimizer.init(params))
    np.testing.assert_allclose(backend.to_numpy(updates["x"]), [-1e-3, 1e-3], rtol=1e-6)
    assert updates["x"].dtype == params["x"].dtype


def test_clipping_survives_squares_that_overflow(backend, f32):
    clip = optim.clip_by_global_norm(5.0)
    grads = {"a": f32([3e30]), "b": f32([0.0, -4e30])}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(backend.to_numpy(clipped["a"]), [3.0], rtol=1e-6)
    np.testing.assert_allclose(backend.to_numpy(clipped["b"]), [0.0, -4.0], rtol=1e-6)
    zero = {"a": f32([0.0])}
    assert float(clip.update(zero, ())[0]["a"][0]) == 0.0


def test_clipping_leaves_small_gradients_alone(backend, f64):
    clipped, _ = optim.clip_by_global_norm(5.0).update((f64([3.0]), f64([-4.0])), ())
    assert [float(g[0]) for g in clipped] == [3.0, -4.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_steps_leave_no_trace(backend, f64, bad):
    optimizer = optim.skip_nonfinite(optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1)))
    params = {"a": f64([1.0, 2.0]), "b": f64(3.0)}
    good = {"a": f64([0.1, -0.2]), "b": f64(0.3)}
    _, once = optimizer.update(good, optimizer.init(params))
    updates, skipped = optimizer.update({"a": f64([0.1, bad]), "b": f64(0.3)}, once)
    assert all(float(u.max()) == 0 and float(u.min()) == 0 for u in tree.leaves(updates))
    assert int(skipped.skipped) == 1 and int(once.skipped) == 0
    for a, b in zip(tree.leaves(skipped.inner), tree.leaves(once.inner), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))
    after, _ = optimizer.update(good, skipped)
    expected, _ = optimizer.update(good, once)
    np.testing.assert_array_equal(backend.to_numpy(after["a"]), backend.to_numpy(expected["a"]))


def test_a_step_compiles_and_maps(backend, f64):
    """Two fits with their own skips, under vmap and jit, step as they do alone: nothing is read back to the host."""
    optimizer = optim.skip_nonfinite(optim.chain(optim.clip_by_global_norm(1.0), optim.adam(optim.cosine(0.1, 9, 2))))
    grads = {"a": f64([[0.1, -3.0], [np.nan, 1.0], [4.0, 0.2]])}

    def two_steps(g):
        _, state = optimizer.update(g, optimizer.init(g))
        return optimizer.update(g, state)[0]["a"]

    mapped = backend.to_numpy(backend.jit(backend.vmap(two_steps))(grads))
    alone = np.stack([backend.to_numpy(two_steps(tree.index(grads, i))) for i in range(3)])
    np.testing.assert_allclose(mapped, alone, rtol=1e-13)
    assert np.all(mapped[1] == 0) and np.all(mapped[[0, 2]] != 0)


def test_parameters_of_torch_modules_are_not_attached():
    torch = pytest.importorskip("torch")
    params = {"w": torch.nn.Parameter(torch.ones(2))}
    optimizer = optim.adam(0.1)
    state = optimizer.init(params)
    assert not any(s.requires_grad for s in tree.leaves(state))
    updates, state = optimizer.update({"w": torch.ones(2)}, state)
    assert not optim.apply(params, updates)["w"].requires_grad
