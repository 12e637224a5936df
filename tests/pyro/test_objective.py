"""Objectives of Pyro's SVI: right in the mean against quadrature, of no variance at the posterior, in every program and guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineTransform, Planar
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from scipy.stats import f
from torch.distributions import constraints

from flowppl import flows, tree
from flowppl.errors import UnsupportedModelError
from flowppl.flows import Flow
from flowppl.objectives import programs
from flowppl.pyro import AutoFlow, FlowDistribution, Objective, PathELBO, flow_module

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]  # once is enough; the docstring runs everywhere

SMALL = flows.nsf(layers=1, hidden=(4,), bins=3)
CONDITIONAL = flows.realnvp(layers=1, hidden=(4,))


def smooth(log_w):
    """A user's objective, in which particles have different parts."""
    return log_w.tanh().mean(0) + 0.3 * log_w[0].sigmoid()


PROGRAMS = {
    "elbo": "elbo",
    "iwae": "iwae",
    "renyi": programs.renyi(0.4),
    "renyi -1": programs.renyi(-1.0),
    "jensen_shannon": "jensen_shannon",
    "user": smooth,
}
BIASED = ("cubo", "vis", "rws", "tail_adaptive")
every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def gradient(loss, model, guide, seed, *args):
    """The gradients of one estimate of the loss, by parameter."""
    pyro.set_rng_seed(seed)
    params = dict(sorted(pyro.get_param_store().named_parameters()))
    for p in params.values():
        p.grad = None
    loss.loss_and_grads(model, guide, *args)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients.values()])


def assert_mean_zero(draws, k=4):
    """Hotelling's test on a few directions, with a floor against rounding: one false alarm in a thousand."""
    n, dim = draws.shape
    if dim > k:
        draws = draws @ torch.randn(dim, k, generator=torch.Generator().manual_seed(1))
    k = min(dim, k)
    mean, covariance = draws.mean(0), torch.cov(draws.T).reshape(k, k) + 1e-12 * torch.eye(k)
    assert n * mean @ torch.linalg.solve(covariance, mean) * (n - k) / (k * (n - 1)) < f.isf(1e-3, k, n - k)


# In the mean


def log_joint(x):
    return dist.StudentT(5.0, 0.3, 1.0).log_prob(x) + dist.Normal(x, 0.8).log_prob(torch.tensor(1.2))


def replicas_model(n):
    with pyro.plate("replicas", n):
        x = pyro.sample("x", dist.StudentT(5.0, 0.3, 1.0))
        pyro.sample("y", dist.Normal(x, 0.8), obs=torch.tensor(1.2).expand(n))


def replicas_guide(n):
    loc, scale = pyro.param("loc", torch.tensor(0.4)), pyro.param("scale", torch.tensor(0.9), constraints.positive)
    with pyro.plate("replicas", n):
        pyro.sample("x", dist.Normal(loc, scale))


def by_quadrature(program):
    """The exact gradient of minus the objective of two particles in `loc` and the logarithm of `scale`."""
    theta = torch.tensor([0.4, 0.9]).log().requires_grad_()
    loc, scale = theta.exp()
    z = torch.linspace(-8, 8, 601)
    weight = dist.Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    x = loc + scale * z
    log_w = log_joint(x) - dist.Normal(loc, scale).log_prob(x)
    log_w = torch.stack([log_w[:, None].expand(601, 601), log_w.expand(601, 601)])
    value = (programs.get(program).value(log_w) * weight * weight[:, None]).sum()
    (g,) = torch.autograd.grad(-value, theta)
    return torch.stack([g[0] / 0.4, g[1]])


@every_program
@pytest.mark.parametrize("kind", ["path", "reparam"])
def test_gradient_is_that_of_quadrature(kind, program):
    n, loss = 500, Objective(program, 2, gradient=kind)
    replicas_guide(n)
    draws = torch.stack([flat(gradient(loss, replicas_model, replicas_guide, seed, n)) / n for seed in range(40)])
    assert_mean_zero(draws - by_quadrature(program))


