"""The sum-of-squares polynomial transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array
from flowppl.bijections.elementwise import Transformer
from flowppl.bijections.root import solve_increasing

_MIN_SLOPE = 1e-3  # everywhere, so that the map reaches every value
_COEFFICIENT = 30.0  # bound of the coefficients, so that float32 can hold a value a million units out


@dataclass(frozen=True)
class SumOfSquares(Transformer):
    """y = c + integral from 0 to x of m + (1 - m) mean_k (1 + q_k(u))^2 du, with polynomials q_k and m = 1e-3.

    Jaini, Selby and Yu 2019, "Sum-of-squares polynomial flow", with a least slope, and with ones that make it the identity at
    zero parameters. The integral is a polynomial of degree 2 degree + 1; the inverse is a root search. q_k is written in powers
    of u / (k + 1), k = 1, 2, ...: polynomials that start alike have different gradients, and part.

    A point far out grows like the highest power of x, so the base's tails become heavier, and lighter within `Inverse`. Two in
    sequence already take a point a million units out to where float32 ends.

    Attributes:
        polynomials: How many squares are averaged; two can make every positive polynomial.
        degree: Of each q_k.
    """

    polynomials: int = 2
    degree: int = 2

    def __post_init__(self) -> None:
        if self.polynomials < 1 or self.degree < 1:
            raise ValueError(
                f"polynomials and degree must be at least 1, got polynomials={self.polynomials}, degree={self.degree}"
            )

    @property
    def num_params(self) -> int:
        """The coefficients of the polynomials, and c."""
        return self.polynomials * (self.degree + 1) + 1

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        coefficients = self._unpack(theta)
        return theta[-1] + _horner(_integral(coefficients), x), backend_of(x).xp.log(_slope(coefficients, x)[0])

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """Twice the mean of (1 + q_k) q_k', over the slope."""
        backend = backend_of(x)
        xp, coefficients = backend.xp, self._unpack(theta)
        slope, roots = _slope(coefficients, x)
        steep = _horner([i * c for i, c in enumerate(coefficients)][1:], x)
        curvature = 2 * (1 - _MIN_SLOPE) * xp.mean(roots * steep, axis=0) / slope
        return theta[-1] + _horner(_integral(coefficients), x), xp.log(slope), backend.stop(curvature)

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`: the search finds its bracket, which the least slope says is there."""
        xp, coefficients = backend_of(y).xp, self._unpack(theta)
        integral = _integral(coefficients)
        x = solve_increasing(
            lambda x: (_horner(integral, x), _slope(coefficients, x)[0]), y - theta[-1] + xp.zeros_like(integral[1])
        )
        return x, -xp.log(_slope(coefficients, x)[0])

    def _unpack(self, theta: Array) -> list[Array]:
        """The coefficients of all 1 + q_k, `(polynomials, *shape)` for each power."""
        backend = backend_of(theta)
        xp, k = backend.xp, self.polynomials
        theta = soft_clip(xp.reshape(theta[:-1], (self.degree + 1, k, *theta.shape[1:])), _COEFFICIENT)
        units = xp.reshape(1 / backend.asarray([i + 2.0 for i in range(k)], theta), (k, *(1 for _ in theta.shape[2:])))
        return [1 + theta[0], *(theta[i] * units**i for i in range(1, self.degree + 1))]


def _horner(coefficients: list[Array], x: Array) -> Array:
    """The polynomial's value, coefficients from the constant on."""
    value: Any = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value


def _slope(coefficients: list[Array], x: Array) -> tuple[Array, Array]:
    """The slope, and the polynomials whose squares it averages."""
    roots = _horner(coefficients, x)
    return _MIN_SLOPE + (1 - _MIN_SLOPE) * backend_of(x).xp.mean(roots * roots, axis=0), roots


def _integral(coefficients: list[Array]) -> list[Array]:
    """Coefficients of the slope's integral from zero."""
    xp, n = backend_of(coefficients[0]).xp, len(coefficients)
    squares: list[Any] = [0.0] * (2 * n - 1)
    for i, a in enumerate(coefficients):
        squares[2 * i] = squares[2 * i] + xp.mean(a * a, axis=0)
        for j in range(i + 1, n):
            squares[i + j] = squares[i + j] + 2 * xp.mean(a * coefficients[j], axis=0)
    powers = [(1 - _MIN_SLOPE) / (i + 1) * c for i, c in enumerate(squares)]
    return [xp.zeros_like(powers[0]), powers[0] + _MIN_SLOPE, *powers[1:]]
