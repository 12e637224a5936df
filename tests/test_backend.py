"""The protocol, function by function, for every framework. Oracles: numpy, scipy, closed forms, the frameworks."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from flowppl import backend as backends
from flowppl import tree
from flowppl.backend import backend_of, backend_of_rng, get_backend
from flowppl.backend.protocol import Backend
from flowppl.bijections import watch_solves
from flowppl.bijections.solves import fixed_point, iterate

EVERYWHERE = pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")


def close(backend, actual, expected, rtol=1e-12, atol=1e-12):
    np.testing.assert_allclose(backend.to_numpy(actual), expected, rtol=rtol, atol=atol)


def draws_ok(counts, p):
    """Chi-square with a false alarm rate of 1e-4."""
    return stats.chisquare(counts, np.sum(counts) * np.asarray(p)).pvalue > 1e-4


# Dispatch


def test_importing_the_core_imports_no_framework():
    code = (
        "import sys, flowppl.backend, flowppl.tree, flowppl.optim, flowppl.weights\n"
        "sys.exit(', '.join({'torch', 'jax', 'jaxlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@EVERYWHERE
def test_modules_have_the_protocols_names_and_arguments(backend):
    module = backend
    assert module is get_backend(module.name) and module.__name__.endswith(f"_{module.name}")
    for attribute, method in inspect.getmembers(Backend, inspect.isfunction):
        if attribute.startswith("_"):
            continue
        function = getattr(module, attribute)
        if inspect.isfunction(function) and function.__module__ == module.__name__ and function.__name__ == attribute:
            assert list(inspect.signature(function).parameters) == list(inspect.signature(method).parameters)[1:]


def test_backend_of_arrays_and_trees(backend, f64, make_rng):
    x = f64([1.0, 2.0])
    assert backend_of(x) is backend
    assert backend_of(None, 1.0, True, x) is backend
    assert backend_of({"a": (1, [None, {"b": x}])}) is backend
    assert backend_of(np.ones(2), x, np.float64(1)) is backend
    assert backend_of(make_rng(0)) is backend
    seen = []
    backend.vmap(lambda x: [seen.append(backend_of(x)), x][1])(x)
    backend.jit(lambda x: [seen.append(backend_of(x)), x][1])(x)
    backend.vjp(lambda x: [seen.append(backend_of(x)), x][1], x)
    assert seen == [backend] * 3


def test_backend_of_numpy():
    for x in (np.ones(2), np.float32(1), np.random.default_rng(0)):
        assert backend_of(x, None, 2).name == "numpy"


def test_backend_of_subclasses():
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):
        pass

    assert backend_of(torch.nn.Parameter(torch.ones(1))).name == "torch"
    assert backend_of(torch.ones(1).as_subclass(Mine)).name == "torch"


def test_mixed_frameworks_are_named():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"torch \(Tensor\) and jax \(ArrayImpl\).*convert"):
        backend_of({"a": torch.ones(1)}, [jax.numpy.ones(1)])


@pytest.mark.parametrize("arrays", [(), (1.0, None), ({},), ("text",), (object(),)])
def test_nothing_recognised(arrays):
    with pytest.raises(TypeError, match="at least one torch, jax or numpy array"):
        backend_of(*arrays)


def test_backend_of_rng(backend, make_rng):
    assert backend_of_rng(make_rng(0)) is backend
    assert backend_of_rng(np.random.default_rng(0)).name == "numpy"
    with pytest.raises(TypeError, match="expected a"):
        backend_of_rng(0)
    with pytest.raises(TypeError, match="expected a"):
        backend_of_rng(np.ones(2))


def test_backend_of_raw_key():
    jax = pytest.importorskip("jax")
    assert backend_of_rng(jax.random.PRNGKey(0)).name == "jax"


def test_no_rng_is_torchs_global_one(monkeypatch):
    if "torch" in sys.modules:
        assert backend_of_rng(None).name == "torch"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TypeError, match=r"jax\.random\.key\(seed\)"):
        backend_of_rng(None)


def test_get_backend_refuses_other_names():
    with pytest.raises(ValueError, match="expected"):
        get_backend("tensorflow")


def test_torch_compiles_through_dispatch_and_vjp():
    torch = pytest.importorskip("torch")

    def f(x):
        backend = backend_of({"x": (x, 1.0, None)})
        return backend.vjp(lambda x: (backend.softplus(x), None), x)[1]((x, None))[0]

    x = torch.linspace(-1, 1, 5)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, x * torch.sigmoid(x))


def test_relu_compiled():
    """It has an own rule there, which stores what it returns and no mask."""
    torch = pytest.importorskip("torch")
    backend = get_backend("torch")

    def f(x, v):
        (y,), pull = backend.vjp(lambda x: (backend.relu(x),), x)
        return y, pull((v,))[0]

    x, v = torch.tensor([-np.inf, -1.0, 0.0, 2.0, np.inf]), torch.arange(1.0, 6.0)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(x, v), f(x, v), strict=True):
        torch.testing.assert_close(found, expected)
    x, v = x[1:-1].requires_grad_(), v[1:-1].requires_grad_()
    outer = torch.compile(backend.relu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(outer(x), x, v.detach()), (torch.tensor([0.0, 0.0, 4.0]),))
    grads = torch.autograd.grad((compiled(x, v)[1] ** 2).sum(), (x, v), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(grads, (torch.zeros(3), torch.tensor([0.0, 0.0, 8.0])))
    mapped = torch.compile(torch.func.vmap(backend.relu), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(mapped(x.detach()), torch.relu(x.detach()))


# Arrays


def test_stop(backend, f64):
    def f(x):
        stopped = backend.stop({"a": (x * x, None), "n": 3})
        return stopped["a"][0] * x * stopped["n"]

    y, pull = backend.vjp(f, f64([2.0]))
    assert float(y[0]) == 24 and float(pull(f64([1.0]))[0][0]) == 12


@EVERYWHERE
def test_asarray_follows_like_in_floats_alone(backend, f32, f64):
    for like in (f32([1.0]), f64([1.0])):
        for a in (1.5, [1.5], np.array([1.5]), np.array([1.5, 0.0])[::-1], f32([1.5]), f64([1.5])):
            assert backend.asarray(a, like).dtype == like.dtype
    assert backend.asarray(f64([1.5])).dtype == backend.asarray(f64([1.5]), backend.asarray(3)).dtype == f64(0.0).dtype
    for a in (3, [3], np.array([3]), True, np.array([True]), backend.asarray(np.array([3]))):
        kept = backend.to_numpy(backend.asarray(a, like)).dtype
        assert kept.kind == np.asarray(backend.to_numpy(backend.asarray(a))).dtype.kind in "ib"
    default = backend.xp.zeros(()).dtype
    assert backend.asarray(np.ones(2, np.float64)).dtype == default
    assert backend.asarray(1.5, backend.asarray(3)).dtype == backend.asarray([1.5]).dtype == default


def test_asarray_copies_what_torch_cannot_share():
    pytest.importorskip("torch")
    backend = get_backend("torch")
    source = np.arange(3.0)
    x = backend.asarray(source)
    source[0] = 9.0
    assert float(x[0]) == 0.0
    y = backend.to_numpy(x)
    y[1] = 9.0
    assert float(x[1]) == 1.0


def test_asarray_has_no_weak_type():
    pytest.importorskip("jax")
    assert not get_backend("jax").asarray(1.0).weak_type


@EVERYWHERE
def test_gather_set_at_index_add(backend, f64):
    a = np.arange(12.0).reshape(3, 4)
    x, v = f64(a), np.array([[10.0], [20.0], [30.0]])
    idx = np.array([[0], [2], [3]])
    close(backend, backend.gather(x, backend.asarray(idx), 1), np.take_along_axis(a, idx, 1))
    close(backend, backend.gather(x, backend.asarray(np.array([[1]])), -1), a[:, 1:2])
    for at, value in [((slice(None), 1), v[:, 0]), (0, np.zeros(4)), ((Ellipsis, slice(2, None)), v), ((1, 2), 5.0)]:
        expected = a.copy()
        expected[at] = value
        close(backend, backend.set_at(x, at, f64(value)), expected)
    for axis in (1, -1):
        expected = a.copy()
        np.add.at(expected, (slice(None), np.array([1, 1, 3])), np.ones((3, 3)))
        added = backend.index_add(x, backend.asarray(np.array([1, 1, 3])), f64(np.ones((3, 3))), axis)
        close(backend, added, expected)
    close(backend, x, a)


@pytest.mark.parametrize("at", [1, slice(1, None), (Ellipsis, 0), np.array([2, 0])], ids=str)
def test_set_at_maps_and_differentiates(backend, f64, at):
    a = np.arange(3.0)
    at = backend.asarray(at) if isinstance(at, np.ndarray) else at
    size = np.size(a[at if not hasattr(at, "dtype") else backend.to_numpy(at)])
    values = np.arange(10.0, 10.0 + 2 * size).reshape(2, size)
    values = values[:, 0] if size == 1 and not isinstance(at, slice) else values
    expected = np.stack([a, a])
    for row, v in zip(expected, values, strict=True):
        row[at if not hasattr(at, "dtype") else backend.to_numpy(at)] = v
    f = backend.vmap(lambda v: backend.set_at(f64(a), at, v))
    out, pull = backend.vjp(f, f64(values))
    close(backend, out, expected)
    close(backend, pull(f64(expected))[0], values)


# Special functions

SPECIAL = {
    "softplus": lambda x: np.logaddexp(x, 0),
    "erf": special.erf,
    "lgamma": lambda x: special.gammaln(np.abs(x) + 0.1),
    "digamma": lambda x: special.digamma(np.abs(x) + 0.1),
    "log_i0": lambda x: np.log(special.i0e(x)) + np.abs(x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * special.expit(x),
    "gelu": lambda x: x * special.ndtr(x),
}


@pytest.mark.parametrize("function", SPECIAL)
@EVERYWHERE
def test_special_functions(backend, function, f64):
    x = np.concatenate([np.linspace(-8, 8, 101), np.linspace(19, 45, 27), [700.0]])
    a = np.abs(x) + 0.1 if function in ("lgamma", "digamma") else x
    close(backend, getattr(backend, function)(f64(a)), SPECIAL[function](x), rtol=2e-14, atol=1e-14)


@EVERYWHERE
def test_ndtri_softmax_logsumexp(backend, f64):
    p = np.array([1e-300, 1e-10, 0.1, 0.5, 0.9, 1 - 1e-10])
    close(backend, backend.ndtri(f64(p)), special.ndtri(p), rtol=1e-13)
    x = np.random.default_rng(0).normal(size=(3, 4)) * 500
    for axis in (0, -1):
        close(backend, backend.softmax(f64(x), axis=axis), special.softmax(x, axis))
        close(backend, backend.logsumexp(f64(x), axis=axis), special.logsumexp(x, axis))
    close(backend, backend.softmax(f64(x)), special.softmax(x, -1))
    close(backend, backend.logsumexp(f64(x)), special.logsumexp(x, -1))


@EVERYWHERE
def test_log_ndtr(backend, f64, f32):
    """Relative errors down to -1e3, where the probability itself is far below the least number."""
    x = np.concatenate([np.linspace(-45, 3, 193), [-1e3, -19.99, -20.01, -9.99, -10.01]])
    close(backend, backend.log_ndtr(f64(x)), special.log_ndtr(x), rtol=2e-14)
    close(backend, backend.log_ndtr(f32(x)), special.log_ndtr(np.float64(np.float32(x))), rtol=1e-6, atol=1e-7)


def test_log_ndtr_has_two_derivatives(backend, f64):
    """The hazard rate h, and h' = h (h - x) at -x."""
    x = np.array([-30.0, -8.0, -1.0, 0.0, 2.0])
    hazard = np.exp(-0.5 * x * x - 0.5 * np.log(2 * np.pi) - special.log_ndtr(x))
    slope = lambda x: backend.vjp(backend.log_ndtr, x)[1](backend.xp.ones_like(x))[0]
    close(backend, slope(f64(x)), hazard, rtol=1e-11)
    close(backend, backend.vjp(slope, f64(x))[1](f64(np.ones(5)))[0], -hazard * (hazard + x), rtol=1e-9)


