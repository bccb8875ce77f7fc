"""Supervised fine-tuning of a flow policy on a few demonstrations: where the RL scripts start from.

The flow-matching loss (Eq. 3): draw noise and a time, stand on the straight line between the noise and the
expert's action chunk, and regress the line's direction. The VLM is frozen, so every observation is encoded
once and only the action expert runs in the training loop. Demonstrations are of the scripted expert, from
initial states drawn with --seed; the fixed evaluation states come from another generator.

Stage 0 (--pretrain) makes the policy that SFT starts from, checkpoints/tiny. It stands in for pi0's own
pre-training, in two parts:
1. The VLM learns to connect words with places in a picture, as PaliGemma did from the web. On random scenes
   small heads read where the instruction's source and destination are, from nothing but what the action
   expert will see of the VLM, and where every object is, from the picture's tokens. This uses the
   simulator's privileged positions, no action, no reward, and the heads are thrown away. It can get stuck,
   and RL on a blind VLM goes nowhere: weights are only saved if nine of ten targets are found within
   --max-error, where the gripper reaches 0.16.
2. The action expert learns how the gripper moves, from sloppy play: the scripted expert aiming beside its
   targets and trying again, failed episodes included. What pi0 had from large robot data. With --corrections
   it learns what the expert would do from there, not what it did.

    python flow_sft.py                 # SFT: checkpoints/tiny -> checkpoints/tabletop-sft, under a minute
    python flow_sft.py --pretrain      # stage 0: checkpoints/tiny, about 20 minutes

MetaWorld draws slowly, so there the VLM sees the same scenes again: benchmark/metaworld_pixels.sh.
Both for the other model family, GR00T N1.5, with --checkpoint tiny-gr00t (and --vision tiny in stage 0).
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from envs import find_simulator, make_envs, select_rows
from flags import check_effects, check_ranges, fail, read
from layouts import check_output
from pi_models import TINY_POLICIES, load_policy, new_policy, save_policy, word_tokenizer
from reports import sft_card, tiny_card
from simulators.metaworld import METAWORLD


@dataclass
class Args:
    seed: int = 0
    """seed of scenes, demonstrations, initial weights and batches"""
    env_id: str = "tabletop"
    """where the scripted expert demonstrates"""
    checkpoint: str = "tiny"
    """policy to start from: a folder, "tiny" or "tiny-gr00t"; with --pretrain, which of these two to make"""
    obs_mode: Literal["rgb", "fast", "state"] = "rgb"
    """fast: pictures without shadows, of the policy's size; state: numbers only, all that there are"""
    num_envs: int = 64
    """parallel environments that demonstrate; in stage 0 on the tabletop the batch says how many"""
    output: str = ""
    """folder to write; default checkpoints/{env_id}-sft (-gr00t), with --pretrain the checkpoint's own"""
    num_demos: int = 5
    """demonstrations per task"""
    total_steps: int = 300
    """optimiser steps"""
    batch_size: int = 128
    """observations per step"""
    learning_rate: float = 3e-4
    """peak of the one-cycle schedule"""
    num_threads: int = 1
    """CPU threads of torch"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu or cuda"""
    pretrain: bool = False
    """run stage 0 instead: the tiny VLM, then the action expert"""
    vision: Literal["", "tiny", "tiny-gr00t"] = ""
    """stage 0: the policy whose vision tower to take, as it is; else it learns from nothing"""
    vlm_steps: int = 3000
    """stage 0: optimiser steps of the VLM"""
    num_scenes: int = 0
    """stage 0: pictures that the VLM learns from again and again; 0: each only once, where drawing is free"""
    scene_chunks: int = 3
    """stage 0: pictures from the beginning of an episode, a chunk apart, then a new one begins"""
    max_error: float = 0.08
    """stage 0: nothing is saved if one target in ten is further off; where a gripper reaches 0.16"""
    image_size: int = 32
    """stage 0: pixels of a picture's side"""
    patch_size: int = 8
    """stage 0: pixels of a patch's side"""
    play_steps: int = 2000
    """stage 0: optimiser steps of the action expert"""
    play_episodes: int = 40
    """stage 0: sloppy episodes per task"""
    sloppiness: float = 0.25
    """stage 0: standard deviation of the aim, on a table 2 wide; blocks are 0.24 wide"""
    corrections: bool = False
    """stage 0: play is learned as the expert, asked at each step, would have gone on with the right aim"""
    play_stride: int = 1
    """stage 0: actions from an observation of play to the next; drawing may be most of its time"""
    pretrain_learning_rate: float = 1e-3
    """stage 0: peak of the one-cycle schedules"""


