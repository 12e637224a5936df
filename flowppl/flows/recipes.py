"""The registered flows: how each is made of bijections, in any dimension."""

from __future__ import annotations

from flowppl.bijections import (
    Affine,
    Bijection,
    BlockAutoregressive,
    Chain,
    CircularSpline,
    Composed,
    Coupling,
    DeepSigmoid,
    Elementwise,
    ExtremeTails,
    Inverse,
    Keep,
    LULinear,
    MaskedAutoregressive,
    Planar,
    Radial,
    Residual,
    Reversal,
    Rotation,
    RQSpline,
    Stack,
    SumOfSquares,
    Sylvester,
    TorusEnd,
    Transformer,
)
from flowppl.flows.registry import register


@register("affine")
def affine(dim: int, context_dim: int, *, hidden: tuple[int, ...] = (64, 64)) -> Bijection:
    """An affine map of full rank: a multivariate normal, on a normal base.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        hidden: With a context, widths of the network that shifts and scales the base's coordinates.
    """
    if not context_dim:
        return LULinear(dim)
    return Chain((Elementwise(dim, Affine(), context_dim, tuple(hidden)), LULinear(dim)))


@register("nsf")
def nsf(
    dim: int,
    context_dim: int,
    *,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    activation: str = "silu",
    linear: bool = True,
    affine: bool = True,
    light: int = 0,
    embedding: int = 0,
    circular: tuple[int, ...] = (),
    boxed: bool = False,
) -> Bijection:
    """Neural spline flow: rational-quadratic spline couplings with learned linear mixing. Durkan et al. 2019.

    An affine map follows each spline: a scale that depends on other coordinates, as in a funnel, is one number to it, and a
    bend of every bin to a spline.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of couplings.
        hidden: Widths of each conditioner's hidden layers.
        bins: Bins of each spline.
        bound: Half-width of the splines' box; the identity outside.
        activation: The conditioners' activation.
        linear: Whether an LU-factorised linear map precedes each coupling.
        affine: Whether an affine map with a bounded scale follows each spline.
        light: How many coordinates, the first ones, the map at the end computes from themselves alone. With `linear=False` and
            `affine=False` heavy tails of the others do not reach them. Laszkiewicz et al. 2022.
        embedding: Given a length, the couplings share one network, and each has a learned vector of this length. Lee et al. 2020,
            "NanoFlow".
        circular: Which coordinates are angles in [-pi, pi): circular splines move them, and networks see their sines and cosines.
            Rezende et al. 2020, "Normalizing flows on tori and spheres".
        boxed: Whether angles come out as u, the angle being 2 pi sigmoid(u) - pi, as NumPyro's guides have them.
    """
    spline = RQSpline(bins, bound)
    transformer = Composed(spline, Affine()) if affine else spline
    if circular:
        groups = _halves(len(circular), True) + _halves(dim - len(circular), False)
        transformers: dict[bool, Transformer] = {True: CircularSpline(bins), False: transformer}
        block = _mixed_couplings(groups, transformers, context_dim + embedding, tuple(hidden), activation, linear)
        return Chain((Stack(block, layers, embedding), TorusEnd(dim, tuple(circular), boxed)))
    return _couplings(dim, transformer, context_dim, layers, hidden, activation, linear, embedding, light)


@register("realnvp")
def realnvp(
    dim: int,
    context_dim: int,
    *,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    linear: bool = True,
) -> Bijection:
    """Affine couplings with bounded scales and learned linear mixing. Dinh et al. 2017.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of couplings.
        hidden: Widths of each conditioner's hidden layers.
        activation: The conditioners' activation.
        linear: Whether an LU-factorised linear map precedes each coupling.
    """
    return _couplings(dim, Affine(), context_dim, layers, hidden, activation, linear)


