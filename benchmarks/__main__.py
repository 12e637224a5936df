"""`python -m benchmarks NAME`: runs one benchmark; without a name, all of them."""

from __future__ import annotations

import sys

from benchmarks import density, eight_schools, speed

BENCHMARKS = {"speed": speed.main, "density": density.main, "eight_schools": eight_schools.main}

if __name__ == "__main__":
    name, arguments = (
        (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in BENCHMARKS else (None, sys.argv[1:])
    )
    for main in BENCHMARKS.values() if name is None else [BENCHMARKS[name]]:
        main(arguments)
