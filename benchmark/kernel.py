"""Runs the queue benchmark/kernel.txt, and notes every finished run as a line of docs/log.md.

A line of the queue is COMMIT SCRIPT SEED STEPS FLAGS...; a run's code is that commit's. The first line that
nobody has begun is next, so the queue may grow while it is worked on, and what is finished is not run again.

    python benchmark/kernel.py &    # one worker; two of them share the queue
"""

import csv
import fcntl
import glob
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS, QUEUE, LOG = f"{ROOT}/runs/kernel", f"{ROOT}/benchmark/kernel.txt", f"{ROOT}/docs/log.md"
PYTHON = f"{ROOT}/.venv/bin/python"


def claim():
    """The first line of the queue that no worker has begun, and a folder for it, or nothing."""
    for line in open(QUEUE):
        line = " ".join(line.split("#")[0].split())
        folder = f"{RUNS}/{line.replace(' ', '_').replace('/', '-')}"
        if line and not os.path.isdir(folder):
            try:
                os.mkdir(folder)
                return line, folder
            except FileExistsError:
                continue
    return None


def source(commit):
    """The code of a commit, in a folder of its own."""
    folder = f"{RUNS}/code-{commit}"
    with open(f"{RUNS}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(folder):
            os.mkdir(folder)
            subprocess.run(f"git -C {ROOT} archive {commit} | tar -x -C {folder}", shell=True, check=True)
    return folder


def play(line, folder):
    commit, script, seed, steps, *flags = line.split()
    code, began = source(commit), time.time()
    flags = [flag.replace("@", f"{ROOT}/") for flag in flags]
    command = [PYTHON, f"{script}.py", "--seed", seed, "--total-timesteps", steps, "--run-dir", folder]
    if "--eval-freq" not in flags:
        command += ["--eval-freq", "-1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}/log", "w") as log:
        subprocess.run([*command, *flags], cwd=code, env=environment, stdout=log, stderr=log, check=True)
        minutes = (time.time() - began) / 60
        run = os.path.dirname(glob.glob(f"{folder}/*/metrics.csv")[0])
        evaluation = [PYTHON, "evaluate.py", "--checkpoints", f"{run}/checkpoint", "--seeds", "0", "1", "2"]
        evaluation += ["--json", f"{folder}/ode.json"]
        k = flags[flags.index("--denoise-steps") + 1] if "--denoise-steps" in flags else "4"
        evaluation += ["--denoise-steps", k]
        subprocess.run(evaluation, cwd=code, env=environment, stdout=log, stderr=log, check=True)
    ode = json.load(open(f"{folder}/ode.json"))["results"][0]
    rows = list(csv.DictReader(open(f"{run}/metrics.csv")))
    noisy = sum(float(row["charts/success_once"]) for row in rows[-5:]) / 5
    kl = sum(float(row["losses/approx_kl"]) for row in rows[-5:]) / 5
    half = next((row for row in rows if int(row["global_step"]) >= int(steps) / 2), rows[-1])
    text = time.strftime("%Y-%m-%d %H:%M")
    return (
        f"| {text} | {commit} | {script} | {seed} | {int(steps) // 1000}k | {' '.join(flags) or '-'} "
        f"| {float(half['charts/success_once']):.1%} | {noisy:.1%} | **{ode['success_rate']:.1%}** "
        f"| {kl:.3f} | {minutes:.1f} |"
    )


os.makedirs(RUNS, exist_ok=True)
while True:
    found = claim()
    if not found:
        time.sleep(5)
        continue
    try:
        text = play(*found)
    except Exception as error:
        text = f"| {time.strftime('%Y-%m-%d %H:%M')} | {found[0]} | failed: {type(error).__name__} |"
        print(text, file=sys.stderr)
    with open(LOG, "a") as log:
        print(text, file=log)
