"""What an update costs: hybrid and full two-layer MDP of Flow-SDE, one-layer MDP of Flow-Noise, GRPO.

Each script's own `update`, one epoch on the same chunks of the tabletop, in turn, in one process, so that the
ratios hold even where the seconds do not. The paper's Fig. 8: hybrid takes half of two-layer and one-layer.

    python benchmark/update_time.py    # a minute; prints Markdown
"""

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
from envs import make_envs
from pi_models import Prefixes, load_policy


@dataclass
class Args:
    checkpoint: str = flow_sde_ppo.Args.checkpoint
    """policy to update"""
    device: str = "cpu"
    """cpu or cuda"""
    num_threads: int = 1
    """CPU threads of torch"""
    chunks: int = 1024
    """action chunks in an epoch"""
    rounds: int = 5
    """epochs of each; medians are printed"""


def prepare(script, args, prefix, **changed):
    """A function that runs one epoch of the script's update on chunks that it sampled itself."""
    flags = script.Args(update_epochs=1, num_minibatches=1, **changed)
    policy = load_policy(args.checkpoint, args.device)
    parameters = [policy.actor_parameters()]
    if script is not flow_sde_grpo:
        policy.need_value_head("vlm", 4)
        parameters.append(list(policy.value_head.parameters()))
    if flags.noise == "learned":
        policy.need_noise_head(flags.noise_std_min, flags.noise_std_max)
        parameters[0] = policy.actor_parameters()
    agent = script.Agent(policy, flags)
    generator = torch.Generator(args.device).manual_seed(0)
    chain, denoise_idx, logprob, features = agent.act(prefix, generator)
    prefixes = Prefixes(policy, 1, len(prefix.mask), prefix, {})
    prefixes.put(0, prefix, {})
    rest = {name: torch.randn_like(logprob)[None] for name in ("advantages", "returns", "value")}
    batch = SimpleNamespace(
        prefixes=prefixes,
        chain=chain[None],
        denoise_idx=denoise_idx[None],
        logprob=logprob[None],
        features=features[None],
        alive=torch.ones_like(logprob[None, :, 0], dtype=torch.bool),
        **rest,
    )
    optimizer = torch.optim.AdamW([{"params": group} for group in parameters], lr=1e-6)
    return lambda: script.update(agent, optimizer, batch, flags, generator)


@torch.no_grad()
def observe(args):
    """Encoded observations, as many as chunks."""
    policy = load_policy(args.checkpoint, args.device)
    envs = make_envs("tabletop", args.chunks, 0)
    policy.fit_prompts(envs.prompts)
    policy.need_value_head("vlm", 4)  # which reads the VLM's output
    return policy.encode(policy.preprocess(envs.reset()[0]))


def main(args):
    torch.set_num_threads(args.num_threads)
    prefix = observe(args)
    updates = {
        "Flow-SDE PPO, hybrid": prepare(flow_sde_ppo, args, prefix, mdp="hybrid"),
        "Flow-SDE PPO, two-layer": prepare(flow_sde_ppo, args, prefix, noisy_last_step=True),
        "Flow-SDE PPO, all steps but the last (default)": prepare(flow_sde_ppo, args, prefix),
        "Flow-Noise PPO, one-layer": prepare(flow_noise_ppo, args, prefix),
        "Flow-SDE GRPO, all steps but the last (default)": prepare(flow_sde_grpo, args, prefix),
    }
    seconds = {name: [] for name in updates}
    for i in range(1 + args.rounds):
        for name, update in updates.items():
            began = time.perf_counter()
            update()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    hybrid = seconds["Flow-SDE PPO, hybrid"]
    print("| update | ms per chunk and epoch | ratio to hybrid |\n|---|---|---|")
    for name, taken in seconds.items():
        ratio = np.median(np.divide(taken, hybrid))  # neighbours in time
        print(f"| {name} | {1e3 * np.median(taken) / args.chunks:.3f} | {ratio:.2f} |")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"\nMedian of {args.rounds} rounds of {args.chunks} chunks, K = {flow_sde_ppo.Args.denoise_steps}, "
        f"{args.num_threads} thread(s) of {os.cpu_count()} cores, {device}, torch {torch.__version__}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
