"""Special functions and activations of torch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

erf, ndtri, lgamma, digamma = torch.erf, torch.special.ndtri, torch.lgamma, torch.digamma
silu, gelu = F.silu, F.gelu


def relu(x: Tensor) -> Tensor:
    """The positive part; compiled, without the mask of booleans that the compiler would store at several times the cost."""
    return _Relu.apply(x) if torch.compiler.is_compiling() else torch.relu(x)


class _Relu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.sign(ctx.saved_tensors[0])


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Softmax along an axis."""
    return torch.softmax(x, axis)


def logsumexp(x: Tensor, axis: int = -1) -> Tensor:
    """Log of the sum of exponentials along an axis, which is dropped."""
    return torch.logsumexp(x, axis)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return F.softplus(x, threshold=40.0)  # the default, 20, is off by 2e-9: too much for float64


def log_i0(x: Tensor) -> Tensor:
    """Log of the modified Bessel function I0; finite for any finite x."""
    return torch.log(torch.special.i0e(x)) + torch.abs(x)


def log_ndtr(x: Tensor) -> Tensor:
    """Log of the normal distribution function; torch's own has no rule for vmap."""
    t = x * math.sqrt(0.5)
    low, high = t.clamp(max=0), t.clamp(min=0)
    below = torch.log(0.5 * torch.special.erfcx(-low)) - low * low
    return torch.where(t < 0, below, torch.log1p(-0.5 * torch.erfc(high)))
