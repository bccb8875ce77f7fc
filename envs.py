"""One make_envs() for every simulator: a vector of environments stepped in chunks of actions.

    envs = make_envs("tabletop", num_envs=256, seed=1)
    obs, info = envs.reset()                                               # {"images", "state", "prompt"}
    obs, reward, terminated, truncated, info = envs.step_chunk(actions)    # (N, C, D) -> reward (N, C)

The observation is {"images": (N, cams, H, W, 3) uint8, "state": (N, S) float32, "prompt": [str] * N}. Success
is a true end (terminated); the step limit is not (truncated), so a value function bootstraps there from the
observation the episode ended with, info["final_obs"]. `python envs.py --check` tries each simulator.

The contract. A simulator is a class in a file of simulators/ and a line in SIMULATORS. It is one environment:

    env_ids                      of the class: the ids that it knows; * stands for anything
    trials                       of the class: pairs of env_id and obs_mode, which --check tries
    __init__(env_id, obs_mode, protocol)
    prompts                      {task: instruction}
    action_dim                   D
    max_episode_steps            the step limit under that protocol; it may grow within an episode
    num_eval_states              per task: the initial states 0, 1, ... are those of an evaluation
    train_states                 (low, high): training draws its initial states from these
    reset(task, state)           begins an episode: the index of a task, the number of an initial state
    observe()                    {"images": (cams, H, W, 3) uint8, "state": (S,) float32}; with "prompt" too,
    more_prompts                 a list of all such, where an instruction is not always its task's
    step(action)                 (reward, success), for an action (D,) in [-1, 1]
    render(size)                 a picture for people, (size, size, 3) uint8
    expert_action()              optional: the action (D,) of a scripted expert
    about                        optional: what the protocol line of an evaluation has to say of it

What a user has to put right (assets, an unknown name) is a ValueError of one line. `Block` is some of them in
one process, `Simulators` is all blocks. A simulator that steps many environments at once, the tabletop, is a
gymnasium VectorEnv with make_envs' arguments instead, and does itself what `Simulators` does (`select_rows`
is there for both).
"""

import difflib
import fnmatch
import functools
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.utils import batch_space

from flags import fail

SIMULATORS = {  # what an env_id begins with: the class, imported when it is asked for
    "tabletop": "simulators.tabletop:Tabletop",
    "metaworld": "simulators.metaworld:MetaWorld",
    "libero": "simulators.libero:Libero",
    "maniskill_25": "simulators.put_on_plate:PutOnPlate",
    "maniskill": "simulators.maniskill:ManiSkill",
    "calvin": "simulators.calvin:Calvin",
}


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    partial_reset: bool = True,
    group_size: int = 1,
    obs_mode: str = "rgb",
    protocol: str = "paper",
) -> gym.vector.VectorEnv:
    """`partial_reset`: an environment whose episode ended starts a new one instead of waiting for reset().

    `group_size`: at a reset, so many neighbours start from the same state and task. Not by a partial reset.
    `obs_mode`: "state" is without pictures, and the state is all that the simulator tells; "fast" pictures
    are without shadows. `protocol`: whose step limit, where openpi's or lerobot's is not the paper's.
    """
    simulator = find_simulator(env_id)
    if num_envs < 1:
        fail(f"num_envs must be at least 1, got {num_envs}")
    if group_size < 1 or num_envs % group_size:
        fail(f"group_size {group_size} does not divide num_envs {num_envs}")
    if issubclass(simulator, gym.vector.VectorEnv):
        return simulator(env_id, num_envs, seed, partial_reset, group_size, obs_mode, protocol)
    build = functools.partial(simulator, env_id, obs_mode, protocol)
    return Simulators(env_id, build, num_envs, seed, partial_reset, group_size)


def find_simulator(env_id):
    for family, place in SIMULATORS.items():
        if env_id.startswith(family):
            simulator = pkgutil.resolve_name(place)
            if any(fnmatch.fnmatchcase(env_id, known) for known in simulator.env_ids):
                return simulator
    known = [list(pkgutil.resolve_name(place).env_ids) for place in SIMULATORS.values()]
    nearest = difflib.get_close_matches(env_id, sum(known, []), n=5) or [ids[0] for ids in known]
    fail(f"unknown env_id {env_id!r}; did you mean one of: {', '.join(nearest)}?")


