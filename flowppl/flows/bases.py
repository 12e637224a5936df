"""Base densities of vectors with independent coordinates: normal, Student-t, uniform, and mixes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl import tree
from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.affine import soft_clip
from flowppl.config import Configured
from flowppl.errors import DimensionError

Array = Any
Params = Any


class Base(Configured):
    """A density of vectors, with arrays of its own where it learns.

    A new base implements `sample` and `log_prob`; `init` where it has arrays, and `score` where it knows it in closed form, and
    `attach` where it has arrays and knows how a draw moves with them.
    """

    def init(self, rng: Any, dim: int) -> dict[str, Any]:
        """Draws `{"params": ..., "const": ...}` for vectors of length `dim`; by default there is nothing to draw."""
        return {"params": {}, "const": {}}

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """Draws an array of this shape, the last axis being the vector; attached to the parameters."""
        raise NotImplementedError

    def log_prob(self, params: Params, z: Array) -> Array:
        """Log density of z `(*batch, dim)`, `(*batch,)`."""
        raise NotImplementedError

    def score(self, params: Params, z: Array) -> Array:
        """d log density / dz; by default by a pullback."""
        backend = backend_of(z)
        log_prob, pull = backend.vjp(lambda z: self.log_prob(params, z), z, once=True)
        return pull(backend.xp.ones_like(log_prob))[0]

    def attach(self, params: Params, z: Array) -> Array | None:
        """z `(*batch, dim)` itself, with the derivative in the parameters of a draw that comes out at z.

        That is any field u = dz / d params which carries the density along: d density / d params = -div(density u).

        Returns:
            z, or None where the base has arrays and does not know how draws depend on them, which is the default.
        """
        return None if tree.leaves(params) else z


@dataclass(frozen=True)
class Normal(Base):
    """Standard normal coordinates."""

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`."""
        return backend_of_rng(rng).normal(rng, shape, like)

    def log_prob(self, params: Params, z: Array) -> Array:
        """See `Base.log_prob`."""
        return -0.5 * backend_of(z).xp.sum(z * z, axis=-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def score(self, params: Params, z: Array) -> Array:
        """See `Base.score`."""
        return -z


@dataclass(frozen=True)
class StudentT(Base):
    """Student-t coordinates of unit scale, for tails heavier than a normal flow can give.

    A flow whose maps are affine far out keeps the tails of its base, so these are the posterior's: with `trainable`, each
    coordinate learns its own. Jaini et al. 2020, "Tails of Lipschitz triangular flows"; Laszkiewicz et al. 2022, "Marginal
    tail-adaptive normalizing flows".

    Attributes:
        df: Degrees of freedom, or where they start.
        trainable: Whether each coordinate learns its degrees of freedom, within a factor of ten of `df`.
    """

    df: float = 5.0
    trainable: bool = False

    def __post_init__(self) -> None:
        if not self.df > 0:
            raise ValueError(f"df must be positive, got {self.df}")

    def init(self, rng: Any, dim: int) -> dict[str, Any]:
        """See `Base.init`: one number for each coordinate that learns."""
        params = {"log_df": backend_of_rng(rng).xp.zeros((dim,))} if self.trainable else {}
        return {"params": params, "const": {}}

    def degrees_of_freedom(self, params: Params) -> Any:
        """One number, or one for each coordinate `(dim,)`."""
        if not self.trainable:
            return self.df
        return self.df * backend_of(params["log_df"]).xp.exp(soft_clip(params["log_df"], math.log(10)))

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`: the polar method, exact and without rejection. Bailey 1994, equation 2."""
        backend = backend_of_rng(rng)
        xp = backend.xp
        radius_key, angle_key = backend.split(rng, 2)
        df = self.degrees_of_freedom(params)
        log_u = xp.log1p(-backend.uniform(radius_key, shape, like))  # of a uniform number in (0, 1]
        if self.trainable:  # at u = 1 the root has no slope in df, and its derivative would be 0 * inf
            log_u = xp.minimum(log_u, xp.full_like(log_u, -float(xp.finfo(log_u.dtype).tiny)))
        angle = 2 * math.pi * backend.uniform(angle_key, shape, like)
        return xp.sqrt(df * xp.expm1(log_u * (-2 / df))) * xp.cos(angle)

    def log_prob(self, params: Params, z: Array) -> Array:
        """See `Base.log_prob`."""
        backend = backend_of(z)
        xp, df = backend.xp, self.degrees_of_freedom(params)
        if self.trainable:
            normaliser = backend.lgamma((df + 1) / 2) - backend.lgamma(df / 2) - 0.5 * xp.log(df * math.pi)
        else:
            normaliser = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        return xp.sum(normaliser - 0.5 * (df + 1) * xp.log1p(z * z / df), axis=-1)

    def score(self, params: Params, z: Array) -> Array:
        """See `Base.score`."""
        df = self.degrees_of_freedom(params)
        return -(df + 1) * z / (df + z * z)

    def attach(self, params: Params, z: Array) -> Array:
        """See `Base.attach`: the derivative of the draw of `sample`, averaged over the angles that give z.

        With y the other coordinate of the polar method, w = (z^2 + y^2) / df and u the uniform number, 1 + w = u^(-2 / df), so that
        dz / d df = z (1 - (1 + w) log(1 + w) / w) / (2 df). And y sqrt((df + 1) / (df + z^2)) is Student-t with df + 1 degrees.
        """
        if not self.trainable:
            return z
        backend = backend_of(z)
        xp, df = backend.xp, self.degrees_of_freedom(params)
        fixed = backend.stop(df)[..., None]
        # The trapezoid rule in arsinh of the Student-t number, even in it: exact to 1e-9.
        s = backend.asarray([0.25 * i for i in range(97)], z)
        square = xp.sinh(s) ** 2 / (fixed + 1)
        log_weight = xp.log(xp.cosh(s)) - 0.5 * (fixed + 2) * xp.log1p(square)
        weight = xp.where(s > 0, 1.0, 0.5) * xp.exp(log_weight - xp.max(log_weight, axis=-1, keepdims=True))
        ratio = (z * z)[..., None] / fixed
        w = xp.clip(ratio + (1 + ratio) * square, float(xp.finfo(z.dtype).tiny), None)
        mean = xp.sum(weight * (1 + w) * xp.log1p(w) / w, axis=-1) / xp.sum(weight, axis=-1)
        return z + backend.stop(z * (1 - mean) / (2 * fixed[..., 0])) * (df - backend.stop(df))


@dataclass(frozen=True)
class Uniform(Base):
    """Uniform coordinates between two numbers; outside, the log density is -inf.

    Attributes:
        low: The lower end.
        high: The upper end.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`."""
        return self.low + (self.high - self.low) * backend_of_rng(rng).uniform(rng, shape, like)

    def log_prob(self, params: Params, z: Array) -> Array:
        """See `Base.log_prob`."""
        xp = backend_of(z).xp
        inside = xp.all((z >= self.low) & (z <= self.high), axis=-1)
        level = xp.zeros_like(z[..., 0]) - z.shape[-1] * math.log(self.high - self.low)
        return xp.where(inside, level, xp.full_like(level, -math.inf))

    def score(self, params: Params, z: Array) -> Array:
        """See `Base.score`."""
        return 0 * z


@dataclass(frozen=True)
class CircularUniform(Base):
    """Uniform angles: drawn in [-pi, pi), and the same density at every representative of an angle."""

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`."""
        return math.pi * (2 * backend_of_rng(rng).uniform(rng, shape, like) - 1)

    def log_prob(self, params: Params, z: Array) -> Array:
        """See `Base.log_prob`."""
        return backend_of(z).xp.zeros_like(z[..., 0]) - z.shape[-1] * math.log(2 * math.pi)

    def score(self, params: Params, z: Array) -> Array:
        """See `Base.score`."""
        return 0 * z


@dataclass(frozen=True)
class Product(Base):
    """Consecutive coordinates with bases of their own: angles and real numbers, light tails and heavy ones.

    Attributes:
        bases: The bases.
        dims: How many coordinates each has.

    Example:
        >>> from flowppl.flows import Normal, Product, StudentT
        >>> light_then_heavy = Product((Normal(), StudentT(3.0, trainable=True)), (2, 3))
    """

    bases: tuple[Base, ...]
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bases) != len(self.dims) or not self.bases or min(self.dims) < 1:
            raise DimensionError(
                f"expected a positive dim for each base, got {len(self.bases)} bases, dims={self.dims}"
            )

    def init(self, rng: Any, dim: int) -> dict[str, Any]:
        """See `Base.init`.

        Raises:
            DimensionError: the dims do not add up to `dim`.
        """
        if sum(self.dims) != dim:
            raise DimensionError(f"dims={self.dims} add up to {sum(self.dims)}, and the flow has dim={dim}")
        keys = backend_of_rng(rng).split(rng, len(self.dims))
        parts = [base.init(keys[i], d) for i, (base, d) in enumerate(zip(self.bases, self.dims, strict=True))]
        return {kind: tuple(part[kind] for part in parts) for kind in ("params", "const")}

    def sample(self, rng: Any, params: Params, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`."""
        backend = backend_of_rng(rng)
        keys = backend.split(rng, len(self.dims))
        draws = [
            base.sample(keys[i], p, (*shape[:-1], d), like)
            for i, (base, p, d) in enumerate(zip(self.bases, params, self.dims, strict=True))
        ]
        return backend.xp.concat(draws, axis=-1)

    def log_prob(self, params: Params, z: Array) -> Array:
        """See `Base.log_prob`."""
        return sum(base.log_prob(p, part) for base, p, part in self._parts(params, z))

    def score(self, params: Params, z: Array) -> Array:
        """See `Base.score`."""
        scores = [base.score(p, part) for base, p, part in self._parts(params, z)]
        return backend_of(z).xp.concat(scores, axis=-1)

    def attach(self, params: Params, z: Array) -> Array | None:
        """See `Base.attach`."""
        attached = [base.attach(p, part) for base, p, part in self._parts(params, z)]
        return None if any(a is None for a in attached) else backend_of(z).xp.concat(attached, axis=-1)

    def _parts(self, params: Params, z: Array) -> list[tuple[Base, Params, Array]]:
        ends = [sum(self.dims[: i + 1]) for i in range(len(self.dims))]
        pieces = [z[..., end - d : end] for end, d in zip(ends, self.dims, strict=True)]
        return list(zip(self.bases, params, pieces, strict=True))
