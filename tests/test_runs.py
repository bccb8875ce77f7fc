"""Runs that are stopped, killed, damaged or out of room, and go on as if nothing had been."""

import contextlib
import csv
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_policy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import curve

import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
from flags import parse
from pi_models import load_policy, save_policy

ROOT = Path(__file__).resolve().parents[1]
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCHERS = {1: [sys.executable], 2: TORCHRUN}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_policy(make_policy(), folder)
    return str(folder)


def command(script, checkpoint, run_dir, *flags):
    """Iterations of 96 to 120 steps, five of them, saved after every one; episodes are longer than two."""
    small = ["--env-id", "tabletop_press_button", "--num-envs", "6", "--num-steps", "4", "--eval-freq", "2"]
    own = ["--group-size", "3", "--num-steps", "8"] if script == "flow_sde_grpo" else ["--critic-warmup", "1"]
    places = ["--checkpoint", checkpoint, "--run-dir", str(run_dir), "--save-freq", "1"]
    steps = "980" if "8" in own + list(flags) else "500"
    steps = ["--total-timesteps", steps, "--num-minibatches", "2", "--update-epochs", "2"]
    return [*small, *own, *places, *steps, *flags]


def run(script, words):
    script.main(parse(script.Args, script.defaults, [str(word) for word in words]))


def break_off(script, words):
    """A run that breaks off in the update of its third iteration, two being saved."""
    calls, update = [], script.update

    def breaking(*args):
        calls.append(args)
        return update(*args) if len(calls) < 3 else 1 / 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update", breaking)
        with pytest.raises(ZeroDivisionError):
            run(script, words)


def result(run_dir):
    """Rows of the log without times, all tensors, and the curve of TensorBoard."""
    (folder,) = Path(run_dir).iterdir()
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(folder)).Reload()
    steps = [event.step for event in events.Scalars("losses/approx_kl")]
    assert steps == [int(row["global_step"]) for row in rows]
    assert (folder / "learning_curve.png").is_file()
    last = max((folder / "resume").glob("*.rank0of*"))
    return curve(rows), {**load_file(folder / "checkpoint/model.safetensors"), **load_file(last)}


def assert_same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(tensor.equal(other[1][name]) for name, tensor in one[1].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        (flow_sde_ppo, []),
        (flow_sde_ppo, ["--train", "expert+lora", "--lora-rank", "2", "--lr-warmup", "2"]),
        (flow_noise_ppo, ["--critic", "expert", "--no-partial-reset", "--num-steps", "8"]),
        (flow_sde_grpo, ["--kl-coef", "0.1", "--learning-rate", "3e-3"]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, checkpoint, script, flags):
    words = command(script.__name__, checkpoint, tmp_path / "whole", *flags)
    run(script, words)
    whole = result(tmp_path / "whole")
    assert len(whole[0]) >= 4 and any(name.startswith("optimizer") for name in whole[1])
    words = command(script.__name__, checkpoint, tmp_path / "parts", *flags)
    break_off(script, words)
    run(script, [*words, "--resume", "auto"])
    assert_same(whole, result(tmp_path / "parts"))


def popen(words, log, launcher, **more):
    words, env = [*launcher, *words], ALONE | more
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=open(log, "w"), stderr=subprocess.STDOUT)


def wait_for(job, pattern, folder, log):
    while not any(folder.glob(pattern)):
        assert job.poll() is None, log.read_text()
        time.sleep(0.01)


