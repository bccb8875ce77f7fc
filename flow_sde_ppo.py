"""Flow-SDE PPO: online RL for a flow-matching policy, as a two-layer MDP with hybrid ODE-SDE sampling (piRL, 4.2).

A flow policy turns noise A^0 into an action chunk A^1 by integrating a learned velocity in K steps. That is
deterministic, and PPO needs a stochastic policy with a known log-probability. So

1. the ODE is replaced by an SDE with the same marginals, whose steps are Gaussians (`transition`, Eq. 9);
2. a denoise step becomes a decision of the MDP (two layers: denoising inside, the environment outside, 4.2.2);
3. and one step per chunk, drawn at random, is enough: the other steps stay ODE and belong to the environment (4.2.3).

From there on it is PPO, with an action chunk as one macro step (Eqs. 13-15).

Departures from the paper, each explained in docs/math.md and docs/flow_sde_ppo.md:
1. Eqs. 7-9 are printed in another clock than the paper's own; `transition` is what they must be.
2. V_vlm also reads the proprioception, which pi0's VLM is not given; it is the laptop's default, V_expert the paper's.
3. The time limit is not a terminal state: the value of the final observation is bootstrapped.
4. The critic has its own gradient clipping and does not send gradients into the policy.

    python flow_sde_ppo.py                                       # tabletop, two CPU cores, minutes
    python flow_sde_ppo.py --device cuda --num-envs 1024         # one GPU
"""

import csv
import math
import os
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

from envs import make_envs, write_gif
from pi_models import Prefix, fail, load_policy, save_policy


@dataclass
class Args:
    # experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment"""
    seed: int = 1
    """seed of environments, policy noise, minibatches; evaluation has its own fixed seed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one"""
    num_threads: int = 1
    """CPU threads of torch; at tiny size more threads than idle cores are several times slower"""
    run_dir: str = "runs"
    """results go to {run_dir}/{env_id}__{exp_name}__{seed}__{time}"""
    track: bool = False
    """log to Weights & Biases too (pip install wandb)"""
    capture_video: bool = False
    """write a GIF of the first evaluation episodes at every evaluation"""
    save_model: bool = True
    """save the policy at the end, and every `save_freq` iterations"""
    save_freq: int = 50
    """iterations between checkpoints"""
    eval_freq: int = 25
    """iterations between deterministic evaluations on the fixed states; 0: only before and after"""

    # environment
    env_id: str = "tabletop"
    """environment; an unknown name lists the nearest ones"""
    checkpoint: str = "checkpoints/tabletop-sft"
    """policy to start from: a folder, or "tiny" """
    num_envs: int = 256
    """parallel environments"""
    num_steps: int = 8
    """action chunks per environment and iteration"""
    chunk_len: int = 5
    """actions executed per chunk, at most the policy's horizon"""
    partial_reset: bool = True
    """reset an environment as soon as its episode ends; else it idles, masked, until the next iteration resets all"""
    total_timesteps: int = 1_500_000
    """environment steps (single actions, not chunks)"""

    # optimisation
    learning_rate: float = 3e-4
    """of the action expert"""
    critic_learning_rate: float = 1e-3
    """of the value head"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """cosine ends at zero"""
    critic_warmup: int = 2
    """first iterations in which only the critic is trained"""
    gamma: float = 0.95
    """discount per chunk"""
    gae_lambda: float = 0.9
    """lambda of GAE, per chunk"""
    update_epochs: int = 4
    """passes over the batch"""
    num_minibatches: int = 2
    """optimiser steps per pass"""
    micro_batch_size: int = 0
    """chunks per forward and backward pass, gradients are accumulated over a minibatch; 0: a whole minibatch at once"""
    clip_coef: float = 0.2
    """clipping of the ratio, and of the value's change"""
    clip_vloss: bool = True
    """clip the value loss"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradient norm limit, of actor and critic each"""
    target_kl: float | None = None
    """end an update early when its approximate KL divergence is above this"""
    critic: Literal["vlm", "expert"] = "vlm"
    """V_vlm reads the VLM's output; V_expert the action expert's, averaged over the denoising trajectory (Eq. 16)"""
    critic_layers: int = 4
    """linear layers of the value head"""

    # this algorithm
    denoise_steps: int = 4
    """K, integration steps from noise to action"""
    noise_level: float = 1.0
    """a, the scale of the SDE's noise (Eq. 9)"""
    sde_solver: Literal["euler", "cps"] = "euler"
    """Euler-Maruyama (Eq. 9) or Flow-CPS"""
    mdp: Literal["hybrid", "two-layer"] = "hybrid"
    """one random denoise step per chunk is the decision (4.2.3), or every one is (4.2.2)"""


