"""Stochastic normalizing flows as Pyro distributions and guides: draws of whole paths, with their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import constraints

from flowppl import tree
from flowppl.annealing import refuse_angles
from flowppl.errors import PathDensityError
from flowppl.fitting import Fit, shown
from flowppl.laplace import NormalApproximation
from flowppl.plates import refuse_minibatches
from flowppl.pyro.density import LogDensity
from flowppl.pyro.flat_guide import FlatGuide
from flowppl.pyro.memo import Memo
from flowppl.pyro.model_posterior import ModelPosterior, View, to_like
from flowppl.pyro.modules import FlowParameters
from flowppl.pyro.plates import apart
from flowppl.pyro.sites import is_enumerated, is_latent, start_from
from flowppl.stochastic import Path
from flowppl.stochastic.draws import LAYERS, Layers, check_gradient, check_layers, draw, ends, path_of, placed, weighted
from flowppl.stochastic.training import OPTIONS, train_placed
from flowppl.training import Options, Record


class SNFDistribution(dist.TorchDistribution):
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
        PathDensityError: on `log_prob`, of a value that is not the very tensor drawn last.

    Example:
        >>> import torch
        >>> from flowppl import flows
        >>> from flowppl.pyro import SNFDistribution
        >>> from flowppl.stochastic import Moves, snf
        >>> path = snf([flows.affine(), Moves("langevin", repeats=5)], dim=2)
        >>> q = SNFDistribution(path, path.init(torch.Generator()), lambda x: -0.5 * (x**2).sum(-1))
        >>> x, log_w = q.sample_weighted(None, 100)
        >>> x.shape, log_w.shape
        (torch.Size([100, 2]), torch.Size([100]))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        path: Path,
        variables: dict[str, Any],
        log_prob: Callable[[Tensor], Tensor],
        loc: Tensor | None = None,
        scale_tril: Tensor | None = None,
        *,
        gradient: str = "reparam",
        validate_args: bool | None = None,
    ) -> None:
        self.path, self.variables, self.target = path, variables, log_prob
        self.loc, self.scale_tril, self.gradient = loc, scale_tril, check_gradient(gradient)
        self._memo = Memo()
        super().__init__(torch.Size(), torch.Size((path.dim,)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SNFDistribution:
        """The same over `batch_shape`."""
        new = self._get_checked_instance(SNFDistribution, _instance)
        vars(new).update({**vars(self), "_memo": Memo(), "_batch_shape": torch.Size(batch_shape)})
        return new

    def _draw(self, rng: torch.Generator | None, n: int) -> Any:
        at = (self.path, self.variables, self.target, n, self.loc, self.scale_tril)
        return draw(rng, *at, gradient=self.gradient)

    def sample_weighted(self, rng: torch.Generator | None, n: int) -> tuple[Tensor, Tensor]:
        """Draws `(n, d)` with the log-weights of their paths `(n,)`: the mean weight estimates the target's integral, unbiased.

        Args:
            rng: A `torch.Generator` (None: torch's global one).
            n: How many.
        """
        return self._draw(rng, n)[:2]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, d)`, attached to the variables; what stands for their log density is remembered."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        found = self._draw(None, shape.numel())
        x = found.x.reshape(*shape, -1)
        self._memo.put((x,), found.log_q.reshape(shape))
        return x

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without derivatives."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) - log_w of the last draw, which has to be this very tensor."""
        found = self._memo.get((value,))
        if found is None:
            raise PathDensityError(
                "value: the density of a stochastic flow is an integral over paths, and known for the last draw alone, by its "
                "path: use sample_weighted, or score the very tensor that was drawn"
            )
        return found


class AutoSNF(FlatGuide):
    """A guide by a stochastic normalizing flow: maps and Markov kernels in turn take it to the posterior, by the model's density.

    Paths start at a normal and pass by densities base^(1 - beta) p^beta, as those of NumPyro's `AutoDAIS` do; maps between shorten
    the way. Losses such as `Trace_ELBO` see log p - log q = log_w, the log-weight of the path: minus the loss is E log_w, at most
    the log evidence. `train_path` trains each map alone, which takes any moves and costs less. `weighted` gives the draws with
    their weights, which are exact whatever the training. A step of `SVI` asks for the model's gradient once for each step of the
    dynamics, of all of the data and twice differentiable, so that it costs much more than one of `AutoFlow`;
    `vectorize_particles=True` asks for those of all particles at once.

    The path is one of coordinates in which `init_loc_fn`'s point is zero and `init_scale` one, or what `precondition` finds: a
    posterior whose scales differ needs that. A shift and scales of the base train too. Densities are those given the arguments of
    the call; one that leaves data open, as for predictions, takes those that the guide met first.

    Args:
        model: The model; discrete latents marked by `config_enumerate` are summed out, with the loss `TraceEnum_ELBO`.
        layers: Of the path, see `flowppl.stochastic.snf`; or a `Path` of the latents' dimension.
        gradient: "reparam" or "score", for layers that accept or reject, see `SNFDistribution`.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start, in unconstrained space.

    Attributes:
        preconditioned: The normal that `precondition` found (`loc`, `scale_tril`, `elbo`, `num_evals`), or None.
        history: What `train_path` saw, a `flowppl.training.Record` of each chunk of steps.

    Raises:
        UnknownFlowError: no recipe has this name.
        ValueError: `gradient` is unknown or `init_scale` not positive.
        UnsupportedModelError: on use: a plate subsamples, or a latent is an angle, or discrete and not enumerated.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from flowppl.pyro import AutoSNF
        >>> from flowppl.stochastic import Moves
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(3.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoSNF(model, ["affine", Moves("langevin", repeats=3)])
        >>> elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
        >>> losses = [svi.step() for _ in range(10)]
        >>> posterior = guide.weighted(None, 200)
        >>> posterior.samples["scale"].shape, posterior.log_weights.shape
        ((200,), (200,))
    """

    def __init__(
        self,
        model: Callable,
        layers: Layers = LAYERS,
        *,
        gradient: str = "reparam",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        super().__init__(model, init_loc_fn)
        self._layers, self._gradient, self._init_scale = check_layers(layers), check_gradient(gradient), init_scale
        self.preconditioned: NormalApproximation | None = None
        self.history: list[Record] = []

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        model, init_loc_fn = self._require_source()[:2]
        try:
            density = LogDensity(model, args, kwargs, init_loc_fn=init_loc_fn)
            refuse_minibatches(density.plates)
        except Exception:
            self.prototype_trace = None  # the next call starts anew
            raise
        self._source = (model, init_loc_fn, density)

    def _setup_flow(self) -> None:
        angles = (name for name, angle in zip(self._layout.names, self._angles, strict=True) if angle)
        refuse_angles(angles, "a path goes over real vectors: use AutoFlow or fit")
        loc = self._layout.start
        self._path = path_of(self._layers, len(loc))
        scale_tril = self._init_scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        self.path_parameters = FlowParameters(placed(self._path.init(None, loc), loc, scale_tril))

    def _variables(self) -> dict[str, Any]:
        return self._variables_in("path_parameters")

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> LogDensity:
        """The density given these arguments, or those that the guide met first where these leave open what those do not."""
        model, init_loc_fn, density = self._require_source()
        known = density._kwargs
        same = [a is b for a, b in zip(args, density._args, strict=False)] + [
            known.get(k) is v for k, v in kwargs.items()
        ]
        if (not args and not kwargs) or (len(same) == len(density._args) + len(known) and all(same)):
            return density
        start = InitMessenger(start_from(init_loc_fn))
        with torch.no_grad(), apart(), poutine.block(), start:
            nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
        latents = {name for name, site in nodes.items() if is_latent(site) and not is_enumerated(site)}
        return density.given(*args, **kwargs) if latents == set(density.names) else density

    def get_posterior(self, *args: Any, **kwargs: Any) -> SNFDistribution:
        """The path with its present parameters, over the flat unconstrained latents.

        Args:
            args: The model's arguments; none for those that the guide met first.
            kwargs: Its keyword arguments.
        """
        variables = self._variables()
        log_prob = self._given(args, kwargs).log_prob
        return SNFDistribution(self._path, variables, log_prob, *ends(variables), gradient=self._gradient)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """There is none.

        Raises:
            PathDensityError: always.
        """
        raise PathDensityError("a stochastic flow is no transform of its base: use AutoFlow for NeuTraReparam")

    def precondition(self, rng: torch.Generator | None, *args: Any, **kwargs: Any) -> AutoSNF:
        """Puts a normal approximation where paths start, in place; see `AutoFlow.precondition`."""
        self.preconditioned = self._normal(rng, args, kwargs)
        loc, scale_tril = (torch.as_tensor(a).to(self._layout.start) for a in self.preconditioned[:2])
        self._assign(placed(self._variables(), loc, scale_tril))
        return self

    def train_path(
        self,
        *args: Any,
        by: str = "layer",
        seed: int = 0,
        options: Options = OPTIONS,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> AutoSNF:
        """Trains the path by layer, in place of `SVI` or before it: each map alone takes the density before it to that behind it.

        No derivative goes through the moves, so that those which accept or reject are as good as others, and the model's gradient
        is asked for once in each step of the dynamics. The base stays where it is, and the model's own parameters as they are.
        Arbel, Matthews & Doucet 2021, "Annealed flow transport Monte Carlo"; Matthews et al. 2022, "Continual repeated annealed
        flow transport Monte Carlo".

        Args:
            args: The model's arguments; none for those that the guide met first.
            by: "layer", or "energy" for all layers together; see `flowppl.stochastic.train_path`.
            seed: Of all draws.
            options: How to train.
            progress_bar: Whether to show how it goes.
            kwargs: The model's keyword arguments.

        Returns:
            The guide, whose path has been trained in place.

        Raises:
            ValueError: `by` is neither of these.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from flowppl.pyro import AutoSNF
            >>> from flowppl.stochastic import Moves
            >>> from flowppl.training import Options
            >>> def model():
            ...     scale = pyro.sample("scale", dist.HalfNormal(3.0))
            ...     pyro.sample("x", dist.Normal(0.0, scale))
            >>> guide = AutoSNF(model, ["affine", Moves("metropolis", repeats=3)]).precondition(None)
            >>> guide = guide.train_path(options=Options(max_steps=20), progress_bar=False)
            >>> guide.weighted(None, 200).samples["x"].shape
            (200,)
        """
        at = self.setup(*args, **kwargs).get_posterior(*args, **kwargs)
        with shown(options, progress_bar) as progress:
            how = {"by": by, "seed": seed, "options": options, "progress": progress}
            variables, self.history = train_placed(self._path, at.variables, at.target, **how)
        self._assign(variables)
        return self

    @torch.no_grad()
    def sample_posterior(
        self, rng: torch.Generator | None = None, sample_shape: Sequence[int] = (), *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws of every site `(*sample_shape, *shape)`.

        Without weights: what the paths end at, which training brings close to the posterior. See `weighted`.

        Args:
            rng: A `torch.Generator` (None: torch's global one).
            sample_shape: Shape of the draws.
            args: The model's arguments; none for those that the guide met first.
            kwargs: Its keyword arguments.
        """
        shape = torch.Size(sample_shape)
        x, _ = self.get_posterior(*args, **kwargs).sample_weighted(rng, shape.numel())
        return self._constrain(x.reshape(*shape, -1))

    def weighted(self, rng: torch.Generator | None, num_samples: int, *args: Any, **kwargs: Any) -> ModelPosterior:
        """Draws with the exact weights of their paths: moments, the evidence, k-hat, resampling, predictions, ArviZ.

        Computed in float64 where the model allows it.

        Args:
            rng: A `torch.Generator` (None: torch's global one).
            num_samples: How many.
            args: The model's arguments; none for those that the guide met first.
            kwargs: Its keyword arguments.

        Returns:
            As `fit` does: `samples` by site, `log_weights`, `mean()`, `log_evidence`, `ess`, `khat`, `resample`, `to_arviz`,
            `diagnose`.
        """
        self.setup(*args, **kwargs)
        model, init_loc_fn, _ = self._require_source()
        density = self._given(args, kwargs)
        view = View(model, density._args, density._kwargs, "affine", init_loc_fn, angles=False)
        like = view.problem.like
        variables = tree.map(lambda a: to_like(a.detach(), like), self._variables())
        with view.precise.context(), torch.no_grad():
            draws = weighted(rng, self._path, variables, view.problem.log_prob, num_samples, *ends(variables))
        return ModelPosterior(view, Fit(variables, draws, [], [], None))