def test_log_i0_does_not_overflow_and_curves(backend, f64, f32):
    """The slope is I1 / I0, and the curvature at zero is 1/2."""
    x = np.array([-1e4, -3.0, 0.0, 0.5, 1e3])
    slope = lambda x: backend.vjp(backend.log_i0, x)[1](backend.xp.ones_like(x))[0]
    close(backend, slope(f64(x)), special.i1e(x) / special.i0e(x))
    close(backend, backend.vjp(slope, f64([0.0]))[1](f64([1.0]))[0], [0.5])
    assert np.isfinite(backend.to_numpy(backend.log_i0(f32([3e38, -1e5])))).all()


@given(
    shapes=st.sampled_from(
        [((3, 3), (3, 2)), ((3, 3), (5, 3, 2)), ((3, 3), (4, 5, 3, 1)), ((5, 3, 3), (3, 2)), ((5, 3, 3), (5, 3, 2)),
         ((4, 1, 3, 3), (5, 3, 2)), ((1, 1), (2, 1, 1)), ((3, 3), (0, 3, 2))]
    ),
    lower=st.booleans(),
    transpose=st.booleans(),
    unit=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
@EVERYWHERE
def test_solve_triangular(backend, shapes, lower, transpose, unit, seed, f64):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=shapes[0]), rng.normal(size=shapes[1])
    d = a.shape[-1]
    a = a + np.where(np.eye(d) > 0, 3 * np.sign(a), 0)  # the other triangle, and a diagonal that `unit` ignores, stay
    t = np.tril(a) if lower else np.triu(a)
    t = np.where(np.eye(d) > 0, 1.0, t) if unit else t
    expected = np.linalg.solve(np.swapaxes(t, -1, -2) if transpose else t, b)
    x = backend.solve_triangular(f64(a), f64(b), lower=lower, transpose=transpose, unit=unit)
    assert x.shape == expected.shape
    close(backend, x, expected, rtol=1e-9, atol=1e-9)


