"""Supervised fine-tuning of a flow policy on a handful of demonstrations, where the three RL scripts start from.

The flow-matching loss (Eq. 3): draw noise and a time, stand on the straight line between noise and the expert's action,
and regress the line's direction. The VLM is frozen, so every demonstration is encoded once and only the action expert
runs in the training loop.

Stage 0 (`--pretrain`) makes the tiny pi0's VLM, whose weights are shipped in checkpoints/tiny. It stands in for what
PaliGemma learned from the web: to connect words with places in a picture. On random tabletop scenes small read-out heads
predict where the instruction's source and destination are, from nothing but the cached values that the action expert
will see. This uses the simulator's privileged positions, no action and no reward; the heads are thrown away afterwards.

    python flow_sft.py                 # SFT from the shipped VLM: checkpoints/tabletop-sft, about a minute
    python flow_sft.py --pretrain      # stage 0: checkpoints/tiny
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from envs import make_envs
from pi_models import TINY, Policy, fail, load_policy, save_policy


@dataclass
class Args:
    seed: int = 0
    """seed of scenes, demonstrations, initial weights and batches"""
    env_id: str = "tabletop"
    """where the scripted expert demonstrates"""
    checkpoint: str = "tiny"
    """policy to start from: a folder, or "tiny" (pre-trained VLM, untrained expert)"""
    output: str = ""
    """folder to write; default checkpoints/{env_id}-sft, with --pretrain checkpoints/tiny"""
    num_demos: int = 3
    """demonstrations per task"""
    total_steps: int = 1500
    """optimiser steps"""
    batch_size: int = 128
    """pairs of (observation, action chunk) per step"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule"""
    pretrain: bool = False
    """run stage 0 instead: ground the tiny VLM on random scenes"""
    num_threads: int = 1
    """CPU threads of torch; at tiny size more threads than free cores are much slower"""
    device: str = "cpu"
    """cpu or cuda"""


def flow_matching_loss(policy, prefix, actions, generator):
    """Eq. 3: E || v(x^tau, o) - (A - noise) ||^2 with x^tau = tau A + (1 - tau) noise."""
    noise = torch.randn(actions.shape, generator=generator).to(actions.device)  # (B, H, D)
    # the checkpoints' law of t = 1 - tau, Beta(1.5, 1), by inverting its distribution function t^1.5
    t = torch.rand(len(actions), generator=generator) ** (1 / 1.5) * 0.999 + 0.001
    tau = (1 - t).to(actions.device)  # (B,)
    x = tau[:, None, None] * actions + (1 - tau[:, None, None]) * noise
    velocity, _ = policy.velocity(prefix, x, tau)
    return F.mse_loss(velocity, actions - noise)


def collect_demonstrations(envs, num_demos, horizon):
    """Successful episodes of the scripted expert, `num_demos` of each task, cut into (observation, next H actions)."""
    observations, chunks, count = [], [], dict.fromkeys(range(len(envs.tasks)), 0)
    while min(count.values()) < num_demos:
        obs, _ = envs.reset()
        seen, acted, alive = [], [], np.ones(envs.num_envs, bool)
        while alive.any():
            action = envs.expert_action()  # (N, D)
            seen.append(obs)
            acted.append(action)
            obs, _, terminated, truncated, info = envs.step_chunk(action[:, None])
            for n in np.flatnonzero(terminated):
                if count[info["task"][n]] < num_demos:
                    count[info["task"][n]] += 1
                    rest = [a[n] for a in acted] + [acted[-1][n]] * (
                        horizon - 1
                    )  # the last action is repeated
                    observations += [{k: v[n] for k, v in o.items()} for o in seen]
                    chunks += [np.stack(rest[i : i + horizon]) for i in range(len(seen))]
            alive &= ~(terminated | truncated)
    columns = {k: [o[k] for o in observations] for k in observations[0]}
    return {k: v if k == "prompt" else np.stack(v) for k, v in columns.items()}, np.stack(chunks)


