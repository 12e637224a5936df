"""`python -m benchmarks NAME`: runs one benchmark; without a name, all of them."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = (
    "speed",
    "family",
    "autoregressive",
    "inverses",
    "density",
    "eight_schools",
    "fit",
    "path",
    "learning",
    "gain",
    "evidence",
    "double_well",
    "overhead",
    "calibration",
    "samplers",
)

if __name__ == "__main__":
    known = sys.argv[1:2] and sys.argv[1] in BENCHMARKS
    for name in sys.argv[1:2] if known else BENCHMARKS:
        importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:] if known else sys.argv[1:])
