"""Flows from zuko: a trained or untrained one becomes a flow of ours, for all that takes one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.distributions import Transform, constraints

from flowppl.backend import backend_of
from flowppl.bijections.base import Bijection, Params, broadcast, pull_through_inverse
from flowppl.errors import MissingExtraError, UnsupportedFlowError
from flowppl.flows import Flow

_SEPARATOR = "/"  # the paths of a tree have dots between keys, and so no dots in them


@dataclass(frozen=True)
class ZukoBijection(Bijection):
    """A lazy transform of zuko, which maps data to latents, as a bijection of latents to data.

    Attributes:
        transform: The lazy transform; only its structure is used, and it is never changed.
        dim: Length of the vectors.
        context_dim: Length of the context, 0 for none.
    """

    transform: Any
    dim: int
    context_dim: int = 0
    unwritable = (
        "a flow from zuko cannot be written to a flow file, which holds no code of other libraries: save its tensors as "
        "torch does, for example with torch.save(guide.state_dict(), path) or pyro.get_param_store().save(path)"
    )

    def init(self, rng: Any) -> dict[str, Any]:
        """Copies of the module's tensors, so that a trained flow starts trained; `rng` is not used.

        Parameters that require no gradient are constants, as buffers are.
        """
        parameters = dict(self.transform.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        constant = {name: p for name, p in parameters.items() if not p.requires_grad}
        constant.update(self.transform.named_buffers())
        return {
            kind: {name.replace(".", _SEPARATOR): t.detach().clone() for name, t in tensors.items()}
            for kind, tensors in (("params", trained), ("const", constant))
        }

    def forward(self, params: Params, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.context_dim)
        return _call(self._bound(params)(context).inv, x)

    def inverse(self, params: Params, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Bijection.inverse`."""
        y, context = broadcast(y, context, self.context_dim)
        return _call(self._bound(params)(context), y)

    def forward_with_score(
        self, params: Params, x: Tensor, score: Tensor, context: Tensor | None = None, score_context: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Bijection.forward_with_score`: by one pullback through the inverse.

        zuko's numerical inverses, quadratures and ODEs are functions of plain autograd, which torch.func cannot
        transform: torch.func is used only where it is in use already, and there those flows raise torch's error.
        """
        y, log_det = self.forward(params, x, context)
        if _functorch.maybe_current_level() is not None:
            return y, log_det, *pull_through_inverse(self.inverse, params, y, score, context, score_context)
        with torch.enable_grad():
            inputs = [a.detach().requires_grad_() for a in (y, context) if a is not None]
            outputs = self.inverse(backend_of(y).stop(params), *inputs)
            grads = torch.autograd.grad(outputs, inputs, (score, torch.ones_like(log_det)), materialize_grads=True)
        return y, log_det, grads[0], None if context is None else score_context + grads[1]

    def _bound(self, params: Params) -> nn.Module:
        named = chain(self.transform.named_parameters(), self.transform.named_buffers())
        return _holding(self.transform, {id(t): params[name.replace(".", _SEPARATOR)] for name, t in named})


def from_zuko(flow: Any) -> Flow:
    """Turns a flow of zuko into one that every guide, distribution, transform and module here takes.

    Its `init` gives copies of the module's tensors, trained or not, and nothing ever changes the module itself. Its
    log density and draws are zuko's; gradients with respect to its parameters and the context flow. zuko draws from
    NAF, UNAF, SOSPF, BPF and GF by a search, to about 1e-6 and, but for BPF, in [-10, 10] only, where it piles up what
    would lie beyond: for guides take NSF, MAF or RealNVP. Neither those five nor CNF work under `torch.func`.

    Args:
        flow: A `zuko.flows.Flow` of real vectors over a standard normal base. A context is found by its length.

    Raises:
        TypeError: it is no `zuko.flows.Flow`; a mixture (GMM) is none.
        UnsupportedFlowError: its base is another, or its vectors have bounds (NCSF: angles).
        MissingExtraError: zuko is not installed.

    Example:
        >>> import pyro, torch, zuko
        >>> from flowppl.pyro import flow_module, from_zuko
        >>> flow = from_zuko(zuko.flows.NSF(2, context=3, transforms=1))
        >>> flow.dim, flow.context_dim
        (2, 3)
        >>> pyro.sample("x", flow_module("q", flow, torch.zeros(5, 3))).shape
        torch.Size([5, 2])
    """
    try:
        import zuko
    except ModuleNotFoundError as error:
        raise MissingExtraError("zuko", "zuko") from error
    if not isinstance(flow, zuko.lazy.Flow):
        raise TypeError(f"flow: expected a zuko.flows.Flow, such as zuko.flows.NSF(3), got {type(flow).__name__}")
    fixed = isinstance(flow.base, zuko.lazy.UnconditionalDistribution) and not list(flow.base.parameters())
    base = flow.base() if fixed else flow.base
    if not isinstance(base, zuko.distributions.DiagNormal) or (base.mean != 0).any() or (base.stddev != 1).any():
        raise UnsupportedFlowError(
            f"flow: expected the base of most flows of zuko, a DiagNormal of zeros and ones that are buffers, got {base}"
        )
    (dim,) = base.event_shape
    context_dim = _find_context_dim(flow.transform, dim)
    return Flow(ZukoBijection(flow.transform, dim, context_dim))


@torch.no_grad()
def _find_context_dim(transform: nn.Module, dim: int) -> int:
    """The length of the context that the transform can be called with; zuko does not keep it."""
    parameters = list(transform.parameters())
    x = parameters[0].new_zeros(dim) if parameters else torch.zeros(dim)
    refusal = None
    for n in range(1 + max((p.shape[-1] for p in parameters if p.ndim), default=0)):  # a network takes no longer one
        try:
            built = transform(x.new_zeros(n) if n else None)
            built(x)
        except Exception as error:  # whatever a network says to an input of another length
            refusal = refusal or error
            continue
        if not _is_real(built.domain):
            raise UnsupportedFlowError(f"flow: expected a flow of unbounded real vectors, got one over {built.domain}")
        return n
    raise UnsupportedFlowError(f"flow: no context lets it map a vector of length {dim}: {refusal}") from refusal


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real


def _call(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    y, log_det = transform.call_and_ladj(x)
    return y, log_det if transform.domain.event_dim else log_det.sum(-1)


def _holding(module: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """A copy of a module, with its children, that holds other tensors in the place of its own, found by their ids.

    Not torch.func.functional_call, which puts the module's own tensors back when it returns: zuko's transforms evaluate
    the networks when they are called, and some do again in the backward pass.
    """
    new, state = object.__new__(type(module)), dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        state[kind] = {k: None if t is None else tensors[id(t)] for k, t in state[kind].items()}
    state["_modules"] = {k: None if m is None else _holding(m, tensors) for k, m in state["_modules"].items()}
    # In evaluation mode zuko leaves parameters out of the gradient, and in training mode torch's dropout draws.
    state["training"] = not type(module).__module__.startswith("torch.")
    new.__dict__.update(state)
    return new
