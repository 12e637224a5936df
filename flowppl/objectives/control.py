"""How much of the plain gradient to mix with the path gradient: a control variate, whose coefficient is learnt on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowppl import tree
from flowppl.backend import Array, backend_of

REFRESH = 10  # steps between two looks at the estimators' covariance
_MEMORY = 0.9  # of its running means


class Control(NamedTuple):
    """Running means of <g_path, s> and <s, s>, with s the score term that the plain estimator has and the path one lacks.

    Geffner & Domke 2020, "Approximation based variance reduction for reparameterization gradients", mix estimators so.
    """

    cross: Array
    square: Array

    @property
    def coefficient(self) -> Array:
        """c of g_path + c s: zero is the path estimator, one the plain one, and this has the least variance between them."""
        xp = backend_of(self.square).xp
        known = self.square > 0
        return xp.clip(xp.where(known, -self.cross / xp.where(known, self.square, 1.0), 0.0), 0.0, 1.0)

    def updated(self, path: Any, score: Any) -> Control:
        """The control after one more pair of g_path and s, trees of arrays alike; itself if they are not finite."""
        pairs = list(zip(tree.leaves(path), tree.leaves(score), strict=True))
        xp = backend_of(self.square).xp
        seen = Control(sum(xp.sum(g * s) for g, s in pairs), sum(xp.sum(s * s) for _, s in pairs))
        fine = xp.isfinite(seen.cross) & xp.isfinite(seen.square)
        means = (_MEMORY * old + (1 - _MEMORY) * new for old, new in zip(self, seen, strict=True))
        return Control(*(xp.where(fine, mean, old) for mean, old in zip(means, self, strict=True)))


def no_control(like: Array) -> Control:
    """A control that has seen nothing: path gradients."""
    zero = backend_of(like).asarray(0.0, like)
    return Control(zero, zero)
