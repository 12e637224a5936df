"""Sites that Objective sums out, in both languages: exact against quadrature, without noise of their own, and what is refused."""

from functools import cache

import numpy as np
import pytest

from flowppl.backend import get_backend
from flowppl.errors import UnsupportedModelError
from flowppl.objectives import programs
from flowppl.objectives.enumeration import Branches, cotangents_of_branches
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
from tests.registry import on

needs_both()
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(quick_and_precise.__name__)]


PARAMS = {"a": 0.3, "b": -0.2, "c": 0.7, "m": 0.4, "s": 0.9, "w": 0.8}


def model(front, n):
    with front.ppl.plate("replicas", n):
        d = front.ppl.sample("d", front.dist.Bernoulli(0.4))
        x = front.ppl.sample("x", front.dist.StudentT(5.0, 0.3 + d, 1.0))
        e = front.ppl.sample("e", front.dist.Bernoulli(logits=x - 0.2))
        front.ppl.sample("y", front.dist.Normal(x - d + 1.5 * e, 0.8), obs=front.array([1.2] * n))


def guide(front, n, kind="enum", planted=False):
    """A site that is summed out before a reparametrised one, which it moves, and one after it."""
    fixed = lambda _, value: value
    a, b, c, m, s, w = ((fixed if planted else front.ppl.param)(k, front.array(v)) for k, v in PARAMS.items())
    with front.ppl.plate("replicas", n):
        d = front.ppl.sample("d", front.dist.Bernoulli(logits=a), infer={"grad": kind})
        x = front.ppl.sample("x", front.dist.Normal(m + c * d, s))
        logits = b + w * x + 0.5 * d
        front.ppl.sample(
            "e", front.dist.Bernoulli(logits=logits), infer={"grad": "score" if kind == "score" else "enum"}
        )


def first_scored(front, n):
    return guide(front, n, None)


@cache
def by_quadrature(program, k):
    """Minus the objective and its gradient: by quadrature over normals, enumeration over bits."""
    program, bit, grid = PROGRAMS[program], torch.arange(2.0), torch.arange(-5.25, 5.5, 0.5 if k > 1 else 0.25)
    theta = [torch.tensor(value, requires_grad=True) for value in PARAMS.values()]
    a, b, c, m, s, w = theta
    dist = PYRO.dist
    d, z, e = (t.reshape(-1) for t in torch.meshgrid(bit, grid, bit, indexing="ij"))
    x = m + c * d + s * z
    bits = dist.Bernoulli(logits=a).log_prob(d) + dist.Bernoulli(logits=b + w * x + 0.5 * d).log_prob(e)
    log_p = dist.Bernoulli(0.4).log_prob(d) + dist.StudentT(5.0, 0.3 + d, 1.0).log_prob(x)
    log_p = log_p + dist.Bernoulli(logits=x - 0.2).log_prob(e)
    log_p = log_p + dist.Normal(x - d + 1.5 * e, 0.8).log_prob(torch.tensor(1.2))
    log_w = log_p - bits - dist.Normal(m + c * d, s).log_prob(x)
    weight = (grid[1] - grid[0]) * (dist.Normal(0.0, 1.0).log_prob(z) + bits).exp()
    grids, weights = (torch.stack(torch.meshgrid(*[t] * k, indexing="ij")) for t in (log_w, weight))
    return with_gradient(-(program.value(grids) * weights.prod(0)).sum(), theta)


@pytest.mark.parametrize(
    ("front", "program", "k", "q", "kinds"),
    [
        (PYRO, "elbo", 1, guide, ("path", "reparam")),
        (PYRO, "user", 1, guide, ("path", "reparam")),
        (PYRO, "iwae", 3, guide, ("path", "reparam")),
        (PYRO, "user", 3, first_scored, ("path", "reparam")),
        (NUMPYRO, "iwae", 3, guide, ("path",)),
        (NUMPYRO, "user", 3, first_scored, ("path",)),
    ],
    ids=["pyro-elbo", "pyro-user", "pyro-iwae", "pyro-scored", "numpyro-iwae", "numpyro-scored"],
)
def test_value_and_gradient_are_those_of_quadrature(front, program, k, q, kinds):
    """From one and three particles, all of whose discrete sites are summed out, or whose first one is scored."""
    n = 300
    for kind in kinds:
        loss = front.objectives.Objective(PROGRAMS[program], k, gradient=kind)
        values, grads = front.estimates(loss, model, q, 40, n)
        assert_mean_zero(np.concatenate([values[:, None], grads], 1) / n - by_quadrature(program, k))


