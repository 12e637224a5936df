"""The scripts that a newcomer copies run as printed, but for fewer steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRONTS = {"numpyro": "NumPyro", "pyro": "Pyro"}


def _run(code: str, folder: Path, steps: int = 3000) -> None:
    code, replaced = re.subn(rf"\b{steps}\b", "3", code)
    assert replaced, f"the script trains for {steps} steps"
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # three steps take longest to compile
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280, cwd=folder, env=quick)


@pytest.mark.parametrize("front", FRONTS)
def test_readme(front: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    blocks = re.findall(r"```python\n(.*?)```", _text("README.md"), re.DOTALL)
    (script,) = (block for block in blocks if f"from flowppl.{front} import" in block)
    _run(script, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_getting_started(front: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    blocks = _blocks("docs/getting-started.md", front)
    assert len(blocks) == 4
    _run("\n".join(blocks), tmp_path)


def test_stochastic(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    scripts = re.findall(r"^```python\n(.*?)```", _text("docs/stochastic.md"), re.DOTALL | re.MULTILINE)
    for script, steps in zip(scripts, (600, 800), strict=True):
        _run(script, tmp_path, steps)


@pytest.mark.parametrize("front", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_stochastic_guides(front: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    blocks = _blocks("docs/stochastic.md", front)
    assert len(blocks) == 2
    _run("\n".join(blocks).replace("max_steps=600", "max_steps=3"), tmp_path, steps=150)


@pytest.mark.parametrize(("front", "library"), [("numpyro", "flowjax"), ("pyro", "zuko")])
def test_other_libraries(front: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    pytest.importorskip(library)
    (script,) = _blocks("docs/other-libraries.md", front)
    _run(script, tmp_path, steps=300)


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_npe(front: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    blocks = _blocks("docs/npe.md", front)
    assert len(blocks) == 2
    _run("\n".join(blocks).replace("calibration(1000", "calibration(20"), tmp_path, steps=6000)


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_objectives(front: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    blocks = _blocks("docs/objectives.md", front)
    assert len(blocks) == 9
    _run("\n".join(blocks).replace("num_particles=5", "num_particles=2"), tmp_path, steps=2000)


@pytest.mark.parametrize("front", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_annealing(front: str, tmp_path: Path) -> None:
    pytest.importorskip(front)
    blocks = _blocks("docs/annealing.md", front)
    assert len(blocks) == 2
    code = (
        "\n".join(blocks)
        .replace("x, y)", "x, y, num_samples=1000)")
        .replace("effect, max", "effect, flow='affine', max")
    )
    _run(code, tmp_path, steps=2000)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_annealing_in_parts(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    (script,) = re.findall(r"^```python\n(.*?)^```", _text("docs/annealing.md"), re.DOTALL | re.MULTILINE)
    _run(script.replace('"jax"', f'"{framework}"'), tmp_path, steps=20)


def _blocks(page: str, front: str) -> list[str]:
    """The Python blocks in the tabs of one front."""
    tabs = re.split(r'^=== "(\w+)"\n', _text(page), flags=re.MULTILINE)[1:]
    return [
        textwrap.dedent(block)
        for title, tab in zip(tabs[::2], tabs[1::2], strict=True)
        if title == FRONTS[front]
        for block in re.findall(r"^    ```python\n(.*?)^    ```", tab, re.DOTALL | re.MULTILINE)
    ]


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
