"""Losses for NumPyro's `SVI`: any function of log-weights, with a gradient that varies little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.elbo import ELBO
from numpyro.util import check_model_guide_match

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro.distributions import flow_of, gradient_of_draws
from flowppl.objectives.control import REFRESH, Control
from flowppl.objectives.programs import Cotangents, Program, Value, cotangents, requested

Array = Any
Particles = dict[str, Array]  # by site, (K, *shape)
CONTROL = "flowppl_control"  # the mutable site of guides that keep a coefficient
_OUTSIDE = ["sample", "prng_key", "control_flow"]  # what all particles do not share


class Objective(ELBO):
    """A loss for `SVI`: minus a function of the log-weights log p - log q of independent particles.

    The guide's parameters get the doubly reparametrised gradient of whatever the function is, and the model's the plain one, from
    one pass: see `flowppl.objectives.programs.Program`. Flows of flowppl carry their scores along as they draw. Other guides
    score their draws once more with their parameters held still, so any of NumPyro's will do. Weights are computed for each
    element of the plates that all sites of model and guide share.

    Args:
        program: A name ("elbo", "iwae", "cubo", "vis", "rws", "jensen_shannon", "tail_adaptive"), a `Program` such as
            `programs.renyi(0.5)`, or a function of log-weights, `(K, *batch)` to `(*batch,)`, to be maximised.
        num_particles: K.
        gradient: "path" (doubly reparametrised), "reparam" (plain), or "auto", the mixture of both that varies least: far from
            the posterior the plain gradient can be the better one. The coefficient is learnt on the way, so "auto" needs a
            guide that keeps it: `AutoFlow` or `AmortizedFlow` with `gradient="auto"`.
        biased: Accept a `Program` whose gradients are not those of its value.

    Raises:
        ValueError: there is no such program or gradient, or the program is biased and that was not asked for.
        UnsupportedModelError: at a step: a latent of the guide is not reparametrised, the guide cannot score its own draws, a
            plate subsamples that not all sites share, or nothing keeps the coefficient.

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
                'gradient="auto", or choose "path" or "reparam"'
            )
        params, put_back = _floats({k: v for k, v in param_map.items() if k != CONTROL})
        run = partial(_estimate, rng_key, put_back, model, guide, args, kwargs, self.num_particles, self.program)
        value, pull_back = run(lax.stop_gradient(params), with_path=self.gradient != "reparam")
        coefficient = float(self.gradient == "reparam")
        if self.gradient == "auto":
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


def _floats(param_map: dict[str, Any]) -> tuple[list[Array], Callable[[list[Array]], dict[str, Any]]]:
    """The leaves that can be differentiated, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(param_map)
    at = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]

    def put_back(floats: list[Array]) -> dict[str, Any]:
        new = dict(zip(at, floats, strict=True))
        return jax.tree.unflatten(structure, [new.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in at], put_back


def _estimate(
    rng_key: Array,
    put_back: Callable[[list[Array]], dict[str, Any]],
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num_particles: int,
    program: Program,
    params: list[Array],
    with_path: bool,
) -> tuple[Array, Callable[[Array | float], list[Array]]]:
    """The program's value, and its gradient as a function of the coefficient of the plain estimator."""
    plate_key, guide_key, model_key = jax.random.split(rng_key, 3)
    model, guide = (seed(f, plate_key, hide_types=_OUTSIDE) for f in (model, guide))
    seen: dict[str, Any] = {}  # traces: what is not an array in them outlives the functions below

    def draw(params: list[Array]) -> tuple:
        def one(key: Array) -> tuple:
            seeded = seed(guide, key)
            with gradient_of_draws("path" if with_path else "reparam"):
                found = trace(substitute(seeded, data=put_back(params))).get_trace(*args, **kwargs)
            seen["guide"] = found
            values = {name: site["value"] for name, site in _latents(found).items()}
            plates = {name: site["value"] for name, site in found.items() if site["type"] == "plate"}
            frozen = {}
            if with_path:
                still = put_back(lax.stop_gradient(params))
                again = trace(substitute(replay(seeded, found), data=still)).get_trace(*args, **kwargs)
                frozen = {name: _frozen_log_prob(site, found[name]) for name, site in _sampled(again).items()}
            plain = {name: _log_prob(site) for name, site in _sampled(found).items()}
            return (values, plain, frozen), plates

        return jax.vmap(one)(jax.random.split(guide_key, num_particles))

    def score(params: list[Array], values: Particles) -> Particles:
        def one(key: Array, values: dict[str, Array], plates: dict[str, Array]) -> dict[str, Array]:
            known = {n: {**seen["guide"][n], "value": v} for n, v in {**values, **plates}.items()}
            found = trace(substitute(replay(seed(model, key), known), data=put_back(params))).get_trace(*args, **kwargs)
            seen["model"] = found
            return {name: _log_prob(site) for name, site in _sampled(found).items()}

        return jax.vmap(one)(jax.random.split(model_key, num_particles), values, plates)

    (values, plain, frozen), pull_draw, plates = jax.vjp(draw, params, has_aux=True)
    log_p, pull_score = jax.vjp(score, params, values)
    check_model_guide_match(seen["model"], seen["guide"])
    dims, scale = ((), 1.0) if program.linear else _shared_plates(seen["model"], seen["guide"])
    log_p, pull_log_p = jax.vjp(partial(_total, dims=dims), log_p)
    log_q, pull_plain = jax.vjp(partial(_total, dims=dims), plain)
    _, pull_frozen = jax.vjp(partial(_total, dims=dims), frozen)
    log_w = lax.stop_gradient(log_p - log_q) / scale
    unit = cotangents(program, log_w, 1.0)
    from_model, from_latents = pull_score(*pull_log_p(scale * unit.model))

    def pull_back(coefficient: Array | float) -> list[Array]:
        c: Cotangents = cotangents(program, log_w, coefficient)
        sites = seen["guide"]
        through = {name: g * _beside(c.latents / c.model, sites[name], dims, g) for name, g in from_latents.items()}
        still = pull_frozen(scale * c.frozen)[0] if with_path else frozen
        from_guide = pull_draw((through, *pull_plain(scale * c.plain), still))[0]
        return [a + b for a, b in zip(from_model, from_guide, strict=True)]

    return scale * jnp.sum(unit.value), pull_back


