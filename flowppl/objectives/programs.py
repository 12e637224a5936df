"""Variational objectives as programs: functions of log-weights over particles, with the weights that their gradients give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowppl.backend import Array, backend_of
from flowppl.objectives.path import check_gradient
from flowppl.objectives.score import leave_one_out
from flowppl.weights import log_mean_exp, normalize

LogWeights = Array  # log p - log q of independent particles, (K, *batch)
_TINY, _TINIEST = 1e-12, 1e-30  # beside the largest weight, and at all
_DEAD = -1e3  # a log-ratio whose exponential is zero
Value = Callable[[LogWeights], Array]  # to (*batch,)


class Weights(NamedTuple):
    """What multiplies each particle's gradient, both `(K, *batch)`."""

    model: Array  # d log p / d (parameters of the model)
    guide: Array  # the path gradient of log p - log q in the parameters of the guide


@dataclass(frozen=True)
class Program:
    """An objective, to be maximised.

    For any function phi of the log-weights of independent particles, the gradient of E[phi] in the guide's parameters is the
    mean over particles of their path gradients, weighted by d phi / dl_k - d^2 phi / dl_k^2; in the model's parameters it has the
    weights d phi / dl_k. For the importance-weighted bound that is the doubly reparametrised gradient of Tucker et al. 2018; the
    rule is theirs, applied to each particle in turn.

    Attributes:
        value: phi, from log-weights `(K, *batch)` to `(*batch,)`, each element of the batch by itself, in operations that the
            framework can differentiate, and map over (`vmap`) where guides have scored sites.
        weights: The weights of the gradients; None for those of the rule.
        unbiased: Whether the gradients are those of the mean of `value`.
        linear: Whether `value` is linear, so that it does not matter over which plates log-weights are summed before.
    """

    value: Value
    weights: Callable[[LogWeights], Weights] | None = None
    unbiased: bool = True
    linear: bool = False

    def __call__(self, log_w: LogWeights) -> tuple[Array, Weights]:
        """The value and the weights of the gradients, without derivatives."""
        log_w = backend_of(log_w).stop(log_w)
        return self.value(log_w), derived(self.value, log_w) if self.weights is None else self.weights(log_w)


def derived(value: Value, log_w: LogWeights) -> Weights:
    """The weights of the gradients of E[phi], by differentiating phi twice; see `Program`."""
    backend, k = backend_of(log_w), log_w.shape[0]
    xp = backend.xp
    first, pull = backend.vjp(lambda log_w: slope(value, log_w), log_w)
    one_hot = backend.asarray(xp.eye(k, dtype=log_w.dtype), log_w)
    rows = xp.broadcast_to(xp.reshape(one_hot, (k, k) + (1,) * (log_w.ndim - 1)), (k, *log_w.shape))
    # Elements of the batch do not mix, so that one pullback yields the row of each of them.
    second = xp.sum(rows * backend.vmap(lambda row: pull(row)[0])(rows), axis=1)
    return backend.stop(Weights(first, first - second))


def slope(value: Value, log_w: LogWeights) -> Array:
    """The derivative of phi, element by element of the batch."""
    out, pull = backend_of(log_w).vjp(value, log_w)
    return pull(backend_of(log_w).xp.ones_like(out))[0]


def elbo() -> Program:
    """The evidence lower bound, E[l]: reverse Kullback-Leibler divergence, with the gradient of Roeder et al. 2017."""

    def weights(log_w: LogWeights) -> Weights:
        each = backend_of(log_w).xp.ones_like(log_w) / log_w.shape[0]
        return Weights(each, each)

    return Program(lambda log_w: backend_of(log_w).xp.mean(log_w, axis=0), weights, linear=True)


def iwae() -> Program:
    """The importance-weighted bound log 1/K sum exp(l_k). Burda et al. 2016; gradient of Tucker et al. 2018."""
    return renyi(0.0)


def renyi(alpha: float) -> Program:
    """The variational Renyi bound 1/(1 - alpha) log 1/K sum exp((1 - alpha) l_k): between IWAE (0) and the ELBO (towards 1).

    Li & Turner 2016; as a bound for finite K, Daudel et al. 2023, "Alpha-divergence variational inference meets importance weighted
    auto-encoders".

    Raises:
        ValueError: alpha is one (take `elbo`).
    """
    if alpha == 1:
        raise ValueError("alpha is one, where the Renyi bound is the ELBO: use elbo()")

    def value(log_w: LogWeights) -> Array:
        return log_mean_exp((1 - alpha) * log_w, axis=0) / (1 - alpha)

    def weights(log_w: LogWeights) -> Weights:
        w = normalize((1 - alpha) * log_w, axis=0)
        return Weights(w, alpha * w + (1 - alpha) * w * w)

    return Program(value, weights)


