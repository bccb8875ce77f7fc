"""The paper's ablations at laptop scale: runs of the three scripts, then a table and a picture of each.

ABLATIONS below is the whole list: of every row the command, as it is run. A command that several rows have is
run once a seed. What has finished is not run again, and a run that was stopped goes on, so the same call can
be made again. Figures of every run are kept in docs/results/ablations.json (an entry that is deleted there is
run anew), tables go between their marks in docs/results/ablations.md, with the seeds of a row that have
finished, pictures to docs/results/ablations/NAME.png.

    python benchmark/ablations.py all                   # an hour and a half on two idle cores
    python benchmark/ablations.py noise steps --jobs 1  # of these two
    python benchmark/ablations.py all --only show       # the commands
    python benchmark/ablations.py all --only tables     # tables and pictures of the runs that there are
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import evaluations, interval, read_run

from evaluate import SAMPLER
from flags import fail, tell

# ------------------------------------------------------------------------------------ the commands

# What the runs have in common: 30 iterations of the default, two of which train the critic alone
STEPS = "--total-timesteps 150000 --eval-freq 15"
# This repository's sampler: noise in every denoise step but the last, level 0.7
DEFAULT = f"flow_sde_ppo.py {STEPS}"
# The paper's: one drawn step of a chunk is noisy, and it may be the last. At level 1.0 it explores as widely
PAPER = f"flow_sde_ppo.py {STEPS} --mdp hybrid --noisy-last-step"
FIRST = "flow_sde_ppo.py --total-timesteps 25000 --eval-freq -1"  # five iterations, no evaluation
SHORT = "flow_sde_ppo.py --total-timesteps 60000 --eval-freq 2"  # to see the beginning
LONG = "flow_sde_ppo.py --eval-freq 20"  # the default run, 1 M steps
# Longer chunks need a policy with a longer horizon: checkpoints/tiny with 10 actions instead of 5, and SFT
TINY_10, HORIZON_10 = "runs/ablations/tiny-horizon-10", "runs/ablations/sft-horizon-10"
SFT_10 = f"flow_sft.py --checkpoint {TINY_10} --num-demos 10 --total-steps 900 --output {HORIZON_10}"
CHUNKS = f"{DEFAULT} --checkpoint {HORIZON_10}"


@dataclass
class Ablation:
    title: str
    rows: dict[str, str]  # label: command
    columns: tuple[str, ...]  # of MEASURES and REPORTED
    panels: tuple[str, ...]  # "ODE" or of CURVES, over environment steps


ABLATIONS = {
    "start": Ablation(
        "Before RL: what noise and few denoise steps cost (Table 6, SFT), the paper's sampler",
        {
            "a = 0.2, K = 4": f"{PAPER} --noise-level 0.2",
            "a = 0.5, K = 4": f"{PAPER} --noise-level 0.5",
            "a = 0.8, K = 4": f"{PAPER} --noise-level 0.8",
            "a = 1.0, K = 4": f"{PAPER} --noise-level 1.0",
            "a = 1.0, K = 1": f"{PAPER} --noise-level 1.0 --denoise-steps 1",
            "a = 1.0, K = 2": f"{PAPER} --noise-level 1.0 --denoise-steps 2",
            "a = 1.0, K = 8": f"{PAPER} --noise-level 1.0 --denoise-steps 8",
        },
        ("SFT, with noise", "SFT, ODE"),
        (),
    ),
    "noise": Ablation(
        "Noise level (Table 6, Fig. 9)",
        {
            "a = 0.7 (default)": DEFAULT,
            "a = 0.2": f"{DEFAULT} --noise-level 0.2",
            "a = 0.5": f"{DEFAULT} --noise-level 0.5",
            "a = 1.0": f"{DEFAULT} --noise-level 1.0",
        },
        ("with noise", "ODE", "clip fraction", "gradient norm", "KL, first 3"),
        ("ODE", "clip fraction", "gradient norm"),
    ),
    "first-updates": Ablation(
        "The actor's first three updates, by noise level (Fig. 9)",
        {
            "a = 0.2": f"{FIRST} --noise-level 0.2",
            "a = 0.5": f"{FIRST} --noise-level 0.5",
            "a = 0.7 (default)": f"{FIRST} --noise-level 0.7",
            "a = 1.0": f"{FIRST} --noise-level 1.0",
        },
        ("clip fraction, first 3", "gradient norm, first 3", "KL, first 3"),
        (),
    ),
    "steps": Ablation(
        "Denoise steps K (Table 6, Fig. 10)",
        {
            "K = 4 (default)": DEFAULT,
            "K = 1": f"{DEFAULT} --denoise-steps 1",
            "K = 2": f"{DEFAULT} --denoise-steps 2",
            "K = 8": f"{DEFAULT} --denoise-steps 8",
        },
        ("with noise", "ODE", "exploration", "KL"),
        ("ODE", "KL"),
    ),
    "algorithm": Ablation(
        "PPO and GRPO (Table 5, Fig. 5), and Flow-Noise",
        {
            "Flow-SDE PPO": DEFAULT,
            "Flow-SDE GRPO": f"flow_sde_grpo.py {STEPS}",
            "Flow-Noise PPO": f"flow_noise_ppo.py {STEPS}",
        },
        ("with noise", "ODE", "KL"),
        ("ODE", "KL"),
    ),
    "mdp": Ablation(
        "One layer, two layers, hybrid (Fig. 8), the SDE's noise of level 0.7 in all",
        {
            "two-layer": f"flow_sde_ppo.py {STEPS} --noisy-last-step --noise-level 0.7",
            "hybrid": f"{PAPER} --noise-level 0.7",
            "one-layer": f"flow_noise_ppo.py {STEPS} --noise sde --noise-level 0.7",
        },
        ("ODE", "explained variance", "s per update", "KL"),
        ("ODE", "explained variance"),
    ),
    "critic": Ablation(
        "Critic: where it reads, and how deep it is (Fig. 6)",
        {
            "V_vlm, 4 layers (default)": DEFAULT,
            "V_expert, 4 layers": f"{DEFAULT} --critic expert",
            "V_expert, 1 layer": f"{DEFAULT} --critic expert --critic-layers 1",
            "V_vlm, 1 layer": f"{DEFAULT} --critic-layers 1",
        },
        ("ODE", "value loss", "explained variance"),
        ("ODE", "value loss", "explained variance"),
    ),
    "warmup": Ablation(
        "Critic warm-up and the initial dip (Fig. 14)",
        {
            "no warm-up": f"{SHORT} --critic-warmup 0",
            "2 iterations": f"{SHORT} --critic-warmup 2",
            "6 iterations": f"{SHORT} --critic-warmup 6",
        },
        ("start", "lowest", "ODE", "explained variance, first 10"),
        ("ODE", "explained variance"),
    ),
    "last-step": Ablation(
        "Which denoise step is noisy",
        {
            "every step but the last (default)": DEFAULT,
            "one, drawn from all (the paper's)": f"{PAPER} --noise-level 1.0",
            "every step": f"flow_sde_ppo.py {STEPS} --noisy-last-step --noise-level 0.7",
            "one, never the last": f"flow_sde_ppo.py {STEPS} --mdp hybrid --noise-level 1.0",
        },
        ("ODE", "exploration", "gradient norm"),
        ("ODE", "gradient norm"),
    ),
    "learned": Ablation(
        "Fixed and learned noise in the same MDP (Fig. 7)",
        {"fixed, a = 0.7 (default)": DEFAULT, "learned, 0.2 to 0.6": f"{DEFAULT} --noise learned"},
        ("ODE", "exploration", "KL"),
        ("ODE", "KL"),
    ),
    "solver": Ablation(
        "The SDE's solver, at equal exploration (section 7 of the paper: Flow-CPS)",
        {
            "Euler, a = 0.7 (default)": DEFAULT,
            "Euler, a = 0.4": f"flow_sde_ppo.py {STEPS} --noise-level 0.4",
            "Flow-CPS, a = 1.0": f"flow_sde_ppo.py {STEPS} --sde-solver cps --noise-level 1.0",
            "exponential, a = 2.0": f"flow_sde_ppo.py {STEPS} --sde-solver exponential --noise-level 2.0",
        },
        ("with noise", "ODE", "exploration"),
        ("ODE",),
    ),
    "cosine": Ablation(
        "Schedule of the learning rate (Fig. 12)",
        {
            "3e-4, constant (default)": DEFAULT,
            "1e-3, constant": f"{DEFAULT} --learning-rate 1e-3",
            "1e-3, cosine": f"{DEFAULT} --learning-rate 1e-3 --lr-schedule cosine",
            "3e-4, cosine": f"{DEFAULT} --lr-schedule cosine",
        },
        ("ODE", "KL, first 10", "KL"),
        ("ODE", "KL"),
    ),
    "chunk": Ablation(
        "Length of a chunk (Table 6, Fig. 11), from one policy with a horizon of 10",
        {
            "2 actions": f"{CHUNKS} --chunk-len 2 --num-steps 5 --num-minibatches 10",
            "5 actions": f"{CHUNKS} --chunk-len 5",
            "10 actions": f"{CHUNKS} --chunk-len 10 --num-steps 1 --num-minibatches 2",
        },
        ("SFT, with noise", "SFT, ODE", "with noise", "ODE", "explained variance"),
        ("ODE", "explained variance"),
    ),
    "lora": Ablation(
        "Training the VLM too, by LoRA (Fig. 15)",
        {
            "VLM frozen": DEFAULT,
            "LoRA I: the same flags": f"{DEFAULT} --train expert+lora",
            "LoRA II: a fifth of the rate, half the minibatches": f"{DEFAULT} --train expert+lora "
            "--learning-rate 6e-5 --num-minibatches 2",
        },
        ("ODE", "KL"),
        ("ODE", "KL"),
    ),
    "length": Ablation(
        "Length of episodes against the expert's (Fig. 13), the default run of 1 M steps",
        {"Flow-SDE PPO": LONG},
        ("ODE", "episode length, 10 to 20", "episode length", "expert's length"),
        ("ODE", "episode length"),
    ),
}

# ------------------------------------------------------------------------------------ what is told


def mean_of(name, first, last=None, form="{:.3f}"):
    """A column: the mean of a metric over iterations first to last of a run."""

    def measure(run):
        values = run[1][name][first:last]
        return values.mean() if len(values) else math.nan

    return measure, form


def curve_of_ode(run):
    return evaluations(*run[:2])[2]


def with_noise(run):
    """Of the trained policy, on the fixed states. Training's own rate counts short episodes more."""
    file = run[2] / "noise.json"
    return json.loads(file.read_text())["results"][1]["success_rate"] if file.exists() else math.nan


