"""The flows that every conformance test runs over, parameters away from the identity, and autodiff as the oracle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flowppl import flows, tree
from flowppl.backend import get_backend
from flowppl.bijections import (
    ActNorm,
    Affine,
    Bijection,
    BlockAutoregressive,
    Chain,
    Composed,
    Coupling,
    DeepSigmoid,
    Elementwise,
    Embedded,
    ExtremeTails,
    Householder,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Orthogonal,
    Permutation,
    Planar,
    QRLinear,
    Residual,
    RQSpline,
    Stack,
    SumOfSquares,
    Transformer,
    TriangularLinear,
    bind,
)
from flowppl.flows import CircularUniform, Flow, Mixture, Product, StudentT, registry
from flowppl.flows.flow import part_of

Array = Any

BOUND = 3.0
HIDDEN = (8, 8)
# Compilation dominates: every option that makes a flow larger is small here.
SMALL = {"layers": 3, "hidden": HIDDEN, "units": (4, 3), "rank": 2, "bins": 4, "bound": BOUND}
SPLINE = RQSpline(4, BOUND)


def small(name: str, **options: Any) -> flows.Recipe:
    """The registered recipe in a small size."""
    known = inspect.signature(registry._RECIPES[name]).parameters
    fitting = {k: v for k, v in SMALL.items() if k in known}
    if name in ("maf", "iaf"):
        fitting["layers"] = (
            1  # of several the condition number is large far out; those in "nested" are not compared there
        )
    return flows.Recipe(name, tuple(sorted(fitting.items())), **options)


def registered(name: str, dim: int, context_dim: int = 0, **options: Any) -> Flow:
    """The registered flow in a small size."""
    return small(name, **options)(dim, context_dim)


def _maf(transformer: Any, dim: int, context_dim: int = 0) -> Bijection:
    return MaskedAutoregressive(dim, transformer, context_dim, HIDDEN)


def _shared(dim: int, context_dim: int = 0) -> Bijection:
    """Layers that share one network and have linear maps of their own."""
    return Stack(
        Chain((LULinear(dim), Coupling(dim, SPLINE, context_dim + 2, HIDDEN), Permutation(dim))), 2, embedding=2
    )


def _nested(dim: int, context_dim: int = 0) -> Bijection:
    """Every way to compose, inside one another, with parts that take a context and parts that do not."""
    coupling = Chain((Coupling(dim, SPLINE, context_dim, HIDDEN), Permutation(dim)))
    parts = (
        Inverse(Stack(coupling, 2)),
        Inverse(LULinear(dim)),
        Stack(Inverse(Chain((LULinear(dim), _maf(Affine(), dim, context_dim)))), 2),
        Inverse(Inverse(Planar(dim, context_dim, HIDDEN))),
        Inverse(Permutation(dim)),
    )
    return Chain((Chain(parts[:2]), *parts[2:]))


def _scaled(bijection: Bijection) -> Flow:
    """A bijection that keeps volume, with one that does not."""
    return Flow(Chain((bijection, Elementwise(bijection.dim, Affine()))))


TRANSFORMERS: dict[str, Transformer] = {
    "affine": Affine(),
    "spline": SPLINE,
    "free-spline": RQSpline(4, BOUND, "free"),
    "deep-sigmoid": DeepSigmoid(4),
    "sum-of-squares": SumOfSquares(),
    "extreme-tails": ExtremeTails(),
}
SHAPES = ((1, 0), (1, 2), (2, 0), (5, 3))
CASES: dict[str, Flow] = {
    **{f"{name}-{d}-{c}": registered(name, d, c) for name in flows.names() for d, c in SHAPES},
    **{f"autoregressive-{name}-5-2": Flow(_maf(t, 5, 2)) for name, t in TRANSFORMERS.items()},
    "autoregressive-spline-1-2": Flow(_maf(SPLINE, 1, 2)),
    "inverse-autoregressive-affine-5-2": Flow(Inverse(_maf(Affine(), 5, 2))),
    "inverse-autoregressive-spline-2-0": Flow(Inverse(_maf(SPLINE, 2))),
    **{f"elementwise-{name}-2-0": Flow(Elementwise(2, t)) for name, t in TRANSFORMERS.items()},
    "elementwise-spline-2-3": Flow(Elementwise(2, SPLINE, 3, HIDDEN)),
    "coupling-deep-sigmoid-3-2": Flow(Coupling(3, DeepSigmoid(4), 2, HIDDEN)),
    "composed-2-2": Flow(Elementwise(2, Composed(Composed(SPLINE, Affine()), RQSpline(3, 2.0)), 2, HIDDEN)),
    "lu-light-5-0": Flow(LULinear(5, light=2)),
    "triangular-5-0": Flow(TriangularLinear(5)),
    "qr-5-0": Flow(QRLinear(5)),
    "householder-2-0": _scaled(Householder(2, 4)),
    "orthogonal-5-0": _scaled(Orthogonal(5)),
    "permutation-5-0": Flow(Permutation(5)),
    "actnorm-2-0": Flow(Chain((TriangularLinear(2), Inverse(Stack(ActNorm(2), 2)), ActNorm(2)))),
    "residual-narrow-5-2": Flow(Residual(5, 2, (8, 4, 6))),
    "residual-single-5-0": Flow(Residual(5, 0, (3,))),
    "bnaf-single-5-0": Flow(BlockAutoregressive(5, 0, (5,))),
    "shared-5-2": Flow(_shared(5, 2)),
    "embedded-3-2": Flow(Embedded(Coupling(3, SPLINE, 4, HIDDEN), 2, (6,))),
    "nested-5-2": Flow(_nested(5, 2)),
    "student-t-2-1": registered("realnvp", 2, 1, base=StudentT(4.0)),
    "learned-base-3-0": Flow(LULinear(3), Product((Mixture(2), StudentT(3.0, trainable=True)), (2, 1))),
    "torus-2-0": small("nsf").with_circular((0, 1), False)(2),
    "torus-4-1": small("nsf").with_circular((2, 0), False)(4, 1),
    "torus-3-0": flows.nsf(layers=1, hidden=HIDDEN, bins=4).with_circular((1,), True)(3),
}
SMALL_SHAPES = tuple(f"-{d}-{c}" for d, c in SHAPES[:-1])
# What jax compiles, which dominates: the largest shape of each flow, and one coordinate of one.
COMPILED = [n for n in CASES if n.split("-")[0] not in flows.names() or n == "nsf-1-2" or not n.endswith(SMALL_SHAPES)]
COMPILED = [n for n in COMPILED if n not in ("torus-2-0", "torus-3-0")]
# What a front is tested with alone: whether all of it runs there, not once more whether it is right.
ALONE = ["nsf-5-3", "iaf-5-3", "planar-5-3", "learned-base-3-0"]
# Long compositions whose parameters depend on points far out: there they are ill-conditioned, and not compared.
ILL_CONDITIONED_FAR_OUT = ("nested", "torus-4")
# One flow of each kind, for what need not be tried in every shape.
FEW = [
    *(f"{name}-5-3" for name in flows.names()),
    "autoregressive-spline-5-2",
    "coupling-deep-sigmoid-3-2",
    "elementwise-sum-of-squares-2-0",
    "elementwise-extreme-tails-2-0",
    "qr-5-0",
    "orthogonal-5-0",
    "permutation-5-0",
    "actnorm-2-0",
    "learned-base-3-0",
    "torus-3-0",
]


def cases(framework: str, frameworks: list[str], of: Any = CASES) -> list[str]:
    """The flows, out of some, that a framework is tested with, beside which others."""
    known = ALONE if len(frameworks) < 2 else COMPILED if framework == "jax" else CASES
    return [name for name in of if name in known]


def variables(flow: Flow, seed: int = 0, noise: float = 0.2) -> dict[str, Any]:
    """Parameters in numpy, the same for all frameworks: what `init` draws, and noise on top, so not the identity."""
    rng = np.random.default_rng(seed)
    drawn = flow.init(rng)
    params = tree.map(lambda p: p + noise * rng.standard_normal(np.shape(p)), drawn["params"])
    return {"params": params, "const": drawn["const"]}


def own_variables(bijection: Bijection, **options: Any) -> dict[str, Any]:
    """The same for a bijection alone."""
    return part_of(variables(Flow(bijection), **options), "bijection")


def of_flow(own: dict[str, Any]) -> dict[str, Any]:
    """A flow's variables from its bijection's, on a base without any."""
    return {kind: {"base": {}, "bijection": arrays} for kind, arrays in own.items()}


class Points(NamedTuple):
    """Base points, a context, and what the outputs are contracted with for gradients."""

    z: Array
    context: Array | None
    weights: tuple[Array, Array, Array, Array]  # for y, log-det, score, score of the context


def points(flow: Flow, where: str = "near") -> Points:
    """Six points in numpy: "near" the base's mass (the last one is not), or "far" out and on the splines' box."""
    rng = np.random.default_rng(1)
    n, d, c = 6, flow.dim, flow.context_dim
    z = 1.5 * rng.standard_normal((n, d))
    if where == "near":
        z[-1] *= 3
    else:
        z[:4] = np.asarray([BOUND, -BOUND, 1e3, -1e6])[:, None]
        z[4:, -1] = 1e3, -1e6
    if isinstance(flow.base, CircularUniform | Product):
        angles = flow.dim if isinstance(flow.base, CircularUniform) else flow.base.dims[0]
        z[:, :angles] = (z[:, :angles] + np.pi) % (2 * np.pi) - np.pi
    context = rng.standard_normal((n, c)) if c else None
    shapes = ((n, d), (n,), (n, d), (n, c))
    return Points(z, context, tuple(rng.standard_normal(s) for s in shapes))


def on(backend: Any, x: Any, dtype: Any = np.float64) -> Any:
    """A tree of numpy arrays as arrays of the framework; floats get the dtype."""

    def leaf(a: Any) -> Array:
        a = np.array(a)
        a = a.astype(dtype) if a.dtype.kind == "f" else a
        return backend.xp.asarray(a, dtype=getattr(backend.xp, a.dtype.name))

    return tree.map(leaf, x)


def to_numpy(backend: Any, x: Any) -> Any:
    """A tree of the framework's arrays in numpy."""
    return tree.map(backend.to_numpy, x)


