"""Flows by name: what waits for its dimension, and the registry that finds it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowppl.bijections import Bijection
from flowppl.errors import DimensionError, UnknownFlowError, UnsupportedModelError
from flowppl.flows.bases import Base, CircularUniform, Normal, Product
from flowppl.flows.flow import Flow

_RECIPES: dict[str, Callable[..., Bijection]] = {}


@dataclass(frozen=True)
class Recipe:
    """A flow that waits for its dimension: `flows.nsf(layers=4)(dim=10)`.

    Attributes:
        name: The registered name.
        options: The options given, as pairs.
        base: The base density.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    base: Base = field(default_factory=Normal)

    def __call__(self, dim: int, context_dim: int = 0) -> Flow:
        """Builds the flow of vectors of length `dim`, conditional on a context of length `context_dim`.

        Raises:
            DimensionError: `dim` is less than one or `context_dim` negative.
        """
        if dim < 1 or context_dim < 0:
            raise DimensionError(f"expected dim >= 1 and context_dim >= 0, got dim={dim}, context_dim={context_dim}")
        options = dict(self.options)
        return Flow(_RECIPES[self.name](dim, context_dim, **options), self._base(dim, len(options.get("circular", ()))))

    def _base(self, dim: int, angles: int) -> Base:
        """The base, with uniform angles in front where there are some."""
        if not angles:
            return self.base
        return CircularUniform() if angles == dim else Product((CircularUniform(), self.base), (angles, dim - angles))

    @property
    def knows_angles(self) -> bool:
        """Whether this kind of flow has circular coordinates."""
        return "circular" in inspect.signature(_RECIPES[self.name]).parameters

    def with_circular(self, circular: tuple[int, ...], boxed: bool) -> Recipe:
        """The recipe of the same flow in which some coordinates are angles.

        Args:
            circular: Which.
            boxed: Whether the flow is over u, the angle being 2 pi sigmoid(u) - pi.

        Raises:
            UnsupportedModelError: this kind of flow knows no angles.
        """
        if not self.knows_angles:
            raise UnsupportedModelError(f"flow {self.name!r} has no circular coordinates, which angles need: use 'nsf'")
        options = {**dict(self.options), "circular": circular, "boxed": boxed}
        return Recipe(self.name, tuple(sorted(options.items())), self.base)


def register(name: str) -> Callable[[Callable[..., Bijection]], Callable[..., Recipe]]:
    """Registers `build(dim, context_dim, *, option=...) -> Bijection` under a name that every guide and distribution accepts.

    The decorated function becomes the recipe's constructor: it takes the options, and `base=` for another base density.

    Example:
        >>> from flowppl import flows
        >>> from flowppl.bijections import Affine, Elementwise
        >>> @flows.register("diagonal")
        ... def diagonal(dim, context_dim):
        ...     return Elementwise(dim, Affine(), context_dim)
        >>> flows.get("diagonal")(dim=2).dim
        2
    """

    def decorate(function: Callable[..., Bijection]) -> Callable[..., Recipe]:
        signature = inspect.signature(function)
        known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]

        def recipe(*, base: Base = Normal(), **options: Any) -> Recipe:  # noqa: B008 (immutable)
            unknown = sorted(set(options) - set(known))
            if unknown:
                raise TypeError(f"flow {name!r} has no option {unknown[0]!r}; it has base, {', '.join(known)}")
            return Recipe(name, tuple(sorted(options.items())), base)

        _RECIPES[name] = function
        recipe.__name__, recipe.__qualname__, recipe.__doc__ = name, name, function.__doc__
        recipe.__module__ = function.__module__
        return recipe

    return decorate


def names() -> list[str]:
    """The registered names."""
    return sorted(_RECIPES)


def get(flow: str | Recipe | Flow) -> Callable[..., Flow]:
    """Returns what builds a flow from `(dim, context_dim)`: from a name, a recipe, or a ready flow of that dimension.

    Raises:
        UnknownFlowError: no recipe has this name; the message names the nearest.
    """
    if isinstance(flow, Recipe):
        return flow
    if isinstance(flow, Flow):

        def ready(dim: int, context_dim: int = 0) -> Flow:
            if (flow.dim, flow.context_dim) != (dim, context_dim):
                raise DimensionError(
                    f"flow: expected dim={dim} and context_dim={context_dim}, got a flow with dim={flow.dim} and "
                    f"context_dim={flow.context_dim}; give a name or a recipe, such as flows.nsf(), to have it fitted"
                )
            return flow

        return ready
    if flow in _RECIPES:
        return Recipe(flow)
    near = difflib.get_close_matches(str(flow), names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UnknownFlowError(f"no flow is called {flow!r}: {hint}registered flows are {', '.join(names())}")


def resolve(flow: str | Recipe | Flow, dim: int | None = None, context: Any = None) -> Flow:
    """Returns a flow from a name, a recipe or a flow; names and recipes need `dim` and look at the context's length.

    Raises:
        TypeError: `dim` is missing for a name or a recipe.
        DimensionError: a ready flow has another dimension or context.
        UnknownFlowError: no recipe has this name.
    """
    known_dim, known_context_dim = (flow.dim, flow.context_dim) if isinstance(flow, Flow) else (None, 0)
    dim = known_dim if dim is None else dim
    if dim is None:
        raise TypeError(f"dim: expected the length of the flow's vectors beside flow={flow!r}, got None")
    # A ready flow whose context is missing is an error of the distribution.
    return get(flow)(dim, known_context_dim if context is None else context.shape[-1])


def over_latents(
    flow: str | Recipe | Flow, sizes: Sequence[int], angles: Sequence[bool], boxed: bool, context_dim: int = 0
) -> Flow:
    """Returns the flow of a guide over a model's flat latents, some of which may be angles.

    Args:
        flow: A name or a recipe, which learns of the angles, or a ready flow, which knows about them itself.
        sizes: How many coordinates of the flat vector each site has.
        angles: Whether they are angles.
        boxed: Whether they are u, the angle being 2 pi sigmoid(u) - pi. A flow that knows no angles can have those, with an edge
            at the seam; on a line of whole turns its density would have no end.
        context_dim: Length of the flow's context, 0 for none.

    Raises:
        UnsupportedModelError: there are angles that are not boxed and the flow knows none.
    """
    kinds = [angle for size, angle in zip(sizes, angles, strict=True) for _ in range(size)]
    circular, dim = tuple(i for i, angle in enumerate(kinds) if angle), len(kinds)
    if circular and not isinstance(flow, Flow):
        recipe = flow if isinstance(flow, Recipe) else Recipe(flow)
        if recipe.knows_angles or not boxed:
            return recipe.with_circular(circular, boxed)(dim, context_dim)
    return get(flow)(dim, context_dim)
