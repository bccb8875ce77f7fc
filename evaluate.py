"""Evaluation of checkpoints on the environment's fixed states: a table per task, the protocol, and a video.

A policy is evaluated by the ODE (Eq. 6): a chunk starts from seeded noise A^0 and nothing else is random.
On LIBERO these are its 500 initial states, on MetaWorld 50 seeds a task (MT50, ML45: 10), of which Table 4's
classes are reported too, on SIMPLER every layout, on put-on-plate about 320 episodes, as many of each
instruction, on CALVIN 1,000 chains of instructions: len-k is the share with at least k solved in a row, and
their sum the average length.
With `--variations` the same policies also play what training never showed, in the groups of Table 3: the
tabletop's nine shifts, put-on-plate's twelve variants. A group's mean has its interval.
With `--stochastic` the same states are also played with the noise that RL explores with; the difference is
the train-eval gap of the paper's Table 6, and a row says how wide that noise is (`spreads`).
Every state is one episode; success at any step of it is success.
K, the length of a chunk and the noise are those that a checkpoint was trained with (its args.json), else the
defaults for the environment (paper.toml), unless a flag says otherwise; the protocol line says which.

    python evaluate.py                                                     # checkpoints/tabletop-sft
    python evaluate.py --checkpoints checkpoints/tabletop-sft runs/.../checkpoint --capture-video demo.gif
    python evaluate.py --checkpoints checkpoints/tabletop-sft runs/.../checkpoint --variations
    python evaluate.py --checkpoints runs/.../checkpoint --stochastic --noise learned --mdp two-layer
    python evaluate.py --checkpoints FOLDER --env-id libero_goal --eval-protocol openpi --device cuda
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

import cards
import flow_sde_ppo
from envs import find_simulator, find_variations, make_envs, write_gif
from flags import check_effects, check_ranges, fail, possible, read
from flow_sde_ppo import Agent, evaluate
from pi_models import load_policy
from reports import draw_video, group_means, markdown, summarize
from simulators.calvin import chain_limit


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ("checkpoints/tabletop-sft",)
    """folders of the policies to compare"""
    labels: tuple[str, ...] = ()
    """their names in the table and the video; default: the folders' names"""
    env_id: str = "tabletop"
    """environment; an unknown name lists the nearest ones"""
    obs_mode: Literal["rgb", "fast", "state"] = "rgb"
    """fast: pictures without shadows, of the policies' size; state: numbers, no pictures"""
    variations: bool = False
    """also the out-of-distribution variations of it, as in Table 3: of tabletop and maniskill_25main"""
    eval_protocol: Literal["paper", "openpi"] = "paper"
    """whose step limits"""
    sim_device: Literal["cpu", "cuda"] = "cpu"
    """cuda: all of ManiSkill's environments in a batch on a GPU"""
    num_envs: int = 16
    """simulators at once; the tabletop has its own number"""
    seeds: tuple[int, ...] = (0,)
    """seeds of the evaluation's noise, whose episodes are pooled; training evaluates with seed 0"""
    stochastic: bool = False
    """play every state with noise as well, as the rollouts of training do"""
    json: str = ""
    """file for all the numbers"""
    records: str = ""
    """file for a line of JSON per episode: policy, env_id, seed, task, state, success, length, return"""
    capture_video: str = ""
    """GIF to write: a row per checkpoint, six tasks, each from the first of its states"""
    card: bool = False
    """write a model card, README.md, into the checkpoint's folder, with the curve of its run and a GIF"""
    upload: str = ""
    """OWNER/NAME on the Hugging Face hub: push the folder with its card there"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one"""
    num_threads: int = 1
    """CPU threads of torch; at tiny size more threads than idle cores are several times slower"""
    chunk_len: int | None = None
    """actions executed per chunk, at most the policy's horizon (None, here and below: see above)"""
    denoise_steps: int | None = None
    """K, integration steps from noise to action"""
    noise: Literal["sde", "learned"] | None = None
    """the SDE's, or that of the checkpoint's noise head (this one and the next four are for --stochastic)"""
    noise_level: float | None = None
    """a, the scale of the SDE's noise"""
    sde_solver: Literal["euler", "cps", "exponential"] | None = None
    """Euler-Maruyama (Eq. 9), Flow-CPS, or Eq. 9's SDE integrated exactly"""
    noisy_last_step: bool | None = None
    """may the last denoise step have noise?"""
    mdp: Literal["hybrid", "two-layer"] | None = None
    """noise in one random denoise step of a chunk, or in every one"""


SAMPLER = ("chunk_len", "denoise_steps", "noise", "noise_level", "sde_solver", "noisy_last_step", "mdp")


