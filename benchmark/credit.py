"""How far back does a success reach? Flow-SDE PPO's gradient under other discounts and lambdas (Eq. 13).

Batches are played once, as training plays them, by a policy that stays as it is. Then, for each pair of
gamma and lambda, a new critic is trained on the first of them, as the warm-up does it, and of each of the
others the gradient at ratio 1 is taken: of the mean of advantage times log-probability. The nearer both are
to 1, the more an early chunk hears of the end itself, with all its variance; else it hears what the critic
makes of it.

Printed is signal / variance of a batch, as in gradient.py, and what the critic explains. A batch that is
twice as large has half the variance; a pair with half the ratio needs twice as many episodes to see as much.
The time limit is an end, as under --no-bootstrap. The pictures are fast ones, K is 2.

    python benchmark/credit.py --checkpoint runs/metaworld_pixels/sft/stick-push    # ten minutes; Markdown
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from gradient import empty_batch, signal_and_variance
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_sde_ppo
from envs import make_envs
from flow_sde_ppo import Agent, compute_advantages, rollout, update
from pi_models import load_policy


@dataclass
class Args:
    checkpoint: str
    """policy that plays"""
    env_id: str = "metaworld_stick-push"
    """where"""
    num_envs: int = 32
    """environments"""
    num_steps: int = 20
    """chunks of each in a batch"""
    batches: int = 40
    """that are compared"""
    warmup: int = 4
    """batches before them, for the critic"""
    pairs: tuple[str, ...] = ("0.95,0.95", "0.95,0.99", "0.99,0.95", "0.99,0.99", "1,1")
    """gamma,lambda"""
    noise_level: float = 0.7
    """of the SDE"""
    noisy_last_step: bool = False
    """is the last of both denoise steps noisy too?"""
    seed: int = 77
    """of environments and noise"""


def judge(agent, batch, flags):
    """Values by the critic as it is now, and what Eq. 13 makes of them."""
    T, N = batch.reward.shape
    with torch.no_grad():
        for t in range(T):
            rows = torch.arange(t * N, (t + 1) * N)
            ((_, prefix),) = batch.prefixes.encoded(agent.policy, [rows])
            batch.value[t] = agent.value(prefix, batch.features[t])
        batch.next_value = agent.value(batch.following)[:, 0]
    given = batch.reward, batch.value, batch.next_value, batch.terminated, batch.truncated
    given += torch.zeros_like(batch.final_value), flags.gamma, flags.gae_lambda
    batch.advantages, batch.returns = compute_advantages(*given)


def policy_gradient(agent, batch):
    """(P,): of the surrogate (Eq. 14) where the ratio is 1."""
    chain, drawn, advantages = (x.flatten(0, 1) for x in (batch.chain, batch.denoise_idx, batch.advantages))
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    ((rows, prefix),) = batch.prefixes.encoded(agent.policy, [torch.arange(len(chain))])
    logprob, _, _ = agent.evaluate_actions(prefix, chain[rows], drawn[rows])
    parts = agent.policy.actor_parameters()
    parts = torch.autograd.grad((logprob * advantages).mean(), parts, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def main(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    usual = flow_sde_ppo.defaults(args.env_id, "tiny")
    flags = replace(usual, num_envs=args.num_envs, num_steps=args.num_steps, denoise_steps=2, update_epochs=4)
    flags = replace(flags, noise_level=args.noise_level, noisy_last_step=args.noisy_last_step)
    policy = load_policy(args.checkpoint, "cpu")
    size = policy.config.image_size
    envs = make_envs(args.env_id, args.num_envs, args.seed, obs_mode="fast", image_size=size)
    policy.fit_prompts(envs.prompts)
    policy.set_trained("expert", flags.lora_rank, flags.lora_alpha)
    policy.need_value_head(flags.critic, flags.critic_layers)
    agent, generator = Agent(policy, flags), torch.Generator().manual_seed(args.seed)

    obs, _ = envs.reset()
    seen, played, ended = (obs, *agent.encode(obs)), [], []
    for _ in tqdm(range(args.warmup + args.batches), "batches"):
        batch = empty_batch(agent, *seen[1:], args.num_steps, args.num_envs)
        seen, episodes, *_ = rollout(agent, envs, seen, batch, generator)
        batch.following = seen[1]
        played.append(batch)
        ended += episodes
    envs.close()

    print("| gamma | lambda | the critic explains | signal / variance of a batch |\n|---|---|---|---|")
    for pair in args.pairs:
        flags.gamma, flags.gae_lambda = (float(part) for part in pair.split(","))
        torch.manual_seed(args.seed)
        policy.value_head = None
        policy.need_value_head(flags.critic, flags.critic_layers)
        groups = [{"params": policy.actor_parameters(), "lr": 0.0}]
        groups.append({"params": list(policy.value_head.parameters())})
        optimizer = torch.optim.AdamW(groups, lr=flags.critic_learning_rate, eps=1e-5, weight_decay=0.01)
        for batch in played[: args.warmup]:
            judge(agent, batch, flags)
            update(agent, optimizer, batch, flags, generator)
        found, left, spread = [], 0.0, 0.0
        for batch in played[args.warmup :]:
            judge(agent, batch, flags)
            found.append(policy_gradient(agent, batch))
            left += (batch.returns - batch.value).var().item()
            spread += batch.returns.var().item()
        signal, error, variance = signal_and_variance(torch.stack(found))
        ratio = f"{signal / variance:.3f} ± {error / variance:.3f}"
        print(f"| {flags.gamma} | {flags.gae_lambda} | {1 - left / spread:.2f} | {ratio} |", flush=True)
    success = sum(one for one, *_ in ended) / len(ended)
    played = f"{args.batches} batches of {args.num_envs * args.num_steps} chunks"
    print(
        f"\n{args.env_id}, {args.checkpoint}, noise {args.noise_level}, {played}; {len(ended)} episodes "
        f"ended, {success:.0%} of them in success. torch {torch.__version__}."
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
