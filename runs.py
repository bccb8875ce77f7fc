"""What a run leaves behind: a folder {run_dir}/{env_id}__{exp_name}__{seed}__{time}.

    args.json            its flags
    metrics.csv          a row per iteration; the same numbers are in TensorBoard's events, and in wandb's
    checkpoint/          the policy, by `save_policy`
    learning_curve.png   written last: success in training and by the ODE

Of several ranks the first one writes.
"""

import csv
import json
import os
import time
from dataclasses import asdict

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flags import as_command, fail
from ranks import gather


class Run:
    def __init__(self, script: str, args, rank: int):
        self.args, self.first = args, rank == 0
        self.name = f"{args.env_id}__{args.exp_name}__{args.seed}__{gather(int(time.time()))[0]}"
        self.folder = os.path.join(args.run_dir, self.name)
        self.curve, self.evaluations = [], []  # (steps, success): of training's episodes, by the ODE
        if not self.first:
            return
        try:
            os.makedirs(self.folder)
            with open(f"{self.folder}/args.json", "w") as file:
                print(json.dumps(asdict(args), indent=1), file=file)
        except OSError as error:
            fail(f"--run-dir {args.run_dir} cannot be written: {error.strerror}")
        if args.track:
            import wandb

            os.environ.setdefault("WANDB_PROJECT", "piRL")
            wandb.init(name=self.name, config=asdict(args), sync_tensorboard=True)
        self.writer = SummaryWriter(self.folder)
        self.file = open(f"{self.folder}/metrics.csv", "w", buffering=1)
        self.table = csv.writer(self.file)
        print(as_command(os.path.basename(script), args))
        self.progress = tqdm(total=args.total_timesteps, unit="step", unit_scale=True)

    def log(self, iteration: int, global_step: int, metrics: dict[str, float]):
        if not self.first:
            return
        if iteration == 1:
            self.table.writerow(["iteration", "global_step", *metrics])
        self.table.writerow([iteration, global_step, *metrics.values()])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, global_step)
        success, by_ode = metrics["charts/success_once"], metrics["eval/success_rate"]
        self.curve.append((global_step, success))
        self.progress.set_postfix_str(f"it {iteration}, success {success:.3f}, eval {by_ode:.3f}")
        self.progress.update(global_step - self.progress.n)

    def close(self, title: str):
        if not self.first:
            return
        for open_one in (self.progress, self.writer, self.file):
            open_one.close()
        axes = Figure(figsize=(7, 4)).subplots()
        axes.plot(*zip(*self.curve), alpha=0.5, lw=1, label="training episodes (with exploration noise)")
        if self.evaluations:
            by_ode = {"label": "evaluation (ODE, fixed states)", "color": "C0", "ms": 4}
            axes.plot(*zip(*self.evaluations), "o-", **by_ode)
        title = f"{title} on {self.args.env_id}, seed {self.args.seed}"
        axes.set(xlabel="environment steps", ylabel="success rate", ylim=(0, 1), title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        axes.figure.savefig(f"{self.folder}/learning_curve.png", dpi=120, bbox_inches="tight")
        if self.evaluations:
            print(
                f"success {self.evaluations[0][1]:.3f} -> {self.evaluations[-1][1]:.3f} (ODE, fixed states)"
            )
        print(f"results in {self.folder}")
