"""Configurations: frozen dataclasses that describe themselves as JSON and are rebuilt from it.

A flow file names classes, and only classes that are registered here can be built from one: nothing else is looked up, imported
or executed.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, ClassVar

from flowppl.errors import FlowFileError

_TYPES: dict[str, type[Configured]] = {}


class Configured:
    """Base of bijections, transformers, networks, bases and flows: a hashable description without arrays.

    Attributes:
        unwritable: Why no flow file can hold one, and what to do instead; empty where one can.
    """

    unwritable: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = _TYPES.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"the class name {cls.__name__!r} is taken by {known.__module__}.{known.__qualname__}: flow files name "
                f"classes, so give {cls.__module__}.{cls.__qualname__} another name"
            )
        _TYPES[cls.__name__] = cls


def describe(value: Any) -> Any:
    """Returns `value` (a configuration, or a tuple or scalar inside one) as JSON types.

    Raises:
        FlowFileError: a configuration holds what no file can.
    """
    if isinstance(value, Configured):
        if value.unwritable:
            raise FlowFileError(value.unwritable)
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a configuration holds numbers, strings, tuples and configurations, not {type(value).__name__}")


def build(description: Any, max_size: int | None = None) -> Any:
    """Rebuilds what `describe` returned.

    Args:
        description: The JSON types.
        max_size: The largest integer to accept. Dimensions, depths and widths cannot exceed the numbers that come with them, so a
            hostile file cannot ask for more memory than it brings.

    Raises:
        FlowFileError: a class is unknown, a field is missing or unknown, or a value is out of range.
    """
    if isinstance(description, list):
        return tuple(build(v, max_size) for v in description)
    if isinstance(description, dict):
        name = description.get("type")
        cls = _TYPES.get(name) if isinstance(name, str) else None
        if cls is None:
            raise FlowFileError(f"the file names a class {name!r} that is not registered: define or import it first")
        if cls.unwritable:
            raise FlowFileError(f"the file describes a {name}, which no flow file holds")
        fields = {k: build(v, max_size) for k, v in description.items() if k != "type"}
        _check_fields(cls, fields)
        try:
            return cls(**fields)
        except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
            raise FlowFileError(f"the file describes a {name} that cannot be built: {error}") from error
    is_int = isinstance(description, int) and not isinstance(description, bool)
    if is_int and max_size is not None and not 0 <= description <= max_size:
        raise FlowFileError(f"the file describes a size of {description} but brings {max_size} numbers")
    return description


def _check_fields(cls: type[Configured], values: dict[str, Any]) -> None:
    """Refuses what the annotations of a class do not allow, before it fails somewhere with another error."""
    if not dataclasses.is_dataclass(cls):
        raise FlowFileError(f"the file describes a {cls.__name__}, which is a contract and not a thing to build")
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise FlowFileError(f"the file describes a {cls.__name__} that cannot be built: {name} is {value!r:.100}")


def _fits(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if arguments:
        return any(_fits(value, a) for a in arguments)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)