def flow_matching_loss(policy, prefix, actions, generator):
    """Eq. 3: E || v(x^tau, o) - (A - noise) ||^2 with x^tau = tau A + (1 - tau) noise."""
    noise = torch.randn(actions.shape, generator=generator).to(actions.device)  # (B, H, D)
    # the checkpoints' law of t = 1 - tau, Beta(1.5, 1), by inverting its distribution function t^1.5
    t = torch.rand(len(actions), generator=generator) ** (1 / 1.5) * 0.999 + 0.001
    tau = (1 - t).to(actions.device)  # (B,)
    x = tau[:, None, None] * actions + (1 - tau[:, None, None]) * noise
    velocity, _ = policy.velocity(prefix, x, tau)
    return F.mse_loss(velocity, actions - noise)


def collect_demonstrations(envs, num_demos, horizon, sloppiness=0.0, rng=None, corrections=False, stride=1):
    """`num_demos` expert episodes per task, as pairs of an observation and the next `horizon` actions.

    A sloppy expert aims beside its targets by a normal error, redrawn every ten steps; failures count too.
    Its actions go where it happens to aim, so a hand that has drifted is seen to drift on; `corrections` are
    the actions of a right aim from wherever the sloppy one has led.
    """
    observations, chunks, count = [], [], dict.fromkeys(range(len(envs.tasks)), 0)
    progress = tqdm(range(num_demos * len(count)), desc="episodes", mininterval=1)
    while min(count.values()) < num_demos:
        obs, _ = envs.reset()
        seen, told, alive, aim_error = [], [], np.ones(envs.num_envs, bool), 0.0
        while alive.any():
            if sloppiness and len(told) % 10 == 0:
                aim_error = rng.normal(0, sloppiness, envs.targets().shape)
            action = envs.expert_action(aim_error)  # (N, D)
            seen += [] if len(told) % stride else [obs]
            told.append(envs.expert_action() if corrections else action)
            envs.draws = len(told) % stride == 0
            obs, _, terminated, truncated, info = envs.step_chunk(action[:, None])
            ended = terminated | truncated
            for n in np.flatnonzero(ended if sloppiness else terminated):
                if count[info["task"][n]] < num_demos:
                    count[info["task"][n]] += 1
                    progress.update()
                    rest = [a[n] for a in told + told[-1:] * (horizon - 1)]  # the last action is repeated
                    observations += [{k: v[n] for k, v in o.items()} for o in seen]
                    chunks += [np.stack(rest[i : i + horizon]) for i in range(0, len(told), stride)]
            alive &= ~ended
    return stack(observations), np.stack(chunks)


def stack(observations):
    """One observation of many from a list of them."""
    columns = {k: [o[k] for o in observations] for k in observations[0]}
    return {k: v if k == "prompt" else np.stack(v) for k, v in columns.items()}


