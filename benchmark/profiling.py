"""Where the time of a Flow-SDE PPO iteration goes: tensor work, the environment, or Python between them.

flow_sde_ppo.main runs twice on the tabletop, on the CPU, without evaluations: once with nothing but a
stopwatch around the environment, once under torch.profiler. The first `--warmup` iterations are not counted;
a counted period begins where an update ends and so holds one whole iteration. (Not called profile.py: a
script of that name would hide the standard library's module from every script in this folder.) Prints three
tables in Markdown: parts of the loop, kinds of work, the ten dearest operators.

    python benchmark/profiling.py    # under two minutes
"""

import contextlib
import csv
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_sde_ppo
from simulators.tabletop import Tabletop


@dataclass
class Args:
    checkpoint: str = flow_sde_ppo.Args.checkpoint
    """policy to start from"""
    num_envs: int = flow_sde_ppo.Args.num_envs
    """parallel environments"""
    num_threads: int = flow_sde_ppo.Args.num_threads
    """CPU threads of torch"""
    iterations: int = 3
    """counted iterations, of each of the two runs"""
    warmup: int = 1
    """iterations before them"""


def stopwatch(function, spent, name):
    """`function`, which adds the seconds it takes to spent[name]."""

    def timed(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - began
        return result

    return timed


@contextlib.contextmanager
def replaced(owner, **attributes):
    """Attributes of a module or class, replaced for a while."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def measure(args, profiler=None):
    """Seconds per iteration of everything that a stopwatch can see, and of what the profiler sees."""
    train = replace(
        flow_sde_ppo.Args(),
        checkpoint=args.checkpoint,
        num_envs=args.num_envs,
        num_threads=args.num_threads,
        device="cpu",
        eval_freq=0,
        critic_warmup=0,
        save_model=False,
    )
    iterations = args.warmup + args.iterations
    train.total_timesteps = iterations * train.num_envs * train.num_steps * train.chunk_len
    spent, result, calls = dict.fromkeys(("step_chunk", "render"), 0.0), {}, 0
    update = flow_sde_ppo.update

    def counted_update(*a, **k):
        nonlocal calls
        metrics, calls = update(*a, **k), calls + 1
        if calls == args.warmup:
            spent.update(dict.fromkeys(spent, 0.0))
            if profiler:
                profiler.start()
            result["wall"], result["cpu"] = -time.perf_counter(), -time.process_time()
        if calls == iterations:
            result["wall"] += time.perf_counter()
            result["cpu"] += time.process_time()
            result.update(spent)  # main may still touch the environment afterwards
            if profiler:
                profiler.stop()
        return metrics

    with (
        tempfile.TemporaryDirectory() as folder,
        replaced(flow_sde_ppo, update=counted_update, evaluate=lambda *a, **k: {"success": np.zeros(1)}),
        replaced(Tabletop, render=stopwatch(Tabletop.render, spent, "render")),
        replaced(Tabletop, step_chunk=stopwatch(Tabletop.step_chunk, spent, "step_chunk")),
        contextlib.redirect_stdout(sys.stderr),
    ):
        flow_sde_ppo.main(replace(train, run_dir=folder))
        (run,) = Path(folder).iterdir()
        with open(run / "metrics.csv") as file:
            rows = list(csv.DictReader(file))[args.warmup : iterations]
    result |= {
        part: sum(float(row[f"time/{part}"]) for row in rows) for part in ("rollout", "encode", "update")
    }
    steps = train.num_envs * train.num_steps * train.chunk_len
    return {name: seconds / args.iterations for name, seconds in result.items()}, steps


def tensor_work(profiler, iterations):
    """Seconds per iteration inside operators and in the autograd engine, and the ten dearest operators."""
    events = [
        (e.key, e.self_cpu_time_total / 1e6 / iterations, e.count // iterations)
        for e in profiler.key_averages()
    ]
    operators = sorted((e for e in events if e[0].startswith("aten::")), key=lambda e: -e[1])
    engine = [e for e in events if "autograd::" in e[0] or e[0].endswith(("Backward0", "Backward1"))]
    return sum(e[1] for e in operators), sum(e[1] for e in engine), operators[:10]


def markdown(head, rows, total):
    """Rows (name, seconds) with their share of the total."""
    lines = [f"| {head} | seconds | share |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.3f} | {seconds / total:.1%} |" for name, seconds in rows]
    return "\n".join([*lines, f"| **one iteration** | **{total:.3f}** | 100% |"])


def main(args):
    if args.iterations < 1 or args.warmup < 1:
        flow_sde_ppo.fail("--iterations and --warmup must be at least 1")
    plain, steps = measure(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    profiler = profile(activities=[ProfilerActivity.CPU])
    seen, _ = measure(args, profiler)
    operators, engine, dearest = tensor_work(profiler, args.iterations)

    timed = [(part, plain[part]) for part in ("rollout", "encode", "update")]
    timed[0] = "rollout, without encoding", plain["rollout"]
    rest = plain["wall"] - sum(seconds for _, seconds in timed)
    print(f"\n{markdown('part of the loop', [*timed, ('logging and the rest', rest)], plain['wall'])}\n")
    print(
        f"At most {steps} environment steps an iteration, {args.iterations} iterations, "
        f"{plain['wall']:.2f} s wall and {plain['cpu']:.2f} s CPU time each. The environment takes "
        f"{plain['step_chunk'] / plain['wall']:.1%}.\n"
    )
    render = seen["render"]
    kinds = [
        ("tensor operators (aten, forward and backward)", operators),
        ("autograd engine around them", engine),
        ("environment: stepping (NumPy)", seen["step_chunk"] - render),
        ("environment: rendering (NumPy)", render),
    ]
    kinds.append(("rest: Python, logging, the profiler itself", seen["wall"] - sum(k[1] for k in kinds)))
    print(f"{markdown('under torch.profiler', kinds, seen['wall'])}\n")
    print("| operator | seconds | calls |\n|---|---|---|")
    for name, seconds, count in dearest:
        print(f"| `{name}` | {seconds:.3f} | {count} |")
    print(
        f"\n{args.num_envs} environments, {args.num_threads} torch thread(s) of {os.cpu_count()} cores, "
        f"{platform.machine()}, torch {torch.__version__}. Peak memory of the process: {peak:.2f} GiB, "
        f"before torch.profiler."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
