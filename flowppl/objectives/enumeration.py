"""Sites that are summed out: a particle stands for all assignments of values to them, each with its probability.

Assignments are those of one element of the plates whose elements have log-weights of their own. These plates enclose all sites; for
a linear program they may also be others, since its mean is a sum over elements, each of which needs its own assignment alone. What
is outside of such plates is shared among their elements, and must not feel what is summed out inside.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from flowppl.backend import Array, backend_of
from flowppl.errors import UnsupportedModelError
from flowppl.objectives.programs import Cotangents, Program, Weights, combined, slope
from flowppl.objectives.score import mean_of_others

_LIMIT = 1024  # joint assignments: the model runs for each of them


class Assignments:
    """Joint assignments of values to the sites that a guide sums out, by number; the first site's digit is the last."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        return math.prod(self._sizes.values())

    def __iter__(self) -> Any:
        return iter(self._sizes)

    def digit(self, name: str, size: int, number: Any) -> Any:
        """Which of its values a site has in the assignment of this number; the first runs of a guide make the sites known.

        Raises:
            UnsupportedModelError: there are too many assignments, or the site had another number of values before.
        """
        if self._sizes.setdefault(name, size) != size:
            raise UnsupportedModelError(
                f"site {name!r} of the guide is summed out and has {size} values, and {self._sizes[name]} in another run: "
                'give it one support, or mark it "score"'
            )
        if len(self) > _LIMIT:
            raise UnsupportedModelError(
                f"site {name!r} of the guide is summed out, which makes {len(self)} joint assignments of values to {[*self]}, and "
                f'the model would run for each of them; the limit is {_LIMIT}: mark sites "score"'
            )
        before = [*self._sizes].index(name)
        return number // math.prod([*self._sizes.values()][:before]) % size


def no_support(name: str, distribution: str) -> UnsupportedModelError:
    """The error for a site whose values cannot be listed."""
    return UnsupportedModelError(
        f'site {name!r} of the guide has the distribution {distribution}, whose values cannot be listed, and is marked "enum": '
        'mark it "score"'
    )


