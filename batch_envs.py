"""`Batch`: environments that a simulator steps all at once, on a GPU: `--sim-device cuda`.

The vector interface of envs.py over a simulator's `batch`, ManiSkill's or put-on-plate's. All episodes begin
together, at a reset: before SIMPLER's do, every environment is stepped until its objects lie still, and
put-on-plate loads other things. One whose episode has ended waits for the next reset, with actions of zero.

**Not run on a GPU yet**: written against ManiSkill's documentation, and tested with one environment on a CPU,
where it gives what the same environment in a process gives, to the bit. In a batch ManiSkill draws initial
states of its own tasks together, from the first one's seed, so those of an evaluation depend on its size.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from flags import fail, tell
from vector_envs import Simulators, check_actions, chosen_states, select_rows, where


class Batch(gym.vector.VectorEnv):
    def __init__(self, build, env_id, num_envs, seed, group_size):
        self.env_id, self.num_envs, self.group_size, self.build = env_id, num_envs, group_size, build
        self.partial_reset = False
        try:
            self.scene = build(num_envs=num_envs)
        except ValueError as error:
            fail(f"{env_id}: {error}")
        if group_size > 1 and not self.scene.repeats:
            fail(f"--sim-device cuda: {env_id} cannot begin a group of episodes in the same state")
        self.tasks, self.prompts = list(self.scene.prompts), [*self.scene.prompts.values()]
        self.max_episode_steps, self.train_states = self.scene.max_episode_steps, self.scene.train_states
        self.about = f"{getattr(self.scene, 'about', '')} in a batch of {num_envs}".strip()
        self.eval_states = self.scene.num_eval_states  # per task
        self.num_eval_states = self.eval_states * len(self.tasks)
        self.num_eval_envs = min(self.num_eval_states, num_envs)  # at once
        self.scene.reset([0] * num_envs, [0] * num_envs)
        first = self.scene.observe()
        images = spaces.Box(0, 255, first["images"].shape[1:], np.uint8)
        state = spaces.Box(-np.inf, np.inf, first["state"].shape[1:], np.float32)
        self.single_observation_space = spaces.Dict({"images": images, "state": state})
        self.single_action_space = spaces.Box(-1, 1, (self.scene.action_dim,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata, self.record, self.on_failure = {"render_fps": 10}, 0, None
        self.rng, self.started = np.random.default_rng(seed), False
        self.task, self.state, self.length = np.zeros((3, num_envs), int)
        self.alive, self.success = np.zeros((2, num_envs), bool)
        self.returned = np.zeros(num_envs, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        chosen = chosen_states(self, options)
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if chosen is not None:
            self.task, self.state = np.divmod(chosen, self.eval_states)
        else:
            groups = self.num_envs // self.group_size
            drawn = (
                self.rng.integers(len(self.tasks), size=groups),
                self.rng.integers(*self.train_states, groups),
            )
            self.task, self.state = (x.repeat(self.group_size) for x in drawn)
        if self.scene is None:
            self.scene = self.build(num_envs=self.num_envs)
        self.scene.reset(self.task.tolist(), self.state.tolist())
        self.length[:], self.returned[:], self.success[:], self.alive[:] = 0, 0, False, True
        self.started = True
        return self._observe(), {}

    def get_state(self) -> dict:
        """What is drawn next. Where the episodes are is inside of the simulator and not saved."""
        return Simulators.get_state(self)

    def set_state(self, saved: dict) -> dict:
        """As after `get_state`, but in new episodes: their observation."""
        return Simulators.set_state(self, saved)

    def _observe(self):
        self.obs = self.scene.observe() | {"prompt": [self.prompts[task] for task in self.task]}
        return self.obs

    def step_chunk(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Executes actions (N, C, D) in turn; an environment whose episode ends midway ignores the rest."""
        actions = check_actions(self, actions, self.started).astype(np.float32)
        began, before, last, frames = self.alive.copy(), self.length.copy(), self.obs, []
        reward = np.zeros(actions.shape[:2], np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for c in range(actions.shape[1]):
            earned, success = self.scene.step(np.where(self.alive[:, None], actions[:, c], 0))
            reward[:, c] = np.where(self.alive, earned, 0)
            self.length += self.alive
            terminated |= self.alive & success
            truncated |= self.alive & ~success & (self.length >= self.max_episode_steps)
            self.alive &= ~(terminated | truncated)
            if self.record:
                frames.append(self.scene.render(256)[: self.record])
        obs = self._observe()
        broken = ~(np.isfinite(obs["state"]).all(axis=1) & np.isfinite(reward).all(axis=1))
        for row in np.flatnonzero(broken):  # until the next reset; what has ended before is not looked at
            obs["state"][row], obs["images"][row] = last["state"][row], last["images"][row]
        dropped = broken & began
        for row in np.flatnonzero(dropped):
            tell(f"{self.env_id} broke down, {where(self, row)}: NaN or infinite; its episode is dropped")
        if dropped.any() and dropped.sum() == began.sum():
            self.close()
            if self.on_failure:
                self.on_failure()
            fail(f"{self.env_id}: all of its environments broke down at once", code=1)
        reward[broken], terminated[dropped], truncated[dropped] = 0, False, True
        self.length[dropped], self.alive[dropped] = before[dropped], False
        self.returned += reward.sum(axis=1)
        self.success |= terminated
        info = {
            "success": self.success.copy(),  # of the episode that was stepped, like the next three
            "task": self.task.copy(),
            "episode_length": self.length.copy(),
            "episode_return": self.returned.copy(),
            "steps": self.length - before,  # executed in this chunk
            "alive": began & ~dropped,
            "dropped": dropped,
            "final_obs": None,
        }
        if self.record:
            info["frames"] = frames
        if (terminated | truncated).any():
            info["final_obs"] = select_rows(obs, np.flatnonzero(terminated | truncated))
        return obs, reward, terminated, truncated, info

    def close(self):
        if self.scene is not None:
            self.scene.close()
        self.scene, self.started = None, False
