"""Flow-Noise PPO: online RL for flow policies by a one-layer MDP with learned noise (piRL, 4.1).

A flow policy turns noise A^0 into an action chunk A^1 by integrating a learned velocity in K steps. That is
deterministic, and PPO needs a stochastic policy with a known log-probability. So

1. a head of the action expert says how much Gaussian noise each denoise step gets (`transition`, Eq. 4);
2. the whole denoised sequence is one action, whose log-probability is the sum over its steps (Eq. 5);
3. so an update passes every chunk K times through the expert, and an entropy bonus keeps the noise alive.

From there on it is PPO, with an action chunk as one macro step (Eqs. 13-15).

Departures from the paper, explained in docs/:
1. The bounds that its Tables 7, 8 call log-variances are standard deviations.
2. V_vlm also reads the proprioception, which pi0's VLM is not given. It is the default, V_expert the paper's.
3. The time limit is not a terminal state: V(final observation) is bootstrapped, unless --no-bootstrap.
4. The critic is clipped separately and sends no gradient into the policy.

    python flow_noise_ppo.py    # on a laptop's CPU, minutes; on both cores, or on several GPUs:
    # torchrun --standalone --nproc_per_node=2 ...; on one GPU: --device cuda --num-envs 1024
"""

import functools
import math
import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from envs import find_simulator, make_envs, select_rows, write_gif
from flags import check_ranges, fail, paper_row, parse
from pi_models import TINY_POLICIES, Policy, Prefix, Prefixes, load_policy
from ranks import add_gradients, gather, join
from runs import Run, refuse_step


@dataclass
class Args:
    # experiment
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of this experiment
    seed: int = 1  # seed of environments, policy noise, minibatches; evaluation has its own fixed seed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is cuda where there is one
    num_threads: int = 1  # CPU threads of torch; at tiny size more than there are idle cores are slower
    run_dir: str = "runs"  # results go to {run_dir}/{env_id}__{exp_name}__{seed}__{time}
    resume: str = ""  # go on with a run: its folder, or "auto", the newest unfinished one if there is one
    track: bool = False  # log to Weights & Biases too, by WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE
    capture_video: bool = False  # write a GIF of the first evaluation episodes at every evaluation
    save_model: bool = True  # save the policy at the end, and every `save_freq` iterations
    save_freq: int = 50  # iterations between checkpoints
    eval_freq: int = 25  # iterations between evaluations by the ODE; 0: first and last only, -1: none

    # environment
    env_id: str = "tabletop"  # environment; an unknown name lists the nearest ones
    model: Literal["tiny", "pi0", "pi05", "gr00t"] = "pi0"  # whose row of paper.toml, together with --env-id
    checkpoint: str = "checkpoints/tabletop-sft"  # policy to start from: a folder, a hub id, or "tiny"
    obs_mode: Literal["rgb", "fast", "state"] = "rgb"  # fast: small, no shadows; state: no pictures
    eval_protocol: Literal["paper", "openpi"] = "paper"  # whose step limits
    max_episode_steps: int | None = None  # of an episode in training, at most the protocol's
    sim_device: Literal["cpu", "cuda"] = "cpu"  # cuda: all of ManiSkill's environments in a batch on a GPU
    num_envs: int = 512  # parallel environments, of all ranks together
    num_steps: int = 2  # action chunks per environment and iteration
    chunk_len: int = 5  # actions executed per chunk, at most the policy's horizon
    partial_reset: bool = True  # begin a new episode when one ends; else idle, masked, to the iteration's end
    total_timesteps: int = 1_000_000  # environment steps, not chunks; the last iteration reaches them

    # optimisation
    learning_rate: float = 3e-4  # of the action expert
    critic_learning_rate: float = 1e-3  # of the value head
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine ends at zero
    lr_warmup: int = 0  # first iterations of the actor in which its learning rate rises
    critic_warmup: int = 2  # first iterations in which only the critic is trained
    gamma: float = 0.95  # discount per chunk
    gae_lambda: float = 0.9  # lambda of GAE, per chunk
    bootstrap: bool = True  # the time limit is worth V(final observation); else it is a failure, an end
    update_epochs: int = 1  # passes over the batch
    num_minibatches: int = 4  # optimiser steps per pass
    micro_batch_size: int = 256  # chunks per backward pass, accumulated over a minibatch; 0: all at once
    prefix_cache_gb: float | None = None  # GiB on the device for encoded observations; else all of them
    host_cache_gb: float | None = None  # GiB in host memory for others; else all. The rest is encoded again
    clip_coef: float = 0.2  # clipping of the ratio; with a critic, of the value's change too
    clip_vloss: bool = True  # clip the value loss
    max_grad_norm: float = 0.5  # gradient norm limit; actor and critic each have it
    target_kl: float | None = None  # end an update early when its approximate KL divergence is above this
    critic: Literal["vlm", "expert"] = "vlm"  # reads the VLM's output, or the expert's (Eq. 16)
    critic_layers: int = 4  # linear layers of the value head
    train: Literal["expert", "expert+lora", "all"] = "expert"  # +lora: with adapters in the VLM (5.5)
    lora_rank: int = 32  # rank of the adapters
    lora_alpha: int = 32  # their scale is alpha / rank

    # algorithm
    denoise_steps: int = 4  # K, integration steps from noise to action
    noise: Literal["sde", "learned"] = "learned"  # of a denoise step: the SDE's (Eq. 9) or a noise head's
    noise_level: float = 0.7  # a, the scale of the SDE's noise (Eq. 9)
    noise_std_min: float = 0.2  # least standard deviation of the learned noise
    noise_std_max: float = 0.6  # greatest standard deviation of the learned noise
    logprob_reduction: Literal["sum", "mean"] = "sum"  # of a chunk's K + 1: Eq. 5, or the authors' code
    ent_coef: float = 0.3  # weight of the entropy bonus, which is per number of the chain