def lowest(run):
    return curve_of_ode(run).min()


PERCENT = "{:.1%}"
MEASURES = {
    "ODE": (lambda run: curve_of_ode(run)[-1], PERCENT),
    "start": (lambda run: curve_of_ode(run)[0], PERCENT),
    "lowest": (lowest, PERCENT),
    "with noise": (with_noise, PERCENT),
    "clip fraction": mean_of("losses/clipfrac", -10),
    "gradient norm": mean_of("flow/grad_norm", -10, form="{:.2f}"),
    "KL": mean_of("losses/approx_kl", -5),
    "clip fraction, first 3": mean_of("losses/clipfrac", 2, 5),  # after the two of the critic alone
    "gradient norm, first 3": mean_of("flow/grad_norm", 2, 5, form="{:.2f}"),
    "KL, first 3": mean_of("losses/approx_kl", 2, 5),
    "KL, first 10": mean_of("losses/approx_kl", 2, 12),
    "value loss": mean_of("losses/value_loss", -10),
    "explained variance": mean_of("losses/explained_variance", -10, form="{:.2f}"),
    "explained variance, first 10": mean_of("losses/explained_variance", 0, 10, form="{:.2f}"),
    "exploration": mean_of("flow/exploration", 2, 3, form="{:.2f}"),
    "s per update": (lambda run: float(np.median(run[1]["time/update"][2:])), "{:.1f}"),
    "episode length": mean_of("charts/episodic_length", -10, form="{:.1f}"),
    "episode length, 10 to 20": mean_of("charts/episodic_length", 10, 20, form="{:.1f}"),
}
REPORTED = {  # of the policy at the start, played as the row's runs play it
    "SFT, ODE": (lambda report: report["results"][0]["success_rate"], PERCENT),
    "SFT, with noise": (lambda report: report["results"][1]["success_rate"], PERCENT),
    "expert's length": (lambda report: np.mean([*report["expert_length"].values()]), "{:.1f}"),
}
CURVES = {  # what a panel draws of the metrics; the ODE's points are those of the evaluations
    "clip fraction": "losses/clipfrac",
    "gradient norm": "flow/grad_norm",
    "KL": "losses/approx_kl",
    "value loss": "losses/value_loss",
    "explained variance": "losses/explained_variance",
    "episode length": "charts/episodic_length",
}