# Autodiff: the frameworks' own, not our wrappers of it


def gradient(backend: Any, f: Callable[..., tuple[Array, Any]], *args: Any) -> tuple[Any, tuple]:
    """(aux, gradients with respect to all args) of f(*args) -> (scalar, aux); the gradient of what is not used is zero."""
    if backend.name == "jax":
        import jax

        (_, aux), grads = jax.value_and_grad(f, argnums=tuple(range(len(args))), has_aux=True)(*args)
        return aux, grads
    import torch

    args = tree.map(lambda a: a.detach().clone().requires_grad_(a.is_floating_point()), args)
    out, aux = f(*args)
    grads = torch.autograd.grad(out, tree.leaves(args), allow_unused=True, materialize_grads=True)
    return aux, tree.unflatten(args, grads)


def jacobian(backend: Any, f: Callable[[Array], Array], x: Array) -> Array:
    """The dense Jacobians (batch, n, m) of f, a function of one point."""
    if backend.name == "jax":
        import jax

        return jax.vmap(jax.jacobian(f))(x)
    import torch

    return torch.func.vmap(torch.func.jacrev(f))(x)


@functools.cache
def _fast_compilation() -> dict[str, Any] | None:
    """Options that compile three times faster, and run slower; None for an XLA that lacks one of them."""
    import jax

    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(1.0)
    except Exception:  # jaxlib's own type, which has moved between versions
        return None
    return options


