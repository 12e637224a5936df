"""FlowTransform and FlowDistribution: shapes, densities, and a memo that never lies."""

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch.distributions import biject_to, constraints

from flowppl import flows, tree
from flowppl.bijections import LULinear
from flowppl.errors import DimensionError
from flowppl.flows.flow import part_of
from flowppl.pyro import FlowDistribution, FlowTransform
from flowppl.pyro.bases import FlowBase

pytestmark = pytest.mark.usefixtures("float64")


def make(recipe, dim, context_dim=0, scramble=None):
    flow = recipe(dim, context_dim)
    variables = flow.init(None, torch.empty(0))
    if scramble is not None:
        scramble(tree.leaves(variables["params"]))
    tree.map(lambda p: p.requires_grad_(), variables["params"])
    return flow, variables


def gradients(value, variables):
    leaves = tree.leaves(variables["params"])
    return torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


SMALL = flows.nsf(layers=2, hidden=(8,), bins=4)


class Counting(LULinear):
    """Counts the passes."""

    def forward(self, *args, **kwargs):
        COUNTS["forward"] += 1
        return super().forward(*args, **kwargs)

    def inverse(self, *args, **kwargs):
        COUNTS["inverse"] += 1
        return super().inverse(*args, **kwargs)


COUNTS = {"forward": 0, "inverse": 0}


@pytest.fixture
def counted():
    COUNTS.update(forward=0, inverse=0)
    bijection = Counting(3)
    return bijection, bijection.init(torch.Generator())


# FlowTransform


def test_transform_agrees_with_autodiff_both_ways(scramble):
    flow, variables = make(SMALL, 3, scramble=scramble)
    transform = FlowTransform(flow.bijection, part_of(variables, "bijection"))
    x = torch.randn(5, 3)
    y = transform(x)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform, row) for row in x])
    expected = torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(transform.log_abs_det_jacobian(x, y), expected)
    assert torch.allclose(transform.inv(y), x, atol=1e-9)
    assert torch.allclose(transform.inv.log_abs_det_jacobian(y, x), -expected)


def test_transform_one_pass_for_call_and_jacobian(counted):
    transform = FlowTransform(*counted)
    x = torch.randn(4, 3)
    transform.log_abs_det_jacobian(x, transform(x))
    assert COUNTS == {"forward": 1, "inverse": 0}
    y = torch.randn(4, 3)
    transform.log_abs_det_jacobian(transform.inv(y), y)
    assert COUNTS == {"forward": 1, "inverse": 1}


def test_transform_memo_is_dropped(counted):
    transform = FlowTransform(*counted)
    x = torch.randn(4, 3)
    y = transform(x)
    for fresh in (
        pickle.loads(pickle.dumps(FlowTransform(LULinear(3), counted[1]))),
        copy.deepcopy(transform),
        transform.with_cache(1),
    ):
        assert fresh._memo._entry is None
    transform.clear_cache()
    COUNTS.update(forward=0)
    transform.log_abs_det_jacobian(x, y)
    assert COUNTS["forward"] == 1


@pytest.mark.parametrize("stale", ["parameters", "point", "other point", "gradients"])
def test_transform_memo_is_not_stale(stale):
    bijection = LULinear(2)
    variables = bijection.init(torch.Generator())
    tree.map(lambda p: p.requires_grad_(), variables["params"])
    transform = FlowTransform(bijection, variables)
    x = torch.randn(2)
    with torch.set_grad_enabled(stale != "gradients"):
        y = transform(x)
    if stale == "parameters":
        with torch.no_grad():
            variables["params"]["lu"].add_(torch.eye(2))
        assert transform.log_abs_det_jacobian(x, y).item() == pytest.approx(2.0)
    elif stale == "gradients":
        assert transform.log_abs_det_jacobian(x, y).requires_grad
    else:
        before = transform._memo._entry
        x = x.add_(1.0) if stale == "point" else x.clone()
        assert transform._memo.get(transform._key(x, y)) is None and before is not None


