"""The command line of the scripts: flags from the dataclass `Args`, and `Args` as a command again."""

import argparse
import dataclasses
import inspect
import re
import shlex
import sys
from typing import Annotated, TypedDict


def fail(message: str):
    """A user's mistake: one line on stderr and exit code 2, never a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def sections(args_class):
    """{section: {flag: its line of help}} of an Args, as its comments say."""
    found = {}
    for line in inspect.getsource(args_class).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            found[title[1]] = {}
        elif flag := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
            found[list(found)[-1]][flag[1]] = flag[2]
    return found


def parse(args_class, defaults, command=None):
    """Args from the command line. `defaults(env_id, model)` is what --env-id and --model choose for the rest.

    --help has a group for each section of Args: tyro makes one of every nested dataclass.
    """
    import tyro  # here, not at the top: the simulators' processes do not need it

    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env_id", "model"):
        usual = getattr(args_class, name)
        choice.add_argument(f"--{name.replace('_', '-')}", f"--{name}", nargs="?", default=usual, const=usual)
    default = defaults(**vars(choice.parse_known_args(command)[0]))
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


def as_command(script, args):
    """The command that runs a script with these Args, whatever its defaults are."""
    words = ["python", script]
    for name, value in dataclasses.asdict(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