def cubo(order: float = 2.0) -> Program:
    """Minus the chi upper bound of order n, 1/n log 1/K sum exp(n l_k): a guide that covers the posterior's mass.

    Its gradients are those of E_q (p / q)^n over the same mean. That of the bound itself, from K particles, pushes a particle away
    whose weight outdoes all others, as if there were too much of the guide, where there is too little. The model gradient pushes
    the bound down, so learn no model with it: see `vis`. Dieng et al. 2017, "Variational inference via chi upper bound
    minimization".

    Raises:
        ValueError: the order is not above one.
    """
    if not order > 1:
        raise ValueError(f"order must be above one, got {order}")

    def weights(log_w: LogWeights) -> Weights:
        w = normalize(order * log_w, axis=0)
        return Weights(-w, (order - 1) * w)

    return Program(lambda log_w: -log_mean_exp(order * log_w, axis=0) / order, weights, unbiased=False)


def vis() -> Program:
    """Variational importance sampling: the guide by the forward chi-square divergence, the model by log 1/K sum exp(l_k).

    The guide that is best for estimating the evidence by importance sampling, and the model that this estimate is largest for. The
    value is the estimate. Li et al. 2024, "Forward chi-square divergence based variational importance sampling".
    """
    chi2, bound = cubo(2.0), iwae()
    return Program(bound.value, lambda log_w: Weights(bound(log_w)[1].model, chi2(log_w)[1].guide), unbiased=False)


def rws() -> Program:
    """Reweighted wake-sleep: model by log 1/K sum exp(l_k), guide by the forward Kullback-Leibler divergence.

    The latter from self-normalised weights, with a bias of order 1/K. Bornschein & Bengio 2015; gradient of Tucker et al. 2018.
    """

    def weights(log_w: LogWeights) -> Weights:
        w = normalize(log_w, axis=0)
        return Weights(w, w - w * w)

    return Program(lambda log_w: log_mean_exp(log_w, axis=0), weights, unbiased=False)


def f_divergence(f: Callable[[Array], Array]) -> Program:
    """Minus 1/K sum f(w_k / mean w), an f-divergence E_q f(p / q) with the evidence estimated by the mean weight.

    Args:
        f: From log(p / q) to f(p / q), element by element; convex in p / q, and zero at zero.
    """

    def value(log_w: LogWeights) -> Array:
        xp = backend_of(log_w).xp
        log_ratio = log_w - log_mean_exp(log_w, axis=0)[None]
        # Where the model has no density, f is asked for its value at as good as zero: 0 log 0 is not a number.
        return -xp.mean(f(xp.where(log_w == -math.inf, _DEAD, log_ratio)), axis=0)

    return Program(value)


def jensen_shannon() -> Program:
    """Minus the Jensen-Shannon divergence; between covering and seeking modes, with gradients that are bounded in p / q."""

    def f(log_ratio: Array) -> Array:
        backend = backend_of(log_ratio)
        ratio = backend.xp.exp(log_ratio)
        return 0.5 * (ratio * log_ratio - (1 + ratio) * (backend.softplus(log_ratio) - math.log(2)))

    return f_divergence(f)


def alpha_divergence(alpha: float) -> Program:
    """Minus Amari's alpha-divergence: reverse Kullback-Leibler at 0, forward at 1, half of chi-square at 2.

    Raises:
        ValueError: alpha is zero (take `elbo`) or one (take `rws`).
    """
    if alpha in (0, 1):
        raise ValueError(f"alpha is {alpha}, where the divergence is a limit: use elbo() for 0, rws() for 1")

    def f(log_ratio: Array) -> Array:
        xp = backend_of(log_ratio).xp
        return (xp.exp(alpha * log_ratio) - alpha * xp.exp(log_ratio) - (1 - alpha)) / (alpha * (alpha - 1))

    return f_divergence(f)


def tail_adaptive(beta: float = -1.0) -> Program:
    """An f-divergence whose f follows the tail of the weights: particles weigh P(w > w_k)^beta, whatever the weights' variance.

    The value is the ELBO, whose gradient the model has. Wang, Liu & Liu 2018, "Variational inference with
    tail-adaptive f-divergence".

    Raises:
        ValueError: beta is not negative.
    """
    if not beta < 0:
        raise ValueError(f"beta must be negative, got {beta}")
    bound = elbo()

    def weights(log_w: LogWeights) -> Weights:
        backend = backend_of(log_w)
        xp = backend.xp
        # Ranks, ties alike: the share of particles whose weight is no smaller.
        share = xp.mean(xp.astype(log_w[None] >= log_w[:, None], log_w.dtype), axis=1)
        guide = share**beta
        return Weights(bound(log_w)[1].model, guide / xp.sum(guide, axis=0))

    return Program(bound.value, weights, unbiased=False)


