"""What a run leaves behind, and goes on from: a folder {run_dir}/{env_id}__{exp_name}__{seed}__{time}.

    args.json            its flags
    metrics.csv          a row per iteration; the same numbers are in TensorBoard's events, and in wandb's
    checkpoint/          the policy, by `save_policy`
    resume/              the last two moments between two iterations, a file for each rank
    learning_curve.png   written last: success in training and by the ODE

Of several ranks the first one writes, and each its own file of resume/. Everything is written aside and then
renamed. A signal (Ctrl-C, SIGTERM) lets every rank finish its chunk; the iteration is given up, and what was
there before it is saved, so that a resumed run is, number for number, the one that was not interrupted.
"""

import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flags import as_command, fail, launcher, tell
from pi_models import save_policy
from ranks import gather


class Run:
    def __init__(self, script: str, args, rank: int, ranks: int):
        name, second = f"{args.env_id}__{args.exp_name}__{args.seed}__", int(time.time())
        while os.path.exists(os.path.join(args.run_dir, f"{name}{second}")):  # a run of the same second
            second += 1
        self.folder = args.resume or os.path.join(args.run_dir, f"{name}{gather(second)[0]}")
        self.args, self.script = dataclasses.replace(args, resume=""), os.path.basename(script)
        self.name, self.rank, self.first = os.path.basename(self.folder), rank, rank == 0
        self.mine = f"rank{rank}of{ranks}.safetensors"  # this rank's files of resume/
        self.curve, self.evaluations = [], []  # (steps, success): of training's episodes, by the ODE
        self.signal, self.here, self.resumed = 0, None, bool(args.resume)
        self.saved = self._newest(ranks) if args.resume else {"iteration": 0, "global_step": 0}
        steps, curve = self.saved["global_step"], Path(self.folder, "learning_curve.png")
        if steps >= args.total_timesteps and curve.exists():  # or it was killed before it had drawn it
            fail(f"{self.folder} has its {steps} steps; with a larger --total-timesteps it goes on")
        signals = signal.SIGINT, signal.SIGTERM
        self.handlers = {number: signal.signal(number, self._ask_to_stop) for number in signals}
        if not self.first:
            return
        self.wandb = self._track() if args.track else None
        self._open()
        print(as_command(self.script, args))
        begin = self.saved["global_step"]
        self.progress = tqdm(total=args.total_timesteps, initial=begin, unit="step", unit_scale=True)

    def _track(self):
        """The run of Weights & Biases; a resumed one has the same."""
        import wandb

        same = {"id": re.sub("[:;,#?/']", "-", self.name), "resume": "allow", "allow_val_change": True}
        told = {"name": self.name, "config": dataclasses.asdict(self.args)}
        try:
            return wandb.init(project=os.environ.get("WANDB_PROJECT", "piRL"), **told, **same)
        except wandb.Error as error:
            what = f"{str(error).strip().splitlines()[0]} (`wandb login`, or WANDB_MODE=offline)"
            fail(f"--track: {what}", code=2 if isinstance(error, wandb.errors.UsageError) else 1)

    def _open(self):
        try:
            os.makedirs(f"{self.folder}/resume", exist_ok=self.resumed)
            with open(f"{self.folder}/args.json.tmp", "w") as file:
                print(json.dumps(dataclasses.asdict(self.args), indent=1), file=file)
            os.replace(f"{self.folder}/args.json.tmp", f"{self.folder}/args.json")
            rows, table = [], Path(self.folder, "metrics.csv")
            if self.resumed and self.saved["iteration"]:  # what came after the saved moment comes again
                head, *rows = csv.reader(table.read_text().splitlines())
                rows = [head] + [row for row in rows if int(row[0]) <= self.saved["iteration"]]
                column = head.index("charts/success_once")
                self.curve = [(int(row[1]), float(row[column])) for row in rows[1:]]
                self.evaluations = [tuple(pair) for pair in self.saved["evaluations"]]
            with open(f"{table}.tmp", "w") as file:
                csv.writer(file).writerows(rows)
            os.replace(f"{table}.tmp", table)
            self.file = open(table, "a", buffering=1)
            self.writer = SummaryWriter(self.folder, purge_step=self.saved["global_step"] + 1)
        except OSError as error:
            fail(f"--run-dir: {self.folder} cannot be written: {error.strerror}")
        except ValueError:
            fail(f"{table} is not what the run wrote")
        self.table = csv.writer(self.file)
        # a full disk is told below, in one line; not by TensorBoard's thread too
        threading.excepthook = lambda told: (
            issubclass(told.exc_type, OSError) or sys.__excepthook__(*told[:3])
        )

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, RuntimeError) as error:  # also a policy that is not finite
            fail(f"{self.folder} cannot be written ({error}); what was saved there before is whole", code=1)

    # -- to be resumed

    def _ask_to_stop(self, number, frame):
        if self.signal and time.monotonic() - self.asked > 1:  # torchrun passes on what came from a terminal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal, self.asked = number, time.monotonic()
        then = "finishing a chunk, then saving" if self.args.save_model else "finishing a chunk"
        tell(f"{signal.Signals(number).name}: {then}; once more ends at once")

    def remember(self, envs, generators, **counters):
        """This moment between two iterations, without the weights: the rollout does not change them."""
        self.here = counters | {"evaluations": list(self.evaluations), "envs": {}}, {}
        for name, value in envs.get_state().items():
            if hasattr(value, "dtype"):
                self.here[1][f"envs.{name}"] = torch.from_numpy(value.copy())
            else:
                self.here[0]["envs"][name] = value
        for i, generator in enumerate(generators):
            self.here[1][f"generators.{i}"] = generator.get_state()

    def save(self, policy, optimizer):
        """The policy, and what `restore` needs: the remembered moment, what is trained, the optimiser."""
        if not self.args.save_model:
            return
        counters, tensors = self.here
        if self.first:
            tensors |= {f"policy.{name}": p for name, p in policy.named_parameters() if p.requires_grad}
            for i, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
        with self._writing():
            write_state(
                Path(self.folder, "resume", f"{counters['iteration']:07}.{self.mine}"), counters, tensors
            )
            for old in sorted(Path(self.folder, "resume").glob(f"*.{self.mine}"))[:-2]:
                old.unlink()
            if self.first:
                os.fsync(self.file.fileno())
                self.writer.flush()
                how = f"From {self.args.checkpoint}, {counters['global_step']} steps, see args.json."
                card = f"# {self.name}\n\n{how}\n"
                save_policy(policy, f"{self.folder}/checkpoint", card, dataclasses.asdict(self.args))

    def _newest(self, ranks):
        """The newest moment of which every rank's file is there and whole: its counters."""
        folder = Path(self.folder, "resume")
        for first in sorted(folder.glob(f"*.rank0of{ranks}.safetensors"), reverse=True):
            files = [first.with_name(first.name.replace("rank0", f"rank{rank}")) for rank in range(ranks)]
            try:
                counters, self.tensors = read_state(files[0])
                mine, own = read_state(files[self.rank])
                self.tensors |= own
            except (OSError, ValueError) as error:
                whole, told = False, f"{first.name} is not whole ({error}), the one before it is taken"
            else:
                whole, told = True, ""
            if all(gather(whole)):
                return counters | {"envs": mine["envs"]}
            if told:
                tell(f"{self.folder}: {told}")
        others = {path.name.split("of")[-1].split(".")[0] for path in folder.glob("*.rank0of*")} - {
            str(ranks)
        }
        why = f"was saved by {' or '.join(others)} ranks" if others else "has nothing saved that is whole"
        fail(f"--resume: {self.folder} {why}")

    def restore(self, policy, optimizer, envs, generators):
        """What `save` saved, into all of these. Returns the present observation."""
        moments, trained = {}, {name: p for name, p in policy.named_parameters() if p.requires_grad}
        parts = {"policy": {}, "optimizer": {}, "envs": {}, "generators": {}}
        for key, tensor in self.tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        shapes = [{name: p.shape for name, p in some.items()} for some in (parts["policy"], trained)]
        if shapes[0] != shapes[1]:
            fail(f"{self.folder} was trained from another policy than {self.args.checkpoint}")
        for name, p in trained.items():
            p.data.copy_(parts["policy"][name])
        for key, tensor in parts["optimizer"].items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for i, generator in enumerate(generators):
            generator.set_state(parts["generators"][str(i)])
        del self.tensors
        arrays = {name: tensor.numpy() for name, tensor in parts["envs"].items()}
        return envs.set_state(self.saved["envs"] | arrays)

    def stop(self, number):
        """The end, after a signal."""
        if self.first:
            self.progress.close()
            command = shlex.join([*launcher(), self.script, "--resume", self.folder])
            print(f"go on with: {command}" if self.args.save_model else "nothing was saved (--no-save-model)")
        sys.exit(128 + number)

    # -- logs

    def log(self, iteration: int, global_step: int, metrics: dict[str, float]):
        if not self.first:
            return
        with self._writing():
            if iteration == 1:
                self.table.writerow(["iteration", "global_step", *metrics])
            self.table.writerow([iteration, global_step, *metrics.values()])
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, global_step)
        if self.wandb:
            self.wandb.log(metrics, step=global_step)
        success, by_ode = metrics["charts/success_once"], metrics["eval/success_rate"]
        self.curve.append((global_step, success))
        self.progress.set_postfix_str(f"it {iteration}, success {success:.3f}, eval {by_ode:.3f}")
        self.progress.update(global_step - self.progress.n)

    def close(self, title: str):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if not self.first:
            return
        with self._writing():
            for open_one in (self.progress, self.writer, self.file):
                open_one.close()
        axes = Figure(figsize=(7, 4)).subplots()
        axes.plot(*zip(*self.curve), alpha=0.5, lw=1, label="training episodes (with exploration noise)")
        if self.evaluations:
            by_ode = {"label": "evaluation (ODE, fixed states)", "color": "C0", "ms": 4}
            axes.plot(*zip(*self.evaluations), "o-", **by_ode)
        if self.wandb:
            self.wandb.finish()
        title = f"{title} on {self.args.env_id}, seed {self.args.seed}"
        axes.set(xlabel="environment steps", ylabel="success rate", ylim=(0, 1), title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        with self._writing():
            axes.figure.savefig(f"{self.folder}/learning_curve.png", dpi=120, bbox_inches="tight")
        if self.evaluations:
            (_, before), *_, (_, after) = self.evaluations
            print(f"success {before:.3f} -> {after:.3f} (ODE, fixed states)")
        print(f"results in {self.folder}")


def write_state(path, counters, tensors):
    """Tensors and numbers in one safetensors file that is there whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {"counters": json.dumps(counters), "checksum": checksum(tensors)}
    temporary = f"{path}.tmp"
    try:
        save_file(tensors, temporary, told)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_state(path):
    try:
        with safe_open(path, "pt") as file:
            tensors, told = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if told["checksum"] != checksum(tensors):
        raise ValueError("its checksum is another")
    return json.loads(told["counters"]), tensors


def checksum(tensors):
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(
            tensors[name].flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), total)
        )
    return str(total)


def refuse_step(agent) -> bool:
    """Is a gradient not finite? Then the optimiser leaves it out, and after three in a row the run ends."""
    learn = [(name, p.grad) for name, p in agent.policy.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in learn if not gradient.isfinite().all()]
    agent.refused, agent.refused_in_a_row = (
        agent.refused + bool(bad),
        agent.refused_in_a_row + 1 if bad else 0,
    )
    if agent.refused_in_a_row == 3:
        which = f"{', '.join(bad[:3])}{f' and {len(bad) - 3} more' if bad[3:] else ''}"
        fail(f"the gradient was not finite in three optimiser steps in a row: {which}", code=1)
    return bool(bad)