def compiled(backend: Any, f: Callable) -> Callable:
    """Jit, made for short compilation: it dominates."""
    if backend.name == "torch":
        return f
    import jax

    return jax.jit(f, compiler_options=_fast_compilation())


# What the conformance suite looks at, from one compiled function for each flow


class Pass(NamedTuple):
    """Values of one direction, and gradients (params, point, context) of their contraction with the weights."""

    values: Any
    grads: Any


def push_with_score(backend: Any, flow: Flow, v: Any, at: Points) -> Pass:
    """The sampling pass with scores. The scores enter the contraction: were they attached, gradients would show it."""

    def loss(params: Any, z: Array, context: Array | None) -> tuple[Array, Any]:
        sample = flow.push({"params": params, "const": v["const"]}, z, context, with_score=True)
        parts = zip(sample, at.weights, strict=True)
        return sum((part * w).sum() for part, w in parts if part is not None), sample

    return Pass(*gradient(backend, loss, v["params"], at.z, at.context))


def push(backend: Any, flow: Flow, v: Any, at: Points) -> Pass:
    """The plain sampling pass, contracted in the same way."""

    def loss(params: Any, z: Array, context: Array | None) -> tuple[Array, Any]:
        full = bind({"params": params, "const": v["const"]})
        y, log_det = flow.bijection.forward(full["bijection"], z, context)
        log_prob = flow.base.log_prob(full["base"], z) - log_det
        return (y * at.weights[0]).sum() + (log_prob * at.weights[1]).sum(), (y, log_det)

    return Pass(*gradient(backend, loss, v["params"], at.z, at.context))


