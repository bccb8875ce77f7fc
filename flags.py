"""The command line of the scripts: flags from the dataclass `Args`, and `Args` as a command again."""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated, TypedDict, get_args

from tqdm import tqdm


def fail(message: str, code=2):
    """A user's mistake: one line on stderr and exit code 2, never a traceback. Code 1: something broke."""
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # or it would be drawn over the message
    print(f"error{rank}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def tell(message: str):
    """A line on stderr, above the progress bar; of several ranks it says which."""
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    tqdm.write(rank + message, file=sys.stderr)


MANY, ABOVE_0 = 10**9, math.ulp(0)  # the least number above zero
RANGES = {  # of every number, whichever script has it: least, greatest
    **dict.fromkeys(["num_envs", "num_steps", "num_minibatches", "num_demos"], (1, 100_000)),
    **dict.fromkeys(["play_episodes", "play_stride"], (1, 100_000)),
    **dict.fromkeys(["total_steps", "vlm_steps", "play_steps", "batch_size", "save_freq"], (1, MANY)),
    **dict.fromkeys(["num_threads", "chunk_len", "update_epochs", "denoise_steps"], (1, 1000)),
    **dict.fromkeys(["lora_rank", "lora_alpha", "image_size", "patch_size", "scene_chunks"], (1, 4096)),
    **dict.fromkeys(["micro_batch_size", "lr_warmup", "critic_warmup", "num_scenes"], (0, MANY)),
    **dict.fromkeys(["learning_rate", "critic_learning_rate", "pretrain_learning_rate"], (0, 1)),
    **dict.fromkeys(["gamma", "gae_lambda"], (0, 1)),
    **dict.fromkeys(["prefix_cache_gb", "host_cache_gb"], (0, 100_000)),
    **dict.fromkeys(["ent_coef", "kl_coef"], (0, 1000)),
    **dict.fromkeys(["noise_level", "noise_std_min", "noise_std_max", "sloppiness", "max_error"], (0, 10)),
    **dict.fromkeys(["max_grad_norm", "target_kl"], (ABOVE_0, MANY)),
    **dict.fromkeys(["seed", "seeds"], (0, 2**31 - 1)),
    "total_timesteps": (1, 10**12),
    "max_episode_steps": (1, MANY),
    "clip_coef": (ABOVE_0, 1),
    "critic_layers": (1, 9),  # halved from 512, the ninth has two inputs
    "group_size": (2, 100_000),
    "eval_freq": (-1, MANY),
}


MAY_CHANGE = {"resume", "run_dir", "total_timesteps", "save_freq", "eval_freq", "save_model", "capture_video"}
MAY_CHANGE |= {"device", "num_threads", "track"}  # flags of a run that is resumed


def check_ranges(args):
    """Each flag by itself; what flags have to do with each other is for the scripts."""
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        for one in value if isinstance(value, tuple) else [value]:
            if isinstance(one, str):
                check_text(flag, one)
            elif one is not None and not isinstance(one, bool):
                low, high = RANGES[field.name]
                if not low <= one <= high:  # also nan
                    bounds = f"above 0 and at most {high}" if low == ABOVE_0 else f"from {low} to {high}"
                    fail(f"{flag} must be {bounds}, not {one}")


def check_text(flag, text):
    """What cannot be the name of anything."""
    if not text and flag in ("--exp-name", "--run-dir", "--env-id"):
        fail(f"{flag} must not be empty")
    if not text.isprintable():
        fail(f"{flag} {text!r} has characters that cannot be printed")
    if flag in ("--exp-name", "--env-id") and (text[0] == "." or "/" in text or len(text) > 100):
        fail(f"{flag} {text[:120]} must be a name of at most 100 characters, not a path")
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        fail(f"{flag} {text[:40]}... is too long for the name of a file")


def possible(args_class, name, value):
    """Could a flag have this value? It may be from a file."""
    (kind,) = (field.type for field in dataclasses.fields(args_class) if field.name == name)
    if get_args(kind):
        return value in get_args(kind)  # of a Literal
    low, high = RANGES.get(name, (-math.inf, math.inf))
    return type(value) is kind and (kind in (bool, str) or low <= value <= high)


def check_effects(args, usual):
    """Flags that were changed and do nothing: whoever did it believes something else."""
    tabletop, train = args.env_id.startswith("tabletop"), getattr(args, "train", "")
    for names, nothing, where in [
        (("lora_rank", "lora_alpha"), train != "expert+lora", "without --train expert+lora"),
        (("prefix_cache_gb", "host_cache_gb"), train != "expert", "when the VLM learns and encodes anew"),
        (("host_cache_gb",), getattr(args, "prefix_cache_gb", 0) is None, "without --prefix-cache-gb"),
        (("save_freq",), not getattr(args, "save_model", True), "with --no-save-model"),
        (("capture_video",), getattr(args, "eval_freq", 0) == -1, "with --eval-freq -1"),
        (("obs_mode", "eval_protocol"), tabletop, "on the tabletop"),
    ]:
        for name in names if nothing else ():
            if getattr(args, name, None) != getattr(usual, name, None):
                fail(f"--{name.replace('_', '-')} has no effect {where}")


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


def read(kind, command=None, **options):
    """tyro's, whose boxes of errors become a line."""
    import tyro  # here, not at the top: the simulators' processes do not need it

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=command, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    lines = [line.strip("│| ") for line in said.getvalue().splitlines()[1:]]  # below the title
    texts = itertools.groupby(lines, lambda line: bool(line.strip("╭╮╰╯─-")))  # between rules
    message = " ".join(next((text for is_text, text in texts if is_text), ["not understood"]))
    groups = [kind] if dataclasses.is_dataclass(kind) else kind.__annotations__.values()
    known = [f"--{field.name.replace('_', '-')}" for group in groups for field in dataclasses.fields(group)]
    words = [word.split("=")[0].replace("_", "-") for word in (sys.argv[1:] if command is None else command)]
    strange = [word for word in words if word.startswith("--") and word.replace("--no-", "--") not in known]
    nearest = sum((difflib.get_close_matches(word, known, 1, 0.7) for word in strange), [])
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    fail(f"{message.rstrip('.')}{hint} (--help lists all flags)")


def read_groups(args_class, default, command):
    """One reading of the command line. --help has a group for each section of Args, as tyro makes one of
    every nested dataclass."""
    import tyro

    types, groups = {field.name: field.type for field in dataclasses.fields(args_class)}, {}
    for title, flags in sections(args_class).items():
        described = [(name, Annotated[types[name], tyro.conf.arg(help=text)]) for name, text in flags.items()]
        groups[title] = dataclasses.make_dataclass(title, described)
    chosen = {
        title: group(*(getattr(default, field.name) for field in dataclasses.fields(group)))
        for title, group in groups.items()
    }
    told = read(TypedDict("Flags", groups), command, default=chosen, config=(tyro.conf.OmitArgPrefixes,))
    args = args_class(**{name: value for group in told.values() for name, value in vars(group).items()})
    check_effects(args, default)
    return args


def parse(args_class, defaults, command=None):
    """Args from the command line. `defaults(env_id, model)` is what --env-id and --model choose for the rest.

    With --resume it is the run's own flags that are the defaults, and few may be others than they were.
    """
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env_id", "model"):
        usual = getattr(args_class, name)
        choice.add_argument(f"--{name.replace('_', '-')}", f"--{name}", nargs="?", default=usual, const=usual)
    args = read_groups(args_class, defaults(**vars(choice.parse_known_args(command)[0])), command)
    run = unfinished_run(args) if args.resume == "auto" else args.resume
    if not run:
        args.resume = ""
        return args
    try:
        before = args_class(**json.loads(Path(run, "args.json").read_text()))
    except (OSError, TypeError, ValueError):
        fail(f"--resume {run}: no folder of a run of this script")
    args = read_groups(args_class, before, command)
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
    unfinished = [folder for folder in saved if not (folder / "learning_curve.png").exists()]
    return max(unfinished, default="", key=lambda folder: folder.name)


def launcher(ranks=None):
    """The words before the script that start so many ranks; or as many as this process was started with."""
    ranks = ranks or os.environ.get("WORLD_SIZE", "1")  # told by torchrun
    return ["python"] if ranks == "1" else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]


def as_command(script, args):
    """The command that runs a script with these Args, whatever its defaults are."""
    return shlex.join([*launcher(), script, *as_words(dataclasses.asdict(args))])


def as_words(values):
    """{flag: value} as words of a command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != "":
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words
