"""Learning a model by variational importance sampling, the importance-weighted bound and the ELBO, under too simple a guide.

    python -m benchmarks learning [--seeds 5] [--steps 2000] [--rate 0.01]

Two models are learnt from data that they made, so that the log-likelihood of held-out data under the truth is known. The guide is a
normal without correlations, from a network that reads the data: what it cannot be, the ELBO wants the posterior not to be. "vis"
fits the guide by the forward chi-square divergence (Li et al. 2024); "plain" are gradients that are not doubly reparametrised. All
objectives have the same particles, steps, batches and rate. Nothing of the guide is left in the judgement: held-out log-likelihoods
are by quadrature (mixture) or by a particle filter (neurons).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax
from jax.scipy.special import logsumexp
from numpyro.infer import SVI

from flowppl.numpyro import Objective
from flowppl.objectives import programs
from flowppl.objectives.programs import Program

PARTICLES, BATCH, TRAINING, HELD_OUT, HIDDEN = 50, 50, 1000, 500, 32
COMPONENTS, ITEMS, NODES = 4, 8, 32  # of the mixture, nodes of a quadrature in each of its two dimensions
BINS, SEEN, UNSEEN, FILTER = 8, 5, 2, 1000  # of time, neurons that are recorded or not, particles of the filter
Array = Any
Params = dict[str, Array]


OBJECTIVES = {
    "elbo": (programs.elbo(), "path"),
    "iwae, plain": (programs.iwae(), "reparam"),
    "iwae": (programs.iwae(), "path"),
    "vis": (programs.vis(), "path"),
}


@dataclass(frozen=True)
class Task:
    """A model that is learnt.

    Attributes:
        truth: Parameters that make data, from a key.
        start: Parameters that learning starts from.
        latent: Shape of the model's one latent site, "z".
        model: From parameters and data `(n, ...)` to the sites.
        data: Draws data: from a key, parameters and n.
        log_likelihood: From a key, parameters and data, to that of each datum.
    """

    truth: Callable[[Array], Params]
    start: Callable[[Array], Params]
    latent: tuple[int, ...]
    model: Callable[[Params, Array], None]
    data: Callable[[Array, Params, int], Array]
    log_likelihood: Callable[[Array, Params, Array], Array]


def mixture_model(p: Params, x: Array) -> None:
    """Eight yes-or-no answers to a point in the plane, which is from a mixture of normals."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", _points(p))
        numpyro.sample("x", dist.Bernoulli(logits=z @ p["weights"] + p["bias"]).to_event(1), obs=x)


def mixture_data(key: Array, p: Params, n: int) -> Array:
    of_z, of_x = jax.random.split(key)
    z = _points(p).sample(of_z, (n,))
    return dist.Bernoulli(logits=z @ p["weights"] + p["bias"]).sample(of_x) * 1.0


def _points(p: Params) -> dist.Distribution:
    parts = dist.Normal(p["mean"], jnp.exp(p["log_sd"])).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=p["logits"]), parts)


def mixture_truth(key: Array) -> Params:
    k = jax.random.split(key, 3)
    angle = 2 * jnp.pi * jnp.arange(COMPONENTS) / COMPONENTS
    return {
        "logits": 0.5 * jax.random.normal(k[0], (COMPONENTS,)),
        "mean": 3 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1),
        "log_sd": jnp.full((COMPONENTS, 2), jnp.log(0.5)),
        "weights": jax.random.normal(k[1], (2, ITEMS)),
        "bias": 0.5 * jax.random.normal(k[2], (ITEMS,)),
    }


def mixture_start(key: Array) -> Params:
    k = jax.random.split(key, 2)
    return {
        "logits": jnp.zeros(COMPONENTS),
        "mean": jax.random.normal(k[0], (COMPONENTS, 2)),
        "log_sd": jnp.zeros((COMPONENTS, 2)),
        "weights": 0.5 * jax.random.normal(k[1], (2, ITEMS)),
        "bias": jnp.zeros(ITEMS),
    }


