"""A memory of one call, which cannot go stale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Memo:
    """The result of the last call, found again only for the very same tensors, unmodified since.

    A result computed without gradients is not found where gradients are on. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._entry: tuple | None = None

    def put(self, tensors: tuple[Tensor, ...], result: Any) -> None:
        """Remembers `result` for `tensors`, and forgets what was there."""
        self._entry = (tensors, _stamps(tensors), torch.is_grad_enabled(), result)

    def get(self, tensors: tuple[Tensor, ...]) -> Any:
        """The result for `tensors`, or None."""
        if self._entry is None:
            return None
        known, stamps, with_grad, result = self._entry
        if len(known) != len(tensors) or any(a is not b for a, b in zip(known, tensors, strict=True)):
            return None
        if stamps != _stamps(tensors) or (torch.is_grad_enabled() and not with_grad):
            return None
        return result

    def clear(self) -> None:
        """Forgets."""
        self._entry = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}


def _stamps(tensors: tuple[Tensor, ...]) -> list[tuple[int, bool]]:
    """What changes when an optimizer steps, or a user writes in place or asks for gradients."""
    return [(0 if t.is_inference() else t._version, t.requires_grad) for t in tensors]
