"""The built-in simulator: ten instructions for a gripper on a table, all environments computed at once.

It needs nothing but NumPy, draws 32 x 32 pictures in microseconds and has a scripted expert, so a policy can
be pre-trained, fine-tuned and trained by RL on a laptop in minutes. An evaluation has 50 fixed scenes per
task, training draws random ones. The table is [-1, 1]^2 with y up, the camera looks straight down.
"""

import functools

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from vector_envs import check_actions, chosen_states, select_rows

RED, GREEN, BLUE, PLATE, BOWL, BUTTON, HANDLE, NOTHING = *range(7), -1
TASKS = {  # name: (instruction, source, destination)
    "red_plate": ("put the red block on the plate", RED, PLATE),
    "green_plate": ("put the green block on the plate", GREEN, PLATE),
    "blue_plate": ("put the blue block on the plate", BLUE, PLATE),
    "red_bowl": ("put the red block in the bowl", RED, BOWL),
    "green_bowl": ("put the green block in the bowl", GREEN, BOWL),
    "blue_bowl": ("put the blue block in the bowl", BLUE, BOWL),
    "stack_red_green": ("stack the red block on the green", RED, GREEN),
    "stack_blue_red": ("stack the blue block on the red", BLUE, RED),
    "open_drawer": ("open the drawer", HANDLE, HANDLE),
    "press_button": ("press the button", BUTTON, BUTTON),
}
STEP_SIZE = 0.15  # of the gripper, per step
FINGER_SPEED = 0.5  # fingers: 0 open, 1 closed
GRASP_RADIUS = 0.16
HANDLE_RADIUS = 0.18  # also the button's
PLACE_RADIUS = 0.22
HANDLE_Y = 0.70  # of the closed drawer
DRAWER_LENGTH, DRAWER_OPEN = 0.40, 0.30
EVAL_STATES, EVAL_SEED = 50, 20240  # fixed evaluation states per task
VIEW = 1.05  # the picture shows [-VIEW, VIEW]^2
CABINET_Y = 0.80  # the cabinet's front
TABLE, EDGE, CABINET = np.float32([(196, 178, 150), (120, 98, 74), (112, 78, 52)])
DRAWER, INSIDE, BOWL_INSIDE = np.float32([(150, 106, 70), (58, 40, 30), (140, 70, 10)])
WHITE, ORANGE, MAGENTA = np.float32([(250, 250, 252), (245, 140, 20), (200, 40, 220)])
YELLOW, CYAN, DARK, SHADOW = np.float32([(250, 214, 60), (130, 255, 255), (44, 46, 52), (40, 30, 20)])
BLOCKS = np.float32([(222, 40, 40), (40, 170, 60), (40, 90, 230)])  # red, green, blue
STATE = "objects handle_x gripper fingers opening held order pressed task state length alive success".split()


