"""RL on a policy of full size with random weights, by a script's own `main`: seconds and peak memory.

Whoever doubts the small numbers can run the real size, also without a GPU: 3.24 billion parameters, the VLM
in bf16, two environments, one iteration of very few chunks. The weights are random and made in memory, so
nothing is learned that is worth anything. What is seen is that it runs, how long, and in how much memory.
PaliGemma's and Qwen's tokenizers are not ours to ship, so prompts are read by the words of checkpoints/tiny.

Seconds on a CPU are of the process, all threads together, so that other work on the machine counts little.
Without bf16 instructions torch's bf16 products are slow on a CPU. Then they are computed in fp32, one at a
time, from the same bf16 numbers; the output says so.

    python benchmark/full_size.py                                        # pi0, Flow-SDE PPO; minutes, 12 GiB
    python benchmark/full_size.py --model pi05 --script flow_noise_ppo
    python benchmark/full_size.py --env-id libero_goal                   # two cameras; needs LIBERO
"""

import csv
import importlib
import math
import os
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import memory

import gr00t_models
import pi_models
from gr00t_models import GrootConfig
from layouts import parameters_on_meta
from pi_models import CHECKPOINTS, PiConfig
from simulators.libero import LIBERO_STEPS
from simulators.tabletop import Tabletop

GIB = 2**30
CONFIGS = {
    "pi0": PiConfig(tokenizer="words"),
    "pi05": PiConfig("pi05", horizon=10, max_token_len=200, tokenizer="words"),
    "gr00t": GrootConfig(tokenizer="words"),
}
TINY = {"pi0": pi_models.TINY, "pi05": replace(pi_models.TINY, variant="pi05"), "gr00t": gr00t_models.TINY}
ROBOTS = {"tabletop": (4, 3), "libero_goal": (8, 7)}  # numbers of state and of action
CAMERAS = {"tabletop": 1, "libero_goal": 2}


@dataclass
class Args:
    model: Literal["pi0", "pi05", "gr00t"] = "pi0"
    script: Literal["flow_sde_ppo", "flow_noise_ppo", "flow_sde_grpo"] = "flow_sde_ppo"
    env_id: Literal["tabletop", "libero_goal"] = "tabletop"
    """tabletop: one camera, nothing to install; libero_goal: two"""
    size: Literal["full", "tiny"] = "full"
    """tiny: to try this script"""
    num_steps: int = 1
    """chunks of each of the two environments; GRPO takes as many as an episode needs"""
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = 1
    """CPU threads of torch"""


