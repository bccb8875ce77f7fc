"""RL on a policy of full size with random weights: how long it takes, and how much memory, where you are.

Whoever doubts the small numbers can run the real size, also without a GPU: `main` of a script itself, two
environments of LIBERO-Goal, two iterations on a few chunks. The weights are made in memory, and what is not
fit by them is left: prompts are read by words, as PaliGemma's tokenizer is not ours to ship.

    python benchmark/full_size.py                                        # pi0, Flow-SDE; minutes, 12 GiB
    python benchmark/full_size.py --model pi05 --script flow_noise_ppo
"""

import csv
import importlib
import resource
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import memory

from flow_sft import word_tokenizer
from layouts import parameters_on_meta
from pi_models import PiConfig, Policy

GIB = 2**30


@dataclass
class Args:
    model: Literal["pi0", "pi05"] = "pi0"
    script: Literal["flow_sde_ppo", "flow_noise_ppo", "flow_sde_grpo"] = "flow_sde_ppo"
    num_threads: int = 2
    """CPU threads of torch"""


def random_policy(config):
    """The VLM in bf16, what is trained in fp32, as from a public checkpoint; LIBERO's robot."""
    sizes, unit = {"state": 8, "actions": 7}, {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    with parameters_on_meta():
        policy = Policy(config, {key: {s: [x] * n for s, x in unit.items()} for key, n in sizes.items()})
    for key, parameter in list(policy.named_parameters()):
        module, _, name = key.rpartition(".")
        tensor = torch.empty(
            parameter.shape, dtype=torch.float32 if parameter.requires_grad else torch.bfloat16
        )
        if tensor.dim() > 1:
            tensor.uniform_(-1, 1).mul_(tensor[0].numel() ** -0.5)
        else:  # biases, and Gemma's norms, which add one; SigLIP's do not
            tensor.fill_("vision" in key and "norm" in key and name == "weight")
        setattr(policy.get_submodule(module), name, nn.Parameter(tensor, parameter.requires_grad))
    policy.tokenizer_json = word_tokenizer(["put the bowl on the plate"])
    return policy.eval()


def main(args):
    script = importlib.import_module(args.script)
    sizes = {"pi0": PiConfig(), "pi05": PiConfig("pi05", horizon=10, max_token_len=200)}
    policy = random_policy(replace(sizes[args.model], tokenizer="words"))
    script.load_policy = lambda *_: policy
    small = {"num_envs": 2, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1, "micro_batch_size": 1}
    small |= {"eval_freq": -1, "save_model": False, "total_timesteps": 1, "num_threads": args.num_threads}
    if args.script == "flow_sde_grpo":  # whole episodes, in few chunks
        horizon = policy.config.horizon
        small |= {"group_size": 2, "chunk_len": horizon, "num_steps": -(-320 // horizon)}
    else:
        small |= {"critic_warmup": 0}
    with tempfile.TemporaryDirectory() as folder:
        flags = script.defaults("libero_goal", args.model)
        flags = replace(flags, env_id="libero_goal", run_dir=folder, **small)
        script.main(flags)
        (table,) = Path(folder).glob("*/metrics.csv")
        row = list(csv.DictReader(table.open()))[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    chunks, K = flags.num_envs * flags.num_steps, flags.denoise_steps
    asked = memory.Args(chunks=chunks, micro_batch_size=1, denoise_steps=K)
    parts, _ = memory.measure(policy.config, asked)
    *both, once, often = parts.values()
    predicted = (sum(both) + (often if args.script == "flow_noise_ppo" else once)) / GIB
    encode, rollout, update = (
        float(row[f"time/{name}"]) / chunks for name in ("encode", "rollout", "update")
    )
    print(
        "\n| seconds | encode an observation | denoise a chunk, step | update a chunk | peak GiB | computed |"
    )
    print("|---|---|---|---|---|---|")
    print(f"| {args.model}, {args.script}, K = {K} | {encode:.1f} | {rollout:.1f} | {update:.1f} |", end="")
    print(f" {peak:.1f} | {predicted:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
