"""What test_ranks.py compares, in its own process and, by torchrun, in two: each script's update in fp64.

torchrun --standalone --nproc_per_node=2 tests/one_update.py FOLDER
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import kept, make_policy

import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
from envs import make_envs
from ranks import join

T, N, GROUP = 3, 12, 3


def played(script, rank, ranks, dead):
    """The gradients that an update leaves behind, and its metrics. The environments `dead` are idle."""
    policy = make_policy("" if script is flow_sde_grpo else "vlm").double()
    if script is flow_noise_ppo:
        policy.need_noise_head(0.2, 0.6)
        policy.noise_head.double()
    once = dict(update_epochs=1, num_minibatches=1, micro_batch_size=4, max_grad_norm=1e9)
    args = dataclasses.replace(script.Args(), **once)
    agent, c, generator = script.Agent(policy, args), policy.config, torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    rows, S = T * N, 9
    kv = draw(rows, c.depth, 2, S, c.head_dim)
    mask = draw(rows, S) > -1
    mask[:, 0] = True
    fields = {"kv": kv, "mask": mask, "pooled": draw(rows, c.width), "state": draw(rows, c.state_dim)}
    chain, denoise_idx, logprob, features = agent.act(policy.encode(fields), generator)
    alive = draw(T, N) > -1
    alive[0], alive[:, dead] = True, False
    old = dict(chain=chain, denoise_idx=denoise_idx, logprob=logprob + 0.1 * draw(*logprob.shape))
    old |= {"features": features}
    batch = {name: field.unflatten(0, (T, N)) for name, field in old.items()}
    inputs = {name: field.unflatten(0, (T, N)) for name, field in fields.items()}
    share = slice(rank * N // ranks, (rank + 1) * N // ranks)
    if script is flow_sde_grpo:
        rewards, begun = (draw(T, N) > 0.5).double(), alive | ~alive.any(dim=0)
        batch["advantages"] = script.compute_advantages(rewards[:, share], begun[:, share], GROUP)
    else:
        decisions = agent.num_decisions
        batch |= {name: draw(T, N, decisions)[:, share] for name in ("value", "returns", "advantages")}
    batch = SimpleNamespace(**{k: v if v.shape[1] < N else v[:, share] for k, v in batch.items()})
    mine = policy.encode({name: field[:, share].flatten(0, 1) for name, field in inputs.items()})
    batch.prefixes = kept(policy, T, N // ranks, mine)
    batch.alive = alive[:, share]
    optimizer = torch.optim.SGD(
        [{"params": policy.actor_parameters()}, {"params": list(policy.value_head.parameters())}]
        if policy.value_head
        else [{"params": policy.actor_parameters()}],
        lr=1e-9,
    )
    metrics = script.update(agent, optimizer, batch, args, torch.Generator().manual_seed(rank))
    told = {f"metric {name}": np.float64(value) for name, value in metrics.items()}
    return told | {n: p.grad.numpy() for n, p in policy.named_parameters() if p.grad is not None}


def everything(rank, ranks):
    torch.set_default_dtype(torch.float64)
    single, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # Gemma's norms ask for it
    try:
        told = {
            f"{script.__name__}, {name}: {key}": value
            for script in (flow_sde_ppo, flow_noise_ppo, flow_sde_grpo)
            for name, dead in (("uneven", slice(1, 4)), ("a rank has nothing", slice(0, N // 2)))
            for key, value in played(script, rank, ranks, dead).items()
        }
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)
    envs = make_envs("tabletop_press_button", 20, 0, partial_reset=False)
    policy = make_policy()
    policy.fit_prompts(envs.prompts)
    agent = flow_sde_ppo.Agent(policy, flow_sde_ppo.Args())
    result = flow_sde_ppo.evaluate(agent, envs, deterministic=True, rank=rank, ranks=ranks)
    return told | {f"evaluation: {name}": result[name] for name in ("success", "length", "task")}


if __name__ == "__main__":
    rank, ranks, _ = join("cpu")
    np.savez(Path(sys.argv[1]) / f"rank{rank}.npz", **everything(rank, ranks))