def sample_scenes(rng, n):
    """n initial layouts: objects (n, 6, 2), x of the drawer's handle (n,), gripper (n, 2)."""
    cell = rng.random((n, 12)).argsort(axis=1)[:, :6]  # six of 4 x 3 cells below the drawer
    middle = np.stack([cell % 4 * 0.48 - 0.72, cell // 4 * 0.48 - 0.72], axis=-1)
    objects = middle + rng.uniform(-0.09, 0.09, (n, 6, 2))  # any two objects are at least 0.3 apart
    return objects, rng.uniform(-0.6, 0.6, n), rng.uniform((-0.5, -0.5), (0.5, 0.4), (n, 2))


class Tabletop(gym.vector.VectorEnv):
    """A gripper, three blocks, a plate, a bowl, a button and a drawer: ten instructions in one scene.

    A step moves the gripper by 0.15 * action[:2] and the fingers by 0.5 * action[2]. Closing through 0.5
    grasps the nearest block, or the drawer's handle, or presses the button; opening through 0.5 lets go. The
    reward is 1 at the step that does what the instruction says, which ends the episode, and 0 before.
    """

    env_ids = ["tabletop", *(f"tabletop_{task}" for task in TASKS)]
    trials = (("tabletop", "rgb"),)
    max_episode_steps = 40  # under every protocol

    def __init__(self, env_id, num_envs, seed, partial_reset, group_size, obs_mode, protocol):
        self.tasks = list(TASKS) if env_id == "tabletop" else [env_id.removeprefix("tabletop_")]
        self.env_id, self.num_envs, self.group_size = env_id, num_envs, group_size
        self.partial_reset, self.started = partial_reset, False
        self.prompts = [TASKS[task][0] for task in self.tasks]
        self.goals = np.array([TASKS[task][1:] for task in self.tasks])  # (tasks, 2): source, destination
        mode = gym.vector.AutoresetMode.SAME_STEP if partial_reset else gym.vector.AutoresetMode.DISABLED
        self.metadata = {"render_fps": 10, "render_modes": ["rgb_array"], "autoreset_mode": mode}
        self.render_mode = "rgb_array"
        self.record = 0  # k > 0: step_chunk also gives info["frames"], pictures of the first k environments
        images, state = spaces.Box(0, 255, (1, 32, 32, 3), np.uint8), spaces.Box(-1, 1, (4,), np.float32)
        prompt = spaces.Text(max(map(len, self.prompts)), charset="".join(self.prompts))
        self.single_observation_space = spaces.Dict({"images": images, "state": state, "prompt": prompt})
        self.single_action_space = spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        self.num_eval_states = EVAL_STATES * len(self.tasks)
        self.num_eval_envs = min(self.num_eval_states, 250)  # at once
        scenes = sample_scenes(np.random.default_rng(EVAL_SEED), EVAL_STATES * len(TASKS))
        rows = [list(TASKS).index(task) * EVAL_STATES + np.arange(EVAL_STATES) for task in self.tasks]
        self.eval_scenes = [part[np.concatenate(rows)] for part in scenes]  # a task has the same ones alone
        self.rng = np.random.default_rng(seed)
        self.objects, self.gripper = np.zeros((num_envs, 6, 2)), np.zeros((num_envs, 2))
        self.fingers, self.handle_x, self.opening = np.zeros((3, num_envs))
        self.held, self.task, self.state, self.length = np.zeros((4, num_envs), int)  # state -1: random
        self.order = np.zeros((num_envs, 3), int)  # blocks from the lowest to the topmost
        self.pressed, self.alive, self.success = np.zeros((3, num_envs), bool)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        chosen = chosen_states(self, options)
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if chosen is None:
            groups = self.num_envs // self.group_size
            task = self.rng.integers(len(self.tasks), size=groups).repeat(self.group_size)
            scenes = [part.repeat(self.group_size, axis=0) for part in sample_scenes(self.rng, groups)]
        else:
            task, scenes = chosen // EVAL_STATES, [part[chosen] for part in self.eval_scenes]
        self._begin(np.arange(self.num_envs), task, scenes)
        self.started, self.state[:] = True, -1 if chosen is None else chosen % EVAL_STATES
        return self._observe(), {}

    def get_state(self) -> dict:
        """All that the next steps depend on; after `set_state` the episodes go on as if nothing had been."""
        return {name: getattr(self, name).copy() for name in STATE} | {"rng": self.rng.bit_generator.state}

    def set_state(self, saved: dict) -> dict:
        self.rng.bit_generator.state, self.started = saved["rng"], True
        for name in STATE:
            getattr(self, name)[:] = saved[name]
        return self._observe()

    def _begin(self, rows, task, scenes):
        self.objects[rows], self.handle_x[rows], self.gripper[rows] = scenes
        self.task[rows], self.held[rows], self.state[rows] = task, NOTHING, -1
        self.order[rows] = [RED, GREEN, BLUE]
        self.fingers[rows] = self.opening[rows] = self.length[rows] = 0
        self.pressed[rows], self.success[rows], self.alive[rows] = False, False, True

    def _observe(self, rows=slice(None)):
        """Pictures, state (x, y, fingers, holding something; all in [-1, 1]) and instructions."""
        holding = np.where(self.held[rows] == NOTHING, -1, 1)
        state = np.column_stack([self.gripper[rows], 2 * self.fingers[rows] - 1, holding]).astype(np.float32)
        prompt = [self.prompts[task] for task in self.task[rows]]
        return {"images": self.render(32, rows)[:, None], "state": state, "prompt": prompt}  # one camera

    def step_chunk(self, actions):
        """Executes actions (N, C, 3) in turn; an environment whose episode ends midway ignores the rest."""
        actions = check_actions(self, actions, self.started).astype(np.float64)
        began, before, frames = self.alive.copy(), self.length.copy(), []
        reward = np.zeros(actions.shape[:2], np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for c in range(actions.shape[1]):
            success = self._step(np.clip(actions[:, c], -1, 1))
            reward[success, c] = 1
            terminated |= success
            truncated |= self.alive & ~success & (self.length >= self.max_episode_steps)
            self.alive &= ~(terminated | truncated)
            if self.record:
                frames.append(self.render(rows=slice(self.record)))
        self.success |= terminated
        obs, ended = self._observe(), np.flatnonzero(terminated | truncated)
        info = {
            "success": self.success.copy(),  # of the episode that was stepped, like the next three
            "task": self.task.copy(),
            "episode_length": self.length.copy(),
            "episode_return": self.success.astype(np.float32),
            "steps": self.length - before,  # executed in this chunk
            "alive": began,
            "dropped": np.zeros(self.num_envs, bool),  # nothing breaks down here
            "final_obs": None,
        }
        if self.record:
            info["frames"] = frames
        if len(ended):
            info["final_obs"] = select_rows(obs, ended)
            if self.partial_reset:
                task = self.rng.integers(len(self.tasks), size=len(ended))
                self._begin(ended, task, sample_scenes(self.rng, len(ended)))
                new = self._observe(ended)
                obs["images"][ended], obs["state"][ended] = new["images"], new["state"]
                for row, prompt in zip(ended, new["prompt"]):
                    obs["prompt"][row] = prompt
        return obs, reward, terminated, truncated, info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.step_chunk(np.asarray(actions)[:, None])
        return obs, reward[:, 0], terminated, truncated, info

    def _step(self, action):
        """One step of the environments that are alive; which of them reached their goal by it (N,)."""
        alive, every = self.alive, np.arange(self.num_envs)
        self.length += alive
        action = np.where(alive[:, None], action, 0)
        self.gripper = np.clip(self.gripper + STEP_SIZE * action[:, :2], -1, 1)
        was_closed = self.fingers > 0.5
        self.fingers = np.clip(self.fingers + FINGER_SPEED * action[:, 2], 0, 1)
        closing, opening = ~was_closed & (self.fingers > 0.5), was_closed & (self.fingers <= 0.5)

        distance = np.linalg.norm(self.places() - self.gripper[:, None], axis=-1)  # (N, 7)
        nearest = distance[:, :3].argmin(axis=1)
        block = closing & (distance[every, nearest] < GRASP_RADIUS)
        pull = closing & ~block & (distance[:, HANDLE] < HANDLE_RADIUS)
        self.pressed |= closing & ~block & ~pull & (distance[:, BUTTON] < HANDLE_RADIUS)

        grasped = np.where(block, nearest, np.where(pull, HANDLE, self.held))
        carried = np.flatnonzero((grasped >= RED) & (grasped <= BLUE))
        self.objects[carried, grasped[carried]] = self.gripper[carried]
        pulled = np.clip(HANDLE_Y - self.gripper[:, 1], 0, DRAWER_LENGTH)
        self.opening = np.where(grasped == HANDLE, pulled, self.opening)
        if block.any():  # the block just grasped is drawn on top from now on
            above = np.where(self.order == nearest[:, None], 3, np.arange(3)).argsort(axis=1)
            self.order = np.where(block[:, None], np.take_along_axis(self.order, above, axis=1), self.order)
        slipped = (grasped == HANDLE) & (np.abs(self.gripper[:, 0] - self.handle_x) > 0.25)
        released = np.where(opening, grasped, NOTHING)
        self.held = np.where(opening | slipped, NOTHING, grasped)

        source, destination = self.goals[self.task].T
        places = self.places()
        missed = np.linalg.norm(places[every, source] - places[every, destination], axis=-1)
        placed = (source <= BLUE) & (released == source) & (missed < PLACE_RADIUS)
        drawn = (source == HANDLE) & (self.opening >= DRAWER_OPEN)
        return alive & (placed | drawn | ((source == BUTTON) & self.pressed))

    def places(self):
        """Privileged: where everything is (N, 7, 2): the objects and the drawer's handle."""
        handle = np.stack([self.handle_x, HANDLE_Y - self.opening], axis=-1)
        return np.concatenate([self.objects, handle[:, None]], axis=1)

    def targets(self):
        """Privileged: where the instruction's source and destination are, (N, 4) float32."""
        every, (source, destination) = np.arange(self.num_envs), self.goals[self.task].T
        places = self.places()
        start, end = places[every, source], places[every, destination]
        end[source == HANDLE, 1] = HANDLE_Y - DRAWER_LENGTH
        return np.concatenate([start, end], axis=1).astype(np.float32)

    def expert_action(self, aim_error=0):
        """The scripted expert: actions (N, 3) from the privileged state; aim_error (N, 4) moves its aim."""
        source, carrying = self.goals[self.task, 0], self.held == self.goals[self.task, 0]
        targets = self.targets() + aim_error
        offset = np.where(carrying[:, None], targets[:, 2:], targets[:, :2]) - self.gripper
        near = np.linalg.norm(offset, axis=1) < 0.05
        grip = np.where(near & (self.fingers <= 0.5), 1, -1)
        grip = np.where(carrying, np.where(near & (source != HANDLE), -1, 1), grip)
        return np.column_stack([np.clip(offset / STEP_SIZE, -1, 1), grip]).astype(np.float32)

    def render(self, size=256, rows=slice(None)):
        """Pictures of the present state: (rows, size, size, 3) uint8."""
        return self.draw(background(size).repeat(len(self.held[rows]), axis=0), rows)

    def draw(self, canvas, rows, blocks=BLOCKS):
        """The drawer, the objects and the gripper on pictures of an empty table."""
        objects, gripper, held = self.objects[rows], self.gripper[rows], self.held[rows]
        top = np.column_stack([self.handle_x[rows], np.full(len(held), CABINET_Y)])
        handle = (CABINET_Y - HANDLE_Y + self.opening[rows])[:, None, None]  # from the cabinet to the handle
        front, down = handle - 0.06, self.pressed[rows][:, None, None]  # to the front panel

        def drawer(x, y, px):
            yield 0.35 * box(x - 0.02, y + front / 2 + 0.02, 0.24, front / 2 + 0.03, 0.08), SHADOW
            yield box(x, y + front / 2, 0.22, front / 2, px), DRAWER
            yield box(x, y + front / 2, 0.18, front / 2, px), INSIDE
            yield box(x, y + front, 0.24, 0.04, px), DRAWER
            yield box(x, y + handle, 0.13, 0.045, px), YELLOW

        paint(canvas, top, (0.32, 0.62), drawer)

        def plate(x, y, px):
            yield 0.35 * disc(x - 0.02, y + 0.03, 0.25, 0.06), SHADOW
            yield disc(x, y, 0.25, px), WHITE * 0.86
            yield disc(x, y, 0.235, px), WHITE
            yield disc(x, y, 0.17, px), WHITE * 0.9
            yield disc(x, y, 0.155, px), WHITE

        paint(canvas, objects[:, PLATE], (0.33, 0.33), plate)

        def bowl(x, y, px):
            yield 0.35 * disc(x - 0.02, y + 0.03, 0.22, 0.06), SHADOW
            yield disc(x, y, 0.22, px), ORANGE
            yield disc(x, y, 0.155, px), BOWL_INSIDE
            yield 0.5 * disc(x + 0.02, y - 0.03, 0.10, 0.06), BOWL_INSIDE * 1.3

        paint(canvas, objects[:, BOWL], (0.30, 0.30), bowl)

        def button(x, y, px):
            yield 0.35 * disc(x - 0.02, y + 0.03, 0.14, 0.06), SHADOW
            yield disc(x, y, 0.14, px), np.where(down[..., None], CYAN, DARK)  # lights up
            yield disc(x, y, np.where(down, 0.085, 0.105), px), MAGENTA

        paint(canvas, objects[:, BUTTON], (0.22, 0.22), button)
        for block in self.order[rows].T:  # the lowest first
            lifted = (held == block)[:, None, None]
            half, drop = np.where(lifted, 0.135, 0.12), np.where(lifted, 0.05, 0.02)  # nearer to the camera
            colour = blocks[block][:, None, None]

            def cube(x, y, px):
                yield 0.4 * box(x - drop, y + drop, half, half, 0.06), SHADOW
                yield box(x, y, half, half, px), colour * 0.72
                yield box(x, y, half - 0.025, half - 0.025, px), colour

            paint(canvas, objects[np.arange(len(held)), block], (0.22, 0.22), cube)
        gap = np.maximum(0.20 - 0.15 * self.fingers[rows], np.where(held == NOTHING, 0, 0.15))[:, None, None]

        def fingers(x, y, px):
            yield box(np.abs(x) - gap, y, 0.025, 0.09, px), DARK
            yield box(x, y - 0.115, gap + 0.025, 0.025, px), DARK
            yield box(x, y - 0.15, 0.06, 0.035, px), DARK

        paint(canvas, gripper, (0.25, 0.2), fingers)
        return (canvas + 0.5).astype(np.uint8)


@functools.cache
def background(size):
    """The empty table and the cabinet's top: (1, size, size, 3)."""
    canvas = np.tile(EDGE, (1, size, size, 1))

    def table(x, y, px):
        yield box(x, y, 1, 1, px), TABLE
        yield 0.06 * (0.5 + 0.5 * np.sin(9 * y + 2 * np.sin(1.3 * x))) * box(x, y, 1, 1, px), EDGE  # grain
        yield 0.3 * box(x, y - 0.92, 1.2, 0.15, 0.06), SHADOW
        yield box(x, y - CABINET_Y - 0.2, 1.2, 0.2, px), CABINET

    paint(canvas, np.zeros((1, 2)), (VIEW, VIEW), table)
    return canvas


def disc(x, y, radius, blur):
    """Coverage of pixels at offset (x, y); `blur` is the pixel's width, or more for a soft shadow."""
    return np.clip(0.5 + (radius - np.hypot(x, y)) / blur, 0, 1)


def box(x, y, half_x, half_y, blur):
    def side(d, half):  # exact for a pixel of that width, also where the box is thinner than the pixel
        return np.clip(0.5 + (half - np.abs(d)) / blur, 0, np.minimum(1, 2 * half / blur))

    return side(x, half_x) * side(y, half_y)


def paint(canvas, centre, reach, layers):
    """Blends layers(x, y, px), each a coverage and a colour, into the window centre +- reach of each picture.

    Only the window is read and written, which is what makes 32 pixels fast. Past the border the indices are
    clipped: those pixels are computed more than once, with the same result.
    """
    n, size = canvas.shape[:2]
    px, centre = 2 * VIEW / size, centre.astype(np.float32)
    middle = np.stack([centre[:, 0] + VIEW, VIEW - centre[:, 1]]) / px  # (2, N): column, row

    def window(middle, reach):
        k = int(np.ceil(reach / px))
        return np.clip(middle.astype(int)[:, None] + np.arange(-k, k + 1), 0, size - 1)

    column, row = window(middle[0], reach[0]), window(middle[1], reach[1])
    x = ((column + 0.5) - middle[0][:, None]).astype(np.float32)[:, None, :] * px
    y = (middle[1][:, None] - (row + 0.5)).astype(np.float32)[:, :, None] * px
    index = (np.arange(n)[:, None, None] * size + row[:, :, None]) * size + column[:, None, :]
    pixels = canvas.reshape(-1, 3)
    patch = pixels[index]
    for coverage, colour in layers(x, y, np.float32(px)):
        patch += coverage[..., None].astype(np.float32) * (colour - patch)
    pixels[index] = patch