# Derivatives


def test_vjp_of_several_primals_with_aux(backend, f64):
    out, pull, aux = backend.vjp(lambda x, y: (x * y, x + 1), f64([2.0]), f64([5.0]), has_aux=True)
    assert float(out[0]) == 10 and float(aux[0]) == 3
    assert [float(g[0]) for g in pull(f64([1.0]))] == [5, 2]
    assert [float(g[0]) for g in pull(f64([2.0]))] == [10, 4]


def test_vjp_of_trees(backend, f64):
    def f(p, y):
        return {"y": y * p["a"][0], "none": None, "pair": (y, p["a"][0] ** 2)}

    p = {"a": (f64([3.0]), None)}
    out, pull = backend.vjp(f, p, f64([2.0]))
    assert set(out) == {"y", "none", "pair"} and out["none"] is None and float(out["pair"][1][0]) == 9
    gp, gy = pull({"y": f64([1.0]), "none": None, "pair": (f64([10.0]), f64([100.0]))})
    assert float(gp["a"][0][0]) == 2 + 600 and gp["a"][1] is None and float(gy[0]) == 3 + 10
    assert len(backend.vjp(lambda y: y, f64([2.0]))[1](f64([1.0]))) == 1


def test_vjp_is_differentiable_again_and_maps(backend, f64):
    slope = lambda x: backend.vjp(lambda x: x**4, x)[1](backend.xp.ones_like(x))[0]
    curve = lambda x: backend.vjp(slope, x)[1](backend.xp.ones_like(x))[0]
    x = f64([1.0, 2.0])
    close(backend, slope(x), [4, 32])
    close(backend, curve(x), [12, 48])
    close(backend, backend.vmap(curve)(x), [12, 48])


