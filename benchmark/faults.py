"""What goes wrong around a run, many times over: how often it ends in a line that helps, and how often not.

    python benchmark/faults.py                                  # all parts
    python benchmark/faults.py --only flags --cases 300 --seed 0

checkpoints    checkpoints/tiny, damaged, against `load_policy` and one look at a picture
flags          command lines with one mistake in them, against the five scripts, up to their first step
kills          trainings that are killed (SIGKILL) at a random moment, a save among them, and resumed
disk           trainings whose disk is full from a random moment on, then resumed
nan            trainings that are given an observation with NaN at a random moment, then resumed
ranks          trainings in two processes, of which one is killed, then resumed
workers        trainings on MetaWorld of which a process of simulators is killed: they go on
soak           20 minutes of training, saves and evaluations: how resident memory grows

Each case is drawn with --seed. Of the first two parts it should end with exit code 2 and at most two lines.
Not everything can be seen: a flipped bit may leave another usual number. Such a policy is accepted; it is
counted apart if what it gives is finite. Of the others it should end in one line (a kill: in none), no
process should be left after 10 seconds, and the resumed run should end as one that was never broken off, bit
for bit. Exit code 1: something was not so.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from flags import parse, read  # noqa: E402
from pi_models import load_policy  # noqa: E402
from runs import read_state  # noqa: E402

SCRIPTS = "flow_sde_ppo", "flow_noise_ppo", "flow_sde_grpo", "flow_sft", "evaluate"
ENDS = "refused", "traceback", "killed", "longer", "accepted"
NOT_FINITE = 3  # exit code of a policy that was accepted and gives NaN


def begin(function, *args, limit=60):
    """A forked child that calls it, and the file of what it says on stderr."""
    said = tempfile.TemporaryFile("w+")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
            signal.alarm(limit)
            function(*args)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child, said


def ended(child, said):
    """Its exit code, and what it said."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said.seek(0)
    with said:
        return code, said.read()


def attempt(function, *args, limit=60):
    """How a forked child ends that calls it, one of ENDS, its exit code, and what it said on stderr."""
    code, text = ended(*begin(function, *args, limit=limit))
    if code < 0:
        return "killed", code, text
    if "Traceback" in text or code == 1:
        return "traceback", code, text
    if code == 2:
        return "refused" if text.count("\n") <= 2 else "longer", code, text
    return "accepted", code, text


# ------------------------------------------------------------------------------------------------ checkpoints


def cut_off(folder, rng):
    """A file that ends too early, in the middle or before its first byte."""
    file = rng.choice(["model.safetensors", "config.json", "norm_stats.json", "tokenizer.json"])
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: rng.choice([0, rng.randrange(len(content) - 2)])])


def missing(folder, rng):
    os.remove(folder / rng.choice(["model.safetensors", "config.json", "norm_stats.json", "tokenizer.json"]))


