"""How far training has moved a policy, denoise step by denoise step, and how much of it the likelihood sees.

PPO's ratio and its KL divergence are of the noisy denoise steps. A step that is left to the ODE moves too, as
all steps share the weights. The policy before training plays by the ODE; at every denoise step, from the x
that it has reached, both are asked for their next one. The trained one is of a run of Flow-SDE, whose
args.json says K, noise level and MDP; the KL divergence is from the beginning of training to its end.

    python benchmark/drift.py --env-id metaworld_hand-insert --before runs/metaworld_pixels/sft/hand-insert \\
        --after runs/metaworld_pixels/flow_sde_ppo/hand-insert-1/*/checkpoint    # a minute; Markdown
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_sde_ppo
from envs import make_envs, select_rows
from evaluate import SAMPLER
from flags import fail
from flow_sde_ppo import Agent
from pi_models import load_policy


@dataclass
class Args:
    before: str
    """policy that training began with"""
    after: str
    """folder of the checkpoint that it ended with"""
    env_id: str = "tabletop"
    """where"""
    num_envs: int = 16
    """of the first evaluation states"""
    num_steps: int = 16
    """chunks of an episode"""


@torch.no_grad()
def compare(before, after, prefixes, x0):
    """Of a chunk: squared moves of x by step (K,), squared move of the action, KL by step (K,)."""
    C, D = before.chunk_len, before.action_dim
    chain, steps, *_ = before.act(prefixes[0], None, deterministic=True, x=x0)
    moves, kl = torch.zeros(2, before.K)
    for k in range(before.K):
        tau = torch.full((len(x0),), k / before.K)
        (v, mu, std, _), (new_v, new_mu, *_) = (
            agent.step(prefix, chain[:, k], tau) for agent, prefix in zip((before, after), prefixes)
        )
        moves[k] = ((new_v - v) * before.delta)[:, :C, :D].square().mean()
        if k < before.noisy_steps:
            kl[k] = 0.5 * ((new_mu - mu) / std)[:, :C, :D].square().sum(dim=(1, 2)).mean()
    end = after.act(prefixes[1], None, deterministic=True, x=x0)[0][:, -1]
    return moves, (end - chain[:, -1])[:, :C, :D].square().mean(), kl, chain[:, -1]


def main(args):
    torch.set_num_threads(1)
    before, after = load_policy(args.before, "cpu"), load_policy(args.after, "cpu")
    told = json.loads((Path(args.after).parent / "args.json").read_text())
    if told["noise"] != "sde" or "mdp" not in told:
        fail("--after: expected a run of flow_sde_ppo.py or flow_sde_grpo.py with the SDE's noise")
    flags = replace(flow_sde_ppo.defaults(args.env_id, "tiny"), **{name: told[name] for name in SAMPLER})
    size = before.config.image_size
    envs = make_envs(args.env_id, args.num_envs, 0, False, obs_mode=told["obs_mode"], image_size=size)
    for policy in (before, after):
        policy.fit_prompts(envs.prompts)
    agents, generator = (Agent(before, flags), Agent(after, flags)), torch.Generator().manual_seed(0)
    obs, _ = envs.reset(options={"eval_states": np.arange(args.num_envs)})
    found, count, c, alive = 0, 0, before.config, np.ones(args.num_envs, bool)
    for _ in range(args.num_steps):
        rows = np.flatnonzero(alive)
        seen = select_rows(obs, rows)
        prefixes = [agent.encode(seen)[0] for agent in agents]
        x0 = torch.randn((len(rows), c.horizon, c.action_dim), generator=generator)
        *one, chunk = compare(*agents, prefixes, x0)
        one.append(torch.tensor(agents[0].exploration(prefixes[0], generator) ** 2))
        found, count = found + len(rows) * torch.cat([part.view(-1) for part in one]), count + len(rows)
        actions = np.zeros((args.num_envs, flags.chunk_len, before.env_action_dim), np.float32)
        actions[rows] = before.postprocess(chunk, seen)[:, : flags.chunk_len]
        obs, _, terminated, truncated, _ = envs.step_chunk(actions)
        alive &= ~(terminated | truncated)
        if not alive.any():
            break
    envs.close()
    moves, action, kl, explored = (found / count).split([agents[0].K, 1, agents[0].K, 1])
    print("| denoise step | noisy | moves x by | KL, nats a chunk |\n|---|---|---|---|")
    for k in range(agents[0].K):
        noisy = k < agents[0].noisy_steps
        seen = f"{kl[k]:.2f}" if noisy else "not seen"
        print(f"| {k} | {'yes' if noisy else 'no'} | {moves[k].sqrt():.3f} | {seen} |")
    action, explored = action.item() ** 0.5, explored.item() ** 0.5
    print(
        f"\nThe action moves by {action:.3f} (rms, normalised, by the ODE from the same noise); "
        f"it was explored with\n{explored:.3f} before training. {args.env_id}, {count} chunks of "
        f"{args.num_envs} episodes, K = {agents[0].K}, a = {flags.noise_level}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
