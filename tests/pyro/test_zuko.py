"""Flows of zuko as ours: the same densities, draws and gradients, in every place that takes a flow."""

import copy
import pickle
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import NeuTraReparam
from torch import nn

from flowppl import tree
from flowppl.bijections import bind
from flowppl.errors import DimensionError, FlowFileError, MissingExtraError, UnsupportedFlowError
from flowppl.flows import files
from flowppl.flows.flow import part_of
from flowppl.pyro import AutoFlow, FlowDistribution, FlowTransform, LogDensity, flow_module, from_zuko, save_flow

zuko = pytest.importorskip("zuko")

pytestmark = pytest.mark.usefixtures("float64")

SMALL = {"hidden_features": (4,), "transforms": 2}
# How far a round trip goes astray: zuko's bisections stop at 1e-6, its ODE solver has adaptive steps.
CLOSED = {"NSF": {"bins": 3}, "MAF": {}, "RealNVP": {}}
SEARCHED = {
    "NAF": {"signal": 2, "network": {"hidden_features": (4,)}},
    "UNAF": {"signal": 2, "network": {"hidden_features": (4,)}},
    "SOSPF": {},
    "BPF": {"degree": 4},
    "GF": {"components": 2},
}
NAMES = [*CLOSED, *SEARCHED, "CNF"]


def make(name, context=2, dim=3):
    options = {**SMALL, **{**CLOSED, **SEARCHED}.get(name, {})}
    if name == "CNF":
        options = {"hidden_features": (4,)}
    return getattr(zuko.flows, name)(dim, context=context, **options)


def filled(module, variables):
    """A copy of zuko's module that holds our arrays, as parameters of its own."""
    module = copy.deepcopy(module)
    state = {n.replace("/", "."): t for kind in variables.values() for n, t in kind["bijection"].items()}
    module.transform.load_state_dict(state)
    return module


