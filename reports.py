"""What is reported of results: rates with their interval, the table with its protocol line, the video; and
how a policy was made by flow_sft.py.
"""

import math
import textwrap

import numpy as np

from flags import as_words
from simulators.metaworld import METAWORLD


def wilson(successes, episodes, z=1.959964):
    """95 % interval of a success rate. Unlike rate +- 2 standard errors it holds near 0 and 1 too."""
    rate, scale = successes / episodes, 1 + z**2 / episodes
    middle = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    return max(0.0, middle - half), min(1.0, middle + half)


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


CELL = "{success_rate:.1%} ({successes}/{episodes})"


def group_means(variations):
    """{group: the mean of each policy}, and "mean": that of the groups.

    As in Table 3, every variation of a group has the same weight, and so has every group. The interval is
    Wilson's for as many episodes as the mean is worth: all of them where each variation has as many.
    """

    def mean(results, weights):  # of one policy
        rates, episodes = (np.array([r[key] for r in results]) for key in ("success_rate", "episodes"))
        rate, worth = float(weights @ rates), float(1 / (weights**2 / episodes).sum())
        count = {"successes": sum(r["successes"] for r in results), "episodes": int(episodes.sum())}
        return {"success_rate": rate, **count, "interval": wilson(rate * worth, worth)}

    groups = {}
    for told in variations.values():
        groups.setdefault(told["group"], []).append(told["results"])
    weights = {group: np.full(len(members), 1 / len(members)) for group, members in groups.items()}
    means = {group: [mean(r, weights[group]) for r in zip(*members)] for group, members in groups.items()}
    weight = np.concatenate(list(weights.values())) / len(groups)
    return means | {"mean": [mean(r, weight) for r in zip(*sum(groups.values(), []))]}


def markdown(report):
    """The report as a table, with a line on how it was measured."""
    rows = variation_rows(report) if "variations" in report else task_rows(report)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    table = "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
    return f"{table}\n\nProtocol: {protocol_line(report)}"


def task_rows(report):
    expert, results, p = report["expert_length"], report["results"], report["protocol"]

    def steps(length):
        return "-" if length is None else f"{length:.1f}"

    rows = [("task", "expert length", *(r["name"] for r in results))]
    listed = expert.items() if len(expert) <= 100 else ()  # the others' tasks are in --json
    rows += [(t, steps(length), *(CELL.format(**r["tasks"][t]) for r in results)) for t, length in listed]
    for name in results[0]["classes"]:
        rows.append((f"*{name}*", "", *(CELL.format(**r["classes"][name]) for r in results)))
    lengths = [length for length in expert.values() if length is not None]
    mean = steps(np.mean(lengths) if lengths else None)
    rows.append(("**mean**", mean, *(f"**{CELL.format(**r)}**" for r in results)))
    rows.append(("95% interval", "", *("{:.1%} to {:.1%}".format(*r["interval"]) for r in results)))
    for name, key in ("length of successes", "length"), ("expert's, same states", "expert_length"):
        rows.append((name, "", *(steps(r[key]) for r in results)))
    if p.get("chain_limit"):
        rows.append(("average length of chains", "", *(f"{r['chain_length']:.3f}" for r in results)))
    if p["stochastic"]:
        rows.append(("spread (ODE: over A^0, else given it)", "", *(f"{r['spread']:.2f}" for r in results)))
    return rows


def variation_rows(report):
    """As Table 3 is grouped: training's own distribution, then every group's variations and their mean."""

    def bold(results):
        said = "**{success_rate:.1%}** [{interval[0]:.1%}, {interval[1]:.1%}]"
        return [said.format(**result) for result in results]

    results, variations = report["results"], report["variations"]
    rows = [("success", *(r["name"] for r in results))]
    rows.append((f"{report['protocol']['env_id']}, in distribution", *bold(results)))
    for group, means in report["groups"].items():
        for env_id, other in variations.items():
            if other["group"] == group:
                rows.append((env_id, *(CELL.format(**r) for r in other["results"])))
        title = "mean of the groups" if group == "mean" else group
        rows.append((f"**{title}**", *bold(means)))
    return rows


def protocol_line(report):
    results, p, played = report["results"], report["protocol"], {}  # how: the policies that are played so
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
    states = f"{p['num_states']} fixed states"
    if others := report.get("variations"):
        counts = sorted({p["num_states"], *(other["protocol"]["num_states"] for other in others.values())})
        about += f" and {len(others)} variations of it"
        states = f"{' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} fixed states of each"
    cameras, height, width, _ = p.get("pictures", (0, 0, 0, 0))
    pictures = f"{cameras} of {height} x {width} pixels, " if cameras else ""
    return (
        f"{about}, {p['obs_mode']} observations, {pictures}{states}, at most {limit}, success at any step, "
        f"{'; '.join(played)}, evaluation seed {', '.join(map(str, p['seeds']))}, torch {p['torch']}."
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


def tiny_card(args, policy, found, pairs):
    """The model card of a policy after stage 0."""
    c, millions = policy.config, sum(p.numel() for p in policy.parameters()) / 1e6
    scenes = f"of {args.num_scenes} that are drawn beforehand" if args.num_scenes else "each a new one"
    vision = f" SigLIP is that of `{args.vision}`." if args.vision else ""
    told = ", each action the one that a right aim would have led to" if args.corrections else ""
    return f"""# {args.checkpoint}, pre-trained on {args.env_id}

{c.variant} at laptop size: {millions:.2f} M parameters.
SigLIP ({c.vision_depth} layers, width {c.vision_width}, pictures of {c.image_size} x {c.image_size}),
a language model ({c.depth} layers, width {c.width}, word tokens), an action expert of width {c.expert_width}.

Made by `{changed_flags(args)}`:

1. VLM: {args.vlm_steps} steps of {args.batch_size} random scenes, {scenes}, AdamW, one-cycle
   {args.pretrain_learning_rate}. Regression of where the instruction's source and destination are, with the
   simulator's privileged positions, no actions, no rewards; it stands in for pre-training on the web.
   On 20 batches of other scenes: {found}, where a gripper reaches 0.16.{vision}
2. Action expert: {args.play_steps} flow-matching steps of {args.batch_size} on {pairs} pairs (observation,
   action chunk) of {args.play_episodes} episodes a task of sloppy play: the scripted expert aiming beside its
   targets (normal error, standard deviation {args.sloppiness}) and trying again{told}. It stands in for large
   robot data.
"""


def sft_card(args, pairs, loss):
    """The model card of a policy after SFT."""
    where = {name: getattr(args, name) for name in ("env_id", "obs_mode")}
    return f"""# {args.checkpoint} after few-shot SFT on {args.env_id}

Made by `{changed_flags(args)}`, VLM frozen: {args.num_demos} demonstrations per
task of the scripted expert, {pairs} (observation, action chunk) pairs, initial states drawn with seed
{args.seed}, none of them an evaluation state. {args.total_steps} steps of {args.batch_size}, AdamW, one-cycle
{args.learning_rate}; last loss {loss:.3f}.

Evaluate it with `python evaluate.py {" ".join(as_words(where))} --checkpoints {args.output}`.
"""


def changed_flags(args):
    """The command that made it: the flags that are not as usual."""
    usual = vars(type(args)())
    return " ".join(["python flow_sft.py", *as_words({k: v for k, v in vars(args).items() if v != usual[k]})])