def select_rows(obs: dict, rows: np.ndarray) -> dict:
    """The observation of some of the environments; rows is an index array."""
    return {k: [v[i] for i in rows] if isinstance(v, list) else v[rows] for k, v in obs.items()}


class Block(gym.Env):
    """Some simulators in one process, stepped one after the other: to AsyncVectorEnv one environment."""

    def __init__(self, build, observation_space, action_space, index, count):
        self.build, self.rows, self.count = build, slice(index * count, (index + 1) * count), count
        self.observation_space, self.action_space = observation_space, action_space
        self.simulators, self.record, self.frames = [], 0, []  # built when they are needed
        self.obs = {key: np.zeros(box.shape, box.dtype) for key, box in observation_space.items()}
        self.task, self.state, self.length = np.zeros((3, count), int)
        self.alive, self.prompt = np.zeros(count, bool), np.full(count, None)

    def _tell(self, row, error):  # with what is needed to meet it again
        where = f"task {self.task[row]}, initial state {self.state[row]}, step {self.length[row]}"
        return RuntimeError(f"{where}: {type(error).__name__}: {str(error).strip()}")

    def _observe(self, row):
        for key, value in self.simulators[row].observe().items():
            (self.prompt if key == "prompt" else self.obs[key])[row] = value

    def reset(self, *, seed=None, options=None):
        """Begins the episodes options["task"], options["state"] where options["begin"]; each (N,)."""
        if not self.simulators:
            self.simulators = [self.build() for _ in range(self.count)]
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
        begin, self.task, self.state = (options[key][self.rows] for key in ("begin", "task", "state"))
        self.length[begin], self.alive[begin] = 0, True
        for row in np.flatnonzero(begin):
            try:
                self.simulators[row].reset(self.task[row], self.state[row])
                self._observe(row)
            except Exception as error:
                raise self._tell(row, error) from None
        return self.obs, {"prompt": self.prompt}

    def step(self, actions):
        """A chunk (count, C, D). Pictures for the policy are drawn once, after it."""
        actions, reward = np.clip(actions, -1, 1), np.zeros(actions.shape[:2], np.float32)
        success, film = np.zeros(self.count, bool), [[] for _ in range(self.record)]
        for row, simulator in enumerate(self.simulators):
            try:
                for c in range(actions.shape[1] * self.alive[row]):
                    reward[row, c], success[row] = simulator.step(actions[row, c])
                    self.length[row] += 1
                    if row < self.record:
                        film[row].append(simulator.render(256))
                    if success[row] or self.length[row] >= simulator.max_episode_steps:
                        break
                if self.alive[row]:
                    self._observe(row)
                elif row < self.record:
                    film[row].append(simulator.render(256))
            except Exception as error:
                raise self._tell(row, error) from None
        self.frames = [[f[min(c, len(f) - 1)] for f in film] for c in range(actions.shape[1])]
        truncated = self.alive & ~success & (self.length >= [s.max_episode_steps for s in self.simulators])
        self.alive &= ~(success | truncated)
        told = {"reward": reward, "terminated": success, "truncated": truncated, "length": self.length.copy()}
        return self.obs, 0.0, False, False, told | {"prompt": self.prompt}

    def expert_action(self):
        return np.stack([simulator.expert_action() for simulator in self.simulators])


def describe(build):
    """What has to be known before the processes begin."""
    simulator = build()
    names = "prompts", "action_dim", "max_episode_steps", "num_eval_states", "train_states"
    told = {name: getattr(simulator, name) for name in names}
    simulator.reset(0, 0)
    shapes = {key: value.shape for key, value in simulator.observe().items() if key != "prompt"}
    optional = {"more_prompts": [], "about": ""}
    return shapes | told | {name: getattr(simulator, name, usual) for name, usual in optional.items()}