def variables_of(flow, scramble, scale=0.2):
    """Arrays away from those of the module, with gradients."""
    variables = flow.init(None)
    scramble(tree.leaves(variables["params"]), scale)
    return {**variables, "params": tree.map(lambda p: p.requires_grad_(), variables["params"])}


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_zuko(name, context, scramble):
    """Log densities, draws and their gradients in parameters and contexts, at other parameters than the module's own."""
    module = make(name, context)
    flow = from_zuko(module.eval())  # zuko's evaluation mode drops gradients, ours has none
    assert (flow.dim, flow.context_dim) == (3, context)
    variables = variables_of(flow, scramble)
    theirs = filled(module, variables).train()
    x, z, weights = numbers(0, 5, 3), 0.5 * numbers(1, 5, 3), numbers(2, 5)
    c = numbers(3, 5, context).requires_grad_() if context else None

    def with_gradients(value, named):
        inputs = [named[n] for n in sorted(named)] + ([] if c is None else [c])
        grads = torch.autograd.grad((value * weights).sum(), inputs, materialize_grads=True)
        return [value, *grads]

    own = {n.replace("/", "."): p for n, p in variables["params"]["bijection"].items()}
    of_zuko = dict(theirs.transform.named_parameters())
    for mine, reference in [
        (flow.log_prob(variables, x, c), theirs(c).log_prob(x)),
        (flow.push(variables, z, c).x.sin().sum(-1), theirs(c).transform.inv(z).sin().sum(-1)),
    ]:
        for a, b in zip(with_gradients(mine, own), with_gradients(reference, of_zuko), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_gradients_of_the_log_density(name, context, scramble):
    flow = from_zuko(make(name, context))
    variables = variables_of(flow, scramble)
    c = numbers(3, 5, context).requires_grad_() if context else None
    z = flow.bijection.inverse(bind(variables)["bijection"], numbers(1, 5, 3), c)[
        0
    ].detach()  # of points that zuko's searches find
    draw = flow.push(variables, z, c, with_score=True)
    x = draw.x.detach().requires_grad_()
    log_prob = flow.log_prob(variables, x, c)
    score, *score_context = torch.autograd.grad(log_prob.sum(), [x] if c is None else [x, c], retain_graph=True)
    tolerance = 1e-10 if name in CLOSED else 1e-3
    torch.testing.assert_close(draw.score, score, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(draw.log_prob, log_prob, rtol=tolerance, atol=tolerance)
    if context:
        torch.testing.assert_close(draw.score_context, *score_context, rtol=tolerance, atol=tolerance)
    assert not draw.score.requires_grad and draw.x.requires_grad


def test_under_vmap(scramble):
    """Parameters, points and contexts may be mapped, scores included."""
    flow = from_zuko(make("NSF"))
    variables = tree.map(lambda a: a.detach(), variables_of(flow, scramble))
    z, c = numbers(0, 4, 3), numbers(1, 4, 2)
    draw = flow.push(variables, z, c, with_score=True)
    for mapped in (
        torch.func.vmap(lambda z, c: flow.push(variables, z, c, with_score=True))(z, c),
        torch.func.vmap(lambda v, z, c: flow.push(v, z, c, with_score=True))(tree.stack([variables] * 4), z, c),
    ):
        for a, b in zip(mapped, draw, strict=True):
            torch.testing.assert_close(a, b)


def test_contexts_broadcast():
    flow = from_zuko(make("RealNVP"))
    q = FlowDistribution(flow, flow.init(None), numbers(0, 4, 2))
    assert q.batch_shape == (4,) and q.sample((5,)).shape == (5, 4, 3)
    assert q.log_prob(numbers(1, 5, 4, 3)).shape == (5, 4) and q.log_prob(numbers(1, 3)).shape == (4,)
    with pytest.raises(DimensionError, match="context"):
        FlowDistribution(flow, flow.init(None), numbers(0, 4, 3))


def test_init_copies_the_module():
    module = make("MAF")
    flow = from_zuko(module)
    assert flow == from_zuko(module) and hash(flow) == hash(from_zuko(module)) and flow != from_zuko(make("MAF"))
    before = copy.deepcopy(module.state_dict())
    variables = flow.init(None)
    for t in tree.leaves(variables["params"]):
        t.add_(1.0)
    for name, t in module.state_dict().items():
        torch.testing.assert_close(t, before[name])
    assert (
        all("." not in name for name in variables["params"]["bijection"]) and len(variables["const"]["bijection"]) == 6
    )


def test_what_requires_no_gradient_is_constant():
    module = make("MAF")
    next(module.parameters()).requires_grad_(False)
    variables = part_of(from_zuko(module).init(None), "bijection")
    assert len(variables["params"]) == 7 and len(variables["const"]) == 7


def test_dropout_is_off():
    class Noisy(zuko.lazy.LazyTransform):
        def __init__(self):
            super().__init__()
            self.shift, self.drop = nn.Parameter(torch.ones(3)), nn.Dropout(0.5)

        def forward(self, c=None):
            return zuko.transforms.AdditiveTransform(self.drop(self.shift))

    flow = from_zuko(zuko.lazy.Flow([Noisy()], make("MAF").base).train())
    z, log_det = flow.bijection.inverse(bind(flow.init(None))["bijection"], torch.zeros(5, 3))
    assert (z == 1.0).all() and (log_det == torch.zeros(5)).all()


# In Pyro


def model():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(loc, scale[..., None]).to_event(1), obs=torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize(("name", "gradient"), [("NSF", "reparam"), ("NSF", "path"), ("SOSPF", "path")])
def test_guide(name, gradient):
    guide = AutoFlow(model, flow=from_zuko(make(name, 0)), gradient=gradient)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 5.0
    assert guide.sample_posterior(sample_shape=(7,))["scale"].shape == (7,)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        values = {"loc": torch.zeros(2), "scale": torch.ones(())}
        torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))


def test_neutra():
    guide = AutoFlow(model, flow=from_zuko(make("NSF", 0))).setup()
    neutra = NeuTraReparam(guide).reparam(model)
    mcmc = MCMC(NUTS(neutra, max_tree_depth=2), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    (latent,) = mcmc.get_samples().values()
    assert latent.shape == (3, 3) and latent.isfinite().all()


def test_encoder_learns():
    """Gradients reach what computes the context, the same by zuko's own call."""
    module = make("NSF")
    flow = from_zuko(module)
    encoder = nn.Linear(1, 2)
    observed = numbers(0, 6, 1)

    def model():
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=observed[:, 0])

    def guide(gradient):
        pyro.module("encoder", encoder)
        with pyro.plate("rows", 6):
            pyro.sample("z", flow_module("q", flow, encoder(observed), gradient=gradient))

    for gradient in ("reparam", "path"):
        encoder.zero_grad()
        Trace_ELBO().loss_and_grads(model, lambda gradient=gradient: guide(gradient))
        assert encoder.weight.grad.abs().max() > 1e-3

    # Zuko's own call at the same draws.
    encoder.zero_grad()
    z = numbers(1, 6, 3)
    q = module(encoder(observed))
    by_zuko = torch.autograd.grad(q.log_prob(z).sum(), encoder.weight)
    ours = FlowDistribution(flow, flow.init(None), encoder(observed)).log_prob(z)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), encoder.weight), by_zuko)