class Fp32Products(TorchDispatchMode):
    """Products of bf16 matrices computed in fp32, which a CPU without bf16 instructions does much faster."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        aten = torch.ops.aten
        product = op in (aten.mm.default, aten.addmm.default, aten.bmm.default)
        if not product or args[-1].dtype != torch.bfloat16:
            return op(*args, **(kwargs or {}))
        return op(*(tensor.float() for tensor in args)).bfloat16()


def products(device):
    """The mode to run in where it pays, or none."""
    slow = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Fp32Products() if slow else nullcontext()


def random_policy(config, device="cpu", vlm_dtype=torch.bfloat16):
    """What is trained is in fp32, and the VLM is in bf16, as from a public checkpoint."""
    family = gr00t_models if config.variant == "gr00t" else pi_models
    with parameters_on_meta():
        policy = family.Policy(config)
    torch.manual_seed(0)
    for key, parameter in list(policy.named_parameters()):
        module, _, name = key.rpartition(".")
        dtype = torch.float32 if parameter.requires_grad else vlm_dtype
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if tensor.dim() > 1:  # outputs as large as inputs
            bound = (3 / tensor[0].numel()) ** 0.5
            first, *others = tensor.view(-1).split(2**22)
            first.uniform_(-bound, bound)
            for part in others:  # the same again: drawing 3 billion numbers takes minutes
                part.copy_(first[: len(part)])
        else:  # Gemma's norms add one to their weight, others do not
            gemma = config.variant != "gr00t" and ("language_model" in key or "expert" in key)
            tensor.fill_(float("norm" in key and name == "weight" and not gemma))
        setattr(policy.get_submodule(module), name, torch.nn.Parameter(tensor, parameter.requires_grad))
    tokenizer = CHECKPOINTS / ("tiny-gr00t" if config.variant == "gr00t" else "tiny") / "tokenizer.json"
    policy.tokenizer_json = tokenizer.read_text()
    return policy.to(device).eval()


def record(owner, name, clock):
    """The list to which every call of `owner.name` from now on adds its seconds."""
    real, seconds = getattr(owner, name), []

    def timed(*args, **kwargs):
        began = clock()
        result = real(*args, **kwargs)
        seconds.append(clock() - began)
        return result

    setattr(owner, name, timed)
    return seconds


def main(args):
    script = importlib.import_module(args.script)
    config = (CONFIGS if args.size == "full" else TINY)[args.model]
    policy = random_policy(config, args.device)
    policy.fit_robot(*ROBOTS[args.env_id])
    flags = script.defaults("libero_goal", args.model)  # the paper's
    small = {"env_id": args.env_id, "device": args.device, "num_threads": args.num_threads}
    small |= {"num_envs": 2, "num_steps": args.num_steps, "num_minibatches": 1, "update_epochs": 1}
    small |= {"micro_batch_size": 1, "eval_freq": -1, "save_model": False, "total_timesteps": 1}
    if args.script == "flow_sde_grpo":  # whole episodes, in few chunks
        Tabletop.max_episode_steps = horizon = config.horizon
        steps = {"tabletop": horizon, "libero_goal": LIBERO_STEPS["libero_goal"][0]}[args.env_id]
        small |= {"group_size": 2, "chunk_len": horizon, "num_steps": math.ceil(steps / horizon)}
    else:
        small |= {"critic_warmup": 0}
        policy.need_value_head(flags.critic, flags.critic_layers)
        torch.nn.init.normal_(policy.value_head.mlp[-1].weight)  # a new one is zero: all chunks equally good
    if flags.noise == "learned":
        policy.need_noise_head(flags.noise_std_min, flags.noise_std_max)
    flags = replace(flags, **small)
    clock = time.process_time if args.device == "cpu" else lambda: script.now(policy.device)
    encode, act = (record(script.Agent, name, clock) for name in ("encode", "act"))
    update = record(script, "update", clock)
    script.load_policy = lambda *_: policy
    mode = products(args.device)
    with tempfile.TemporaryDirectory() as folder, mode:
        script.main(replace(flags, run_dir=folder))
        (table,) = Path(folder).glob("*/metrics.csv")
        row = list(csv.DictReader(table.open()))[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()

    chunks, K = 2 * flags.num_steps, flags.denoise_steps
    asked = memory.Args(chunks, 1, K, CAMERAS[args.env_id], policy.token_len)
    *parts, once, often = memory.measure(config, asked)[0].values()
    computed = sum(parts) + (often if args.script == "flow_noise_ppo" else once)
    seconds = median(encode) / 2, median(act) / 2, median(update) / chunks  # two environments at a time
    print("\n| model | script | encode an observation | denoise a chunk | update a chunk | peak | computed |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {args.model} | {args.script} | {' | '.join(f'{x:.1f} s' for x in seconds)} "
        f"| {peak / GIB:.1f} GiB | {computed / GIB:.1f} GiB |"
    )
    count = sum(p.numel() for p in policy.parameters())
    print(
        f"\n{count / 1e9:.2f} billion parameters with heads, {args.env_id}, K = {K}, {chunks} chunks, "
        f"gradient {float(row['flow/grad_norm']):.3g}; {args.device}, {args.num_threads} thread(s) "
        f"of {os.cpu_count()} cores, torch {torch.__version__}, products of bf16 matrices in "
        f"{'bf16' if isinstance(mode, nullcontext) else 'fp32'}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
