"""What is installed, what it runs on and what is missing, as text; nothing that is missing or broken stops it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import flowppl
from flowppl.backend import get_backend

_FRONTS = {"numpyro": ("NumPyro", "jax", "numpyro"), "pyro": ("Pyro", "torch", "pyro-ppl")}  # framework, distribution
_OF_DEVELOPERS = {"all", "test", "lint", "docs", "dev"}


class Requirement(NamedTuple):
    """A distribution that an extra needs."""

    name: str
    least: str  # version, "" for any

    @property
    def missing(self) -> str:
        """What is wrong with it, or nothing."""
        found = version(self.name)
        if not found:
            return f"{self.name} is missing"
        if self.least and _numbers(found) < _numbers(self.least):
            return f"{self.name} is {found}, and {self.least} is needed"
        return ""


def report() -> str:
    """The report.

    Example:
        >>> from flowppl.doctor import report
        >>> print(report())
        flowppl ...
    """
    return "\n".join(_lines())


def version(distribution: str) -> str:
    """Of an installed distribution, or nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def extras() -> dict[str, list[Requirement]]:
    """What each extra for users needs, as the installed package says; other extras that it names are resolved."""
    found: dict[str, list[str]] = {}
    try:
        lines = metadata.requires("flowppl") or []
    except metadata.PackageNotFoundError:
        return {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if extra := re.search(r"extra\s*==\s*['\"](.+?)['\"]", marker):
            found.setdefault(extra[1], []).append(requirement.strip())

    def resolve(extra: str) -> Iterator[Requirement]:
        for line in found[extra]:
            name, others, least = re.findall(r"^([\w.-]+)(?:\[(.*?)\])?(?:.*>=\s*([\w.]+))?", line)[0]
            if name == "flowppl":
                for other in others.split(","):
                    yield from resolve(other.strip())
            else:
                yield Requirement(name, least)

    return {extra: list(resolve(extra)) for extra in found if extra not in _OF_DEVELOPERS}


def _lines() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"flowppl {flowppl.__version__}, Python {platform.python_version()} on {platform.platform()}, {cores} cores"
    yield ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "array-api-compat", "safetensors"))
    threads = {name: os.environ[name] for name in sorted(os.environ) if name.endswith("_NUM_THREADS")}
    yield f"threads set by: {', '.join(f'{k}={v}' for k, v in threads.items()) or 'nothing'}"
    for extra, (title, framework, distribution) in _FRONTS.items():
        yield ""
        yield f"{title} front"
        yield from (f"  {line}" for line in _front(extra, framework, distribution))
    yield ""
    yield "Extras"
    known = extras()
    if not known:
        yield "  unknown: flowppl is not installed as a package, only on the path"
    for extra, requirements in known.items():
        missing = "; ".join(r.missing for r in requirements if r.missing)
        yield f"  {extra:9} " + (f"{missing}: pip install 'flowppl[{extra}]'" if missing else "installed")


def _front(extra: str, framework: str, distribution: str) -> Iterator[str]:
    if importlib.util.find_spec(framework) is None:
        yield f"not installed: pip install 'flowppl[{extra}]'"
        return
    try:
        for name, value in get_backend(framework).machine().items():
            yield f"{name:14}{value}"
    except Exception as error:  # a broken installation may raise anything
        yield f"{framework} {version(framework)} is broken: {_brief(error)}"
        return
    try:
        importlib.import_module(f"flowppl.{extra}")
        yield f"{distribution:14}{version(distribution)}"
    except Exception as error:
        yield f"{distribution} {version(distribution)} is broken: {_brief(error)}"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