def mixture_log_likelihood(key: Array, p: Params, x: Array) -> Array:
    """Gauss and Hermite's rule in each component."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    grid = jnp.stack(jnp.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    log_weights = jnp.log(np.outer(weights, weights / (2 * np.pi)).reshape(-1))

    def component(mean: Array, log_sd: Array) -> Array:
        logits = (mean + jnp.exp(log_sd) * grid) @ p["weights"] + p["bias"]
        answers = x @ logits.T - jnp.sum(jax.nn.softplus(logits), -1)
        return logsumexp(answers + log_weights, axis=1)

    each = lax.map(lambda of: component(*of), (p["mean"], p["log_sd"]))
    return logsumexp(each + jax.nn.log_softmax(p["logits"])[:, None], axis=0)


def drive(p: Params, hidden: Array, counts: Array) -> Array:
    """Means of the hidden neurons, from all of a bin before."""
    return hidden @ p["hidden_hidden"] + jnp.tanh(counts / 2) @ p["seen_hidden"] + p["hidden_bias"]


def rates(p: Params, hidden: Array, before: Array) -> Array:
    """Rates of the recorded neurons, from the hidden ones of this bin and the recorded ones of the bin before."""
    return jax.nn.softplus(hidden @ p["hidden_seen"] + jnp.tanh(before / 2) @ p["seen_seen"] + p["bias"]) + 1e-3


def neurons_model(p: Params, x: Array) -> None:
    """Spike counts of five neurons, a generalised linear model with two more whose activity nobody recorded."""
    with numpyro.plate("data", len(x)):
        shape = BINS, UNSEEN
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.independent(dist.constraints.real, 2), (), shape))
        hidden, before = (jnp.pad(a[:, :-1], ((0, 0), (1, 0), (0, 0))) for a in (z, x))
        numpyro.factor("moves", dist.Normal(drive(p, hidden, before), 1.0).to_event(2).log_prob(z))
        numpyro.sample("x", dist.Poisson(rates(p, z, before)).to_event(2), obs=x)


def neurons_data(key: Array, p: Params, n: int) -> Array:
    def step(state: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        (hidden, before), (move, spike) = state, jax.random.split(key)
        hidden = drive(p, hidden, before) + jax.random.normal(move, hidden.shape)
        counts = dist.Poisson(rates(p, hidden, before)).sample(spike) * 1.0
        return (hidden, counts), counts

    start = jnp.zeros((n, UNSEEN)), jnp.zeros((n, SEEN))
    return jnp.swapaxes(lax.scan(step, start, jax.random.split(key, BINS))[1], 0, 1)


def _neurons(key: Array, scale: float, memory: float, bias: float) -> Params:
    k = jax.random.split(key, 3)
    return {
        "hidden_hidden": memory * jnp.eye(UNSEEN),
        "hidden_bias": jnp.zeros(UNSEEN),
        "seen_hidden": scale * jax.random.normal(k[0], (SEEN, UNSEEN)),
        "hidden_seen": scale * jax.random.normal(k[1], (UNSEEN, SEEN)),
        "seen_seen": scale * jax.random.normal(k[2], (SEEN, SEEN)),
        "bias": jnp.full(SEEN, bias),
    }


def neurons_log_likelihood(key: Array, p: Params, x: Array) -> Array:
    """A bootstrap particle filter for each sequence."""

    def step(state: tuple[Array, Array], this: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (hidden, before), (key, counts) = state, this
        move, choose = jax.random.split(key)
        hidden = drive(p, hidden, before) + jax.random.normal(move, hidden.shape)
        log_w = dist.Poisson(rates(p, hidden, before)).log_prob(counts).sum(-1)
        # Systematic resampling.
        edges = jnp.cumsum(jax.nn.softmax(log_w))
        at = jnp.searchsorted(edges, (jnp.arange(FILTER) + jax.random.uniform(choose)) / FILTER * edges[-1])
        return (hidden[jnp.minimum(at, FILTER - 1)], counts), logsumexp(log_w) - jnp.log(FILTER)

    def one(of: tuple[Array, Array]) -> Array:
        key, x = of
        start = jnp.zeros((FILTER, UNSEEN)), jnp.zeros(SEEN)
        return jnp.sum(lax.scan(step, start, (jax.random.split(key, BINS), x))[1])

    return lax.map(one, (jax.random.split(key, len(x)), x))


TASKS = {
    "mixture": Task(mixture_truth, mixture_start, (2,), mixture_model, mixture_data, mixture_log_likelihood),
    "neurons": Task(
        partial(_neurons, scale=1.0, memory=0.8, bias=0.5),
        partial(_neurons, scale=0.1, memory=0.0, bias=0.5),
        (BINS, UNSEEN),
        neurons_model,
        neurons_data,
        neurons_log_likelihood,
    ),
}


def network(name: str, key: Array, x: Array, outputs: int) -> Array:
    """A perceptron with its parameters."""
    k = jax.random.split(key, 2)
    sizes = x.shape[-1], HIDDEN, outputs
    for i, (a, b) in enumerate(pairwise(sizes)):
        weights = numpyro.param(f"{name}$w{i}", jax.random.normal(k[i], (a, b)) * (0.1 if i else 1.0) / a**0.5)
        x = (jax.nn.tanh(x) if i else x) @ weights + numpyro.param(f"{name}$b{i}", jnp.zeros(b))
    return x


def learn(
    task: Task, objective: tuple[Program, str], steps: int, rate: float, key: Array
) -> tuple[Params, Params, Array]:
    """The truth, what was learnt, and held-out data."""
    k = jax.random.split(key, 6)
    truth, start, size = task.truth(k[0]), task.start(k[1]), int(np.prod(task.latent))
    training, held_out = task.data(k[2], truth, TRAINING), task.data(k[3], truth, HELD_OUT)

    def model(x: Array) -> None:
        task.model({name: numpyro.param(name, value) for name, value in start.items()}, x)

    def guide(x: Array) -> None:
        out = network("guide", k[1], x.reshape(len(x), -1), 2 * size).reshape(len(x), 2, *task.latent)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(out[:, 0], jnp.exp(out[:, 1])).to_event(len(task.latent)))

    program, gradient = objective
    loss = Objective(program, PARTICLES, gradient=gradient, biased=True)
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(rate, steps)), loss)

    def step(state: Any, key: Array) -> tuple[Any, None]:
        return svi.update(state, jax.random.choice(key, training, (BATCH,), replace=False))[0], None

    state, _ = lax.scan(step, svi.init(k[4], training[:BATCH]), jax.random.split(k[5], steps))
    params = svi.get_params(state)
    return truth, {name: params[name] for name in start}, held_out


def mean_and_error(x: np.ndarray) -> str:
    return f"{np.mean(x):+.3f} ± {np.std(x, ddof=1) / len(x) ** 0.5:.3f}"


def main(arguments: Sequence[str]) -> None:
    """Learns both models by all objectives, all seeds at once, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks learning", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=1e-2)
    options = parser.parse_args(arguments)
    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds))
    print(
        f"{options.seeds} seeds of truth, data and start; {TRAINING} data for learning, {HELD_OUT} held out; {PARTICLES} "
        f"particles, batches of {BATCH}, {options.steps} steps of Adam, its rate falling from {options.rate} as half a cosine.\n"
    )
    columns = ["model", "objective", "held out, nats", "to the truth", "to the ELBO", "to vis", "seconds"]
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}", flush=True)
    for name in options.tasks:
        task, found, seconds = TASKS[name], {}, {}
        judge = jax.jit(jax.vmap(task.log_likelihood))
        for label, objective in OBJECTIVES.items():
            start = time.perf_counter()
            truth, learnt, held_out = jax.block_until_ready(
                jax.jit(jax.vmap(partial(learn, task, objective, options.steps, options.rate)))(keys)
            )
            seconds[label] = time.perf_counter() - start
            found[label] = np.asarray(judge(keys, learnt, held_out)).mean(1)
        best = np.asarray(judge(keys, truth, held_out)).mean(1)
        print(f"| {name} | the truth | {mean_and_error(best)} | | | | |")
        for label, of in found.items():
            beside = (mean_and_error(of - other) for other in (best, found["elbo"], found["vis"]))
            print(
                f"| {name} | {label} | {mean_and_error(of)} | {' | '.join(beside)} | {seconds[label]:.0f} |", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])
