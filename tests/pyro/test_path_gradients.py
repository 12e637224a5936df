"""Path gradients in Pyro's losses: unbiased, of no variance at the posterior, absent where they would be wrong."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from scipy.stats import f

from flowppl import flows, tree
from flowppl.flows.affine_end import place
from flowppl.pyro import AutoFlow, FlowDistribution, flow_module

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Failed to verify mean field"),
]

SMALL = flows.nsf(layers=1, hidden=(4,), bins=3)
CONDITIONAL = flows.realnvp(layers=1, hidden=(4,))
ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO]


def gradient(elbo, model, guide, seed):
    """The flat gradient of one estimate of the loss, in every parameter of the store."""
    pyro.set_rng_seed(seed)
    params = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
    for p in params:
        p.grad = None
    elbo.loss_and_grads(model, guide)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])


def hierarchical_guide(gradient, learn_context=False):
    """A parent and three children in a plate, conditional on it; one more layer of children as one event."""

    def guide(**kwargs):
        a = pyro.sample("a", flow_module("qa", SMALL, dim=2, gradient=gradient))
        with pyro.plate("rows", 3):
            shift = torch.linspace(-1.0, 1.0, 3)
            shift = pyro.param("shift", shift) if learn_context else shift
            context = torch.stack([a.sum(-1) + shift, a.prod(-1) - shift], -1)
            b = pyro.sample("b", flow_module("qb", CONDITIONAL, context, dim=2, gradient=gradient))
        c_context = torch.cat([b, a.expand_as(b)], -1).unsqueeze(-3)
        pyro.sample("c", flow_module("qc", CONDITIONAL, c_context, dim=2, gradient=gradient).to_event(1))

    return guide


def gaussian_hierarchy(**kwargs):
    a = pyro.sample("a", dist.StudentT(5.0, torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3):
        b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
    pyro.sample("c", dist.Normal(b.sin().unsqueeze(-3), 0.7).to_event(2))


def initialise(guide, scramble, scale=0.2):
    guide()
    scramble([p for _, p in sorted(pyro.get_param_store().named_parameters())], scale)


@pytest.mark.parametrize("elbo", ELBOS)
def test_unbiased(elbo, scramble):
    """Hotelling's test that the difference to the total derivative has mean zero; one false alarm in a thousand."""
    path, plain = (hierarchical_guide(kind, learn_context=True) for kind in ("path", "reparam"))
    initialise(plain, scramble)
    loss, n, k = elbo(num_particles=50, vectorize_particles=True, max_plate_nesting=1), 40, 5
    pairs = [[gradient(loss, gaussian_hierarchy, guide, seed) for guide in (path, plain)] for seed in range(n)]
    differences = torch.stack([a - b for a, b in pairs])
    # A few directions: with as many as there are parameters it would see nothing. The floor is against rounding.
    projected = differences @ torch.randn(differences.shape[-1], k, generator=torch.Generator().manual_seed(1))
    covariance = torch.cov(projected.T) + 1e-10 * torch.eye(k)
    statistic = n * projected.mean(0) @ torch.linalg.solve(covariance, projected.mean(0))
    assert statistic * (n - k) / (k * (n - 1)) < f.isf(1e-3, k, n - k)
    assert differences.abs().max() > 1e-3  # the estimators are not the same


