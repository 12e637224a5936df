"""Base densities: independent coordinates, with the score in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.config import Configured

Array = Any


class Base(Configured):
    """A density of vectors with independent coordinates, centred at zero."""

    def sample(self, rng: Any, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """Draws an array of this shape, the last axis being the vector."""
        raise NotImplementedError

    def log_prob(self, z: Array) -> Array:
        """Log density of z `(*batch, dim)`, `(*batch,)`."""
        raise NotImplementedError

    def score(self, z: Array) -> Array:
        """d log density / dz."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normal(Base):
    """Standard normal coordinates."""

    def sample(self, rng: Any, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`."""
        return backend_of_rng(rng).normal(rng, shape, like)

    def log_prob(self, z: Array) -> Array:
        """See `Base.log_prob`."""
        return -0.5 * backend_of(z).xp.sum(z * z, axis=-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def score(self, z: Array) -> Array:
        """See `Base.score`."""
        return -z


@dataclass(frozen=True)
class StudentT(Base):
    """Student-t coordinates of unit scale, for tails heavier than a normal flow can give.

    Attributes:
        df: Degrees of freedom.
    """

    df: float = 5.0

    def __post_init__(self) -> None:
        if not self.df > 0:
            raise ValueError(f"df must be positive, got {self.df}")

    def sample(self, rng: Any, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """See `Base.sample`: the polar method, exact and without rejection. Bailey 1994, equation 2."""
        backend = backend_of_rng(rng)
        xp = backend.xp
        radius_key, angle_key = backend.split(rng, 2)
        log_u = xp.log1p(-backend.uniform(radius_key, shape, like))  # of a uniform number in (0, 1]
        angle = 2 * math.pi * backend.uniform(angle_key, shape, like)
        return xp.sqrt(self.df * xp.expm1(log_u * (-2 / self.df))) * xp.cos(angle)

    def log_prob(self, z: Array) -> Array:
        """See `Base.log_prob`."""
        xp, df = backend_of(z).xp, self.df
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        return xp.sum(constant - 0.5 * (df + 1) * xp.log1p(z * z / df), axis=-1)

    def score(self, z: Array) -> Array:
        """See `Base.score`."""
        return -(self.df + 1) * z / (self.df + z * z)