@each_front
def test_nothing_varies_at_the_posterior(front):
    program = programs.mixture([(1.0, program) for program in PROGRAMS.values()])
    planted = lambda front, n: guide(front, n, planted=True)
    _, grads = front.estimates(front.objectives.Objective(program, 3), planted, guide, 3, 2)
    assert np.abs(grads).max() < 1e-10


def test_there_is_less_noise_than_from_scores():
    loss = PYRO.objectives.Objective("iwae", 3)
    enum, score = (
        PYRO.estimates(loss, model, lambda front, n, kind=kind: guide(front, n, kind), 50, 10)[1].var(0)
        for kind in ("enum", "score")
    )
    assert enum[0] < 0.2 * score[0] and enum.sum() < 0.7 * score.sum()


# Guides of nothing else have no noise at all


DISCRETE = {"a": 0.3, "w": -0.6}
MASK, Y = (True, True, False), (1.2, 0.1, 0.7)


def discrete_model(front, size):
    mask = front.array(MASK) > 0
    with front.ppl.plate("rows", size, subsample_size=3):
        d = front.ppl.sample("d", front.dist.Bernoulli(0.4))
        e = front.ppl.sample("e", front.dist.Categorical(front.array([0.5, 0.3, 0.2])).expand([3]).mask(mask))
        y = d + front.array([0.0, 1.0, 3.0])[e]
        front.ppl.sample("y", front.dist.Normal(y, 0.8).mask(mask), obs=front.array(Y))


def discrete_guide(front, size):
    a, w = (front.ppl.param(name, front.array(value)) for name, value in DISCRETE.items())
    with front.ppl.plate("rows", size, subsample_size=3):
        d = front.ppl.sample("d", front.dist.Bernoulli(logits=a), infer={"grad": "enum"})
        logits = (a + w * d)[..., None] * front.array([0.0, 1.0, -2.0])
        e = front.dist.Categorical(logits=logits).mask(front.array(MASK) > 0)
        front.ppl.sample("e", e, infer={"grad": "enum"})


def by_enumeration(program):
    theta = a, w = [torch.tensor(value, requires_grad=True) for value in DISCRETE.values()]
    d, e = torch.arange(2.0)[:, None], torch.arange(3)
    dist, total = PYRO.dist, 0.0
    log_d = dist.Bernoulli(logits=a).log_prob(d)
    log_e = dist.Categorical(logits=(a + w * d)[..., None] * torch.tensor([0.0, 1.0, -2.0])).log_prob(e)
    for mask, y in zip(MASK, Y, strict=True):
        log_p = dist.Categorical(torch.tensor([0.5, 0.3, 0.2])).log_prob(e)
        log_p = log_p + dist.Normal(d + torch.tensor([0.0, 1.0, 3.0])[e], 0.8).log_prob(torch.tensor(y))
        log_w = dist.Bernoulli(0.4).log_prob(d) - log_d + mask * (log_p - log_e)
        total = total - ((log_d + log_e).exp() * program.value(log_w[None])).sum()
    return with_gradient(total, theta)


@each_front
def test_guides_of_nothing_else_are_exact(front):
    """One particle of any program, and any number of the ELBO; the plate's scale multiplies what is found; under a mask too."""
    for program, k, kind in (("user", 1, "path"), ("elbo", 3, "reparam")):
        loss = front.objectives.Objective(PROGRAMS[program], k, gradient=kind)
        values, grads = front.estimates(loss, discrete_model, discrete_guide, 2, 6)
        expected = 2 * by_enumeration(PROGRAMS[program])  # half of the rows are seen
        np.testing.assert_allclose(np.concatenate([values[:, None], grads], 1), [expected] * 2, rtol=1e-9)


