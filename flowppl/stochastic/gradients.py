"""Gradients for the layers of a path: by energy, by samples, and for each map alone."""

from __future__ import annotations

from typing import Any

from flowppl import tree, weights
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import Bijection, bind
from flowppl.flows.flow import exemplar
from flowppl.kernels.target import LogProb, is_possible
from flowppl.objectives.reverse_kl import Estimate
from flowppl.stochastic.moves import UNADJUSTED, Moves
from flowppl.stochastic.path import Path, Run, finished, with_decisions
from flowppl.stochastic.walk import At, begin, known, log_weights, mapped, moved, resampled, there

_RESAMPLE_BELOW = 0.5
_ACCEPTANCE = {
    "metropolis": 0.35,
    "mala": 0.6,
    "hmc": 0.8,
    "langevin": 0.9,
    "underdamped": 0.9,
}  # to which steps are led


def by_energy(
    path: Path, variables: dict[str, Any], log_prob: LogProb, rng: Any, n: int, *, decisions: bool = False
) -> tuple[Estimate, Any]:
    """The gradient of E[-log w] over paths from the base: the divergence of the paths there from those back from the target.

    Derivatives go through the dynamics, hence need second ones of the target. A decision to accept or not has none, and leaving out
    how its probability changes biases the gradient; `decisions` brings that in, by its score with the mean of the other paths as a
    baseline. Step sizes of moves that decide follow their acceptance instead. Wu, Koehler & Noe 2020, equation 12 (J_KL).

    Args:
        path: What to train.
        variables: Its variables.
        log_prob: Log density of the target, unnormalised.
        rng: A jax key, or a `torch.Generator`.
        n: Paths.
        decisions: Whether to count how decisions depend on parameters.

    Returns:
        The estimate, with E[log w] as its ELBO, and gradients like `variables["params"]`.
    """
    backend = backend_of(tree.leaves(variables["params"])[0])

    def loss(params: Any) -> tuple[Array, Run]:
        run = path.forward(rng, {**variables, "params": params}, log_prob, n, attached=True)
        log_w, count = _finite(with_decisions(run) if decisions else run)
        return -backend.xp.sum(log_w) / count, run

    (_, run), grads = backend.value_and_grad(loss, variables["params"], has_aux=True)
    return _estimate(run, 1.0), _led(path, grads, run.acceptance, [m for m in _ACCEPTANCE if m not in UNADJUSTED])


def by_samples(path: Path, variables: dict[str, Any], log_prob: LogProb, rng: Any, x: Array) -> tuple[Estimate, Any]:
    """The gradient of E[log w] over paths back from samples of the target: maximum likelihood, of whole paths.

    Wu, Koehler & Noe 2020, equation 13 (J_ML). See `by_energy`; samples are `(n, dim)`, and the ELBO of the estimate is E[-log w],
    at most minus the log of the target's normalising constant.
    """
    backend = backend_of(x)

    def loss(params: Any) -> tuple[Array, Run]:
        run = path.backward(rng, {**variables, "params": params}, log_prob, x, attached=True)
        log_w, count = _finite(run)
        return backend.xp.sum(log_w) / count, run

    (_, run), grads = backend.value_and_grad(loss, variables["params"], has_aux=True)
    return _estimate(run, -1.0), _led(path, grads, run.acceptance, [m for m in _ACCEPTANCE if m not in UNADJUSTED])