def flip(file, first, last, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(first, last(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def bit_of_header(folder, rng):
    file = folder / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, 0, lambda _: 8 + size, rng)


def bit_of_weight(folder, rng):
    file = folder / "model.safetensors"
    flip(file, 8 + int.from_bytes(file.read_bytes()[:8], "little"), len, rng)


def bit_of_text(folder, rng):
    flip(folder / rng.choice(["config.json", "norm_stats.json", "tokenizer.json"]), 0, len, rng)


def change_tensor(folder, change, rng):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    key = rng.choice(sorted(tensors))
    change(tensors, key)
    save_file(tensors, folder / "model.safetensors")


def no_number(folder, rng):
    def change(tensors, key):
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([np.nan, np.inf, -np.inf])

    change_tensor(folder, change, rng)


def other_shape(folder, rng):
    def change(tensors, key):
        x = tensors.pop(key)
        kind = rng.choice(["gone", "longer", "flat", "stranger"])
        other = {"longer": torch.cat([x, x]), "flat": x[None]}
        tensors |= {"gone": {}, "stranger": {key: x, key + "x": x.clone()}}.get(kind) or (
            {key: other[kind]} if kind in other else {}
        )

    change_tensor(folder, change, rng)


def bad_size(folder, rng):
    told = json.loads((folder / "config.json").read_text())
    names = ["horizon", "max_token_len", "vision_heads", "critic_layers", "depth", "head_dim", "action_dim"]
    told[rng.choice(names)] = rng.choice([0, -1, "4", None, 1e9, 10**12, [4], True, 4.5])
    (folder / "config.json").write_text(json.dumps(told))


def bad_statistics(folder, rng):
    told = json.loads((folder / "norm_stats.json").read_text())
    part = told["norm_stats"][rng.choice(["state", "actions"])]
    name = rng.choice(["mean", "std"])
    bad = [np.nan, np.inf, 1e30, "0", None, [0.5]] + [-1.0] * (name == "std")
    how = rng.choice(["number", "gone", "shorter", "longer", "none", "word"])
    if how == "number":
        part[name][0] = rng.choice(bad)
    elif how == "gone":
        del part[name]
    else:
        x = part[name]
        part[name] = {"shorter": x[1:], "longer": x * 9, "none": [], "word": "mean"}[how]
    (folder / "norm_stats.json").write_text(json.dumps(told))


SEEN = cut_off, missing, bit_of_header, no_number, other_shape, bad_size, bad_statistics  # have to be refused
UNSEEN = bit_of_weight, bit_of_text  # may leave what is usual


def load_and_look(folder):
    policy = load_policy(folder)
    obs = {"images": np.zeros((1, 1, 32, 32, 3), np.uint8), "state": np.zeros((1, 4)), "prompt": ["pick up"]}
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
        x = torch.zeros(1, policy.config.horizon, policy.config.action_dim)
        velocity, _ = policy.velocity(prefix, x, torch.zeros(1))
    actions = policy.postprocess(velocity, obs)
    if not np.isfinite(actions).all():
        sys.exit(NOT_FINITE)


def checkpoints(cases, rng):
    """(what is wrong, may it be unseen, how it ended, exit code, what was said) of each case."""
    load_and_look(ROOT / "checkpoints/tiny")  # imports; as it is it loads
    for case in range(cases):
        damage = (SEEN + UNSEEN)[case % len(SEEN + UNSEEN)]
        with tempfile.TemporaryDirectory() as place:
            folder = shutil.copytree(ROOT / "checkpoints/tiny", Path(place) / "policy")
            damage(folder, rng)
            yield damage.__name__.replace("_", " "), damage in UNSEEN, *attempt(load_and_look, folder)


# ------------------------------------------------------------------------------------------------------ flags

BAD_TEXT = {  # of flags that take any text
    "exp_name": ["", "../../x", "a/b", ".x", "x" * 300, "a\nb"],
    "run_dir": ["", "x" * 300, "file/runs", "a\tb", "y/" * 3000],
    "env_id": ["", "tabletop_nothing", "robots", "../x", "x" * 300, "a\x07b"],
    "checkpoint": ["", "nowhere", "no/where/at/all", "x" * 300, "file", "empty", "a\nb"],
    "checkpoints": ["", "nowhere", "x" * 300, "file", "empty"],
    "output": ["x" * 300, "file", "file/x", "full", "y/" * 3000],
    "json": ["no/such/folder.json", "x" * 300, "empty", "a\nb"],
    "records": ["no/such/folder.jsonl", "x" * 300, "empty", "a\nb"],
    "resume": ["nowhere", "file", "empty", "x" * 300, "a\nb"],
    "capture_video": ["a.mp4", "no/such/folder.gif", "x" * 300],
    "labels": ["a\nb"],
    "upload": ["mine", "a/b/c", "a b/c", "../x"],
}
NUMBERS = {
    int: ["-2", str(10**30), "2.5", "x", "", "nan", "1e3"],
    float: ["nan", "inf", "-1", "1e30", "x", ""],
}


def mistake(script, rng):
    """(its kind, a command line with one mistake), from the fields of Args."""
    field = rng.choice(dataclasses.fields(script.Args))
    flag, kinds = f"--{field.name.replace('_', '-')}", [field.type, *get_args(field.type)]
    kind = rng.choice(["value"] * 7 + ["name", "no value", "stray"])
    if kind == "name":
        cut = rng.randrange(3, len(flag))
        return kind, [flag[:cut] + rng.choice("qz") + flag[cut:], "1"]
    if kind == "no value" and field.type is not bool and get_origin(field.type) is not tuple:
        return kind, [flag]
    if kind == "stray":
        return kind, [rng.choice(["3", "yes", "-x", "=", "---"])]
    if bool in kinds:
        return "yes or no", [flag, rng.choice(["maybe", "1"])]  # evaluate.py has some that take True
    if any(get_origin(k) is Literal for k in kinds):
        return "choice", [flag, rng.choice(["nothing", "", "RGB", "None "])]
    for number in (int, float):
        if number in kinds:
            return "number", [f"{flag}={rng.choice(NUMBERS[number])}"]
    return "text", [f"{flag}={rng.choice(BAD_TEXT[field.name])}"]


def run_script(script, words):
    """From the command line to the first step, which is the end here."""

    def first_step(*_, **__):
        os._exit(0)

    for name in ("rollout", "evaluate", "collect_demonstrations", "pretrain", "play_expert"):
        if hasattr(script, name):
            setattr(script, name, first_step)
    algorithm = hasattr(script, "rollout")
    script.main(parse(script.Args, script.defaults, words) if algorithm else read(script.Args, words))


def flags(cases, rng):
    scripts = [importlib.import_module(name) for name in SCRIPTS]
    load_and_look(ROOT / "checkpoints/tiny")  # imports
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # where a case may write
        os.symlink(ROOT / "checkpoints", "checkpoints")
        Path("file").write_text("")
        os.makedirs("empty")
        os.makedirs("full/of/others")
        Path("full/of/others/mine").write_text("")
        for case in range(cases):
            script = scripts[case % len(scripts)]
            kind, words = mistake(script, rng)
            end, code, said = attempt(run_script, script, words)
            yield kind, False, end, code, f"{script.__name__} {words}: {said}"
        os.chdir(here)


# ----------------------------------------------------------------------------------------------------- breaks

SMALL = "--env-id tabletop_press_button --num-envs 6 --num-steps 4 --num-minibatches 2 --critic-warmup 1"
SMALL += " --eval-freq -1 --save-freq 1 --total-timesteps 900"
MARK = "FAULTS_RUN"  # in the environment of all that a run has started


def train(run_dir, flags=SMALL, change=None):
    """A run of nine iterations, which are all saved; what is there of it already is gone on with."""
    import flow_sde_ppo

    os.environ[MARK] = str(run_dir)
    os.chdir(ROOT)
    if change:
        made = flow_sde_ppo.make_envs
        flow_sde_ppo.make_envs = lambda *args, **mode: change(made(*args, **mode))
    words = [*flags.split(), "--run-dir", str(run_dir), "--resume", "auto"]
    flow_sde_ppo.main(parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, words))


def two_ranks(run_dir):
    """The same run in two processes; the job, and what it says."""
    said = tempfile.TemporaryFile("w+")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["flow_sde_ppo.py", *SMALL.split(), "--run-dir", str(run_dir), "--resume", "auto"]
    environment = os.environ | {MARK: str(run_dir), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=said, stderr=said), said


def what_is_left(run_dir):
    """The end of a finished run, by bytes: counters, generators, environments, optimiser, weights."""
    (end,) = run_dir.glob("*/learning_curve.png")
    last = max(path.name.split(".")[0] for path in (end.parent / "resume").iterdir())
    left = [(end.parent / "checkpoint/model.safetensors").read_bytes()]
    for path in sorted((end.parent / "resume").glob(f"{last}.*")):  # of each rank
        counters, tensors = read_state(path)
        left += [json.dumps(counters), {name: x.numpy().tobytes() for name, x in tensors.items()}]
    return left


def started_by(run_dir):
    """Processes of a run, by the mark that they inherit."""
    mark, found = f"{MARK}={run_dir}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if mark in path.read_bytes().split(b"\0") else []
    return found


def in_one_line(code, text):
    """Did it say in one line what broke? And all that it said."""
    lines = [
        line for line in text.replace("\r", "\n").splitlines() if "error" in line or "broke down" in line
    ]
    return len(lines) == 1 and "Traceback" not in text, f"code {code}: {text[-1500:]}"


# Of these each is given a folder for the run, how long one lasts, and a generator; it returns whether the run
# ended as it should, and what it said.


def kill(run_dir, lasts, rng):
    """SIGKILL at a random moment."""
    child, said = begin(train, run_dir, limit=600)
    time.sleep(rng.uniform(0, lasts))
    os.kill(child, signal.SIGKILL)
    code, text = ended(child, said)
    return code == -signal.SIGKILL, text


def fill_disk(run_dir, lasts, rng):
    """From a random moment on nothing can be written: the disk is full, or (not root) files have a limit."""
    delay = rng.uniform(0, lasts)

    def limited(run_dir):
        limits = 1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        threading.Timer(delay, resource.setrlimit, (resource.RLIMIT_FSIZE, limits)).start()
        train(run_dir)

    if not os.path.ismount(run_dir):
        return in_one_line(*ended(*begin(limited, run_dir, limit=600)))
    child, said = begin(train, run_dir, limit=600)
    time.sleep(delay)
    with open(run_dir / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    end = ended(child, said)
    os.remove(run_dir / "ballast")
    return in_one_line(*end)


def after_chunk(when, strike):
    """What makes of environments such that after so many chunks strike(envs, obs) happens, once."""
    calls = []

    def change(envs):
        step = envs.step_chunk

        def step_chunk(actions):
            obs, *rest = step(actions)
            calls.append(None)
            if len(calls) == when:
                strike(envs, obs)
            return obs, *rest

        envs.step_chunk = step_chunk
        return envs

    return change


def poison(run_dir, lasts, rng):
    """An observation that is NaN in a random chunk."""

    def strike(envs, obs):
        obs["state"][rng.randrange(len(obs["state"]))] = np.nan

    change = after_chunk(rng.randrange(2, 30), strike)
    return in_one_line(*ended(*begin(train, run_dir, SMALL, change, limit=600)))


def kill_worker(run_dir, lasts, rng):
    """SIGKILL of a process of simulators in a random chunk: the run goes on to its end."""

    def strike(envs, obs):
        process, _ = rng.choice(envs.processes)
        threading.Timer(rng.uniform(0, 0.1), os.kill, (process.pid, signal.SIGKILL)).start()

    flags = "--env-id metaworld_push --model tiny --obs-mode state --num-envs 4 --num-steps 4"
    flags += " --num-minibatches 2 --critic-warmup 1 --eval-freq -1 --save-freq 100 --total-timesteps 800"
    change = after_chunk(rng.randrange(2, 30), strike)
    code, text = ended(*begin(train, run_dir, flags, change, limit=600))
    good, text = in_one_line(code, text)
    return good and code == 0, text


def kill_rank(run_dir, lasts, rng):
    """SIGKILL of one of two ranks after a random iteration; the job has to end in 30 s."""
    job, said = two_ranks(run_dir)
    iteration = rng.randrange(1, 8)
    while job.poll() is None and not any(run_dir.glob(f"*/resume/{iteration:07}.*")):
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 0.5))
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(rng.choice(ranks)), signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(30)
    in_time = job.poll() is not None
    job.kill()
    job.wait()
    said.seek(0)
    text = said.read()
    return in_time and "Signal 9 (SIGKILL) received" in text, text[-1500:]  # torchrun tells which rank


