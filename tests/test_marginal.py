"""Guides with auxiliary latents, in both languages: exact where their marginal is known, by quadrature where it is estimated."""

from functools import cache, partial

import numpy as np
import pytest

from flowppl.errors import UnsupportedModelError
from tests.fronts import (
    NUMPYRO,
    PROGRAMS,
    PYRO,
    assert_mean_zero,
    each_front,
    needs_both,
    quick_and_precise,
    with_gradient,
)

needs_both()
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(quick_and_precise.__name__)]

# u ~ Normal(a, 1), x ~ Normal(b + c u, s), and backwards u ~ Normal(d + e x, t)
PARAMS = {"a": 0.3, "b": -0.2, "c": 0.7, "d": 0.1, "e": 0.3, "s": 0.8, "t": 1.1}
E = PARAMS["c"] / (PARAMS["c"] ** 2 + PARAMS["s"] ** 2)
EXACT = {**PARAMS, "d": (1 - E * PARAMS["c"]) * 0.3 - E * PARAMS["b"], "e": E, "t": (1 - E * PARAMS["c"]) ** 0.5}
LOC, SCALE = PARAMS["b"] + PARAMS["c"] * PARAMS["a"], (PARAMS["c"] ** 2 + PARAMS["s"] ** 2) ** 0.5


def p(front, values, names):
    return [front.ppl.param(name, front.array(values[name])) for name in names]


def guide(front, n, values=PARAMS):
    a, b, c, s = p(front, values, "abcs")
    with front.ppl.plate("rows", n, subsample_size=min(n, 300)):
        u = front.ppl.sample("u", front.dist.Normal(a, 1.0))
        front.ppl.sample("x", front.dist.Normal(b + c * u, s))


def reverse(front, kept, n, values=PARAMS):
    d, e, t = p(front, values, "det")
    with front.ppl.plate("rows", n, subsample_size=min(n, 300)):
        front.ppl.sample("u", front.dist.Normal(d + e * kept["x"], t))


def marginal(front, m, values=PARAMS, guide=guide, reverse=reverse):
    of = front.objectives.marginal(
        partial(guide, front, values=values), ["x"], partial(reverse, front, values=values), m
    )
    return lambda front, n: of(n)


def model(front, n):
    with front.ppl.plate("rows", n):
        x = front.ppl.sample("x", front.dist.StudentT(5.0, 0.3, 1.0))
        front.ppl.sample("y", front.dist.Normal(x, 0.8), obs=front.array([1.2] * n))
    return x


def planted(front, n):
    """The guide's marginal, and some evidence."""
    with front.ppl.plate("rows", n, subsample_size=min(n, 300)):
        front.ppl.sample("x", front.dist.Normal(front.array(LOC), SCALE))
        front.ppl.sample("y", front.dist.Normal(0.0, 1.0), obs=front.array([1.2] * min(n, 300)))


@cache
def by_quadrature(program, k, m):
    """Minus the objective and its gradient, over the normals that K particles with M draws each are made from."""
    program, grid = PROGRAMS[program], torch.arange(-4.4, 4.8, 0.8 if k * (m + 1) > 4 else 0.4)
    theta = [torch.tensor(value, requires_grad=True) for value in PARAMS.values()]
    a, b, c, d, e, s, t = theta
    normal = PYRO.dist.Normal
    z = torch.stack([axis.reshape(-1) for axis in torch.meshgrid(*[grid] * (m + 1), indexing="ij")])
    u = a + z[0]
    x = b + c * u + s * z[1]
    every = torch.stack([u, *(d + e * x + t * each for each in z[2:])])
    log_q = normal(a, 1.0).log_prob(every) + normal(b + c * every, s).log_prob(x)
    log_q = (log_q - normal(d + e * x, t).log_prob(every)).logsumexp(0) - np.log(m)
    log_p = PYRO.dist.StudentT(5.0, 0.3, 1.0).log_prob(x) + normal(x, 0.8).log_prob(torch.tensor(1.2))
    weight = (normal(0.0, 1.0).log_prob(z).exp() * (grid[1] - grid[0])).prod(0)
    grids, weights = (torch.stack(torch.meshgrid(*[v] * k, indexing="ij")) for v in (log_p - log_q, weight))
    return with_gradient(-(program.value(grids) * weights.prod(0)).sum(), theta)


