"""Stochastic normalizing flows as NumPyro distributions and guides: draws of whole paths, with their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import Distribution, constraints
from numpyro.infer.initialization import init_to_median

from flowppl.annealing import refuse_angles
from flowppl.errors import PathDensityError
from flowppl.fitting import Fit, shown
from flowppl.laplace import NormalApproximation
from flowppl.numpyro.density import LogDensity
from flowppl.numpyro.flat_guide import FlatGuide
from flowppl.numpyro.model_posterior import ModelPosterior, View
from flowppl.numpyro.modules import as_params, register
from flowppl.numpyro.sites import is_angle, is_latent, look
from flowppl.plates import refuse_minibatches
from flowppl.stochastic import Path
from flowppl.stochastic.draws import LAYERS, Layers, check_gradient, check_layers, draw, ends, path_of, placed, weighted
from flowppl.stochastic.training import OPTIONS, train_placed
from flowppl.training import Options, Record

Array = Any


class SNFDistribution(Distribution):
    """The distribution of where the paths of a stochastic normalizing flow end: draws with weights, and none with a density.

    The density of a value is an integral over all paths to it. What a draw has instead is log p(x) - log_w, p being the target and
    w the weight of its own path; so that, as a guide, it has the ELBO E log_w, a lower bound to the log evidence, and in
    `RenyiELBO` the bound of importance weighting. Derivatives go through the dynamics. Those of decisions to accept are missing
    with `gradient="reparam"`, which is exact for maps, "langevin" and "underdamped", and biased for "metropolis", "mala" and "hmc":
    "score" adds them, without bias and with more variance. Wu, Koehler & Noe 2020, "Stochastic normalizing flows".

    Args:
        path: The path, of dimension d.
        variables: What `path.init` returned, trained or not.
        log_prob: Log density of the target, unnormalised: `(n, d)` to `(n,)`. Where derivatives are taken it must have second ones.
        loc: `(d,)`: the path is one of w, and x = loc + scale_tril w; None for zero.
        scale_tril: `(d, d)`, lower triangular; None for one.
        gradient: "reparam" or "score".

    Raises:
        ValueError: `gradient` is neither of these.
        PathDensityError: on `log_prob`, of a value without what was drawn beside it.

    Example:
        >>> import jax
        >>> from flowppl import flows
        >>> from flowppl.numpyro import SNFDistribution
        >>> from flowppl.stochastic import Moves, snf
        >>> path = snf([flows.affine(), Moves("langevin", repeats=5)], dim=2)
        >>> q = SNFDistribution(path, path.init(jax.random.key(0)), lambda x: -0.5 * (x**2).sum(-1))
        >>> x, log_w = q.sample_weighted(jax.random.key(1), 100)
        >>> x.shape, log_w.shape
        ((100, 2), (100,))
    """

    support = constraints.real_vector
    arg_constraints: dict[str, Any] = {}
    reparametrized_params: list[str] = []  # all of none: what is drawn is attached
    pytree_data_fields = ("variables", "loc", "scale_tril")
    pytree_aux_fields = ("path", "target", "gradient")

    def __init__(
        self,
        path: Path,
        variables: dict[str, Any],
        log_prob: Callable[[Array], Array],
        loc: Array | None = None,
        scale_tril: Array | None = None,
        *,
        gradient: str = "reparam",
        validate_args: bool | None = None,
    ) -> None:
        self.path, self.variables, self.target = path, variables, log_prob
        self.loc, self.scale_tril, self.gradient = loc, scale_tril, check_gradient(gradient)
        super().__init__((), (path.dim,), validate_args=validate_args)

    @cached_property
    def _compiled(self) -> Callable:
        """Draws, compiled once: op by op they would take far longer."""

        def drawn(rng: Array, variables: Any, n: int, loc: Any, scale_tril: Any) -> Any:
            return draw(rng, self.path, variables, self.target, n, loc, scale_tril, gradient=self.gradient)

        return jax.jit(drawn, static_argnums=2)

    def _draw(self, rng: Array, n: int) -> Any:
        return self._compiled(rng, self.variables, n, self.loc, self.scale_tril)

    def sample_weighted(self, rng: Array, n: int) -> tuple[Array, Array]:
        """Draws `(n, d)` with the log-weights of their paths `(n,)`: the mean weight estimates the target's integral, unbiased.

        Args:
            rng: A key.
            n: How many.
        """
        return self._draw(rng, n)[:2]

    def sample_with_intermediates(self, key: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, list[Any]]:
        """Draws `(*sample_shape, d)`; the intermediate is what stands for their log density, from the same pass."""
        found = self._draw(key, math.prod(sample_shape))
        return jnp.reshape(found.x, (*sample_shape, -1)), [jnp.reshape(found.log_q, sample_shape)]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws `(*sample_shape, d)`."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """log p(x) - log_w of a draw, given what was drawn beside it."""
        if not intermediates:
            raise PathDensityError(
                "value: the density of a stochastic flow is an integral over paths, and known for a draw alone, by its path: use "
                "sample_weighted, or give log_prob the intermediates of sample_with_intermediates, which masks of NumPyro drop"
            )
        return intermediates[0]


class AutoSNF(FlatGuide):
    """A guide by a stochastic normalizing flow: maps and Markov kernels in turn take it to the posterior, by the model's density.

    Paths start at a normal and pass by densities base^(1 - beta) p^beta, as those of NumPyro's `AutoDAIS` do; maps between shorten
    the way. Losses such as `Trace_ELBO` see log p - log q = log_w, the log-weight of the path: minus the loss is E log_w, at most
    the log evidence. `train_path` trains each map alone, which takes any moves and costs less. `weighted` gives the draws with
    their weights, which are exact whatever the training. A step of `SVI` asks for the model's gradient once for each step of the
    dynamics, of all of the data and twice differentiable, so that it costs much more than one of `AutoFlow`.

    The path is one of coordinates in which `init_loc_fn`'s point is zero and `init_scale` one, or what `precondition` finds: a
    posterior whose scales differ needs that. A shift and scales of the base train too. Densities are those given the arguments of
    the call; one that leaves data open, as for predictions, takes those that the guide met first.

    Args:
        model: The model; discrete latents marked for enumeration are summed out, with the loss `TraceEnum_ELBO`.
        layers: Of the path, see `flowppl.stochastic.snf`; or a `Path` of the latents' dimension.
        gradient: "reparam" or "score", for layers that accept or reject, see `SNFDistribution`.
        prefix: Prefix of the guide's own sites; give two guides of one program different ones.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start.

    Attributes:
        preconditioned: The normal that `precondition` found (`loc`, `scale_tril`, `elbo`, `num_evals`), or None.
        history: What `train_path` saw, a `flowppl.training.Record` of each chunk of steps.

    Raises:
        UnknownFlowError: no recipe has this name.
        ValueError: `gradient` is unknown or `init_scale` not positive.
        UnsupportedModelError: on use: a plate subsamples, or a latent is an angle, or discrete and not marked for enumeration.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from flowppl.numpyro import AutoSNF
        >>> from flowppl.stochastic import Moves
        >>> def model():
        ...     scale = numpyro.sample("scale", dist.HalfNormal(3.0))
        ...     numpyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoSNF(model, ["affine", Moves("langevin", repeats=3)])
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO(num_particles=16))
        >>> result = svi.run(jax.random.key(0), 10, progress_bar=False)
        >>> posterior = guide.weighted(jax.random.key(1), result.params, 200)
        >>> posterior.samples["scale"].shape, posterior.log_weights.shape
        ((200,), (200,))
    """

    def __init__(
        self,
        model: Callable,
        layers: Layers = LAYERS,
        *,
        gradient: str = "reparam",
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        self._layers, self._gradient, self._init_scale = check_layers(layers), check_gradient(gradient), init_scale
        self.preconditioned: NormalApproximation | None = None
        self.history: list[Record] = []
        super().__init__(model, prefix, init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            with jax.ensure_compile_time_eval():
                self._density = LogDensity(self.model, args, kwargs, init_loc_fn=self.init_loc_fn)
            refuse_minibatches(self._density.plates)
        except Exception:
            self.prototype_trace = None  # the next call starts anew
            raise
        self._first = args, kwargs

    def _setup_flow(self) -> None:
        angles = (name for name in self._layout.names if is_angle(self.prototype_trace[name]["fn"]))
        refuse_angles(angles, "a path goes over real vectors: use AutoFlow or fit")
        self._path = path_of(self._layers, self.latent_dim)

    @property
    def _path_name(self) -> str:
        return f"{self.prefix}_path"

    def _variables(self, key: Array) -> dict[str, Any]:
        found = self.preconditioned
        start = (self._init_latent, self._init_scale * np.eye(self.latent_dim)) if found is None else found[:2]
        loc, scale_tril = (jnp.asarray(a, self._init_latent.dtype) for a in start)
        return placed(self._path.init(key, like=loc), loc, scale_tril)

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """These arguments, or those that the guide met first where these leave open what those do not."""
        if not args and not kwargs:
            if self._traced:
                raise RuntimeError("the guide has met its model's arguments only inside jax.jit: pass them here too")
            return self._first
        sites = look(self.model, jax.random.key(0), args, kwargs).items()
        latents = {name for name, site in sites if is_latent(site) and site["infer"].get("enumerate") != "parallel"}
        return (args, kwargs) if latents == set(self._layout.names) else self._first

    def _get_posterior(self, *args: Any, **kwargs: Any) -> SNFDistribution:
        args, kwargs = self._given(args, kwargs)
        density = self._density.given(*args, **kwargs)
        of_model = {
            name: numpyro.param(name, site["value"], **site["kwargs"])
            for name, site in self.prototype_trace.items()
            if site["type"] == "param"
        }

        def log_prob(u: Array) -> Array:
            with handlers.block(), handlers.substitute(data=of_model):
                return density.log_prob(u)

        variables = register(self._path_name, self._path, self._variables)
        return SNFDistribution(self._path, variables, log_prob, *ends(variables), gradient=self._gradient)

    def _sample_latent(self, *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any) -> Array:
        posterior = self._get_posterior(*args, **kwargs)
        infer = {"is_auxiliary": True}
        return numpyro.sample(f"_{self.prefix}_latent", posterior, sample_shape=sample_shape, infer=infer)

    def get_posterior(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> SNFDistribution:
        """The path with trained parameters, over the flat unconstrained latents.

        Args:
            params: The guide's parameters.
            args: The model's arguments; none for those that the guide met first.
            kwargs: Its keyword arguments.
        """
        self._require_prototype()
        return handlers.substitute(self._get_posterior, params)(*args, **kwargs)

    def get_transform(self, params: dict[str, Any]) -> Any:
        """There is none.

        Raises:
            PathDensityError: always.
        """
        raise PathDensityError("a stochastic flow is no transform of its base: use AutoFlow for NeuTraReparam")

    def precondition(self, rng: Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Finds a normal approximation and returns parameters that start there; see `AutoFlow.precondition`."""
        self.preconditioned = self._normal(rng, args, kwargs)
        return as_params(self._path_name, self._variables(rng))

    def train_path(
        self,
        params: dict[str, Any],
        *args: Any,
        by: str = "layer",
        seed: int = 0,
        options: Options = OPTIONS,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Trains the path by layer, in place of `SVI` or before it: each map alone takes the density before it to that behind it.

        No derivative goes through the moves, so that those which accept or reject are as good as others, and the model's gradient
        is asked for once in each step of the dynamics. The base stays where it is, and the model's own parameters as they are.
        Arbel, Matthews & Doucet 2021, "Annealed flow transport Monte Carlo"; Matthews et al. 2022, "Continual repeated annealed
        flow transport Monte Carlo".

        Args:
            params: The guide's parameters, such as `precondition` returns, and the model's.
            args: The model's arguments; none for those that the guide met first.
            by: "layer", or "energy" for all layers together; see `flowppl.stochastic.train_path`.
            seed: Of all draws.
            options: How to train.
            progress_bar: Whether to show how it goes.
            kwargs: The model's keyword arguments.

        Returns:
            The parameters, with those of the path trained.

        Raises:
            ValueError: `by` is neither of these.

        Example:
            >>> import jax, numpyro, numpyro.distributions as dist
            >>> from flowppl.numpyro import AutoSNF
            >>> from flowppl.stochastic import Moves
            >>> from flowppl.training import Options
            >>> def model():
            ...     scale = numpyro.sample("scale", dist.HalfNormal(3.0))
            ...     numpyro.sample("x", dist.Normal(0.0, scale))
            >>> guide = AutoSNF(model, ["affine", Moves("metropolis", repeats=3)])
            >>> params = guide.precondition(jax.random.key(0))
            >>> params = guide.train_path(params, options=Options(max_steps=20), progress_bar=False)
            >>> guide.weighted(jax.random.key(1), params, 200).samples["x"].shape
            (200,)
        """
        if args or kwargs:
            self._setup(jax.random.key(seed), args, kwargs)
        at = self.get_posterior(params, *args, **kwargs)
        with shown(options, progress_bar) as progress:
            how = {"by": by, "seed": seed, "options": options, "progress": progress}
            variables, self.history = train_placed(self._path, at.variables, at.target, **how)
        return {**params, **as_params(self._path_name, variables)}

    def weighted(
        self, rng: Array, params: dict[str, Any], num_samples: int, *args: Any, **kwargs: Any
    ) -> ModelPosterior:
        """Draws with the exact weights of their paths: moments, the evidence, k-hat, resampling, predictions, ArviZ.

        Computed in float64 where the model allows it.

        Args:
            rng: A key.
            params: The guide's parameters.
            num_samples: How many.
            args: The model's arguments; none for those that the guide met first.
            kwargs: Its keyword arguments.

        Returns:
            As `fit` does: `samples` by site, `log_weights`, `mean()`, `log_evidence`, `ess`, `khat`, `resample`, `to_arviz`,
            `diagnose`.
        """
        if args or kwargs:
            self._setup(rng, args, kwargs)
        self._require_prototype()
        args, kwargs = self._given(args, kwargs)
        variables = handlers.substitute(partial(register, self._path_name, self._path, self._variables), params)()
        sites = self.prototype_trace.items()
        trained = {k: params.get(k, site["value"]) for k, site in sites if site["type"] == "param"}
        model = handlers.substitute(self.model, trained) if trained else self.model
        view = View(model, args, kwargs, "affine", self.init_loc_fn, angles=False)
        with view.precise.context():
            dtype = view.problem.like.dtype
            widen = lambda a: jnp.asarray(np.asarray(a), dtype if a.dtype.kind == "f" else a.dtype)
            variables = jax.tree.map(widen, variables)
            draws = weighted(rng, self._path, variables, view.problem.log_prob, num_samples, *ends(variables))
        return ModelPosterior(view, Fit(variables, draws, [], [], None))