# ------------------------------------------------------------------------------------ running them


@dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]]
    """ablations, or "all"; an unknown name lists them"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of every row"""
    jobs: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    """runs at a time, one torch thread each; the default is the cores"""
    only: Literal["", "show", "tables"] = ""
    """show: print the commands; tables: of the runs that there are"""
    page: Path = Path("docs/results/ablations.md")
    """page with a pair of marks for every ablation; beside it are ablations.json and ablations/"""


ROOT, RUNS = Path(__file__).resolve().parents[1], Path("runs/ablations")


def place(command):
    """The folder of a command's runs: its words."""
    return RUNS / re.sub(r"[^\w.-]+", "_", command.removeprefix("runs/")).replace(".py", "")


def recorded(args):
    """{"runs": {command: {seed: its record}}, "reports": {words: {column: value}}} of earlier calls."""
    file = args.page.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {"runs": {}, "reports": {}}


def record(folder):
    """What is kept of a run: its commit, all measures that it has, and all curves."""
    run, values, curves = (*read_run(folder), folder), {}, {}
    for name, (measure, _) in MEASURES.items():
        with suppress(KeyError):  # GRPO has no critic
            values[name] = round(float(measure(run)), 5)
    for name in ("ODE", *CURVES):
        with suppress(KeyError):
            curves[name] = [[round(float(x), 4) for x in axis] for axis in curve(name, run)]
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    return {"commit": (folder / "commit.txt").read_text().strip(), "values": values, "curves": curves}