def processes_of(run_dir):
    """Of all processes, those whose command says this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if str(run_dir).encode() in path.read_bytes() else []
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint):
    """What uninterrupted runs of one and of two ranks end with."""
    folder, results = tmp_path_factory.mktemp("whole"), {}
    for ranks, launcher in LAUNCHERS.items():
        words = command("flow_sde_ppo", checkpoint, folder / str(ranks))
        job = popen(["flow_sde_ppo.py", *words], folder / "log", launcher)
        assert job.wait(timeout=300) == 0, (folder / "log").read_text()
        results[ranks] = result(folder / str(ranks))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 1), (signal.SIGKILL, 2)]
)
def test_signals(tmp_path, checkpoint, whole, number, ranks):
    words = ["flow_sde_ppo.py", *command("flow_sde_ppo", checkpoint, tmp_path / "parts")]
    job = popen(words, tmp_path / "log", LAUNCHERS[ranks])
    wait_for(
        job, f"*/resume/0000002.rank{ranks - 1}of{ranks}.safetensors", tmp_path / "parts", tmp_path / "log"
    )
    job.send_signal(number)
    code, log = job.wait(timeout=60), (tmp_path / "log").read_text()
    (folder,) = (tmp_path / "parts").iterdir()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        end = time.monotonic() + 10
        while processes_of(tmp_path / "parts"):
            assert time.monotonic() < end, "ranks are left"
            time.sleep(0.1)
    else:
        assert ranks == 2 or (code == 128 + number and "Traceback" not in log)  # torchrun has its own
        (told,) = [line for line in log.splitlines() if "go on with: " in line]
        assert told.endswith(f"flow_sde_ppo.py --resume {folder}")
    again = popen(["flow_sde_ppo.py", "--resume", str(folder)], tmp_path / "again", LAUNCHERS[ranks])
    assert again.wait(timeout=300) == 0, (tmp_path / "again").read_text()
    assert_same(whole[ranks], result(tmp_path / "parts"))


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, checkpoint):
    """A run that broke off in its third iteration, and how to make it anew."""
    folder = tmp_path_factory.mktemp("broken")
    words = command("flow_sde_ppo", checkpoint, folder, "--eval-freq", "-1")
    break_off(flow_sde_ppo, words)
    (run_folder,) = folder.iterdir()
    return run_folder


@pytest.fixture
def parts(broken_off, tmp_path):
    return Path(shutil.copytree(broken_off, tmp_path / "runs" / broken_off.name))


def test_a_damaged_save_is_left_out(parts, capsys):
    """Truncated, or with a bit that flipped: the one before it is taken, and the end is the same."""
    run(flow_sde_ppo, ["--resume", shutil.copytree(parts, parts.parent.parent / "whole" / parts.name)])
    whole = result(parts.parent.parent / "whole")
    newest = max((parts / "resume").iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    newest.write_bytes(content)
    run(flow_sde_ppo, ["--resume", parts])
    assert "0000002.rank0of1.safetensors is not whole (its checksum is another)" in capsys.readouterr().err
    assert_same(whole, result(parts.parent))


def test_nothing_whole_is_left(parts, capsys):
    for file in (parts / "resume").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SystemExit) as stop:
        run(flow_sde_ppo, ["--resume", parts])
    *left_out, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(left_out) == 2 and all("is not whole" in line for line in left_out)
    assert last == f"error: --resume: {parts} has nothing saved that is whole"


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--gamma", "0.5"], "--gamma 0.5: the run that is resumed has 0.95, which cannot change"),
        (["--seed", "7"], "--seed 7: the run that is resumed has 1"),
        (["--total-timesteps", "150"], "--total-timesteps"),
    ],
)
def test_what_cannot_change(parts, one_line_error, flags, told):
    (parts / "learning_curve.png").touch()  # finished; else a run may be ended earlier
    assert told in one_line_error(run, flow_sde_ppo, ["--resume", parts, *flags])


def test_what_is_no_run(parts, tmp_path, one_line_error):
    for folder in (tmp_path, tmp_path / "missing", ROOT / "checkpoints/tiny"):
        told = one_line_error(run, flow_sde_ppo, ["--resume", folder])
        assert told == f"error: --resume {folder}: no folder of a run of this script\n"
    assert "no folder of a run of this script" in one_line_error(run, flow_noise_ppo, ["--resume", parts])


def test_auto(parts, tmp_path):
    """The newest unfinished run of this environment, script and seed; where there is none, a new one."""

    def found(*flags):
        words = ["--run-dir", str(parts.parent), "--env-id", "tabletop_press_button", "--resume", "auto"]
        words += flags
        return parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, words)

    assert found().resume == str(parts) and found().save_freq == 1 and found().num_envs == 6
    assert found("--seed", "2").resume == "" and found("--exp-name", "other").resume == ""
    older = parts.with_name(parts.name[:-2] + "00")
    shutil.copytree(parts, older)
    assert found().resume == str(parts)
    (parts / "learning_curve.png").touch()
    assert found().resume == str(older)


def test_two_runs_in_the_same_second(tmp_path, checkpoint, monkeypatch):
    """A run that was killed at once is not in the way of the next one."""
    monkeypatch.setattr("runs.time.time", lambda: 1_700_000_000.5)
    for _ in range(2):
        run(flow_sde_ppo, command("flow_sde_ppo", checkpoint, tmp_path, "--total-timesteps", "1"))
    names = [f"tabletop_press_button__flow_sde_ppo__1__170000000{second}" for second in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_full_disk(parts, monkeypatch, capfd):
    """No file may be larger than 4 kB: the log, or a save. What was there is as it was."""
    before = {path.name: path.read_bytes() for path in (parts / "resume").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            run(flow_sde_ppo, ["--resume", parts])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 1 and len(lines) == 1
    assert f"{parts} cannot be written" in lines[0] and "what was saved there before is whole" in lines[0]
    assert {path.name: path.read_bytes() for path in (parts / "resume").iterdir()} == before
    run(flow_sde_ppo, ["--resume", parts])


def test_gradients_that_are_not_finite(parts, monkeypatch, capsys):
    """One step is left out and counted; three in a row end the run, and name the tensors."""
    step, add = [0], flow_sde_ppo.add_gradients

    def spoil(which):
        def add_gradients(parameters):
            add(parameters)
            step[0] += 1
            if step[0] in which:
                parameters[-1].grad.view(-1)[0] = float("nan")

        monkeypatch.setattr(flow_sde_ppo, "add_gradients", add_gradients)

    copy = shutil.copytree(parts, parts.parent.parent / "once" / parts.name)
    spoil({2, 3, 5})
    run(flow_sde_ppo, ["--resume", copy])
    with open(copy / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["flow/refused_steps"]) for row in rows][1:] == [0, 2] + [3] * (len(rows) - 3)
    assert all(p.isfinite().all() for p in load_policy(copy / "checkpoint").parameters())
    step[0] = 0
    spoil({6, 7, 8})
    with pytest.raises(SystemExit) as stop:
        run(flow_sde_ppo, ["--resume", parts])
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    why = "the gradient was not finite in three optimiser steps in a row"
    assert told.startswith(f"error: {why}: value_head."), repr(told)


# --- Weights & Biases, where it is installed ---


def wandb_records(file):
    """What a .wandb file holds: messages in blocks of 32 KiB, in pieces (kind 1: whole, 4: the last)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""  # after ":W&B", a number and a version
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:  # no head fits in
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_track(tmp_path, checkpoint):
    """Every number of metrics.csv arrives; a resumed run is the same run and goes on where it was."""
    pytest.importorskip("wandb")
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "mine", "WANDB_ENTITY": "we"}
    words = ["flow_sde_ppo.py", *command("flow_sde_ppo", checkpoint, tmp_path / "runs"), "--track"]
    words += ["--exp-name", "one, or two; it's #1"]  # characters that an id may not have
    job = popen(words, tmp_path / "log", LAUNCHERS[1], **env)
    wait_for(job, "*/resume/0000002.rank0of1.safetensors", tmp_path / "runs", tmp_path / "log")
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    words = ["flow_sde_ppo.py", "--resume", str(folder), "--total-timesteps", "700"]
    job = popen(words, tmp_path / "log", LAUNCHERS[1], **env)
    assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    parts = [list(wandb_records(file)) for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    runs = [record.run for part in parts for record in part if record.WhichOneof("record_type") == "run"]
    assert len(parts) == 2 and {(r.run_id, r.project, r.entity) for r in runs} == {
        (re.sub("[,;'#]", "-", folder.name), "mine", "we")
    }
    arrived = {}
    for record in sum(parts, []):
        if record.WhichOneof("record_type") == "history":
            told = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            assert record.history.step.num not in arrived
            arrived[record.history.step.num] = {name: json.loads(value) for name, value in told.items()}
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(arrived) == [int(row["global_step"]) for row in rows] and len(rows) > 4
    for row, told in zip(rows, arrived.values()):
        names = row.keys() - {"iteration", "global_step"}
        assert {name: float(told[name]) for name in names} == pytest.approx(
            {name: float(row[name]) for name in names}, nan_ok=True
        )


@pytest.mark.slow
def test_track_without_a_key(tmp_path, checkpoint):
    """One line, and no folder of a run."""
    pytest.importorskip("wandb")
    env = {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path / "nobody"), "NETRC": str(tmp_path / "none")}
    words = ["flow_sde_ppo.py", *command("flow_sde_ppo", checkpoint, tmp_path / "runs"), "--track"]
    job = popen(words, tmp_path / "log", LAUNCHERS[1], **env)
    assert job.wait(timeout=120) == 2
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert last.startswith("error: --track: No API key") and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [flow_sde_ppo, flow_noise_ppo, flow_sde_grpo])
def test_track_without_wandb(tmp_path, checkpoint, script, monkeypatch, one_line_error):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = [*command(script.__name__, checkpoint, tmp_path / "runs"), "--track"]
    message = one_line_error(run, script, words)
    assert message == "error: --track needs Weights & Biases: pip install wandb\n"
    assert not (tmp_path / "runs").exists()
