"""The examples run, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _run(folder: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, timeout=280, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("ppl", ["numpyro", "pyro"])
def test_demo(ppl: str, tmp_path: Path) -> None:
    for package in (ppl, "arviz", "matplotlib"):
        pytest.importorskip(package)
    _run(tmp_path, EXAMPLES / "demo.py", "--quick", "--ppl", ppl)
    output = tmp_path / "demo-output"
    rows = json.loads((output / "table.json").read_text())
    assert {(row["model"], row["guide"]) for row in rows} == {
        (model, guide)
        for model in ("eight_schools", "sparse_logistic")
        for guide in ("AutoNormal", "AutoIAFNormal", "AutoFlow", "AutoFlow path")
    }
    for model in ("eight_schools", "sparse_logistic"):
        for picture in (f"elbo-{model}.png", f"corner-{model}-{ppl}.png"):
            assert (output / picture).stat().st_size > 10_000


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_path_gradients(framework: str, tmp_path: Path) -> None:
    for package in (framework, "matplotlib"):
        pytest.importorskip(package)
    _run(tmp_path, EXAMPLES / "path_gradients.py", "--framework", framework, "--steps", 2, "--output", tmp_path)
    assert (tmp_path / "path_gradients.png").stat().st_size > 10_000


# jax compiles for a minute and then runs for a second: one of them is enough.
@pytest.mark.parametrize(
    ("name", "framework"),
    [
        ("heavy_tails", "torch"),
        ("modes", "torch"),
        ("torus", "torch"),
        pytest.param("torus", "jax", marks=pytest.mark.slow),
    ],
)
def test_experiments(name: str, framework: str, tmp_path: Path) -> None:
    for package in (framework, "matplotlib"):
        pytest.importorskip(package)
    options = "--framework", framework, "--steps", 2, "--draws", 2000, "--output", tmp_path
    _run(tmp_path, EXAMPLES / f"{name}.py", *options)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("ppl", ["numpyro", "pyro"])
def test_amortized(ppl: str, tmp_path: Path) -> None:
    for package in (ppl, "matplotlib"):
        pytest.importorskip(package)
    _run(tmp_path, EXAMPLES / "amortized.py", "--ppl", ppl, "--steps", 2, "--output", tmp_path)
    assert (tmp_path / "amortized.png").stat().st_size > 10_000


def test_gallery(tmp_path: Path) -> None:
    for package in ("torch", "matplotlib"):
        pytest.importorskip(package)
    names = ("affine", "planar", "nsf-circular")
    options = "--framework", "torch", "--steps", 2, "--output", tmp_path
    _run(tmp_path, EXAMPLES / "gallery.py", *options, "--only", *names)
    assert all(2_000 < (tmp_path / f"{name}.png").stat().st_size < 40_000 for name in names)


@pytest.mark.slow
def test_npe(tmp_path: Path) -> None:
    for package in ("pyro", "matplotlib"):
        pytest.importorskip(package)
    options = "--simulations", 200, "--steps", 1, "--replications", 50, "--output", tmp_path
    _run(tmp_path, EXAMPLES / "npe.py", "--ppl", "pyro", *options)
    assert (tmp_path / "npe.png").stat().st_size > 10_000