BREAKS = {  # part: what happens, and how often
    "kills": (kill, 50),
    "disk": (fill_disk, 10),
    "nan": (poison, 10),
    "ranks": (kill_rank, 5),
    "workers": (kill_worker, 10),
}


def breaks(part, cases, rng):
    """{when: its row}: runs that were broken off, how that went, and what the resumed runs ended with."""
    columns = "tried", "ended as they should", "the same bit for bit", "processes left after 10 s"
    rows = {when: dict.fromkeys(columns, 0) for when in ("before the first save", "later")}
    how, goes_on = BREAKS[part][0], part == "workers"
    importlib.import_module("flow_sde_ppo")  # what takes seconds, before the forks
    load_policy(ROOT / "checkpoints/tabletop-sft")

    def to_its_end(run_dir):
        if part == "ranks":
            return two_ranks(run_dir)[0].wait(600) == 0
        return attempt(train, run_dir, limit=600)[0] == "accepted"

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as after:
        whole, began = Path(folder, "whole"), time.monotonic()
        assert goes_on or to_its_end(whole)
        lasts, run_dir = time.monotonic() - began, Path(folder, "broken")
        run_dir.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", run_dir]
        if part == "disk" and subprocess.run(mount, capture_output=True).returncode == 0:
            after.callback(subprocess.run, ["umount", run_dir], check=True)
        while sum(row["tried"] for row in rows.values()) < cases:
            good, text = how(run_dir, lasts, rng)
            end = time.monotonic() + 10
            while (left := started_by(run_dir)) and time.monotonic() < end:
                time.sleep(0.1)
            row = rows["later" if any(run_dir.glob("*/resume/*.safetensors")) else "before the first save"]
            finished = any(run_dir.glob("*/learning_curve.png"))
            if goes_on or not finished:  # else it came too late
                same = finished
                if not goes_on:
                    same = to_its_end(run_dir) and what_is_left(run_dir) == what_is_left(whole)
                if left or not (good and same):
                    print(f"{part}: {good=}, {same=}, {left=}: {text}", file=sys.stderr)
                for column, count in zip(columns, (1, good, same, len(left))):
                    row[column] += count
            for path in run_dir.iterdir():
                shutil.rmtree(path)
    return {when: row for when, row in rows.items() if row["tried"]}