def test_transform_shapes_with_context():
    flow, variables = make(SMALL, 3, 2)
    transform = FlowTransform(flow.bijection, part_of(variables, "bijection"), torch.randn(4, 2))
    assert transform.forward_shape(torch.Size([5, 1, 3])) == (5, 4, 3)
    assert transform(torch.randn(5, 1, 3)).shape == (5, 4, 3)
    assert transform.event_dim == 1 and transform.domain.event_dim == 1 and transform.bijective
    with pytest.raises(DimensionError, match=r"\(\*batch, 3\), got \(5, 2\)"):
        transform(torch.randn(5, 2))


def test_transform_inside_a_torch_transformed_distribution(scramble):
    flow, variables = make(SMALL, 3, scramble=scramble)
    plain = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [FlowTransform(flow.bijection, part_of(variables, "bijection"))]
    )
    x = torch.randn(6, 3)
    assert torch.allclose(plain.log_prob(x), FlowDistribution(flow, variables).log_prob(x))


# FlowDistribution


def test_draw_and_score_agree_with_the_inverse(scramble):
    flow, variables = make(SMALL, 3, scramble=scramble)
    q = FlowDistribution(flow, variables)
    x = q.rsample((6, 2))
    assert x.shape == (6, 2, 3) and x.requires_grad
    assert torch.allclose(q.log_prob(x), q.log_prob(x.clone()), atol=1e-9)
    by_memo, by_inverse = (gradients(q.log_prob(v), variables) for v in (x, x.clone()))
    assert all(map(partial(torch.allclose, atol=1e-8), by_memo, by_inverse))


def test_scoring_the_draw_is_free_and_other_values_are_inverted(counted):
    flow = flows.Flow(counted[0])
    q = FlowDistribution(flow, flow.init(torch.Generator()))
    x = q()
    q.log_prob(x)
    assert COUNTS == {"forward": 1, "inverse": 0}
    q.log_prob(x.detach())
    assert COUNTS == {"forward": 1, "inverse": 1}


def test_log_prob_integrates_to_one(scramble):
    flow, variables = make(SMALL, 1, scramble=scramble)
    grid = torch.linspace(-30, 30, 100_001)  # the density has kinks: the rule's error is 8e-8
    with torch.no_grad():
        log_prob = FlowDistribution(flow, variables).log_prob(grid[:, None])
    assert torch.trapezoid(log_prob.exp(), grid).item() == pytest.approx(1.0, abs=1e-6)


def test_memo_of_a_draw_is_not_stale():
    flow, variables = make(flows.affine(), 2)
    q = FlowDistribution(flow, variables)
    x = q.rsample()
    with torch.no_grad():
        variables["params"]["bijection"]["bias"].add_(1.0)
    expected = dist.Normal(torch.ones(2), 1.0).log_prob(x).sum()
    assert torch.allclose(q.log_prob(x), expected)
    x = q.sample()
    assert not x.requires_grad and q.log_prob(x).requires_grad


def test_copies_start_without_a_memo():
    flow, variables = make(flows.affine(), 2)
    for gradient in ("reparam", "path"):
        q = FlowDistribution(flow, tree.map(lambda p: p.detach(), variables), gradient=gradient)
        x = q()
        for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.expand([1])):
            assert other._memo._entry is None and other.gradient == gradient
            assert torch.allclose(other.log_prob(x), q.log_prob(x))
        q.clear_cache()
        assert q._memo._entry is None


@pytest.mark.parametrize("context", [None, (), (4,), (3, 1)])
def test_shapes(context):
    flow, variables = make(SMALL, 2, 0 if context is None else 5)
    c = None if context is None else torch.randn(*context, 5)
    batch = context or ()
    q = FlowDistribution(flow, variables, c, gradient="path")
    assert q.batch_shape == batch and q.event_shape == (2,) and q.event_dim == 1
    assert q.sample((6,)).shape == (6, *batch, 2)
    assert q.log_prob(torch.zeros(2)).shape == batch
    wide = q.expand([7, 3, 4])
    x = wide.rsample((2,))
    assert x.shape == (2, 7, 3, 4, 2) and wide.log_prob(x).shape == (2, 7, 3, 4)
    assert len(torch.unique(x)) == x.numel()  # expanding copies the distribution, not the draw
    assert q.expand_by([6]).sample().shape == (6, *batch, 2)
    event = wide.to_event(2)
    x = event.rsample((2,))
    assert event.event_shape == (3, 4, 2) and event.log_prob(x).shape == (2, 7)
    assert [part.shape if torch.is_tensor(part) else part for part in event.score_parts(x)] == [(2, 7), 0, (2, 7)]
    assert torch.allclose(event.log_prob(x), wide.log_prob(x).sum((-1, -2)))


