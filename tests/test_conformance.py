"""One suite over the whole registry and hand-built flows: each claim of the contracts, in both frameworks.

Nothing here draws from a flow: points and parameters come from fixed seeds, so there are no false alarms.
"""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flowppl import flows, tree
from flowppl.backend import get_backend
from flowppl.bijections import (
    Affine,
    Chain,
    Coupling,
    Elementwise,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Planar,
    RQSpline,
    bind,
    root,
)
from flowppl.flows import Flow
from tests.conftest import FRAMEWORKS
from tests.registry import (
    ALONE,
    CASES,
    COMPILED,
    FEW,
    HIDDEN,
    ILL_CONDITIONED_FAR_OUT,
    assert_close,
    cases,
    compiled,
    gradient,
    on,
    points,
    push_with_score,
    registered,
    report,
    score,
    to_numpy,
    variables,
)

TOL = 1e-10
needs_torch = pytest.mark.skipif("torch" not in FRAMEWORKS, reason="torch is not installed")


@pytest.fixture(scope="module")
def backend(request):
    return get_backend(request.param)


def pytest_generate_tests(metafunc):
    """One flow after the other, so that its reports are made once."""
    name = next((n for n in ("case", "few") if n in metafunc.fixturenames), None)
    those = FEW if name == "few" else list(CASES)
    # What float32 does to a flow is the same in both frameworks; jax compiles each of them for seconds.
    alone = ALONE if metafunc.function.__name__ == "test_float32" else those
    if "backend" not in metafunc.fixturenames:
        if name:
            metafunc.parametrize(name, cases(FRAMEWORKS[0], FRAMEWORKS, those), scope="module")
    elif name:
        pairs = [
            (f, n) for n in those for f in FRAMEWORKS if n in cases(f, FRAMEWORKS) and (f == "torch" or n in alone)
        ]
        metafunc.parametrize(("backend", name), pairs, indirect=["backend"], scope="module")
    else:
        metafunc.parametrize("backend", FRAMEWORKS, indirect=True, scope="module")


def test_round_trip(case, backend):
    r = report(case, backend.name)
    assert_close(r.score.values[1], r.at.z, TOL)
    if case.startswith(ILL_CONDITIONED_FAR_OUT):
        return
    far = report(case, backend.name, "far")
    error = np.max(np.abs(far.score.values[1] - far.at.z), axis=-1)
    assert np.all(error <= TOL * np.max(np.abs(far.at.z), axis=-1)), error


def test_log_det_is_that_of_the_jacobian_in_both_directions(case, backend):
    r = report(case, backend.name)
    forward, inverse = r.push.values[1], r.score.values[2]
    assert_close(forward, np.linalg.slogdet(r.jacobian)[1], TOL, "forward")
    assert_close(inverse, np.linalg.slogdet(r.inverse_jacobian)[1], TOL, "inverse")
    assert_close(inverse, -forward, TOL, "both")
    if case.startswith(ILL_CONDITIONED_FAR_OUT):
        return
    far = report(case, backend.name, "far")
    assert_close(far.score.values[2], -far.push.values[1], 1e-8, "far")


def test_not_at_the_identity(case):
    # or the checks above would pass for empty reasons
    r = report(case, FRAMEWORKS[0])
    moved = np.abs(r.push.values[0] - r.at.z)
    assert np.median(moved) > 0.005
    assert case.startswith("permutation") or np.min(np.abs(r.push.values[1])) > 1e-4


def test_score_is_the_gradient_of_log_prob(case, backend):
    _check_score(case, report(case, backend.name), TOL)


@pytest.mark.parametrize(
    "name", [n for n in COMPILED if n.startswith("autoregressive")][: None if len(FRAMEWORKS) > 1 else 2]
)
def test_score_where_coordinates_depend_strongly(name, backend):
    """Jacobi sweeps that stop too early leave powers of the dependence: too little to see at small weights."""
    _check_score(name, report(name, backend.name, scale=2.0), 1e-9)


