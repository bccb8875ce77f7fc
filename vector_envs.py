"""`Simulators`: a vector of simulators in processes, which goes on when one of them breaks down.

What a simulator is asked for stands at the top of envs.py, what runs in a process is processes.py. The
tabletop, which is its own vector, shares the functions here.

A simulator that breaks down (an exception, NaN) is built anew. If its process dies or hangs, so are all the
simulators in it. Their episodes are dropped: in that chunk they were not alive, nothing was earned, and they
were truncated at the last good observation. Each time is told in a line; too many in a row end the run.
"""

import math
import os
from contextlib import suppress

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from flags import fail, tell
from processes import ADVICE, SERVER, describe, serve, start

MAX_BREAKDOWNS = 5  # in a row: without a chunk between them in which nothing breaks down


def select_rows(obs: dict, rows: np.ndarray) -> dict:
    """The observation of some of the environments; rows is an index array."""
    return {k: [v[i] for i in rows] if isinstance(v, list) else v[rows] for k, v in obs.items()}


def chosen_states(envs, options):
    """The evaluation states (N,) that a reset is asked for, or None for training episodes."""
    options = dict(options or {})
    chosen = options.pop("eval_states", None)
    if options:
        raise ValueError(f"reset options: expected eval_states, got {', '.join(options)}")
    if chosen is None:
        return None
    index = np.asarray(chosen)
    if index.shape != (envs.num_envs,) or index.min() < 0 or index.max() >= envs.num_eval_states:
        expected = f"{envs.num_envs} indices from 0 to {envs.num_eval_states - 1}"
        raise ValueError(f"eval_states: expected {expected}, got {chosen}")
    return index


def where(envs, row):
    """What is needed to meet it again; a scene that the tabletop has drawn has no number."""
    state = f"initial state {envs.state[row]}" if envs.state[row] >= 0 else "a random initial state"
    return f"task {envs.task[row]}, {state}, step {envs.length[row]}"


def check_actions(envs, actions, started):
    """A chunk (N, C, D), of numbers where an episode is going on."""
    actions, (num_envs, action_dim) = np.asarray(actions), envs.action_space.shape
    if actions.ndim != 3 or actions.shape[::2] != (num_envs, action_dim):
        raise ValueError(
            f"actions: expected shape ({num_envs}, chunk_len, {action_dim}), got {actions.shape}"
        )
    if not started:
        raise gym.error.ResetNeeded("call reset() before step_chunk()")
    wrong = np.flatnonzero(envs.alive & ~np.isfinite(actions).all(axis=(1, 2)))
    if len(wrong):
        fail(f"{envs.env_id}, {where(envs, wrong[0])}: the policy's action is NaN or infinite", code=1)
    return actions