def finetune(policy, obs, actions, args, generator):
    """SFT proper: the VLM's part is computed once, the expert is trained."""
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
    targets = policy.normalize_actions(actions)  # (M, H, action_dim)
    optimizer = torch.optim.AdamW(policy.actor_parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.total_steps)
    progress = tqdm(range(args.total_steps), desc="SFT", mininterval=1)
    for _ in progress:
        rows = torch.randint(len(targets), (args.batch_size,), generator=generator)
        loss = flow_matching_loss(policy, prefix[rows], targets[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.actor_parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"loss {loss.item():.3f}")
    return loss.item()


def pretrain(policy, envs, args, rng):
    """Stage 0: from the values of layer l, averaged over the tokens, a head reads source and destination (x, y)."""
    c = policy.config
    widths = [c.head_dim] * (c.depth - 1) + [
        c.width
    ]  # layers 1, 2, ... and the pooled output that V_vlm reads
    heads = nn.ModuleList(nn.Sequential(nn.Linear(w, 128), nn.GELU(), nn.Linear(128, 4)) for w in widths)
    everything = nn.Sequential(
        nn.Linear(c.width, 128), nn.GELU(), nn.Linear(128, 14)
    )  # seven objects, from layer 0
    for module in policy.vlm_modules:
        module.requires_grad_(True)
    parameters = [p for module in [*policy.vlm_modules, heads, everything] for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.total_steps)
    progress = tqdm(range(args.total_steps), desc="VLM", mininterval=1)
    errors = []
    for step in progress:
        if step % 3 == 0:
            obs, _ = envs.reset()
        else:  # scenes as they look in the middle of an episode: the expert with a heavy tremor
            noise = rng.normal(0, 0.5, (envs.num_envs, rng.integers(2, 9), 3))
            obs = envs.step_chunk(envs.expert_action()[:, None] + noise)[0]
        targets = torch.from_numpy(envs.targets())  # (B, 4)
        inputs = policy.preprocess(obs)
        prefix = policy.encode(inputs)
        weight = prefix.mask[:, None, :, None] / prefix.mask.sum(1)[:, None, None, None]
        read = [*(prefix.kv[:, 1:, 1] * weight).sum(2).unbind(1), prefix.pooled]
        guesses = torch.stack([head(x) for head, x in zip(heads, read)], dim=1)  # (B, depth, 4)
        loss = F.smooth_l1_loss(guesses, targets[:, None].expand_as(guesses), beta=0.05)
        places = torch.from_numpy(envs.places().astype(np.float32)).flatten(1)  # (B, 14)
        seen = everything(policy.embed_images(inputs["images"]).mean(dim=1))
        loss = loss + F.smooth_l1_loss(seen, places, beta=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        off = (
            (guesses.detach() - targets[:, None]).unflatten(2, (2, 2)).norm(dim=3).amax(2)
        )  # (B, depth): worse of the two
        errors = [*errors[-19:], off]
        if step % 100 == 99:
            recent = torch.cat(errors)
            q = torch.quantile(recent, torch.tensor([0.5, 0.9]), dim=0)
            progress.write(f"step {step + 1}: loss {loss.item():.4f}  median {q[0].numpy().round(3)}  p90 {q[1].numpy().round(3)}"
                           f"  within 0.1 {(recent < 0.1).float().mean(0).numpy().round(3)}")  # fmt: skip
    for module in policy.vlm_modules:
        module.requires_grad_(False)
    return torch.cat(errors)


def main(args):
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    if args.pretrain:
        envs = make_envs(args.env_id, args.batch_size, args.seed)
        policy = Policy(
            TINY,
            {
                "state": {"mean": [0.0] * 4, "std": [1.0] * 4},
                "actions": {"mean": [0.0] * 3, "std": [1.0] * 3},
            },
        )
        policy.fit_prompts(envs.prompts)
        errors = pretrain(policy, envs, args, rng)
        save_policy(policy, args.output or "checkpoints/tiny", "card")
        return
    envs = make_envs(args.env_id, 64, args.seed, partial_reset=False)
    policy = load_policy(args.checkpoint, args.device)
    policy.fit_prompts(envs.prompts)
    obs, actions = collect_demonstrations(envs, args.num_demos, policy.config.horizon)
    first = actions[:, 0]  # every executed action once
    policy.stats = {
        "state": {"mean": obs["state"].mean(0).tolist(), "std": obs["state"].std(0).tolist()},
        "actions": {"mean": first.mean(0).tolist(), "std": first.std(0).tolist()},
    }
    finetune(policy, obs, actions, args, generator)
    save_policy(policy, args.output or f"checkpoints/{args.env_id}-sft", "card")


if __name__ == "__main__":
    main(tyro.cli(Args))