def transition(x, velocity, tau, delta, noise_level, solver="euler"):
    """Eq. 9 in the right clock: the Gaussian A^{tau+delta} | A^tau of an SDE that keeps the ODE's marginals.

    tau = 0 is noise and tau = 1 is the action. The noise pushes x off the flow and the score pulls it back; with
    noise_level 0 this is the ODE's step x + velocity * delta.
    """
    tau = tau[:, None, None]  # (B, 1, 1)
    noise_hat = x - tau * velocity  # the noise that x seems to come from; the score is -noise_hat / (1 - tau)
    if solver == "cps":  # Flow-CPS: keep action and noise in the proportions of tau + delta, but renew part of the noise
        action_hat, angle = x + (1 - tau) * velocity, noise_level * math.pi / 2
        mu = (tau + delta) * action_hat + (1 - tau - delta) * math.cos(angle) * noise_hat
        std = (1 - tau - delta) * math.sin(angle)
    else:  # Euler-Maruyama; at tau = 0 sigma would be infinite, there the denominator is delta
        sigma = noise_level * torch.sqrt((1 - tau) / tau.clamp(min=delta))
        mu = x + (velocity - sigma**2 / (2 * (1 - tau)) * noise_hat) * delta  # Eq. 9
        std = sigma * math.sqrt(delta)
    return mu, std  # (B, H, D), (B, 1, 1)


def log_prob(x_next, mu, std, chunk_len, action_dim):
    """log N(x_next; mu, std) of a chunk: the sum over executed steps and real action dimensions, never the padding."""
    terms = -0.5 * ((x_next - mu) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)  # (B, H, D)
    return terms[:, :chunk_len, :action_dim].sum(dim=(1, 2))  # (B,)


