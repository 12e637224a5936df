"""A learnable mixture of normals as a base, whose draws carry the exact derivative in the weights too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.flows.bases import Array, Base, Params


@dataclass(frozen=True)
class Mixture(Base):
    """A mixture of normals with diagonal covariances: weights, means and scales are learned.

    For posteriors with separate modes, which a flow of a single normal joins by bridges.

    A draw depends on the parameters through the inverse of the mixture's own conditional distribution functions, one
    coordinate after the other: F_i(z_i | z_1 ... z_{i-1}) stays what it is. So the derivative in the weights is a pathwise one
    as well, although a component is drawn. Figurnov, Mohamed & Mnih 2018, "Implicit reparameterization gradients",
    section 4; Graves 2016, "Stochastic backpropagation through mixture density distributions".

    Attributes:
        components: Number of normals.
        spread: Standard deviation of the means at the start; the scales start at one.
    """

    components: int = 8
    spread: float = 2.0

    def __post_init__(self) -> None:
        if self.components < 1 or not self.spread >= 0:
            raise ValueError(
                f"expected components >= 1 and spread >= 0, got components={self.components}, spread={self.spread}"
            )

    def init(self, rng: Any, dim: int) -> dict[str, Any]:
        """See `Base.init`."""
        backend = backend_of_rng(rng)
        loc = self.spread * backend.normal(rng, (self.components, dim))
        return {"params": {"loc": loc, "log_scale": 0 * loc, "logits": 0 * loc[:, 0]}, "const": {}}

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`."""
        backend = backend_of(params["loc"])
        xp = backend.xp
        component_key, key = backend.split(rng, 2)
        fixed = backend.stop(params)
        k = backend.categorical(component_key, fixed["logits"], shape[:-1])
        one_hot = xp.astype(k[..., None] == backend.asarray(list(range(self.components)), k), params["loc"].dtype)
        z = one_hot @ fixed["loc"] + (one_hot @ xp.exp(fixed["log_scale"])) * backend.normal(key, shape, params["loc"])
        return self.attach(params, z)

    def attach(self, params: Params, z: Array) -> Array:
        """See `Base.attach`: the derivative that holds every conditional distribution function at z fixed."""
        backend = backend_of(z)
        xp = backend.xp

        def coordinate(log_weights: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            z, loc, log_scale = row  # (*batch,), (components,), (components,)
            standard = (z[..., None] - loc) * xp.exp(-log_scale)
            # By the logarithm of the tail on the side of z, which keeps its digits where F is nearly zero or one.
            weights = backend.softmax(log_weights)
            above = xp.sum(weights * backend.erf(standard * math.sqrt(0.5)), axis=-1) > 0
            sign = backend.stop(xp.where(above, xp.full_like(z, -1.0), xp.ones_like(z)))
            log_tail = backend.logsumexp(log_weights + backend.log_ndtr(sign[..., None] * standard), axis=-1)
            log_pdf = backend.logsumexp(log_weights - 0.5 * standard * standard - log_scale, axis=-1)
            log_pdf = log_pdf - 0.5 * math.log(2 * math.pi)
            moved = log_tail - backend.logsumexp(log_weights, axis=-1)
            z = z - sign * backend.stop(xp.exp(log_tail - log_pdf)) * (moved - backend.stop(moved))
            standard = (z[..., None] - loc) * xp.exp(-log_scale)
            return log_weights - 0.5 * standard * standard - log_scale, z

        rows = xp.permute_dims(z, (z.ndim - 1, *range(z.ndim - 1))), params["loc"].T, params["log_scale"].T
        start = params["logits"] + xp.zeros_like(z[..., :1])
        z = backend.scan(coordinate, start, rows)[1]
        return xp.permute_dims(z, (*range(1, z.ndim), 0))

    def log_prob(self, params: Params, z: Array) -> Array:
        """See `Base.log_prob`."""
        backend = backend_of(z)
        xp = backend.xp
        log_scale = params["log_scale"]
        standard = (z[..., None, :] - params["loc"]) * xp.exp(-log_scale)
        log_weights = params["logits"] - backend.logsumexp(params["logits"], axis=-1)
        each = xp.sum(-0.5 * standard * standard - log_scale, axis=-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return backend.logsumexp(log_weights + each, axis=-1)