def test_value_and_grad(backend, f64):
    params = {"used": (f64([1.0, 2.0]), None), "unused": f64([3.0])}
    loss = lambda p, scale: backend.xp.sum(p["used"][0] ** 2) * scale
    value, grads = backend.value_and_grad(loss, params, 3.0)
    assert float(value) == 15
    close(backend, grads["used"][0], [6, 12])
    close(backend, grads["unused"], [0])
    assert grads["used"][1] is None
    (value, aux), grads = backend.value_and_grad(lambda p: (loss(p, 1.0), {"aux": p["unused"]}), params, has_aux=True)
    assert float(value) == 5 and float(aux["aux"][0]) == 3
    close(backend, grads["used"][0], [2, 4])


def test_value_and_grad_of_a_constant(backend, f64):
    value, grads = backend.value_and_grad(lambda p: f64(1.0), {"a": f64([3.0])})
    assert float(value) == 1 and float(grads["a"][0]) == 0


def test_value_and_grad_of_torch_parameters_leaves_them_alone():
    torch = pytest.importorskip("torch")
    backend = get_backend("torch")
    parameter, plain = torch.nn.Parameter(torch.ones(2)), torch.ones(2)
    attached = parameter * 3
    params = {"a": parameter, "b": plain, "c": attached}
    loss = lambda p: (p["a"] * 2 + p["b"] * 3 + p["c"] * 5).sum()
    with torch.no_grad():
        (value, aux), grads = backend.value_and_grad(lambda p: (loss(p), p["a"] * 1), params, has_aux=True)
    assert [float(grads[k][0]) for k in "abc"] == [2, 3, 5]
    assert parameter.grad is None and not plain.requires_grad
    assert not any(t.requires_grad for t in (value, aux, *tree.leaves(grads)))


def test_value_and_score(backend, f64):
    x = np.random.default_rng(0).normal(size=(5, 3))
    value, score = backend.value_and_score(lambda x: -backend.xp.sum(x**4, axis=-1), f64(x))
    close(backend, value, -np.sum(x**4, -1))
    close(backend, score, -4 * x**3)
    close(backend, backend.value_and_score(lambda x: f64(np.zeros(5)), f64(x))[1], 0 * x)


def test_scores_of_torch_are_detached_even_without_gradients_or_in_inference():
    torch = pytest.importorskip("torch")
    backend = get_backend("torch")
    weight = torch.nn.Parameter(torch.tensor(2.0))
    x = torch.ones(4, 3, requires_grad=True)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            value, score = backend.value_and_score(lambda x: -weight * (x**2).sum(-1), x * 1)
        assert not value.requires_grad and not score.requires_grad
        torch.testing.assert_close(score, torch.full((4, 3), -4.0))
    assert weight.grad is None and x.grad is None


@pytest.mark.parametrize("attached", [True, False])
def test_scores_are_differentiable_where_asked(backend, f64, attached):
    """And only there: what is not asked for is not traced through the log density twice."""

    def total(x):
        return backend.xp.sum(backend.value_and_score(lambda x: -(x**4).sum(-1), x, attached)[1])

    _, slope = backend.value_and_grad(total, f64(np.ones((2, 3))))
    close(backend, slope, np.full((2, 3), -12.0 if attached else 0.0))


# Fixed points

W = np.array([[0.3, -0.2, 0.1], [0.0, 0.4, 0.2], [0.1, 0.1, -0.3]])
B = np.array([[0.5, -1.0, 0.2], [1.5, 0.3, -0.7]])


def contraction(backend):
    return lambda args, x: backend.xp.tanh(x @ backend.xp.matrix_transpose(args["W"]) + args["b"][0])


def solve(backend, w, b, step=None, max_steps=400, tol=1e-15):
    args = {"W": w, "b": (b, None)}
    return fixed_point(step or contraction(backend), args, backend.xp.zeros_like(b), max_steps=max_steps, tol=tol)