@register("maf")
def maf(
    dim: int,
    context_dim: int,
    *,
    layers: int = 5,
    transformer: str | Transformer = "affine",
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    linear: bool = True,
) -> Bijection:
    """Masked autoregressive flow: a density in one pass, draws by fixed-point sweeps. Papamakarios et al. 2017.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of autoregressive maps; the order of the coordinates is reversed after each.
        transformer: The map of each coordinate: "affine"; "spline", for an autoregressive neural spline flow (Durkan et al.
            2019); "deep_sigmoid", for a neural autoregressive flow (Huang et al. 2018); "sum_of_squares" (Jaini et al. 2019); or
            a `Transformer`.
        hidden: Widths of each masked network's hidden layers.
        activation: The networks' activation.
        linear: Whether an LU-factorised linear map precedes each map.
    """
    return _autoregressive(dim, transformer, context_dim, layers, hidden, activation, linear, density=True)


@register("iaf")
def iaf(
    dim: int,
    context_dim: int,
    *,
    layers: int = 5,
    transformer: str | Transformer = "affine",
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "silu",
    linear: bool = True,
) -> Bijection:
    """Inverse autoregressive flow: draws in one pass, the density of other points by fixed-point sweeps. Kingma et al. 2016.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of autoregressive maps; the order of the coordinates is reversed after each.
        transformer: The map of each coordinate, see `maf`.
        hidden: Widths of each masked network's hidden layers.
        activation: The networks' activation.
        linear: Whether an LU-factorised linear map precedes each map.
    """
    return _autoregressive(dim, transformer, context_dim, layers, hidden, activation, linear, density=False)


@register("ttf")
def ttf(
    dim: int,
    context_dim: int,
    *,
    layers: int = 8,
    hidden: tuple[int, ...] = (64, 64),
    bins: int = 8,
    activation: str = "silu",
) -> Bijection:
    """Tail transform flow: a neural spline flow with learned power tails, left and right, at each coordinate of its end.

    It does not start as the identity, since its tails are heavy from the start. Hickling & Prangle 2025, "Flexible tails for
    normalizing flows".

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of couplings.
        hidden: Widths of each conditioner's hidden layers.
        bins: Bins of each spline.
        activation: The conditioners' activation.
    """
    body = _couplings(dim, Composed(RQSpline(bins), Affine()), context_dim, layers, hidden, activation, True)
    return Chain((body, Elementwise(dim, ExtremeTails()), Elementwise(dim, Affine())))


@register("planar")
def planar(dim: int, context_dim: int, *, layers: int = 16, hidden: tuple[int, ...] = (64, 64)) -> Bijection:
    """Planar flow that scores any point. Rezende and Mohamed 2015.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of planar maps.
        hidden: With a context, widths of the networks' hidden layers.
    """
    return Chain((Stack(Planar(dim, context_dim, hidden), layers), LULinear(dim)))


@register("radial")
def radial(dim: int, context_dim: int, *, layers: int = 16, hidden: tuple[int, ...] = (64, 64)) -> Bijection:
    """Radial flow that scores any point. Rezende and Mohamed 2015.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of radial maps.
        hidden: With a context, widths of the networks' hidden layers.
    """
    return Chain((Stack(Radial(dim, context_dim, tuple(hidden)), layers), LULinear(dim)))


@register("sylvester")
def sylvester(
    dim: int, context_dim: int, *, layers: int = 8, rank: int | None = None, hidden: tuple[int, ...] = (64, 64)
) -> Bijection:
    """Sylvester flow that scores any point: planar maps of higher rank. Van den Berg et al. 2018.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of maps.
        rank: Of each map, at most the dimension; None for that, at most 8.
        hidden: With a context, widths of the networks' hidden layers.
    """
    rank = None if rank is None else min(rank, dim)
    return Chain((Stack(Sylvester(dim, rank, context_dim, tuple(hidden)), layers), LULinear(dim)))


@register("residual")
def residual(
    dim: int, context_dim: int, *, layers: int = 8, hidden: tuple[int, ...] = (64, 64), contraction: float = 0.9
) -> Bijection:
    """Contractive residual flow with exact log-determinants: free-form, all coordinates at once. Chen et al. 2019.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of residual maps.
        hidden: Widths of each map's hidden layers.
        contraction: Lipschitz constant of each map less the identity, at most; below one.
    """
    return Chain((Stack(Residual(dim, context_dim, tuple(hidden), contraction), layers), LULinear(dim)))