def sampler(args, checkpoint, policy):
    """How a checkpoint is played: the values of SAMPLER, and in words who chose them."""
    chosen = vars(flow_sde_ppo.defaults(args.env_id, policy.config.variant))
    chosen, source = {name: chosen[name] for name in SAMPLER}, f"defaults for {args.env_id}"
    for file in (policy.folder / "args.json", policy.folder.parent / "args.json"):
        if file.is_file():
            try:
                told = dict(json.loads(file.read_text()))
            except (ValueError, TypeError) as error:
                fail(f"{file} cannot be read: {error}")
            if "logprob_reduction" in told:  # Flow-Noise, which has noise in every step
                told |= {"mdp": "two-layer", "noisy_last_step": True}
            told = {name: told[name] for name in SAMPLER if name in told}
            for name, value in told.items():
                if not possible(flow_sde_ppo.Args, name, value):
                    fail(f"{file} cannot be read: {name} is {value!r}")
            chosen, source = chosen | told, "as it was trained"
            break
    flags = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    chosen = SimpleNamespace(**chosen | flags)
    if flags:
        source = ", ".join([source, *(f"--{name.replace('_', '-')}" for name in flags)])
    smallest = 1 if chosen.sde_solver == "euler" else 2  # the others have no noise in the last step
    for wrong, message in [
        (chosen.chunk_len < 1, "--chunk-len must be at least 1"),
        (chosen.denoise_steps < smallest, f"--denoise-steps must be at least {smallest}"),
        (args.stochastic and chosen.noise_level <= 0, "--noise-level must be above 0 with --stochastic"),
        (chosen.sde_solver == "cps" and chosen.noise_level > 1, "--noise-level must be at most 1 (cps)"),
        (
            chosen.chunk_len > policy.config.horizon,
            f"--chunk-len {chosen.chunk_len}: the horizon of {checkpoint} is {policy.config.horizon}",
        ),
        (
            args.stochastic and chosen.noise == "learned" and policy.noise_head is None,
            f"--noise learned: {checkpoint} has no noise head, it was not trained with learned noise",
        ),
    ]:
        if wrong:
            fail(message)
    return chosen, source


def play_expert(envs):
    """Episode lengths (tasks, states) of the tabletop's expert, which reads the simulator's own positions."""
    envs.reset(options={"eval_states": np.arange(envs.num_eval_states)})
    info = {"steps": np.ones(1)}
    while info["steps"].any():
        *_, info = envs.step_chunk(envs.expert_action()[:, None])
    return info["episode_length"].reshape(len(envs.tasks), -1)


@torch.no_grad()
def spreads(agent, envs):
    """Standard deviations of the executed numbers: by the ODE, over A^0; and with noise, given A^0.

    In units of the demonstrations', over the first chunks of the fixed states, from pairs of chunks.
    """
    states = np.arange(envs.num_eval_states).reshape(len(envs.tasks), -1).T.flatten()  # tasks in turn
    obs, _ = envs.reset(options={"eval_states": np.resize(states, envs.num_envs)})
    prefix = agent.policy.encode(agent.policy.preprocess(obs))
    generator = torch.Generator(agent.policy.device).manual_seed(0)
    ends = (agent.act(prefix, generator, deterministic=True)[0][:, -1] for _ in "ab")
    a, b = (x[:, : agent.chunk_len, : agent.action_dim] for x in ends)
    return (0.5 * (a - b) ** 2).mean().sqrt().item(), agent.exploration(prefix, generator)


def play(args, envs, players, filmed):
    """Every policy on an environment: the report, a line for each episode, and the frames of a video or None.

    players: (label, checkpoint, policy, what `sampler` says) of each.
    """
    num_states, limit, expert = envs.num_eval_states, chain_limit(envs.env_id), None
    if envs.env_id.startswith("tabletop"):
        expert = play_expert(make_envs(envs.env_id, num_states, 0, partial_reset=False))
    columns = min(6, envs.num_envs)  # episodes of the first round, of tasks evenly
    shown = np.linspace(0, min(max(len(envs.tasks), 6), envs.num_envs) - 1, columns)
    shown = np.ceil(shown).astype(int)
    results, episodes, rows = [], [], []
    for label, checkpoint, policy, (chosen, source) in players:
        policy.fit_prompts(envs.prompts)
        agent, played = Agent(policy, chosen), {"sampler": vars(chosen), "sampler_source": source}
        wide = spreads(agent, envs) if args.stochastic else (None, None)
        for ode in (True, False)[: 1 + args.stochastic]:
            kind = "ODE" if ode else "SDE" if chosen.noise == "sde" else "learned noise"
            name = f"{label}, {kind}" if args.stochastic else label
            print(
                f"evaluating {name} on {envs.env_id}: {num_states} episodes, seeds {args.seeds}", flush=True
            )
            record = shown[-1] + 1 if filmed and ode else 0
            runs = []
            for i, seed in enumerate(args.seeds):
                runs.append(evaluate(agent, envs, ode, seed, 0 if i else record))
                if limit:
                    runs[-1]["solved"] = runs[-1]["return"].astype(int)
                if args.records:
                    episodes += records(runs[-1], envs, name, seed)
            summary = summarize(runs, expert, envs.tasks)
            told = {"name": name, "checkpoint": checkpoint, "deterministic": ode, "spread": wide[not ode]}
            results.append(told | played | summary)
            if record:
                title = f"{label}: success in {summary['success_rate']:.1%} of {summary['episodes']} episodes"
                film = (frame[shown].reshape(-1, 128, 2, 128, 2, 3) for frame in runs[0]["frames"])
                halves = [pairs.mean(axis=(2, 4)) for pairs in film]
                rows.append((title, np.uint8(halves), runs[0]["success"][shown], runs[0]["length"][shown]))
    envs.close()
    protocol = asdict(args) | {"env_id": envs.env_id, "num_states": num_states, "chain_limit": limit}
    protocol |= {"max_episode_steps": envs.max_episode_steps, "about": getattr(envs, "about", "")}
    protocol["pictures"] = envs.single_observation_space["images"].shape
    protocol["torch"] = torch.__version__
    means = [None] * len(envs.tasks) if expert is None else expert.mean(axis=1).tolist()
    report = {"protocol": protocol, "expert_length": dict(zip(envs.tasks, means)), "results": results}
    prompts = [envs.prompts[task] for task in runs[0]["task"][shown]]
    return report, episodes, draw_video(rows, prompts) if rows else None


