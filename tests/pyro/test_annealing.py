"""anneal: evidence and moments against closed forms, and what an annealed posterior can be asked."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from flowppl import flows
from flowppl.checkpoint import Checkpoint
from flowppl.errors import CheckpointError, UnsupportedModelError
from flowppl.pyro import AnnealedPosterior, anneal, fit
from tests import annealed
from tests.annealed import BATCH, OPTIONS, RATE, SHAPE, WIDTH

X, Y = (torch.as_tensor(a) for a in (annealed.X, annealed.Y))


def regress(x, y=None, batch=None):
    tau = pyro.sample("tau", dist.Gamma(x.new_tensor(SHAPE), RATE))
    sd = tau**-0.5
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(2), WIDTH * sd).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=batch) as index:
        mean = pyro.subsample(x, event_dim=1) @ beta
        pyro.sample("y", dist.Normal(mean, sd), obs=None if y is None else y[index])


@pytest.fixture(scope="module")
def posterior():
    return anneal(regress, X, y=Y, **OPTIONS)


def test_evidence_and_moments_are_exact(posterior):
    assert isinstance(posterior, AnnealedPosterior)
    annealed.check_evidence(posterior)
    annealed.check_moments(posterior)
    annealed.check_schedule(posterior)


def test_what_it_can_be_asked(posterior):
    annealed.check_uses(posterior, torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64))


def test_arviz(posterior):
    pytest.importorskip("arviz")
    annealed.check_arviz(posterior)


def test_a_picture(posterior):
    pytest.importorskip("matplotlib")
    assert posterior.plot(["beta"]).axes


@pytest.mark.filterwarnings("ignore::flowppl.errors.FitWarning")  # of the start
def test_a_flow_as_the_start():
    """The flow has hardly been trained; at once, with 98 % of the draws effective, its weights would have no mean."""
    start = fit(
        regress, X, y=Y, flow=flows.realnvp(layers=2, hidden=(8,)), max_steps=250, num_samples=2000, progress_bar=False
    )
    found = anneal(regress, X, y=Y, start=start, **OPTIONS)
    annealed.check_evidence(found)
    annealed.check_moments(found)
    assert found.khat < 0.7


def test_a_plate_that_subsamples_is_annealed_on_all_of_the_data(posterior):
    """And the same seed gives the same draws."""
    found = anneal(regress, X, y=Y, batch=BATCH, **OPTIONS)
    np.testing.assert_allclose(found.unconstrained, posterior.unconstrained, rtol=1e-6)
    assert found.log_evidence == pytest.approx(posterior.log_evidence, abs=1e-6)


def test_angles_are_an_error():
    def model():
        pyro.sample("angle", dist.VonMises(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedModelError, match=r"'angle' is an angle.*use fit"):
        anneal(model, **OPTIONS)


def test_an_interrupted_run_goes_on(posterior, tmp_path, monkeypatch):
    """Stopped after the second of twenty islands, it makes the others, and the draws are those of a run that nothing stopped."""
    file, save, made = tmp_path / "state", Checkpoint.save, []

    def stop(self, state, history):
        save(self, state, history)
        made.append(int(state["done"]))
        if made == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        anneal(regress, X, y=Y, checkpoint=file, **OPTIONS)
    found = anneal(regress, X, y=Y, checkpoint=file, **OPTIONS)
    assert made == [*range(1, 21)]
    np.testing.assert_array_equal(found.log_weights, posterior.log_weights)
    np.testing.assert_array_equal(found.annealing.log_z, posterior.annealing.log_z)
    with pytest.raises(CheckpointError, match="seed differ"):
        anneal(regress, X, y=Y, checkpoint=file, seed=1, **OPTIONS)
    with pytest.raises(CheckpointError, match="data differ"):  # even where the schedule is the same
        anneal(regress, X, y=Y + 0.01, checkpoint=file, **OPTIONS)


SHARED = """
import sys
import numpy as np
import torch
from flowppl.pyro import anneal
from tests.pyro.test_annealing import OPTIONS, X, Y, regress
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
found = anneal(regress, X, y=Y, **OPTIONS)
np.save(f"{sys.argv[1]}/{torch.distributed.get_rank()}", found.annealing.log_z)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_islands(posterior, tmp_path):
    """Two of them make the same draws as one, and both have all."""
    script, root = tmp_path / "shared.py", Path(__file__).resolve().parents[2]
    script.write_text(SHARED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([*torchrun, str(script), str(tmp_path)], check=True, env=env, timeout=250, cwd=root)
    for rank in (0, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), posterior.annealing.log_z, rtol=1e-9)


def test_no_draws_are_an_error():
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        anneal(regress, X, y=Y, **{**OPTIONS, "num_samples": 0})