# ------------------------------------------------------------------------------------------------------- soak


def soak(minutes):
    """Resident memory of a training that evaluates and saves often: its slope, with an interval. Without the
    libraries, whose pages come and go."""
    flags = "--num-envs 64 --num-steps 2 --eval-freq 20 --save-freq 5 --total-timesteps 100000000"
    with tempfile.TemporaryDirectory() as folder:
        child, said = begin(train, Path(folder), flags, limit=int(60 * minutes + 600))
        samples, began = {}, time.monotonic()
        while (now := (time.monotonic() - began) / 60) < minutes:
            lines = Path(f"/proc/{child}/status").read_text().splitlines()
            kilobytes = dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]
            samples.setdefault(int(now), []).append(int(kilobytes) / 1024)
            time.sleep(1)
        os.kill(child, signal.SIGTERM)
        code, text = ended(child, said)
    # In the first third the allocator takes what saves and evaluations need at most. The median of a minute
    # leaves out what a save needs for a moment
    hours, megabytes = zip(*[(m / 60, np.median(some)) for m, some in samples.items() if m >= minutes / 3])
    slope, start = np.polyfit(hours, megabytes, 1)
    errors = np.asarray(megabytes) - np.polyval([slope, start], hours)
    half = 1.96 * errors.std(ddof=2) / (np.std(hours) * math.sqrt(len(hours)))
    print(f"\nsoak: {minutes:g} minutes, exit code {code} after SIGTERM")
    print(f"resident memory {np.mean(megabytes):.0f} MB, slope {slope:.1f} +- {half:.1f} MB an hour (95 %)")


