"""Exploration of the SFT policy: std of the executed numbers given observation and A^0, for solver, level, draw.

    python benchmark/exploration.py
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from envs import make_envs
from flow_sde_ppo import Agent, Args
from pi_models import load_policy


@torch.no_grad()
def exploration(agent, prefix, generator, pairs=8):
    """(e, S): the spread of the executed numbers given A^0, and by the ODE over A^0."""
    c, B = agent.policy.config, len(prefix.mask)
    use = (slice(None), slice(agent.chunk_len), slice(agent.action_dim))
    square, own = 0.0, 0.0
    for _ in range(pairs):
        x = torch.randn((B, c.horizon, c.action_dim), generator=generator)
        a, b = (agent.act(prefix, generator, x=x)[0][:, -1][use] for _ in range(2))
        square += ((a - b) ** 2).mean().item() / 2 / pairs
        a, b = (agent.act(prefix, generator, deterministic=True)[0][:, -1][use] for _ in range(2))
        own += ((a - b) ** 2).mean().item() / 2 / pairs
    return square**0.5, own**0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    envs = make_envs("tabletop", 256, 1)
    policy = load_policy(sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tabletop-sft", "cpu")
    policy.fit_prompts(envs.prompts)
    obs, _ = envs.reset()
    generator = torch.Generator().manual_seed(0)
    agent = Agent(policy, Args())
    for _ in range(3):  # some way into the episodes
        with torch.no_grad():
            prefix = policy.encode(policy.preprocess(obs))
            chain = agent.act(prefix, generator)[0]
        obs, *_ = envs.step_chunk(policy.postprocess(chain[:, -1], obs)[:, :5])
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
    print("| solver | a | drawn from | e | S |\n| --- | --- | --- | --- | --- |")
    for solver, levels in (("euler", (0.7, 0.8, 1.0, 1.2)), ("cps", (0.7, 0.9, 1.0)),
                           ("exponential", (0.8, 1.0, 1.2, 1.4, 2.0, 3.0))):  # fmt: skip
        for level in levels:
            for last in (False, True)[: 1 + (solver == "euler")]:
                args = Args(sde_solver=solver, noise_level=level, noisy_last_step=last)
                e, own = exploration(Agent(policy, args), prefix, generator)
                print(f"| {solver} | {level} | {'0..K-1' if last else '0..K-2'} | {e:.3f} | {own:.3f} |", flush=True)