@pytest.mark.parametrize(
    ("front", "program", "k", "m", "kinds"),
    [
        (PYRO, "elbo", 1, 2, ("path", "reparam")),
        (PYRO, "user", 2, 1, ("path", "reparam")),
        (PYRO, "iwae", 2, 2, ("path", "reparam")),
        (NUMPYRO, "iwae", 2, 2, ("path", "reparam")),
    ],
    ids=["pyro-elbo", "pyro-user", "pyro-iwae", "numpyro-iwae"],
)
def test_value_and_gradient_are_those_of_quadrature(front, program, k, m, kinds):
    """In all parameters of the guide and of a reverse program that is wrong."""
    n = 300
    for kind in kinds:
        loss = front.objectives.Objective(PROGRAMS[program], k, gradient=kind)
        values, grads = front.estimates(loss, model, marginal(front, m), 40, n)
        assert_mean_zero(np.concatenate([values[:, None], grads], 1) / n - by_quadrature(program, k, m))


@each_front
def test_exact_reverse_programs(front):
    """The estimate is the marginal's log density whatever is drawn, and nothing varies where that is the posterior's."""
    size, evidence = 600, float(front.dist.Normal(0.0, 1.0).log_prob(front.array(1.2)))
    values, grads = front.estimates(front.objectives.Objective("iwae", 2), planted, marginal(front, 2, EXACT), 2, size)
    np.testing.assert_allclose(values, -size * evidence, rtol=1e-10)
    assert np.abs(grads[:, np.isin([*"abcdest"], [*"abcs"])]).max() < 1e-9 * size


# Discrete auxiliary latents: u ~ Bernoulli(logits a), x ~ Normal(b + c u, s), and backwards u ~ Bernoulli(logits d + e x)


def two(front, n, values=PARAMS, mark=None):
    a, b, c, s = p(front, values, "abcs")
    with front.ppl.plate("rows", n):
        u = front.ppl.sample("u", front.dist.Bernoulli(logits=a + front.array([0.0] * n)), infer={"grad": mark})
        front.ppl.sample("x", front.dist.Normal(b + c * u, s))


def which(front, kept, n, values=PARAMS, mark=None):
    d, e = p(front, values, "de")
    with front.ppl.plate("rows", n):
        front.ppl.sample("u", front.dist.Bernoulli(logits=d + e * kept["x"]), infer={"grad": mark})


@cache
def by_enumeration(program, k, m):
    """Minus the objective and its gradient, over what K particles with M draws each are made from."""
    program, z = PROGRAMS[program], torch.arange(-5.0, 5.2, 0.4)
    theta = [torch.tensor(value, requires_grad=True) for name, value in PARAMS.items() if name != "t"]
    a, b, c, d, e, s = theta
    normal, flip = PYRO.dist.Normal, PYRO.dist.Bernoulli
    z, *u = (axis.reshape(-1) for axis in torch.meshgrid(z, *[torch.arange(2.0)] * m, indexing="ij"))
    u = torch.stack(u)
    x = b + c * u[0] + s * z
    log_r = flip(logits=d + e * x).log_prob(u)
    log_q = flip(logits=a).log_prob(u) + normal(b + c * u, s).log_prob(x)
    log_p = PYRO.dist.StudentT(5.0, 0.3, 1.0).log_prob(x) + normal(x, 0.8).log_prob(torch.tensor(1.2))
    weight = 0.4 * (normal(0.0, 1.0).log_prob(z) + flip(logits=a).log_prob(u[0]) + log_r[1:].sum(0)).exp()
    log_w = log_p - ((log_q - log_r).logsumexp(0) - np.log(m))
    grids, weights = (torch.stack(torch.meshgrid(*[v] * k, indexing="ij")) for v in (log_w, weight))
    return with_gradient(-(program.value(grids) * weights.prod(0)).sum(), theta)