@pytest.mark.parametrize("name", ["NSF", "SOSPF"])
def test_path_gradients_vanish_at_the_posterior(name):
    flow = from_zuko(make(name, 0))
    target = FlowDistribution(flow, flow.init(None))
    largest = {}
    for gradient in ("reparam", "path"):
        pyro.clear_param_store()
        guide = lambda gradient=gradient: pyro.sample("z", flow_module("q", flow, gradient=gradient))
        Trace_ELBO(num_particles=8).loss_and_grads(lambda: pyro.sample("z", target), guide)
        grads = [p.grad for _, p in pyro.get_param_store().named_parameters() if p.grad is not None]
        largest[gradient] = max(g.abs().max() for g in grads)
    assert largest["path"] < (1e-10 if name in CLOSED else 1e-4) and largest["reparam"] > 1e-2


@pytest.mark.parametrize("name", ["NSF", "SOSPF"])
def test_prior(name):
    """A trained flow as a prior: sampled by NUTS, approximated by a guide of Pyro's."""
    flow = from_zuko(make(name, 0))
    variables = flow.init(None)

    def model():
        x = pyro.sample("x", FlowDistribution(flow, variables))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0))

    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (3, 3)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step())) for _ in range(3))


def test_learnable_prior():
    """The arrays of flow_module are the only ones that train."""
    module = make("NSF", 0)
    flow = from_zuko(module)
    model = lambda: pyro.sample("x", flow_module("p", flow), obs=torch.tensor([0.5, 1.0, -0.5]))
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    torch.testing.assert_close(-module().log_prob(torch.tensor([0.5, 1.0, -0.5])).item(), losses[0])


def test_transform():
    flow = from_zuko(make("RealNVP", 0))
    variables = flow.init(None)
    transform = FlowTransform(flow.bijection, part_of(variables, "bijection"))
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [transform])
    x = numbers(0, 5, 3)
    torch.testing.assert_close(q.log_prob(x), FlowDistribution(flow, variables).log_prob(x))


# What cannot be


def test_no_file_holds_one(tmp_path):
    flow = from_zuko(make("NSF", 0))
    path = tmp_path / "q.flow"
    guide = AutoFlow(model, flow=flow).setup()
    for save in (lambda: save_flow(path, flow, flow.init(None)), lambda: guide.save(path)):
        with pytest.raises(FlowFileError, match=r"a flow from zuko cannot be written.*torch\.save"):
            save()
    assert not list(tmp_path.iterdir())


def test_no_file_names_one(monkeypatch, tmp_path):
    flow = from_zuko(make("NSF", 0))
    monkeypatch.setattr(files, "describe", lambda flow: {"type": "ZukoBijection", "transform": 1, "dim": 1})
    files.write(tmp_path / "q.flow", flow, flow.init(None), {})
    with pytest.raises(FlowFileError, match="ZukoBijection, which no flow file holds"):
        files.read(tmp_path / "q.flow")


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"expected a zuko\.flows\.Flow.* got GMM"):
        from_zuko(zuko.flows.GMM(3))
    with pytest.raises(UnsupportedFlowError, match="got BoxUniform"):
        from_zuko(zuko.flows.NCSF(3))
    module = make("MAF")
    module.base.loc.add_(1.0)
    with pytest.raises(UnsupportedFlowError, match="DiagNormal of zeros and ones"):
        from_zuko(module)
    logarithm = zuko.lazy.UnconditionalTransform(lambda: torch.distributions.transforms.ExpTransform().inv)
    with pytest.raises(UnsupportedFlowError, match="unbounded"):
        from_zuko(zuko.lazy.Flow([logarithm], make("MAF").base))
    with pytest.raises(UnsupportedFlowError, match="no context lets it map a vector of length 4"):
        from_zuko(zuko.lazy.Flow(make("MAF", 0).transform, make("MAF", dim=4).base))


def test_a_missing_zuko_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(MissingExtraError, match=r"flowppl\[zuko\]"):
        from_zuko(None)


def test_sites_stay_batched():
    """A density of a model with such a prior is evaluated in one batch, in a plate where torch.func cannot map it."""
    flow = from_zuko(make("SOSPF", 0))
    variables = flow.init(None)
    density = LogDensity(lambda: pyro.sample("x", FlowDistribution(flow, variables)))
    u = numbers(0, 5, 3)
    torch.testing.assert_close(density.log_prob(u), flow.log_prob(variables, u))
    with poutine.block():
        assert density.value_and_score(u)[1].shape == (5, 3)
