"""The table and the picture of metaworld.sh: SFT and RL on MetaWorld tasks, 100 episodes of each policy.

python benchmark/metaworld_table.py runs/metaworld      # prints the table, writes docs/metaworld.png
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from envs import fail  # noqa: E402
from evaluate import wilson  # noqa: E402
from simulators.metaworld import METAWORLD  # noqa: E402

T95 = {1: 12.706, 2: 4.303}  # two-sided 95 % quantile of Student's t, by degrees of freedom


def rates(report, script):
    """Success rates (seeds,) of a script's policies in a report of evaluate.py, and episodes of each."""
    chosen = [r for r in report["results"] if f"/{script}/" in r["checkpoint"]]
    return np.array([r["success_rate"] for r in chosen]), [r["successes"] for r in chosen]


def row(task, difficulty, report):
    sft = report["results"][0]
    low, high = sft["interval"]
    cells = [task, difficulty, f"{sft['success_rate']:.1%} [{low:.0%}, {high:.0%}]"]
    gains = []
    for script in ("flow_sde_ppo", "flow_noise_ppo"):
        rate, successes = rates(report, script)
        if not len(rate):
            cells.append("")
            continue
        low, high = wilson(sum(successes), len(rate) * sft["episodes"])
        cells.append(f"{' / '.join(f'{r:.0%}' for r in rate)}, **{rate.mean():.1%}** [{low:.0%}, {high:.0%}]")
        gains.append(rate.mean() - sft["success_rate"])
    cells.insert(4, f"{100 * gains[0]:+.1f}")
    return cells, gains[0], sft["success_rate"], rates(report, "flow_sde_ppo")[0]


def main(folder):
    reports = {file.stem: json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))}
    if not reports:
        fail(f"{folder} has no reports: bash benchmark/metaworld.sh makes them")
    order = ["easy", "medium", "hard", "very hard"]
    classes = {task.removesuffix("-v3"): about["difficulty"] for task, about in METAWORLD.items()}
    single = sorted(
        (task for task in reports if task in classes), key=lambda task: order.index(classes[task])
    )
    table = [("task", "class", "SFT", "Flow-SDE PPO, seeds, mean", "gain", "Flow-Noise PPO, seeds, mean")]
    gains, starts, ends = [], [], []
    for task in single:
        cells, gain, start, end = row(task, classes[task], reports[task])
        table.append(cells)
        gains, starts, ends = gains + [gain], starts + [start], ends + [end]
    count = min(map(len, ends))
    means = np.mean([end[:count] for end in ends], axis=0) - np.mean(starts)  # of a seed, over the tasks
    interval = T95.get(count - 1, np.nan) * means.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    table.append(("**mean**", "", f"{np.mean(starts):.1%}", f"**{np.mean([e.mean() for e in ends]):.1%}**",
                  f"**{100 * np.mean(gains):+.1f}** ± {100 * interval:.1f}", ""))  # fmt: skip
    if "mt10" in reports:
        table.append(row("mt10, one policy", "", reports["mt10"])[0])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    print("\n".join(f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in table))

    figure = Figure(figsize=(13, 6))
    names = [*single, *(["mt10"] if "mt10" in reports else [])]
    for place, task in enumerate(names):
        axes = figure.add_subplot(2, (len(names) + 1) // 2, place + 1)
        for script, colour in (("flow_noise_ppo", "tab:orange"), ("flow_sde_ppo", "tab:blue")):
            for file in sorted(Path(folder).glob(f"{script}/{task}-?/*/metrics.csv")):
                log = list(csv.DictReader(file.open()))
                steps = [float(line["global_step"]) / 1000 for line in log]
                success = np.array([float(line["charts/success_once"]) for line in log])
                smooth = [np.nanmean(success[max(0, i - 2) : i + 3]) for i in range(len(success))]
                axes.plot(steps, smooth, color=colour, alpha=0.7)
            for rate in rates(reports[task], script)[0]:  # by the ODE, without noise
                axes.plot(steps[-1], rate, "o", color=colour, clip_on=False)
        axes.plot(0, reports[task]["results"][0]["success_rate"], "o", color="gray", clip_on=False)
        axes.set(title=task, ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.supxlabel("thousand environment steps")
    figure.supylabel("success: lines in training, with noise; points by the ODE, gray SFT")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "metaworld.png", dpi=90)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("use: python benchmark/metaworld_table.py FOLDER")
    main(sys.argv[1])