def test_score_pass_is_the_plain_pass(case, backend):
    """Values and attached derivatives agree; scores, which are in the contraction too, pass no gradient on."""
    r = report(case, backend.name)
    sample, (y, log_det) = r.with_score.values, r.push.values
    log_prob_0 = CASES[case].base.log_prob(bind(variables(CASES[case]))["base"], r.at.z)
    assert_close(sample.x, y, 1e-12, "x")
    assert_close(sample.log_prob, log_prob_0 - log_det, 1e-12, "log_prob")
    assert_close(r.with_score.grads, r.push.grads, TOL, "gradient")


@needs_torch
def test_scores_are_detached(case):
    flow, backend = CASES[case], get_backend("torch")
    v = tree.map(lambda a: a.requires_grad_(a.is_floating_point()), on(backend, variables(flow)))
    at = tree.map(lambda a: a.requires_grad_(), on(backend, points(flow)))
    sample = flow.push(v, at.z, at.context, with_score=True)
    assert sample.x.requires_grad and sample.log_prob.requires_grad
    assert not sample.score.requires_grad
    assert sample.score_context is None or not sample.score_context.requires_grad


def test_everything_is_finite(case, backend):
    for where in ("near", "far"):
        _assert_finite(report(case, backend.name, where), where)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_float32(few, backend, scale):
    """float32 in, float32 out; finite at large weights, far out and on the box; and right where that can be said."""
    for where in ("near", "far"):
        r = report(few, backend.name, where, "float32", scale=scale)
        for path, a in tree.paths(r[1:]).items():
            assert a.dtype == np.float32, f"{path} has dtype {a.dtype}"
        _assert_finite(r, f"{where} at scale {scale}")
    if scale == 1.0:
        r, exact = (report(few, backend.name, dtype=dtype) for dtype in ("float32", "float64"))
        assert_close(r.with_score, exact.with_score, 1e-4)
        assert_close(r.score.values, exact.score.values, 1e-4)


@pytest.mark.skipif(len(FRAMEWORKS) < 2, reason="needs torch and jax")
@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize("case_", cases("jax", FRAMEWORKS))
def test_torch_and_jax_agree(case_, where):
    """Values, log-dets, scores and gradients with respect to parameters, points and contexts."""
    torch, jax = (report(case_, framework, where) for framework in ("torch", "jax"))
    if where == "near":
        assert_close(torch[1:], jax[1:], TOL)
    elif not case_.startswith(ILL_CONDITIONED_FAR_OUT):  # nor are gradients well-conditioned so far out
        assert_close(torch.with_score.values, jax.with_score.values, 1e-8)
        assert_close(torch.score.values, jax.score.values, 1e-8)


def test_numpy_agrees(case):
    flow, r = CASES[case], report(case, FRAMEWORKS[0])
    v = variables(flow)
    assert_close(flow.bijection.forward(bind(v)["bijection"], r.at.z, r.at.context), r.push.values, TOL)
    assert_close(flow.log_prob(v, r.push.values[0], r.at.context), r.score.values[0], TOL)


def test_vmap_over_parameters_and_points(few, backend):
    """An ensemble of flows, each at points that are mapped one by one, by the framework's own vmap."""
    flow = CASES[few]
    members = [report(few, backend.name, seed=seed) for seed in (0, 1)]
    at = members[0].at
    ensemble = on(backend, tree.stack([variables(flow, seed) for seed in (0, 1)]))
    ys = on(backend, np.stack([r.push.values[0] for r in members]))
    rows = [a for a in on(backend, at[:2]) if a is not None]

    def one(v, y, z, context=None):
        return tuple(a for a in flow.push(v, z, context, with_score=True) if a is not None), flow.log_prob(
            v, y, context
        )

    vmap = _vmap(backend)
    over_points = vmap(one, (None, *[0] * (1 + len(rows))))
    over_both = vmap(over_points, (0, 0, *[None] * len(rows)))
    sample, log_prob = to_numpy(backend, compiled(backend, over_both)(ensemble, ys, *rows))
    for i, r in enumerate(members):
        expected = tuple(a for a in r.with_score.values if a is not None)
        assert_close(tree.index(sample, i), expected, TOL)
        assert_close(log_prob[i], r.score.values[0], TOL)