def defaults(env_id: str, model: str) -> Args:
    """Args with the row of paper.toml, or for the tiny policy, which knows the tabletop only, a trial."""
    if env_id.startswith("tabletop"):
        return Args()
    if model == "tiny":
        return Args(checkpoint="tiny", num_envs=2, total_timesteps=1000, eval_freq=-1)
    row = paper_row(env_id, model) or {"checkpoint": ""}  # which has to be given
    return Args(**{name: value for name, value in row.items() if hasattr(Args, name)})


def transition(x: Tensor, velocity: Tensor, delta: float, noise_std: Tensor):
    """Eq. 4: the Gaussian A^{tau+delta} | A^tau around the ODE's step, as wide as the noise head wants it."""
    return x + velocity * delta, noise_std  # (B, H, D) twice


def sde_transition(x: Tensor, velocity: Tensor, tau: Tensor, delta: float, noise_level: float):
    """Eq. 9 in the right clock: the Gaussian A^{tau+delta} | A^tau of an SDE with the ODE's marginals.

    tau = 0 is noise and tau = 1 is the action. The noise pushes x off the flow and the score pulls it back;
    with noise_level 0 this is the ODE's step x + velocity * delta.
    """
    tau = tau[:, None, None]  # (B, 1, 1)
    noise_hat = x - tau * velocity  # the noise that x seems to come from: score = -noise_hat / (1 - tau)
    # Euler-Maruyama. At tau = 0 sigma would be infinite: there the denominator is delta
    sigma = noise_level * torch.sqrt((1 - tau) / tau.clamp(min=delta))
    mu = x + (velocity - sigma**2 / (2 * (1 - tau)) * noise_hat) * delta  # Eq. 9
    std = sigma * math.sqrt(delta)
    return mu, std  # (B, H, D), (B, 1, 1)


