"""Flow-SDE PPO: online RL for flow policies by a two-layer MDP with hybrid ODE-SDE sampling (piRL, 4.2).

A flow policy turns noise A^0 into an action chunk A^1 by integrating a learned velocity in K steps. That is
deterministic, and PPO needs a stochastic policy with a known log-probability. So

1. the ODE is replaced by an SDE with the same marginals, whose steps are Gaussians (`transition`, Eq. 9);
2. a denoise step becomes a decision of the MDP, denoising inside, the environment outside (4.2.2);
3. one random step per chunk is enough: the others stay ODE steps and belong to the environment (4.2.3).

From there on it is PPO, with an action chunk as one macro step (Eqs. 13-15).

Departures from the paper (docs/flow_sde_ppo.md explains each):
1. Eqs. 7-9 are printed in another clock than the paper's own; `transition` is what they must be.
2. V_vlm also reads the proprioception, which pi0's VLM is not given. It is the default, V_expert the paper's.
3. The time limit is not a terminal state: the value of the final observation is bootstrapped.
4. The critic is clipped separately and sends no gradient into the policy.

    python flow_sde_ppo.py                                       # the tabletop on a laptop's CPU, minutes
    python flow_sde_ppo.py --device cuda --num-envs 1024         # one GPU
"""

import csv
import json
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
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import make_envs, select_rows, write_gif
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
    """start a new episode as soon as one ends; else idle, masked, until the next iteration resets all"""
    total_timesteps: int = 820_000
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
    """chunks per forward and backward pass, accumulated over a minibatch; 0: the whole minibatch at once"""
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
    """V_vlm reads the VLM's output, V_expert the expert's along the denoising trajectory (Eq. 16)"""
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
    """Eq. 9 in the right clock: the Gaussian A^{tau+delta} | A^tau of an SDE with the ODE's marginals.

    tau = 0 is noise and tau = 1 is the action. The noise pushes x off the flow and the score pulls it back;
    with noise_level 0 this is the ODE's step x + velocity * delta.
    """
    tau = tau[:, None, None]  # (B, 1, 1)
    noise_hat = x - tau * velocity  # the noise that x seems to come from: score = -noise_hat / (1 - tau)
    if solver == "cps":
        # Flow-CPS: action and noise in the proportions of tau + delta, but part of the noise is new
        action_hat, angle = x + (1 - tau) * velocity, noise_level * math.pi / 2
        mu = (tau + delta) * action_hat + (1 - tau - delta) * math.cos(angle) * noise_hat
        std = (1 - tau - delta) * math.sin(angle)
    else:
        # Euler-Maruyama. At tau = 0 sigma would be infinite: there the denominator is delta
        sigma = noise_level * torch.sqrt((1 - tau) / tau.clamp(min=delta))
        mu = x + (velocity - sigma**2 / (2 * (1 - tau)) * noise_hat) * delta  # Eq. 9
        std = sigma * math.sqrt(delta)
    return mu, std  # (B, H, D), (B, 1, 1)


def log_prob(x_next, mu, std, chunk_len, action_dim):
    """log N(x_next; mu, std) of a chunk: the sum over executed steps and real action dims, not padding."""
    terms = -0.5 * ((x_next - mu) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)  # (B, H, D)
    return terms[:, :chunk_len, :action_dim].sum(dim=(1, 2))  # (B,)


