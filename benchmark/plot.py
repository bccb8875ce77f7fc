"""Curves (PNG) and a table (Markdown, stdout) of runs: of any that you name, or of benchmark/compare.sh.

Any runs, finished or not: success in training, with noise, and by the ODE, over environment steps and over
time. What their args.json differ in is the legend of the picture and is told in the table.

    python benchmark/plot.py runs/RUN runs/RUN ... --output two.png    # seconds

The folder of benchmark/compare.sh: the three algorithms, mean and range of their seeds. It has what
`evaluate.py --stochastic --json` wrote for each script, {script}.json, and the runs that were evaluated.

    python benchmark/plot.py runs/compare --output docs/compare.png
"""

import csv
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flags import fail

SCRIPTS = {
    "flow_sde_ppo": "Flow-SDE PPO",
    "flow_noise_ppo": "Flow-Noise PPO",
    "flow_sde_grpo": "Flow-SDE GRPO",
}
T_95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228  # Student's t, df 1, 2...


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or the one of benchmark/compare.sh"""
    output: Path = Path("runs/plot.png")
    """picture to write"""


def interval(*samples):
    """Mean of one sample, or difference of two samples' means, with its 95 % interval (Student's t)."""
    df = sum(len(x) - 1 for x in samples)
    centre = np.mean(samples[0]) - (np.mean(samples[1]) if len(samples) == 2 else 0)
    if not 1 <= df <= len(T_95) or min(map(len, samples)) < 2:
        return centre, math.nan, math.nan
    half = T_95[df - 1] * math.sqrt(sum(np.var(x, ddof=1) / len(x) for x in samples))
    return centre, centre - half, centre + half


def read_run(folder):
    """Flags and metrics of a run: {column: (iterations,)}."""
    try:
        args = json.loads((folder / "args.json").read_text())
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        metrics = {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}
    except OSError as error:
        fail(f"{folder} is not the folder of a run: no {Path(error.filename).name}")
    except (ValueError, TypeError) as error:
        fail(f"{folder} is not the folder of a run: {error}")
    except IndexError:
        fail(f"{folder} has no finished iteration yet")
    return args, metrics


def read(folder):
    """Per script: results by ODE, with noise, (args, metrics) of its runs; SFT's results; the protocol."""
    table, sft = {}, None
    for script in SCRIPTS:
        try:
            report = json.loads((folder / f"{script}.json").read_text())
        except (OSError, ValueError) as error:
            fail(f"{folder / script}.json cannot be read: {error}")
        ode, noisy = ([r for r in report["results"] if r["deterministic"] == kind] for kind in (True, False))
        if report["results"][0]["name"].startswith("SFT"):
            sft = ode.pop(0), noisy.pop(0)
        table[script] = ode, noisy, [read_run(Path(r["checkpoint"]).parent) for r in ode]
    every = [args for _, _, runs in table.values() for args, _ in runs]
    for key in ("env_id", "checkpoint", "total_timesteps", "chunk_len", "denoise_steps"):
        if len({args[key] for args in every}) > 1:  # else it would not be a comparison
            fail(f"the runs differ in {key}")
    for _, _, runs in table.values():
        other = {k for args, _ in runs for k in args if args[k] != runs[0][0][k]} - {"seed", "run_dir"}
        if other:
            fail(f"runs of one script differ in more than their seed: {', '.join(sorted(other))}")
    return table, sft, report["protocol"]


def minutes(metrics):
    return sum(metrics[f"time/{part}"] for part in ("rollout", "encode", "update")).cumsum() / 60