def hierarchy_model(n):
    shift = pyro.param("shift", torch.tensor(0.3))
    with pyro.plate("replicas", n):
        a = pyro.sample("a", dist.StudentT(5.0, shift * torch.ones(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a.sin(), 0.8).to_event(1))
        pyro.sample("y", dist.Normal(a.sum(-1) + b.prod(-1), 0.7), obs=torch.ones(n))


def flow_guide(n):
    with pyro.plate("replicas", n):
        a = pyro.sample("a", flow_module("qa", SMALL, dim=2))
        context = torch.stack([a.sum(-1) + pyro.param("c", torch.tensor(0.1)), a.prod(-1)], -1)
        pyro.sample("b", flow_module("qb", CONDITIONAL, context, dim=2).mask(torch.tensor(True)))


def normal_guide(n):
    with pyro.plate("replicas", n):
        a = pyro.sample("a", dist.Normal(pyro.param("m", torch.zeros(2)), 0.8).to_event(1))
        slope, scale = pyro.param("w", torch.tensor(0.4)), pyro.param("s", torch.tensor(0.7), constraints.positive)
        pyro.sample("b", dist.Normal(slope * a, scale).to_event(1))


@every_program
@pytest.mark.parametrize("guide", [normal_guide, flow_guide])
def test_mean_of_a_hierarchy(guide, program, scramble):
    """Path and plain gradients have one mean in all parameters of the guide, and in the model's they are the same."""
    n = 40
    guide(1), hierarchy_model(1)
    scramble([p for _, p in sorted(pyro.get_param_store().named_parameters())], 0.2)
    losses = [Objective(program, 3, gradient=kind) for kind in ("path", "reparam")]
    pairs = [[gradient(loss, hierarchy_model, guide, seed, n) for loss in losses] for seed in range(30)]
    for path, plain in pairs:
        assert torch.allclose(path.pop("shift"), plain.pop("shift"), rtol=1e-9)
    differences = torch.stack([flat(path) - flat(plain) for path, plain in pairs]) / n
    assert differences.abs().max() > 1e-3
    assert_mean_zero(differences)


def small_model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.2, 0.7))
    pyro.sample("y", dist.Normal(x, s), obs=torch.tensor(1.0))


@pytest.mark.parametrize("of", [AutoMultivariateNormal, lambda model: AutoFlow(model, SMALL, gradient="auto")])
def test_mean_of_flat_guides(of, scramble):
    """Sites that are maps of one auxiliary site, with log-determinants of their own, count once."""
    guide = of(small_model)
    guide()
    scramble([p for _, p in sorted(pyro.get_param_store().named_parameters())], 0.2)
    losses = [Objective("iwae", 3, gradient=kind) for kind in ("path", "reparam")]
    pairs = [[flat(gradient(loss, small_model, guide, seed)) for loss in losses] for seed in range(150)]
    assert_mean_zero(torch.stack([path - plain for path, plain in pairs]))


# Sites that draw without derivatives


def mixed_model(n):
    with pyro.plate("replicas", n):
        d = pyro.sample("d", dist.Bernoulli(0.4))
        x = pyro.sample("x", dist.StudentT(5.0, 0.3 + d, 1.0))
        e = pyro.sample("e", dist.Bernoulli(logits=x - 0.2))
        pyro.sample("y", dist.Normal(x - d + 1.5 * e, 0.8), obs=torch.tensor(1.2).expand(n))


MIXED = dict(zip("abmcsw", (0.3, -0.2, 0.4, 0.7, 0.9, 0.8), strict=True))


def mixed_guide(n):
    """A scored site before a reparametrised one, and one after it."""
    a, b, m, c, s, w = (pyro.param(name, torch.tensor(value)) for name, value in MIXED.items())
    with pyro.plate("replicas", n):
        d = pyro.sample("d", dist.Bernoulli(logits=a))
        x = pyro.sample("x", dist.Normal(m + c * d, s))
        pyro.sample("e", dist.Bernoulli(logits=b + w * x))