def finished(command, seed):
    """The newest finished run of a command and seed, if any; the curve is what a run writes last."""
    runs = place(command).glob(f"tabletop__*__{seed}__*")
    return max((run for run in runs if (run / "learning_curve.png").exists()), default=None)


def report_of(command):
    """The file in which evaluate.py tells of the policy at the start, played as the command's runs play it.

    And the words for evaluate.py.
    """
    words, flags = command.split(), ["--stochastic"]
    for name in (*SAMPLER, "checkpoint"):
        flag = f"--{name.replace('_', '-')}"
        if flag in words:
            value = "True" if name == "noisy_last_step" else words[words.index(flag) + 1]
            flags += ["--checkpoints" if name == "checkpoint" else flag, value]
    file = Path(f"{place(' '.join(['sft', *flags]))}.json")
    return file, ["evaluate.py", *flags, "--json", str(file)]


def needs_report(ablation):
    return any(column in REPORTED for column in ablation.columns)


def trains(ablation):
    return not {*ablation.columns} <= {*REPORTED}


def call(words, log):
    """Runs a script of this repository with one thread. Its output goes into a file."""
    print(f"python {' '.join(words)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=file)
    if process.returncode:
        tell(f"error: {words[0]} ended with code {process.returncode}, see {log}")
    return process.returncode


def play(command, seed):
    """The trained policy with noise too."""
    run = finished(command, seed)
    words = ["evaluate.py", "--stochastic", "--checkpoints", f"{run}/checkpoint"]
    if not run or (run / "noise.json").exists():
        return 0
    return call([*words, "--json", f"{run}/noise.json"], run / "noise.log")


def train(command, seed, with_noise, known):
    kept = known.get(command, {}).get(str(seed))
    if kept and (not with_noise or "with noise" in kept["values"]):
        return 0
    if finished(command, seed):
        return play(command, seed) if with_noise else 0
    folder = place(command)
    words = [*command.split(), "--seed", str(seed), "--run-dir", str(folder), "--resume", "auto"]
    code = call(words, folder / f"{seed}.log")
    if not code:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        (finished(command, seed) / "commit.txt").write_text(commit.stdout)
    return code or (play(command, seed) if with_noise else 0)


def make_horizon_10():
    """The policy that longer chunks start from. No weight depends on the horizon, so a number is changed."""
    if Path(HORIZON_10, "model.safetensors").exists():
        return 0
    shutil.copytree("checkpoints/tiny", TINY_10, dirs_exist_ok=True)
    config = Path(TINY_10, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"horizon": 10}))
    return call(SFT_10.split(), Path(f"{HORIZON_10}.log"))