class Agent:
    """The policy as an RL agent: how it samples a chunk, how probable a stored chunk is now, what it is worth."""

    def __init__(self, policy, args):
        self.policy, self.num_steps, self.delta = policy, args.denoise_steps, 1 / args.denoise_steps
        self.noise_level, self.solver, self.mdp = args.noise_level, args.sde_solver, args.mdp
        self.chunk_len, self.action_dim = args.chunk_len, policy.env_action_dim
        self.decisions = self.num_steps - (self.solver == "cps")  # the last step of Flow-CPS has no noise

    @torch.no_grad()
    def act(self, prefix, generator, deterministic=False):
        """Denoise from A^0 ~ N(0, I). Returns the chain (B, K+1, H, D), denoise_idx (B, S) and their log-prob (B, S)."""
        B, device, c = len(prefix.mask), prefix.mask.device, self.policy.config
        # hybrid: one denoise step of each environment and chunk is stochastic; two-layer: all of them are
        if self.mdp == "hybrid":
            denoise_idx = torch.randint(self.decisions, (B, 1), generator=generator, device=device)  # (B, S), S = 1
        else:
            denoise_idx = torch.arange(self.decisions, device=device).expand(B, -1)  # (B, S), S = K
        chain = [torch.randn((B, c.horizon, c.action_dim), generator=generator, device=device)]  # A^0 (B, H, D)
        logprobs = []
        for k in range(self.num_steps):
            x, tau = chain[-1], torch.full((B,), k / self.num_steps, device=device)
            velocity, _ = self.policy.velocity(prefix, x, tau)  # (B, H, D)
            x_next = x + velocity * self.delta  # Eq. 6
            if not deterministic:
                mu, std = transition(x, velocity, tau, self.delta, self.noise_level, self.solver)
                stochastic = (denoise_idx == k).any(dim=1)[:, None, None]  # (B, 1, 1)
                noise = torch.randn(x.shape, generator=generator, device=device)
                x_next = torch.where(stochastic, mu + std * noise, x_next)  # Eq. 10
                logprobs.append(log_prob(x_next, mu, std, self.chunk_len, self.action_dim))
            chain.append(x_next)
        logprob = None if deterministic else torch.stack(logprobs, dim=1).gather(1, denoise_idx)  # (B, S)
        return torch.stack(chain, dim=1), denoise_idx, logprob

    def evaluate_actions(self, prefix, chain, denoise_idx):
        """Log-probability (B, S) and entropy of stored decisions under the present weights: one expert pass each."""
        rows = torch.arange(len(chain), device=chain.device)[:, None].expand_as(denoise_idx).flatten()  # (B * S,)
        k = denoise_idx.flatten()
        x, x_next, tau = chain[rows, k], chain[rows, k + 1], k / self.num_steps
        velocity, _ = self.policy.velocity(prefix[rows] if denoise_idx.shape[1] > 1 else prefix, x, tau)
        mu, std = transition(x, velocity, tau, self.delta, self.noise_level, self.solver)
        entropy = (torch.log(std) + 0.5 * math.log(2 * math.pi * math.e)).mean() * self.chunk_len * self.action_dim
        return log_prob(x_next, mu, std, self.chunk_len, self.action_dim).view_as(denoise_idx), entropy

    def value(self, prefix, chain=None, generator=None):
        """V(o) of the observation, (B, 1), or of each decision's state (o, A^tau) in the two-layer MDP, (B, S)."""
        head = self.policy.value_head
        if self.policy.config.critic == "vlm":
            return head(torch.cat([prefix.pooled, prefix.state], dim=1))[:, None].expand(-1, self.num_decisions)
        chain = self.act(prefix, generator)[0] if chain is None else chain
        with torch.no_grad():  # the critic reads the expert and does not shape it
            B, K = len(chain), self.num_steps
            rows = torch.arange(B, device=chain.device).repeat_interleave(K)
            tau = torch.arange(K, device=chain.device).repeat(B) / K
            features = self.policy.velocity(prefix[rows], chain[:, :-1].flatten(0, 1), tau)[1].mean(dim=1)  # (B * K, W)
        values = head(features).view(B, K)
        return values.mean(dim=1, keepdim=True) if self.mdp == "hybrid" else values[:, : self.decisions]  # Eq. 16

    @property
    def num_decisions(self):  # S
        return 1 if self.mdp == "hybrid" else self.decisions


def compute_advantages(rewards, values, next_value, terminated, truncated, final_values, gamma, gae_lambda):
    """Eq. 13 over chunks. rewards, terminated, truncated, final_values (T, N), values (T, N, S), next_value (N,).

    Success ends the return. The time limit does not: the value of the final observation stands for what would have
    come. Inner denoise steps carry no reward and no discount, so the S decisions of a chunk share one return and each
    has its own baseline.
    """
    first = values[..., 0]  # (T, N): the value where the chunk begins
    advantages, last = torch.zeros_like(first), 0.0
    for t in reversed(range(len(rewards))):
        following = first[t + 1] if t + 1 < len(rewards) else next_value
        following = torch.where(truncated[t], final_values[t], following) * ~terminated[t]
        td_error = rewards[t] + gamma * following - first[t]
        advantages[t] = last = td_error + gamma * gae_lambda * last * ~(terminated[t] | truncated[t])  # Eq. 13
    returns = (advantages + first)[..., None]  # (T, N, 1)
    return returns - values, returns.expand_as(values)  # (T, N, S) both


