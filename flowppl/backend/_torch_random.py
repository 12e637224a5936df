"""Random numbers for torch: from a `torch.Generator`, or from the global one (None)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from flowppl.backend.protocol import Rng


def is_float(a: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of floats."""
    return isinstance(a, Tensor) and a.is_floating_point()


def rng(seed: int, like: Tensor | None = None) -> Rng:
    """A generator on the device of `like`."""
    return torch.Generator("cpu" if like is None else like.device).manual_seed(seed)


def split(rng: Rng, n: int = 2) -> Sequence[Rng]:
    """The same generator n times: it is its own state."""
    return [rng] * n


def normal(rng: Rng, shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Standard normal draws."""
    return _draw(torch.randn, rng, shape, like)


def uniform(rng: Rng, shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Uniform draws in [0, 1)."""
    return _draw(torch.rand, rng, shape, like)


def gamma(rng: Rng, concentration: Any, shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Gamma draws of unit rate, differentiable in the concentration, which broadcasts to `shape`."""
    like = concentration if like is None and isinstance(concentration, Tensor) else like
    like = torch.empty(()) if like is None else like
    a = torch.as_tensor(concentration, dtype=like.dtype, device=like.device).expand(shape)
    if rng is None or a.is_meta or rng.device == a.device:
        return torch._standard_gamma(a, generator=rng)
    return torch._standard_gamma(a.to(rng.device), generator=rng).to(a.device)


def categorical(rng: Rng, logits: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Indices of shape `shape + logits.shape[:-1]`, with probabilities softmax(logits)."""
    u = uniform(rng, (*shape, *logits.shape), like=logits)
    return torch.argmax(logits - torch.log(-torch.log(u)), -1)  # u = 0 gives noise -inf, which never wins


def bernoulli(rng: Rng, p: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Booleans, true with probability p, which broadcasts to `shape` (None: p's own)."""
    p = torch.as_tensor(p)
    return uniform(rng, tuple(p.shape) if shape is None else shape, like=p) < p


def permutation(rng: Rng, n: int) -> Tensor:
    """A random order of range(n)."""
    return torch.randperm(n, generator=rng, device=None if rng is None else rng.device)


def _draw(sampler: Callable, rng: Rng, shape: tuple[int, ...], like: Tensor | None) -> Tensor:
    """A draw on the generator's device, moved to that of `like`; dtype of `like` if that is a float's."""
    dtype = like.dtype if is_float(like) else None
    device = torch.get_default_device() if like is None else like.device
    at = device if rng is None else rng.device
    return sampler(shape, generator=rng, dtype=dtype, device=at).to(device)