def test_to_event_composes_and_undoes():
    flow, variables = make(SMALL, 2)
    q = FlowDistribution(flow, variables, gradient="path").expand([3, 4])
    assert q.to_event(1).to_event(1).event_shape == q.to_event().event_shape == (3, 4, 2)
    assert type(q.to_event(1).to_event(-1)) is FlowDistribution and q.to_event(0) is q
    assert q.to_event(1).expand([6, 3]).shape() == (6, 3, 4, 2)
    with pytest.raises(ValueError, match="reinterpreted_batch_ndims is -1"):
        q.to_event(-1)


def has_path(q, variables):
    """Whether the entropy term of a draw has another gradient than the log density, and the same value."""
    parts = q.score_parts(q.rsample())
    assert torch.allclose(parts.log_prob, parts.entropy_term)
    plain, path = (gradients(v, variables) for v in (parts.log_prob, parts.entropy_term))
    return not all(map(torch.allclose, plain, path))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda q: q,
        lambda q: q.expand([3]),
        lambda q: q.expand([3]).to_event(1),
        lambda q: q.expand([4, 3]).to_event(1).expand([2, 4]).to_event(1),
        lambda q: q.expand([3]).mask(torch.tensor([True, False, True])),
        lambda q: q.expand([3]).mask(torch.tensor([True, False, True])).to_event(1),
        lambda q: q.expand([3]).to_event(1).mask(True).expand([2]),
    ],
)
def test_no_wrapper_loses_the_path(wrap, scramble):
    flow, variables = make(SMALL, 2, scramble=scramble)
    assert has_path(wrap(FlowDistribution(flow, variables, gradient="path")), variables)
    assert not has_path(wrap(FlowDistribution(flow, variables)), variables)


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_plates_scale_and_mask(gradient, scramble):
    flow, variables = make(SMALL, 2, scramble=scramble)

    def program():
        with (
            pyro.plate("rows", 4),
            poutine.scale(scale=3.0),
            poutine.mask(mask=torch.tensor([True, True, False, True])),
        ):
            return pyro.sample("x", FlowDistribution(flow, variables, gradient=gradient))

    trace = poutine.trace(program).get_trace()
    trace.compute_score_parts()
    site = trace.nodes["x"]
    expected = (
        3.0 * FlowDistribution(flow, variables).log_prob(site["value"].clone()) * torch.tensor([1.0, 1.0, 0.0, 1.0])
    )
    assert site["value"].shape == (4, 2)
    assert torch.allclose(site["log_prob"], expected)
    assert torch.allclose(site["score_parts"].entropy_term, expected)
    plain, entropy = (gradients(v, variables) for v in (site["log_prob"], site["score_parts"].entropy_term))
    assert all(map(torch.allclose, plain, entropy)) == (gradient == "reparam")


def test_has_rsample_can_be_turned_off():
    flow, variables = make(flows.affine(), 2)
    q = FlowDistribution(flow, variables, gradient="path").has_rsample_(False).expand([3])
    x = q()
    parts = q.score_parts(x)
    assert not x.requires_grad and parts.entropy_term == 0 and parts.score_function.requires_grad


def test_no_score_is_computed_without_gradients():
    flow, variables = make(SMALL, 2)
    q = FlowDistribution(flow, variables, gradient="path")
    with torch.no_grad():
        x = q()
        assert q._memo.get(q._key(x)).score is None
        assert torch.allclose(q.score_parts(x).entropy_term, q.log_prob(x))