BATCHES = [((), ()), ((4,), ()), ((), (4,)), ((5, 1), (3,)), ((2, 3), (2, 1)), ((1,), (4,)), ((0,), ())]


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(sorted({*flows.names(), "maf", "elementwise"})),
    dim=st.sampled_from([1, 2, 5]),
    context_dim=st.sampled_from([0, 2]),
    batches=st.sampled_from(BATCHES),
    framework=st.sampled_from(sorted({"numpy", "torch"} & {"numpy", *FRAMEWORKS})),  # jax would compile each shape
    seed=st.integers(0, 2**32 - 1),
    noise=st.floats(0.05, 0.3),
)
def test_batches_broadcast(name, dim, context_dim, batches, framework, seed, noise):
    """Any batch shapes that broadcast give what each point gives alone; round trip and log-det hold at drawn parameters."""
    if name == "maf":
        flow = Flow(MaskedAutoregressive(dim, RQSpline(5, 2.5), context_dim, HIDDEN, "gelu"))
    elif name == "elementwise":
        flow = Flow(Elementwise(dim, RQSpline(2, 4.0), context_dim, HIDDEN))
    else:
        flow = registered(name, dim, context_dim)
    backend = get_backend(framework)
    rng = np.random.default_rng(seed)
    of_x, of_context = batches if context_dim else (batches[0], ())
    x = 2 * rng.standard_normal((*of_x, dim))
    context = rng.standard_normal((*of_context, context_dim)) if context_dim else None
    v, x_, context_ = on(backend, (variables(flow, seed, noise), x, context))
    y, log_det = flow.bijection.forward(bind(v)["bijection"], x_, context_)
    batch = np.broadcast_shapes(of_x, of_context)
    assert tuple(y.shape) == (*batch, dim) and tuple(log_det.shape) == batch
    back, inverse_log_det = flow.bijection.inverse(bind(v)["bijection"], y, context_)
    full_x = np.broadcast_to(x, (*batch, dim))
    assert_close(backend.to_numpy(back), full_x, 1e-7)
    assert_close(backend.to_numpy(inverse_log_det), -backend.to_numpy(log_det), 1e-7)
    log_prob = flow.log_prob(v, x_, context_)
    assert tuple(log_prob.shape) == batch
    if 0 in batch:
        return
    flat_x = on(backend, full_x.reshape(-1, dim))
    flat_c = (
        on(backend, np.broadcast_to(context, (*batch, context_dim)).reshape(-1, context_dim)) if context_dim else None
    )
    i = seed % len(flat_x)
    alone = flow.bijection.forward(bind(v)["bijection"], flat_x[i], None if flat_c is None else flat_c[i])
    assert_close(backend.to_numpy(alone[0]), backend.to_numpy(y).reshape(-1, dim)[i], 1e-9)
    assert_close(backend.to_numpy(alone[1]), backend.to_numpy(log_det).reshape(-1)[i], 1e-9)
    if framework == "numpy":
        return
    # The context's score is added up where it is: per point, in the full batch.
    sample = flow.push(v, x_, context_, with_score=True)
    flat = flow.push(v, flat_x, flat_c, with_score=True)
    for part, expected in zip(sample, flat, strict=True):
        if part is None:
            assert expected is None
            continue
        assert part.shape[: len(batch)] == batch
        assert_close(backend.to_numpy(part).reshape(expected.shape), backend.to_numpy(expected), 1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted({*flows.names()} - {"ttf"}))  # whose tails are heavy from the start
def test_starts_as_the_identity(name, backend, make_rng, dtype):
    flow = registered(name, 5, 3)
    assert (flow.dim, flow.context_dim) == (5, 3)
    z, context, _ = on(backend, points(flow), dtype)
    v = flow.init(make_rng(0), like=z)
    assert all(a.dtype == z.dtype for a in tree.leaves(v["params"]))
    y, log_det = compiled(backend, lambda v, z, c: flow.bijection.forward(bind(v)["bijection"], z, c))(v, z, context)
    eps = np.finfo(dtype).eps
    assert_close(backend.to_numpy(y), backend.to_numpy(z), 10 * eps)
    assert_close(backend.to_numpy(log_det), np.zeros(len(z)), 30 * eps)