def mixed_by_quadrature(program, k=2):
    """The exact gradient of minus the objective of one or two particles: by quadrature over normals, enumeration over bits."""
    theta = {name: torch.tensor(value, requires_grad=True) for name, value in sorted(MIXED.items())}
    a, b, c, m, s, w = theta.values()
    bit = torch.arange(2.0)
    d, z, e = (t.reshape(-1) for t in torch.meshgrid(bit, torch.linspace(-8, 8, 81), bit, indexing="ij"))
    x = m + c * d + s * z
    bits = dist.Bernoulli(logits=a).log_prob(d) + dist.Bernoulli(logits=b + w * x).log_prob(e)
    log_p = dist.Bernoulli(0.4).log_prob(d) + dist.StudentT(5.0, 0.3 + d, 1.0).log_prob(x)
    log_p = log_p + dist.Bernoulli(logits=x - 0.2).log_prob(e)
    log_p = log_p + dist.Normal(x - d + 1.5 * e, 0.8).log_prob(torch.tensor(1.2))
    log_w = log_p - bits - dist.Normal(m + c * d, s).log_prob(x)
    weight = 0.2 * (dist.Normal(0.0, 1.0).log_prob(z) + bits).exp()
    if k == 1:
        value = (programs.get(program).value(log_w[None]) * weight).sum()
    else:
        pairs = torch.stack([log_w[:, None].expand(len(z), len(z)), log_w.expand(len(z), len(z))])
        value = (programs.get(program).value(pairs) * weight * weight[:, None]).sum()
    return torch.stack(torch.autograd.grad(-value, list(theta.values())))


@pytest.mark.parametrize(
    ("program", "k"), [*((p, 2) for p in PROGRAMS.values()), (smooth, 1)], ids=[*PROGRAMS, "alone"]
)
def test_gradient_of_scored_sites_is_that_of_quadrature(program, k):
    n = 500
    mixed_guide(n)
    losses = [Objective(program, k, gradient=kind, max_plate_nesting=1) for kind in ("path", "reparam")]
    exact = mixed_by_quadrature(program, k)
    for loss in losses:
        draws = [flat(gradient(loss, mixed_model, mixed_guide, seed, n)) / n for seed in range(40)]
        assert_mean_zero(torch.stack(draws) - exact, k=6)


@pytest.mark.parametrize("program", ["iwae", smooth], ids=["iwae", "user"])
@pytest.mark.parametrize("kind", ["path", "reparam"])
def test_continuous_sites_that_are_marked(kind, program):
    """What a transform drew, and remembers, has no part in the score."""

    def guide(n):
        loc, scale = pyro.param("loc", torch.tensor(0.4)), pyro.param("scale", torch.tensor(0.9), constraints.positive)
        q = dist.TransformedDistribution(dist.Normal(0.0, 1.0), AffineTransform(loc, scale, cache_size=1))
        with pyro.plate("replicas", n):
            pyro.sample("x", q, infer={"grad": "score"})

    n, loss = 500, Objective(program, 2, gradient=kind)
    guide(n)
    draws = torch.stack([flat(gradient(loss, replicas_model, guide, seed, n)) / n for seed in range(40)])
    assert_mean_zero(draws - by_quadrature(program))


def test_flows_can_be_marked(scramble):
    """A score needs the density of a value, and not what the flow drew on the way."""

    def guide(n, marked="score"):
        with pyro.plate("replicas", n):
            x = pyro.sample("a", flow_module("qa", SMALL, dim=2), infer={"grad": marked})
            pyro.sample("b", flow_module("qb", CONDITIONAL, x, dim=2))

    n = 40
    guide(1), hierarchy_model(1)
    scramble([p for _, p in sorted(pyro.get_param_store().named_parameters())], 0.2)
    moving = lambda n: guide(n, "reparam")
    for kind in ("path", "reparam"):
        loss = [Objective("iwae", 3, gradient=kind) for _ in range(2)]
        pairs = [
            [gradient(o, hierarchy_model, g, s, n) for o, g in zip(loss, (guide, moving), strict=True)]
            for s in range(40)
        ]
        differences = torch.stack([flat(a) - flat(b) for a, b in pairs]) / n
        assert differences.abs().max() > 1e-3
        assert_mean_zero(differences)


@pytest.mark.parametrize("program", ["elbo", "iwae"])
def test_baselines_lower_the_variance(program, monkeypatch):
    mixed_guide(1)
    loss = Objective(program, 4, max_plate_nesting=1)
    draw = lambda: torch.stack([flat(gradient(loss, mixed_model, mixed_guide, seed, 1)) for seed in range(150)])
    found = draw()
    monkeypatch.setattr(programs, "leave_one_out", lambda credit, log_w: credit(log_w))
    assert found.var(0).sum() < 0.7 * draw().var(0).sum()


