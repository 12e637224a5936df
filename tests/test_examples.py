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
        for model in ("eight_schools",)
        for guide in ("AutoNormal", "AutoIAFNormal", "AutoFlow", "AutoFlow path")
    }
    for picture in ("elbo-eight_schools.png", f"corner-eight_schools-{ppl}.png"):
        assert (output / picture).stat().st_size > 10_000


# In torch alone: jax compiles for a minute and then runs for a second.
@pytest.mark.parametrize("name", ["path_gradients", "heavy_tails", "modes", "torus", "double_well"])
def test_experiments(name: str, tmp_path: Path) -> None:
    for package in ("torch", "matplotlib"):
        pytest.importorskip(package)
    draws = () if name == "path_gradients" else ("--draws", 2000)
    _run(tmp_path, EXAMPLES / f"{name}.py", "--framework", "torch", "--steps", 2, *draws, "--output", tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


# Slow in jax, where four objectives compile.
@pytest.mark.parametrize("ppl", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_objectives(ppl: str, tmp_path: Path) -> None:
    for package in (ppl, "matplotlib"):
        pytest.importorskip(package)
    _run(tmp_path, EXAMPLES / "objectives.py", "--ppl", ppl, "--steps", 2, "--output", tmp_path)
    assert (tmp_path / "objectives.png").stat().st_size > 10_000


@pytest.mark.parametrize("ppl", ["pyro", pytest.param("numpyro", marks=pytest.mark.slow)])
def test_evidence(ppl: str, tmp_path: Path) -> None:
    for package in (ppl, "matplotlib"):
        pytest.importorskip(package)
    _run(tmp_path, EXAMPLES / "evidence.py", "--ppl", ppl, "--draws", 1000, "--output", tmp_path)
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("amortized", 2), ("germination", 250)])
def test_guides(name: str, steps: int, tmp_path: Path) -> None:
    for package in ("pyro", "matplotlib"):
        pytest.importorskip(package)
    _run(tmp_path, EXAMPLES / f"{name}.py", "--ppl", "pyro", "--steps", steps, "--output", tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_vae(tmp_path: Path) -> None:
    for package in ("pyro", "matplotlib"):
        pytest.importorskip(package)
    _run(
        tmp_path,
        EXAMPLES / "vae.py",
        "--ppl",
        "pyro",
        "--steps",
        2,
        "--draws",
        2,
        "--posteriors",
        "planar",
        "--output",
        tmp_path,
    )
    assert (tmp_path / "vae.png").stat().st_size > 10_000


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