def run_all(chosen, args, known):
    """Policies, evaluations of SFT, then seed by seed the runs: every row has one before any has two."""
    reports, commands = {}, {}
    for ablation in chosen.values():
        for command in ablation.rows.values():
            if needs_report(ablation):
                reports.update([report_of(command)])
            if trains(ablation):
                commands[command] = commands.get(command, False) or "with noise" in ablation.columns
    if args.only == "show":
        for words in [SFT_10.split(), *reports.values()]:
            print(f"python {' '.join(words)}")
        for command, noisy in commands.items():
            print(f"python {command}  # seeds {args.seeds}{', then evaluate.py --stochastic' * noisy}")
        return
    failed = make_horizon_10() if any(HORIZON_10 in command for command in commands) else 0
    reports = {
        file: words
        for file, words in reports.items()
        if not file.exists() and file.stem not in known["reports"]
    }
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [pool.submit(call, words, Path(f"{file}.log")) for file, words in reports.items()]
        for seed in args.seeds:
            todo += [
                pool.submit(train, command, seed, noisy, known["runs"]) for command, noisy in commands.items()
            ]
        try:
            failed += sum(bool(job.result()) for job in todo)
        except KeyboardInterrupt:  # which the runs have been told too
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        tell(f"{failed} of {len(todo)} commands failed")


# ------------------------------------------------------------------------------------ the results


def cell(samples, form):
    """Mean over the seeds, with an interval of 95 % (Student's t) from three on; of two, both."""
    samples = [x for x in samples if not math.isnan(x)]
    if not samples:
        return "not run"
    mean, low, high = interval(samples)
    if form == PERCENT:  # no rate is below 0 or above 1
        low, high = max(low, 0), min(high, 1)
    spread = f" [{form.format(low)}, {form.format(high)}]"
    if len(samples) < 3:
        spread = f" ({', '.join(map(form.format, samples))})" if len(samples) == 2 else ""
    return form.format(mean) + spread