def score(backend: Any, flow: Flow, v: Any, x: Array, context: Array | None) -> Pass:
    """log q at x with its gradients, and the inverse that it rests on."""

    def loss(params: Any, x: Array, context: Array | None) -> tuple[Array, Any]:
        full = bind({"params": params, "const": v["const"]})
        z, log_det = flow.bijection.inverse(full["bijection"], x, context)  # as `Flow.log_prob` does: tested on its own
        log_prob = flow.base.log_prob(full["base"], z) + log_det
        return log_prob.sum(), (log_prob, z, log_det)

    return Pass(*gradient(backend, loss, v["params"], x, context))


class Report(NamedTuple):
    """Everything about one flow at some points, in numpy."""

    at: Points
    with_score: Pass
    push: Pass
    score: Pass
    jacobian: Array  # dy/dz
    inverse_jacobian: Array  # dz/dy


@functools.cache
def _everything(name: str, framework: str) -> Callable[[Any, Points], tuple]:
    """(variables, points) -> the parts of a report."""
    flow, backend = CASES[name], get_backend(framework)

    def everything(v: Any, at: Points) -> tuple:
        def through(f: Callable) -> Callable:
            return lambda zc: f(bind(v)["bijection"], zc[: flow.dim], zc[flow.dim :] if flow.context_dim else None)[0]

        def with_context(x: Array) -> Array:
            return x if at.context is None else backend.xp.concat([x, at.context], axis=-1)

        plain = push(backend, flow, v, at)
        y = backend.stop(plain.values[0])
        return (
            push_with_score(backend, flow, v, at),
            plain,
            score(backend, flow, v, y, at.context),
            jacobian(backend, through(flow.bijection.forward), with_context(at.z))[..., : flow.dim],
            jacobian(backend, through(flow.bijection.inverse), with_context(y))[..., : flow.dim],
        )

    return compiled(backend, everything)


@functools.cache
def report(
    name: str, framework: str, where: str = "near", dtype: str = "float64", seed: int = 0, scale: float = 1.0
) -> Report:
    """The report of one case; a framework is asked once.

    Args:
        name: Of the case.
        framework: "torch" or "jax".
        where: Which points.
        dtype: Of everything.
        seed: Of the parameters.
        scale: What all parameters but those of the linear layers are multiplied by.
    """
    flow, backend = CASES[name], get_backend(framework)
    v = variables(flow, seed)
    linear = ("lu", "bias")
    scaled = {k: p if k.endswith(linear) and "net" not in k else scale * p for k, p in tree.paths(v["params"]).items()}
    v = {**v, "params": tree.unflatten(v["params"], scaled)}
    at = points(flow, where)
    out = _everything(name, framework)(on(backend, v, dtype), on(backend, at, dtype))
    return Report(at, *to_numpy(backend, out))


def assert_close(actual: Any, expected: Any, tol: float, what: str = "") -> None:
    """Trees agree within tol (1 + the largest entry of the leaf)."""
    actual, expected = tree.paths({"": actual}), tree.paths({"": expected})
    assert actual.keys() == expected.keys(), what
    for path, b in expected.items():
        a = np.asarray(actual[path])
        assert a.shape == np.shape(b), f"{what}{path}: shapes {a.shape} and {np.shape(b)}"
        if a.size:
            scale = 1 + np.max(np.abs(b))
            error = np.max(np.abs(a - b)) / scale
            assert error <= tol, f"{what}{path}: relative error {error:.2e} exceeds {tol:.0e}"