class Simulators(gym.vector.VectorEnv):
    """Simulators in at most as many processes as there are cores. An episode: a task and an initial state."""

    def __init__(self, env_id, build, num_envs, seed, partial_reset, group_size):
        self.env_id, self.num_envs = env_id, num_envs
        self.partial_reset, self.group_size = partial_reset, group_size
        try:  # one first, where an error can be told in a line, in a process, where nothing is left of it
            with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
                told = pool.submit(describe, build).result()
        except ModuleNotFoundError as error:
            fail(f"{env_id}: {build.func.__name__} is not installed here ({error}): make install")
        except Exception as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            advice = "" if isinstance(error, ValueError) else " (make install; as root, make apt; make check)"
            fail(f"{env_id}: {what}{advice}")
        self.max_episode_steps, self.train_states = told["max_episode_steps"], told["train_states"]
        self.tasks, self.prompts = list(told["prompts"]), [*told["prompts"].values(), *told["more_prompts"]]
        self.about = told["about"]
        self.eval_states = told["num_eval_states"]  # per task
        self.num_eval_states = self.eval_states * len(self.tasks)
        self.num_eval_envs = min(self.num_eval_states, num_envs)  # at once
        images = spaces.Box(0, 255, told["images"], np.uint8)
        state = spaces.Box(-np.inf, np.inf, told["state"], np.float32)
        self.single_observation_space = spaces.Dict({"images": images, "state": state})
        self.single_action_space = spaces.Box(-1, 1, (told["action_dim"],), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's ranks
        workers = max(n for n in range(1, max(cores, 1) + 1) if num_envs % n == 0)
        size = num_envs // workers
        parts = batch_space(self.single_observation_space, size), batch_space(self.single_action_space, size)
        self.blocks = [functools.partial(Block, build, *parts, i, size) for i in range(workers)]
        self.processes = None  # from a reset() to a close()
        self.on_failure = None  # called before the end when a simulator breaks down
        self.metadata, self.record, self.recorded = {"render_fps": 10}, 0, 0
        self.rng = np.random.default_rng(seed)
        self.task, self.state, self.length = np.zeros((3, num_envs), int)
        self.alive, self.success = np.zeros((2, num_envs), bool)
        self.returned = np.zeros(num_envs, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        eval_states = (options or {}).get("eval_states")
        if eval_states is None:
            task, state = (x.repeat(self.group_size) for x in self._draw(self.num_envs // self.group_size))
        else:
            task, state = np.divmod(np.asarray(eval_states), self.eval_states)
        if self.processes is None:
            gym.logger.min_level = gym.logger.ERROR + 1  # it would print the workers' tracebacks
            self.processes, self.recorded = AsyncVectorEnv(self.blocks, context="forkserver"), 0
        return self._begin(np.ones(self.num_envs, bool), task, state), {}

    def _draw(self, n):  # task and initial state of n training episodes
        return self.rng.integers(len(self.tasks), size=n), self.rng.integers(*self.train_states, size=n)

    def _begin(self, rows, task, state):
        self.task[rows], self.state[rows] = task, state
        self.length[rows], self.alive[rows], self.success[rows], self.returned[rows] = 0, True, False, 0
        options = {"begin": rows, "task": self.task, "state": self.state}
        return self._observation(*self._ask("reset", options=options))

    def _ask(self, method, *args, **kwargs):
        """A method of all processes. If one breaks down, all are ended, and the run with them."""
        try:
            return getattr(self.processes, method)(*args, **kwargs)
        except (RuntimeError, EOFError, OSError) as error:
            what = str(error)
            if not isinstance(error, RuntimeError):
                wait([process.sentinel for process in self.processes.processes], timeout=5)
                codes = [process.exitcode for process in self.processes.processes if not process.is_alive()]
                what = f"a process ended with exit code {codes} in tasks {sorted(set(self.task.tolist()))}"
            self.close()
            if self.on_failure:
                self.on_failure()
            fail(f"{self.env_id} broke down, {what}")

    def _observation(self, obs, told):
        obs = {key: value.reshape(self.num_envs, *value.shape[2:]) for key, value in obs.items()}
        return obs | {"prompt": [own or self.prompts[i] for own, i in zip(told["prompt"].flat, self.task)]}

    def step_chunk(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Executes actions (N, C, D) in turn; an environment whose episode ends midway ignores the rest."""
        actions, size = np.asarray(actions, np.float32), self.num_envs // len(self.blocks)
        if actions.ndim != 3 or actions.shape[::2] != self.action_space.shape:
            expected = f"({self.num_envs}, chunk_len, {self.action_space.shape[1]})"
            raise ValueError(f"actions: expected shape {expected}, got {actions.shape}")
        if self.processes is None:
            raise gym.error.ResetNeeded("call reset() before step_chunk()")
        if self.record != self.recorded:
            counts = [int(np.clip(self.record - i * size, 0, size)) for i in range(len(self.blocks))]
            self._ask("set_attr", "record", counts)
            self.recorded = self.record
        obs, _, _, _, told = self._ask("step", actions.reshape(-1, size, *actions.shape[1:]))
        obs, names = self._observation(obs, told), ("reward", "terminated", "truncated", "length")
        told = [told[name].reshape(self.num_envs, *told[name].shape[2:]) for name in names]
        began, before, (reward, terminated, truncated, self.length) = self.alive.copy(), self.length, told
        self.returned += reward.sum(axis=1)
        self.success |= terminated
        self.alive &= ~(terminated | truncated)
        info = {
            "success": self.success.copy(),  # of the episode that was stepped, like the next three
            "task": self.task.copy(),
            "episode_length": self.length.copy(),
            "episode_return": self.returned.copy(),
            "steps": self.length - before,  # executed in this chunk
            "alive": began,
            "final_obs": None,
        }
        if self.record:
            films = zip(*self._ask("call", "frames"))  # a list per step, of lists per block
            info["frames"] = [np.stack(sum(parts, [])) for parts in films]
        ended = terminated | truncated
        if ended.any():
            info["final_obs"] = select_rows(obs, np.flatnonzero(ended))
            if self.partial_reset:
                obs = self._begin(ended, *self._draw(ended.sum()))
        return obs, reward, terminated, truncated, info

    def expert_action(self, aim_error=0):
        return np.concatenate(self._ask("call", "expert_action"))

    def close(self):
        if self.processes is not None:
            for process in self.processes.processes:
                process.kill()
                process.join()
            self.processes.closed, self.processes = True, None


def write_gif(path: str | Path, frames: Sequence[np.ndarray], caption: str = "", fps: int = 10):
    """Frames (T, H, W, 3) uint8 as an animation, with a line of text under them."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    pictures = [Image.fromarray(frame) for frame in np.asarray(frames)]
    if caption:
        pictures = [ImageOps.expand(picture, (0, 0, 0, 22), "white") for picture in pictures]
        for picture in pictures:
            place, font = (6, picture.height - 19), ImageFont.load_default(size=14)
            ImageDraw.Draw(picture).text(place, caption, fill="black", font=font)
    temporary, (first, *others) = f"{path}.tmp", pictures
    first.save(temporary, "GIF", save_all=True, append_images=others, duration=1000 // fps, loop=0)
    os.replace(temporary, path)


def check():
    """A table of what works here: each simulator for some steps, in a process of its own."""
    print(f"| {'simulator':22} | {'mode':5} | result\n| {'-' * 22} | ----- | ------")
    for place in SIMULATORS.values():
        for trial in pkgutil.resolve_name(place).trials:
            command = [sys.executable, __file__, "--try", *trial]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            told = (done.stderr if done.returncode else done.stdout).strip() or f"exit code {done.returncode}"
            print("| {:22} | {:5} |".format(*trial), told.splitlines()[-1].removeprefix("error: "))


def attempt(env_id, mode):
    envs = make_envs(env_id, 2, 0, obs_mode=mode)
    envs.reset()
    obs, *_ = envs.step_chunk(np.zeros((2, 5, *envs.single_action_space.shape)))
    envs.close()
    print(f"works: images {obs['images'].shape[1:]}, state {obs['state'].shape[1]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--try"]:
        attempt(*sys.argv[2:])
    else:
        check() if sys.argv[1:] == ["--check"] else fail("use: python envs.py --check")