@pytest.mark.parametrize("name", flows.names())
def test_init_has_the_default_dtype(name, backend, make_rng):
    """Without `like`, all leaves share the framework's default, so that a fresh flow runs."""
    v = registered(name, 2, 1).init(make_rng(0))
    default = backend.xp.zeros(()).dtype
    assert {a.dtype for a in tree.leaves(v["params"])} == {default}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_planar_stays_invertible(backend, dtype):
    """w.u far below -1 and points on the hyperplane w.x + b = 0, where the slope is least."""
    flow = Flow(Planar(2))
    w = np.float64([6.0, 8.0])
    parts = {"bijection": {"w": w, "u": -w, "b": np.float64(0.0)}, "base": {}}
    v = on(backend, {"params": parts, "const": {"bijection": {}, "base": {}}}, dtype)
    along, across = w / 100, np.float64([0.8, -0.6])  # w.along is one
    z = np.outer([0.0, 0.0, 1e-4, 0.1, -3.0], along) + np.outer([0.0, 2.0, 1.0, 0.0, 1.0], across)
    at = points(flow)._replace(z=z)
    at = on(backend, at._replace(weights=tuple(w[: len(z)] for w in at.weights)), dtype)

    def both(v, at):
        with_score = push_with_score(backend, flow, v, at)
        return with_score, score(backend, flow, v, backend.stop(with_score.values.x), None)

    out = to_numpy(backend, compiled(backend, both)(v, at))
    for path, a in tree.paths(out).items():
        assert np.all(np.isfinite(a)), path
    eps = np.finfo(dtype).eps
    assert_close(out[1].values[1], z, 1e4 * eps)  # the least slope is 1e-3
    if dtype == "float64":  # the score divides by the slope twice: 1e6 eps
        assert_close(out[0].values.score, out[1].grads[1], 1e7 * eps)


def test_second_derivatives(backend):
    """Through the planar inverse and its root search: Hessian times vector against differences of the gradient."""
    flow = registered("planar", 2, 1)
    _check_hessian(backend, flow)


@needs_torch
@pytest.mark.parametrize("name", sorted({*FEW, "planar-1-0"}))
def test_second_derivatives_of_every_flow(name):
    _check_hessian(get_backend("torch"), CASES[name])


LAYERS = {
    "coupling-affine": Coupling(4, Affine(), 2, HIDDEN),
    "coupling-spline": Coupling(4, RQSpline(4, 3.0), 2, HIDDEN),
    "maf-spline": MaskedAutoregressive(2, RQSpline(4, 3.0), 2, HIDDEN),
    "linear": Chain((LULinear(3), Inverse(LULinear(3)))),
    "planar": Planar(3, 2, HIDDEN),
}


@needs_torch
@pytest.mark.parametrize("layer", LAYERS)
def test_torch_compile(layer, monkeypatch):
    """`torch.compile` takes a layer, with its scores, its inverse and its gradients: whole, but for implicit derivatives."""
    import torch

    flow, backend = Flow(LAYERS[layer]), get_backend("torch")
    v, at = on(backend, (variables(flow), points(flow)))

    def both(params, z, context):
        full = {**v, "params": params}
        sample = flow.push(full, z, context, with_score=True)
        log_prob = flow.log_prob(full, z, context)
        return (sample.x * at.weights[0]).sum() + (log_prob * sample.log_prob).sum(), (sample, log_prob)

    monkeypatch.setattr(root, "MAX_STEPS", 12)  # unrolled: enough for Newton's method, and shorter to trace
    torch.compiler.reset()
    whole = torch.compile(both, backend="aot_eager", fullgraph=not layer.startswith("maf"))
    expected = gradient(backend, both, v["params"], at.z, at.context)
    actual = gradient(backend, whole, v["params"], at.z, at.context)
    assert_close(to_numpy(backend, actual), to_numpy(backend, expected), TOL)


