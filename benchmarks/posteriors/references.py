"""Reference posteriors by long NUTS runs in float64, and what a plain NUTS run of the model as written takes and finds.

    python -m benchmarks.posteriors.references [names]

Writes `references/<name>.json`. Where a prior depends on other latents the long run is of a non-centred form, mapped back to
the sites of the model. Runs of up to 31 dimensions have a dense mass matrix; two regressions are so badly scaled that it cannot be
learnt, and have the Hessian at the mode. The horseshoe has a Gibbs sampler, since NUTS diverges as written and non-centred.

A file holds, for each site, the mean, the standard deviation and three quantiles of each element, and mean and standard deviation
in unconstrained space (`free_mean`, `free_sd`), which exist even where a scale's tails are too heavy for them. `rhat` and
`ess_bulk` are the worst over all elements, and `usable` says whether to judge by the file.

The plain run is NumPyro's default in float32: four chains in sequence, 1000 steps of warm-up, 1000 draws. `nuts_seconds` includes
compilation, and wants an idle machine; `nuts_mean_error` is its largest error of a mean, in reference standard deviations, in
unconstrained space.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam, Reparam
from numpyro.infer.util import initialize_model, unconstrain_fn

from benchmarks import posteriors
from benchmarks.posteriors import gibbs

CHAINS, WARMUP, DRAWS = 4, 2000, 5000
DENSE_UP_TO = 31
Draws = dict[str, np.ndarray]


class Whiten(Reparam):
    """A series or a multivariate normal as the image of independent noise."""

    def __call__(self, name: str, fn: dist.Distribution, obs: None) -> tuple[None, jax.Array]:
        noise = numpyro.sample(f"{name}_noise", dist.Normal(0.0, 1.0).expand(fn.event_shape).to_event(1))
        return None, fn.push(noise) if hasattr(fn, "push") else fn.loc + fn.scale_tril @ noise


NON_CENTRED: dict[str, dict[str, Reparam]] = {
    "volatility": {"h": Whiten()},
    "coal": {"f": Whiten()},
    "nile": {"level": Whiten()},
    "mpg": {"a": LocScaleReparam(0), "b": LocScaleReparam(0)},
    "seeds": {"logit": LocScaleReparam(0)},
}

SCALED_BY_HESSIAN = {"huron", "longley"}
TARGETS = {"volatility": 0.999}


def mode_and_covariance(name: str) -> tuple[dict[str, jax.Array], jax.Array]:
    """Starts for each chain, about the mode in unconstrained space, and the inverse of the Hessian there (Levenberg-Marquardt)."""
    arrays = tuple(map(jax.numpy.asarray, posteriors.load(name)))
    info = initialize_model(jax.random.key(0), posteriors.numpyro_model(name), model_args=arrays)
    u, unravel = ravel_pytree(info.param_info.z)
    value = jax.jit(lambda u: info.potential_fn(unravel(u)))
    slope, hessian = jax.jit(jax.grad(value)), jax.jit(jax.hessian(value))
    damping = 1.0
    for _ in range(500):
        curvature = hessian(u)
        scale = jax.numpy.sqrt(jax.numpy.abs(jax.numpy.diag(curvature)))
        scaled = curvature / scale / scale[:, None]
        step = jax.numpy.linalg.solve(scaled + damping * jax.numpy.eye(len(u)), slope(u) / scale) / scale
        better = bool(value(u - step) < value(u))
        u, damping = (u - step, damping / 5.0) if better else (u, damping * 5.0)
        damping = min(max(damping, 1e-12), 1e12)
    covariance = jax.numpy.linalg.inv(scaled) / scale / scale[:, None]
    noise = jax.random.normal(jax.random.key(1), (CHAINS, len(u)))
    starts = u + 2.0 * noise @ jax.numpy.linalg.cholesky(covariance).T
    return jax.vmap(unravel)(starts), covariance


def long_run(name: str) -> tuple[Draws, dict]:
    """Draws `(chain, draw, ...)` of the model's sites, and how they were made."""
    if name == "horseshoe":
        return _gibbs()
    non_centred = NON_CENTRED.get(name, {})
    target = TARGETS.get(name, 0.99 if non_centred else 0.95)
    scaled = name in SCALED_BY_HESSIAN
    starts, covariance = mode_and_covariance(name) if scaled else (None, None)
    kernel = NUTS(
        reparam(posteriors.numpyro_model(name), config=non_centred),
        target_accept_prob=target,
        dense_mass=posteriors.POSTERIORS[name].dim <= DENSE_UP_TO,
        inverse_mass_matrix=covariance,
        adapt_mass_matrix=not scaled,
    )
    return _run(
        kernel,
        name,
        WARMUP,
        DRAWS,
        {
            "non_centred": sorted(non_centred),
            "chains": CHAINS,
            "warmup": WARMUP,
            "draws": DRAWS,
            "target_accept": target,
            "dense_mass": kernel._dense_mass is True,
            "scaled_by_hessian": scaled,
        },
        starts,
    )