class Simulators(gym.vector.VectorEnv):
    """Simulators in at most as many processes as there are cores. An episode: a task and an initial state."""

    def __init__(self, env_id, build, num_envs, seed, partial_reset, group_size, patience):
        self.env_id, self.num_envs, self.patience = env_id, num_envs, patience
        self.partial_reset, self.group_size = partial_reset, group_size
        self.processes = None  # from a reset() to a close()
        process, pipe = start(describe, build)  # one first, in a process where nothing is left of it
        told = f"hangs while it is built, nothing came for {2 * patience:g} s"
        try:
            told = pipe.recv() if pipe.poll(2 * patience) else told
        except (EOFError, ConnectionResetError):
            process.join()
            told = f"its process ended with exit code {process.exitcode}{ADVICE}"
        process.kill()
        process.join()
        pipe.close()
        if isinstance(told, str):
            fail(f"{env_id}: {told}")
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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's ranks
        workers = max(n for n in range(1, max(cores, 1) + 1) if num_envs % n == 0)
        arrays = {"images": (told["images"], np.uint8), "state": (told["state"], np.float32)}
        arrays |= {"action": (self.single_action_space.shape, np.float32), "length": ((), int)}
        arrays |= {name: (shape, np.float32) for name, shape in told["privileged"].items()}
        arrays |= {"busy": ((), bool)}  # the process is with this one
        shared = {}  # what the processes write and the run reads: shape, type, memory
        for name, (shape, dtype) in arrays.items():
            shape = num_envs, *shape
            memory = SERVER.RawArray("b", max(math.prod(shape) * np.dtype(dtype).itemsize, 1))
            shared[name] = shape, dtype, memory
        self.shared = {name: np.ndarray(*array) for name, array in shared.items()}
        size = num_envs // workers
        self.rows = [slice(i * size, (i + 1) * size) for i in range(workers)]  # of each process
        self.blocks = [(build, shared, rows) for rows in self.rows]
        self.on_failure = None  # called before the end
        self.metadata, self.record, self.breakdowns = {"render_fps": 10}, 0, 0
        self.draws = True  # False: a step changes nothing in the observation
        self.limit = math.inf  # of an episode's steps, besides the simulators' own, which may grow in it
        self.rng = np.random.default_rng(seed)
        self.length, (self.task, self.state) = self.shared["length"], np.zeros((2, num_envs), int)
        self.alive, self.success = np.zeros((2, num_envs), bool)
        self.returned, self.prompt = np.zeros(num_envs, np.float32), np.full(num_envs, None)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        chosen = chosen_states(self, options)
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.evaluates = chosen is not None
        if self.evaluates:
            task, state = np.divmod(chosen, self.eval_states)
        else:
            task, state = (x.repeat(self.group_size) for x in self._draw(self.num_envs // self.group_size))
        if self.processes is None:
            self.processes = [start(serve, *block) for block in self.blocks]
        self._begin(np.ones(self.num_envs, bool), task, state)
        return self._observe(), {}

    def get_state(self) -> dict:
        """What is drawn next. Where the episodes are is inside of the simulators and not saved."""
        return {"rng": self.rng.bit_generator.state}

    def set_state(self, saved: dict) -> dict:
        """As after `get_state`, but in new episodes: their observation."""
        self.rng.bit_generator.state = saved["rng"]
        tell(f"{self.env_id}: episodes begin anew, its state is not saved")
        return self.reset()[0]

    def _draw(self, n):  # task and initial state of n training episodes
        return self.rng.integers(len(self.tasks), size=n), self.rng.integers(*self.train_states, size=n)

    def _begin(self, begin, task, state):
        """Begins episodes, until none breaks down. Which: others too, where a process took them along."""
        begun = np.zeros_like(begin)
        while begin.any():
            self.task[begin], self.state[begin], begun = task, state, begun | begin
            self.length[begin], self.alive[begin] = 0, True
            self.success[begin], self.returned[begin] = False, 0
            _, begin = self._ask("reset", begin, self.task, self.state)
            others = begin & ~begun
            self.task[others], self.state[others] = self._draw(others.sum())
            task, state = self.task[begin], self.state[begin]
        return begun

    def _ask(self, method, *arguments):
        """The blocks' answers, None of a process that died or hangs, and whose simulators are lost (N,)."""
        for rows, (_, pipe) in zip(self.rows, self.processes):
            with suppress(OSError):  # it has died, which is found out below
                pipe.send((method, [x[rows] if isinstance(x, np.ndarray) else x for x in arguments]))
        answers, failed, told = [], np.zeros(self.num_envs, bool), []
        for i, rows in enumerate(self.rows):
            try:
                patience = self.patience * (2 if method == "reset" else 1)
                answer, self.prompt[rows], broken = self._receive(i, patience)
                told += [(rows.start + row, [rows.start + row], what) for row, what in broken.items()]
            except (EOFError, OSError) as error:
                answer, row = None, rows.start + self.shared["busy"][rows].argmax()
                told.append((row, rows, self._replace(i, error)))
            answers.append(answer)
        if told:
            self.breakdowns += 1
        elif method == "step":
            self.breakdowns = 0
        fate = "episodes that count as failures" if self.evaluates else "episodes dropped"
        for row, rows, what in told:
            failed[rows] = self.alive[rows]
            what = f"{self.env_id} broke down, {where(self, row)}: {what}"
            if self.breakdowns > MAX_BREAKDOWNS:
                self.close()
                if self.on_failure:
                    self.on_failure()
                fail(f"{what}; before, it was built anew {MAX_BREAKDOWNS} times in a row", code=1)
            # an episode that was just to begin begins again
            lost = (failed[rows] & ~arguments[0][rows] if method == "reset" else failed[rows]).sum()
            count = f"{self.breakdowns} of at most {MAX_BREAKDOWNS} times in a row"
            tell(f"{what}; built anew, {count}; {fate}: {lost}")
        return answers, failed

    def _receive(self, i, patience):
        (_, pipe), moved = self.processes[i], None
        while not pipe.poll(patience):
            before, moved = moved, [self.shared[name][self.rows[i]].tolist() for name in ("busy", "length")]
            if moved == before:
                raise TimeoutError(f"hangs, nothing has moved for {patience:g} s")
        return pipe.recv()

    def _replace(self, i, error):
        """Another process for one that died or hangs; what happened."""
        process, pipe = self.processes[i]
        what = f"its process {error}"
        if not isinstance(error, TimeoutError):
            process.join(5)
            what = f"its process ended with exit code {process.exitcode}"
        process.kill()
        process.join()
        pipe.close()
        self.shared["busy"][self.rows[i]] = False
        self.processes[i] = start(serve, *self.blocks[i])
        return what

    def _observe(self):
        """The processes write on, so copies; the last are kept."""
        self.obs = {name: self.shared[name].copy() for name in ("images", "state")}
        self.obs["prompt"] = [own or self.prompts[task] for own, task in zip(self.prompt, self.task)]
        return self.obs

    def step_chunk(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Executes actions (N, C, D) in turn; an environment whose episode ends midway ignores the rest."""
        actions = check_actions(self, actions, self.processes is not None).astype(np.float32)
        began, before, reward = self.alive.copy(), self.length.copy(), np.zeros(actions.shape[:2], np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        frames = np.zeros((actions.shape[1], min(self.record, self.num_envs), 256, 256, 3), np.uint8)
        answers, dropped = self._ask("step", actions, self.alive, self.record, self.draws, self.limit)
        for rows, answer in zip(self.rows, answers):
            if answer is not None:
                reward[rows], terminated[rows], truncated[rows], film = answer
                frames[:, rows.start : rows.start + film.shape[1]] = film
        reward[dropped], terminated[dropped], truncated[dropped] = 0, False, True
        self.length[dropped] = before[dropped]
        for name in ("images", "state"):  # a process that died may have written half of it
            self.shared[name][dropped] = self.obs[name][dropped]
        self.returned += reward.sum(axis=1)
        self.success |= terminated
        self.alive &= ~(terminated | truncated)
        info = {
            "success": self.success.copy(),  # of the episode that was stepped, like the next three
            "task": self.task.copy(),
            "episode_length": self.length.copy(),
            "episode_return": self.returned.copy(),
            "steps": self.length - before,  # executed in this chunk
            "alive": began & ~dropped,
            "dropped": dropped,  # truncated by a breakdown
            "final_obs": None,
        }
        if self.record:
            info["frames"] = list(frames)
        obs = last = self._observe()
        if self.partial_reset and (terminated | truncated).any():
            ended = terminated | truncated
            others = self._begin(ended, *self._draw(ended.sum())) & ~ended
            truncated |= others  # after a good chunk
            dropped |= others
            obs = self._observe()
        if (terminated | truncated).any():
            info["final_obs"] = select_rows(last, np.flatnonzero(terminated | truncated))
        return obs, reward, terminated, truncated, info

    def expert_action(self, aim_error=0):
        """Actions (N, D); an aim_error (N, W) is in the units of `targets`."""
        self._ask("expert_action", self.alive, *([aim_error] if np.ndim(aim_error) else []))
        return self.shared["action"].copy()

    def targets(self):
        """Privileged: where source and destination of the instruction are, (N, W) float32."""
        self._ask("tell", self.alive, "targets")
        return self.shared["targets"].copy()

    def places(self):
        """Privileged: where everything is, (N, things, coordinates) float32."""
        self._ask("tell", self.alive, "places")
        return self.shared["places"].copy()

    def close(self):
        for process, pipe in self.processes or ():
            process.kill()
            process.join()
            pipe.close()
        self.processes = None
