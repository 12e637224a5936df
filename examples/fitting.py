"""What the small experiments share: a framework by name, two ways to fit a flow, and how pictures are kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowppl import optim, tree
from flowppl.backend import get_backend
from flowppl.flows import Flow
from flowppl.objectives import path_log_prob

Array = Any
CHUNK = 20_000  # points that a flow draws or scores at a time


def arguments(description: str | None, steps: int, draws: int = 0) -> argparse.ArgumentParser:
    """The options that all of the experiments have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=["jax", "torch"], default="jax")
    parser.add_argument("--steps", type=int, default=steps, help="of training, for each flow")
    if draws:
        parser.add_argument("--draws", type=int, default=draws, help="for the numbers")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder of the pictures")
    return parser


def start(framework: str, seed: int = 0) -> tuple[Any, Any]:
    """The backend and its generator of random numbers."""
    if framework == "jax":
        import jax

        return get_backend("jax"), jax.random.key(seed)
    import torch

    return get_backend("torch"), torch.Generator().manual_seed(seed)


class Fitted:
    """A flow with its variables: trained by one of two methods, then asked for draws and densities in numpy."""

    def __init__(self, backend: Any, rng: Any, flow: Flow) -> None:
        self.backend, self.flow = backend, flow
        key, self._rng = backend.split(rng, 2)
        self.variables = flow.init(key)
        self.seconds = 0.0  # CPU time of the training, compilation included
        self._log_prob = backend.jit(flow.log_prob)
        self._sample = backend.jit(lambda v, key: flow.sample(key, v, (CHUNK,), with_log_prob=True)[:2])

    @property
    def num_params(self) -> int:
        """How many numbers are learned."""
        return sum(int(np.prod(leaf.shape)) for leaf in tree.leaves(self.variables["params"]))

    def key(self) -> Any:
        """A fresh key."""
        key, self._rng = self.backend.split(self._rng, 2)
        return key

    def maximise_likelihood(self, data: np.ndarray, steps: int, batch: int = 512, rate: float = 3e-3) -> Fitted:
        """Trains on batches of the rows of `data`, the same ones in every framework."""
        rng = np.random.default_rng(0)
        data = data.astype(np.float32)

        def loss(params: Any, x: Array) -> Array:
            return -self.backend.xp.mean(self.flow.log_prob({**self.variables, "params": params}, x))

        return self._train(loss, lambda: self._array(data[rng.integers(len(data), size=batch)]), steps, rate)

    def maximise_elbo(
        self, log_target: Callable[[Array], Array], steps: int, particles: int = 256, rate: float = 3e-3
    ) -> Fitted:
        """Trains by the path gradient of the ELBO of an unnormalised density."""

        def loss(params: Any, key: Any) -> Array:
            draw = self.flow.sample(key, {**self.variables, "params": params}, (particles,), with_score=True)
            return self.backend.xp.mean(path_log_prob(draw) - log_target(draw.x))

        return self._train(loss, self.key, steps, rate)

    def _train(self, loss: Callable, inputs: Callable[[], Any], steps: int, rate: float) -> Fitted:
        began = time.process_time()
        init, update = optim.chain(optim.clip_by_global_norm(10.0), optim.adam(optim.cosine(rate, steps)))

        @self.backend.jit
        def step(params: Any, state: Any, given: Any) -> tuple[Any, Any]:
            _, grads = self.backend.value_and_grad(loss, params, given)
            updates, state = update(grads, state)
            return optim.apply(params, updates), state

        params = self.variables["params"]
        state = init(params)
        for _ in range(steps):
            params, state = step(params, state, inputs())
        self.variables = {**self.variables, "params": self.backend.stop(params)}
        tree.map(self.backend.to_numpy, self.variables["params"])  # waits for the last step
        self.seconds = time.process_time() - began
        return self

    def draws(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws `(n, dim)` and their log densities."""
        parts = [self._sample(self.variables, self.key()) for _ in range(-(-n // CHUNK))]
        x, log_prob = (np.concatenate([self._numpy(p[i]) for p in parts])[:n] for i in range(2))
        return x, log_prob

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Log densities of the rows of x."""
        x = x.astype(np.float32)
        parts = [self._log_prob(self.variables, self._array(x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)]
        return np.concatenate([self._numpy(p) for p in parts])

    def push(self, z: np.ndarray) -> np.ndarray:
        """Where points of the base go."""
        return self._numpy(self.flow.push(self.variables, self._array(z.astype(np.float32))).x)

    def _array(self, x: np.ndarray) -> Array:
        return self.backend.asarray(self.backend.xp.asarray(x))

    def _numpy(self, x: Array) -> np.ndarray:
        return self.backend.to_numpy(self.backend.stop(x)).astype(np.float64)


def save(figure: Any, path: Path, colors: int = 0) -> None:
    """Writes a picture; with a number of colours, as a palette, which is small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not colors:
        figure.savefig(path, bbox_inches="tight")
        return
    from PIL import Image  # matplotlib needs it too

    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)


def pyplot() -> Any:
    """matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