class Agent:
    """The policy as PPO sees it: sample a chunk, rate how probable a stored one is now, value a state."""

    def __init__(self, policy, args):
        self.policy, self.K, self.delta = policy, args.denoise_steps, 1 / args.denoise_steps
        self.noise_level, self.solver, self.hybrid = args.noise_level, args.sde_solver, args.mdp == "hybrid"
        self.chunk_len, self.action_dim = args.chunk_len, policy.env_action_dim
        self.noisy_steps = self.K - (self.solver == "cps")  # the last step of Flow-CPS has no noise
        self.num_decisions = 1 if self.hybrid else self.noisy_steps  # S, per chunk

    @torch.no_grad()
    def act(self, prefix, generator, deterministic=False):
        """Denoise from A^0 ~ N(0, I): chain (B, K+1, H, D), decisions (B, S) and their log-prob (B, S)."""
        B, device, c = len(prefix.mask), prefix.mask.device, self.policy.config
        if self.hybrid:  # one denoise step, drawn for each environment and chunk, is the decision
            denoise_idx = torch.randint(self.noisy_steps, (B, 1), generator=generator, device=device)
        else:  # every step is
            denoise_idx = torch.arange(self.noisy_steps, device=device).expand(B, -1)
        x = torch.randn((B, c.horizon, c.action_dim), generator=generator, device=device)  # A^0 (B, H, D)
        chain, logprobs = [x], []
        for k in range(self.K):
            tau = torch.full((B,), k / self.K, device=device)
            velocity, _ = self.policy.velocity(prefix, x, tau)  # (B, H, D)
            x_next = x + velocity * self.delta  # Eq. 6
            if not deterministic:
                mu, std = transition(x, velocity, tau, self.delta, self.noise_level, self.solver)
                sample = mu + std * torch.randn(x.shape, generator=generator, device=device)  # Eq. 10
                x_next = torch.where((denoise_idx == k).any(dim=1)[:, None, None], sample, x_next)
                logprobs.append(log_prob(x_next, mu, std, self.chunk_len, self.action_dim))
            x = x_next
            chain.append(x)
        logprob = None if deterministic else torch.stack(logprobs, dim=1).gather(1, denoise_idx)
        return torch.stack(chain, dim=1), denoise_idx, logprob

    def evaluate_actions(self, prefix, chain, denoise_idx):
        """Log-prob (B, S), entropy and std of stored decisions under the present weights."""
        k = denoise_idx.flatten()  # (B * S,)
        row = torch.arange(len(chain), device=chain.device).repeat_interleave(self.num_decisions)
        x, x_next, tau = chain[row, k], chain[row, k + 1], k / self.K  # (B * S, H, D) twice, (B * S,)
        velocity, _ = self.policy.velocity(prefix if self.hybrid else prefix[row], x, tau)
        mu, std = transition(x, velocity, tau, self.delta, self.noise_level, self.solver)
        logprob = log_prob(x_next, mu, std, self.chunk_len, self.action_dim)
        entropy = (0.5 * math.log(2 * math.pi * math.e) + torch.log(std)) * self.chunk_len * self.action_dim
        return logprob.view_as(denoise_idx), entropy, std

    def value(self, prefix, chain=None, generator=None):
        """V(o), (B, 1); with V_expert in the two-layer MDP, V(o, A^tau) of each decision, (B, S)."""
        head, B, K = self.policy.value_head, len(prefix.mask), self.K
        if self.policy.config.critic == "vlm":
            value = head(torch.cat([prefix.pooled, prefix.state], dim=1))
            return value[:, None].expand(B, self.num_decisions)
        with torch.no_grad():  # the critic reads the expert's features and does not shape them
            chain = self.act(prefix, generator)[0] if chain is None else chain
            row = torch.arange(B, device=chain.device).repeat_interleave(K)
            tau = torch.arange(K, device=chain.device).repeat(B) / K
            _, features = self.policy.velocity(prefix[row], chain[:, :-1].flatten(0, 1), tau)  # (B * K, H, W)
        values = head(features.mean(dim=1)).view(B, K)
        return values.mean(dim=1, keepdim=True) if self.hybrid else values[:, : self.noisy_steps]  # Eq. 16