def log_prob(x_next: Tensor, mu: Tensor, std: Tensor, chunk_len: int, action_dim: int) -> Tensor:
    """log N(x_next; mu, std) of a chunk: the sum over executed steps and real action dims, not padding."""
    terms = -0.5 * ((x_next - mu) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)  # (B, H, D)
    return terms[:, :chunk_len, :action_dim].sum(dim=(1, 2))  # (B,)


class Agent:
    """The policy as RL sees it: random, and able to say how probable a stored chunk is under its weights."""

    def __init__(self, policy: Policy, args: Args):
        self.policy, self.chunk_len, self.action_dim = policy, args.chunk_len, policy.env_action_dim
        self.K, self.delta, self.noise = args.denoise_steps, 1 / args.denoise_steps, args.noise
        self.noise_level, self.average = args.noise_level, args.logprob_reduction == "mean"
        self.noisy_steps = self.num_stochastic = self.K
        self.refused = self.refused_in_a_row = 0  # optimiser steps
        self.num_decisions = 1  # S, per chunk

    @torch.no_grad()
    def encode(self, obs: dict) -> tuple[Prefix, dict[str, Tensor]]:
        """The prefix, which is all that a frozen VLM has to say, and what it was computed from."""
        inputs = self.policy.preprocess(obs)
        return self.policy.encode(inputs), inputs

    def step(self, prefix: Prefix, x: Tensor, tau: Tensor):
        """The velocity at x, mean and std of the Gaussian that the next x is drawn from, and features."""
        velocity, features = self.policy.velocity(prefix, x, tau)
        if self.noise == "sde":  # the paper's Fig. 8: the noise of flow_sde_ppo.py (Eq. 9)
            gaussian = sde_transition(x, velocity, tau, self.delta, self.noise_level)
        else:
            gaussian = transition(x, velocity, self.delta, self.policy.noise_head(features))
        return velocity, *gaussian, features

    def log_prior(self, x):
        """log N(A^0; 0, I), (B,). No weight changes it, and the ratio does not see it."""
        return log_prob(x, torch.zeros(()), torch.ones(()), self.chunk_len, self.action_dim)

    def joint(self, terms):
        """Of the log-probabilities of a chain their sum (Eq. 5) or mean, (B, 1)."""
        return terms.mean(dim=1, keepdim=True) if self.average else terms.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def act(self, prefix: Prefix, generator: torch.Generator, deterministic=False, x: Tensor = None):
        """Denoise A^0 (B, H, D), x or new noise.

        Returns the chain (B, K+1, H, D), its random steps, their log-prob, and what the expert saw (B, K, W).
        """
        B, device, c = len(prefix.mask), prefix.mask.device, self.policy.config
        denoise_idx = torch.arange(self.noisy_steps, device=device).expand(B, -1)  # every step
        x = torch.randn((B, c.horizon, c.action_dim), generator=generator, device=device) if x is None else x
        chain, logprobs, seen = [x], [self.log_prior(x)], []
        for k in range(self.K):
            tau = torch.full((B,), k / self.K, device=device)
            if deterministic:
                velocity, features = self.policy.velocity(prefix, x, tau)
                x = x + velocity * self.delta  # Eq. 6
            else:
                _, mu, std, features = self.step(prefix, x, tau)
                x = mu + std * torch.randn(x.shape, generator=generator, device=device)  # Eq. 4
                logprobs.append(log_prob(x, mu, std, self.chunk_len, self.action_dim))
            chain.append(x)
            seen.append(features.mean(dim=1))
        logprob = None if deterministic else self.joint(torch.stack(logprobs, dim=1))  # Eq. 5
        return torch.stack(chain, dim=1), denoise_idx, logprob, torch.stack(seen, dim=1)

    def evaluate_actions(self, prefix: Prefix, chain: Tensor, denoise_idx: Tensor):
        """Log-prob, entropy per number and std of stored decisions under the present weights."""
        k = denoise_idx.flatten()  # (B * S,)
        row = torch.arange(len(chain), device=chain.device).repeat_interleave(self.num_stochastic)
        x, x_next, tau = chain[row, k], chain[row, k + 1], k / self.K  # (B * S, H, D) twice, (B * S,)
        _, mu, std, _ = self.step(prefix, x, tau)
        logprob = log_prob(x_next, mu, std, self.chunk_len, self.action_dim)
        entropy = torch.log(std * math.sqrt(2 * math.pi * math.e))[:, : self.chunk_len, : self.action_dim]
        entropy = entropy.mean(dim=(1, 2))  # per number, (B * S,)
        logprob = torch.cat([self.log_prior(chain[:, 0])[:, None], logprob.view_as(denoise_idx)], dim=1)
        return self.joint(logprob), entropy.view_as(denoise_idx).mean(dim=1, keepdim=True), std

    @torch.no_grad()
    def exploration(self, prefix: Prefix, generator: torch.Generator) -> float:
        """Standard deviation of the executed numbers given observation and A^0, from pairs of chunks."""
        chain = self.act(prefix, generator)[0]  # (B, K+1, H, D)
        other = self.act(prefix, generator, x=chain[:, 0])[0]
        difference = (chain - other)[:, -1, : self.chunk_len, : self.action_dim]
        return (0.5 * difference**2).mean().sqrt().item()

    def value(self, prefix: Prefix, features: Tensor = None, generator=None) -> Tensor:
        """V of each decision, (B, S). V_expert reads what the expert saw in `act`, and does not shape it."""
        head = self.policy.value_head
        if self.policy.config.critic == "vlm":
            value = head(torch.cat([prefix.pooled.detach(), prefix.state], dim=1))
            return value[:, None].expand(-1, self.num_decisions)
        values = head(self.act(prefix, generator)[3] if features is None else features)  # (B, K)
        # Eq. 16: V(o) is the mean over the denoising; in the two-layer MDP every step has its V(o, A^tau)
        return values.mean(dim=1, keepdim=True)


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def rollout(agent, envs, seen, batch, generator, run=None):
    """T chunks of every environment, written into the batch: where the two layers of the MDP meet.

    Inside, the agent denoises: its decisions take no environment step, earn nothing and are not discounted
    (Eqs. 11, 12). Outside, the environment executes the finished chunk and pays R_t = sum_j r_{t,j}.
    Every observation is encoded once, here, and its prefix serves all epochs of the update. `seen` is the
    present one, encoded. Returns the next, with success, return and length of the episodes that ended.
    """
    obs, prefix, inputs = seen
    episodes, steps, encode_time, device = [], 0, 0.0, agent.policy.device
    for t in range(len(batch.chain)):
        if run and run.signal:  # to stop
            break
        # -- the inner layer: from noise to an action chunk
        chain, denoise_idx, logprob, features = agent.act(prefix, generator)
        batch.prefixes.put(t, prefix, inputs)
        batch.chain[t], batch.denoise_idx[t], batch.logprob[t] = chain, denoise_idx, logprob
        batch.features[t], batch.value[t] = features, agent.value(prefix, features)

        # -- the outer layer: the chunk in the environment
        actions = agent.policy.postprocess(chain[:, -1], obs)[:, : agent.chunk_len]  # (N, C, action_dim)
        obs, reward, terminated, truncated, info = envs.step_chunk(actions)
        batch.reward[t] = torch.from_numpy(reward.sum(axis=1))
        batch.terminated[t] = torch.from_numpy(terminated)
        batch.truncated[t] = torch.from_numpy(truncated)
        batch.alive[t] = torch.from_numpy(info["alive"])
        done = terminated | truncated
        ended = done & ~info["dropped"]  # not those that a simulator took along when it broke down
        episodes += zip(*(info[key][ended] for key in ("success", "episode_return", "episode_length")))
        steps += int(info["steps"].sum())
        tick = now(device)
        if truncated.any():  # what the time limit cut off is worth V(final observation)
            final, _ = agent.encode(select_rows(info["final_obs"], np.flatnonzero(truncated[done])))
            batch.final_value[t, batch.truncated[t]] = agent.value(final, generator=generator)[:, 0]
        prefix, inputs = agent.encode(obs)
        encode_time += now(device) - tick
    batch.next_value = agent.value(prefix, generator=generator)[:, 0]  # (N,)
    return (obs, prefix, inputs), episodes, steps, encode_time