def check_summed(name: str, batch_shape: tuple[int, ...], dims: frozenset[int], unbiased: bool, linear: bool) -> None:
    """Checks that a site can be summed out.

    Args:
        name: Of the site.
        batch_shape: Its own, without particles.
        dims: The dimensions of the plates whose elements have log-weights of their own.
        unbiased: Whether the program's gradients are those of its value.
        linear: Whether the program is linear.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if not unbiased:
        raise UnsupportedModelError(
            f"site {name!r} of the guide is summed out, which can be done only for objectives whose gradients are those of their "
            "values, such as elbo, iwae or jensen_shannon: choose one of them"
        )
    if any(size > 1 and dim - len(batch_shape) not in dims for dim, size in enumerate(batch_shape)):
        here = "no plate" if linear else "no plate around all sites of the model and the guide"
        other = "put them into a plate" if linear else 'use the objective "elbo", which sums out each of them by itself'
        raise UnsupportedModelError(
            f"site {name!r} of the guide is summed out, and has a batch of elements that is {here}, so that assignments would be "
            f'those of all elements at once: {other}, or mark it "score"'
        )


def in_other_plates(name: str, other: str) -> UnsupportedModelError:
    """The error for sites that are summed out in different plates."""
    return UnsupportedModelError(
        f"sites {name!r} and {other!r} of the guide are summed out and are not in the same plates, so that assignments would be "
        'those of all elements at once: mark one of them "score"'
    )


def depends_on_summed(name: str, front: str) -> UnsupportedModelError:
    """The error for a site outside of a plate that depends on what is summed out inside."""
    return UnsupportedModelError(
        f"site {name!r} of the {front} depends on a site that is summed out in a plate, and is not in that plate: what is summed "
        'out for each element by itself cannot be felt outside; mark what is summed out "score" instead'
    )


class Branches(NamedTuple):
    """The branches of particles, one for each assignment."""

    log_r: Array  # log of their probabilities, given the noise of the particle, (K, M, *batch)
    picked: Array  # the number of one of each particle's, drawn with these, (K, *batch)


def branches(rng: Any, log_r: Array, num_particles: int) -> Branches:
    """Draws one branch of each particle, which is an exact draw of the guide.

    Args:
        rng: A jax key, or a `torch.Generator` (None: torch's global one).
        log_r: Log of the probabilities, `(K * M, *batch)`, the branches of a particle beside one another.
        num_particles: K.
    """
    backend = backend_of(log_r)
    log_r = backend.stop(backend.xp.reshape(log_r, (num_particles, -1, *log_r.shape[1:])))
    return Branches(log_r, backend.categorical(rng, backend.xp.moveaxis(log_r, 1, -1)))


def cotangents_of_branches(program: Program, log_w: Array, of: Branches, coefficient: Any) -> Cotangents:
    """The gradient of a program where each particle is the mean of its branches.

    A site that is summed out is one with its score for a gradient, see `cotangents`, whose estimate is replaced by its conditional
    mean given the noise: of particle k, the sum over its branches m of their probabilities r_km times what the estimate would be
    with l_km in the place of l_k, and for every other particle the branch that is drawn for it. So what is summed out itself has
    the gradient sum_m s_km d r_km, and any baseline that particle k's branches have in common changes nothing.

    Args:
        program: The program.
        log_w: Log-weights l_km, `(K * M, *batch)`, the branches of a particle beside one another.
        of: The branches.
        coefficient: Of the mixture.

    Returns:
        The mean of the program over the branches of one particle and all particles, and what pulls its gradient back, each
        `(K * M, *batch)`.
    """
    backend, rows = backend_of(log_w), log_w.shape
    xp = backend.xp
    own, others, r = _apart(log_w, of)

    value, weights = _at(program, own, others)
    base, base_weights = _at(program, mean_of_others(others)[:, None], others)

    def less(a: Array, b: Array) -> Array:
        return xp.where(xp.isfinite(a - b), a - b, 0.0)

    slopes = (1 - coefficient) * less(weights.model, base_weights.model)
    score = less(value, base) - slopes
    found = combined(
        mean_of_branches(program, log_w, of), Weights(r * weights.model, r * weights.guide), coefficient
    )._replace(score=r * score, summed=r * (score - _mean(score, r)), others=r * slopes)
    return Cotangents(found.value, *(backend.stop(xp.reshape(a, rows)) for a in found[1:]))


def mean_of_branches(program: Program, log_w: Array, of: Branches) -> Array:
    """The mean of a program over the branches of one particle, beside drawn ones of the others, and over particles: `(*batch,)`."""
    own, others, r = _apart(log_w, of)
    if program.linear:
        return program.value(_mean(own, r)[:, 0])
    xp = backend_of(own).xp
    return xp.mean(_mean(program.value(_beside(own, others)), r)[:, 0], axis=0)


def _apart(log_w: Array, of: Branches) -> tuple[Array, Array, Array]:
    """Log-weights of branches `(K, M, *batch)`, of the drawn ones `(K, *batch)`, and the branches' probabilities."""
    backend, k = backend_of(log_w), of.log_r.shape[0]
    xp = backend.xp
    own = backend.stop(xp.reshape(log_w, (k, -1, *log_w.shape[1:])))
    picked = xp.broadcast_to(of.picked, (k, *own.shape[2:]))
    return own, backend.gather(own, picked[:, None], 1)[:, 0], xp.exp(xp.broadcast_to(of.log_r, own.shape))


def _mean(a: Array, r: Array) -> Array:
    """The mean over branches, `(K, 1, *batch)`."""
    xp = backend_of(a).xp
    return xp.sum(xp.where(r > 0, r * a, 0.0), axis=1, keepdims=True)


def _beside(own: Array, others: Array) -> Array:
    """Log-weights `(K, K, M, *batch)`: of particles, where it is the turn of one of them, in its branches."""
    return backend_of(own).xp.where(_turn(own, others), own[None], others[:, None, None])


def _turn(own: Array, others: Array) -> Array:
    backend, k = backend_of(own), others.shape[0]
    eye = backend.asarray(backend.xp.eye(k, dtype=own.dtype), own) > 0
    return backend.xp.reshape(eye, (k, k) + (1,) * (own.ndim - 1))


def _at(program: Program, own: Array, others: Array) -> tuple[Array, Weights]:
    """The program and a particle's weights as functions of its own log-weight `(K, M, *batch)`, beside those of others."""

    def value(own: Array) -> Array:
        return program.value(_beside(own, others))

    backend = backend_of(own)
    xp = backend.xp
    if program.weights is not None:
        turn, every = _turn(own, others), program.weights(_beside(own, others))
        return value(own), Weights(*(xp.sum(xp.where(turn, a, 0.0), axis=0) for a in every))
    first, pull = backend.vjp(lambda own: slope(value, own), own)
    return value(own), Weights(first, first - pull(xp.ones_like(first))[0])