def compute_advantages(rewards, values, next_value, terminated, truncated, final_values, gamma, gae_lambda):
    """Eq. 13 over chunks. values (T, N, S), next_value (N,), the others (T, N).

    Success ends the return. The time limit does not: the value of the final observation stands for what
    would have come. Denoise steps inside a chunk carry no reward and no discount, so its S decisions share
    one return, and each is compared with its own value.
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


def update(agent, optimizer, batch, args, generator, train_actor=True):
    """PPO on the chunks in which the episode was alive: clipped surrogate (Eqs. 14-15) and value loss."""
    names = ("chain", "denoise_idx", "logprob", "value", "advantages", "returns")
    chain, denoise_idx, old_logprob, old_value, advantages, returns = (
        getattr(batch, name).flatten(0, 1) for name in names  # (T * N, ...)
    )
    prefix = Prefix(*(field.flatten(0, 1) for field in batch.prefix))
    alive = batch.alive.flatten().nonzero().squeeze(1)
    advantages = (advantages - advantages[alive].mean()) / (advantages[alive].std(correction=0) + 1e-8)
    actor, critic = (group["params"] for group in optimizer.param_groups)
    clip, logs, grad_norm = args.clip_coef, [], torch.zeros(())
    for _ in range(args.update_epochs):
        order = alive[torch.randperm(len(alive), generator=generator, device=alive.device)]
        for minibatch in order.tensor_split(min(args.num_minibatches, len(order))):
            optimizer.zero_grad()
            for rows in minibatch.split(args.micro_batch_size or len(minibatch)):
                seen, advantage, target = prefix[rows], advantages[rows], returns[rows]
                value = agent.value(seen, chain[rows])  # (B, S)
                value_error = (value - target) ** 2
                if args.clip_vloss:
                    value_clipped = old_value[rows] + (value - old_value[rows]).clamp(-clip, clip)
                    value_error = torch.max(value_error, (value_clipped - target) ** 2)
                value_loss = 0.5 * value_error.mean()
                policy_loss = entropy = std = approx_kl = clipfrac = torch.zeros(())
                if train_actor:
                    logprob, entropy, std = agent.evaluate_actions(seen, chain[rows], denoise_idx[rows])
                    logratio = logprob - old_logprob[rows]
                    ratio = logratio.exp()  # Eq. 15, (B, S)
                    clipped = ratio.clamp(1 - clip, 1 + clip)
                    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()  # Eq. 14
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1).abs() > clip).float().mean()
                loss = policy_loss + args.vf_coef * value_loss
                (loss * len(rows) / len(minibatch)).backward()
                terms = (value_loss, policy_loss, entropy, approx_kl, clipfrac, std)
                logs.append([x.mean().item() for x in terms])
            if train_actor:
                grad_norm = nn.utils.clip_grad_norm_(actor, args.max_grad_norm)
            nn.utils.clip_grad_norm_(critic, args.max_grad_norm)
            optimizer.step()
        if args.target_kl is not None and logs[-1][3] > args.target_kl:
            break
    explained = 1 - (returns - old_value)[alive].var() / returns[alive].var()
    names = ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac")
    metrics = {f"losses/{name}": value for name, value in zip(names, np.mean(logs, axis=0))}
    metrics |= {"losses/explained_variance": explained.item(), "flow/std_mean": np.mean(logs, axis=0)[5]}
    return metrics | {"flow/grad_norm": grad_norm.item()}


@torch.no_grad()
def evaluate(agent, envs, deterministic=True, seed=0, record=0):
    """One episode from each fixed evaluation state, by the ODE: success, length, task (M,) and frames."""
    generator = torch.Generator(agent.policy.device).manual_seed(seed)
    states = np.arange(envs.num_eval_states).reshape(len(envs.tasks), -1).T.flatten()  # tasks in turn
    results, frames = [], []
    for start in range(0, len(states), envs.num_envs):
        chosen = states[start : start + envs.num_envs]
        obs, _ = envs.reset(options={"eval_states": np.resize(chosen, envs.num_envs)})
        alive = np.arange(envs.num_envs) < len(chosen)  # the last round may have environments to spare
        success, length = np.zeros((2, envs.num_envs), int)
        envs.record = record if start == 0 else 0
        while alive.any():
            rows = np.flatnonzero(alive)
            seen = select_rows(obs, rows)
            prefix = agent.policy.encode(agent.policy.preprocess(seen))
            chain, _, _ = agent.act(prefix, generator, deterministic)
            actions = np.zeros((envs.num_envs, agent.chunk_len, agent.action_dim), np.float32)
            actions[rows] = agent.policy.postprocess(chain[:, -1], seen)[:, : agent.chunk_len]
            obs, _, terminated, truncated, info = envs.step_chunk(actions)
            success[rows], length[rows] = info["success"][rows], info["episode_length"][rows]
            alive &= ~(terminated | truncated)
            frames += info.get("frames", [])
        results.append(np.stack([success, length, info["task"]])[:, : len(chosen)])
    success, length, task = np.concatenate(results, axis=1)  # (M,) each
    return {"success": success.astype(bool), "length": length, "task": task, "frames": frames}


def main(args):
    # -- the user's mistakes, before anything is written
    batch_size, min_steps = args.num_envs * args.num_steps, 2 if args.sde_solver == "cps" else 1
    num_iterations = args.total_timesteps // max(batch_size * args.chunk_len, 1)
    parts = args.num_minibatches
    for wrong, message in [
        (args.num_envs < 1 or args.num_steps < 1, "--num-envs and --num-steps must be at least 1"),
        (args.denoise_steps < min_steps, f"--denoise-steps must be at least {min_steps} ({args.sde_solver})"),
        (args.noise_level <= 0, "--noise-level must be above 0: without noise there is nothing to explore"),
        (parts < 1 or batch_size % max(parts, 1),
         f"{batch_size} chunks (num_envs x num_steps) are not divisible into {parts} --num-minibatches"),
        (args.chunk_len < 1 or args.update_epochs < 1, "--chunk-len and --update-epochs must be at least 1"),
        (args.critic_layers < 1, "--critic-layers must be at least 1"),
        (args.num_threads < 1 or args.save_freq < 1, "--num-threads and --save-freq must be at least 1"),
        (args.micro_batch_size < 0, "--micro-batch-size must not be negative; 0: a whole minibatch at once"),
        (num_iterations < 1, f"--total-timesteps is less than an iteration, {batch_size * args.chunk_len}"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
    ]:  # fmt: skip
        if wrong:
            fail(message)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    torch.set_num_threads(args.num_threads)
    envs = make_envs(args.env_id, args.num_envs, args.seed, args.partial_reset)
    eval_envs = make_envs(args.env_id, min(envs.num_eval_states, 250), args.seed, partial_reset=False)
    torch.manual_seed(args.seed)  # initial weights of the critic
    policy = load_policy(args.checkpoint, device)
    if args.chunk_len > policy.config.horizon:
        fail(f"--chunk-len {args.chunk_len} is larger than the policy's horizon, {policy.config.horizon}")
    policy.fit_prompts(envs.prompts)
    if (policy.config.critic, policy.config.critic_layers) != (args.critic, args.critic_layers):
        policy.new_value_head(args.critic, args.critic_layers)
    agent = Agent(policy, args)
    optimizer = torch.optim.AdamW(
        [
            {"params": policy.actor_parameters(), "lr": args.learning_rate},
            {"params": list(policy.value_head.parameters()), "lr": args.critic_learning_rate},
        ],
        eps=1e-5, weight_decay=0.01,
    )  # fmt: skip

    # -- where the results go
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    folder = os.path.join(args.run_dir, run_name)
    try:
        os.makedirs(folder)
        with open(os.path.join(folder, "args.json"), "w") as file:
            json.dump(asdict(args), file, indent=1)
    except OSError as error:
        fail(f"--run-dir {args.run_dir} cannot be written: {error.strerror}")
    if args.track:
        import wandb

        wandb.init(project="piRL", name=run_name, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(folder)

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def encode(obs):
        return policy.encode(policy.preprocess(obs))

    def log_evaluation():
        result = evaluate(agent, eval_envs, record=6 if args.capture_video else 0)
        if args.capture_video:
            frames = [np.hstack(frame) for frame in result["frames"]]
            write_gif(f"{folder}/eval_{global_step}.gif", frames, "   |   ".join(eval_envs.prompts[:6]))
        return result["success"].mean()

    # -- separate generators: the environment's own, policy noise, minibatches, and a fixed one in evaluate
    policy_rng, shuffle_rng = (torch.Generator(device).manual_seed(2 * args.seed + i) for i in range(2))
    obs, _ = envs.reset()
    prefix = encode(obs)

    def storage(*shape, dtype=torch.float32):
        return torch.zeros((args.num_steps, args.num_envs, *shape), dtype=dtype, device=device)

    S, c = agent.num_decisions, policy.config
    batch = SimpleNamespace(
        prefix=Prefix(*(storage(*field.shape[1:], dtype=field.dtype) for field in prefix)),
        chain=storage(args.denoise_steps + 1, c.horizon, c.action_dim),  # (T, N, K+1, H, D)
        denoise_idx=storage(S, dtype=torch.long),  # (T, N, S)
        logprob=storage(S), value=storage(S), reward=storage(), final_value=storage(),
        **{name: storage(dtype=torch.bool) for name in ("terminated", "truncated", "alive")},
    )  # fmt: skip
    global_step, curve = 0, []
    success_once = episodic_return = episodic_length = float("nan")
    success_rate = log_evaluation()
    evaluations = [(0, success_rate)]
    table = csv.writer(open(f"{folder}/metrics.csv", "w", buffering=1))
    progress = tqdm(range(1, num_iterations + 1), unit="it")
    for iteration in progress:
        began, encode_time, episodes, step_before = now(), 0.0, [], global_step
        if args.lr_schedule == "cosine":
            for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.critic_learning_rate)):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (iteration - 1) / num_iterations))
        if not args.partial_reset and iteration > 1:
            obs, _ = envs.reset()
            prefix = encode(obs)

        # -- rollout: every observation is encoded once, here, and its prefix serves all epochs of the update
        for t in range(args.num_steps):
            chain, denoise_idx, logprob = agent.act(prefix, policy_rng)
            for buffer, field in zip(batch.prefix, prefix):
                buffer[t] = field
            batch.chain[t], batch.denoise_idx[t], batch.logprob[t] = chain, denoise_idx, logprob
            with torch.no_grad():
                batch.value[t] = agent.value(prefix, chain)
            actions = policy.postprocess(chain[:, -1], obs)[:, : args.chunk_len]  # (N, chunk_len, action_dim)
            obs, reward, terminated, truncated, info = envs.step_chunk(actions)
            batch.reward[t] = torch.from_numpy(reward.sum(axis=1))  # R_t = sum_j r_{t,j}
            batch.terminated[t] = torch.from_numpy(terminated)
            batch.truncated[t] = torch.from_numpy(truncated)
            batch.alive[t] = torch.from_numpy(info["alive"])
            done = terminated | truncated
            episodes += zip(*(info[key][done] for key in ("success", "episode_return", "episode_length")))
            global_step += int(info["steps"].sum())
            tick = now()
            if truncated.any():  # what the time limit cut off is worth V(final observation)
                final = encode(select_rows(info["final_obs"], np.flatnonzero(truncated[done])))
                with torch.no_grad():
                    batch.final_value[t, batch.truncated[t]] = agent.value(final, generator=policy_rng)[:, 0]
            prefix = encode(obs)
            encode_time += now() - tick
        with torch.no_grad():
            next_value = agent.value(prefix, generator=policy_rng)[:, 0]  # (N,)
        rolled = now()

        # -- advantages and update
        batch.advantages, batch.returns = compute_advantages(
            batch.reward, batch.value, next_value, batch.terminated, batch.truncated, batch.final_value,
            args.gamma, args.gae_lambda,
        )  # fmt: skip
        train_actor = iteration > args.critic_warmup
        metrics = update(agent, optimizer, batch, args, shuffle_rng, train_actor)
        updated = now()

        # -- logs, evaluation, checkpoint
        if episodes:
            success_once, episodic_return, episodic_length = np.mean(episodes, axis=0)
        metrics |= {
            "charts/success_once": success_once,  # of the episodes that ended now, with exploration noise
            "charts/episodic_return": episodic_return,
            "charts/episodic_length": episodic_length,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": (global_step - step_before) / (updated - began),
            "time/rollout": rolled - began - encode_time,
            "time/encode": encode_time,
            "time/update": updated - rolled,
        }
        last = iteration == num_iterations
        if last or (args.eval_freq and iteration % args.eval_freq == 0):
            success_rate = log_evaluation()
            evaluations.append((global_step, success_rate))
        metrics["eval/success_rate"] = success_rate  # the latest
        curve.append((global_step, success_once))
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step)
        if iteration == 1:
            table.writerow(["iteration", "global_step", *metrics])
        table.writerow([iteration, global_step, *metrics.values()])
        if args.save_model and (last or iteration % args.save_freq == 0):
            card = f"# {run_name}\n\nFrom {args.checkpoint}, {global_step} steps, see args.json.\n"
            save_policy(policy, f"{folder}/checkpoint", card)
        speed = f"{metrics['charts/SPS']:.0f} steps/s"
        progress.set_postfix_str(f"success {success_once:.3f}, eval {success_rate:.3f}, {speed}")
    writer.close()
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(*zip(*curve), alpha=0.6, label="training episodes (SDE, with exploration noise)")
    axes.plot(*zip(*evaluations), "o-", label="evaluation (ODE, fixed states)")
    axes.set(xlabel="environment steps", ylabel="success rate", ylim=(0, 1), title=run_name)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(f"{folder}/learning_curve.png", dpi=120, bbox_inches="tight")
    print(f"success {evaluations[0][1]:.3f} -> {success_rate:.3f}; results in {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args))