def test_fixed_point(backend, f64):
    x = backend.to_numpy(solve(backend, f64(W), f64(B)))
    np.testing.assert_allclose(np.tanh(x @ W.T + B), x, atol=1e-14)
    x = solve(backend, f64(W), f64(B), max_steps=3)
    expected = np.zeros_like(B)
    for _ in range(3):
        expected = np.tanh(expected @ W.T + B)
    close(backend, x, expected)


def test_fixed_point_stops_at_the_tolerance(backend, f64):
    """x = x / 2 + b doubles its digits at a known rate: the error after step n is 2 b 2^-n; each number has its own scale."""
    x = solve(backend, f64(W), f64([[1.0], [1e6]]), step=lambda a, x: x / 2 + a["b"][0], tol=1e-3)
    error = 2 - backend.to_numpy(x)[:, 0] / [1.0, 1e6]
    assert 2.0**-12 < error[0] <= 2.0**-8


def test_fixed_points_can_be_watched(f64, backend):
    step = lambda a, x: x / 2 + a["b"][0]
    with watch_solves() as solves:
        solve(backend, f64(W), f64([1.0]), step=step, tol=1e-3)
        solve(backend, f64(W), f64([1.0]), step=step, tol=1e-3, max_steps=4)
    (_, steps, residual, unsolved), short = solves
    assert steps in (10, 11) and residual <= 1e-3 and unsolved == 0
    assert short.steps == 4 and short.unsolved == 1 and short.residual > 1e-3


@pytest.mark.parametrize(("max_steps", "unsolved"), [(2, 2), (3, 0)])
def test_a_triangular_map_is_solved_by_as_many_sweeps_as_numbers(f64, backend, max_steps, unsolved):
    """0, 0, 0; 1, 1, 1; 1, 6, 8; 1, 6, 43: the last sweep still changes a number, and makes it exact."""
    lower = f64([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 7.0, 0.0]])
    sweep = lambda x: lower @ x + 1
    with watch_solves() as solves:
        x = iterate(sweep, f64([0.0, 0.0, 0.0]), max_steps=max_steps, tol=1e-9, method="jacobi", exact=max_steps == 3)
    assert [(s.steps, s.unsolved) for s in solves] == [(max_steps, unsolved)] and solves[0].residual > 1e-9
    assert bool((backend.to_numpy(x) == [1.0, 6.0, 43.0]).all()) == (max_steps == 3)


def linear_oracle(w, b):
    return np.linalg.solve(np.eye(3) - w, b.T).T


def test_fixed_point_of_a_linear_map_has_the_exact_derivatives(backend, f64):
    """x = (I - W)^-1 b: dx/db = (I - W)^-1, and the Hessian of c.x in W and b is known too."""
    step = lambda args, x: x @ backend.xp.matrix_transpose(args["W"]) + args["b"][0]
    f = lambda w, b: solve(backend, w, b, step)
    inverse, c = np.linalg.inv(np.eye(3) - W), np.array([[1.0, -2.0, 0.5], [0.3, 0.2, 0.1]])
    x, pull = backend.vjp(f, f64(W), f64(B))
    close(backend, x, linear_oracle(W, B))
    gw, gb = pull(f64(c))
    close(backend, gb, c @ inverse)
    close(backend, gw, (c @ inverse).T @ linear_oracle(W, B))
    # derivative of <gw, V> in b: gw is linear in x, hence in b
    v = np.arange(9.0).reshape(3, 3) - 4
    contracted = lambda b: backend.xp.sum(backend.vjp(f, f64(W), b)[1](f64(c))[0] * f64(v))
    (second,) = backend.vjp(contracted, f64(B))[1](f64(1.0))
    close(backend, second, (c @ inverse) @ v @ inverse)


def test_fixed_point_of_torch_passes_gradgradcheck():
    torch = pytest.importorskip("torch")
    f = lambda w, b: solve(get_backend("torch"), w, b)
    w, b = torch.tensor(W, requires_grad=True), torch.tensor(B, requires_grad=True)
    assert torch.autograd.gradcheck(f, (w, b))
    assert torch.autograd.gradgradcheck(f, (w, b))


def test_fixed_point_of_jax_passes_check_grads_in_both_modes():
    jax = pytest.importorskip("jax")
    from jax.test_util import check_grads

    f = jax.jit(lambda w, b: solve(get_backend("jax"), w, b))
    check_grads(f, (W, B), order=2, modes=("fwd", "rev"))


def test_fixed_point_has_no_derivative_in_its_start(backend, f64):
    f = lambda x0: fixed_point(lambda a, x: x / 2 + a, f64([1.0]), x0, max_steps=2, tol=0.0)
    assert float(backend.vjp(f, f64([3.0]))[1](f64([1.0]))[0][0]) == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_fixed_point_maps_and_compiles_with_whole_numbers_in_its_arguments(backend, f64):
    """x = b + n cos(x) / 2, with n = 0 and 1."""

    def f(b, n):
        step = lambda a, x: a["b"] + 0.5 * a["n"] * backend.xp.cos(x)
        return fixed_point(step, {"b": b, "n": n}, backend.xp.zeros_like(b), max_steps=200, tol=1e-15)

    x = 1.0
    for _ in range(200):
        x = 1 + 0.5 * np.cos(x)
    slope = lambda b, n: backend.vjp(lambda b: f(b, n), b)[1](backend.xp.ones_like(b))[0]
    b, n = f64([[1.0], [1.0]]), backend.asarray(np.array([[0], [1]]))
    for transform in (backend.vmap, lambda f: backend.jit(backend.vmap(f))):
        close(backend, transform(f)(b, n), [[1.0], [x]])
        close(backend, transform(slope)(b, n), [[1.0], [1 / (1 + 0.5 * np.sin(x))]])
    if backend.name == "torch":
        import torch

        close(backend, torch.compile(f, backend="aot_eager")(b, n), [[1.0], [x]])


