"""The command line of the scripts: flags from the dataclass `Args`, and `Args` as a command again."""

import argparse
import dataclasses
import glob
import inspect
import json
import math
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated, TypedDict

from tqdm import tqdm


def fail(message: str, code=2):
    """A user's mistake: one line on stderr and exit code 2, never a traceback. Code 1: something broke."""
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # or it would be drawn over the message
    print(f"error{rank}: {message}", file=sys.stderr)
    raise SystemExit(code)


RANGES = {  # of numbers, wherever there is such a flag: least, greatest
    **dict.fromkeys(["num_threads", "num_envs", "num_steps", "chunk_len", "total_timesteps"], (1, math.inf)),
    **dict.fromkeys(["update_epochs", "num_minibatches", "save_freq", "denoise_steps"], (1, math.inf)),
    **dict.fromkeys(["critic_layers", "lora_rank"], (1, math.inf)),
    **dict.fromkeys(["micro_batch_size", "lr_warmup", "critic_warmup"], (0, math.inf)),
    **dict.fromkeys(["learning_rate", "critic_learning_rate", "ent_coef", "kl_coef"], (0, math.inf)),
    **dict.fromkeys(["gamma", "gae_lambda"], (0, 1)),
    "group_size": (2, math.inf),
    "eval_freq": (-1, math.inf),
}


MAY_CHANGE = {"resume", "run_dir", "total_timesteps", "save_freq", "eval_freq", "save_model", "capture_video"}
MAY_CHANGE |= {"device", "num_threads", "track"}  # flags of a run that is resumed


def check_ranges(args):
    """Each number by itself; what flags have to do with each other is for the scripts."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, low)
        if not low <= value <= high:  # also nan
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            fail(f"--{name.replace('_', '-')} must be {bounds}, not {value}")


def paper_row(env_id, model):
    """The columns of paper.toml for these, in units of the flags; nothing if there is no such row."""
    row, paper = {}, tomllib.loads((Path(__file__).parent / "paper.toml").read_text())
    for name, columns in paper.get(model, {}).items():  # from the general to the special
        row |= columns if name == "all" or env_id.startswith(name) else {}
    if "checkpoint" not in row:
        return {}
    row["num_steps"] = row["rollout_epochs"] * math.ceil(row["interaction_steps"] / row["chunk_len"])
    row["num_minibatches"] = row["num_envs"] * row["num_steps"] // row["batch_size"]
    row["total_timesteps"] = row["train_epochs"] * row["num_envs"] * row["num_steps"] * row["chunk_len"]
    return row


def sections(args_class):
    """{section: {flag: its line of help}} of an Args, as its comments say."""
    found = {}
    for line in inspect.getsource(args_class).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            found[title[1]] = {}
        elif flag := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
            found[list(found)[-1]][flag[1]] = flag[2]
    return found


def read(args_class, default, command):
    """One reading of the command line. --help has a group for each section of Args, as tyro makes one of
    every nested dataclass."""
    import tyro  # here, not at the top: the simulators' processes do not need it

    types, groups = {field.name: field.type for field in dataclasses.fields(args_class)}, {}
    for title, flags in sections(args_class).items():
        described = [(name, Annotated[types[name], tyro.conf.arg(help=text)]) for name, text in flags.items()]
        groups[title] = dataclasses.make_dataclass(title, described)
    chosen = {
        title: group(*(getattr(default, field.name) for field in dataclasses.fields(group)))
        for title, group in groups.items()
    }
    told = tyro.cli(
        TypedDict("Flags", groups), args=command, default=chosen, config=(tyro.conf.OmitArgPrefixes,)
    )
    return args_class(**{name: value for group in told.values() for name, value in vars(group).items()})


def parse(args_class, defaults, command=None):
    """Args from the command line. `defaults(env_id, model)` is what --env-id and --model choose for the rest.

    With --resume it is the run's own flags that are the defaults, and few may be others than they were.
    """
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env_id", "model"):
        usual = getattr(args_class, name)
        choice.add_argument(f"--{name.replace('_', '-')}", f"--{name}", nargs="?", default=usual, const=usual)
    args = read(args_class, defaults(**vars(choice.parse_known_args(command)[0])), command)
    run = unfinished_run(args) if args.resume == "auto" else args.resume
    if not run:
        args.resume = ""
        return args
    try:
        before = args_class(**json.loads(Path(run, "args.json").read_text()))
    except (OSError, TypeError, ValueError):
        fail(f"--resume {run}: no folder of a run of this script")
    args = read(args_class, before, command)
    for name, value in dataclasses.asdict(before).items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} {getattr(args, name)}: the run that is resumed has {value}, which cannot change")
    args.resume = str(Path(run))
    return args


def unfinished_run(args):
    """The newest run of this script, environment and seed that has saved something and did not end."""
    folders = Path(args.run_dir).glob(f"{glob.escape(f'{args.env_id}__{args.exp_name}__{args.seed}')}__*")
    saved = [folder for folder in folders if any(folder.glob("resume/*.rank0of*.safetensors"))]
    return max(
        (f for f in saved if not (f / "learning_curve.png").exists()), default="", key=lambda f: f.name
    )


def launcher():
    """How this process was started: the words before the script."""
    ranks = os.environ.get("WORLD_SIZE", "1")  # told by torchrun
    return ["python"] if ranks == "1" else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]


def as_command(script, args):
    """The command that runs a script with these Args, whatever its defaults are."""
    words = [*launcher(), script]
    for name, value in dataclasses.asdict(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != "":
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
