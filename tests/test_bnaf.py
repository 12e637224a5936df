"""Block neural autoregressive maps: structure, slopes within their bounds, an inverse everywhere, and few sweeps."""

import numpy as np
import pytest

from flowppl import tree
from flowppl.bijections import bind, watch_solves
from flowppl.bijections.bnaf import BlockAutoregressive
from flowppl.bijections.nilpotent import nilpotent_solve
from flowppl.networks.block_autoregressive import BlockMLP
from tests.registry import gradient, jacobian, on, to_numpy

pytestmark = pytest.mark.slow  # once for both fronts is enough: jax compiles for minutes


def params_of(bijection, scale=1.0, noise=0.3):
    rng = np.random.default_rng(0)
    params = bind(bijection.init(rng))
    return tree.map(lambda p: scale * (p + noise * rng.standard_normal(p.shape)), params)


@pytest.mark.parametrize("hidden", [(5,), (4, 3), (2, 3, 4)])
def test_jacobian_is_lower_triangular_with_the_slopes_on_its_diagonal(backend, hidden):
    bijection = BlockAutoregressive(4, hidden=hidden)
    params, x = on(backend, (params_of(bijection, 2.0), np.random.default_rng(1).standard_normal((6, 4))))
    _, log_det = bijection.forward(params, x)
    j = backend.to_numpy(jacobian(backend, lambda x: bijection.forward(params, x)[0], x))
    assert np.all(j[:, *np.triu_indices(4, 1)] == 0)
    assert np.all(np.abs(j[:, *np.tril_indices(4, -1)]) > 1e-6)  # every coordinate depends on all before it
    diagonal = np.diagonal(j, axis1=-2, axis2=-1)
    np.testing.assert_allclose(backend.to_numpy(log_det), np.log(diagonal).sum(-1), atol=1e-12)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_slopes_stay_within_their_bounds(sign):
    """Weights of the last blocks at either end of their range: the least slope is approached and never passed."""
    f = BlockMLP(3, (6, 5))
    params = f.init(np.random.default_rng(0))
    *hidden, last = params["layers"]
    # all kinks in one place, where slopes are extreme
    hidden = [{**layer, "bias": 0 * layer["bias"]} for layer in hidden]
    params = {"layers": (*hidden, {**last, "diagonal": last["diagonal"] + sign * 1e6})}
    x = np.random.default_rng(1).standard_normal((3, 100)) * np.logspace(-6, 6, 100)
    _, slope, _ = f.apply(f.constrain(params), x)
    assert np.all(slope > 0.1) and np.all(slope < 18.2)
    assert np.min(slope) < 0.15 if sign < 0 else np.max(slope) > 18


def test_the_identity_has_gradients(backend):
    """Where the flow starts, the loss sees every number of the last layer."""
    bijection = BlockAutoregressive(3, 2)
    params = on(backend, bind(bijection.init(np.random.default_rng(0))))
    rng = np.random.default_rng(1)
    x, context, w = on(backend, (rng.standard_normal((5, 3)), rng.standard_normal((5, 2)), rng.standard_normal((5, 3))))

    def loss(params):
        y, log_det = bijection.forward(params, x, context)
        return (y * w).sum() + log_det.sum(), (y, log_det)

    (y, log_det), (grads,) = to_numpy(backend, gradient(backend, loss, params))
    np.testing.assert_array_equal(y, backend.to_numpy(x))
    assert not log_det.any()
    last = grads["f"]["layers"][-1]
    assert np.all(last["diagonal"] != 0) and np.all(last["bias"] != 0)
    assert np.all(last["weight"].reshape(3, 3, -1)[np.tril_indices(3, -1)] != 0)
    assert np.all(grads["net"]["layers"][-1]["bias"][-3:] != 0)  # the context shifts y at once


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_inverse_at_far_points(dtype, scale):
    """Every point has a preimage: y is reached from anywhere, in either direction."""
    bijection = BlockAutoregressive(4, hidden=(4, 3))
    params = tree.map(lambda p: p.astype(dtype), params_of(bijection, scale))
    y = np.random.default_rng(1).standard_normal((20, 4)).astype(dtype)
    y = np.concatenate([y, 1e3 * y, 1e6 * y, np.full((1, 4), -1e6, dtype)])
    x, log_det = bijection.inverse(params, y)
    assert x.dtype == dtype and np.all(np.isfinite(x)) and np.all(np.isfinite(log_det))
    again, forward = bijection.forward(params, x)
    size = 1 + np.max(np.abs(x), axis=-1) + np.max(np.abs(y), axis=-1)
    assert np.all(np.max(np.abs(again - y), axis=-1) <= 1e3 * scale * np.finfo(dtype).eps * size)
    np.testing.assert_allclose(log_det, -forward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "most"), [(1.0, 16), (2.0, 20), (4.0, 26)])
def test_far_fewer_sweeps_than_coordinates(scale, most):
    dim = 64
    bijection = BlockAutoregressive(dim)
    params = params_of(bijection, scale, 0.2)
    x = np.random.default_rng(1).standard_normal((20, dim))
    y, _ = bijection.forward(params, x)
    with watch_solves() as solves:
        back, _ = bijection.inverse(params, y)
    np.testing.assert_allclose(back, x, atol=1e-11)
    (outer,) = (s for s in solves if s.method == "jacobi")
    assert outer.steps <= most and outer.unsolved == 0
    assert max(s.steps for s in solves if s.method == "root") <= 12


def test_nilpotent_solve():
    rng = np.random.default_rng(0)
    n = 5 * np.tril(rng.standard_normal((9, 9)), -1)
    d, rest = 0.1 + rng.random((3, 9)), rng.standard_normal((3, 9))
    u = nilpotent_solve(lambda u: u @ n.T, d, rest)
    np.testing.assert_allclose(d * u + u @ n.T, rest, rtol=1e-9, atol=1e-9 * np.max(np.abs(u)))


def test_refusals():
    with pytest.raises(ValueError, match="hidden must"):
        BlockAutoregressive(3, hidden=())
