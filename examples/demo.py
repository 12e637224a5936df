"""Four guides on two posteriors, in NumPyro and in Pyro, against long NUTS runs.

    python examples/demo.py [--quick] [--ppl numpyro|pyro|both]

Eight Schools in its centred form is a funnel; the sparse logistic regression has fifty latents on curved ridges. On each,
both PPLs train a mean field, their own best flow guide, and AutoFlow with plain and with path gradients. Writes the table,
an ELBO curve for each model, and a corner plot for each model and PPL to demo-output/. Five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from comparison import report
from comparison.fits import BUDGETS, QUICK, Fit

HERE = Path(__file__).resolve().parent
OUTPUT = Path("demo-output")
PPLS = {"numpyro": "NumPyro", "pyro": "Pyro"}
# One core for each PPL: their thread pools would fight, and the times would depend on how many cores there are.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
LEGEND = """
ELBO with its standard error; it is at most log p(data), which is -31.311 for Eight Schools. k-hat: tail of the importance
weights, good below 0.7. ESS: of the importance weights, in percent of the draws. Errors: the largest over all scalar latents,
of the guide's own means and standard deviations, in standard deviations of the reference. Seconds: training on one core,
compilation included. ESS sees only where the guide goes: read it beside the errors.
"""


def train(ppls: list[str], folder: Path, quick: bool) -> list[Fit]:
    """Trains all guides, each PPL in a process of its own; returns the fits in the order of the table."""
    for old in folder.glob("*.npz"):
        old.unlink()
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "comparison" / f"fit_{ppl}.py"), str(folder), *["--quick"] * quick],
            env=os.environ | ONE_THREAD,
        )
        for ppl in ppls
    ]
    if failed := [ppl for ppl, worker in zip(ppls, workers, strict=True) if worker.wait()]:
        sys.exit(f"the fits in {', '.join(PPLS[ppl] for ppl in failed)} failed: see the error above")
    guides = list(report.COLORS)
    fits = [Fit.load(path) for path in folder.glob("*.npz")]
    return sorted(fits, key=lambda f: (list(BUDGETS).index(f.model), f.ppl, guides.index(f.guide)))


def main() -> None:
    """Trains, scores, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one model, {QUICK.steps} steps: shows that it runs")
    parser.add_argument("--ppl", choices=[*PPLS, "both"], default="both")
    options = parser.parse_args()

    start = time.perf_counter()
    ppls = list(PPLS) if options.ppl == "both" else [options.ppl]
    fits = train(ppls, OUTPUT / "fits", options.quick)
    scores = [report.score(fit) for fit in fits]
    text = report.table(scores)
    print(f"\n{text}\n{LEGEND}")
    (OUTPUT / "table.md").write_text(f"{text}\n{LEGEND}", encoding="utf-8")
    (OUTPUT / "table.json").write_text(json.dumps(report.records(scores), indent=2), encoding="utf-8")
    for model in dict.fromkeys(fit.model for fit in fits):
        of_model = [fit for fit in fits if fit.model == model]
        report.plot_elbo(of_model, OUTPUT / f"elbo-{model}.png")
        for ppl in ppls:
            of_ppl = [fit for fit in of_model if fit.ppl == PPLS[ppl]]
            report.plot_corner(of_ppl, OUTPUT / f"corner-{model}-{ppl}.png")
    print(f"{time.perf_counter() - start:.0f} s; table and pictures are in {OUTPUT}/")


if __name__ == "__main__":
    main()