# Foreign functions


def foreign(x):
    assert isinstance(x, np.ndarray) and x.dtype == np.float64 and x.ndim == 2
    return np.sum(x**3, -1), 3 * x**2


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_external(backend, request, dtype):
    make = request.getfixturevalue(dtype)
    a = np.random.default_rng(0).normal(size=(4, 3))
    x = make(a)
    v, pull = backend.vjp(lambda x: backend.external(foreign, x), x)
    assert v.dtype == x.dtype
    close(backend, v, np.sum(a**3, -1), rtol=1e-6)
    (g,) = pull(make(np.arange(4)))
    assert g.dtype == x.dtype
    close(backend, g, np.arange(4)[:, None] * 3 * a**2, rtol=1e-6)
    close(backend, backend.jit(lambda x: backend.external(foreign, x))(x), np.sum(a**3, -1), rtol=1e-6)
    close(backend, backend.value_and_score(lambda x: backend.external(foreign, x), x)[1], 3 * a**2, rtol=1e-6)


def test_external_maps(backend, f64):
    a = np.random.default_rng(0).normal(size=(2, 4, 3))
    f = lambda x: backend.external(foreign, x)
    close(backend, backend.vmap(f)(f64(a)), np.sum(a**3, -1))
    close(backend, backend.vmap(f, in_axes=1)(f64(a)), np.sum(a**3, -1).T)
    close(backend, backend.vmap(backend.vmap(f))(f64(a[None])), np.sum(a**3, -1)[None])
    score = lambda x: backend.vjp(f, x)[1](backend.xp.ones_like(x[:, 0]))[0]
    close(backend, backend.vmap(score)(f64(a)), 3 * a**2)
    out, pull = backend.vjp(backend.vmap(f), f64(a))
    close(backend, pull(backend.xp.ones_like(out))[0], 3 * a**2)