def table(ablation, args, known):
    """Markdown; the last column says which seeds have finished."""
    seeds_told = ["seeds"] if trains(ablation) else []
    rows = [["", *ablation.columns, *seeds_told]]
    for label, command in ablation.rows.items():
        runs = runs_of(command, args, known)
        report = known["reports"].get(report_of(command)[0].stem, {})
        cells = [label]
        for column in ablation.columns:
            if column in REPORTED:
                told, form = [report.get(column, math.nan)], REPORTED[column][1]
            else:
                told, form = (
                    [run["values"].get(column, math.nan) for run in runs.values()],
                    MEASURES[column][1],
                )
            cells.append(cell(told, form))
        rows.append([*cells, ", ".join(runs) or "none"] if seeds_told else cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def runs_of(command, args, known):
    """{seed: record} of those that are asked for."""
    runs = known["runs"].get(command, {})
    return {str(seed): runs[str(seed)] for seed in args.seeds if str(seed) in runs}


def curve(name, run):
    """Environment steps and values of a panel's curve; other metrics than the ODE's are means of five."""
    if name == "ODE":
        steps, _, values = evaluations(*run[:2])
        return steps, values
    steps, values = run[1]["global_step"], run[1][CURVES[name]]
    return steps[4:], [np.nanmean(values[i - 4 : i + 1]) for i in range(4, len(values))]


def draw(ablation, args, known, path):
    """A panel for each metric: mean and range of a row's seeds."""
    figure = Figure(figsize=(4 * len(ablation.panels), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(ablation.panels)))
    for axes, name in zip(panels, ablation.panels):
        for i, (label, command) in enumerate(ablation.rows.items()):
            curves = [run["curves"][name] for run in runs_of(command, args, known).values()]
            if not all(steps for steps, _ in curves) or not curves:  # not run, or too short
                continue
            begin, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
            grid = np.linspace(begin, end, 100)
            values = np.stack([np.interp(grid, steps, values) for steps, values in curves])
            axes.plot(grid / 1000, values.mean(axis=0), color=f"C{i}", label=label)
            axes.fill_between(
                grid / 1000, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.2, lw=0
            )
        axes.set(title=name, xlabel="environment steps, thousands")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)


def collect(chosen, args, known):
    """Adds what has finished in runs/ablations to the records, and writes them."""
    for ablation in chosen.values():
        for command in ablation.rows.values():
            file, _ = report_of(command)
            if needs_report(ablation) and file.exists():
                report = json.loads(file.read_text())
                told = {name: round(float(measure(report)), 5) for name, (measure, _) in REPORTED.items()}
                known["reports"][file.stem] = told
            for seed in args.seeds if trains(ablation) else ():
                if folder := finished(command, seed):
                    known["runs"].setdefault(command, {})[str(seed)] = record(folder)
    file = args.page.with_suffix(".json")
    text = json.dumps(known, indent=0, sort_keys=True)
    file.with_suffix(".tmp").write_text(
        re.sub(r",\n(?=[-\d])", ", ", text) + "\n"
    )  # a curve's numbers in a line
    file.with_suffix(".tmp").replace(file)


def write_results(chosen, args, known):
    text = args.page.read_text()
    for name, ablation in chosen.items():
        runs = {command: runs_of(command, args, known) for command in ablation.rows.values()}
        commits = sorted({run["commit"] for some in runs.values() for run in some.values()})
        words = {
            label: command if trains(ablation) else " ".join(report_of(command)[1][:-2])  # without --json
            for label, command in ablation.rows.items()
        }
        rows = "\n".join(f"python {command}  # {label}" for label, command in words.items())
        lines = [table(ablation, args, known), f"```text\n{rows}\n```"]
        if ablation.panels and sum(map(bool, runs.values())) > min(1, len(runs) - 1):  # something to compare
            picture = args.page.with_suffix("") / f"{name}.png"
            draw(ablation, args, known, picture)
            lines.insert(1, f"![{ablation.title}]({picture.parent.name}/{picture.name})")
        if commits:
            lines.append(f"Commit {', '.join(commits)}.")
        begin, end = f"<!-- ablation {name} -->", f"<!-- ablation {name} end -->"
        if begin not in text or end not in text:
            fail(f"{args.page} cannot be written: it needs {begin} and {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n" + "\n\n".join(lines) + f"\n\n{end}{rest.split(end)[1]}"
        print(f"\n## {ablation.title}\n\n{lines[0]}")
    args.page.write_text(text)


def main(args):
    if unknown := [name for name in args.names if name not in {*ABLATIONS, "all"}]:
        fail(f"{unknown[0]}: no such ablation; there are {', '.join(ABLATIONS)}, or all")
    os.chdir(ROOT)
    chosen = ABLATIONS if "all" in args.names else {name: ABLATIONS[name] for name in args.names}
    known = recorded(args)
    if args.only != "tables":
        run_all(chosen, args, known)
    if args.only != "show":
        collect(chosen, args, known)
        write_results(chosen, args, known)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
