"""Adds runs to docs/results/leaderboard.md: how long until 90 % of the tabletop's fixed states, by the ODE.

What counts is the first evaluation of a run at or above 90 %, 500 episodes, and the minutes of rollout,
encoding and update until there. Evaluations take no time here; choose --eval-freq for the run accordingly.
A run that never gets there is not added. Rows that are on the page stay.

    python flow_sde_ppo.py --eval-freq 5
    python benchmark/leaderboard.py runs/RUN --commit "$(git describe --always)" --machine "two cores of ..."
"""

import importlib
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import SCRIPTS, evaluations, read_run

from flags import as_words, fail

MARKS = "<!-- leaderboard -->", "<!-- leaderboard end -->"
COLUMNS = ("minutes", "environment steps", "end of the run", "command", "commit", "machine")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs on the tabletop"""
    commit: str
    """what they were run with"""
    machine: str
    """where, and what else was running there"""
    page: Path = Path("docs/results/leaderboard.md")
    """page with the two marks"""
    goal: float = 0.9
    """success rate that is waited for"""


def command_of(folder, args):
    """What was typed: the flags that are not the script's defaults, and the processes."""
    script = next(
        (name for name in SCRIPTS if set(asdict(importlib.import_module(name).Args())) == set(args)), None
    )
    if not script:
        fail(f"{folder} is not a run of one of the three scripts as they are now")
    usual = asdict(importlib.import_module(script).Args()) | {"run_dir": args["run_dir"]}
    words = as_words({name: value for name, value in args.items() if value != usual[name]})
    ranks = {name.rsplit("of", 1)[1].split(".")[0] for name in os.listdir(folder / "resume") if "of" in name}
    launcher = "python" if ranks <= {"1"} else f"torchrun --standalone --nproc_per_node={max(ranks)}"
    return " ".join([launcher, f"{script}.py", *words])


def row(folder, goal):
    """(minutes, steps, last success rate, command) of a run, or None if it never reached the goal."""
    args, metrics = read_run(folder)
    if args["env_id"] != "tabletop":
        fail(f"{folder} is a run on {args['env_id']}")
    steps, minutes, rates = evaluations(args, metrics)
    reached = [i for i, rate in enumerate(rates) if rate >= goal]
    if not reached:
        return None
    first = reached[0]
    return (
        f"{minutes[first]:.1f}",
        f"{steps[first]:,.0f}",
        f"{rates[-1]:.1%}",
        f"`{command_of(folder, args)}`",
    )


def main(args):
    try:
        before, rest = args.page.read_text().split(MARKS[0])
        table, after = rest.split(MARKS[1])
    except (OSError, ValueError):
        fail(f"{args.page} cannot be written: it needs {MARKS[0]} and {MARKS[1]}")
    rows = [tuple(re.split(r" *\| *", line)[1:-1]) for line in table.strip().splitlines()[2:]]
    for folder in args.runs:
        cells = row(folder, args.goal)
        if cells:
            rows.append((*cells, args.commit, args.machine))
        else:
            print(f"{folder} never had {args.goal:.0%}: not added")
    rows = sorted(dict.fromkeys(rows), key=lambda cells: float(cells[0]))
    lines = [f"| {' | '.join(cells)} |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows]]
    text = "\n".join(lines)
    print(text)
    args.page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