def test_errors_say_what_to_do():
    flow, variables = make(SMALL, 2)
    with pytest.raises(ValueError, match="gradient must be one of reparam, path, auto, got 'stl'"):
        FlowDistribution(flow, variables, gradient="stl")
    with pytest.raises(DimensionError, match="expected none, since the flow takes none, got shape"):
        FlowDistribution(flow, variables, torch.zeros(4, 2))
    conditional, conditional_variables = make(SMALL, 2, 3)
    with pytest.raises(DimensionError, match=r"expected shape \(\*batch, 3\), got none"):
        FlowDistribution(conditional, conditional_variables)
    with pyro.validation_enabled(False), pytest.raises(DimensionError, match=r"shape \(\*batch, 2\), got \(4, 3\)"):
        FlowDistribution(flow, variables).log_prob(torch.zeros(4, 3))


def test_validation_follows_pyro():
    flow, variables = make(flows.affine(), 2)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="support"):
        FlowDistribution(flow, variables).log_prob(torch.tensor([math.nan, 0.0]))
    with pyro.validation_enabled(False):
        assert FlowDistribution(flow, variables).log_prob(torch.tensor([math.nan, 0.0])).isnan()


def test_support_is_all_real_vectors():
    q = FlowDistribution(*make(SMALL, 2))
    assert q.support.event_dim == 1 and not q.support.is_discrete
    assert biject_to(q.support)(torch.ones(2)).tolist() == [1.0, 1.0]
    assert q.support.check(torch.randn(5, 2)).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_follow_the_variables(dtype):
    flow = SMALL(3)
    variables = flow.init(None, torch.empty(0, dtype=dtype))
    q = FlowDistribution(flow, variables)
    assert q().dtype == q.log_prob(q()).dtype == q.base_dist.sample().dtype == dtype
    meta = FlowDistribution(flow, tree.map(lambda t: t.to("meta"), variables))
    x = meta.rsample((4,))
    assert x.device.type == "meta" and x.dtype == dtype and meta.log_prob(x).shape == (4,)


@pytest.mark.parametrize("base", [flows.Normal(), flows.StudentT(4.0)])
def test_base_distribution(base):
    flow = flows.affine(base=base)(2)
    d = FlowBase(flow, flow.init(torch.Generator())).expand([3])
    z = d.rsample((5,))
    coordinate = dist.Normal(0.0, 1.0) if isinstance(base, flows.Normal) else dist.StudentT(4.0, 0.0, 1.0)
    assert z.shape == (5, 3, 2) and d.log_prob(z[0, 0]).shape == (3,)
    assert torch.allclose(d.log_prob(z), coordinate.log_prob(z).sum(-1))
    assert d.support is constraints.real_vector and d.has_rsample


def test_nuts_over_a_flow_prior(scramble):
    flow, variables = make(flows.affine(), 2)
    with torch.no_grad():
        variables["params"]["bijection"]["bias"].add_(torch.tensor([1.0, -1.0]))
    variables = tree.map(lambda p: p.detach(), variables)

    def model():
        x = pyro.sample("x", FlowDistribution(flow, variables))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([3.0, 1.0]))

    mcmc = MCMC(NUTS(model), num_samples=150, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"]
    # The posterior is N((2, 0), 1/2): five standard errors at an effective sample size of 50.
    assert torch.allclose(draws.mean(0), torch.tensor([2.0, 0.0]), atol=5 * math.sqrt(0.5 / 50))
    assert torch.allclose(draws.var(0), torch.tensor(0.5), atol=0.4)


def test_a_mixture_of_flows_is_pyros_own():
    """One conditional flow, its contexts one-hot vectors: a batch of flows, which MixtureSameFamily mixes."""
    flow, variables = make(SMALL, 2, 3)
    weights, components = torch.tensor([0.2, 0.5, 0.3]), FlowDistribution(flow, variables, torch.eye(3))
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), components)
    x = mixture.sample((5,))
    expected = torch.logsumexp(weights.log() + components.log_prob(x[:, None]), -1)
    assert x.shape == (5, 2) and torch.allclose(mixture.log_prob(x), expected)
