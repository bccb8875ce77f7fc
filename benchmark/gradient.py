"""What the gradient of Flow-SDE PPO is made of: signal and variance by denoise step, and unexecuted actions.

Batches of chunks are played as training plays them, by a policy that stays as it is, once its critic has been
trained alone for a while. At the old weights the ratio is 1, and PPO's gradient is that of the mean of
advantage times log-probability. It is split by the step of which the decision was, and taken twice: of all
numbers of a chunk, as the script does, and of those that were executed before the episode ended.

Of each part are printed its root mean square over batches, its share of the variance, and signal / variance
with a standard error, on the safe side. The signal is the squared length of the mean, from products of the
gradients of different batches: without bias, so it may be negative. Tabletop, Markdown.

    python benchmark/gradient.py                                       # four minutes on an idle core
    python benchmark/gradient.py --checkpoint runs/<run>/checkpoint
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_sde_ppo
from envs import make_envs
from flow_sde_ppo import Agent, compute_advantages, log_prob, rollout, update
from pi_models import Prefixes, load_policy


@dataclass
class Args:
    checkpoint: str = flow_sde_ppo.Args.checkpoint
    """policy that plays"""
    batches: int = 32
    """of 2,048 chunks"""
    warmup: int = 4
    """batches before them, for the critic"""
    seed: int = 77
    """of environments and noise"""


def empty_batch(agent, prefix, inputs, T, N):
    """What `rollout` fills."""
    c = agent.policy.config
    S = agent.num_decisions
    shapes = {"chain": (agent.K + 1, c.horizon, c.action_dim), "logprob": (S,), "value": (S,)}
    shapes |= {"reward": (), "final_value": (), "features": (agent.K, c.expert_width)}
    return SimpleNamespace(
        prefixes=Prefixes(agent.policy, T, N, prefix, inputs),
        denoise_idx=torch.zeros((T, N, S), dtype=torch.long),
        **{name: torch.zeros((T, N, *shape)) for name, shape in shapes.items()},
        **{name: torch.zeros((T, N), dtype=torch.bool) for name in ("terminated", "truncated", "alive")},
    )


def gradients(agent, batch, steps):
    """Of a batch, (K, 2, P): by the step of the decision; of all its numbers, or of the executed ones.

    steps (T, N): how many actions of a chunk were executed.
    """
    chain, drawn, advantages = (x.flatten(0, 1) for x in (batch.chain, batch.denoise_idx, batch.advantages))
    advantages = ((advantages - advantages.mean()) / advantages.std(correction=0))[:, 0]
    executed = torch.arange(agent.chunk_len) < steps.flatten()[:, None]  # (T * N, C)
    result = []
    for k in range(agent.noisy_steps):
        rows = (drawn[:, 0] == k).nonzero().squeeze(1)
        ((_, prefix),) = batch.prefixes.encoded(agent.policy, [rows])
        _, mu, std, _ = agent.step(prefix, chain[rows, k], torch.full((len(rows),), k / agent.K))
        x, C, D = chain[rows, k + 1], agent.chunk_len, agent.action_dim
        each = [slice(h, h + 1) for h in range(C)]  # a log-probability for each action of the chunk
        logprob = torch.stack([log_prob(x[:, h], mu[:, h], std, 1, D) for h in each], dim=1)  # (B, C)
        for counts in (torch.ones(len(rows), C), executed[rows]):
            gain = ((logprob * counts).sum(dim=1) * advantages[rows]).sum() / len(chain)
            parts = agent.policy.actor_parameters()
            parts = torch.autograd.grad(gain, parts, retain_graph=True, materialize_grads=True)
            result.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(result).unflatten(0, (-1, 2))


def signal_and_variance(g):
    """Of gradients (B, P), one a batch: |mean|^2 without bias, its standard error at most, the variance."""
    B, gram = len(g), g @ g.T
    products = (gram.sum(dim=1) - gram.diag()) / (B - 1)  # of a batch with the others
    signal = products.mean()
    return signal.item(), (2 * products.std() / B**0.5).item(), (gram.diag().mean() - signal).item()


def main(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    every_step = dict(mdp="hybrid", noisy_last_step=True, noise_level=1.0)
    flags = flow_sde_ppo.Args(checkpoint=args.checkpoint, **every_step)
    envs = make_envs("tabletop", flags.num_envs, args.seed)
    policy = load_policy(args.checkpoint, "cpu")
    policy.fit_prompts(envs.prompts)
    policy.set_trained("expert", flags.lora_rank, flags.lora_alpha)
    policy.need_value_head(flags.critic, flags.critic_layers)
    agent = Agent(policy, flags)
    # a critic's warm-up: the actor's rate is zero
    groups = [{"params": policy.actor_parameters(), "lr": 0.0}, {"params": [*policy.value_head.parameters()]}]
    optimizer = torch.optim.AdamW(groups, lr=flags.critic_learning_rate)

    step_chunk, steps = envs.step_chunk, []

    def counted(actions):
        *result, info = step_chunk(actions)
        steps.append(torch.from_numpy(info["steps"].copy()))
        return *result, info

    envs.step_chunk = counted
    generator = torch.Generator().manual_seed(args.seed)
    obs, _ = envs.reset()
    seen = obs, *agent.encode(obs)
    batch = empty_batch(agent, *seen[1:], flags.num_steps, flags.num_envs)
    found, played = [], []
    for i in range(args.warmup + args.batches):
        steps.clear()
        seen, *_ = rollout(agent, envs, seen, batch, generator)
        ends = batch.terminated, batch.truncated, batch.final_value
        batch.advantages, batch.returns = compute_advantages(
            batch.reward, batch.value, batch.next_value, *ends, flags.gamma, flags.gae_lambda
        )
        if i < args.warmup:
            update(agent, optimizer, batch, flags, generator)
        else:
            found.append(gradients(agent, batch, torch.stack(steps)))
            played.append(torch.stack(steps))
    found, played = torch.stack(found), torch.stack(played)  # (batches, K, 2, P), (batches, T, N)

    K, whole = agent.noisy_steps, found.sum(dim=1)  # (batches, 2, P)
    parts = {f"step {k}": found[:, k, 0] for k in range(K)} | {"all steps": whole[:, 0]}
    parts |= {"without the last step": whole[:, 0] - found[:, -1, 0], "all steps, executed": whole[:, 1]}
    total = signal_and_variance(whole[:, 0])[2]
    print("| part of the gradient | rms | share of the variance | signal / variance |\n|---|---|---|---|")
    for name, g in parts.items():
        signal, error, variance = signal_and_variance(g)
        rms, ratio = g.square().sum(dim=1).mean().sqrt(), f"{signal / variance:.3f} ± {error / variance:.3f}"
        print(f"| {name} | {rms:.2f} | {variance / total:.2f} | {ratio} |")
    inside = (played < agent.chunk_len).float().mean()
    unexecuted = 1 - played.float().mean() / agent.chunk_len
    cosine = torch.cosine_similarity(*whole.mean(dim=0), dim=0)
    print(
        f"\nThe episode ended inside {inside:.1%} of the chunks, {unexecuted:.1%} of the actions were never "
        f"executed. The mean gradients of all and of the executed have the cosine {cosine:.3f}.\n"
        f"{args.batches} batches of {flags.num_envs * flags.num_steps} chunks, {args.checkpoint}, "
        f"K = {agent.K}, a = {agent.noise_level}, torch {torch.__version__}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