# In a plate beside sites outside of it, the ELBO sums out each element by itself

LOCAL = {"a": 0.3, "b": -0.4, "c": 0.7, "m": 0.4, "s": 0.9, "w": 0.8}
ROWS = (1.2, -0.3, 0.4, 2.0)


def local_model(front, n):
    with front.ppl.plate("replicas", n):
        u = front.ppl.sample("u", front.dist.Bernoulli(0.4))
        x = front.ppl.sample("x", front.dist.StudentT(5.0, 0.3 + u, 1.0))
        with front.ppl.plate("rows", 4, dim=-2):
            d = front.ppl.sample("d", front.dist.Bernoulli(0.3))
            e = front.ppl.sample("e", front.dist.Bernoulli(logits=x + d - 0.2))
            y = front.array(ROWS)[:, None] + front.array([0.0] * n)
            front.ppl.sample("y", front.dist.Normal(x - d + 1.5 * e, 0.8), obs=y)
            front.ppl.sample("g", front.dist.Gamma(0.3 + 2 * d, 1.0))
            t = front.ppl.sample("t", front.dist.Bernoulli(0.5))
        t = t.sum(0) if front is NUMPYRO else t.sum(-2, keepdim=True)
        front.ppl.sample("all", front.dist.Normal(t, 1.0), obs=front.array([1.0] * n))
        with front.ppl.plate("others", 3, dim=-2):
            front.ppl.sample("v", front.dist.Normal(x, 1.0))


def local_guide(front, n):
    """A scored site and a reparametrised one outside of the plate, two that are summed out inside, beside one that is scored."""
    a, b, c, m, s, w = (front.ppl.param(name, front.array(value)) for name, value in LOCAL.items())
    with front.ppl.plate("replicas", n):
        u = front.ppl.sample("u", front.dist.Bernoulli(logits=b))
        x = front.ppl.sample("x", front.dist.Normal(m + c * u, s))
        with front.ppl.plate("rows", 4, dim=-2):
            d = front.ppl.sample("d", front.dist.Bernoulli(logits=a + w * x), infer={"grad": "enum"})
            front.ppl.sample("e", front.dist.Bernoulli(logits=b + 0.5 * d), infer={"grad": "enum"})
            front.ppl.sample("g", front.dist.Gamma(0.3 + 2 * d, 1.0))  # takes as many random numbers as it needs
            front.ppl.sample("t", front.dist.Bernoulli(logits=c))
        with front.ppl.plate("others", 3, dim=-2):
            front.ppl.sample("v", front.dist.Normal(w * x, s))


def local_by_quadrature():
    bit, grid, dist = torch.arange(2.0), torch.arange(-6.0, 6.1, 0.2), PYRO.dist
    theta = [torch.tensor(value, requires_grad=True) for value in LOCAL.values()]
    a, b, c, m, s, w = theta
    u, z, d, e = (t.reshape(2, len(grid), 4) for t in torch.meshgrid(bit, grid, bit, bit, indexing="ij"))
    x = m + c * u + s * z
    log_u, log_x = dist.Bernoulli(logits=b).log_prob(u), dist.Normal(m + c * u, s).log_prob(x)
    bits = dist.Bernoulli(logits=a + w * x).log_prob(d) + dist.Bernoulli(logits=b + 0.5 * d).log_prob(e)
    total = dist.Bernoulli(0.4).log_prob(u) + dist.StudentT(5.0, 0.3 + u, 1.0).log_prob(x) - log_u - log_x
    total = (total + 1.5 * (1 + 2 * torch.log(s) - s * s - (w * x - x) ** 2))[..., 0]
    t = torch.sigmoid(c)
    total = total + 4 * (np.log(0.5) - t * torch.log(t) - (1 - t) * torch.log(1 - t))
    total = total - 0.5 * (np.log(2 * np.pi) + (1 - 4 * t) ** 2 + 4 * t * (1 - t))
    for y in ROWS:
        log_p = dist.Bernoulli(0.3).log_prob(d) + dist.Bernoulli(logits=x + d - 0.2).log_prob(e)
        log_p = log_p + dist.Normal(x - d + 1.5 * e, 0.8).log_prob(torch.tensor(y))
        total = total + (bits.exp() * (log_p - bits)).sum(-1)
    weight = 0.2 * (dist.Normal(0.0, 1.0).log_prob(z) + log_u)[..., 0].exp()
    return with_gradient(-(weight * total).sum(), theta)


