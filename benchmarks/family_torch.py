"""The torch side of `family`: flowppl, zuko, normflows, nflows and Pyro, eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.family import BATCH, BINS, BOUND, DIM, HIDDEN, LAYERS, SIMPLE_LAYERS, Row, points
from benchmarks.parameters import drawn
from flowppl import tree

Steps = dict[str, Callable[[], Any]]
torch.set_num_threads(1)
_HALF = DIM // 2


def _steps(
    log_prob: Callable[[Tensor], Tensor], sample: Callable[[], tuple[Tensor, Tensor]], params: Sequence[Tensor]
) -> Steps:
    """Both tasks, from a log density and a sampler of (x, log q(x)); a parameter may have no part in a task."""
    x = torch.as_tensor(points())

    def density() -> Any:
        return torch.autograd.grad(-log_prob(x).mean(), params, allow_unused=True)

    def draw() -> Any:
        x, log_q = sample()
        return torch.autograd.grad((log_q + 0.5 * (x * x).sum(-1)).mean(), params, allow_unused=True)

    return {"density": density, "draw": draw}


def flowppl(row: Row) -> Steps:
    flow = row.ours
    variables = flow.init(torch.Generator().manual_seed(0))
    params = tree.map(lambda a: torch.as_tensor(a).clone().requires_grad_(), drawn(flow.bijection, 0, row.scale))
    variables = {**variables, "params": {**variables["params"], "bijection": params}}

    def sample() -> tuple[Tensor, Tensor]:
        draws = flow.sample(None, variables, (BATCH,), with_log_prob=True)
        return draws.x, draws.log_prob

    return _steps(lambda x: flow.log_prob(variables, x), sample, tree.leaves(params))


def _zuko(name: str, **options: Any) -> Callable[[], Steps]:
    def make() -> Steps:
        import zuko

        flow = getattr(zuko.flows, name)(DIM, 0, transforms=LAYERS, hidden_features=HIDDEN, **options)
        return _steps(
            lambda x: flow().log_prob(x), lambda: flow().rsample_and_log_prob((BATCH,)), list(flow.parameters())
        )

    return make


def _normflows(layers: Callable[[Any], list[nn.Module]], circular: bool = False) -> Callable[[], Steps]:
    def make() -> Steps:
        import normflows as nf

        base = nf.distributions.UniformGaussian(DIM, list(range(DIM)), torch.full((DIM,), 2 * math.pi))
        flow = nf.NormalizingFlow(base if circular else nf.distributions.DiagGaussian(DIM, trainable=False), layers(nf))
        return _steps(flow.log_prob, lambda: flow.sample(BATCH), list(flow.parameters()))

    return make


def _realnvp(nf: Any) -> list[nn.Module]:
    def layer() -> list[nn.Module]:
        network = nf.nets.MLP([_HALF, *HIDDEN, DIM], init_zeros=False)
        return [nf.flows.AffineCouplingBlock(network), nf.flows.Permute(DIM, mode="swap")]

    return [part for _ in range(LAYERS) for part in layer()]


def _torus(nf: Any) -> list[nn.Module]:
    make = nf.flows.CircularCoupledRationalQuadraticSpline  # a residual block has two hidden layers
    options = {"num_bins": BINS, "tail_bound": math.pi, "init_identity": False}
    return [make(DIM, 1, HIDDEN[0], list(range(DIM)), reverse_mask=bool(i % 2), **options) for i in range(LAYERS)]


def _residual(nf: Any) -> list[nn.Module]:
    """With normflows' unbiased estimate of the log-determinant; its exact one is for two dimensions."""
    channels = [DIM, *HIDDEN, DIM]
    return [nf.flows.Residual(nf.nets.LipschitzMLP(channels, 0.9, init_zeros=False)) for _ in range(LAYERS)]


