"""What goes wrong around a run, many times over: how often it ends in a line that helps, and how often not.

    python benchmark/faults.py                                  # all parts
    python benchmark/faults.py --only flags --cases 300 --seed 0

checkpoints    checkpoints/tiny, damaged, against `load_policy` and one look at a picture
flags          command lines with one mistake in them, against the five scripts, up to their first step
kills          trainings that are killed (SIGKILL) at a random moment, a save among them, and resumed

Each case is drawn with --seed and runs in a forked child. It should end with exit code 2 and at most two
lines. Not everything can be seen: a flipped bit may leave another usual number. Such a policy is accepted; it
is counted apart if what it gives is finite.
"""

import argparse
import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
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


def attempt(function, *args, limit=60):
    """How a forked child ends that calls it, one of ENDS, its exit code, and what it said on stderr."""
    with tempfile.TemporaryFile("w+") as said:
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
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        text = said.read()
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


# ------------------------------------------------------------------------------------------------------ kills

SMALL = "--env-id tabletop_press_button --num-envs 6 --num-steps 4 --num-minibatches 2 --critic-warmup 1"
SMALL += " --eval-freq -1 --save-freq 1 --total-timesteps 900"


def train(run_dir):
    """A run of nine iterations, which are all saved; what is there of it already is gone on with."""
    import flow_sde_ppo

    os.chdir(ROOT)
    flags = [*SMALL.split(), "--run-dir", str(run_dir), "--resume", "auto"]
    flow_sde_ppo.main(parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, flags))


def what_is_left(run_dir):
    """The end of a finished run, by bytes: counters, generators, environments, optimiser, weights."""
    (end,) = run_dir.glob("*/learning_curve.png")
    last = max((end.parent / "resume").iterdir())
    counters, tensors = read_state(last)
    policy = (end.parent / "checkpoint/model.safetensors").read_bytes()
    return json.dumps(counters), {name: x.numpy().tobytes() for name, x in tensors.items()}, policy


def kills(cases, rng):
    """The rows of a table: so many kills, after so many saves; what the resumed runs ended with."""
    importlib.import_module("flow_sde_ppo")  # what takes seconds, before the forks
    load_policy(ROOT / "checkpoints/tabletop-sft")
    columns = "killed", "the same bit for bit", "other end"
    moments = "before the first save", "later"
    rows = {when: dict.fromkeys(columns, 0) for when in moments}
    with tempfile.TemporaryDirectory() as folder:
        whole, began = Path(folder, "whole"), time.monotonic()
        assert attempt(train, whole, limit=600)[0] == "accepted"
        lasts = time.monotonic() - began
        while sum(row["killed"] for row in rows.values()) < cases:
            run_dir = Path(folder, "killed")
            child = os.fork()
            if child == 0:
                for fd in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
                train(run_dir)
                os._exit(0)
            time.sleep(rng.uniform(0, lasts))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            when = "later" if any(run_dir.glob("*/resume/*.safetensors")) else "before the first save"
            if any(run_dir.glob("*/learning_curve.png")):  # too late: nothing is left to resume
                shutil.rmtree(run_dir)
                continue
            end, code, said = attempt(train, run_dir, limit=600)
            same = end == "accepted" and what_is_left(run_dir) == what_is_left(whole)
            if not same:
                print(f"killed {when}: {end}, code {code}: {said[-1500:]}", file=sys.stderr)
            rows[when]["killed"] += 1
            rows[when]["the same bit for bit" if same else "other end"] += 1
            shutil.rmtree(run_dir)
    return rows


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
    parser.add_argument("--only", choices=[*PARTS, "kills"], help="one part")
    parser.add_argument("--cases", type=int, help="default 200 checkpoints, 300 command lines, 50 kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print what was not refused as it should be")
    args = parser.parse_args()
    torch.set_num_threads(1)
    titles = (
        "tried",
        "refused, 2 lines at most",
        "traceback",
        "killed",
        "longer",
        "accepted",
        "cannot be seen",
    )
    for part in [args.only] if args.only else [*PARTS, "kills"]:
        cases = args.cases or {"checkpoints": 200, "flags": 300, "kills": 50}[part]
        if part == "kills":
            rows = kills(cases, random.Random(f"kills {args.seed}"))
            titles = next(iter(rows.values()))
        else:
            rows = table(part, cases, args.seed, args.verbose)
        rows["**all**"] = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
        print(f"\n| {part}, seed {args.seed} | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|")
        for what, row in rows.items():
            print(f"| {what} | {' | '.join(map(str, row.values()))} |")


if __name__ == "__main__":
    main()
