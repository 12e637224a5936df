"""Losses for NumPyro's `SVI`: any function of log-weights, with a gradient that varies little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.infer.elbo import ELBO
from numpyro.primitives import mutable

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro.particles import CONTROL, Drawn, Particles, Sites
from flowppl.objectives.control import REFRESH, Control
from flowppl.objectives.enumeration import cotangents_of_branches
from flowppl.objectives.programs import Cotangents, Program, Value, cotangents, requested

Array = Any
PutBack = Callable[[list[Array]], dict[str, Any]]


class Objective(ELBO):
    """A loss for `SVI`: minus a function of the log-weights log p - log q of independent particles.

    The guide's parameters get the doubly reparametrised gradient of whatever the function is, and the model's the plain one, from
    one pass: see `flowppl.objectives.programs.Program`. Flows of flowppl carry their scores along as they draw. Other guides
    score their draws once more with their parameters held still, so any of NumPyro's will do. Weights are computed for each
    element of the plates that all sites of model and guide share. Sites of the guide that draw without derivatives, such as
    discrete ones, or that are marked `infer={"grad": "score"}`, get their gradients from their scores, with leave-one-out
    baselines; several particles have the less noise. Sites of few values that are marked `infer={"grad": "enum"}` are summed out,
    in plates around all sites or, for the ELBO, in any.

    Args:
        program: A name ("elbo", "iwae", "cubo", "vis", "rws", "jensen_shannon", "tail_adaptive"), a `Program` such as
            `programs.renyi(0.5)`, or a function of log-weights, `(K, *batch)` to `(*batch,)`, to be maximised.
        num_particles: K.
        gradient: "path" (doubly reparametrised), "reparam" (plain), or "auto", the mixture of both that varies least: far from
            the posterior the plain gradient can be the better one. The coefficient is learnt on the way, so "auto" needs a
            guide that keeps it: `AutoFlow` or `AmortizedFlow` with `gradient="auto"`, or any other in `keeping(guide)`.
        biased: Accept a `Program` whose gradients are not those of its value.

    Raises:
        ValueError: there is no such program or gradient, or the program is biased and that was not asked for; at a step: a site
            is marked neither "score", "enum" nor "reparam".
        UnsupportedModelError: at a step: a site of the guide draws without derivatives and the gradients of the program are not
            those of its value, cannot be what it is marked for or be summed out, is moved by parameters without a density, is
            scaled, or cannot score values; a plate subsamples that does not enclose all sites, and the program is not linear; or
            nothing keeps the coefficient.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> from flowppl.numpyro import AutoFlow, Objective
        >>> def model():
        ...     numpyro.sample("x", dist.StudentT(3.0, 0.0, 1.0))
        >>> def pairs(log_w):  # the bound of two particles, from as many as there are
        ...     return jnp.mean(jax.nn.logsumexp(log_w.reshape(2, -1), axis=0)) - jnp.log(2.0)
        >>> svi = SVI(model, AutoFlow(model, "affine"), numpyro.optim.Adam(1e-2), Objective(pairs, num_particles=16))
        >>> svi.run(jax.random.key(0), 10, progress_bar=False).losses.shape
        (10,)
    """

    can_infer_discrete = True  # where the guide draws; `SVI` would warn

    def __init__(
        self,
        program: str | Program | Value = "elbo",
        num_particles: int = 16,
        *,
        gradient: str = "path",
        biased: bool = False,
    ) -> None:
        self.program, self.gradient = requested(program, gradient, biased), gradient
        super().__init__(num_particles=num_particles)

    def loss_with_mutable_state(
        self, rng_key: Array, param_map: dict[str, Any], model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """See NumPyro: minus the program's value, with its gradient, and the guide's new coefficient."""
        control = param_map.get(CONTROL)
        if self.gradient == "auto" and control is None:
            raise UnsupportedModelError(
                'gradient="auto" learns a coefficient, which this guide does not keep: use AutoFlow or AmortizedFlow with '
                'gradient="auto", wrap any other guide in flowppl.numpyro.objective.keeping, or choose "path" or "reparam"'
            )
        params, put_back = _floats({k: v for k, v in param_map.items() if k != CONTROL})
        particles = Particles(rng_key, model, guide, args, kwargs, self.num_particles)
        value, pull_back = _estimate(
            particles, put_back, self.program, lax.stop_gradient(params), self.gradient != "reparam"
        )
        coefficient: Array | float = float(self.gradient == "reparam")
        if self.gradient == "auto" and control is not None:
            coefficient = Control(control["cross"], control["square"]).coefficient
            control = _refreshed(control, pull_back)
        gradients = pull_back(coefficient)
        slopes = [jnp.sum(g * (p - lax.stop_gradient(p))) for g, p in zip(gradients, params, strict=True)]
        return {"loss": -(value + sum(slopes)), "mutable_state": None if control is None else {CONTROL: control}}


def PathELBO(num_particles: int = 1) -> Objective:
    """The ELBO with path gradients, for any guide: an `Objective`.

    Where NumPyro's `Trace_ELBO` differentiates log q through the draw and through the parameters, this holds the parameters still:
    the variance vanishes where the guide is the posterior. Roeder et al. 2017, "Sticking the landing".
    """
    return Objective("elbo", num_particles)


def new_control() -> dict[str, Array]:
    """What the mutable site of a guide starts from."""
    return {"cross": jnp.zeros(()), "square": jnp.zeros(()), "step": jnp.zeros((), jnp.int32)}


def keeping(guide: Callable) -> Callable:
    """The same guide with a place for the coefficient of `gradient="auto"`: `SVI(model, keeping(guide), ...)`."""

    def kept(*args: Any, **kwargs: Any) -> Any:
        mutable(CONTROL, new_control())
        return guide(*args, **kwargs)

    return kept


def coefficient(svi_state: Any) -> Array:
    """How much of the plain gradient `gradient="auto"` mixes in: zero is the path gradient, one the plain one.

    Args:
        svi_state: The state of `SVI`, or its `mutable_state`.
    """
    control = getattr(svi_state, "mutable_state", svi_state)[CONTROL]
    return Control(control["cross"], control["square"]).coefficient


def _refreshed(control: dict[str, Array], pull_back: Callable) -> dict[str, Array]:
    def look() -> Control:
        path, plain = pull_back(0.0), pull_back(1.0)
        return old.updated(path, [b - a for a, b in zip(path, plain, strict=True)])

    old = Control(control["cross"], control["square"])
    new = lax.cond(control["step"] % REFRESH == 0, look, lambda: old)
    return {"cross": new.cross, "square": new.square, "step": control["step"] + 1}


def _floats(param_map: dict[str, Any]) -> tuple[list[Array], PutBack]:
    """The leaves that can be differentiated, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(param_map)
    at = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]

    def put_back(floats: list[Array]) -> dict[str, Any]:
        new = dict(zip(at, floats, strict=True))
        return jax.tree.unflatten(structure, [new.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in at], put_back


def _estimate(
    particles: Particles, put_back: PutBack, program: Program, params: list[Array], with_path: bool
) -> tuple[Array, Callable[[Array | float], list[Array]]]:
    """The program's value, and its gradient as a function of the coefficient of the plain estimator."""
    drawn, pull_draw, fixed = jax.vjp(lambda params: particles.draw(put_back(params), with_path), params, has_aux=True)
    log_p, pull_score = jax.vjp(
        lambda params, values: particles.score(put_back(params), values, fixed), params, drawn.values
    )
    if with_path:
        particles.check_densities(params, put_back, program.linear)
    plates = particles.plates(program.linear)
    log_p, pull_log_p = jax.vjp(plates.total, log_p)
    log_q, pull_log_q = jax.vjp(plates.total, drawn.log_q)
    log_r, _ = jax.vjp(plates.total, drawn.summed)
    branches = particles.branches(log_r, program.unbiased, program.linear)
    particles.check_outside(params, put_back)
    log_w = lax.stop_gradient(log_p - log_q) / plates.scale

    def at(coefficient: Array | float) -> Cotangents:
        if branches is not None:
            return cotangents_of_branches(program, log_w, branches, coefficient)
        return cotangents(program, log_w, coefficient, scored=bool(drawn.scores), reverse=bool(drawn.reverse))

    def pull(sites: Sites, weight: Array, total: Callable[[Sites], Array] = plates.total) -> Sites:
        """From log densities that are added up to those of sites, if there are any."""
        return jax.vjp(lambda of: jnp.broadcast_to(total(of), weight.shape), sites)[1](weight)[0] if sites else sites

    unit = at(1.0)
    from_model, from_latents = pull_score(*pull_log_p(unit.model))

    def pull_back(coefficient: Array | float) -> list[Array]:
        c = at(coefficient)
        moved = from_latents
        if not plates.local:  # linear programs, which alone have them, weigh model and latents alike
            moved = {name: g * particles.beside(name, g, c.latents / c.model) for name, g in from_latents.items()}
        (from_guide,) = pull_draw(
            Drawn(
                moved,
                pull_log_q(c.plain)[0],
                pull(drawn.frozen, c.frozen),
                pull(drawn.scores, plates.scale * c.score, plates.whole) if drawn.scores else {},
                pull(drawn.summed, plates.scale * c.summed) if drawn.summed else {},
                pull(drawn.reverse, c.reverse),
                pull(drawn.others, c.others),
            )
        )
        return [a + b for a, b in zip(from_model, from_guide, strict=True)]

    return plates.scale * jnp.sum(unit.value), pull_back
