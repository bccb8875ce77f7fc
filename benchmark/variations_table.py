"""The table of variations.sh: what RL changes in distribution and out of it, in the groups of Table 3.

Reads the reports of `evaluate.py --variations --json` in a folder, one a policy: SFT.json and those of runs.
Prints the table as Markdown, and writes it between its two marks into a page.

    python benchmark/variations_table.py runs/compare/variations    # a second
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import SCRIPTS, interval

from flags import fail
from reports import protocol_line

MARKS = "<!-- variations -->", "<!-- variations end -->"
GROUPS = ("vision", "semantics", "execution")


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """what benchmark/variations.sh wrote"""
    page: Path = Path("docs/results/generalisation.md")
    """page with the two marks"""


def read(folder):
    """SFT's report and {script: {seed: report}}, of runs with the same script and seed the newest one."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    sft, runs = found.pop("SFT", None), {script: {} for script in SCRIPTS}
    for name, report in found.items():
        _, script, seed, _ = name.split("__")
        runs[script][int(seed)] = report
    runs = {script: dict(sorted(seeds.items())) for script, seeds in runs.items() if seeds}
    if not sft or not runs:
        fail(f"{folder} has no reports of SFT and of a run: bash benchmark/variations.sh makes them")
    return sft, runs


def rates(report):
    """{row: success rate} of a report on one policy: in distribution, the variations, the groups' means."""
    found = {"in distribution": report["results"][0]["success_rate"]}
    for group, (mean,) in report["groups"].items():
        for env_id, told in report["variations"].items():
            if told["group"] == group:
                found[env_id] = told["results"][0]["success_rate"]
        found[group] = mean["success_rate"]
    return found


def table(sft, runs):
    intervals = {group: mean["interval"] for group, (mean,) in sft["groups"].items()}
    intervals["in distribution"] = sft["results"][0]["interval"]
    rows = [["success", "SFT", *(SCRIPTS[script] for script in runs)]]
    policies = {script: [rates(report) for report in seeds.values()] for script, seeds in runs.items()}
    for row, start in rates(sft).items():
        cells = [f"**{'mean of the groups' if row == 'mean' else row}**" if row in intervals else row]
        cells.append(f"{start:.1%}")
        if row in intervals:
            cells[-1] += " [{:.1%}, {:.1%}]".format(*intervals[row])
        for seeds in policies.values():
            mean, low, high = interval([found[row] for found in seeds])
            cell = f"{mean:.1%} ({100 * (mean - start):+.1f})"
            if row in intervals:
                cell = f"**{cell}**" + (
                    "" if math.isnan(low) else f" [{max(low, 0):.1%}, {min(high, 1):.1%}]"
                )
            cells.append(cell)
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def gains(sft, runs):
    """A line per algorithm: what it gains in each group, and whether semantics gains less than the others."""
    start = rates(sft)
    for script, seeds in runs.items():
        gain = {row: 100 * (np.array([rates(r)[row] for r in seeds.values()]) - start[row]) for row in start}
        whole = gain["in distribution"].mean()
        told = [f"{group} {gain[group].mean():+.1f} ({gain[group].mean() / whole:.0%})" for group in GROUPS]
        which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        line = f"- {SCRIPTS[script]}, {which}: in distribution {whole:+.1f} points, {', '.join(told)}."
        for group in ("vision", "execution"):
            mean, low, high = interval(gain[group] - gain["semantics"])
            line += f" {group.capitalize()} minus semantics: {mean:+.1f}"
            line += "." if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]."
        yield line


def main(args):
    sft, runs = read(args.folder)
    every = [sft, *(report for seeds in runs.values() for report in seeds.values())]
    protocol = protocol_line(sft | {"results": [report["results"][0] for report in every]})
    protocol = re.sub(r"tabletop__(\w+?)__(\d+)__\d+", r"\1 seed \2", protocol)
    text = f"{table(sft, runs)}\n\n" + "\n".join(gains(sft, runs)) + f"\n\nProtocol: {protocol}"
    print(text)
    try:
        before, rest = args.page.read_text().split(MARKS[0])
        _, after = rest.split(MARKS[1])
    except (OSError, ValueError):
        fail(f"{args.page} cannot be written: it needs {MARKS[0]} and {MARKS[1]}")
    temporary = args.page.with_suffix(".tmp")
    temporary.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    os.replace(temporary, args.page)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