def clusters_model(n):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", n):
        d = pyro.sample("d", dist.Bernoulli(logits=x))
        y = dist.Normal(torch.stack([x + d, x - d], -1), 0.8).to_event(1)
        pyro.sample("y", y, obs=torch.ones(n, 2))


def clusters_guide(n):
    x = pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.2)), pyro.param("s", torch.tensor(0.8))))
    with pyro.plate("rows", n):
        pyro.sample("d", dist.Bernoulli(logits=pyro.param("w", torch.tensor(0.5)) * x))


@pytest.mark.parametrize("program", ["elbo", "iwae"])
def test_mean_of_scored_sites_in_a_plate_beside_others(program):
    clusters_guide(3)
    losses = [Objective(program, 3, gradient=kind, max_plate_nesting=1) for kind in ("path", "reparam")]
    pairs = [[flat(gradient(loss, clusters_model, clusters_guide, seed, 3)) for loss in losses] for seed in range(200)]
    differences = torch.stack([path - plain for path, plain in pairs])
    assert differences.abs().max() > 1e-3
    assert_mean_zero(differences)


def test_scored_sites_in_subsampled_plates():
    """Of the ELBO too they answer for their own elements alone, and are scaled up."""

    def model(size):
        with pyro.plate("rows", size, subsample=torch.arange(2)):
            pyro.sample("y", dist.Normal(pyro.sample("d", dist.Bernoulli(0.5)), 0.5), obs=torch.tensor([1.0, 2.0]))

    def guide(size):
        with pyro.plate("rows", size, subsample=torch.arange(2)):
            pyro.sample("d", dist.Bernoulli(logits=pyro.param("m", torch.tensor(0.2))))

    guide(2)
    apart = programs.Program(programs.elbo().value)
    for kind in ("path", "reparam", "auto"):
        each = [
            [flat(gradient(Objective(p, 4, gradient=kind), model, guide, 1, size)) for size in (2, 6)]
            for p in ("iwae", "elbo", apart)
        ]
        for one, three in each:
            assert torch.allclose(three, 3 * one, rtol=1e-10)
        assert torch.allclose(each[1][0], each[2][0], rtol=1e-10)


# No variance at the posterior


