"""Several processes under torchrun: the same gradient as one, one run's results, an end when a rank dies."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import one_update
import pytest
from conftest import make_policy

from pi_models import load_policy, save_policy

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks has after its update on half of the environments."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([*TORCHRUN, "tests/one_update.py", folder], cwd=ROOT, env=ALONE, check=True)
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks_are_one(two):
    """Gradients in fp64, metrics and the evaluation: what one process has with all environments."""
    one = one_update.everything(0, 1)
    assert one.keys() == two[0].keys() == two[1].keys()
    for name, value in one.items():
        scale = np.abs(value).max() + 1e-12
        for rank in (0, 1):
            error = np.abs(two[rank][name].astype(float) - value.astype(float)).max() / scale
            assert error < 1e-10, f"{name}, rank {rank}: {error}"
    gradients = [name for name in one if "expert" in name]
    assert len(gradients) > 60 and all(np.abs(one[name]).max() > 0 for name in gradients)
    assert np.ptp(one["evaluation: length"]) > 0  # they are not all alike, so their order was compared too


def command(script, folder, *flags):
    small = ["--env-id", "tabletop_press_button", "--num-envs", "12", "--num-steps", "8", "--eval-freq", "0"]
    own = ["--group-size", "3"] if script == "flow_sde_grpo.py" else ["--critic-warmup", "0"]
    places = ["--checkpoint", folder / "start", "--run-dir", folder / "runs"]
    return [*TORCHRUN, script, *small, *own, *places, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["flow_sde_ppo.py", "flow_noise_ppo.py", "flow_sde_grpo.py"])
def test_a_run_of_two_ranks(tmp_path, script):
    save_policy(make_policy(), tmp_path / "start")
    told = command(script, tmp_path, "--total-timesteps", "600")
    done = subprocess.run(told, cwd=ROOT, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["iteration"] for row in rows] == ["1", "2"]
    assert 400 < int(rows[0]["global_step"]) <= 480 and int(rows[1]["global_step"]) >= 600  # of both
    assert json.loads((folder / "args.json").read_text())["num_envs"] == 12
    assert (folder / "learning_curve.png").is_file() and done.stdout.count("results in") == 1
    assert "torchrun --standalone --nproc_per_node=2 " + script in done.stdout
    before, after = load_policy(tmp_path / "start"), load_policy(folder / "checkpoint")
    assert not before.action_out_proj.weight.equal(after.action_out_proj.weight)


@pytest.mark.slow
def test_environments_that_cannot_be_dealt(tmp_path):
    save_policy(make_policy(), tmp_path / "start")
    told = [*command("flow_sde_ppo.py", tmp_path), "--num-envs", "7", "--num-minibatches", "1"]
    done = subprocess.run(told, cwd=ROOT, env=ALONE, capture_output=True, text=True)
    assert done.returncode != 0 and "--num-envs 7 cannot be dealt to 2 ranks" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tmp_path):
    save_policy(make_policy(), tmp_path / "start")
    told = command("flow_sde_ppo.py", tmp_path, "--total-timesteps", "1000000")
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(told, cwd=ROOT, env=ALONE, stdout=log, stderr=log)
    try:
        while not any(len(file.read_text().splitlines()) > 1 for file in tmp_path.glob("runs/*/metrics.csv")):
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = {p: Path(f"/proc/{p}/environ").read_bytes().split(b"\0") for p in children}
        (victim,) = [int(p) for p, environment in ranks.items() if b"RANK=1" in environment]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        assert job.wait(timeout=30) != 0
        assert time.monotonic() - killed < 30
    finally:
        job.kill()
    log = (tmp_path / "log").read_text()
    assert "local_rank: 1" in log and str(victim) in log
    assert not any(Path(f"/proc/{p}").exists() for p in children)