@needs_torch
@pytest.mark.parametrize("case_", cases("torch", FRAMEWORKS))
def test_meta_device(case_):
    """Shapes and dtypes without any values: neither a branch on values, nor an array made elsewhere."""
    import torch

    flow = CASES[case_]
    with torch.device("meta"):
        v = flow.init(None)
    assert all(a.is_meta for a in tree.leaves(v))
    context = torch.empty(4, flow.context_dim, device="meta") if flow.context_dim else None
    shape = (3,) if flow.context_dim else (3, 4)
    sample = (
        flow.sample(None, v, shape, context, with_score=True)
        if tree.leaves(v["params"])
        else flow.push(v, torch.empty(3, 4, flow.dim, device="meta"), context, with_score=True)
    )
    log_prob = flow.log_prob(v, sample.x, context)
    assert sample.x.shape == sample.score.shape == (3, 4, flow.dim)
    assert log_prob.shape == sample.log_prob.shape == (3, 4)
    assert sample.score_context is None or sample.score_context.shape == (3, 4, flow.context_dim)
    made = [a for a in (*sample, log_prob) if a is not None]
    assert all(a.is_meta and a.dtype == torch.float32 for a in made)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_independent_of_the_default_dtype(few, dtype):
    import torch

    flow, backend = CASES[few], get_backend("torch")
    v, at = on(backend, (variables(flow), points(flow)), dtype)
    other = torch.float64 if dtype == "float32" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(other)
    try:
        made = [flow.log_prob(v, at.z, at.context), *flow.push(v, at.z, at.context, with_score=True)]
        made += [*flow.sample(None, v, (), at.context, with_score=True)] if tree.leaves(v["params"]) else []
    finally:
        torch.set_default_dtype(before)
    assert {a.dtype for a in made if a is not None} == {at.z.dtype}


def _check_score(name, r, tol):
    sample, (_, score, score_context) = r.with_score.values, r.score.grads
    assert_close(sample.score, score, tol, "score")
    assert_close(sample.log_prob, r.score.values[0], tol, "log_prob")
    if CASES[name].context_dim:
        assert_close(sample.score_context, score_context, tol, "score of the context")
    else:
        assert sample.score_context is None


def _assert_finite(r, what):
    for path, a in tree.paths(r[1:]).items():
        assert np.all(np.isfinite(a)), f"{what}: {path} has {np.sum(~np.isfinite(a))} values that are not finite"


def _vmap(backend):
    if backend.name == "jax":
        import jax

        return jax.vmap
    import torch

    return torch.func.vmap


def _check_hessian(backend, flow):
    v, at = on(backend, (variables(flow), points(flow)))
    direction = on(backend, variables(flow, 5), np.float64)["params"], on(backend, points(flow)).z

    def log_prob(params, x):
        return flow.log_prob({**v, "params": params}, x, at.context).sum()

    if backend.name == "jax":
        import jax

        grad = compiled(backend, jax.grad(log_prob, argnums=(0, 1)))
        product = compiled(backend, lambda p, d: jax.jvp(jax.grad(log_prob, argnums=(0, 1)), p, d)[1])
        exact = product((v["params"], at.z), direction)
    else:
        import torch

        def grad(params, x):
            args = tree.map(lambda a: a.detach().requires_grad_(), (params, x))
            return tree.unflatten(args, torch.autograd.grad(log_prob(*args), tree.leaves(args), create_graph=True))

        args = tree.map(lambda a: a.detach().requires_grad_(), (v["params"], at.z))
        leaves = tree.leaves(args)
        first = torch.autograd.grad(log_prob(*args), leaves, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, tree.leaves(direction), strict=True))
        second = torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)
        exact = tree.unflatten(args, second)
    h = 1e-5

    def beside(step):
        return grad(*tree.map(lambda a, d: a + step * d, (v["params"], at.z), direction))

    up, down = beside(h), beside(-h)
    difference = tree.map(lambda a, b: (a - b) / (2 * h), up, down)
    assert_close(to_numpy(backend, exact), to_numpy(backend, difference), 1e-6)