@each_front
@pytest.mark.parametrize(("k", "kind"), [(1, "reparam"), (2, "path")])
def test_elements_of_other_plates(front, k, kind):
    """Value and gradient are those of quadrature, of all that is inside and outside of the plate."""
    n = 300
    loss = front.objectives.Objective("elbo", k, gradient=kind)
    values, grads = front.estimates(loss, local_model, local_guide, 40, n)
    assert_mean_zero(np.concatenate([values[:, None], grads], 1) / n - local_by_quadrature())


@each_front
def test_nothing_varies_at_the_posterior_with_other_plates(front):
    def guide(front, n, param=lambda _, value: value):
        a, w = (param(k, front.array(LOCAL[k])) for k in "aw")
        with front.ppl.plate("rows", n):
            d = front.ppl.sample("d", front.dist.Bernoulli(logits=a), infer={"grad": "enum"})
            front.ppl.sample("y", front.dist.Normal(d, 1.0))
        x = front.ppl.sample("x", front.dist.Normal(w, 1.0))
        front.ppl.sample("u", front.dist.Bernoulli(logits=x))

    values, grads = front.estimates(
        front.objectives.Objective("elbo", 2), guide, lambda front, n: guide(front, n, front.ppl.param), 3, 2
    )
    assert np.abs(values).max() < 1e-10 and np.abs(grads).max() < 1e-10


@each_front
def test_other_plates_may_subsample(front):
    """A guide of nothing else has no noise but that of the subsample, and here all rows are alike."""
    ppl, dist, array = front.ppl, front.dist, front.array

    def rows(front, size, of, prior, infer):
        ppl.sample("x", dist.Normal(0.0, 1.0))
        with ppl.plate("rows", size, subsample_size=2):
            d = ppl.sample("d", dist.Bernoulli(logits=prior), infer=infer)
            if of is not None:
                ppl.sample("y", dist.Normal(d, of), obs=array([0.7] * 2))

    guide = lambda front, size: rows(front, size, None, ppl.param("a", array(0.3)), {"grad": "enum"})
    values, grads = front.estimates(
        front.objectives.Objective("elbo", 2), lambda front, size: rows(front, size, 0.8, array(0.1), {}), guide, 2, 6
    )
    a = torch.tensor(0.3, requires_grad=True)
    log_q = PYRO.dist.Bernoulli(logits=a).log_prob(torch.arange(2.0))
    log_p = PYRO.dist.Bernoulli(logits=0.1 + 0 * a).log_prob(torch.arange(2.0))
    log_p = log_p + PYRO.dist.Normal(torch.arange(2.0), 0.8).log_prob(torch.tensor(0.7))
    expected = with_gradient(-6 * (log_q.exp() * (log_p - log_q)).sum(), [a])
    np.testing.assert_allclose(np.concatenate([values[:, None], grads], 1), [expected] * 2, rtol=1e-9)


# What cannot be summed out


def refused(front, guide, match, program="iwae", model=None):
    loss = front.objectives.Objective(program, 2)
    with pytest.raises(UnsupportedModelError, match=match):
        front.estimates(loss, guide if model is None else model, guide, 1)


