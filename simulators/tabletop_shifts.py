"""The tabletop's shifts: nine twins of it, each with one thing that its training never shows.

They are grouped as put-on-plate's variants are in the paper's Table 3:

    vision      tabletop_ood_new_table        a checked cloth on the table
                tabletop_ood_lamp             warm light from the upper left, dim at the lower right
                tabletop_ood_noise            every pixel is off, by another number in every picture
    semantics   tabletop_ood_new_words        three other sentences for each instruction
                tabletop_ood_new_colours      pink, teal and purple blocks, which the instructions call so
                tabletop_ood_distractors      a plum block and a dark plate, which cannot be taken, lie about
    execution   tabletop_ood_new_places       the objects stand between their places of training
                tabletop_ood_new_start        the gripper begins left or right of where it ever does
                tabletop_ood_moving_target    after the third step what is to be taken is somewhere else

Instructions, goals, physics and expert are the tabletop's, and so are the scenes, those of an evaluation too:
a policy plays the same episodes but for that one thing. What may differ from episode to episode (the
sentence, the pixels' noise, the place of a distractor) follows from the scene, so that nothing is drawn and a
fixed state is the same episode to the last bit.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from simulators.tabletop import (
    BLOCKS,
    CABINET_Y,
    HANDLE,
    SHADOW,
    TASKS,
    VIEW,
    Tabletop,
    background,
    box,
    disc,
    paint,
)

CELLS = np.stack([np.arange(12) % 4, np.arange(12) // 4], axis=1) * 0.48 - 0.72  # (12, 2): training's places
MOVE_STEP = 3  # after which the target moves, unless it is held by then, which it hardly ever is
CLOTH, CHECKS = np.float32([(214, 222, 226), (128, 152, 160)])
PLUM, DARK_PLATE = np.float32([(96, 30, 60), (60, 76, 84)])
NEW_BLOCKS = np.float32([(255, 150, 190), (0, 150, 150), (110, 40, 170)])
NEW_COLOURS = {"red": "pink", "green": "teal", "blue": "purple"}
NEW_WORDS = {  # for the tasks with that word in their name; {}: the blocks' colours
    "plate": (
        "place the {} block onto the plate",
        "pick up the {} block and put it on the plate",
        "on the plate, put the {} block",
    ),
    "bowl": (
        "place the {} block into the bowl",
        "pick up the {} block and put it in the bowl",
        "in the bowl, put the {} block",
    ),
    "stack": (
        "put the {} block on top of the {} one",
        "pick up the {} block and place it onto the {} block",
        "on the {1} block, stack the {0} one",
    ),
    "drawer": ("pull the drawer open", "pull out the drawer", "grasp the handle and pull"),
    "button": ("push the button", "push the button down", "press down on the button"),
}


# --- vision ---


@functools.cache
def checked_cloth(size):
    """An empty table with a cloth: (1, size, size, 3)."""
    canvas, half = background(size).copy(), (CABINET_Y - 0.06 + 1) / 2  # the cloth ends before the cabinet

    def cloth(x, y, px):
        dark = (np.floor(x / 0.25) + np.floor(y / 0.25)) % 2 == 1
        yield box(x, y + 1 - half, 1, half, px), np.where(dark[..., None], CHECKS, CLOTH)

    paint(canvas, np.zeros((1, 2)), (VIEW, VIEW), cloth)
    return canvas


def under_a_lamp(pictures, seeds):
    far = np.linspace(0, 1, pictures.shape[1])
    brightness = 1.1 - 0.35 * (far[:, None] + far)  # (size, size)
    light = brightness[..., None] * (1, 0.9, 0.75)
    return np.clip(pictures * light, 0, 255).astype(np.uint8)


def with_noise(pictures, seeds):
    noise = [np.random.default_rng(seed).normal(0, 25, pictures.shape[1:]) for seed in seeds]
    return np.clip(pictures + np.stack(noise), 0, 255).astype(np.uint8)


# --- semantics ---


def in_new_words(task):
    words = task.split("_")
    (sentences,) = (NEW_WORDS[word] for word in words if word in NEW_WORDS)
    return [sentence.format(*(word for word in words if word in NEW_COLOURS)) for sentence in sentences]


def with_new_colours(task):
    said = TASKS[task][0]
    for old, new in NEW_COLOURS.items():
        said = said.replace(old, new)
    return [said]


# --- execution ---


def free_places(objects, lot):
    """The cells of training (N, 12, 2): those without an object first, in an order that `lot` chooses."""
    distance = np.linalg.norm(CELLS[:, None] - objects[:, None], axis=-1).min(axis=2)  # (N, 12)
    order = (np.arange(12) + lot[:, None]) % 12 + 12 * (distance < 0.3)
    return CELLS[order.argsort(axis=1)]


def in_new_places(objects, handle_x, gripper):
    """Six new cells, half-way between training's: objects keep their order and their places in the cells."""
    cell = np.linalg.norm(CELLS - objects[:, :, None], axis=-1).argmin(axis=2)  # (N, 6)
    rank = cell.argsort(axis=1).argsort(axis=1)
    new = np.stack([rank % 3, rank // 3], axis=-1) * 0.48 - 0.48
    return objects - CELLS[cell] + new, handle_x, gripper


def from_the_side(objects, handle_x, gripper):
    return objects, handle_x, gripper + np.sign(gripper) * (0.5, 0)  # |x| was at most 0.5


class Shift(NamedTuple):
    """What is another than the tabletop's."""

    group: str  # of Table 3
    table: Callable = background  # size -> the empty table
    camera: Callable = lambda pictures, seeds: pictures
    sentences: Callable = lambda task: [TASKS[task][0]]
    blocks: np.ndarray = BLOCKS  # their colours
    scenes: Callable = lambda *scenes: scenes
    distractors: bool = False
    moves: bool = False


SHIFTS = {
    "tabletop_ood_new_table": Shift("vision", table=checked_cloth),
    "tabletop_ood_lamp": Shift("vision", camera=under_a_lamp),
    "tabletop_ood_noise": Shift("vision", camera=with_noise),
    "tabletop_ood_new_words": Shift("semantics", sentences=in_new_words),
    "tabletop_ood_new_colours": Shift("semantics", sentences=with_new_colours, blocks=NEW_BLOCKS),
    "tabletop_ood_distractors": Shift("semantics", distractors=True),
    "tabletop_ood_new_places": Shift("execution", scenes=in_new_places),
    "tabletop_ood_new_start": Shift("execution", scenes=from_the_side),
    "tabletop_ood_moving_target": Shift("execution", moves=True),
}


class ShiftedTabletop(Tabletop):
    env_ids = list(SHIFTS)
    trials = (("tabletop_ood_distractors", "rgb"),)
    variations = {"tabletop": {env_id: shift.group for env_id, shift in SHIFTS.items()}}

    def __init__(self, env_id, *others):
        super().__init__("tabletop", *others)
        self.env_id, self.shift = env_id, SHIFTS[env_id]
        self.sentences = [self.shift.sentences(task) for task in self.tasks]
        self.prompts = [*(first for first, *_ in self.sentences), *sum((s[1:] for s in self.sentences), [])]
        prompt = gym.spaces.Text(max(map(len, self.prompts)), charset="".join(self.prompts))
        self.single_observation_space["prompt"] = prompt
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.distractors = np.zeros((self.num_envs, 2, 2))

    def lot(self, rows=slice(None)):
        """A number of the scene, (N,) from 0 to 1,600,000, that tells its episodes apart."""
        return (1e6 * (self.handle_x[rows] + 1)).astype(int)

    def get_state(self):
        return super().get_state() | {"distractors": self.distractors.copy()}

    def set_state(self, saved):
        self.distractors[:] = saved["distractors"]
        return super().set_state(saved)

    def _begin(self, rows, task, scenes):
        super()._begin(rows, task, self.shift.scenes(*scenes))
        self.distractors[rows] = free_places(self.objects[rows], self.lot(rows))[:, :2]

    def _observe(self, rows=slice(None)):
        obs, sentences = super()._observe(rows), [self.sentences[task] for task in self.task[rows]]
        obs["prompt"] = [said[lot % len(said)] for said, lot in zip(sentences, self.lot(rows))]
        return obs

    def _step(self, action):
        success = super()._step(action)
        if self.shift.moves:
            source = self.goals[self.task, 0]
            moves = self.alive & ~success & (self.length == MOVE_STEP) & (self.held != source)
            drawer, rows = moves & (source == HANDLE), np.flatnonzero(moves & (source != HANDLE))
            self.handle_x[drawer] -= 0.6 * np.sign(self.handle_x[drawer])
            self.objects[rows, source[rows]] = free_places(self.objects[rows], self.lot(rows))[:, 0]
        return success

    def render(self, size=256, rows=slice(None)):
        canvas = self.shift.table(size).repeat(len(self.held[rows]), axis=0)
        if self.shift.distractors:

            def block(x, y, px):
                yield 0.4 * box(x - 0.02, y + 0.02, 0.12, 0.12, 0.06), SHADOW
                yield box(x, y, 0.12, 0.12, px), PLUM * 0.72
                yield box(x, y, 0.095, 0.095, px), PLUM

            def plate(x, y, px):
                yield 0.35 * disc(x - 0.02, y + 0.03, 0.22, 0.06), SHADOW
                yield disc(x, y, 0.22, px), DARK_PLATE
                yield disc(x, y, 0.15, px), DARK_PLATE * 0.8

            paint(canvas, self.distractors[rows, 0], (0.22, 0.22), block)
            paint(canvas, self.distractors[rows, 1], (0.30, 0.30), plate)
        pictures = self.draw(canvas, rows, self.shift.blocks)
        return self.shift.camera(pictures, 100 * self.lot(rows) + self.length[rows])