def compute_advantages(rewards, values, next_value, terminated, truncated, final_values, gamma, gae_lambda):
    """Eq. 13 over chunks. values (T, N, S), next_value (N,), the others (T, N).

    Success ends the return. The time limit does not: V(final observation) stands for what would have come.
    The S decisions of a chunk, with no reward and no discount between them, share its return.
    """
    first = values[..., 0]  # (T, N): the value where the chunk begins
    advantages, last = torch.zeros_like(first), 0.0
    for t in reversed(range(len(rewards))):
        following = first[t + 1] if t + 1 < len(rewards) else next_value
        following = torch.where(truncated[t], final_values[t], following) * ~terminated[t]
        td_error = rewards[t] + gamma * following - first[t]
        last = td_error + gamma * gae_lambda * last * ~(terminated[t] | truncated[t])  # Eq. 13
        advantages[t] = last
    returns = (advantages + first)[..., None].expand_as(values)  # (T, N, S)
    return returns - values, returns


def update(agent, optimizer, batch, args, generator) -> dict[str, float]:
    """Steps on the clipped surrogate (Eqs. 14-15), on the chunks in which an episode was alive."""
    names = ("chain", "denoise_idx", "logprob", "advantages")
    chain, denoise_idx, old_logprob, advantages = (getattr(batch, name).flatten(0, 1) for name in names)
    given = batch.value, batch.returns, batch.features
    old_value, returns, features = (field.flatten(0, 1) for field in given)  # (T * N, S) twice, (T * N, K, W)
    alive = batch.alive.flatten().nonzero().squeeze(1)
    everyone = torch.cat(gather(advantages[alive]))
    advantages = (advantages - everyone.mean()) / (everyone.std(correction=0) + 1e-8)
    learns = optimizer.param_groups[0]["lr"] > 0  # the actor, not while the critic warms up
    clip, logs, num_alive, grad_norm = args.clip_coef, [], sum(gather(len(alive))), torch.tensor(math.nan)
    for _ in range(args.update_epochs):
        order = alive[torch.randperm(len(alive), generator=generator, device=alive.device)]
        epoch_kl = 0.0
        for minibatch in order.tensor_split(min(args.num_minibatches, num_alive)):
            optimizer.zero_grad()
            size = sum(gather(len(minibatch)))  # over all ranks; this one may have none
            parts = [rows for rows in minibatch.split(args.micro_batch_size or len(order)) if len(rows)]
            for rows, seen in batch.prefixes.encoded(agent.policy, parts):
                advantage = advantages[rows]
                logprob, entropy, std = agent.evaluate_actions(seen, chain[rows], denoise_idx[rows])
                logratio = logprob - old_logprob[rows]
                ratio = logratio.exp()  # Eq. 15, (B, S)
                clipped = ratio.clamp(1 - clip, 1 + clip)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()  # Eq. 14
                approx_kl = (ratio - 1) - logratio
                clipfrac = ((ratio - 1).abs() > clip).float()
                value, before = agent.value(seen, features[rows]), old_value[rows]  # (B, S)
                value_loss = (value - returns[rows]) ** 2
                if args.clip_vloss:
                    clipped = before + (value - before).clamp(-clip, clip)
                    value_loss = torch.max(value_loss, (clipped - returns[rows]) ** 2)
                policy_loss = policy_loss - args.ent_coef * entropy.mean()
                loss = (policy_loss if learns else 0) + 0.5 * value_loss.mean()
                (loss * len(rows) / size).backward()
                terms = {"losses/policy_loss": policy_loss, "losses/entropy": entropy, "flow/std_mean": std}
                terms |= {"losses/approx_kl": approx_kl, "losses/clipfrac": clipfrac}
                terms |= {"losses/value_loss": 0.5 * value_loss}
                logs.append((len(rows), {name: term.mean().item() for name, term in terms.items()}))
                epoch_kl += approx_kl.detach().mean().item() * len(rows) / num_alive
            groups = [group["params"] for group in optimizer.param_groups]
            add_gradients(sum(groups, []))
            if refuse_step(agent):
                continue
            grad_norm, *_ = [nn.utils.clip_grad_norm_(group, args.max_grad_norm) for group in groups]
            optimizer.step()
        if args.target_kl is not None and sum(gather(epoch_kl)) > args.target_kl:
            break
    logs = sum(gather(logs), [])
    count = sum(n for n, _ in logs)
    metrics = {name: sum(n * log[name] for n, log in logs) / count for name in logs[0][1]}
    error, spread = (torch.cat(gather(x[alive])).var(correction=0) for x in (returns - old_value, returns))
    metrics |= {"flow/refused_steps": agent.refused}  # since the beginning
    metrics["losses/explained_variance"] = 1 - (error / spread.clamp(min=1e-8)).item()  # all may be equal
    return metrics | {"flow/grad_norm": grad_norm.item()}