@each_front
@pytest.mark.parametrize(
    ("mark", "kind", "program", "k", "m"),
    [
        ("score", "path", "iwae", 2, 2),
        ("score", "reparam", "elbo", 1, 2),
        ("enum", "path", "iwae", 2, 2),
        ("enum", "reparam", "user", 2, 1),
    ],
)
def test_discrete_auxiliary_latents(front, mark, kind, program, k, m):
    """Value and gradient are those of enumeration, in all parameters of the guide and of a reverse program that is wrong."""
    n, of = 300, (partial(f, mark=mark) for f in (two, which))
    loss = front.objectives.Objective(PROGRAMS[program], k, gradient=kind)
    values, grads = front.estimates(loss, model, marginal(front, m, PARAMS, *of), 40, n)
    assert_mean_zero(np.concatenate([values[:, None], grads], 1) / n - by_enumeration(program, k, m))


@each_front
@pytest.mark.parametrize("mark", ["score", "enum"])
def test_mixtures_are_marginals(front, mark):
    """By the exact reverse program; nothing varies where the mixture is the posterior."""
    n, (a, b, c, s) = 5, (PARAMS[name] for name in "abcs")
    exact = {**PARAMS, "d": a - c * b / s**2 - c * c / (2 * s * s), "e": c / s**2}

    def mixture(front, n):
        with front.ppl.plate("rows", n):
            shares = front.dist.Categorical(logits=front.array([[0.0, a]] * n))
            parts = front.dist.Normal(front.array([[b, b + c]] * n), s)
            front.ppl.sample("x", front.dist.MixtureSameFamily(shares, parts))

    of = (partial(f, mark=mark) for f in (two, which))
    values, grads = front.estimates(
        front.objectives.Objective("iwae", 2), mixture, marginal(front, 2, exact, *of), 2, n
    )
    np.testing.assert_allclose(values, 0.0, atol=1e-10)
    assert np.abs(grads[:, np.isin([*"abcdes"], [*"abcs"])]).max() < 1e-10
    assert np.abs(grads).max() > 1e-3


def test_more_draws_are_tighter():
    """The bounds are those of the same draws of the guide; with an exact reverse program it is the ELBO itself."""
    loss = PYRO.objectives.Objective("elbo", 1)
    each = (marginal(PYRO, 1), marginal(PYRO, 4), marginal(PYRO, 1, EXACT))
    one, four, exact = (PYRO.estimates(loss, model, q, 20, 300)[0] for q in each)
    for gain in (one - four, four - exact):
        assert gain.mean() > 4 * gain.std() / 20**0.5


# An auxiliary latent outside of a plate


def wide_guide(front, n, values):
    a, b, c, s = p(front, values, "abcs")
    u = front.ppl.sample("u", front.dist.Normal(a, 1.0))
    with front.ppl.plate("rows", n):
        front.ppl.sample("x", front.dist.Normal(b + c * u, s))


def wide_reverse(front, kept, n, values):
    d, e, t = p(front, values, "det")
    x = kept["x"].sum(-1) if front is NUMPYRO else kept["x"].sum(-1, keepdim=True)
    front.ppl.sample("u", front.dist.Normal(d + e * x, t))


