"""Evaluation of checkpoints on the environment's fixed states: a table per task, the protocol, and a video.

A policy is evaluated by the ODE (Eq. 6): a chunk starts from seeded noise A^0 and nothing else is random.
On LIBERO these are its 500 initial states, on MetaWorld 50 seeds a task (MT50, ML45: 10), of which Table 4's
classes are reported too, on SIMPLER every layout, on put-on-plate about 320 episodes, as many of each
instruction, on CALVIN 1,000 chains of instructions: len-k is the share with at least k solved in a row, and
their sum the average length.
With `--stochastic` the same states are also played with the noise that RL explores with; the difference is
the train-eval gap of the paper's Table 6, and a row says how wide that noise is (`spreads`).
Every state is one episode; success at any step of it is success.
K, the length of a chunk and the noise are those that a checkpoint was trained with (its args.json), else the
defaults for the environment (paper.toml), unless a flag says otherwise; the protocol line says which.

    python evaluate.py                                                     # checkpoints/tabletop-sft
    python evaluate.py --checkpoints checkpoints/tabletop-sft runs/.../checkpoint --capture-video demo.gif
    python evaluate.py --checkpoints runs/.../checkpoint --stochastic --noise learned --mdp two-layer
    python evaluate.py --checkpoints FOLDER --env-id libero_goal --eval-protocol openpi --device cuda
"""

import json
import math
import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

import cards
import flow_sde_ppo
from envs import make_envs, write_gif
from flags import check_effects, check_ranges, fail, possible, read
from flow_sde_ppo import Agent, evaluate
from pi_models import load_policy
from simulators.calvin import chain_limit
from simulators.metaworld import METAWORLD


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ("checkpoints/tabletop-sft",)
    """folders of the policies to compare"""
    labels: tuple[str, ...] = ()
    """their names in the table and the video; default: the folders' names"""
    env_id: str = "tabletop"
    """environment; an unknown name lists the nearest ones"""
    obs_mode: Literal["rgb", "fast", "state"] = "rgb"
    """fast: pictures without shadows; state: numbers, no pictures"""
    eval_protocol: Literal["paper", "openpi"] = "paper"
    """whose step limits"""
    num_envs: int = 16
    """simulators at once; the tabletop has its own number"""
    seeds: tuple[int, ...] = (0,)
    """seeds of the evaluation's noise, whose episodes are pooled; training evaluates with seed 0"""
    stochastic: bool = False
    """play every state with noise as well, as the rollouts of training do"""
    json: str = ""
    """file for all the numbers"""
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
    for file in (Path(checkpoint, "args.json"), Path(checkpoint).parent / "args.json"):
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


def wilson(successes, episodes, z=1.959964):
    """95 % interval of a success rate. Unlike rate +- 2 standard errors it holds near 0 and 1 too."""
    rate, scale = successes / episodes, 1 + z**2 / episodes
    middle = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    return max(0.0, middle - half), min(1.0, middle + half)


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


def summarize(runs, expert, tasks):
    """What is reported of results of `evaluate`, one a seed, and of the expert's lengths (tasks, states).

    A run of chains also has "solved": how many instructions of each.
    """
    success, length, task = (np.concatenate([r[key] for r in runs]) for key in ("success", "length", "task"))
    lengths = None if expert is None else np.tile(expert.T.flatten(), len(runs))  # in the order of `evaluate`

    def count(x):
        return {"success_rate": float(x.mean()), "successes": int(x.sum()), "episodes": x.size}

    classes = {}  # of MetaWorld, where several tasks are played
    for name in ("easy", "medium", "hard", "very hard") if len(tasks) > 1 else ():
        chosen = [i for i, t in enumerate(tasks) if METAWORLD.get(t, {}).get("difficulty") == name]
        classes |= {name: count(success[np.isin(task, chosen)])} if chosen else {}
    solved = np.concatenate([r["solved"] for r in runs]) if "solved" in runs[0] else None
    if solved is not None:
        classes = {f"len-{k}": count(solved >= k) for k in range(1, 6)}
    return count(success) | {
        "interval": wilson(int(success.sum()), success.size),
        "length": float(length[success].mean()) if success.any() else None,  # of the successful episodes
        # from the same states
        "expert_length": float(lengths[success].mean()) if expert is not None and success.any() else None,
        "tasks": {name: count(success[task == i]) for i, name in enumerate(tasks)},
        "classes": classes,
        "chain_length": None if solved is None else float(solved.mean()),
    }