def conjugate_model():
    """Both posteriors, of x and of log s, have scale one half."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("s", dist.LogNormal(0.2, 0.5))
    pyro.sample("y", dist.Normal(x, 3**-0.5).to_event(1), obs=torch.tensor([1.0, -2.0]))


POSTERIOR = {"x": torch.tensor([0.75, -1.5], dtype=torch.float64), "s": torch.tensor(0.2, dtype=torch.float64).exp()}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("program", [*PROGRAMS.values(), *BIASED], ids=[*PROGRAMS, *BIASED])
def test_no_variance_at_a_gaussian_posterior(program, k):
    for of in (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal):
        pyro.clear_param_store()
        guide = of(conjugate_model, init_loc_fn=init_to_value(values=POSTERIOR), init_scale=0.5)
        guide()
        assert flat(gradient(Objective(program, k), conjugate_model, guide, 3)).abs().max() < 1e-10
    plain = flat(gradient(Objective("elbo", k, gradient="reparam"), conjugate_model, guide, 3))
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("recipe", [SMALL, "planar"])
@pytest.mark.parametrize("program", ["elbo", "iwae", "jensen_shannon"])
def test_no_variance_at_a_planted_flow(program, recipe, scramble):
    guide = AutoFlow(lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1)), recipe)
    guide()
    scramble([p for _, p in sorted(pyro.get_param_store().named_parameters())])
    flow, variables = guide._flow, tree.map(lambda p: p.detach().clone(), guide._variables())
    planted = lambda: pyro.sample("x", FlowDistribution(flow, variables))
    path, plain = (flat(gradient(Objective(program, 3, gradient=g), planted, guide, 1)) for g in ("path", "reparam"))
    assert path.abs().max() < 1e-9
    assert program != "elbo" or plain.abs().max() > 0.1


def hierarchy_of_flows(parent, child):
    def run():
        a = pyro.sample("a", FlowDistribution(SMALL(2), parent))
        with pyro.plate("rows", 3):
            context = torch.stack([a.sum(-1) + torch.linspace(-1.0, 1.0, 3), a.prod(-1).expand(*a.shape[:-2], 3)], -1)
            b = pyro.sample("b", FlowDistribution(CONDITIONAL(2, 2), child, context))
        context = torch.cat([b[..., :1], a[..., :1].expand(*b.shape[:-1], 1)], -1).unsqueeze(-3)
        pyro.sample("c", FlowDistribution(CONDITIONAL(2, 2), child, context).to_event(1))

    return run


def test_no_variance_at_a_planted_hierarchy_of_flows(scramble):
    """Densities of children depend on their parents through contexts."""
    variables = [flow.init(torch.Generator().manual_seed(1), torch.empty(0)) for flow in (SMALL(2), CONDITIONAL(2, 2))]
    leaves = [leaf for leaf in tree.leaves([v["params"] for v in variables]) if leaf.is_floating_point()]
    scramble(leaves)
    model = hierarchy_of_flows(*tree.map(lambda leaf: leaf.clone(), variables))
    for leaf in leaves:
        leaf.requires_grad_()
    for program in ("elbo", "iwae"):
        for kind in ("path", "auto"):
            Objective(program, 3, gradient=kind, max_plate_nesting=1).loss_and_grads(
                model, hierarchy_of_flows(*variables)
            )
    assert max(leaf.grad.abs().max() for leaf in leaves) < 1e-9


def test_flows_are_not_inverted(monkeypatch):
    guide = AutoFlow(small_model, SMALL)
    guide()
    monkeypatch.delattr(Flow, "log_prob")
    Objective("iwae", 3).loss_and_grads(small_model, guide)


def levels_model():
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
    pyro.sample("y", dist.Normal(z2, 0.5), obs=torch.tensor(0.7))


def levels_guide():
    p = lambda name, value: pyro.param(name, torch.tensor(value))
    z1 = pyro.sample("z1", dist.Normal(p("a", 0.7 / 2.25), p("s1", (1.25 / 2.25) ** 0.5)))
    pyro.sample("z2", dist.Normal(p("b", 0.2) * z1 + p("c", 2.8 / 5), p("s2", 0.2**0.5)))


@every_program
def test_no_variance_at_the_posterior_of_two_levels(program):
    """Freezing also the parent's value, as detaching each distribution does, would leave the parent's parameters some."""
    levels_guide()
    assert flat(gradient(Objective(program, 3), levels_model, levels_guide, 1)).abs().max() < 1e-10


@pytest.mark.parametrize("program", ["elbo", "iwae", smooth], ids=["elbo", "iwae", "user"])
def test_no_variance_at_a_planted_guide_with_scored_sites(program):
    mixed_guide(2)

    def planted():
        a, b, m, c, s, w = (torch.tensor(value) for value in MIXED.values())
        with pyro.plate("replicas", 2):
            d = pyro.sample("d", dist.Bernoulli(logits=a))
            x = pyro.sample("x", dist.Normal(m + c * d, s))
            pyro.sample("e", dist.Bernoulli(logits=b + w * x))

    assert flat(gradient(Objective(program, 3), planted, lambda: mixed_guide(2), 1)).abs().max() < 1e-10


def test_parameters_unknown_to_pyro_are_frozen_too():
    loc, scale = torch.tensor(0.75, requires_grad=True), torch.tensor(0.5, requires_grad=True)

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 3**-0.5), obs=torch.tensor(1.0))

    Objective("iwae", 4).loss_and_grads(model, lambda: pyro.sample("x", dist.Normal(loc, scale)))
    assert max(abs(loc.grad), abs(scale.grad)) < 1e-10
    assert loc.requires_grad and scale.requires_grad


def test_transforms_that_remember_what_they_drew():
    """They would answer with the attached draw, and the path gradient would silently be the plain one."""
    loc, scale = (torch.tensor(value, requires_grad=True) for value in (0.75, 0.5))
    transform = AffineTransform(loc, scale, cache_size=1)  # one for all runs, like a network's

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 3**-0.5), obs=torch.tensor(1.0))

    def guide():
        pyro.param("loc", loc), pyro.param("scale", scale)
        pyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, 1.0), transform))

    guide()
    assert flat(gradient(PathELBO(), model, guide, 1)).abs().max() < 1e-10
    with torch.no_grad():
        loc.add_(0.4)
    path, plain = (flat(gradient(Objective(gradient=g), model, guide, 1)) for g in ("path", "reparam"))
    assert (path - plain).abs().min() > 1e-2


# Values, models, plates


@every_program
def test_value_is_the_plain_one(program, scramble):
    guide = AutoFlow(small_model, SMALL)
    guide()
    scramble([p for _, p in sorted(pyro.get_param_store().named_parameters())], 0.2)
    losses = []
    for kind in ("path", "reparam", "auto"):
        for method in ("loss", "differentiable_loss", "loss_and_grads"):
            pyro.set_rng_seed(1)
            loss = getattr(Objective(program, 3, gradient=kind), method)(small_model, guide)
            losses.append(float(torch.as_tensor(loss).detach()))
    assert losses == pytest.approx([losses[0]] * 9, rel=1e-12)


def plate_model(n=3):
    shift = pyro.param("shift", torch.tensor(0.3))
    with pyro.plate("rows", n):
        x = pyro.sample("x", dist.Normal(shift, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.arange(float(n)))


def plate_guide(n=3):
    with pyro.plate("rows", n):
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.2)), pyro.param("s", torch.tensor(0.8))))


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_plates_and_models_as_in_renyi(alpha):
    """Pyro's own loss has the same value and, of the model and of the guide, the same plain gradient."""
    plate_model(), plate_guide()
    theirs = RenyiELBO(alpha=alpha, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    expected = gradient(theirs, plate_model, plate_guide, 5)
    plain, path = (
        gradient(Objective(programs.renyi(alpha), 4, gradient=g, max_plate_nesting=1), plate_model, plate_guide, 5)
        for g in ("reparam", "path")
    )
    assert torch.allclose(path["shift"], expected["shift"], rtol=1e-10)
    assert torch.allclose(flat(plain), flat(expected), rtol=1e-10)
    assert not torch.allclose(path["m"], plain["m"], rtol=1e-3)
    values = []
    for loss in (theirs, Objective(programs.renyi(alpha), 4, max_plate_nesting=1)):
        pyro.set_rng_seed(2)
        values.append(loss.loss(plate_model, plate_guide))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_subsampled_plates_are_scaled_outside_of_the_objective():
    def model(size):
        with pyro.plate("rows", size, subsample=torch.arange(2)):
            pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 0.5), obs=torch.tensor([1.0, 2.0]))

    def guide(size):
        with pyro.plate("rows", size, subsample=torch.arange(2)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.8))

    guide(2)
    for program in ("iwae", "elbo"):
        for kind in ("path", "auto"):
            one, three = (gradient(Objective(program, 4, gradient=kind), model, guide, 1, size) for size in (2, 6))
            assert torch.allclose(flat(three), 3 * flat(one), rtol=1e-10)
        losses = []
        for size in (2, 6):
            pyro.set_rng_seed(1)
            losses.append(Objective(program, 4).loss(model, guide, size))
            pyro.set_rng_seed(1)
            losses.append(Objective(program, 4).loss_and_grads(model, guide, size))
        assert losses == pytest.approx([losses[0], losses[0], 3 * losses[0], 3 * losses[0]])


