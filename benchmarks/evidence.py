"""The evidence of six posteriors that samplers are compared on, by `anneal(model)` without options, beside known values.

    python -m benchmarks evidence [--data DIR] [--ppls numpyro pyro] [--only sonar ...] [--start fit] [--seeds 5]

DIR holds `ionosphere.csv`, `sonar.csv`, `german.data-numeric` (UCI; the class in the last column) and `pines.csv` (126 points,
`finpines` in R's spatstat, scaled to the unit square); what is missing is left out. One process for each line, so that seconds
hold compilation; two threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.posteriors import data

ROOT = Path(__file__).parents[1]
PPLS = ("numpyro", "pyro")
REFERENCES = {  # log evidence and its error, of long runs by other means; that of Brownian is exact, by quadrature
    "ionosphere": (-111.614, 0.006),
    "sonar": (-108.374, 0.006),
    "credit": (-585.104, 0.002),
    "seeds": (-73.405, 0.003),
    "brownian": (1.187749, 0.0),
    "pines": (501.81, 0.05),
}
# Twenty noisy looks at a Brownian motion of thirty steps, of which the middle was not seen (Inference Gym, Apache 2.0).
BROWNIAN = np.array(
    [
        *(
            0.21592641,
            0.118771404,
            -0.07945447,
            0.037677474,
            -0.27885845,
            -0.1484156,
            -0.3250906,
            -0.22957903,
            -0.44110894,
        ),
        *(
            -0.09830782,
            -0.8786016,
            -0.83736074,
            -0.7384849,
            -0.8939254,
            -0.7774566,
            -0.70238715,
            -0.87771565,
            -0.51853573,
        ),
        *(-0.6948214, -0.6202789),
    ]
)
WITHOUT_FOLDER = {"seeds", "brownian"}
SEEN = np.r_[0:10, 20:30]
CELLS = 40  # of the Cox process, in each direction


def arrays(name: str, folder: Path | None) -> tuple[np.ndarray, ...]:
    """The data that the model of this name takes.

    Raises:
        FileNotFoundError: they are in a folder, and not in this one.
    """
    if name == "seeds":
        return data.seeds()
    if name == "brownian":
        return (BROWNIAN,)
    if folder is None:
        raise FileNotFoundError(f"{name} needs --data")
    if name == "pines":
        points = np.loadtxt(folder / "pines.csv", delimiter=",", skiprows=1, usecols=(1, 2))
        at = np.minimum((points * CELLS).astype(int), CELLS - 1)
        counts = np.zeros((CELLS, CELLS))
        np.add.at(counts, (at[:, 0], at[:, 1]), 1)
        grid = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS), indexing="ij"), -1).reshape(-1, 2)
        distance = np.linalg.norm(grid[:, None] - grid[None], axis=-1)
        root = np.linalg.cholesky(1.91 * np.exp(-distance / (CELLS / 33)) + 1e-9 * np.eye(CELLS**2))
        return root, counts.reshape(-1)
    table = np.loadtxt(folder / f"{name}.csv", delimiter=",") if name != "credit" else None
    if table is None:
        table = np.loadtxt(folder / "german.data-numeric")
        x = table[:, :-1] / table[:, :-1].std(0)
        y = table[:, -1] == 1
    else:
        sd = table[:, :-1].std(0)
        x = (table[:, :-1] - table[:, :-1].mean(0)) / np.where(sd > 0, sd, 1.0)
        y = table[:, -1] > 0
    return np.concatenate([np.ones((len(x), 1)), x], 1), y * 1.0


def numpyro_model(name: str) -> Callable:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def regression(x: Any, y: Any) -> None:
        sd = 10.0 if name == "credit" else 1.0
        w = numpyro.sample("w", dist.Normal(0.0, sd).expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)

    def seeds(germinated: Any, total: Any, kind: Any, extract: Any) -> None:
        tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
        a = numpyro.sample("a", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
        with numpyro.plate("plates", len(total)):
            b = numpyro.sample("b", dist.Normal(0.0, tau**-0.5))
            logits = a[0] + a[1] * kind + a[2] * extract + a[3] * kind * extract + b
            numpyro.sample("germinated", dist.Binomial(total.astype(int), logits=logits), obs=germinated.astype(int))

    def brownian(seen: Any) -> None:
        innovation = numpyro.sample("innovation", dist.LogNormal(0.0, 2.0))
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 2.0))
        x, walk = 0.0, []
        for t in range(30):
            x = numpyro.sample(f"x{t}", dist.Normal(x, innovation))
            walk.append(x)
        numpyro.sample("seen", dist.Normal(jnp.stack(walk)[SEEN], noise).to_event(1), obs=seen)

    def pines(root: Any, counts: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([CELLS**2]).to_event(1))
        log_rate = jnp.log(126.0) - 1.91 / 2 + root @ z
        factor = counts * log_rate - jnp.exp(log_rate) / CELLS**2  # a Poisson's, without the factorials
        numpyro.factor("counts", factor.sum())

    return {"seeds": seeds, "brownian": brownian, "pines": pines}.get(name, regression)


def pyro_model(name: str) -> Callable:
    import pyro
    import pyro.distributions as dist
    import torch

    def regression(x: Any, y: Any) -> None:
        sd = 10.0 if name == "credit" else 1.0
        w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[1]), sd).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=(x @ w[..., None])[..., 0]).to_event(1), obs=y)

    def seeds(germinated: Any, total: Any, kind: Any, extract: Any) -> None:
        tau = pyro.sample("tau", dist.Gamma(total.new_tensor(0.01), 0.01))
        a = pyro.sample("a", dist.Normal(total.new_zeros(4), 10.0).to_event(1))
        with pyro.plate("plates", len(total)):
            b = pyro.sample("b", dist.Normal(0.0, tau**-0.5))
            logits = a[..., :1] + a[..., 1:2] * kind + a[..., 2:3] * extract + a[..., 3:4] * kind * extract + b
            pyro.sample("germinated", dist.Binomial(total, logits=logits), obs=germinated)

    def brownian(seen: Any) -> None:
        innovation = pyro.sample("innovation", dist.LogNormal(seen.new_zeros(()), 2.0))
        noise = pyro.sample("noise", dist.LogNormal(seen.new_zeros(()), 2.0))
        x, walk = 0.0, []
        for t in range(30):
            x = pyro.sample(f"x{t}", dist.Normal(x, innovation))
            walk.append(x)
        pyro.sample("seen", dist.Normal(torch.stack(walk, -1)[..., SEEN], noise[..., None]).to_event(1), obs=seen)

    def pines(root: Any, counts: Any) -> None:
        z = pyro.sample("z", dist.Normal(root.new_zeros(CELLS**2), 1.0).to_event(1))
        log_rate = np.log(126.0) - 1.91 / 2 + (root @ z[..., None])[..., 0]
        factor = counts * log_rate - torch.exp(log_rate) / CELLS**2
        pyro.factor("counts", factor.sum(-1))

    return {"seeds": seeds, "brownian": brownian, "pines": pines}.get(name, regression)


def line(options: argparse.Namespace) -> dict[str, Any]:
    """What one PPL finds for one posterior."""
    (ppl,), (name,) = options.ppls, options.only
    own = arrays(name, options.data)
    if ppl == "numpyro":
        import jax

        jax.config.update("jax_enable_x64", True)
        from flowppl.numpyro import anneal, fit

        model, own = numpyro_model(name), tuple(map(jax.numpy.asarray, own))
    else:
        import torch

        torch.set_num_threads(2)
        from flowppl.pyro import anneal, fit

        model, own = pyro_model(name), tuple(map(torch.as_tensor, own))
    begin = time.perf_counter()
    start = fit(model, *own, seed=options.seed, progress_bar=False) if options.start == "fit" else None
    posterior = anneal(model, *own, start=start, seed=options.seed, progress_bar=False, **options.more)
    row = {
        "ppl": ppl,
        "name": name,
        "seconds": time.perf_counter() - begin,
        "dim": posterior.unconstrained.shape[1],
        "log_z": posterior.log_evidence[0],
        "error": posterior.log_evidence[1],
        "ess": posterior.ess / len(posterior.weights),
        "khat": posterior.khat,
        "temperatures": len(posterior.annealing.schedule.betas),
        "resampled": float(posterior.annealing.resampled.sum()),
        "start": posterior.start.log_evidence,
        "start_khat": posterior.start.khat,
        "verdict": posterior.diagnose().verdict,
    }
    if name == "brownian":
        row["tail"] = float(posterior.weights @ (posterior.samples["noise"] < 0.03))
    return row


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evidence", description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ppls", nargs="+", choices=PPLS, default=list(PPLS))
    parser.add_argument("--only", nargs="+", choices=list(REFERENCES), default=list(REFERENCES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", choices=("normal", "fit"), default="normal", help="whether to train a flow first")
    parser.add_argument("--more", type=json.loads, default={}, help="options of `anneal`, as JSON")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed is not None:
        print(json.dumps(line(options)))
        return
    head = ["posterior", "dim", "PPL", "log evidence", "own error", "reference", "worst z", "ESS, %", "k-hat"]
    head += ["temperatures", "from the start alone", "seconds"]
    print(f"| {' | '.join(head)} |\n|---{'|---:' * (len(head) - 1)}|", flush=True)
    for name in (n for n in options.only if options.data or n in WITHOUT_FOLDER):
        for ppl in options.ppls:
            rows = [_row(options, ppl, name, seed) for seed in range(options.seeds)]
            rows = [row for row in rows if row is not None]
            if rows:
                print(_shown(name, ppl, rows), flush=True)


def _row(options: argparse.Namespace, ppl: str, name: str, seed: int) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "benchmarks", "evidence", "--ppls", ppl]
    command += ["--data", str(options.data)] if options.data else []
    command += ["--only", name, "--seed", str(seed), "--start", options.start]
    command += ["--more", json.dumps(options.more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}, {ppl}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _shown(name: str, ppl: str, rows: list[dict[str, Any]]) -> str:
    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    truth, error = REFERENCES[name]
    z = max(abs(row["log_z"] - truth) / np.hypot(row["error"], error) for row in rows)
    spread = float(np.std([row["log_z"] for row in rows], ddof=1)) if len(rows) > 1 else rows[0]["error"]
    cells = [name, str(rows[0]["dim"]), ppl, f"{mean('log_z'):.4f} ± {spread / len(rows) ** 0.5:.4f}"]
    cells += [f"{mean('error'):.4f}", f"{truth}", f"{z:.1f}", f"{100 * mean('ess'):.0f}", f"{mean('khat'):.2f}"]
    cells += [f"{mean('temperatures'):.0f}", f"{mean('start'):.3f}", f"{mean('seconds'):.0f}"]
    tail = f" P(noise < 0.03) = {mean('tail'):.4f}" if name == "brownian" else ""
    return f"| {' | '.join(cells)} |{tail}"


if __name__ == "__main__":
    main(sys.argv[1:])