def _gibbs() -> tuple[Draws, dict]:
    start = time.perf_counter()
    settings = {"chains": CHAINS, "warmup": WARMUP, "draws": DRAWS, "thin": 10}
    draws = gibbs.horseshoe(*posteriors.load("horseshoe"), **settings)
    return draws, {"sampler": "Gibbs", **settings, "seconds": round(time.perf_counter() - start, 1), "divergences": 0}


def plain_run(name: str) -> tuple[Draws, dict]:
    """The same of NumPyro's default settings, in a process of its own that stays in float32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "draws.npz"
        subprocess.run([sys.executable, "-m", __spec__.name, name, "--plain", str(file)], check=True)
        with np.load(file) as draws:
            found = {site: draws[site] for site in draws.files}
    return found, json.loads(str(found.pop("about")))


def _run(
    kernel: NUTS, name: str, warmup: int, draws: int, about: dict, starts: dict | None = None
) -> tuple[Draws, dict]:
    arrays = posteriors.load(name)
    start = time.perf_counter()
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    fields = ("diverging", "num_steps")
    mcmc.run(jax.random.key(20), *map(jax.numpy.asarray, arrays), extra_fields=fields, init_params=starts)
    samples, extra = jax.block_until_ready((mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields()))
    seconds = time.perf_counter() - start
    about = {
        **about,
        "seconds": round(seconds, 1),
        "leapfrog_steps": round(float(extra["num_steps"].mean()), 1),
        "divergences": int(extra["diverging"].sum()),
    }
    return {k: np.asarray(v, float) for k, v in samples.items() if not k.endswith(("_noise", "_decentered"))}, about


def convergence(draws: Draws) -> dict[str, float]:
    """The worst rank-normalised split R-hat and bulk effective sample size of all elements."""
    posterior = az.convert_to_dataset(draws)
    rhat, ess = az.rhat(posterior), az.ess(posterior)
    return {
        "rhat": round(max(float(rhat[s].max()) for s in draws), 4),
        "ess_bulk": round(min(float(ess[s].min()) for s in draws)),
    }


def summarise(name: str, draws: Draws) -> dict[str, dict[str, list]]:
    """Moments and quantiles of each site's elements, in constrained and unconstrained space."""
    flat = {site: x.reshape(-1, *x.shape[2:]) for site, x in draws.items()}
    arrays = tuple(map(jax.numpy.asarray, posteriors.load(name)))
    model = posteriors.numpyro_model(name)
    free = jax.jit(jax.vmap(lambda sites: unconstrain_fn(model, arrays, {}, sites)))(flat)
    found = {
        site: {
            "mean": x.mean(0),
            "sd": x.std(0),
            "q05": np.quantile(x, 0.05, axis=0),
            "q50": np.quantile(x, 0.5, axis=0),
            "q95": np.quantile(x, 0.95, axis=0),
            "free_mean": np.mean(free[site], axis=0),
            "free_sd": np.std(free[site], axis=0),
        }
        for site, x in flat.items()
    }
    digits = np.vectorize(lambda number: float(f"{number:.7g}"))
    return {site: {key: digits(x).tolist() for key, x in moments.items()} for site, moments in found.items()}


def make(name: str) -> dict:
    """The contents of a reference's file."""
    draws, about = long_run(name)
    about |= convergence(draws)
    trouble = []
    if about["rhat"] >= 1.01:
        trouble.append("R-hat is 1.01 or more")
    if about["ess_bulk"] < 1000:
        trouble.append("fewer than 1000 effective draws")
    if about["divergences"] > 1e-3 * CHAINS * DRAWS:
        trouble.append("more than one draw in a thousand diverges")
    sites = summarise(name, draws)
    plain, plain_about = plain_run(name)
    plain_sites = summarise(name, plain)
    error = max(
        np.max(np.abs(np.subtract(plain_sites[s]["free_mean"], sites[s]["free_mean"])) / sites[s]["free_sd"])
        for s in sites
    )
    return {
        "name": name,
        "dim": posteriors.POSTERIORS[name].dim,
        "usable": not trouble,
        "trouble": trouble,
        **about,
        "nuts_seconds": plain_about.pop("seconds"),
        "nuts_mean_error": round(float(error), 4),
        "nuts": plain_about | convergence(plain),
        "sites": sites,
    }


def main() -> None:
    """Makes the references named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriors.references", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(posteriors.POSTERIORS), metavar="name")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        [name] = options.names
        draws, about = _run(NUTS(posteriors.numpyro_model(name)), name, 1000, 1000, {})
        np.savez(options.plain, about=json.dumps(about), **draws)
        return
    numpyro.enable_x64()
    posteriors.REFERENCES.mkdir(exist_ok=True)
    for name in options.names:
        found = make(name)
        (posteriors.REFERENCES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print({key: value for key, value in found.items() if key != "sites"}, flush=True)


if __name__ == "__main__":
    main()