@torch.no_grad()
def evaluate(agent, envs, deterministic=True, seed=0, record=0, rank=0, ranks=1) -> dict:
    """One episode from each fixed evaluation state, by the ODE: success, length, return, task, frames."""
    device, c = agent.policy.device, agent.policy.config
    generator = torch.Generator(device)
    states = np.arange(envs.num_eval_states).reshape(len(envs.tasks), -1).T.flatten()  # tasks in turn
    share, results, frames = np.array_split(np.arange(len(states)), ranks)[rank], [], []
    rounds = range(0, len(share), envs.num_envs)
    for start in tqdm(rounds, "evaluation", leave=False, disable=rank > 0 or len(rounds) == 1):
        turn = share[start : start + envs.num_envs]
        chosen = states[turn]
        obs, _ = envs.reset(options={"eval_states": np.resize(chosen, envs.num_envs)})
        alive = np.arange(envs.num_envs) < len(chosen)  # the last round may have environments to spare
        success, length, returned = np.zeros((3, envs.num_envs))
        envs.record = record if start == 0 else 0
        while alive.any():
            rows = np.flatnonzero(alive)
            seen = select_rows(obs, rows)
            prefix = agent.policy.encode(agent.policy.preprocess(seen))
            # A^0 depends on seed, state and step alone: policies are compared on the same noise
            generator.manual_seed(1000 * seed + int(length[rows[0]]))
            noise = torch.randn((len(states), c.horizon, c.action_dim), generator=generator, device=device)
            chain, *_ = agent.act(prefix, generator, deterministic, noise[turn[rows]])
            actions = np.zeros((envs.num_envs, agent.chunk_len, agent.action_dim), np.float32)
            actions[rows] = agent.policy.postprocess(chain[:, -1], seen)[:, : agent.chunk_len]
            obs, _, terminated, truncated, info = envs.step_chunk(actions)
            success[rows], length[rows] = info["success"][rows], info["episode_length"][rows]
            returned[rows] = info["episode_return"][rows]
            alive &= ~(terminated | truncated)
            frames += info.get("frames", [])
        results.append(np.stack([success, length, returned, info["task"]])[:, : len(chosen)])
    success, length, returned, task = np.concatenate(sum(gather(results), []), axis=1)  # (M,) each
    result = {"success": success.astype(bool), "length": length.astype(int), "return": returned}
    return result | {"task": task.astype(int), "frames": frames}