@register("bnaf")
def bnaf(
    dim: int,
    context_dim: int,
    *,
    layers: int = 3,
    units: tuple[int, ...] = (8, 8),
    hidden: tuple[int, ...] = (64, 64),
) -> Bijection:
    """Block neural autoregressive flow whose range is the whole line, with learned linear mixing. De Cao et al. 2019.

    Args:
        dim: Length of the vectors.
        context_dim: Length of the context.
        layers: Number of maps; the order of the coordinates is reversed after each.
        units: Units for each coordinate of each map's hidden layers.
        hidden: With a context, widths of the networks' hidden layers.
    """
    return _alternating(BlockAutoregressive(dim, context_dim, tuple(units), tuple(hidden)), layers, linear=True)


def _couplings(
    dim: int,
    transformer: Transformer,
    context_dim: int,
    layers: int,
    hidden: tuple[int, ...],
    activation: str,
    linear: bool,
    embedding: int = 0,
    light: int = 0,
) -> Bijection:
    """Couplings whose roles change by a rotation of the coordinates, rotated back and mapped affinely at the end."""
    coupling = Coupling(dim, transformer, context_dim + embedding, tuple(hidden), activation)
    kept = coupling.kept

    def rotation(by: int) -> tuple[Rotation, ...]:
        return (Rotation(dim, by % dim),) if by % dim else ()

    mixing = (LULinear(dim),) if linear else ()
    block = (*mixing, coupling, *rotation(kept))
    body = Stack(Chain(block), layers, embedding)
    return Chain((body, *rotation(-kept * layers), LULinear(dim, light=light)))


def _halves(n: int, angles: bool) -> list[tuple[int, bool]]:
    """Sizes of the groups that move together, and whether they are angles."""
    return [(size, angles) for size in (n // 2, n - n // 2) if size]


def _mixed_couplings(
    groups: list[tuple[int, bool]],
    transformers: dict[bool, Transformer],
    context_dim: int,
    hidden: tuple[int, ...],
    activation: str,
    linear: bool,
) -> Bijection:
    """Every group of coordinates moves once, given all the others; the order is the same in the end."""
    kinds = [angles for size, angles in groups for _ in range(size)]
    dim, num_angles = len(kinds), sum(kinds)
    mix = linear and num_angles < dim
    layers: list[Bijection] = [Keep(num_angles, LULinear(dim - num_angles))] if mix else []
    for moved, angles in reversed(groups):
        kept = tuple(i for i, is_angle in enumerate(kinds[: dim - moved]) if is_angle)
        layers.append(Coupling(dim, transformers[angles], context_dim, hidden, activation, moved, kept))
        kinds = kinds[dim - moved :] + kinds[: dim - moved]
        layers += [Rotation(dim, dim - moved)] if moved < dim else []
    return Chain(tuple(layers))


_TRANSFORMERS: dict[str, Transformer] = {
    "affine": Affine(),
    "spline": Composed(RQSpline(), Affine()),
    "deep_sigmoid": Composed(DeepSigmoid(), Affine()),
    "sum_of_squares": SumOfSquares(),
}


def _autoregressive(
    dim: int,
    transformer: str | Transformer,
    context_dim: int,
    layers: int,
    hidden: tuple[int, ...],
    activation: str,
    linear: bool,
    density: bool,
) -> Bijection:
    """Masked-autoregressive maps, whose fast direction is that of the density or that of draws."""
    if isinstance(transformer, str):
        if transformer not in _TRANSFORMERS:
            raise ValueError(f"transformer must be one of {', '.join(_TRANSFORMERS)}, got {transformer!r}")
        transformer = _TRANSFORMERS[transformer]
    one_pass = MaskedAutoregressive(dim, transformer, context_dim, tuple(hidden), activation)
    return _alternating(Inverse(one_pass) if density else one_pass, layers, linear)


def _alternating(triangular: Bijection, layers: int, linear: bool) -> Bijection:
    """Triangular maps in alternating orders, and an affine map at the end."""
    dim = triangular.dim
    mixing = (LULinear(dim),) if linear else ()
    back = (Reversal(dim),) if layers % 2 else ()
    return Chain((Stack(Chain((*mixing, triangular, Reversal(dim))), layers), *back, LULinear(dim)))