@pytest.mark.parametrize("particles", [{}, {"num_particles": 5, "vectorize_particles": True}])
@pytest.mark.parametrize("elbo", ELBOS)
def test_loss_is_the_plain_one(elbo, particles, scramble):
    initialise(hierarchical_guide("reparam"), scramble)
    losses = []
    for kind in ("path", "reparam"):
        pyro.set_rng_seed(1)
        losses.append(
            elbo(max_plate_nesting=1, **particles).loss_and_grads(gaussian_hierarchy, hierarchical_guide(kind))
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize(
    "loss",
    [
        RenyiELBO(alpha=0.3, num_particles=3, max_plate_nesting=1),
        RenyiELBO(alpha=0.0, num_particles=3, max_plate_nesting=1, vectorize_particles=True),
        ReweightedWakeSleep(num_particles=3, model_has_params=False, max_plate_nesting=1),
        ReweightedWakeSleep(num_particles=3, insomnia=0.5, model_has_params=False, max_plate_nesting=1),
    ],
)
def test_other_losses_keep_their_plain_gradient(loss, scramble):
    initialise(hierarchical_guide("reparam"), scramble)
    path, plain = (gradient(loss, gaussian_hierarchy, hierarchical_guide(kind), 3) for kind in ("path", "reparam"))
    assert plain.abs().max() > 1e-2
    assert torch.allclose(path, plain, rtol=1e-10, atol=1e-10)


class Frozen(Messenger):
    """Gives parameters the values that they have now, detached."""

    def __init__(self):
        super().__init__()
        self.values = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}

    def _pyro_param(self, msg):
        msg["value"], msg["done"] = self.values[msg["name"]], True


def planted(guide):
    """A model whose posterior is the guide as it is now."""
    return poutine.block(Frozen()(guide), hide_types=["param"])


def test_no_variance_at_the_posterior_of_a_hierarchy(scramble):
    """Planted non-affine flows with contexts and events: every gradient vanishes, and the plain one does not."""
    initialise(hierarchical_guide("reparam"), scramble)
    model = planted(hierarchical_guide("reparam"))
    for elbo in ELBOS:
        path, plain = (gradient(elbo(), model, hierarchical_guide(kind), 5) for kind in ("path", "reparam"))
        assert path.abs().max() < 1e-9 * plain.abs().max()
        assert plain.abs().max() > 0.1


def test_no_variance_with_particles(scramble):
    initialise(hierarchical_guide("reparam"), scramble)
    model = planted(hierarchical_guide("reparam"))
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert gradient(elbo, model, hierarchical_guide("path"), 5).abs().max() < 1e-9


@pytest.mark.parametrize("recipe", [flows.nsf(layers=2, hidden=(8,)), flows.realnvp(layers=2, hidden=(8,)), "planar"])
def test_no_variance_at_a_planted_flow(recipe, scramble):
    flow = flows.get(recipe)(3)

    def guide():
        pyro.sample("x", flow_module("q", flow, gradient="path"))

    initialise(guide, scramble)
    variables = tree.map(lambda p: p.detach().clone(), flow_module("q", flow).variables)
    model = lambda: pyro.sample("x", FlowDistribution(flow, variables))
    assert gradient(Trace_ELBO(), model, guide, 1).abs().max() < 1e-9


def linear_model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ DESIGN.T, 0.5).to_event(1), obs=torch.tensor([1.0, -1.0, 0.5, 0.0]))


DESIGN = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0], [2.0, 0.0, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("gradient_kind", ["path", "reparam"])
def test_no_variance_at_a_gaussian_posterior(gradient_kind):
    guide = AutoFlow(linear_model, "affine", gradient=gradient_kind).setup()
    precision = torch.eye(3) + DESIGN.T @ DESIGN / 0.25
    loc = torch.linalg.solve(precision, DESIGN.T @ torch.tensor([1.0, -1.0, 0.5, 0.0]) / 0.25)
    scale_tril = torch.linalg.cholesky(torch.linalg.inv(precision))
    guide._assign(place(guide._flow, guide._variables(), loc, scale_tril))
    guide()
    size = gradient(Trace_ELBO(), linear_model, guide, 2).abs().max()
    assert size < 1e-10 if gradient_kind == "path" else size > 0.1


def test_training_with_path_gradients_reaches_the_evidence():
    """With the exact posterior in reach, the loss becomes the negative log evidence for every draw."""
    guide = AutoFlow(linear_model, "affine", gradient="path")
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99})
    svi = SVI(
        linear_model, guide, optimizer, Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    )
    for _ in range(600):
        svi.step()
    covariance = DESIGN @ DESIGN.T + 0.25 * torch.eye(4)
    evidence = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    losses = torch.tensor([Trace_ELBO().loss(linear_model, guide) for _ in range(20)])
    assert torch.allclose(losses, -evidence, atol=1e-2)
