"""The results table (Markdown, stdout) and the curves (PNG) of several seeds; called by benchmark/tabletop.sh.

It reads what `evaluate.py --stochastic --json` wrote for a start policy and for the checkpoints of RL runs from
it, in this order, and the metrics.csv and args.json beside each of those checkpoints.

    python benchmark/table.py runs/benchmark/evaluation.json --output docs/benchmark.png
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass
class Args:
    evaluation: tyro.conf.Positional[Path]
    """JSON file of evaluate.py"""
    output: Path = Path("docs/benchmark.png")
    """picture to write"""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_run(folder):
    """Flags and metrics of a run: {column: (iterations,)}."""
    try:
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        args = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{folder} is not the folder of a run: {error}")
    return args, {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def check(start, runs, protocol):
    """A mean over seeds, and a comparison with what training saw, need equal settings."""
    if start != runs[0][0]["checkpoint"]:
        fail(f"the runs start from {runs[0][0]['checkpoint']}, not from {start}")
    for args, _ in runs:
        other = {k for k in args if args[k] != runs[0][0][k]} - {"seed", "run_dir"}
        if other:
            fail(f"the runs differ in more than their seed: {', '.join(sorted(other))}")
    for key in ("env_id", "chunk_len", "denoise_steps", "noise_level", "sde_solver", "mdp"):
        if protocol[key] != runs[0][0][key]:
            fail(f"trained with {key} {runs[0][0][key]}, evaluated with {protocol[key]}")


def percent(result):
    return "{:.1%} [{:.1%}, {:.1%}]".format(result["success_rate"], *result["interval"])


def spread(values):
    return f"{np.mean(values):.1%} (seeds {min(values):.1%} to {max(values):.1%})"


def table(names, ode, sde, runs):
    """A row per policy and the mean of the RL rows."""
    steps = [metrics["global_step"][-1] for _, metrics in runs]
    minutes = [sum(m[f"time/{part}"].sum() for part in ("rollout", "encode", "update")) / 60 for _, m in runs]
    lengths = ["-" if r["length"] is None else f"{r['length']:.1f}" for r in ode]
    costs = [("-", "-"), *((f"{s / 1e6:.2f} M", f"{m:.1f}") for s, m in zip(steps, minutes))]
    head = ["policy", "ODE success [95 % interval]", "SDE success", "steps of a success"]
    rows = [[*head, "environment steps", "minutes"], ["---"] * 6]
    rows += [
        (name, percent(o), f"{s['success_rate']:.1%}", length, *cost)
        for name, o, s, length, cost in zip(names, ode, sde, lengths, costs)
    ]
    length = "-" if "-" in lengths[1:] else f"{np.mean([r['length'] for r in ode[1:]]):.1f}"
    rates = ([r["success_rate"] for r in results[1:]] for results in (ode, sde))
    cost = f"{np.mean(steps) / 1e6:.2f} M", f"{np.mean(minutes):.1f}"
    rows.append(("**RL, mean**", f"**{spread(next(rates))}**", f"{np.mean(next(rates)):.1%}", length, *cost))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def evaluations(args, metrics, start):
    """Environment steps and success rates (E,) of a run's evaluations; `start` is the start policy's rate."""
    iteration = metrics["iteration"].astype(int)
    last = iteration == iteration[-1]
    chosen = last | (iteration % args["eval_freq"] == 0) if args["eval_freq"] else last
    step, rate = metrics["global_step"][chosen], metrics["eval/success_rate"][chosen]
    return np.concatenate([[0], step]), np.concatenate([[start], rate])


def draw(names, start, runs, max_episode_steps, path):
    """Success over environment steps: faint in training, strong in evaluation, black for the mean."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    curves = [evaluations(args, metrics, start) for args, metrics in runs]
    for i, (name, (args, metrics), (step, rate)) in enumerate(zip(names, runs, curves)):
        seen, success = metrics["global_step"], metrics["charts/success_once"]
        fair = seen > 2 * args["num_envs"] * max_episode_steps  # successes are short: the first to end
        axes.plot(seen[fair], success[fair], color=f"C{i}", alpha=0.2, linewidth=1)
        axes.plot(step, rate, "o-", color=f"C{i}", alpha=0.8, markersize=4, linewidth=1, label=name)
    step, rate = np.mean(curves, axis=0)  # evaluations come after the same iterations
    axes.plot(step, rate, color="black", linewidth=2.2, label=f"mean of {len(runs)}")
    axes.set(xlabel="environment steps", ylabel="success rate", ylim=(0, 1.01))
    axes.set_title("evaluation by the ODE on the fixed states; faint: training episodes (SDE)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main(args):
    try:
        report = json.loads(args.evaluation.read_text())
    except (OSError, ValueError) as error:
        fail(f"{args.evaluation} cannot be read: {error}")
    ode, sde = ([r for r in report["results"] if r["deterministic"] == kind] for kind in (True, False))
    if len(ode) < 2 or len(ode) != len(sde):
        fail(f"{args.evaluation}: needs a start policy and at least one RL run, with --stochastic")
    names = [r["name"].removesuffix(", ODE") for r in ode]
    runs = [read_run(Path(r["checkpoint"]).parent) for r in ode[1:]]
    p = report["protocol"]
    check(ode[0]["checkpoint"], runs, p)
    print(f"\n{table(names, ode, sde, runs)}\n")
    print(
        f"{ode[0]['episodes']} episodes a cell: {p['num_states']} fixed states of {p['env_id']}, at most "
        f"{p['max_episode_steps']} steps, K = {p['denoise_steps']}, chunks of {p['chunk_len']}; SDE: {p['mdp']}, "
        f"noise {p['noise_level']}.\nInterval: Wilson, 95 %, over the episodes of one policy. Minutes: rollout, "
        f"encoding and update, without evaluations."
    )
    draw(names[1:], ode[0]["success_rate"], runs, p["max_episode_steps"], args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
