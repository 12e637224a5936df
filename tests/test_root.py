"""Root finding: values and the first two derivatives against closed forms, in both frameworks. Nothing here is random."""

import numpy as np
import pytest

from flowppl.backend import backend_of
from flowppl.bijections import watch_solves
from flowppl.bijections.root import solve_increasing
from tests.registry import compiled, gradient, on, to_numpy

TARGETS = np.float64([-300.0, -2.0, -0.3, 0.0, 1e-8, 0.7, 5.0, 1e4])
P = 1.7


def sinh(p):
    """x -> sinh(p x) and its slope: the solution is asinh(t) / p."""

    def f(x):
        xp = backend_of(x).xp
        return xp.sinh(p * x), p * xp.cosh(p * x)

    return f


def solve_sinh(p, t):
    xp = backend_of(t).xp
    reach = xp.ones_like(t) * 30
    return solve_increasing(sinh(p), t, -reach, reach)


def closed_form(p, t):
    """Value, gradient and Hessian of asinh(t) / p with respect to (p, t), the derivatives leading."""
    x, root = np.arcsinh(t) / p, np.sqrt(1 + t * t)
    gradient = np.stack([-x / p, 1 / (p * root)])
    mixed = -1 / (p * p * root)
    hessian = np.stack([np.stack([2 * x / p**2, mixed]), np.stack([mixed, -t / (p * root**3)])])
    return x, gradient, hessian


def derivatives(backend, solve):
    """The same by autodiff, at each target on its own."""

    def one(pt):
        return solve(pt[0], pt[1])

    if backend.name == "jax":
        import jax

        functions = one, jax.grad(one), jax.hessian(one)
        each = compiled(backend, jax.vmap(lambda pt: tuple(f(pt) for f in functions)))
    else:
        import torch

        functions = one, torch.func.grad(one), torch.func.jacrev(torch.func.grad(one))

        def each(pts):
            return tuple(torch.stack(a) for a in zip(*(tuple(f(pt) for f in functions) for pt in pts), strict=True))

    value, gradient, hessian = to_numpy(backend, each(on(backend, np.stack([P + 0 * TARGETS, TARGETS], axis=-1))))
    return value, gradient.T, np.moveaxis(hessian, 0, -1)


def relative(actual, expected):
    return np.max(np.abs(actual - expected) / (1e-300 + np.max(np.abs(expected), axis=-1, keepdims=True)))


def test_value_and_two_derivatives(backend):
    for actual, exact in zip(derivatives(backend, solve_sinh), closed_form(P, TARGETS), strict=True):
        assert relative(actual, exact) < 1e-12


def test_one_attached_step_would_not_do(backend):
    """Value and gradient are right after one Newton step, the Hessian is not: so the test above can fail."""

    def one_step(p, t):
        x = backend.stop(solve_sinh(p, t))
        value, slope = sinh(p)(x)
        return x - (value - t) / slope

    (value, gradient, hessian), (x, dx, ddx) = derivatives(backend, one_step), closed_form(P, TARGETS)
    assert relative(value, x) < 1e-12
    assert relative(gradient, dx) < 1e-12
    assert relative(hessian, ddx) > 0.1


def test_values_are_exact_to_rounding(backend):
    """Both dtypes, from brackets that are wide, tight, or end at the root; for flat and for steep functions."""
    for dtype in ("float64", "float32"):
        eps = np.finfo(dtype).eps
        for p in (1e-2, 1.0, 30.0):
            x = np.float64([-2.0, -1.0, -1e-3, 0.0, 0.3, 1.0, 2.0]) / max(p, 1)
            below, above = np.float64([[8, 0, 1, 1e-3, 0, 1e-6, 8], [8, 1, 0, 1e-3, 0, 1e-6, 1]])
            target, lower, upper = on(backend, (np.sinh(p * x), x - below, x + above), dtype)
            found = backend.to_numpy(solve_increasing(sinh(p), target, lower, upper))
            assert found.dtype == dtype
            # Rounding the target moves the root by eps |t| / slope, and x itself is rounded.
            bound = 8 * eps * (1e-3 + np.abs(x) + np.abs(np.tanh(p * x)) / p)
            assert np.all(np.abs(found - x) <= bound), (dtype, p)