def test_one_draw_extends_the_model():
    """By the reverse program, and all of its elements share one estimate."""
    extended = lambda front, n: wide_reverse(front, {"x": model(front, n)}, n, PARAMS)
    loss, plain = PYRO.objectives.Objective("iwae", 3), lambda front, n: wide_guide(front, n, PARAMS)
    found = PYRO.estimates(loss, model, marginal(PYRO, 1, PARAMS, wide_guide, wide_reverse), 2, 4)
    for a, b in zip(found, PYRO.estimates(loss, extended, plain, 2, 4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@each_front
def test_sums_over_other_plates(front):
    """With an exact reverse program their number does not matter: the first draws are the same."""
    n, ratio = 4, PARAMS["c"] / PARAMS["s"] ** 2
    precision = 1 + n * PARAMS["c"] * ratio
    loc, scale = (PARAMS["a"] - n * PARAMS["b"] * ratio) / precision, precision**-0.5
    exact, loss = {**PARAMS, "d": loc, "e": ratio / precision, "t": scale}, front.objectives.Objective("elbo", 1)
    one, two = (
        front.estimates(loss, model, marginal(front, m, exact, wide_guide, wide_reverse), 2, n)[0][-1] for m in (1, 2)
    )
    np.testing.assert_allclose(one, two, rtol=1e-9)


@each_front
def test_a_part_of_a_guide(front):
    """Beside a site that is summed out and a reparametrised one: nothing varies where the marginal is the posterior given these."""

    def z_and_k(front, loc, logit):
        k = front.ppl.sample("k", front.dist.Bernoulli(logits=logit), infer={"grad": "enum"})
        return k + front.ppl.sample("z", front.dist.Normal(loc + k, 1.0))

    def posterior(front):
        shift = z_and_k(front, front.array(0.2), front.array(0.3))
        front.ppl.sample("x", front.dist.Normal(LOC + shift, SCALE))

    def whole(front):
        a, b, c, s, e, d, t = p(front, EXACT, "abcsedt")
        shift = z_and_k(front, *p(front, {"m": 0.2, "l": 0.3}, "ml"))

        def inner():
            u = front.ppl.sample("u", front.dist.Normal(a, 1.0))
            front.ppl.sample("x", front.dist.Normal(b + c * u + shift, s))

        def back(kept):
            front.ppl.sample("u", front.dist.Normal(d + e * (kept["x"] - shift), t))

        return front.objectives.marginal(inner, ["x"], back, 2)()

    values, grads = front.estimates(front.objectives.Objective("iwae", 2), posterior, whole, 2)
    assert np.abs(values).max() < 1e-10
    assert np.abs(grads[:, np.isin([*"abcdelmst"], [*"abclms"])]).max() < 1e-10
    assert np.abs(grads).max() > 1e-3


# Beside Objective


def test_losses_of_the_languages_are_right():
    """With plain gradients."""
    theirs = PYRO.ppl.infer.Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1)
    ours = PYRO.objectives.Objective("elbo", 2, gradient="reparam", max_plate_nesting=1)
    for a, b in zip(*(PYRO.estimates(loss, model, marginal(PYRO, 3), 2, 5) for loss in (theirs, ours)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    values, _ = NUMPYRO.estimates(NUMPYRO.ppl.infer.Trace_ELBO(), planted, marginal(NUMPYRO, 2, EXACT), 1, 2)
    np.testing.assert_allclose(values, [1.2**2 + np.log(2 * np.pi)], rtol=1e-9)


def test_predictions():
    import jax

    of = marginal(NUMPYRO, 2)
    draws = NUMPYRO.ppl.infer.Predictive(lambda: of(NUMPYRO, 3), num_samples=5)(jax.random.key(0))
    assert draws["x"].shape == (5, 3)
    of = marginal(PYRO, 2)
    predictive = PYRO.ppl.infer.Predictive(lambda: model(PYRO, 3), guide=lambda: of(PYRO, 3), num_samples=5)
    assert predictive()["x"].shape == (5, 3)


@each_front
def test_what_is_refused(front):
    """By name, with what to do."""
    sample, dist = front.ppl.sample, front.dist
    array = front.array

    def refused(match, keep=("x",), u=None, guide_more=None, reverse=None, size=2):
        def guide():
            with front.ppl.plate("rows", size, subsample_size=2):
                sample("u", dist.Normal(array([0.0] * 2), 1.0) if u is None else u)
            sample("x", dist.Normal(front.ppl.param("a", array(0.0)), 1.0))

        def back(kept):
            with front.ppl.plate("rows", size, subsample_size=2):
                sample("u", dist.Normal(array([0.0] * 2), 1.0))

        of = front.objectives.marginal(guide, [*keep], back if reverse is None else reverse)
        with pytest.raises(UnsupportedModelError, match=match):
            front.estimates(
                front.objectives.Objective(), lambda front: sample("x", dist.Normal(0.0, 1.0)), lambda f: of(), 1
            )

    refused("draws no site 'z'; it draws u, x", keep=("z",))
    refused("nothing to reverse", keep=("u", "x"))
    refused("'u' of the guide is not kept", reverse=lambda kept: None)
    refused("'v' of the reverse program", reverse=lambda kept: [sample(n, dist.Normal(0.0, 1.0)) for n in "uv"])
    refused("'u' is a Delta, which has no density", u=dist.Delta(array(1.0)))
    refused("plate 'rows' subsamples", size=4)
    with pytest.raises(ValueError, match="num_particles must be positive"):
        front.objectives.marginal(model, ["x"], model, 0)