def test_external_has_no_second_derivative_and_says_so(backend, f64):
    """Also where another term would hide that it is missing."""
    x = f64(np.ones((4, 3)))
    score = lambda x: x**2 + backend.vjp(lambda x: backend.external(foreign, x), x)[1](x[:, 0])[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        backend.vjp(score, x)[1](x)


@EVERYWHERE
def test_external_checks_shapes(backend, f64):
    close(backend, backend.external(foreign, f64(np.ones((2, 3)))), [3, 3])
    with pytest.raises(ValueError, match=r"takes \(batch, d\)"):
        backend.external(foreign, f64(np.ones(3)))
    with pytest.raises(Exception, match="expected"):
        backend.to_numpy(backend.external(lambda x: (x, x), f64(np.ones((2, 3)))))


@pytest.mark.parametrize("function", ["vjp", "value_and_grad", "value_and_score"])
def test_numpy_has_no_derivatives(function):
    with pytest.raises(NotImplementedError, match="no derivatives"):
        getattr(get_backend("numpy"), function)(np.sin, np.ones(2))


def test_numpy_fixed_point():
    x = solve(get_backend("numpy"), W, B)
    np.testing.assert_allclose(np.tanh(x @ W.T + B), x, atol=1e-14)


# Control flow


@EVERYWHERE
def test_scan(backend, f64):
    xs = {"a": f64([[1.0], [2.0], [3.0]]), "empty": (), "none": None}

    def body(carry, x):
        assert x["none"] is None and x["empty"] == ()
        carry = (carry[0] * 2 + x["a"], None)
        return carry, {"seen": carry[0], "none": None}

    carry, ys = backend.scan(body, (f64([1.0]), None), xs)
    close(backend, carry[0], [19.0])
    close(backend, ys["seen"], [[3.0], [8.0], [19.0]])
    assert ys["none"] is None and carry[1] is None
    assert backend.scan(lambda c, x: (c + x, None), f64([0.0]), xs["a"])[1] is None


def test_scan_differentiates(backend, f64):
    f = lambda x: backend.scan(lambda c, x: (c * x, c), f64(1.0), x)[0]
    close(backend, backend.vjp(f, f64([2.0, 3.0, 5.0]))[1](f64(1.0))[0], [15, 10, 6])


def test_scan_of_nothing_is_refused(backend, f64):
    with pytest.raises(ValueError):
        backend.scan(lambda c, x: (c, x), f64(0.0), {})


@EVERYWHERE
def test_while_loop(backend, f64):
    state = {"n": backend.asarray(0), "x": (f64(1.0), None)}
    body = lambda s: {"n": s["n"] + 1, "x": (s["x"][0] * 2, None)}
    out = backend.while_loop(lambda s: s["x"][0] < 100, body, state, max_steps=50)
    assert int(out["n"]) == 7 and float(out["x"][0]) == 128 and out["x"][1] is None
    assert int(backend.while_loop(lambda s: s["x"][0] < 100, body, state, max_steps=5)["n"]) == 5
    assert int(backend.while_loop(lambda s: s["x"][0] < 1, body, state, max_steps=5)["n"]) == 0


def double_up(backend, a):
    """The first a 2^n above 100, and n."""
    body = lambda s: (s[0] * 2, s[1] + 1)
    start = (a, backend.asarray(0))
    return backend.while_loop(lambda s: s[0] < 100, body, start, max_steps=20)


def test_while_loop_maps_row_by_row(backend, f64):
    x, n = backend.vmap(lambda a: double_up(backend, a))(f64([1.0, 30.0, 500.0]))
    close(backend, x, [128, 120, 500])
    assert backend.to_numpy(n).tolist() == [7, 2, 0]


def test_while_loop_has_no_derivatives_whatever_it_closes_over(backend, f64):
    def f(a):
        return a * backend.while_loop(lambda s: s < 100 * a, lambda s: s * a, a, max_steps=20)

    close(backend, backend.vjp(f, f64(2.0))[1](f64(1.0))[0], 256)
    close(backend, backend.vjp(lambda a: a * double_up(backend, a)[0], f64(500.0))[1](f64(1.0))[0], 500)
    close(backend, backend.vmap(lambda a: backend.vjp(f, a)[1](a)[0])(f64([2.0, 3.0])), [512, 3 * 729])


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
def test_while_loop_of_torch_leaves_early_unless_mapped_or_compiled():
    torch = pytest.importorskip("torch")
    backend = get_backend("torch")
    calls = []

    def f(a):
        calls.append(1)
        return a * 2

    loop = lambda a: backend.while_loop(lambda s: s < 100, f, a, max_steps=20)
    assert float(loop(torch.tensor(1.0))) == 128 and len(calls) == 7
    torch.func.vjp(loop, torch.tensor(1.0))
    assert len(calls) == 14
    torch.func.vmap(loop)(torch.ones(2))
    assert len(calls) == 34
    traced = torch.jit.trace(loop, torch.tensor(90.0), check_trace=False)
    assert float(traced(torch.tensor(1.0))) == 128
    compiled = torch.compile(
        lambda a: backend.while_loop(lambda s: s < 100, lambda s: s * 2, a, max_steps=20), backend="aot_eager",
        fullgraph=True,
    )  # fmt: skip
    assert float(compiled(torch.tensor(90.0))) == 180 and float(compiled(torch.tensor(1.0))) == 128
    assert backend.while_loop(lambda s: s < 100, f, torch.ones((), device="meta"), max_steps=3).is_meta


def test_while_loop_of_jax_carries_keys():
    jax = pytest.importorskip("jax")
    body = lambda s: (jax.random.split(s[0])[0], s[1] + 1)
    key, n = get_backend("jax").while_loop(lambda s: s[1] < 3, body, (jax.random.key(0), 0), max_steps=9)
    assert int(n) == 3 and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)


@EVERYWHERE
def test_cond(backend, f64):
    x = f64(np.array([1.0, 2.0]))
    f = lambda p: backend.cond(p, lambda x, y: {"z": x + y}, lambda x, y: {"z": x - y}, x, 5.0)["z"]
    for true in (True, backend.asarray(True), x[0] > 0):
        close(backend, f(true), [6, 7])
    close(backend, f(x[0] < 0), [-4, -3])


def test_cond_maps_and_differentiates(backend, f64):
    f = lambda x: backend.cond(x > 0, lambda x: x * 2, lambda x: x * 3, x)
    x = f64([1.0, -1.0])
    close(backend, backend.vmap(f)(x), [2, -3])
    close(backend, backend.vmap(lambda x: backend.vjp(f, x)[1](x)[0])(x), [2, -3])


def test_cond_of_torch_runs_one_branch():
    torch = pytest.importorskip("torch")
    assert float(get_backend("torch").cond(torch.tensor(True), lambda x: x, lambda x: 1 / 0, torch.tensor(1.0))) == 1