def test_slopes_that_nearly_vanish(backend):
    """Newton's method alone leaves the bracket here: a + c tanh(a) with a slope of 1e-6 at zero."""
    c = -1 + 1e-6

    def f(a):
        xp = backend_of(a).xp
        h = xp.tanh(a)
        return a + c * h, 1 + c * (1 - h * h)

    a = np.float64([-5.0, -0.5, -1e-2, 1e-3, 0.2, 3.0])
    t = on(backend, a + c * np.tanh(a))
    found = backend.to_numpy(solve_increasing(f, t, t - 1, t + 1))
    slope = 1 + c / np.cosh(a) ** 2
    assert np.all(np.abs(found - a) <= 1e-15 * (1 + np.abs(a)) / slope)


def test_maps_and_compiles(backend):
    """Under vmap a search cannot stop early, and must not move what has converged."""
    targets = on(backend, TARGETS)
    one_by_one = compiled(backend, backend.vmap(lambda t: solve_sinh(P, t)))
    together = backend.to_numpy(compiled(backend, lambda t: solve_sinh(P, t))(targets))
    np.testing.assert_allclose(backend.to_numpy(one_by_one(targets)), together, rtol=1e-14, atol=0)
    np.testing.assert_allclose(together, np.arcsinh(TARGETS) / P, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", ["exponential", "arc tangent", "cubic"])
def test_where_newtons_method_fails_alone(backend, shape):
    """It creeps along an exponential, runs away from an arc tangent, and converges slowly to the flat point of a cubic."""

    def f(x):
        xp = backend_of(x).xp
        if shape == "exponential":
            return xp.exp(x), xp.exp(x)
        if shape == "arc tangent":
            return xp.atan(x), 1 / (1 + x * x)
        return x**3 + 1e-9 * x, 3 * x * x + 1e-9

    roots = np.float64([-7.0, -1e-3, 0.0, 0.5, 20.0])
    ends = on(backend, (np.float64([-300.0] * 5), np.float64([500.0] * 5)))
    target = f(on(backend, roots))[0]
    found = backend.to_numpy(solve_increasing(f, target, *ends))
    np.testing.assert_allclose(found, roots, rtol=1e-11, atol=1e-12)


CURVES = {  # value, slope, and the inverse in numpy; the arc tangent reaches -pi/2 to pi/2 alone, the others everything
    "line": (lambda xp, x: (x, xp.ones_like(x)), lambda t: t),
    "cubic": (lambda xp, x: (x**3 + x, 3 * x * x + 1), None),
    "sinh": (lambda xp, x: (xp.sinh(x), xp.cosh(x)), np.arcsinh),
    "log-like": (lambda xp, x: (xp.asinh(x), 1 / xp.sqrt(1 + x * x)), np.sinh),
    "arc tangent": (lambda xp, x: (xp.atan(x), 1 / (1 + x * x)), np.tan),
}


def curve(name):
    return lambda x: CURVES[name][0](backend_of(x).xp, x)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("ends", ["neither", "lower", "upper"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_end_that_is_not_given_is_found(backend, name, ends, dtype):
    """At roots of all sizes, from a start at zero or far away, in one batch."""
    x = np.float64([-3e4, -70.0, -1.0, -1e-3, 0.0, 1e-9, 0.5, 1.0, 64.0, 5e3])
    x = {"sinh": x[1:-1], "arc tangent": x[2:-2], "log-like": x[1:-1], "line": np.append(x, [-1e30, 1e25])}.get(name, x)
    f, at = curve(name), on(backend, x, dtype)
    target = f(at)[0]
    given = {"lower": {"lower": at - 2 - abs(at)}, "upper": {"upper": at + 2 + 3 * abs(at)}}.get(ends, {})
    found = backend.to_numpy(compiled(backend, lambda t, g: solve_increasing(f, t, **g))(target, given))
    assert found.dtype == dtype
    value, slope = to_numpy(backend, f(at))
    bound = 16 * np.finfo(dtype).eps * (1e-3 + np.abs(x) + np.abs(value) / slope)
    assert np.all(np.abs(found - x) <= bound), (found, x)


def test_out_of_reach_is_nan_and_its_neighbours_are_not(backend):
    """The value is NaN and never where the search ended; derivatives of the others are right, the missed ones' zero."""
    targets = np.float64([-2.0, -1.5, 0.0, 1.0, 1.6, 1e9, np.inf, np.nan])
    inside = np.abs(targets) < np.pi / 2
    for dtype in ("float32", "float64"):
        t = on(backend, targets, dtype)
        found = to_numpy(backend, compiled(backend, lambda t: solve_increasing(curve("arc tangent"), t))(t))
        assert np.all(np.isnan(found) == ~inside)
        np.testing.assert_allclose(found[inside], np.tan(targets[inside]), rtol=1e-12 if dtype == "float64" else 1e-5)

    def loss(p, t):
        x = solve_increasing(lambda x: (p * backend.xp.atan(x), p / (1 + x * x)), t)
        return backend.xp.where(on(backend, inside), x, 0 * t).sum(), x

    grads = to_numpy(backend, gradient(backend, loss, *on(backend, (np.float64(1.0), targets)))[1])
    expected = np.where(inside, 1 + np.tan(np.where(inside, targets, 0)) ** 2, 0)
    np.testing.assert_allclose(grads[1], expected, rtol=1e-12)
    np.testing.assert_allclose(grads[0], -np.sum(expected[inside] * targets[inside]), rtol=1e-12)


def test_out_of_reach_beyond_a_given_end_is_nan(backend):
    """Where one end is given, a target on its wrong side is noticed too; one that it meets up to rounding is not."""
    zero = on(backend, np.zeros(4))
    targets = on(backend, np.float64([-0.1, -1e-17, 0.0, 2.0]))
    found = backend.to_numpy(solve_increasing(curve("cubic"), targets, lower=zero))
    np.testing.assert_allclose(found, [np.nan, 0, 0, 1], atol=1e-15)
    found = backend.to_numpy(solve_increasing(curve("cubic"), -targets, upper=zero))
    np.testing.assert_allclose(found, [np.nan, 0, 0, -1], atol=1e-15)


def test_out_of_reach_maps(backend):
    targets = on(backend, np.float64([-9.0, 0.3, 9.0]))
    found = compiled(backend, backend.vmap(lambda t: solve_increasing(curve("arc tangent"), t)))(targets)
    np.testing.assert_allclose(backend.to_numpy(found), [np.nan, np.tan(0.3), np.nan], rtol=1e-13)


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"], indirect=True, scope="session")
def test_out_of_reach_is_counted(backend):
    targets = on(backend, np.float64([-9.0, 0.3, 9.0, 1.2]))
    with watch_solves() as solves:
        found = backend.to_numpy(solve_increasing(curve("arc tangent"), targets))
    assert list(np.isnan(found)) == [True, False, True, False]
    assert [(s.method, s.unsolved) for s in solves] == [("root", 2)]


def test_expansion_has_two_derivatives(backend):
    def solve(p, t):
        return solve_increasing(sinh(p), t)

    for actual, exact in zip(derivatives(backend, solve), closed_form(P, TARGETS), strict=True):
        assert relative(actual, exact) < 1e-12


def test_known_ends_cost_no_evaluation_more():
    """One evaluation a step, and two at the end."""
    calls = []

    def f(x):
        calls.append(1)
        return x + 0.5 * np.sin(x), 1 + 0.5 * np.cos(x)

    target = np.float64([0.3, -2.0])
    solve_increasing(f, target, target - 1, target + 1)
    known = len(calls)
    assert known <= 9
    calls.clear()
    solve_increasing(f, target)
    assert len(calls) <= known + 6


def test_solved_numbers_wait_for_the_others():
    """Rounding spoils the halving of Newton's steps once they are tiny: none may then leave its solution and bisect back."""

    def f(x):
        return x + 0.05 * np.sin(3 * x), 1 + 0.15 * np.cos(3 * x)

    target = np.random.default_rng(0).standard_normal(1000)
    with watch_solves() as solves:
        x = solve_increasing(f, target, target - 3, target + 1)
    assert relative(f(x)[0], target) < 1e-14
    assert solves[0].steps <= 12 and solves[0].unsolved == 0