def regression(n=6):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", n, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(slope * rows, 0.5), obs=1.0 + rows)


def slope_guide(n=6):
    pyro.sample("slope", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.8))


def test_other_subsampled_plates():
    with pytest.raises(UnsupportedModelError, match="plate 'rows' subsamples"):
        Objective("iwae", 4).loss(regression, slope_guide)
    values = []
    for loss in (Trace_ELBO(4, vectorize_particles=True), Objective("elbo", 4)):
        pyro.set_rng_seed(2)
        values.append(loss.loss(regression, slope_guide))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


# The mixture


@pytest.mark.parametrize("program", ["elbo", "iwae"])
@pytest.mark.parametrize("scored", [False, True])
def test_auto_is_the_mixture_that_it_says(program, scored):
    model = conjugate_model
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=POSTERIOR), init_scale=0.4)
    if scored:
        model, guide = (lambda f=f: f(2) for f in (mixed_model, mixed_guide))
    guide()
    auto, *pure = (Objective(program, 3, gradient=g, max_plate_nesting=1) for g in ("auto", "path", "reparam"))
    seen = []
    for seed in range(23):
        c = auto.coefficient
        mixed, path, plain = (flat(gradient(loss, model, guide, seed)) for loss in (auto, *pure))
        assert torch.allclose(mixed, (1 - c) * path + c * plain, rtol=1e-9, atol=1e-9)
        seen.append(c)
    assert min(seen) >= 0 and max(seen) <= 1
    assert len(set(seen)) == 4 or scored  # the start, and three looks
    assert seen[-1] > 0.01 or (scored and max(seen) > 0.01)