def mixture(parts: Sequence[tuple[float, Program]]) -> Program:
    """A weighted sum of objectives, such as `mixture([(0.9, elbo()), (0.1, jensen_shannon())])`."""

    def weights(log_w: LogWeights) -> Weights:
        each = [(share, program(log_w)[1]) for share, program in parts]
        return Weights(*(sum(share * w[i] for share, w in each) for i in (0, 1)))

    return Program(
        lambda log_w: sum(share * program.value(log_w) for share, program in parts),
        weights,
        unbiased=all(program.unbiased for _, program in parts),
        linear=all(program.linear for _, program in parts),
    )


PROGRAMS: dict[str, Callable[..., Program]] = {
    "elbo": elbo,
    "iwae": iwae,
    "cubo": cubo,
    "vis": vis,
    "rws": rws,
    "jensen_shannon": jensen_shannon,
    "tail_adaptive": tail_adaptive,
}


def get(program: str | Program | Value) -> Program:
    """The program of a name, of a function of log-weights, or itself.

    Raises:
        ValueError: there is none of this name.
        TypeError: it is none of these.
    """
    if isinstance(program, str):
        if program not in PROGRAMS:
            raise ValueError(f"an objective must be one of {', '.join(PROGRAMS)}, or a function, got {program!r}")
        return PROGRAMS[program]()
    if isinstance(program, Program):
        return program
    if callable(program):
        return Program(program)
    raise TypeError(f"an objective is a name, a Program or a function of log-weights, got {type(program).__name__}")


def requested(program: str | Program | Value, gradient: str, biased: bool) -> Program:
    """The program that a loss asks for, if there is a gradient of this kind for it.

    Raises:
        ValueError: there is no such program or gradient, or the program is biased and that was not asked for.
    """
    check_gradient(gradient)
    found = get(program)
    if not found.unbiased and gradient != "path":
        raise ValueError(f'the gradients of this program are not those of its value: it has "path", no {gradient!r}')
    if not found.unbiased and not biased and not isinstance(program, str):
        raise ValueError(
            "the gradients of this program are not those of its value: pass biased=True if they may differ"
        )
    return found


class Cotangents(NamedTuple):
    """A program's value `(*batch,)`, and what pulls its gradient back, each `(K, *batch)`."""

    value: Array
    model: Array  # of log p, to the model's parameters; nowhere zero, so that what it gives the latents can be rescaled
    latents: Array  # of log p, to the latents
    frozen: Array  # of log q as a function of the latents, with the guide's parameters frozen
    plain: Array  # of log q as a function of the guide's parameters altogether
    reverse: Array  # of log r, to the parameters of reverse programs, where the draw might come from; see `marginal`
    score: Any = None  # where asked for: of log q of scored sites, as a function of the guide's parameters altogether
    summed: Any = None  # of log q of sites that are summed out, alike
    others: Any = None  # of log r where the draw comes from the reverse program


def cotangents(
    program: Program, log_w: LogWeights, coefficient: Any, *, scored: bool = False, reverse: bool = False
) -> Cotangents:
    """The gradient of a program: the path gradient at coefficient zero, the plain one at one, a mixture between them.

    Let a guide have scored sites beside reparametrised ones, and log q_d be the log density of the former alone. The plain gradient
    is that of phi with scored draws held still, plus phi times the gradient of log q_d, which reaches parameters directly and
    through the reparametrised draws that it depends on. For any h of a particle, E[h d log q] = E[dh + h d log q_d], where dh is
    the path gradient: with h = phi_k this turns what the plain gradient has of log q into -phi_kk path gradients and
    -phi_k d log q_d. So the path gradient has the weights that it has without scored sites, and phi - phi_k in phi's place.
    All of it is less baselines, and vanishes where all log-weights are alike.

    Args:
        program: The program.
        log_w: Log-weights.
        coefficient: Of the mixture.
        scored: Whether there are scored sites.
        reverse: Whether there are reverse programs.
    """
    found = combined(*program(log_w), coefficient)
    if not (scored or reverse):
        return found

    def model(log_w: LogWeights) -> Array:
        return slope(program.value, log_w) if program.weights is None else program.weights(log_w).model

    others = (1 - coefficient) * leave_one_out(model, log_w)
    return found._replace(score=leave_one_out(program.value, log_w) - others if scored else None, others=others)


def combined(value: Array, weights: Weights, coefficient: Any) -> Cotangents:
    """The mixture of path and plain gradients, without scored sites; see `cotangents`."""
    model, guide = weights
    xp = backend_of(model).xp
    path = (1 - coefficient) * guide
    floor = _TINY * xp.max(xp.maximum(xp.abs(model), xp.abs(guide))) + _TINIEST
    above_zero = xp.where(xp.abs(model) < floor, floor, model)
    latents = path + coefficient * model
    return Cotangents(value, above_zero, latents, -path, -coefficient * model, (1 - coefficient) * model)
