"""`python -m flowppl doctor` tells what is there, and survives what is not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flowppl import doctor
from flowppl.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"NumPyro": "jax", "Pyro": "torch"}


def _front(report: str, title: str) -> str:
    return re.search(rf"^{title} front\n((?:  .*\n)+)", report, re.MULTILINE)[1]


@pytest.mark.parametrize(("title", "framework"), FRAMEWORKS.items())
def test_report(title: str, framework: str) -> None:
    lines = _front(doctor.report(), title)
    if importlib.util.find_spec(framework) is None:
        assert f"not installed: pip install 'flowppl[{title.lower()}]'" in lines
    else:
        assert (
            re.search(rf"{framework} +\d+\.\d+", lines) and "cpu" in lines and re.search(r"default float +float", lines)
        )
        assert re.search(r"pyro(-ppl)? +\d+\.\d+", lines) and "broken" not in lines


def test_broken_frameworks_are_reported(tmp_path: Path) -> None:
    for framework in FRAMEWORKS.values():
        (tmp_path / f"{framework}.py").write_text("raise OSError('libgone.so: cannot open shared object file')")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    command = [sys.executable, "-m", "flowppl", "doctor"]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for title, framework in FRAMEWORKS.items():
        assert re.search(rf"{framework}.* is broken: OSError: libgone.so", _front(run.stdout, title))


def test_extras_are_those_of_the_project(monkeypatch) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [f'{line}; extra == "{extra}"' for extra, wanted in declared.items() for line in wanted]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy>=2.0", *lines])
    found = doctor.extras()
    assert list(found) == ["numpyro", "pyro", "zuko", "flowjax", "arviz", "plots"]
    assert doctor.Requirement("torch", "2.13") in found["zuko"]
    assert {r.name for r in found["plots"]} == {"arviz", "matplotlib"}


def test_what_is_missing_or_too_old_comes_with_its_command(monkeypatch) -> None:
    lines = ['nothing-of-this-name; extra == "plots"', 'numpy>=999.1; extra == "plots"', 'numpy>=2.0; extra == "arviz"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    report = doctor.report()
    assert re.search(r"plots +nothing-of-this-name is missing; numpy is .*, and 999.1 is needed: pip install", report)
    assert re.search(r"arviz +installed", report)


def test_a_bare_checkout_says_so(monkeypatch) -> None:
    def absent(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    assert "not installed as a package" in doctor.report()


@pytest.mark.parametrize("arguments", [["nurse"], []])
def test_an_unknown_command_is_an_error(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: python -m flowppl" in capsys.readouterr().err


def test_the_command_prints_the_report(capsys) -> None:
    main(["doctor"])
    assert capsys.readouterr().out.startswith("flowppl ")