def markdown(table, sft):
    ode, noisy = sft
    seeds = sorted({args["seed"] for _, _, runs in table.values() for args, _ in runs})
    rows = [["ODE success", *(f"seed {seed}" for seed in seeds), "mean [95 % interval]", "with noise"]]
    rows[0] += ["steps of a success", "environment steps", "minutes", "s per update"]
    rows.append(["---"] * len(rows[0]))
    sft_mean = "{:.1%} [{:.1%}, {:.1%}]".format(ode["success_rate"], *ode["interval"])
    costs = ["-"] * 3
    start = f"{noisy['success_rate']:.1%}", f"{ode['length']:.1f}", *costs
    rows.append(["SFT, the start of all", *(["-"] * len(seeds)), sft_mean, *start])
    for script, (ode, noisy, runs) in table.items():
        rates = [r["success_rate"] for r in ode]
        mean, low, high = interval(rates)
        of = {args["seed"]: rate for (args, _), rate in zip(runs, rates)}
        rows.append(
            [
                SCRIPTS[script],
                *(f"{of[seed]:.1%}" if seed in of else "-" for seed in seeds),
                f"**{mean:.1%}** [{low:.1%}, {min(high, 1):.1%}]",
                f"{np.mean([r['success_rate'] for r in noisy]):.1%}",
                f"{np.mean([r['length'] for r in ode]):.1f}",
                f"{np.mean([m['global_step'][-1] for _, m in runs]) / 1e6:.2f} M",
                f"{np.mean([minutes(m)[-1] for _, m in runs]):.1f}",
                f"{np.mean([m['time/update'][1:].mean() for _, m in runs]):.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(table):
    """Of the algorithms' means, in points, and whether the seeds can tell them apart."""
    rates = {script: [r["success_rate"] for r in ode] for script, (ode, _, _) in table.items()}
    for a, b in itertools.combinations(SCRIPTS, 2):
        gap, low, high = (100 * x for x in interval(rates[a], rates[b]))
        verdict = "cannot be told apart" if low <= 0 <= high else "differ"
        yield f"- {SCRIPTS[a]} minus {SCRIPTS[b]}: {gap:+.1f} points [{low:+.1f}, {high:+.1f}], {verdict}"


def evaluations(args, metrics, start=None):
    """Environment steps, minutes and success rates (E,) of a run's evaluations, the start policy's first."""
    iteration, every = metrics["iteration"].astype(int), args["eval_freq"]
    chosen = metrics["global_step"] >= args["total_timesteps"]
    if every > 0:
        chosen |= iteration % every == 0
    rate = metrics["eval/success_rate"]  # the latest one, in every iteration
    if start is None:
        start = math.nan if chosen[0] else rate[0]
    curve = metrics["global_step"][chosen], minutes(metrics)[chosen], rate[chosen]
    return [np.concatenate([[first], x]) for first, x in zip((0, 0, start), curve)]


def at_equal_progress(curves, points=200):
    """Steps, minutes and success rates, (seeds, points) each, where all have done the same part of a run.

    So no curve is cut at its fastest seed.
    """
    progress = np.linspace(0, 1, points)
    return [np.stack([np.interp(progress, c[0] / c[0][-1], c[which]) for c in curves]) for which in range(3)]


def draw(table, start, path):
    """Success by the ODE over environment steps and over time: mean of the seeds and their range."""
    figure = Figure(figsize=(11, 4.2))
    panels = figure.subplots(1, 2, sharey=True)
    for (script, (_, _, runs)), colour in zip(table.items(), ("C0", "C1", "C2")):
        steps, times, rates = at_equal_progress([evaluations(*run, start) for run in runs])
        mean, band = rates.mean(axis=0), (rates.min(axis=0), rates.max(axis=0))
        for axes, x in zip(panels, (steps.mean(axis=0) / 1e6, times.mean(axis=0))):
            axes.fill_between(x, *band, color=colour, alpha=0.2, lw=0)
            axes.plot(x, mean, color=colour, label=SCRIPTS[script])
        ends = times[:, -1]
        around = [[ends.mean() - ends.min()], [ends.max() - ends.mean()]]
        panels[1].errorbar(ends.mean(), mean[-1], xerr=around, color=colour, capsize=3, marker="o", ms=4)
    panels[0].set(xlabel="environment steps, millions", ylabel="success rate by the ODE")
    panels[1].set(xlabel="minutes without evaluations (bar: range of the seeds)")
    for axes in panels:
        axes.set(ylim=(0.2, 1))
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.suptitle("mean and range of the seeds at equal steps, from the same SFT policy", fontsize=11)
    save(figure, path)


def save(figure, path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, bbox_inches="tight")
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be written: {error}")
    print(f"\npicture: {path}")


# ---------------------------------------------------------------------------------------------- any two runs


def differing_flags(runs):
    """{flag: its value in each run} of those that are not the same in all; "-" where a script has no such."""
    names = dict.fromkeys(name for args, _ in runs for name in args)
    values = {name: [args.get(name, "-") for args, _ in runs] for name in names if name != "run_dir"}
    return {name: column for name, column in values.items() if any(value != column[0] for value in column)}


def labels(folders, flags):
    """What tells a run from the others: the values that all have, and its folder where that is not enough."""
    shown = {name: column for name, column in flags.items() if "-" not in column}
    names = []
    for i, folder in enumerate(folders):
        values = [
            column[i] if name == "exp_name" else f"{name} {column[i]}" for name, column in shown.items()
        ]
        names.append(", ".join(values) or folder.resolve().name)
    return [
        f"{name} ({folder.resolve().name})" if names.count(name) > 1 else name
        for name, folder in zip(names, folders)
    ]


def report(folders, path, last=10):
    """A table of runs and their curves."""
    runs = [read_run(folder) for folder in folders]
    flags = differing_flags(runs)
    names = labels(folders, flags)
    figure = Figure(figsize=(11, 4.2))
    panels = figure.subplots(1, 2, sharey=True)
    head = ["", "ODE success", f"with noise, last {last} iterations", "steps", "minutes", *flags]
    columns = [head]
    for i, (name, (args, metrics)) in enumerate(zip(names, runs)):
        steps, times, rates = evaluations(args, metrics)
        success, colour = metrics["charts/success_once"], f"C{i % 10}"
        for axes, x, x_ode in (
            (panels[0], metrics["global_step"] / 1e6, steps / 1e6),
            (panels[1], minutes(metrics), times),
        ):
            axes.plot(x, success, color=colour, alpha=0.45, lw=1)
            axes.plot(x_ode, rates, "o-", color=colour, ms=4, label=name)
        seen = success[-last:][~np.isnan(success[-last:])]
        finished = "" if metrics["global_step"][-1] >= args["total_timesteps"] else ", not finished"
        columns.append(
            [
                folders[i].resolve().name,
                "-" if np.isnan(rates).all() else f"{rates[~np.isnan(rates)][-1]:.1%}",
                f"{seen.mean():.1%}" if len(seen) else "-",
                f"{metrics['global_step'][-1]:,.0f}{finished}",
                f"{minutes(metrics)[-1]:.1f}",
                *(str(column[i]) for column in flags.values()),
            ]
        )
    rows = list(zip(*columns))
    rows.insert(1, ["---"] * len(rows[0]))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    panels[0].set(xlabel="environment steps, millions", ylabel="success rate", ylim=(0, 1.02))
    panels[1].set(xlabel="minutes, without evaluations")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    figure.suptitle(
        "points: by the ODE, fixed states; thin lines: training episodes, with noise", fontsize=11
    )
    handles = panels[0].get_legend_handles_labels()
    side_by_side = 1 if max(map(len, names)) > 50 else 2
    figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=side_by_side, frameon=False)
    save(figure, path)


def main(args):
    if not args.runs:
        fail("name the folders of one or more runs, or that of benchmark/compare.sh")
    if len(args.runs) > 1 or not all((args.runs[0] / f"{script}.json").exists() for script in SCRIPTS):
        report(args.runs, args.output)
        return
    table, sft, p = read(args.runs[0])
    how = sft[0]["sampler"]
    print(f"\n{markdown(table, sft)}\n")
    print(
        f"{sft[0]['episodes']} episodes per seed, one from each of the fixed states of {p['env_id']}, at "
        f"most {p['max_episode_steps']} steps, K = {how['denoise_steps']}, chunks of {how['chunk_len']}.\n"
        f"Intervals: over seeds, Student's t; SFT: over its episodes, Wilson. With noise: as in training. "
        f"Minutes: of one run, without evaluations.\n"
    )
    print("\n".join(differences(table)))
    draw(table, sft[0]["success_rate"], args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