def test_auto_lands_at_the_posterior():
    guide = AutoNormal(conjugate_model, init_loc_fn=init_to_value(values=POSTERIOR), init_scale=0.5)
    loss = Objective("iwae", 4, gradient="auto")
    svi = SVI(conjugate_model, guide, pyro.optim.Adam({"lr": 1e-9}), loss)
    for _ in range(12):
        svi.step()
    assert loss.coefficient < 1e-5


def test_training_reaches_the_evidence():
    guide = AutoFlow(conjugate_model, "affine", gradient="auto")
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.985})
    svi = SVI(conjugate_model, guide, optimizer, PathELBO(8))
    for _ in range(350):
        svi.step()
    evidence = dist.Normal(0.0, (4 / 3) ** 0.5).log_prob(torch.tensor([1.0, -2.0])).sum()
    losses = torch.tensor([Objective("elbo", 1).loss(conjugate_model, guide) for _ in range(10)])
    assert torch.allclose(losses, -evidence, atol=0.01)


# Errors


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="gradient must be one of"):
        Objective(gradient="score")
    with pytest.raises(ValueError, match="an objective must be one of"):
        Objective("elob")
    with pytest.raises(ValueError, match="biased=True"):
        Objective(programs.vis())
    Objective(programs.vis(), biased=True)
    for kind in ("reparam", "auto"):
        with pytest.raises(ValueError, match='has "path"'):
            Objective("rws", gradient=kind)


def test_guides_that_cannot_be_used():
    model = lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def no_inverse():
        flow = pyro.module("planar", Planar(2))
        pyro.sample("x", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    with pytest.raises(UnsupportedModelError, match=r"site 'x'.*gradient=\"reparam\""):
        Objective().loss_and_grads(model, no_inverse)
    Objective(gradient="reparam").loss_and_grads(model, no_inverse)
    for marked, of in (("reparam", dist.Poisson(1.0)), ("score", dist.Delta(torch.tensor(1.0)))):
        guide = lambda marked=marked, of=of: pyro.sample("n", of, infer={"grad": marked})
        with pytest.raises(UnsupportedModelError, match=f"site 'n'.*{type(of).__name__}"):
            Objective().loss_and_grads(guide, guide)
    guide = lambda: pyro.sample("n", dist.Poisson(1.0))
    with pytest.raises(UnsupportedModelError, match=r"site 'n' .* score"):
        Objective("rws").loss_and_grads(guide, guide)
    guide = lambda: pyro.sample("n", dist.Poisson(1.0), infer={"grad": "scroe"})
    with pytest.raises(ValueError, match=r"'n' has .*scroe"):
        Objective().loss_and_grads(guide, guide)


def test_points_without_a_density():
    """The rule of path gradients does not hold for them, but where the objective is linear."""
    guide = AutoGuideList(small_model)
    guide.append(AutoDelta(poutine.block(small_model, expose=["x"])))
    guide.append(AutoNormal(poutine.block(small_model, expose=["s"])))
    guide()
    with pytest.raises(UnsupportedModelError, match="site 'x' of the guide is a Delta"):
        Objective("iwae").loss_and_grads(small_model, guide)
    path, plain = (gradient(Objective(gradient=g), small_model, guide, 1) for g in ("path", "reparam"))
    (name,) = (name for name in path if name.endswith("x"))
    assert torch.allclose(path[name], plain[name], rtol=1e-10)
    assert abs(plain[name]) > 1e-3


def test_scaled_guides():
    """The rule counts a log density once: of a nonlinear objective, the gradient would be biased."""
    plate_guide()
    with pytest.raises(UnsupportedModelError, match=r"site 'x' of the guide has its log density scaled"):
        Objective("iwae").loss_and_grads(plate_model, poutine.scale(plate_guide, 0.5))
    for loss in (Objective("iwae", gradient="reparam"), Objective("elbo")):
        loss.loss_and_grads(plate_model, poutine.scale(plate_guide, 0.5))
