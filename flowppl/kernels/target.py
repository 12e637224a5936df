"""What kernels move, and what they leave invariant: a density that is a product of powers of factors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Placed:
    """A log density of y = loc + scale_tril x as one of x; None stands for zero and one."""

    log_prob: LogProb
    loc: Array | None
    scale_tril: Array | None

    def there(self, x: Array) -> Array:
        """y, `(n, dim)`."""
        y = x if self.scale_tril is None else x @ self.scale_tril.T
        return y if self.loc is None else self.loc + y

    @property
    def log_det(self) -> Array:
        """log |det scale_tril|."""
        if self.scale_tril is None:
            return 0.0
        xp = backend_of(self.scale_tril).xp
        return xp.sum(xp.log(xp.abs(xp.linalg.diagonal(self.scale_tril))))

    def __call__(self, x: Array) -> Array:
        """The log density of x, `(n,)`."""
        return self.log_prob(self.there(x)) + self.log_det


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
    found = [_known(f, x, target.attached, with_scores) for f in target.factors]
    values = backend_of(x).xp.stack([value for value, _ in found], axis=-1)
    return Walkers(x, values, tuple(score for _, score in found) if with_scores else None)


def _known(f: LogProb, x: Array, attached: bool, with_score: bool) -> tuple[Array, Any]:
    """The value and the score of a factor: all but -inf and zero, both constant, where one of them is not finite."""
    backend = backend_of(x)
    xp = backend.xp
    if isinstance(f, Placed):
        value, score = _known(f.log_prob, f.there(x), attached, with_score)
        found = value + f.log_det, score if score is None or f.scale_tril is None else score @ f.scale_tril
        return found if attached or not with_score else backend.stop(found)

    def ask(x: Array) -> tuple[Array, ...]:
        if isinstance(f, Known):
            return (f(x), f.score(x)) if with_score else (f(x),)
        return backend.value_and_score(f, x, attached) if with_score else (f(x),)

    value, *rest = backend.shielded(ask, x) if attached else ask(x)
    if not with_score:
        return xp.where(xp.isfinite(value), value, _IMPOSSIBLE), None
    score = rest[0]
    # Zero times what is not finite is not a number. A score whose square overflows would take dynamics to infinity.
    check = value if isinstance(f, Known) else value + 0 * xp.sum(score * score, axis=-1)
    fine = xp.isfinite(check)
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
