"""The drawings of the documentation: the networks, the two layers of the MDP, and the tabletop's shifts.

Nothing is measured here; they show what pi_models.py and the scripts' `Agent.act` do, and what
simulators/tabletop_shifts.py draws. Prints the names of the files that it writes.

    python benchmark/draw.py    # seconds; three pictures in docs/
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from envs import find_variations, make_envs

WIDTH = 900  # of a picture in the README, in pixels, which are the units of everything below
INK, FAINT, PAPER = "#22303c", "#8a97a3", "#f4f6f8"
FROZEN, TRAINED, HEAD, CACHED = "#cfe0f3", "#ffd9a8", "#d9ccf0", "#bfe5cf"
NOISY, ODE = "#d1342f", "#66788a"
GREEN, BROWN = "#2f8f5b", "#b35f00"  # edges and words of what is CACHED, and of the time


@dataclass
class Args:
    folder: Path = Path("docs")
    """where the pictures go"""


class Canvas:
    """A sheet with y pointing down, and the few marks that the drawings are made of."""

    def __init__(self, height):
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x, y, words, size=9, color=INK, ha="center", va="center", **more):
        self.axes.text(x, y, words, fontsize=size, color=color, ha=ha, va=va, linespacing=1.35, **more)

    def box(self, x, y, w, h, fill, words="", size=9, edge=INK, lw=1.0, round=6, **more):
        shape = f"round,pad=0,rounding_size={round}"
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, shape, fc=fill, ec=edge, lw=lw, **more))
        self.text(x + w / 2, y + h / 2, words, size)

    def arrow(self, start, end, color=INK, lw=1.3, bend=0.0, style="-|>", **more):
        look = dict(arrowstyle=style, mutation_scale=9, shrinkA=0, shrinkB=0, color=color, lw=lw)
        self.axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **look, **more))

    def line(self, xs, ys, color=INK, lw=1.3, **more):
        self.axes.plot(xs, ys, color=color, lw=lw, solid_capstyle="round", **more)

    def dot(self, x, y, fill="white", edge=INK, size=9, **more):
        self.axes.plot(x, y, "o", ms=size, mfc=fill, mec=edge, mew=1.2, zorder=3, **more)

    def bell(self, x, y, w=22, h=13, color=NOISY):
        at = np.linspace(-1, 1, 40)
        curve = y - h * np.exp(-0.5 * (2.6 * at) ** 2)
        self.axes.fill_between(x + at * w / 2, y, curve, color=color, alpha=0.25, lw=0)
        self.line(x + at * w / 2, curve, color, 1.1)

    def save(self, path, dpi=200):
        self.figure.savefig(path, dpi=dpi)
        print(path)


# --------------------------------------------------------------------------------------------------- networks


def tokens(sheet, x, y, count, fill, words, step=12):
    """A row of tokens with a name under it; the middle of it."""
    for i in range(count):
        sheet.box(x + i * step, y, step - 3, 13, fill, lw=0.8, round=2)
    middle = x + (count * step - 3) / 2
    sheet.text(middle, y + 24, words, 8.5)
    return middle


def attention_matrix(sheet, x, y, names, sees, fills, cell=24):
    """Who (rows) looks at whom (columns)."""
    for j, name in enumerate(names):
        sheet.text(
            x + (j + 0.5) * cell, y - 5, name, 8, ha="left", va="bottom", rotation=40, rotation_mode="anchor"
        )
        sheet.text(x - 6, y + (j + 0.5) * cell, name, 8, ha="right")
        for k in range(len(names)):
            fill = fills[k] if names[k] in sees[name] else "white"
            sheet.axes.add_patch(
                Rectangle((x + k * cell, y + j * cell), cell, cell, fc=fill, ec=FAINT, lw=0.8)
            )


def network(sheet, x, pi05):
    """One policy in a column of 430 pixels."""
    sheet.box(x, 12, 430, 548, PAPER, edge="none", round=10)
    vlm, expert, right = x + 14, x + 226, x + 416
    sheet.text(vlm, 33, "pi0.5" if pi05 else "pi0", 14, ha="left", weight="bold")
    told = (
        ("no state token", "time steers the norms")
        if pi05
        else ("state is a token", "time joins the actions")
    )
    sheet.text(right, 33, f"{told[0]},  {told[1]}", 9, FAINT, ha="right")

    # what comes out
    sheet.box(vlm + 6, 60, 140, 38, HEAD, "critic $V_{vlm}$\nreads the state too", 8.5)
    sheet.arrow((vlm + 76, 150), (vlm + 76, 99))
    sheet.text(vlm + 83, 125, "mean of tokens,\nno gradient", 8, FAINT, ha="left")
    heads = ("velocity $v$", TRAINED), ("noise\nhead: std", HEAD), ("critic\n$V_{expert}$", HEAD)
    for i, (words, fill) in enumerate(heads):
        sheet.box(expert + 64 * i, 60, 62, 38, fill, words, 8)
        sheet.arrow((expert + 64 * i + 31, 150), (expert + 64 * i + 31, 99))
    sheet.text(expert + 127, 125, "no\ngradient", 8, FAINT)

    # the two networks
    sheet.box(vlm, 150, 152, 92, FROZEN, "VLM\nSigLIP + Gemma 2B\n2.9 billion weights", 9.5, lw=1.3)
    size = "0.4 billion weights" if pi05 else "0.3 billion weights"
    sheet.box(expert, 150, right - expert, 92, TRAINED, f"action expert\nGemma 300M\n{size}", 9.5, lw=1.3)
    for i in range(4):
        sheet.arrow((vlm + 152, 168 + 19 * i), (expert, 168 + 19 * i), GREEN, 1.4)
    sheet.box(vlm + 163, 156, 38, 80, CACHED, "keys,\nvalues\nof all\nlayers", 8, edge=GREEN)
    sheet.text(vlm + 182, 251, "cached", 9, GREEN, weight="bold")

    # what goes in
    top = 274
    pictures = tokens(sheet, vlm, top, 8, FROZEN, "pictures")
    prompt = tokens(sheet, vlm + 104, top, 4, FROZEN, "prompt")
    ends = [pictures, prompt]
    start = expert
    if not pi05:
        ends.append(tokens(sheet, expert, top, 1, TRAINED, "state"))
        start += 46
    ends.append(tokens(sheet, start, top, 6, TRAINED, "noisy actions $A^{\\tau}$"))
    for middle in ends:
        sheet.arrow((middle, top - 2), (middle, 243))
    sheet.box(right - 56, top - 6, 56, 25, "white", "time $\\tau$", 8.5, lw=0.8)
    if pi05:
        sheet.arrow((right - 28, top - 6), (right - 28, 243), BROWN, 1.8)
        sheet.text(right - 36, 256, "AdaRMS", 8.5, BROWN, ha="right", weight="bold")
    else:
        sheet.arrow((right - 56, top + 6), (start + 73, top + 6), BROWN, 1.8)
        sheet.text(right - 65, top - 11, "MLP", 8.5, BROWN, weight="bold")
    sheet.text(vlm, 320, "prefix: once per observation", 8.5, FAINT, ha="left", style="italic")
    sheet.text(right, 320, "suffix: once per denoise step", 8.5, FAINT, ha="right", style="italic")

    # who attends to whom
    sheet.line([vlm, right], [340, 340], "#dde3e8", 1)
    names = ["pictures", "prompt", "actions"] if pi05 else ["pictures", "prompt", "state", "actions"]
    sees = {"pictures": names[:2], "prompt": names[:2], "state": names[:3], "actions": names}
    fills = [CACHED, CACHED, TRAINED, TRAINED]
    sheet.text(vlm, 360, "Who attends to whom", 9.5, ha="left", weight="bold")
    attention_matrix(sheet, x + 72, 424, names, sees, fills, 30)
    notes = [
        "A row looks at the filled columns.",
        "The prefix never sees the suffix: its\nkeys and values are the same in all\n"
        "K denoise steps and, if the VLM is\nfrozen, in all epochs of an update.",
        "No state token: some checkpoints\nread the state as words of the\nprompt, others not at all."
        if pi05
        else "The state token does not see the\nactions; they see everything.",
        "The time gives every norm of the\nexpert its scale, shift and gate."
        if pi05
        else "A small MLP mixes the time into\neach action token.",
    ]
    y = 378
    for note in notes:
        sheet.text(x + 220, y, note, 8, ha="left", va="top")
        y += 15 * (note.count("\n") + 1) + 8


def architecture():
    sheet = Canvas(604)
    network(sheet, 12, pi05=False)
    network(sheet, 458, pi05=True)
    x = 20
    for fill, edge, words, width in (
        (FROZEN, INK, "frozen (or LoRA, or trained)", 222),
        (TRAINED, INK, "trained", 92),
        (HEAD, INK, "for RL: one of the critics; noise head (Flow-Noise)", 344),
        (CACHED, GREEN, "kept for all denoise steps", 0),
    ):
        sheet.box(x, 574, 18, 16, fill, edge=edge, lw=0.8, round=3)
        sheet.text(x + 25, 582, words, 9, ha="left")
        x += width
    return sheet


# -------------------------------------------------------------------------------------------------------- MDP


def steps(sheet, xs, y, noisy, bells=True):
    """The denoise steps between the points xs; the noisy ones are wavy, under a bell."""
    for k, (start, end) in enumerate(zip(xs, xs[1:])):
        start, end = start + 8, end - 8
        if k not in noisy:
            sheet.arrow((start, y), (end, y), ODE, 1.5)
            continue
        along = np.linspace(start, end - 8, 60)
        waves = 4.5 * np.sin((along - start) / (end - 8 - start) * 3 * 2 * np.pi)
        sheet.line(along, y + waves, NOISY, 1.6)
        sheet.arrow((end - 9, y), (end, y), NOISY, 1.6)
        if bells:
            sheet.bell((start + end) / 2, y - 12, min(34, end - start), 17)
    for i, x in enumerate(xs):
        sheet.dot(x, y, INK if i == len(xs) - 1 else "white")


def chunk(sheet, x, t, noisy, y_outer=128, y_inner=248):
    """One chunk of 350 pixels: an observation, the denoise steps inside, the executed actions."""
    sheet.box(x - 18, y_inner - 50, 334, 98, "white", edge="#c3ccd4", round=8)
    xs = np.linspace(x + 6, x + 288, 5)
    steps(sheet, xs, y_inner, [noisy])
    for i, at in enumerate(xs):
        sheet.text(at, y_inner + 20, ("0", "1/4", "1/2", "3/4", "1")[i], 8.5, FAINT)
    sheet.text(xs[0] - 12, y_inner + 37, f"fresh noise $A_{t}^0$", 8.5, ha="left")
    sheet.text(xs[4] + 12, y_inner + 37, f"action chunk $A_{t}^1$", 8.5, ha="right")
    middle = (xs[noisy] + xs[noisy + 1]) / 2
    sheet.text(middle, y_inner - 39, "the decision", 8.5, NOISY, weight="bold")

    sheet.dot(x, y_outer, "white", size=27)
    sheet.text(x, y_outer, f"$o_{t}$", 11 if len(t) == 1 else 9.5, zorder=4)
    sheet.arrow((x, y_outer + 19), (x, y_inner - 51), INK, 1.1, linestyle=(0, (3, 2)))
    sheet.text(x + 8, y_outer + 42, "every step sees it", 8.5, FAINT, ha="left")
    sheet.arrow((xs[4], y_inner - 8), (xs[4], y_outer + 12), INK, 1.3)
    for i in range(5):
        sheet.box(xs[4] - 84 + 18 * i, y_outer - 9, 15, 18, TRAINED, lw=0.8, round=2)
    sheet.text(xs[4] - 92, y_outer, "execute", 8.5, FAINT, ha="right")
    sheet.arrow((xs[4] - 42, y_outer - 12), (xs[4] - 42, y_outer - 34), GREEN, 1.6)
    sheet.text(xs[4] - 42, y_outer - 45, f"reward $R_{t}$", 9.5, GREEN, weight="bold")
    sheet.arrow((xs[4] + 8, y_outer), (x + 331, y_outer), INK, 1.3)
    sheet.text(xs[4] + 24, y_outer - 13, "$\\gamma$", 12, GREEN)


def variant(sheet, x, name, command, noisy, decisions, told):
    """One of three ways to make decisions of denoise steps, 284 pixels wide."""
    sheet.box(x, 352, 284, 224, PAPER, edge="none", round=10)
    sheet.text(x + 14, 373, name, 10.5, ha="left", weight="bold")
    sheet.text(x + 14, 391, command, 8, FAINT, ha="left", family="monospace")
    xs = np.linspace(x + 24, x + 260, 5)
    steps(sheet, xs, 436, noisy)
    for start, end in decisions:
        left, right = xs[start] + 9, xs[end] - 9
        sheet.line([left, left, right, right], [447, 453, 453, 447], NOISY, 1.2)
    for i, (title, words) in enumerate(zip(("decision", "noise", "update", "gradient"), told)):
        sheet.text(x + 14, 486 + 24 * i, title, 8.5, FAINT, ha="left", va="baseline")
        sheet.text(x + 78, 486 + 24 * i, words, 8.5, ha="left", va="baseline")


def two_layer_mdp():
    sheet = Canvas(618)
    sheet.box(12, 12, 876, 328, PAPER, edge="none", round=10)
    title = "Two layers: denoise steps inside, environment steps outside"
    sheet.text(26, 35, title, 12, ha="left", weight="bold")
    for y, name, told in (
        (128, "outer layer", "environment:\nreward, discount,\nGAE per chunk"),
        (248, "inner layer", "denoising, K = 4:\nno reward,\nno discount"),
    ):
        sheet.text(26, y - 28, name, 9.5, ha="left", weight="bold")
        sheet.text(26, y + 8, told, 8.5, FAINT, ha="left")
    chunk(sheet, 172, "t", 1)
    chunk(sheet, 522, "{t+1}", 2)
    sheet.text(866, 126, "...", 14)
    sheet.text(26, 322, "flow time: 0 is noise, 1 is the action", 8.5, FAINT, ha="left")
    sheet.text(
        838, 322, "hybrid sampling: the noisy step is drawn anew for every chunk", 8.5, FAINT, ha="right"
    )

    each = [(k, k + 1) for k in range(4)]
    variant(
        sheet,
        12,
        "Hybrid (the paper's, as above)",
        "--mdp hybrid --noisy-last-step",
        [1],
        [(1, 2)],
        (
            "the noisy step: one ratio",
            "scheduled (Eq. 9), in one step",
            "1 expert pass per chunk",
            "of that step, about 1/K of all",
        ),
    )
    variant(
        sheet,
        308,
        "Two-layer (the default)",
        "flow_sde_ppo.py",
        range(3),
        each[:3],
        (
            "each noisy step: K - 1 ratios",
            "scheduled (Eq. 9), not in the last",
            "K - 1 expert passes per chunk",
            "of these steps",
        ),
    )
    variant(
        sheet,
        604,
        "One-layer (Flow-Noise)",
        "flow_noise_ppo.py",
        range(4),
        [(0, 4)],
        (
            "the whole chain: one joint ratio",
            "learned (Eq. 4), in all steps",
            "K expert passes per chunk",
            "of all steps",
        ),
    )

    y = 597
    sheet.arrow((26, y), (62, y), ODE, 1.5)
    sheet.text(70, y, "ODE step, deterministic", 9, ha="left")
    steps(sheet, [248, 300], y + 3, [0], bells=False)
    sheet.text(314, y, "noisy step, a Gaussian", 9, ha="left")
    sheet.line([478, 478, 514, 514], [y - 3, y + 3, y + 3, y - 3], NOISY, 1.2)
    sheet.text(522, y, "one decision of PPO", 9, ha="left")
    sheet.box(672, y - 9, 15, 18, TRAINED, lw=0.8, round=2)
    sheet.text(694, y, "action of the robot", 9, ha="left")
    return sheet


def shifts(state=18, steps=4):
    """One evaluation state of the tabletop and of its variations, after some steps of the expert."""
    sheet, tile = Canvas(430), 168
    for i, (env_id, group) in enumerate({"tabletop": "training", **find_variations("tabletop")}.items()):
        envs = make_envs(env_id, 1, 0, partial_reset=False)
        obs, _ = envs.reset(options={"eval_states": [state]})
        for _ in range(steps):
            envs.step(envs.expert_action())
        x, y = 12 + i % 5 * (tile + 9), 12 + i // 5 * (tile + 46)
        sheet.axes.imshow(envs.render(2 * tile)[0], extent=(x, x + tile, y + tile, y))
        sheet.text(x, y + tile + 11, env_id.removeprefix("tabletop_ood_"), 9, ha="left", weight="bold")
        sheet.text(x + tile, y + tile + 11, group, 8, FAINT, ha="right")
        sheet.text(x, y + tile + 27, obs["prompt"][0], 7, ha="left")
    return sheet


def main(args):
    (args.folder / "frames").mkdir(parents=True, exist_ok=True)
    architecture().save(args.folder / "architecture.png")
    two_layer_mdp().save(args.folder / "two_layer_mdp.png")
    shifts().save(args.folder / "frames" / "tabletop_shifts.png", dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