def markdown(report):
    """The report as a table, with a line on how it was measured."""
    expert, results, p = report["expert_length"], report["results"], report["protocol"]
    cell = "{success_rate:.1%} ({successes}/{episodes})".format

    def steps(length):
        return "-" if length is None else f"{length:.1f}"

    rows = [("task", "expert length", *(r["name"] for r in results))]
    listed = expert.items() if len(expert) <= 100 else ()  # the others' tasks are in --json
    rows += [(t, steps(length), *(cell(**r["tasks"][t]) for r in results)) for t, length in listed]
    rows += [(f"*{c}*", "", *(cell(**r["classes"][c]) for r in results)) for c in results[0]["classes"]]
    lengths = [length for length in expert.values() if length is not None]
    mean = steps(np.mean(lengths) if lengths else None)
    rows.append(("**mean**", mean, *(f"**{cell(**r)}**" for r in results)))
    rows.append(("95% interval", "", *("{:.1%} to {:.1%}".format(*r["interval"]) for r in results)))
    for name, key in ("length of successes", "length"), ("expert's, same states", "expert_length"):
        rows.append((name, "", *(steps(r[key]) for r in results)))
    if p.get("chain_limit"):
        rows.append(("average length of chains", "", *(f"{r['chain_length']:.3f}" for r in results)))
    if p["stochastic"]:
        rows.append(("spread (ODE: over A^0, else given it)", "", *(f"{r['spread']:.2f}" for r in results)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    table = "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
    played = {}  # how: the policies that are played so
    for result in (r for r in results if r["deterministic"]):
        x = result["sampler"]
        how = f"chunks of {x['chunk_len']}, K = {x['denoise_steps']} ({result['sampler_source']}), "
        how += "deterministic ODE"
        if p["stochastic"]:
            level = f"{x['sde_solver']}, level {x['noise_level']}" if x["noise"] == "sde" else "learned noise"
            how += f" and with noise ({x['mdp']}, {level})"
        played.setdefault(how, []).append(result["name"].removesuffix(", ODE"))
    played = [how if len(played) == 1 else f"{how} ({', '.join(who)})" for how, who in played.items()]
    limit = p.get("chain_limit") or f"{p['max_episode_steps']} steps ({p['eval_protocol']}'s limit)"
    about = f"{p['env_id']} ({p['about']})" if p.get("about") else p["env_id"]
    return (
        f"{table}\n\nProtocol: {about}, {p['obs_mode']} observations, {p['num_states']} fixed states, "
        f"at most {limit}, {'; '.join(played)}, "
        f"evaluation seed {', '.join(map(str, p['seeds']))}, torch {p['torch']}."
    )


def draw_video(rows, prompts):
    """Frames of rows (title, pictures (T, columns, tile, tile, 3), success, length) under their prompts."""
    from PIL import Image, ImageDraw, ImageFont

    small, large, tile = ImageFont.load_default(13), ImageFont.load_default(16), rows[0][1].shape[2]
    lefts = range(4, (tile + 4) * len(prompts), tile + 4)
    tops = range(74, 74 + (tile + 52) * len(rows), tile + 52)  # a title above each row, a result below
    blank = Image.new("RGB", (lefts[-1] + tile + 4, tops[-1] + tile + 26), "white")
    draw = ImageDraw.Draw(blank)
    for left, prompt in zip(lefts, prompts):
        text = textwrap.fill(prompt, 19)
        draw.multiline_text((left + tile // 2, 24), text, "black", small, "mm", align="center")
    for top, (title, *_) in zip(tops, rows):
        draw.text((4, top - 12), title, "black", large, "lm")
    frames = [blank.copy() for _ in range(max(max(length) for *_, length in rows))]
    for t, frame in enumerate(frames):
        draw = ImageDraw.Draw(frame)
        for top, (_, pictures, *results) in zip(tops, rows):
            for left, picture, success, length in zip(lefts, pictures[min(t, len(pictures) - 1)], *results):
                colour, text = ("green", f"done in {length} steps") if success else ("firebrick", "not done")
                if t + 1 < length:
                    colour, text = "gray", f"step {t + 1}"
                frame.paste(Image.fromarray(picture), (left, top))
                draw.rectangle((left, top + tile, left + tile - 1, top + tile + 20), fill=colour)
                draw.text((left + tile // 2, top + tile + 10), text, "white", small, "mm")
    # one palette for all frames: what does not move is the same in each of them, and costs nothing
    palette = Image.fromarray(np.vstack([np.asarray(frame) for frame in frames[::-8]])).quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB") for frame in frames]
    return np.stack([*frames, *frames[-1:] * 20])


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
        (device == "cuda" and not torch.cuda.is_available(), "--device cuda: torch finds no GPU here"),
    ]:
        if wrong:
            fail(message)
    card = cards.check(args) if args.card or args.upload else ""
    gif = gif or (card and os.path.join(os.path.dirname(card), cards.GIF))
    torch.set_num_threads(args.num_threads)
    mode = {"obs_mode": args.obs_mode, "protocol": args.eval_protocol}
    envs = make_envs(args.env_id, args.num_envs, 0, partial_reset=False, **mode)
    if envs.num_eval_envs != args.num_envs:  # the tabletop's: a state gets the same noise as in training
        envs = make_envs(args.env_id, envs.num_eval_envs, 0, partial_reset=False, **mode)
    num_states = envs.num_eval_states
    policies = [load_policy(checkpoint, device) for checkpoint in args.checkpoints]
    samplers = [sampler(args, *pair) for pair in zip(args.checkpoints, policies)]
    for policy in policies:
        policy.check_robot(*(envs.single_observation_space["state"].shape + envs.single_action_space.shape))
        policy.fit_prompts(envs.prompts)
    for path in filter(None, (args.json, gif, card)):
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(0, "it is a folder")
            open(f"{path}.tmp", "wb").close()
            os.remove(f"{path}.tmp")
        except OSError as error:
            fail(f"{path} cannot be written: {error.strerror}")

    # -- episodes
    names = [path.rstrip("/").removesuffix("/checkpoint").split("/")[-1] for path in args.checkpoints]
    expert = None  # it is the tabletop's
    if args.env_id.startswith("tabletop"):
        expert = play_expert(make_envs(args.env_id, num_states, 0, partial_reset=False))
    columns = min(6, envs.num_envs)  # episodes of the first round, of tasks evenly
    shown = np.linspace(0, min(max(len(envs.tasks), 6), envs.num_envs) - 1, columns)
    shown = np.ceil(shown).astype(int)
    results, rows = [], []
    for label, checkpoint, policy, chosen in zip(args.labels or names, args.checkpoints, policies, samplers):
        agent, played = Agent(policy, chosen[0]), {"sampler": vars(chosen[0]), "sampler_source": chosen[1]}
        wide = spreads(agent, envs) if args.stochastic else (None, None)
        for ode in (True, False)[: 1 + args.stochastic]:
            kind = "ODE" if ode else "SDE" if chosen[0].noise == "sde" else "learned noise"
            name = f"{label}, {kind}" if args.stochastic else label
            print(f"evaluating {name}: {num_states} episodes, seeds {args.seeds}", flush=True)
            record = shown[-1] + 1 if gif and ode else 0
            runs = []
            for i, seed in enumerate(args.seeds):
                runs.append(evaluate(agent, envs, ode, seed, 0 if i else record))
                if chain_limit(args.env_id):
                    runs[-1]["solved"] = runs[-1]["return"].astype(int)
            summary = summarize(runs, expert, envs.tasks)
            told = {"name": name, "checkpoint": checkpoint, "deterministic": ode, "spread": wide[not ode]}
            results.append(told | played | summary)
            if record:
                title = f"{label}: success in {summary['success_rate']:.1%} of {summary['episodes']} episodes"
                film = (frame[shown].reshape(-1, 128, 2, 128, 2, 3) for frame in runs[0]["frames"])
                halves = [pairs.mean(axis=(2, 4)) for pairs in film]
                rows.append((title, np.uint8(halves), runs[0]["success"][shown], runs[0]["length"][shown]))

    # -- results
    protocol = {**asdict(args), "num_states": num_states, "max_episode_steps": envs.max_episode_steps}
    protocol |= {"chain_limit": chain_limit(args.env_id), "about": getattr(envs, "about", "")}
    protocol["torch"] = torch.__version__
    envs.close()
    means = [None] * len(envs.tasks) if expert is None else expert.mean(axis=1).tolist()
    expert_length = dict(zip(envs.tasks, means))
    report = {"protocol": protocol, "expert_length": expert_length, "results": results}
    print(f"\n{markdown(report)}\n")
    if args.json:
        with open(f"{args.json}.tmp", "w") as file:
            json.dump(report, file, indent=1)
        os.replace(f"{args.json}.tmp", args.json)
    if gif:
        write_gif(gif, draw_video(rows, [envs.prompts[task] for task in runs[0]["task"][shown]]))
        print(f"video: {gif}")
    if card:
        cards.write(args, policies[0], samplers[0][0], markdown(report), gif)


if __name__ == "__main__":
    main(read(Args))
