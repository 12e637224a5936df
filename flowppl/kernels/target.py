"""What kernels move, and what they leave invariant: a density that is a product of powers of factors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from flowppl import tree
from flowppl.backend import Array, backend_of

LogProb = Callable[[Array], Array]
_IMPOSSIBLE = -1e30  # in place of -inf, of which a power of zero would not be a number


@dataclass(frozen=True)
class Known:
    """A log density whose gradient is known, and finite where it is, as that of a base: both take `(n, dim)`."""

    log_prob: LogProb
    score: Callable[[Array], Array]

    def __call__(self, x: Array) -> Array:
        """The log density, `(n,)`."""
        return self.log_prob(x)


class Target(NamedTuple):
    """The unnormalised density prod_k f_k(x)^power_k.

    Factors apart from their powers are what makes annealing cheap: walkers keep the value and the gradient of each factor, so that
    another power, as of a temperature, needs no new evaluation.

    Attributes:
        factors: Log densities, `(n, dim)` to `(n,)`, `Known` where their gradients are.
        powers: `(k,)`.
        attached: Whether derivatives flow through what walkers know: second ones of the factors, where a step takes scores.
    """

    factors: tuple[LogProb, ...]
    powers: Array
    attached: bool = False

    def log_prob(self, walkers: Walkers) -> Array:
        """Log density of walkers, `(n,)`."""
        return walkers.log_probs @ self.powers

    def score(self, walkers: Walkers) -> Array:
        """Its gradient, `(n, dim)`.

        Raises:
            ValueError: the walkers have no scores.
        """
        if walkers.scores is None:
            raise ValueError("walkers: expected some with scores, as init makes them with with_scores=True")
        return reduce(operator.add, (self.powers[k] * score for k, score in enumerate(walkers.scores)))


class Walkers(NamedTuple):
    """Points with what is known of them.

    Attributes:
        x: `(n, dim)`.
        log_probs: Log densities of the factors, `(n, k)`; where one has none or is not a number, all but -infinite.
        scores: The gradient of each, `(n, dim)`; zero where it is not a number, and None where they were not asked for. They stay
            apart, since to stack them would copy them in each step.
    """

    x: Array
    log_probs: Array
    scores: tuple[Array, ...] | None


class Info(NamedTuple):
    """What a step did.

    Attributes:
        log_ratio: Log density of the way back over that of the way there, `(n,)`. A step that leaves the target invariant and is
            reversible has log pi(x) - log pi(x'). Along a path of steps, log p at its end, less log q at its start, plus all of
            these is the log-weight of the path.
        acceptance: The probability that the step is accepted, `(n,)`; one for a step that always is.
        log_choice: The log-probability of what was decided, to accept or not, `(n,)`; zero for a step that decides nothing. Its
            derivative is what those of the walkers lack: a decision has none of its own.
    """

    log_ratio: Array
    acceptance: Array
    log_choice: Array


def target(log_prob: LogProb, like: Array) -> Target:
    """The target of one log density.

    Args:
        log_prob: `(n, dim)` to `(n,)`, unnormalised.
        like: An array whose dtype and device walkers have.
    """
    backend = backend_of(like)
    return Target((log_prob,), backend.asarray(backend.xp.ones(1), like))


def init(target: Target, x: Array, *, with_scores: bool = True) -> Walkers:
    """Walkers at points.

    Args:
        target: What they are to sample.
        x: `(n, dim)`.
        with_scores: Whether steps will need gradients: all but `metropolis` and `independence` do.
    """
    backend = backend_of(x)
    xp = backend.xp
    if not with_scores:
        values = xp.stack([f(x) for f in target.factors], axis=-1)
        return Walkers(x, xp.where(xp.isfinite(values), values, _IMPOSSIBLE), None)
    found = [_known(f, x, target.attached) for f in target.factors]
    return Walkers(x, xp.stack([value for value, _ in found], axis=-1), tuple(score for _, score in found))


def _known(f: LogProb, x: Array, attached: bool) -> tuple[Array, Array]:
    """The value and the score of a factor."""
    backend = backend_of(x)
    xp = backend.xp
    if isinstance(f, Known):
        value, score = f(x), f.score(x)
        fine = xp.isfinite(value)
    else:
        value, score = backend.value_and_score(f, x, attached)
        # Zero times what is not finite is not a number: a sum, which is fast, sees it.
        fine = xp.isfinite(value + xp.sum(0 * score, axis=-1))
    return xp.where(fine, value, _IMPOSSIBLE), xp.where(fine[:, None], score, xp.zeros_like(score))


def is_possible(log_probs: Array) -> Array:
    """Whether walkers have a density, `(n,)`, from their `log_probs`."""
    xp = backend_of(log_probs).xp
    return xp.all(log_probs > 0.5 * _IMPOSSIBLE, axis=-1)


def accept(rng: object, target: Target, log_ratio: Array, old: Walkers, new: Walkers) -> tuple[Walkers, Info]:
    """The rule of Metropolis: new walkers with probability min(1, exp(log_ratio)), in a step that is reversible for the target."""
    backend = backend_of(log_ratio)
    xp = backend.xp
    log_ratio = xp.where(xp.isnan(log_ratio), -xp.inf, log_ratio)
    u = backend.uniform(rng, tuple(log_ratio.shape), like=log_ratio)
    taken = xp.log1p(-u) < log_ratio  # of a uniform number in (0, 1]
    chosen = tree.map(lambda a, b: xp.where(xp.reshape(taken, (-1,) + (1,) * (a.ndim - 1)), b, a), old, new)
    log_accept = xp.clip(log_ratio, None, 0.0)
    # Where the other choice is certain, this one is never made, and its derivative would not be finite.
    uncertain = log_accept < 0
    log_reject = xp.log(-xp.expm1(xp.where(uncertain, log_accept, -xp.ones_like(log_accept))))
    log_choice = xp.where(taken, log_accept, xp.where(uncertain, log_reject, xp.zeros_like(log_reject)))
    return chosen, Info(target.log_prob(old) - target.log_prob(chosen), xp.exp(log_accept), log_choice)