def check(args: Args):
    """The user's mistakes, before anything is built or written."""
    check_ranges(args)
    find_simulator(args.env_id)  # before a checkpoint is downloaded
    batch_size, low, high = args.num_envs * args.num_steps, args.noise_std_min, args.noise_std_max
    odd = f"{batch_size} chunks (num_envs x num_steps) do not divide into {args.num_minibatches} minibatches"
    for wrong, message in [
        (args.noise_level <= 0, "--noise-level must be above 0: without noise there is nothing to explore"),
        (not 0 < low <= high, "--noise-std-min must be above 0 and at most --noise-std-max"),
        (batch_size % args.num_minibatches, odd),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
        (args.track and not find_spec("wandb"), "--track needs Weights & Biases: pip install wandb"),
    ]:
        if wrong:
            fail(message)


def main(args: Args):
    check(args)

    # -- ranks, environments, policy, optimiser
    rank, ranks, device = join(args.device)
    if args.num_envs % ranks:
        fail(f"--num-envs {args.num_envs} cannot be dealt to {ranks} ranks")
    num_envs, seed = args.num_envs // ranks, args.seed + 1_000_003 * rank  # this rank's
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)  # initial weights of the heads
    policy = load_policy(args.checkpoint, device)
    mode = {"obs_mode": args.obs_mode, "protocol": args.eval_protocol, "sim_device": args.sim_device}
    mode["image_size"] = policy.config.image_size
    limit = {"max_episode_steps": args.max_episode_steps}  # of training
    envs = make_envs(args.env_id, num_envs, seed, args.partial_reset, **mode, **limit)
    eval_envs = make_envs(args.env_id, envs.num_eval_envs, seed, False, **mode)
    if not envs.partial_reset and args.num_steps * args.chunk_len < envs.max_episode_steps:
        fail(f"--num-steps {args.num_steps}: too few for a whole episode, {envs.max_episode_steps} steps")
    robot = envs.single_observation_space["state"].shape[0], envs.single_action_space.shape[0]
    if args.checkpoint in TINY_POLICIES and not args.env_id.startswith("tabletop"):  # whose robot it knows
        policy.fit_robot(*robot)
    policy.check_robot(*robot)
    if args.chunk_len > policy.config.horizon:
        fail(f"--chunk-len {args.chunk_len} is larger than the policy's horizon, {policy.config.horizon}")
    policy.fit_prompts(envs.prompts)
    policy.set_trained(args.train, args.lora_rank, args.lora_alpha)
    policy.need_value_head(args.critic, args.critic_layers)
    if args.noise == "learned":
        policy.need_noise_head(args.noise_std_min, args.noise_std_max)
    agent = Agent(policy, args)
    groups = [{"params": policy.actor_parameters()}]
    groups.append({"params": list(policy.value_head.parameters())})
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.01, fused=True)

    # -- separate generators: the environment's own, policy noise, minibatches, and a fixed one in evaluate
    policy_rng, shuffle_rng = (torch.Generator(device).manual_seed(2 * seed + i) for i in range(2))

    # -- where the results go, and where the run begins: at its start, or where it was saved
    run = Run(__file__, args, rank, ranks)
    iteration, global_step = run.saved["iteration"], run.saved["global_step"]
    success_once, episodic_return, episodic_length = run.saved.get("episodes", [float("nan")] * 3)
    success_rate = run.saved.get("success_rate", float("nan"))
    generators = policy_rng, shuffle_rng
    obs = run.restore(policy, optimizer, envs, generators) if run.resumed else envs.reset()[0]
    seen = obs, *agent.encode(obs)
    envs.on_failure = functools.partial(run.save, policy, optimizer)  # when a simulator breaks down

    def log_evaluation():
        result = evaluate(agent, eval_envs, record=6 * args.capture_video, rank=rank, ranks=ranks)
        eval_envs.close()  # ends its processes until the next evaluation
        if args.capture_video and rank == 0:
            frames = [np.hstack(frame) for frame in result["frames"]]
            captions = eval_envs.prompts[: len(eval_envs.tasks)]  # of the columns, in turn
            write_gif(f"{run.folder}/eval_{global_step}.gif", frames, captions)
        run.evaluations.append((global_step, result["success"].mean()))
        return result["success"].mean()

    def storage(*shape, dtype=torch.float32):
        return torch.zeros((args.num_steps, num_envs, *shape), dtype=dtype, device=device)

    S, c, room = agent.num_decisions, policy.config, (args.prefix_cache_gb, args.host_cache_gb)
    batch = SimpleNamespace(
        prefixes=Prefixes(policy, args.num_steps, num_envs, *seen[1:], *room),
        chain=storage(args.denoise_steps + 1, c.horizon, c.action_dim),  # (T, N, K+1, H, D)
        denoise_idx=storage(agent.num_stochastic, dtype=torch.long),
        logprob=storage(S),
        value=storage(S),
        features=storage(args.denoise_steps, c.expert_width),  # that V_expert reads
        reward=storage(),
        final_value=storage(),
        **{name: storage(dtype=torch.bool) for name in ("terminated", "truncated", "alive")},
    )
    if args.eval_freq >= 0 and not run.resumed:
        success_rate = log_evaluation()
    while True:
        # -- between two iterations: a resumed run begins here
        latest = {"episodes": [success_once, episodic_return, episodic_length], "success_rate": success_rate}
        run.remember(envs, generators, iteration=iteration, global_step=global_step, **latest)
        done = global_step >= args.total_timesteps
        if done or (iteration > run.saved["iteration"] and iteration % args.save_freq == 0):
            run.save(policy, optimizer)
        if done:
            break
        began, iteration = now(policy.device), iteration + 1
        rise = min(max(iteration - args.critic_warmup, 0) / (args.lr_warmup + 1), 1)
        cosine = 0.5 * (1 + math.cos(math.pi * global_step / args.total_timesteps))
        for group, lr in zip(optimizer.param_groups, (rise * args.learning_rate, args.critic_learning_rate)):
            group["lr"] = lr * (cosine if args.lr_schedule == "cosine" else 1)
        if iteration > 1 and (policy.vlm_trained or not envs.partial_reset):  # it sees anew, or others
            obs = seen[0] if envs.partial_reset else envs.reset()[0]
            seen = obs, *agent.encode(obs)
        seen, episodes, steps, encode_time = rollout(agent, envs, seen, batch, policy_rng, run)
        if signal := max(gather(run.signal)):  # this iteration is given up
            run.save(policy, optimizer)
            run.stop(signal)
        rolled = now(policy.device)
        given = batch.reward, batch.value, batch.next_value, batch.terminated, batch.truncated
        given += batch.final_value * args.bootstrap, args.gamma, args.gae_lambda
        batch.advantages, batch.returns = compute_advantages(*given)
        metrics = update(agent, optimizer, batch, args, shuffle_rng)
        metrics["flow/exploration"] = agent.exploration(seen[1][:32], torch.Generator(device).manual_seed(0))
        updated = now(policy.device)
        episodes, steps = sum(gather(episodes), []), sum(gather(steps))
        global_step += steps

        # -- logs, evaluation, checkpoint
        if episodes:
            success_once, episodic_return, episodic_length = np.mean(episodes, axis=0)
        charts = {"success_once": success_once, "episodic_return": episodic_return}  # with exploration noise
        charts |= {"episodic_length": episodic_length, "learning_rate": optimizer.param_groups[0]["lr"]}
        charts["SPS"] = steps / (updated - began)
        times = {"rollout": rolled - began - encode_time, "encode": encode_time, "update": updated - rolled}
        metrics |= {f"charts/{k}": v for k, v in charts.items()} | {f"time/{k}": v for k, v in times.items()}
        last = global_step >= args.total_timesteps
        if (last and args.eval_freq >= 0) or (args.eval_freq > 0 and iteration % args.eval_freq == 0):
            success_rate = log_evaluation()
        metrics["eval/success_rate"] = success_rate  # the latest
        run.log(iteration, global_step, metrics)
    envs.close()
    run.close(__doc__.split(":")[0])


if __name__ == "__main__":
    main(parse(Args, defaults))