def records(run, envs, policy, seed):
    """A dictionary for each episode of a result of `evaluate`, which plays the tasks in turn."""
    tasks = [envs.tasks[i] for i in run["task"]]
    states = np.arange(len(tasks)) // len(envs.tasks)
    columns = tasks, states.tolist(), *(run[key].tolist() for key in ("success", "length", "return"))
    names, told = ("task", "state", "success", "length", "return"), {"policy": policy, "env_id": envs.env_id}
    return [told | {"seed": seed} | dict(zip(names, row)) for row in zip(*columns)]


def build(args, env_id, image_size):
    mode = {"obs_mode": args.obs_mode, "protocol": args.eval_protocol, "sim_device": args.sim_device}
    mode["image_size"] = image_size
    envs = make_envs(env_id, args.num_envs, 0, partial_reset=False, **mode)
    if envs.num_eval_envs != args.num_envs:  # the tabletop's: a state gets the same noise as in training
        envs = make_envs(env_id, envs.num_eval_envs, 0, partial_reset=False, **mode)
    return envs


def main(args):
    # -- the user's mistakes
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    gif = args.capture_video
    check_ranges(args)
    check_effects(args, Args())
    for wrong, message in [
        (not args.checkpoints or not args.seeds, "--checkpoints and --seeds need at least one value"),
        (len(args.labels) not in (0, len(args.checkpoints)), "--labels: give one per checkpoint"),
        (len({*args.seeds}) < len(args.seeds), "--seeds: each only once, or its episodes count twice"),
        (gif and not gif.endswith(".gif"), f"--capture-video {gif}: the name must end in .gif"),
        (args.records and args.records == args.json, "--records and --json must be two files"),
        (device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
    ]:
        if wrong:
            fail(message)
    card = cards.check(args) if args.card or args.upload else ""
    gif = gif or (card and os.path.join(os.path.dirname(card), cards.GIF))
    torch.set_num_threads(args.num_threads)
    groups = find_variations(args.env_id) if args.variations else {}
    find_simulator(args.env_id)  # before a checkpoint is downloaded
    policies = [load_policy(checkpoint, device) for checkpoint in args.checkpoints]
    size = max(policy.config.image_size for policy in policies)
    envs, *others = (build(args, env_id, size) for env_id in (args.env_id, *groups))  # before hours
    samplers = [sampler(args, *pair) for pair in zip(args.checkpoints, policies)]
    for policy in policies:
        policy.check_robot(*(envs.single_observation_space["state"].shape + envs.single_action_space.shape))
    for path in filter(None, (args.json, args.records, gif, card)):
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(0, "it is a folder")
            open(f"{path}.tmp", "wb").close()
            os.remove(f"{path}.tmp")
        except OSError as error:
            fail(f"{path} cannot be written: {error.strerror}")

    # -- episodes
    names = [path.rstrip("/").removesuffix("/checkpoint").split("/")[-1] for path in args.checkpoints]
    players = list(zip(args.labels or names, args.checkpoints, policies, samplers))
    report, episodes, frames = play(args, envs, players, filmed=bool(gif))
    for other in others:
        told, more, _ = play(args, other, players, filmed=False)
        report.setdefault("variations", {})[other.env_id] = {"group": groups[other.env_id]} | told
        episodes += more
    if others:
        report["groups"] = group_means(report["variations"])

    # -- results
    print(f"\n{markdown(report)}\n")
    lines = "".join(f"{json.dumps(episode)}\n" for episode in episodes)
    for path, text in (args.json, json.dumps(report, indent=1)), (args.records, lines):
        if path:
            Path(f"{path}.tmp").write_text(text)
            os.replace(f"{path}.tmp", path)
    if gif:
        write_gif(gif, frames)
        print(f"video: {gif}")
    if card:
        cards.write(args, policies[0], samplers[0][0], markdown(report), gif)


if __name__ == "__main__":
    main(read(Args))