# ------------------------------------------------------------------------------------------------------ table

PARTS = {"checkpoints": checkpoints, "flags": flags}


def table(part, cases, seed, verbose=False):
    """{what: its row}: how many were tried, how they ended, how many were accepted and cannot be seen."""
    rows = {}
    for what, may_be_unseen, end, code, said in PARTS[part](cases, random.Random(f"{part} {seed}")):
        row = rows.setdefault(what, dict.fromkeys(["tried", *ENDS, "unseen"], 0))
        row["tried"] += 1
        row["unseen" if end == "accepted" and may_be_unseen and code != NOT_FINITE else end] += 1
        if verbose and end not in ("refused", "unseen") and not (end == "accepted" and may_be_unseen):
            print(f"{what}: {end}, code {code}: {said[-1500:]}", file=sys.stderr)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=[*PARTS, *BREAKS, "soak"], help="one part")
    parser.add_argument("--cases", type=int, help="of each part; default 200, 300, 50, 10, 10, 5, 10")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print what was not refused as it should be")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ends = "refused, 2 lines at most", "traceback", "killed", "longer", "accepted", "cannot be seen"
    as_it_should_be = True
    for part in [args.only] if args.only else [*PARTS, *BREAKS, "soak"]:
        if part == "soak":
            soak(args.minutes)
            continue
        if part in BREAKS:
            rows = breaks(part, args.cases or BREAKS[part][1], random.Random(f"{part} {args.seed}"))
            titles = next(iter(rows.values()))
            good = all(list(row.values()) == [*[row["tried"]] * 3, 0] for row in rows.values())
        else:
            cases = args.cases or {"checkpoints": 200, "flags": 300}[part]
            rows, titles = table(part, cases, args.seed, args.verbose), ("tried", *ends)
            good = all(row["refused"] + row["unseen"] == row["tried"] for row in rows.values())
        as_it_should_be &= good
        rows["**all**"] = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
        print(f"\n| {part}, seed {args.seed} | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|")
        for what, row in rows.items():
            print(f"| {what} | {' | '.join(map(str, row.values()))} |")
    sys.exit(0 if as_it_should_be else 1)


if __name__ == "__main__":
    main()