def finetune(policy, obs, actions, steps, learning_rate, batch_size, generator):
    """Train the expert; the frozen VLM's part is computed once."""
    with torch.no_grad():
        prefix = policy.encode(policy.preprocess(obs))
    targets = policy.normalize_actions(actions)  # (M, H, action_dim)
    optimizer = torch.optim.AdamW(policy.actor_parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    progress = tqdm(range(steps), desc="action expert", mininterval=1)
    for _ in progress:
        rows = torch.randint(len(targets), (batch_size,), generator=generator)
        loss = flow_matching_loss(policy, prefix[rows], targets[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.actor_parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"loss {loss.item():.3f}")
    return loss.item()


def draw_scenes(envs, scene_chunks, rng):
    """Observations without an end, and where source and destination, and everything, are in them."""
    step, (obs, _) = 0, envs.reset()
    while True:
        yield obs, envs.targets(), envs.places().reshape(envs.num_envs, -1).astype(np.float32)
        step += 1
        if step % scene_chunks:  # as they look in the middle of an episode: the expert with a heavy tremor
            action = envs.expert_action()
            noise = rng.normal(0, 0.5, (envs.num_envs, rng.integers(2, 9), action.shape[1]))
            obs, *_ = envs.step_chunk(action[:, None] + noise)
        else:
            obs, _ = envs.reset()


def repeat_scenes(scenes, rounds, batch_size, rng):
    """Batches without an end, from scenes that are drawn once."""
    drawn = []
    for _ in tqdm(range(rounds), desc="scenes", mininterval=1):
        obs, targets, places = next(scenes)
        drawn += [({k: v[n] for k, v in obs.items()}, *told) for n, told in enumerate(zip(targets, places))]
    while True:
        observations, *told = zip(*(drawn[i] for i in rng.integers(len(drawn), size=batch_size)))
        yield stack(observations), *map(np.stack, told)


def pretrain_vlm(policy, scenes, fresh, args):
    """Stage 0, part 1. Returns how far guesses are from source and destination of fresh scenes (M, 2)."""

    def head(width, out):
        return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, out))

    def read(obs):
        """What the action expert sees, the deepest last, and what V_vlm reads: (B, width) each."""
        inputs = policy.preprocess(obs)
        prefix = policy.encode(inputs, pool=True)
        return [*prefix.read, prefix.pooled], policy.embed_images(inputs["images"]).mean(dim=1)

    def off(guesses, targets):
        """Distances (B, 2) of what is guessed from the deepest that the expert sees."""
        return (guesses[-2].detach().cpu() - torch.from_numpy(targets)).unflatten(1, (2, -1)).norm(dim=2)

    obs, targets, places = next(scenes)
    widths = [x.shape[1] for x in read(obs)[0]]
    goal_heads = nn.ModuleList(head(width, targets.shape[1]) for width in widths)
    scene_head = head(policy.config.width, places.shape[1])
    learns = [part for part in policy.vlm_modules if not (args.vision and part is policy.vision_tower)]
    modules = [*learns, goal_heads, scene_head]
    parameters = [p.requires_grad_() for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.pretrain_learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.pretrain_learning_rate, args.vlm_steps)
    progress = tqdm(range(args.vlm_steps), desc="VLM", mininterval=1)
    for step in progress:
        if step:
            obs, targets, places = next(scenes)
        known, patches = read(obs)
        guesses = torch.stack([head(x) for head, x in zip(goal_heads, known)])  # (heads, B, W)
        goals = torch.from_numpy(targets).to(policy.device).expand_as(guesses)
        seen, scene = scene_head(patches), torch.from_numpy(places).to(policy.device)  # (B, numbers) twice
        loss = F.smooth_l1_loss(guesses, goals, beta=0.05) + F.smooth_l1_loss(seen, scene, beta=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            progress.set_postfix_str(f"median error {off(guesses, targets).median():.3f}")
    errors = []
    with torch.no_grad():
        for _ in range(20):
            obs, targets, _ = next(fresh)
            errors.append(off([head(x) for head, x in zip(goal_heads, read(obs)[0])], targets))
    return torch.cat(errors)


def action_statistics(obs, actions):
    """Of the states and of the executed actions, those that a chunk begins with."""

    def statistics(x):
        std = x.std(0).clip(0.1)  # few may hardly move
        found = {"mean": x.mean(0), "std": std, "min": x.min(0), "max": x.max(0)}
        return {name: numbers.tolist() for name, numbers in found.items()}

    return {"state": statistics(obs["state"]), "actions": statistics(actions[:, 0])}


def pretrain(args):
    """Stage 0: a policy from random weights, the VLM first, then the action expert on top of it."""
    num_envs, num_players = (args.num_envs,) * 2 if args.num_scenes else (args.batch_size, 256)
    mode = {"obs_mode": args.obs_mode, "image_size": args.image_size}
    envs = make_envs(args.env_id, num_envs, args.seed, **mode)
    policy = new_policy(args.checkpoint, image_size=args.image_size, patch_size=args.patch_size)
    policy.to(args.device)
    policy.fit_robot(*(envs.single_observation_space["state"].shape + envs.single_action_space.shape))
    others = [task["instruction"] for task in METAWORLD.values()]
    policy.tokenizer_json = word_tokenizer(envs.prompts + others)
    policy.fit_prompts(envs.prompts)
    if args.vision:  # SigLIP in both families
        policy.vision_tower.load_state_dict(load_policy(args.vision).vision_tower.state_dict())
    rng = np.random.default_rng(args.seed)
    scenes = fresh = draw_scenes(envs, args.scene_chunks, rng)
    if args.num_scenes:
        scenes = repeat_scenes(fresh, -(-args.num_scenes // num_envs), args.batch_size, rng)
    errors = pretrain_vlm(policy, scenes, fresh, args)
    envs.close()
    p90, within = errors.quantile(0.9).item(), (errors < 0.1).all(dim=1).float().mean().item()
    found = f"median error {errors.median():.3f}, p90 {p90:.3f}, both targets within 0.1 in {within:.1%}"
    if p90 >= args.max_error:
        fail(f"the VLM is stuck ({found}); nothing saved, try another --seed or more --vlm-steps")
    for module in policy.vlm_modules:
        module.requires_grad_(False)

    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    envs = make_envs(args.env_id, num_players, args.seed + 1000, partial_reset=False, **mode)
    sloppy = args.sloppiness, rng, args.corrections, args.play_stride
    play = collect_demonstrations(envs, args.play_episodes, policy.config.horizon, *sloppy)
    rows = rng.permutation(len(play[1]))[:20000]  # bounds the memory of the cached keys and values
    obs, actions = select_rows(play[0], rows), play[1][rows]
    policy.stats = action_statistics(obs, actions)
    finetune(policy, obs, actions, args.play_steps, args.pretrain_learning_rate, args.batch_size, generator)
    save_policy(policy, args.output, tiny_card(args, policy, found, len(rows)))


def check(args):
    """The user's mistakes, before anything is built or trained."""
    check_ranges(args)
    check_effects(args, Args())
    choices, simulator = " or ".join(TINY_POLICIES), find_simulator(args.env_id)
    changed = {name for name, value in vars(args).items() if value != getattr(Args, name)}
    stage_0 = {"vision", "vlm_steps", "play_steps", "play_episodes", "sloppiness", "pretrain_learning_rate"}
    stage_0 |= {"num_scenes", "scene_chunks", "max_error", "image_size", "patch_size"}
    stage_0 |= {"corrections", "play_stride"}
    stage_1 = {"num_demos", "total_steps", "learning_rate"} | ({"num_envs"} if not args.num_scenes else set())
    for name in sorted(changed & (stage_1 if args.pretrain else stage_0)):
        fail(f"--{name.replace('_', '-')} has no effect {'with' if args.pretrain else 'without'} --pretrain")
    for wrong, message in [
        (
            args.pretrain and not hasattr(simulator, "targets"),
            "--pretrain: tabletop, MetaWorld and LIBERO-Goal's experts only",
        ),
        (args.pretrain and args.checkpoint not in TINY_POLICIES, f"--pretrain makes {choices} only"),
        (args.image_size % args.patch_size, "--image-size must be a multiple of --patch-size"),
        (not hasattr(simulator, "expert_action"), f"{args.env_id} has no scripted expert"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
    ]:
        if wrong:
            fail(message)
    check_output("--output", args.output)


def main(args):
    family = args.checkpoint.removeprefix("tiny") if args.checkpoint in TINY_POLICIES else ""
    usual = args.checkpoint if args.pretrain else f"{args.env_id}-sft{family}"
    args = replace(args, output=args.output or f"checkpoints/{usual}")
    check(args)
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    if args.pretrain:
        return pretrain(args)
    policy = load_policy(args.checkpoint, args.device)
    mode = {"obs_mode": args.obs_mode, "image_size": policy.config.image_size}
    envs = make_envs(args.env_id, args.num_envs, args.seed, partial_reset=False, **mode)
    fits = args.checkpoint in TINY_POLICIES and args.env_id.split("_")[0] != "tabletop"  # is made to
    if not fits:
        policy.check_robot(*(envs.single_observation_space["state"].shape + envs.single_action_space.shape))
    obs, actions = collect_demonstrations(envs, args.num_demos, policy.config.horizon)
    envs.close()
    if fits:
        policy.fit_robot(obs["state"].shape[1], actions.shape[2], action_statistics(obs, actions))
    policy.fit_prompts(envs.prompts)
    generator = torch.Generator().manual_seed(args.seed)
    loss = finetune(policy, obs, actions, args.total_steps, args.learning_rate, args.batch_size, generator)
    save_policy(policy, args.output, sft_card(args, len(actions), loss))


if __name__ == "__main__":
    main(read(Args))