@each_front
def test_what_is_refused(front):
    """By name, with what to do."""
    ppl, dist, array, enum = front.ppl, front.dist, front.array, {"grad": "enum"}

    def each(front, of, plate=None, **more):
        ppl.param("p", array(0.3))
        if plate is None:
            return ppl.sample("d", of, infer=enum)
        ppl.sample("x", dist.Normal(0.0, 1.0))
        with ppl.plate(plate, 2):
            return ppl.sample("d", of, infer=enum)

    two = dist.Bernoulli(array([0.3, 0.4]))
    for of, plate, match in (
        (dist.Poisson(1.0), None, 'Poisson.*mark it "score"'),
        (two.to_event(1), None, "site 'd' .*(Independent|Bernoulli).*cannot be listed"),
        (two, "rows", "site 'd' .* no plate around all sites.*the objective .elbo"),
        (dist.Bernoulli(0.3), "rows", "site 'd' .* no plate around all sites.*the objective .elbo"),
    ):
        refused(front, lambda front, of=of, plate=plate: each(front, of, plate), match)
    for program in ("cubo", "rws"):
        refused(front, lambda front: each(front, dist.Bernoulli(0.3)), "site 'd' .* summed out.*iwae", program)

    if front is NUMPYRO:  # Pyro has its own error
        refused(front, lambda front: each(front, two), "site 'd' .* no plate, .*put them into a plate", "elbo")

    def apart(front, outside=None, inside=0.0, felt=None):
        """Two plates; the site outside may look at what is summed out, or at what depends on that, by a weight that is zero now."""
        ppl.param("p", array(0.3))
        shift = ppl.sample("u", dist.Bernoulli(0.3), infer=outside) if outside else 0.0
        with ppl.plate("rows", 2):
            d = ppl.sample("d", dist.Bernoulli(0.3 + inside), infer=enum)
            of = {None: 0.0 * array(1.0), "d": d, "x": ppl.sample("x", dist.Normal(d, 1.0))}[felt]
        if felt:
            of = ppl.param("w", array(0.0)) * (of.sum(-1) if front is NUMPYRO else of.sum(-1, keepdim=True))
        ppl.sample("v", dist.Normal(shift + of, 1.0))

    refused(front, lambda front: apart(front, enum), "'u' and 'd' .* not in the same plates", "elbo")
    for felt in "dx":
        feels = lambda front, felt=felt: apart(front, felt=felt)
        refused(front, feels, "'v' of the guide depends on a site .*score", "elbo", apart)
        refused(front, apart, "'v' of the model depends on a site", "elbo", feels)

    def many(front):
        ppl.param("p", array(0.3))
        for i in range(6):
            ppl.sample(f"d{i}", dist.Categorical(array([0.25] * 4)), infer=enum)

    refused(front, many, r"site 'd5' .* 4096 joint .* 1024.*mark sites \"score\"")


# The mathematics alone


def test_one_branch_is_a_particle():
    """And a program's closed weights do what those do that are derived from its value; dead branches do no harm."""
    backend, rng = get_backend("torch"), np.random.default_rng(0)
    log_w = rng.standard_normal((4, 3))
    log_r, picked = on(backend, np.zeros((4, 1, 3))), backend.xp.argmax(on(backend, np.zeros((1, 4, 3))), axis=0)
    for program in PROGRAMS.values():
        one = cotangents_of_branches(program, on(backend, log_w), Branches(log_r, picked), 0.3)
        particles = programs.cotangents(program, on(backend, log_w), 0.3, scored=True)
        for found, expected in zip(one[1:6], particles[1:6], strict=True):
            np.testing.assert_allclose(backend.to_numpy(found), backend.to_numpy(expected), rtol=1e-10, atol=1e-12)
        assert np.abs(backend.to_numpy(one.summed)).max() == 0
    log_w = rng.standard_normal((8, 3))
    log_w[3, 0] = log_w[4, 1] = -np.inf
    r = np.array([0.3, 1.0, 0.5, 0.9])[:, None, None] * np.ones((4, 1, 3))
    with np.errstate(divide="ignore"):
        of = Branches(on(backend, np.log(np.concatenate([r, 1 - r], 1))), picked)
    for program in (programs.iwae(), programs.renyi(0.4)):
        closed, derived = (
            cotangents_of_branches(p, on(backend, log_w), of, 0.3) for p in (program, programs.Program(program.value))
        )
        for a, b in zip(closed, derived, strict=True):
            assert np.isfinite(backend.to_numpy(a)).all()
            np.testing.assert_allclose(backend.to_numpy(a), backend.to_numpy(b), rtol=1e-8, atol=1e-10)