@EVERYWHERE
def test_vmap(backend, f64):
    f = lambda p, y, c: {"s": p["a"][0] * c + y[0], "none": None, "pair": (y, 2.0)}
    p = {"a": (f64([1.0, 2.0]), None)}
    out = backend.vmap(f, in_axes=(0, 1, None))(p, f64([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), f64(10.0))
    close(backend, out["s"], [11, 22])
    assert out["none"] is None
    close(backend, out["pair"][0], [[1, 3, 5], [2, 4, 6]])
    close(backend, out["pair"][1], [2, 2])
    close(backend, backend.vmap(lambda x: x * 2)(f64([1.0, 2.0])), [2, 4])


# Random numbers


@pytest.mark.parametrize("function", ["normal", "uniform"])
def test_draws_have_the_type_of_like_and_repeat(backend, f64, f32, make_rng, function):
    draw = getattr(backend, function)
    for like in (f64([0.0]), f32([0.0])):
        assert draw(make_rng(0), (2, 3), like).dtype == like.dtype
    integer = backend.asarray(np.arange(3))
    assert draw(make_rng(0), (), integer).dtype == draw(make_rng(0), ()).dtype
    a, b, c = (backend.to_numpy(draw(make_rng(s), (5,), f64(0.0))) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("function", "cdf"),
    [("normal", stats.norm.cdf), ("uniform", stats.uniform.cdf), ("gamma", stats.gamma(2.5).cdf)],
)
def test_draws_have_their_distribution(backend, f64, make_rng, function, cdf):
    """Kolmogorov and Smirnov, false alarms 1e-4."""
    args = (2.5,) if function == "gamma" else ()
    x = backend.to_numpy(getattr(backend, function)(make_rng(0), *args, (20_000,), f64(0.0)))
    assert stats.kstest(x, cdf).pvalue > 1e-4


def test_gamma_broadcasts_and_differentiates(backend, f64, make_rng):
    """The mean has slope one in the concentration: pathwise slopes within 5 standard errors (false alarms 1e-6)."""
    a, n = np.array([0.5, 3.0]), 4_000
    assert backend.gamma(make_rng(0), f64(a), (3, 2)).shape == (3, 2)
    x, pull = backend.vjp(lambda a: backend.gamma(make_rng(0), a, (n, 2)), f64(np.tile(a, (n, 1))))
    assert x.dtype == f64(a).dtype
    slopes = backend.to_numpy(pull(backend.xp.ones_like(x))[0])
    error = slopes.std(0) / np.sqrt(n)
    assert np.all(np.abs(slopes.mean(0) - 1) < 5 * error) and np.all(error < 0.1)


@EVERYWHERE
def test_discrete_draws(backend, f64, make_rng):
    p = np.array([[0.1, 0.2, 0.7], [0.5, 0.0, 0.5]])
    with np.errstate(divide="ignore"):
        logits = f64(np.log(p) + 5)
    k = backend.to_numpy(backend.categorical(make_rng(1), logits, (20_000,)))
    assert k.shape == (20_000, 2) and backend.categorical(make_rng(0), logits).shape == (2,)
    assert (
        draws_ok(np.bincount(k[:, 0]), p[0]) and 1 not in k[:, 1] and draws_ok(np.bincount(k[:, 1])[[0, 2]], [0.5] * 2)
    )
    b = backend.to_numpy(backend.bernoulli(make_rng(2), f64(np.array([0.3, 1.0, 0.0])), (20_000, 3)))
    assert b.dtype == bool and b[:, 1].all() and not b[:, 2].any() and draws_ok(np.bincount(b[:, 0]), [0.7, 0.3])
    assert backend.bernoulli(make_rng(2), f64(np.array([0.3, 1.0]))).shape == (2,)
    order = backend.to_numpy(backend.permutation(make_rng(3), 50))
    assert sorted(order) == list(range(50)) and list(order) != list(range(50))


def test_split_unpacks_indexes_and_gives_different_draws(backend, f64, make_rng):
    a, b, c = backend.split(make_rng(0), 3)
    draws = [backend.to_numpy(backend.normal(r, (4,), f64(0.0))) for r in (a, b, c)]
    assert len(np.unique(draws)) == 12
    assert len(backend.split(make_rng(0))) == 2
    backend.normal(backend.split(make_rng(0), 3)[2], (4,))


def test_draws_differ_across_a_map(backend, f64, make_rng):
    rng = make_rng(0)
    if backend.name == "jax":
        x = backend.vmap(lambda key, x: x + backend.normal(key, (), x))(backend.split(rng, 2), f64([0.0, 0.0]))
    else:
        x = backend.vmap(lambda x: x + backend.normal(rng, (), x))(f64([0.0, 0.0]))
    assert float(x[0]) != float(x[1])


def test_torch_draws_follow_the_defaults_and_the_global_seed():
    torch = pytest.importorskip("torch")
    backend = get_backend("torch")
    torch.manual_seed(7)
    a = backend.normal(None, (3,))
    torch.manual_seed(7)
    assert torch.equal(a, torch.randn(3)) and a.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert backend.uniform(None, (3,)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert backend.normal(None, (3,)).is_meta and backend.permutation(None, 3).is_meta
    meta = torch.ones(2, device="meta")
    for rng in (None, torch.Generator()):
        assert backend.normal(rng, (3,), meta).is_meta and backend.gamma(rng, meta, (3, 2)).is_meta
    generator = torch.Generator().manual_seed(0)
    assert all(g is generator for g in backend.split(generator, 3))


def test_numbers_become_arrays_without_rounding(backend, f64):
    """0.1 in float64 is not 0.1 in float32, which is torch's default."""
    assert float(backend.asarray([0.1], f64([0.0]))[0]) == 0.1
