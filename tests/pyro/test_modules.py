"""flow_module and FlowParameters: one flow per name, drawn once, in the param store or in a module."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from flowppl import flows, tree
from flowppl.bijections import Chain, LULinear, Permutation
from flowppl.bijections.base import Bijection
from flowppl.errors import DimensionError, UnknownFlowError
from flowppl.pyro import flow_module
from flowppl.pyro.modules import FlowParameters

SMALL = flows.nsf(layers=2, hidden=(8,), bins=4)
SHUFFLED = flows.Flow(
    Chain((LULinear(6), Permutation(6), LULinear(6)))
)  # draws a permutation: a constant that is random


def test_same_name_same_arrays_and_no_more_random_numbers():
    first = flow_module("q", SHUFFLED)
    state = torch.get_rng_state()
    second = flow_module("q", SHUFFLED)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 6)
    assert torch.equal(first.log_prob(x), second.log_prob(x))
    for a, b in zip(tree.leaves(first.variables), tree.leaves(second.variables), strict=True):
        assert torch.equal(a, b)
    assert first.variables["const"]["bijection"][1]["indices"].dtype == torch.int64


def test_pyro_seed_decides():
    def draw(seed):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        return [p.detach() for p in tree.leaves(flow_module("q", SMALL, dim=3).variables)]

    assert all(map(torch.equal, draw(1), draw(1)))
    assert not all(map(torch.equal, draw(1), draw(2)))


def test_param_store_saves_it_whole(tmp_path):
    x = torch.randn(4, 6)
    expected = flow_module("q", SHUFFLED).log_prob(x)
    permutation = flow_module("q", SHUFFLED).variables["const"]["bijection"][1]["indices"]
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    flow_module("q", SHUFFLED)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    assert torch.equal(flow_module("q", SHUFFLED).log_prob(x), expected)
    assert torch.equal(flow_module("q", SHUFFLED).variables["const"]["bijection"][1]["indices"], permutation)


def test_trains_in_model_and_guide():
    """A flow prior in the model learns the data's distribution, N(3, 0.5); constants stay."""
    data = 3.0 + 0.5 * torch.randn(500, 6)

    def model():
        with pyro.plate("data", 500):
            pyro.sample("x", flow_module("p", SHUFFLED), obs=data)

    permutation = flow_module("p", SHUFFLED).variables["const"]["bijection"][1]["indices"]
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    best = dist.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0)).log_prob(data).mean()
    flow = flow_module("p", SHUFFLED)
    assert flow.log_prob(data).mean() > best - 0.01
    assert torch.equal(flow.variables["const"]["bijection"][1]["indices"], permutation)


def test_context_batches_and_dtype():
    context = torch.randn(4, 2, dtype=torch.float64)
    q = flow_module("q", "realnvp", context, dim=3, gradient="path")
    assert q.batch_shape == (4,) and q.gradient == "path" and q().dtype == torch.float64


def test_module_local_params():
    class Guide(pyro.nn.PyroModule):
        def forward(self):
            return pyro.sample("x", flow_module("q", "affine", dim=2))

    with pyro.settings.context(module_local_params=True, validate_poutine=False):
        guide = Guide()
        guide()
        assert "q$$$params/bijection/lu" not in pyro.get_param_store()


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match="dim: expected the length"):
        flow_module("q", "nsf")
    with pytest.raises(UnknownFlowError, match="did you mean 'nsf'"):
        flow_module("q", "nfs", dim=2)
    with pytest.raises(DimensionError, match="got a flow with dim=6"):
        flow_module("q", SHUFFLED, dim=3)
    flow_module("q", "affine", dim=2)
    with pytest.raises(DimensionError, match=r"another name, or call pyro.clear_param_store"):
        flow_module("q", "affine", dim=3)
    with pytest.raises(DimensionError, match="expected dim=6 and context_dim=1"):
        flow_module("r", SHUFFLED, torch.zeros(4, 1))


def test_parameters_and_buffers():
    holder = FlowParameters(SHUFFLED.init(None, torch.empty(0)))
    assert all(p.requires_grad and p.is_leaf for p in holder.parameters())
    assert [name for name, _ in holder.named_buffers()] == ["const/bijection/1/indices"]
    assert holder.to(torch.float64).variables["params"]["bijection"][0]["lu"].dtype == torch.float64
    assert holder.variables["const"]["bijection"][1]["indices"].dtype == torch.int64
    assert holder.to("meta").variables["params"]["bijection"][0]["lu"].device.type == "meta"


def test_state_dict_round_trip(scramble):
    holder, other = (FlowParameters(SHUFFLED.init(None, torch.empty(0))) for _ in range(2))
    scramble(holder.parameters())
    other.load_state_dict(holder.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(SHUFFLED.log_prob(holder.variables, x), SHUFFLED.log_prob(other.variables, x))


def test_holder_does_not_share_memory_with_what_it_was_given():
    variables = SHUFFLED.init(None, torch.empty(0))
    before = variables["params"]["bijection"][0]["lu"].clone()
    holder = FlowParameters(variables)
    with torch.no_grad():
        holder.variables["params"]["bijection"][0]["lu"].add_(1.0)
    assert torch.equal(variables["params"]["bijection"][0]["lu"], before)


@dataclass(frozen=True)
class AwkwardNames(Bijection):
    """Names that torch modules use for themselves."""

    dim: int
    context_dim: int = 0

    def init(self, rng):
        return {
            "params": {"type": torch.zeros(self.dim), "train": torch.ones(self.dim)},
            "const": {"half": torch.ones(2)},
        }

    def forward(self, params, x, context=None):
        return x + params["type"], torch.zeros(x.shape[:-1])

    def inverse(self, params, y, context=None):
        return y - params["type"], torch.zeros(y.shape[:-1])


def test_any_names_will_do():
    holder = FlowParameters(AwkwardNames(2).init(None))
    assert set(holder.variables["params"]) == {"type", "train"} and not holder.variables["const"]["half"].requires_grad
    assert flow_module("q", flows.Flow(AwkwardNames(2)))().shape == (2,)