def update(agent, optimizer, batch, args, generator, train_actor=True):
    """PPO over the chunks in which the episode was alive: clipped surrogate (Eqs. 14-15) and clipped value loss."""
    alive = batch.alive.flatten().nonzero().squeeze(1)
    prefix = Prefix(*(field.flatten(0, 1) for field in batch.prefix))
    chain, denoise_idx, old_logprob, old_value, advantages, returns = (
        getattr(batch, name).flatten(0, 1)
        for name in ("chain", "denoise_idx", "logprob", "value", "advantages", "returns")
    )  # (T * N, ...)
    a = advantages[alive]
    advantages = (advantages - a.mean()) / (a.std() + 1e-8)
    actor, critic = (group["params"] for group in optimizer.param_groups)
    logs = []
    for _ in range(args.update_epochs):
        order = alive[torch.randperm(len(alive), generator=generator, device=alive.device)]
        for minibatch in order.tensor_split(args.num_minibatches):
            optimizer.zero_grad()
            for rows in minibatch.split(args.micro_batch_size or len(minibatch)):
                value = agent.value(prefix[rows], chain[rows])  # (B, S)
                value_clipped = old_value[rows] + (value - old_value[rows]).clamp(-args.clip_coef, args.clip_coef)
                value_error = (value - returns[rows]) ** 2
                if args.clip_vloss:
                    value_error = torch.max(value_error, (value_clipped - returns[rows]) ** 2)
                value_loss = 0.5 * value_error.mean()
                policy_loss = entropy = approx_kl = clipfrac = torch.zeros(())
                if train_actor:
                    logprob, entropy = agent.evaluate_actions(prefix[rows], chain[rows], denoise_idx[rows])
                    logratio = logprob - old_logprob[rows]
                    ratio = logratio.exp()  # Eq. 15
                    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    policy_loss = -torch.min(ratio * advantages[rows], clipped * advantages[rows]).mean()  # Eq. 14
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                loss = policy_loss + args.vf_coef * value_loss
                (loss * len(rows) / len(minibatch)).backward()
                logs.append([x.item() for x in (value_loss, policy_loss, entropy, approx_kl, clipfrac)])
            grad_norm = nn.utils.clip_grad_norm_(actor, args.max_grad_norm)
            nn.utils.clip_grad_norm_(critic, args.max_grad_norm)
            optimizer.step()
        if args.target_kl is not None and logs[-1][3] > args.target_kl:
            break
    names = ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac")
    metrics = {f"losses/{name}": value for name, value in zip(names, np.mean(logs, axis=0))}
    explained = 1 - (returns - old_value)[alive].var() / returns[alive].var()
    return metrics | {"losses/explained_variance": explained.item(), "flow/grad_norm": grad_norm.item()}


@torch.no_grad()
def evaluate(agent, envs, deterministic=True, seed=0):
    """One episode from each fixed evaluation state, by the ODE. Returns success, length, task (M,) and video frames."""
    generator = torch.Generator(agent.policy.device).manual_seed(seed)
    states, results, frames = np.arange(envs.num_eval_states), [], []
    for chosen in np.split(states, range(envs.num_envs, len(states), envs.num_envs)):
        padded = np.resize(chosen, envs.num_envs)  # the last round may have environments to spare
        obs, _ = envs.reset(options={"eval_states": padded})
        alive, success, length = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs, bool), np.zeros(envs.num_envs, int)
        alive[len(chosen) :] = False
        while alive.any():
            rows = np.flatnonzero(alive)
            seen = {k: [v[i] for i in rows] if k == "prompt" else v[rows] for k, v in obs.items()}
            prefix = agent.policy.encode(agent.policy.preprocess(seen))
            chain, _, _ = agent.act(prefix, generator, deterministic)
            actions = np.zeros((envs.num_envs, agent.chunk_len, agent.action_dim), np.float32)
            actions[rows] = agent.policy.postprocess(chain[:, -1], seen)[:, : agent.chunk_len]
            obs, _, terminated, truncated, info = envs.step_chunk(actions)
            success |= info["success"] & alive
            length[rows] = info["episode_length"][rows]
            alive &= ~(terminated | truncated)
            frames += info.get("frames", [])
        results.append((success, length, info["task"], len(chosen)))
    success, length, task = (np.concatenate([r[i][: r[3]] for r in results]) for i in range(3))
    return {"success": success, "length": length, "task": task, "frames": frames}
