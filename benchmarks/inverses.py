"""Every inverse that iterates, in float32 and torch: what it reaches, and in how many steps.

    python -m benchmarks inverses [--quick]

Points x are standard normal (rows of the data where parameters were fitted) and y is the float64 image of x, rounded to float32.
Errors are relative to 1 + |x|: of the inverse against x, which the rounding of y moves already, and against the inverse of the
same y in float64. The residual is |forward(inverse(y)) - y| / (1 + |y|), in float64 but for the inverse; that of the float64
inverse, rounded to float32, stands beside it: no float32 number does much better. Steps are the most of any solve: Jacobi sweeps,
steps of a search for roots, or steps of a fixed-point iteration.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.parameters import data, drawn, fitted
from flowppl import tree
from flowppl.bijections import (
    Affine,
    Bijection,
    BlockAutoregressive,
    Chain,
    Coupling,
    DeepSigmoid,
    Elementwise,
    ExtremeTails,
    LULinear,
    MaskedAutoregressive,
    Planar,
    Residual,
    Reversal,
    RQSpline,
    Solve,
    Stack,
    SumOfSquares,
    Sylvester,
    watch_solves,
)

SCALES, POINTS, STEPS, LAYERS = (1.0, 2.0, 4.0), 256, 300, 3


def bijections(dim: int) -> dict[str, Bijection]:
    """One layer of each kind."""
    return {
        "autoregressive, affine": MaskedAutoregressive(dim, Affine()),
        "autoregressive, spline": MaskedAutoregressive(dim, RQSpline()),
        "autoregressive, deep sigmoid": MaskedAutoregressive(dim, DeepSigmoid()),
        "autoregressive, sum of squares": MaskedAutoregressive(dim, SumOfSquares()),
        "coupling, deep sigmoid": Coupling(dim, DeepSigmoid()),
        "coupling, sum of squares": Coupling(dim, SumOfSquares()),
        "planar": Planar(dim),
        "Sylvester": Sylvester(dim),
        "block autoregressive": BlockAutoregressive(dim),
        "residual": Residual(dim),
        "extreme tails": Elementwise(dim, ExtremeTails()),
    }


class Outcome(NamedTuple):
    """The worst of all points and coordinates."""

    error: float
    error64: float
    residual: float
    floor: float
    solves: list[Solve]

    @property
    def steps(self) -> str:
        """The most steps of each method."""
        most: dict[str, int] = {}
        for solve in self.solves:
            most[solve.method] = max(solve.steps, most.get(solve.method, 0))
        return ", ".join(f"{method} {steps}" for method, steps in most.items()) or "closed form"


@torch.no_grad()
def judge(bijection: Bijection, params: Any, x: np.ndarray) -> Outcome:
    """Inverts the image of x in float32."""
    params, x = tree.map(torch.as_tensor, params), torch.as_tensor(x)
    exact = tree.map(lambda p: p.double() if p.is_floating_point() else p, params)
    y = bijection.forward(exact, x.double())[0].float()
    with watch_solves() as solves:
        found = bijection.inverse(params, y)[0]
    reference = bijection.inverse(exact, y.double())[0]

    def worst(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(((a.double() - b.double()).abs() / (1 + b.abs())).max())

    def residual(x: torch.Tensor) -> float:
        return worst(bijection.forward(exact, x.double())[0], y.double())

    return Outcome(worst(found, x), worst(found, reference), residual(found), residual(reference.float()), solves)


def cases(dims: Sequence[int], steps: int, only: str) -> Iterator[tuple[str, str, Outcome]]:
    """Flow, parameters, and how the inverse did."""
    for dim in dims:
        rows = data(dim)
        for name, bijection in bijections(dim).items():
            if only not in name:
                continue
            x = np.random.default_rng(1).standard_normal((POINTS, dim)).astype(np.float32)
            for scale in SCALES:
                yield f"{name} | {dim}", f"drawn, x {scale:g}", judge(bijection, drawn(bijection, 0, scale), x)
            flow = Stack(Chain((LULinear(dim), bijection, Reversal(dim))), LAYERS)
            yield f"{name} | {dim}", "fitted", judge(flow, fitted(flow, rows, steps), rows[:POINTS])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks inverses", description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=STEPS, help="of Adam, for the fitted parameters")
    parser.add_argument("--quick", action="store_true", help="8 dimensions, 30 steps")
    parser.add_argument("--only", default="", help="only flows whose names have this in them")
    options = parser.parse_args(arguments)
    if options.quick:
        options.dims, options.steps = [8], 30
    torch.set_num_threads(1)
    print(
        f"{POINTS} points, float32; fitted: {LAYERS} layers with LU-factorised linear maps, {options.steps} steps of Adam by "
        "maximum likelihood on scikit-learn's diabetes (8 columns) and digits (64 pixels).\n"
    )
    print(
        "| flow | dim | parameters | steps | unsolved | error to x | error to float64 | residual | of rounded float64 |"
    )
    print("|---|---:|---|---|---:|---:|---:|---:|---:|", flush=True)
    for flow, parameters, found in cases(options.dims, options.steps, options.only):
        unsolved = sum(solve.unsolved for solve in found.solves)
        print(
            f"| {flow} | {parameters} | {found.steps} | {unsolved} | {found.error:.1e} | {found.error64:.1e} "
            f"| {found.residual:.1e} | {found.floor:.1e} |",
            flush=True,
        )
        print(f"{time.process_time():.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
