"""Variance of the plain and of the path gradient of the ELBO while a flow learns a target that it can represent.

The picture is docs/images/path_gradients.png when run from the root with `--output docs/images`. Runs on jax or on torch:

    python examples/path_gradients.py --framework jax
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from flowppl import flows, optim, tree
from flowppl.backend import get_backend
from flowppl.objectives import path_log_prob


def main() -> None:
    """Trains with path gradients and measures both variances on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=["jax", "torch"], default="jax")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()

    backend, rng = _start(options.framework)
    flow = flows.realnvp(layers=2, hidden=(16,))(dim=2)
    target_key, start_key, rng = backend.split(rng, 3)
    target = _perturbed(
        backend, flow.init(target_key)
    )  # another flow of the same family, so that the guide can reach it
    variables = flow.init(start_key)

    def loss(params, key, num_particles, path):
        draw = flow.sample(key, {**variables, "params": params}, (num_particles,), with_log_prob=True, with_score=path)
        log_q = path_log_prob(draw) if path else draw.log_prob
        return backend.xp.mean(log_q - flow.log_prob(target, draw.x))

    init, update = optim.adam(optim.cosine(1e-2, options.steps))

    def step(params, state, key):
        value, grads = backend.value_and_grad(lambda p: loss(p, key, 64, True), params)
        updates, state = update(grads, state)
        return optim.apply(params, updates), state, value

    def gradient(params, key, path):
        grads = backend.value_and_grad(lambda p: loss(p, key, 1, path), params)[1]
        return backend.xp.concat([backend.xp.reshape(g, (-1,)) for g in tree.leaves(grads)])

    step = backend.jit(step)
    plain, path = (backend.jit(lambda p, k, path=path: gradient(p, k, path)) for path in (False, True))
    params, state = variables["params"], init(variables["params"])
    record = []
    for i in range(options.steps + 1):
        key, rng = backend.split(rng, 2)
        if i % max(options.steps // 10, 1) == 0:
            keys = backend.split(key, 100)
            record.append((i, *(_variance(backend, f, params, keys) for f in (plain, path))))
            print("step {:5d}   variance: plain {:.3g}, path {:.3g}".format(*record[-1]), flush=True)
        params, state, _ = step(params, state, key)
    _draw(np.array(record), options.output)


def _start(framework: str):
    if framework == "jax":
        import jax

        return get_backend("jax"), jax.random.key(0)
    import torch

    return get_backend("torch"), torch.Generator().manual_seed(0)


def _perturbed(backend, variables):
    noise = np.random.default_rng(0)
    return tree.map(lambda a: a + backend.asarray(0.2 * noise.normal(size=tuple(a.shape)), a), variables)


def _variance(backend, gradient, params, keys) -> float:
    grads = np.stack([backend.to_numpy(gradient(params, key)) for key in keys])
    return float(grads.var(axis=0).sum())


def _draw(record: np.ndarray, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.semilogy(record[:, 0], record[:, 1], label='gradient="reparam"')
    axes.semilogy(record[:, 0], record[:, 2], label='gradient="path"')
    axes.set(xlabel="step", ylabel="variance of the gradient, one particle")
    axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "path_gradients.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
