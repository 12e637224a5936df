"""The torch programs: flowppl, zuko and the bare conditioners, eager; and one coupling layer, compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import BATCH, BINS, BOUND, DIM, HIDDEN, KEPT, LAYERS, OUTPUTS, Step, points, spline_couplings


def _energy(x: Tensor) -> Tensor:
    return 0.5 * (x * x).sum(-1)


def _step(loss: Callable[[], Tensor], params: Sequence[Tensor], task: str) -> Step:
    """A step, and the gradient with it unless the task is to sample without."""

    def value() -> Tensor:
        with torch.no_grad():
            return loss()

    def gradient() -> Any:
        return torch.autograd.grad(loss(), params)

    return Step(value if task == "sample" else gradient, sum(p.numel() for p in params))


def flowppl(task: str, layers: int = LAYERS) -> Step:
    from flowppl import tree
    from flowppl.objectives import path_log_prob

    flow = spline_couplings(layers)
    variables = flow.init(torch.Generator().manual_seed(0))
    params = tree.map(_shaken, variables["params"])
    variables = {**variables, "params": params}
    x = torch.as_tensor(points())

    def nll() -> Tensor:
        return -flow.log_prob(variables, x).mean()

    def sample() -> Tensor:
        draws = flow.sample(None, variables, (BATCH,), with_log_prob=True)
        return (draws.log_prob + _energy(draws.x)).mean()

    def path() -> Tensor:
        draws = flow.sample(None, variables, (BATCH,), with_score=True)
        return (path_log_prob(draws) + _energy(draws.x)).mean()

    losses = {"nll": nll, "path": path}
    return _step(losses.get(task, sample), tree.leaves(params), task)


def zuko(task: str, layers: int = LAYERS) -> Step:
    from zuko.flows import NSF

    flow = NSF(DIM, 0, bins=BINS, transforms=layers, hidden_features=HIDDEN, passes=2)
    x = torch.as_tensor(points())

    def nll() -> Tensor:
        return -flow().log_prob(x).mean()

    def sample() -> Tensor:
        x, log_prob = flow().rsample_and_log_prob((BATCH,))
        return (log_prob + _energy(x)).mean()

    return _step(nll if task == "nll" else sample, list(flow.parameters()), task)


def conditioner(task: str, layers: int = LAYERS) -> Step:
    """The networks alone, forward and (unless the task is to sample without a gradient) backward to weights and inputs."""
    layers = 1 if task == "layer" else layers
    networks = [_network() for _ in range(layers)]
    weights = [p for network in networks for p in network.parameters()]
    inputs = [torch.as_tensor(points((BATCH, KEPT))).requires_grad_() for _ in networks]
    cotangents = [torch.as_tensor(points((BATCH, OUTPUTS))) for _ in networks]
    apply = torch.compile(lambda x: networks[0](x)) if task == "layer" else None

    def forward() -> list[Tensor]:
        return [(apply or network)(x) for network, x in zip(networks, inputs, strict=True)]

    def both() -> Any:
        return torch.autograd.grad(forward(), weights + inputs, cotangents)

    def without_gradient() -> Any:
        with torch.no_grad():
            return forward()

    return Step(without_gradient if task == "sample" else both, sum(p.numel() for p in weights))


def coupling(task: str, layers: int = 1) -> Step:
    """One coupling layer with its log-determinant, compiled, forward and backward to weights and inputs."""
    from flowppl import tree
    from flowppl.bijections import Coupling, RQSpline

    layer = Coupling(DIM, RQSpline(BINS, BOUND), hidden=HIDDEN, activation="relu")
    params = tree.map(_shaken, layer.init(torch.Generator().manual_seed(0))["params"])
    x = torch.as_tensor(points()).requires_grad_()
    cotangents = [torch.as_tensor(points()), torch.as_tensor(points((BATCH,)))]
    forward = torch.compile(layer.forward)
    leaves = tree.leaves(params)
    return Step(
        lambda: torch.autograd.grad(forward(params, x), [*leaves, x], cotangents), sum(p.numel() for p in leaves)
    )


def _network() -> nn.Module:
    widths = (KEPT, *HIDDEN, OUTPUTS)
    parts: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        parts += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _shaken(p: Tensor) -> Tensor:
    """Moves the flow away from the identity, where it starts."""
    return (p + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()


PROGRAMS = {"flowppl-torch": flowppl, "zuko": zuko, "conditioner-torch": conditioner, "coupling-torch": coupling}