def _nflows(transforms: Callable[[Any], list[nn.Module]]) -> Callable[[], Steps]:
    def make() -> Steps:
        from nflows import transforms as t
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow

        flow = Flow(t.CompositeTransform(transforms(t)), StandardNormal([DIM]))
        return _steps(flow.log_prob, lambda: flow.sample_and_log_prob(BATCH), list(flow.parameters()))

    return make


def _nflows_coupling(t: Any) -> list[nn.Module]:
    from nflows.nn.nets import MLP

    mask = [0] * _HALF + [1] * (DIM - _HALF)

    class Network(MLP):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return super().forward(x)

    def layer() -> nn.Module:
        return t.PiecewiseRationalQuadraticCouplingTransform(
            torch.tensor(mask), lambda n, m: Network([n], [m], HIDDEN), BINS, "linear", BOUND
        )

    return [part for _ in range(LAYERS) for part in (layer(), t.ReversePermutation(DIM))]


def _nflows_maf(t: Any) -> list[nn.Module]:
    def layer() -> nn.Module:  # a block without residuals is a second hidden layer
        return t.MaskedAffineAutoregressiveTransform(DIM, HIDDEN[0], num_blocks=1, use_residual_blocks=False)

    return [part for _ in range(LAYERS) for part in (t.ReversePermutation(DIM), layer())]


def _pyro(name: str, depth: int, **options: Any) -> Callable[[], Steps]:
    def make() -> Steps:
        import pyro.distributions as dist
        from pyro.distributions import transforms

        layers: list[Any] = []
        for _ in range(depth):
            layers.append(getattr(transforms, name)(DIM, **options))
            if "autoregressive" in name:
                layers.append(transforms.Permute(torch.arange(DIM - 1, -1, -1)))
        base = dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)
        flow = dist.TransformedDistribution(base, layers)

        def log_prob(x: Tensor) -> Tensor:
            flow.clear_cache()
            return flow.log_prob(x)

        def sample() -> tuple[Tensor, Tensor]:
            x = flow.rsample((BATCH,))
            return x, flow.log_prob(x)

        return _steps(log_prob, sample, [p for t in layers if isinstance(t, nn.Module) for p in t.parameters()])

    return make


PEERS: dict[tuple[str, str], Callable[[], Steps]] = {
    ("zuko", "spline autoregressive"): _zuko("NSF", bins=BINS),
    ("zuko", "spline coupling"): _zuko("NSF", bins=BINS, passes=2),
    ("zuko", "affine autoregressive (MAF)"): _zuko("MAF"),
    ("zuko", "deep sigmoid autoregressive (NAF)"): _zuko("NAF"),
    ("zuko", "sum of squares autoregressive"): _zuko("SOSPF"),
    ("normflows", "affine coupling (RealNVP)"): _normflows(_realnvp),
    ("normflows", "circular spline coupling"): _normflows(_torus, circular=True),
    ("normflows", "residual"): _normflows(_residual),
    ("normflows", "planar"): _normflows(lambda nf: [nf.flows.Planar((DIM,)) for _ in range(SIMPLE_LAYERS)]),
    ("normflows", "radial"): _normflows(lambda nf: [nf.flows.Radial((DIM,)) for _ in range(SIMPLE_LAYERS)]),
    ("nflows", "spline coupling"): _nflows(_nflows_coupling),
    ("nflows", "affine autoregressive (MAF)"): _nflows(_nflows_maf),
    ("nflows", "LU-factorised linear"): _nflows(
        lambda t: [t.LULinear(DIM, identity_init=False) for _ in range(LAYERS)]
    ),
    ("pyro", "affine autoregressive (IAF)"): _pyro("affine_autoregressive", LAYERS, hidden_dims=list(HIDDEN)),
    ("pyro", "block autoregressive (BNAF)"): _pyro("block_autoregressive", 2, hidden_factors=[8, 8]),
    ("pyro", "planar"): _pyro("planar", SIMPLE_LAYERS),
    ("pyro", "radial"): _pyro("radial", SIMPLE_LAYERS),
    ("pyro", "Sylvester"): _pyro("sylvester", SIMPLE_LAYERS),
}