def _sampled(found: Particles) -> dict[str, Any]:
    return {name: site for name, site in found.items() if site["type"] == "sample"}


def _latents(found: Particles) -> dict[str, Any]:
    """The guide's latents, if all of them are reparametrised."""
    latents = {name: site for name, site in _sampled(found).items() if not site["is_observed"]}
    for name, site in latents.items():
        if not site["fn"].has_rsample or not jnp.issubdtype(jnp.result_type(site["value"]), jnp.floating):
            raise UnsupportedModelError(
                f"site {name!r} of the guide is not reparametrised, so its draws have no derivatives: let the guide cover "
                "continuous latents, and mark discrete ones of the model for enumeration in TraceEnum_ELBO instead"
            )
    return latents


def _log_prob(site: dict[str, Any]) -> Array:
    log_prob = site["fn"].log_prob(site["value"], *([site["intermediates"]] if site["intermediates"] else []))
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def _frozen_log_prob(site: dict[str, Any], drawn: dict[str, Any]) -> Array:
    """The log density of a draw as a function of the draw, from a site of parameters that are held still."""
    intermediates = drawn["intermediates"] if flow_of(site["fn"]) is not None else None
    try:
        with gradient_of_draws("path"):
            return _log_prob({**site, "intermediates": intermediates})
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"site {site['name']!r}: {type(site['fn']).__name__} cannot score its own draws, for want of an inverse, so it "
            'has no path gradient: use a flow of flowppl, which needs none, or gradient="reparam"'
        ) from error


def _shared_plates(model: Particles, guide: Particles) -> tuple[tuple[int, ...], float]:
    """The dimensions of the plates that all sites share, and how much of them is left out by subsampling, as a factor."""
    stacks = [set(site["cond_indep_stack"]) for found in (model, guide) for site in _sampled(found).values()]
    shared, scale = set.intersection(*stacks), 1.0
    for frame in set.union(*stacks):
        share = {**guide, **model}[frame.name]["args"][0] / frame.size
        if frame in shared:
            scale *= share
        elif share > 1:
            raise UnsupportedModelError(
                f"plate {frame.name!r} subsamples, and not all sites are in it: only the ELBO is right then"
            )
    return tuple(sorted(frame.dim for frame in shared)), scale


def _total(log_probs: Particles, dims: tuple[int, ...]) -> Array:
    """The sum over sites, and over all but the particles and the shared plates: `(K, *batch)`."""

    def summed(a: Array) -> Array:
        return jnp.sum(a, axis=tuple(i for i in range(1, a.ndim) if i - a.ndim not in dims))

    return sum((summed(a) for a in log_probs.values()), jnp.zeros(()))


def _beside(weight: Array, site: dict[str, Any], dims: tuple[int, ...], like: Array) -> Array:
    """Weights `(K, *batch)` in the axes that a site's values `(K, *batch, *event)` have for them."""
    event_dim = site["fn"].event_dim
    batch = [like.shape[i] if i - like.ndim + event_dim in dims else 1 for i in range(1, like.ndim - event_dim)]
    return weight.reshape(len(weight), *batch, *(1,) * event_dim)
