"""The algorithms compared: a table (Markdown, stdout) and curves (PNG); called by benchmark/compare.sh.

It reads what `evaluate.py --stochastic --json` wrote for each script, {script}.json, and the metrics.csv and
args.json of the runs whose checkpoints were evaluated.

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

SCRIPTS = {
    "flow_sde_ppo": "Flow-SDE PPO",
    "flow_noise_ppo": "Flow-Noise PPO",
    "flow_sde_grpo": "Flow-SDE GRPO",
}
T_95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228  # Student's t, df 1, 2...


@dataclass
class Args:
    runs: tyro.conf.Positional[Path]
    """folder of benchmark/compare.sh"""
    output: Path = Path("docs/compare.png")
    """picture to write"""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


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
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        args = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{folder} is not the folder of a run: {error}")
    return args, {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


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
    for key in ("env_id", "checkpoint", "total_timesteps", "num_envs", "chunk_len", "denoise_steps"):
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
    seeds = [args["seed"] for args, _ in next(iter(table.values()))[2]]
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
        rows.append([
            SCRIPTS[script], *(f"{rate:.1%}" for rate in rates),
            f"**{mean:.1%}** [{low:.1%}, {min(high, 1):.1%}]",
            f"{np.mean([r['success_rate'] for r in noisy]):.1%}",
            f"{np.mean([r['length'] for r in ode]):.1f}",
            f"{np.mean([m['global_step'][-1] for _, m in runs]) / 1e6:.2f} M",
            f"{np.mean([minutes(m)[-1] for _, m in runs]):.1f}",
            f"{np.mean([m['time/update'][1:].mean() for _, m in runs]):.2f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(table):
    """Of the algorithms' means, in points, and whether three seeds can tell them apart."""
    rates = {script: [r["success_rate"] for r in ode] for script, (ode, _, _) in table.items()}
    for a, b in itertools.combinations(SCRIPTS, 2):
        gap, low, high = (100 * x for x in interval(rates[a], rates[b]))
        verdict = "cannot be told apart" if low <= 0 <= high else "differ"
        yield f"- {SCRIPTS[a]} minus {SCRIPTS[b]}: {gap:+.1f} points [{low:+.1f}, {high:+.1f}], {verdict}"


def evaluations(args, metrics, start):
    """Environment steps, minutes and success rates (E,) of a run's evaluations, the start policy's first."""
    iteration = metrics["iteration"].astype(int)
    last = iteration == iteration[-1]
    chosen = last | (iteration % args["eval_freq"] == 0) if args["eval_freq"] else last
    curve = metrics["global_step"][chosen], minutes(metrics)[chosen], metrics["eval/success_rate"][chosen]
    return [np.concatenate([[first], x]) for first, x in zip((0, 0, start), curve)]


def draw(table, start, path):
    """Success by the ODE over environment steps and over time: mean of the seeds and their range."""
    figure = Figure(figsize=(11, 4.2))
    panels = figure.subplots(1, 2, sharey=True)
    for (script, (_, _, runs)), colour in zip(table.items(), ("C0", "C1", "C2")):
        curves = [evaluations(args, metrics, start) for args, metrics in runs]
        for axes, which, scale in zip(panels, (0, 1), (1e-6, 1)):
            grid = np.linspace(0, min(curve[which][-1] for curve in curves), 200)
            rates = np.stack([np.interp(grid, curve[which], curve[2]) for curve in curves])
            band = rates.min(axis=0), rates.max(axis=0)
            axes.fill_between(grid * scale, *band, color=colour, alpha=0.2, lw=0)
            axes.plot(grid * scale, rates.mean(axis=0), color=colour, label=SCRIPTS[script])
    for axes, label in zip(panels, ("environment steps, millions", "minutes, without evaluations")):
        axes.set(xlabel=label, ylim=(0.3, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("success rate by the ODE")
    panels[0].legend(loc="lower right")
    figure.suptitle(f"mean and range of {len(runs)} seeds, from the same SFT policy", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main(args):
    table, sft, p = read(args.runs)
    print(f"\n{markdown(table, sft)}\n")
    print(
        f"{sft[0]['episodes']} episodes per seed, one from each of the fixed states of {p['env_id']}, at "
        f"most {p['max_episode_steps']} steps, K = {p['denoise_steps']}, chunks of {p['chunk_len']}.\n"
        f"Intervals: over seeds, Student's t; SFT: over its episodes, Wilson. With noise: as in training. "
        f"Minutes: of one run, without evaluations.\n"
    )
    print("\n".join(differences(table)))
    draw(table, sft[0]["success_rate"], args.output)
    print(f"\npicture: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