def by_layer(path: Path, variables: dict[str, Any], log_prob: LogProb, rng: Any, n: int) -> tuple[Estimate, Any]:
    """The gradient of each map's own divergence: of its image of the density before it from the density after it.

    Particles go through the path with weights, are resampled where few are left that count, and every map is to take the weighted
    ones before it to the density of the moves behind it. No derivative goes through the moves, so they may decide, and no second
    derivative of the target is needed; a `Diffusion` stays as it is. The gradients are path gradients, from the scores that walkers
    have anyway: they vanish, without noise, where a map is right. Step sizes are led to an acceptance. Arbel, Matthews & Doucet
    2021, "Annealed flow transport Monte Carlo"; Matthews et al. 2022, "Continual repeated annealed flow transport Monte Carlo",
    algorithm 2.

    See `by_energy` for arguments and results; `fisher` is the sum over maps of E |difference of scores|^2.
    """
    params, like = bind(variables), exemplar(variables)
    backend = backend_of(like)
    xp = backend.xp
    bridge = path.bridge(backend.stop(params), log_prob, like)
    start, rng = backend.split(rng, 2)
    at = begin(bridge, backend.stop(bridge.sample(start, n)))
    grads, seen, fisher = [], [], xp.zeros_like(at.ratio[0])
    rows = zip(
        path.layers, variables["params"]["layers"], variables["const"]["layers"], path.ends(params, like), strict=True
    )
    for layer, mine, const, (_, beta) in rows:
        beta = backend.stop(beta)
        choice, key, rng = backend.split(rng, 3)
        if isinstance(layer, Bijection):
            at, gap, slope = _transported(layer, mine, const, bridge, at, beta)
            grads.append(slope)
            fisher = fisher + gap
            continue
        fixed = backend.stop(mine)
        grads.append(tree.map(xp.zeros_like, fixed))
        if isinstance(layer, Moves):
            at = resampled(choice, bridge, known(bridge, at._replace(beta=beta), True), _RESAMPLE_BELOW)
            at, info = backend.stop(moved(key, bridge, at, layer, fixed))
            seen.append(info)
        else:
            at = mapped(at._replace(beta=beta), *there(layer, key, fixed, at.x))
            at = backend.stop(known(bridge, at, True))
    run = finished(bridge, at, seen)
    zeros = tree.map(xp.zeros_like, backend.stop(variables["params"]))
    whole = _led(path, {**zeros, "layers": tuple(grads)}, run.acceptance, _ACCEPTANCE)
    return _estimate(run, 1.0)._replace(fisher=fisher), whole


def _transported(layer: Bijection, params: Any, const: Any, bridge: Any, at: At, beta: Array) -> tuple[At, Array, Any]:
    """The paths after a map, E |difference of scores|^2, and the gradient of the map's divergence."""
    backend = backend_of(at.x)
    xp = backend.xp
    if at.walkers is None:  # at the base
        log_w, score = xp.zeros_like(at.ratio), backend.value_and_score(bridge.log_base, at.x)[1]
    else:
        log_w, score = log_weights(bridge, at), bridge.at(at.beta).score(at.walkers)

    def move(params: Any) -> tuple[Any, Array]:
        bound = bind({"params": params, "const": const})
        y, log_det, score_y, _ = layer.forward_with_score(bound, at.x, score)
        return (y, log_det), score_y

    (y, log_det), pull, score_y = backend.vjp(move, backend.stop(params), has_aux=True, once=True)
    y, log_det, score_y = backend.stop((y, log_det, score_y))
    after = backend.stop(known(bridge, mapped(at, y, log_det)._replace(beta=beta), True))
    gap = score_y - bridge.at(beta).score(after.walkers)
    fine = xp.all(xp.isfinite(gap), axis=-1) & is_possible(after.walkers.log_probs)
    gap = xp.where(fine[:, None], gap, xp.zeros_like(gap))
    share = weights.normalize(xp.where(fine, log_w, -xp.inf))[:, None]
    (grads,) = pull((share * gap, xp.zeros_like(log_det)))
    return after, xp.sum(share * gap * gap), grads


def _finite(run: Run) -> tuple[Array, Array]:
    """Log-weights, zero where they are not finite, and how many are."""
    xp = backend_of(run.log_w).xp
    fine = xp.isfinite(run.log_w)
    count = xp.sum(xp.astype(fine, run.log_w.dtype))
    return xp.where(fine, run.log_w, xp.zeros_like(run.log_w)), xp.maximum(count, xp.ones_like(count))


def _estimate(run: Run, sign: float) -> Estimate:
    xp = backend_of(run.log_w).xp
    log_w, count = _finite(backend_of(run.log_w).stop(run))
    zero = xp.zeros_like(count)
    lost = 1 - xp.mean(xp.astype(xp.isfinite(run.log_w), log_w.dtype))
    return Estimate(sign * xp.sum(log_w) / count, zero, lost, zero)


def _led(path: Path, grads: Any, acceptance: Array, kernels: Any) -> Any:
    """The gradients with those of step sizes, for these kernels, replaced by what leads them to their acceptance."""
    found, j = [], 0
    for layer, own in zip(path.layers, grads["layers"], strict=True):
        if isinstance(layer, Moves):
            own = {"log_step": _ACCEPTANCE[layer.kernel] - acceptance[j]} if layer.kernel in kernels else own
            j += 1
        found.append(own)
    return {**grads, "layers": tuple(found)}
