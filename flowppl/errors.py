"""Errors that a user can meet; each names the argument, what was expected and what to do."""

from __future__ import annotations


class FlowpplError(Exception):
    """Base of every error that flowppl raises on purpose."""


class DimensionError(FlowpplError, ValueError):
    """An array or an option has a shape that does not fit the flow."""


class UnknownFlowError(FlowpplError, KeyError):
    """No flow recipe has this name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr, quotes and all


class UnsupportedModelError(FlowpplError, NotImplementedError):
    """The model has sites that a flow over a flat real vector cannot represent."""


class UnsupportedFlowError(FlowpplError, ValueError):
    """A flow of another library is not one that guides and distributions over real vectors can take."""


class PathDensityError(FlowpplError, NotImplementedError):
    """The density of what a stochastic flow draws is an integral over paths, and was asked for at a value that it did not draw."""


class SiteError(FlowpplError, ValueError):
    """A name is not that of a site which the model has, or which can be what it was named for."""


class NonFiniteError(FlowpplError, ValueError):
    """A model's log density or gradient where a method has to start, its simulations, or data, are not finite."""


class FlowFileError(FlowpplError, ValueError):
    """A file is not a flow file, is damaged, or does not fit what it is loaded into."""


class CheckpointError(FlowpplError, ValueError):
    """A checkpoint cannot be read, or belongs to another fit."""


class MissingExtraError(FlowpplError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'flowppl[{extra}]'")


class FitWarning(UserWarning):
    """A fit has ended, and its draws are not to be trusted."""
