"""The table and the picture of metaworld.sh and of the scripts of pixels.sh: SFT and RL by task.

Prints the table as Markdown: success by the ODE of SFT and of every seed, with 95 % intervals. And draws the
curves.

    python benchmark/rl_table.py runs/metaworld --output docs/metaworld.png    # seconds
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flags import fail
from reports import wilson
from simulators.metaworld import METAWORLD

SCRIPTS = {
    "flow_sde_ppo": ("Flow-SDE PPO", "tab:blue"),
    "flow_noise_ppo": ("Flow-Noise PPO", "tab:orange"),
    "flow_sde_grpo": ("Flow-SDE GRPO", "tab:green"),
}
T95 = {1: 12.706, 2: 4.303}  # two-sided 95 % quantile of Student's t, by degrees of freedom


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """what one of these scripts wrote"""
    output: Path = Path("docs/metaworld.png")
    """picture to write"""


def rates(report, script):
    """Success rates (seeds,) of a script's policies in a report of evaluate.py, and episodes of each."""
    chosen = [r for r in report["results"] if f"/{script}/" in r["checkpoint"]]
    return np.array([r["success_rate"] for r in chosen]), [r["successes"] for r in chosen]


def row(task, difficulty, report, scripts):
    """A line of the table, and the success rates: of SFT, and of a script's seeds."""
    sft, ended = report["results"][0], {}
    low, high = sft["interval"]
    cells = [task, difficulty, f"{sft['success_rate']:.1%} [{low:.0%}, {high:.0%}]"]
    for script in scripts:
        ended[script], successes = rates(report, script)
        if not successes:
            cells += ["not run", ""]
            continue
        low, high = wilson(sum(successes), len(successes) * sft["episodes"])
        seeds, mean = " / ".join(f"{rate:.0%}" for rate in ended[script]), ended[script].mean()
        cells += [f"{seeds}, **{mean:.1%}** [{low:.0%}, {high:.0%}]"]
        cells += [f"{100 * (mean - sft['success_rate']):+.1f}"]
    return cells, sft["success_rate"], ended


def mean_row(starts, ended, scripts):
    """Over the tasks that a script has; the interval is over its seeds, each a mean over the tasks."""
    cells = ["**mean**", "", f"{np.mean(starts):.1%}"]
    for script in scripts:
        has = [(start, end[script]) for start, end in zip(starts, ended) if len(end[script])]
        count, spread = min(len(rate) for _, rate in has), ""
        means = np.mean([rate[:count] - start for start, rate in has], axis=0)
        if count - 1 in T95:
            spread = f" ± {100 * T95[count - 1] * means.std(ddof=1) / np.sqrt(count):.1f}"
        few = f" (of {len(has)})" if len(has) < len(starts) else ""
        cells += [f"**{np.mean([rate.mean() for _, rate in has]):.1%}**{few}"]
        cells += [f"**{100 * np.mean([rate.mean() - start for start, rate in has]):+.1f}**{spread}"]
    return cells


def draw_task(axes, folder, task, report):
    """Lines while training, with noise; to the right of them, in a strip of its own, what the ODE reaches."""
    end = 0
    for script, (_, colour) in SCRIPTS.items():
        for file in sorted(folder.glob(f"{script}/{task}-?/*/metrics.csv")):
            log = list(csv.DictReader(file.open()))
            steps = [float(line["global_step"]) / 1000 for line in log]
            success = np.array([float(line["charts/success_once"]) for line in log])
            smooth = [np.nanmean(success[max(0, i - 2) : i + 3]) for i in range(len(success))]
            axes.plot(steps, smooth, color=colour, alpha=0.7, lw=1.2)
            end = max(end, steps[-1])
    end = end or 1
    axes.axvspan(1.05 * end, 1.3 * end, color="0.93", lw=0)
    axes.text(1.175 * end, 0.03, "ODE", ha="center", fontsize=9, color="0.35")
    axes.axhline(report["results"][0]["success_rate"], color="0.35", ls="--", lw=1.2)
    for place, (script, (_, colour)) in zip((1.25, 1.175, 1.1), SCRIPTS.items()):
        for rate in rates(report, script)[0]:
            axes.plot(place * end, rate, "D", ms=5, color=colour, alpha=0.8, clip_on=False)
    axes.set(title=task, ylim=(0, 1), xlim=(0, 1.3 * end))
    axes.grid(alpha=0.3)


def draw(folder, tasks, reports, scripts, path):
    rows = 2 if len(tasks) > 1 else 1
    figure = Figure(figsize=(13, 3.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, (len(tasks) + rows - 1) // rows, squeeze=False, sharey=True).flatten()
    for axes, task in zip(panels, tasks):
        draw_task(axes, folder, task, reports[task])
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    columns = len(panels) // rows
    for place, axes in enumerate(panels):
        if place % columns == 0:
            axes.set_ylabel("success rate")
        if place + columns >= len(tasks):
            axes.set_xlabel("environment steps, thousands")
    handles = []
    for name, colour in (SCRIPTS[script] for script in scripts):
        handles.append(Line2D([], [], color=colour, label=f"{name}: training episodes, with noise"))
        trained = f"{name}: the trained policies by the ODE"
        handles.append(Line2D([], [], color=colour, marker="D", ls="", ms=5, label=trained))
    handles.append(Line2D([], [], color="0.35", ls="--", label="SFT, the start of all, by the ODE"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be written: {error}")
    print(f"\npicture: {path}")


def main(args):
    folder = args.folder
    reports = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    if not reports:
        fail(f"{folder} has no reports: bash benchmark/metaworld.sh makes them")
    order = ["easy", "medium", "hard", "very hard", "LIBERO-Goal"]
    classes = {task.removesuffix("-v3"): about["difficulty"] for task, about in METAWORLD.items()}
    classes = {task: classes.get(task, order[-1]) for task in reports if task != "mt10"}
    single = sorted(classes, key=lambda task: order.index(classes[task]))
    scripts = [name for name in SCRIPTS if any(len(rates(report, name)[0]) for report in reports.values())]
    table, starts, ended = [["task", "class", "SFT"]], [], []
    for script in scripts:
        table[0] += [f"{SCRIPTS[script][0]}: seeds, mean", "gain"]
    for task in single:
        cells, start, end = row(task, classes[task], reports[task], scripts)
        table, starts, ended = table + [cells], starts + [start], ended + [end]
    if len(single) > 1:
        table.append(mean_row(starts, ended, scripts))
    if "mt10" in reports:
        table.append(row("mt10, one policy", "", reports["mt10"], scripts)[0])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    print("\n".join(f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in table))

    draw(folder, [*single, *(["mt10"] if "mt10" in reports else [])], reports, scripts, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
