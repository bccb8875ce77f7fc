"""MetaWorld: a Sawyer arm, 50 tasks of one object or two each, simulated by MuJoCo.

MT10 and MT50 train on ten and on all fifty tasks; ML45 trains on 45 and leaves out five. metaworld.json has
each task's instruction, class of difficulty, scripted expert and benchmarks. State and action are the same:

    state    with pictures: end effector (3) and gripper (1); without: all 39 numbers, the goal too
    action   motion of the end effector (3), gripper (1): 1 closes, -1 opens
    picture  480 x 480, camera corner2, placed as in the public demonstrations

An initial state is a seed of the simulator, which draws where objects and goal are.
"""

import json
import os
from pathlib import Path

import numpy as np

METAWORLD = json.loads(Path(__file__).with_suffix(".json").read_text())  # 50 tasks
BENCHMARKS = "mt10", "mt50", "ml45", "ml45_test"


def metaworld_tasks(name):
    """The task of that name, with or without its -v3, or the tasks of a benchmark."""
    about = METAWORLD.items()
    return [task for task, its in about if name in (task, task.removesuffix("-v3"), *its["benchmarks"])]


def touching_object(self, geom):
    """MetaWorld's own goes through all contacts in Python, twice: a third of a step's time."""
    pads = [self.data.geom(name).id for name in ("leftpad_geom", "rightpad_geom")]
    between = [(np.sort(self.data.contact.geom) == sorted((geom, pad))).all(axis=1) for pad in pads]
    return all(self.data.efc_force[self.data.contact.efc_address[rows]].sum() > 0 for rows in between)


class MetaWorld:
    env_ids = [f"metaworld_{name}" for name in (*BENCHMARKS, *METAWORLD)]
    env_ids += [f"metaworld_{task.removesuffix('-v3')}" for task in METAWORLD]
    trials = ("metaworld_reach-v3", "state"), ("metaworld_reach-v3", "rgb")
    action_dim = 4
    train_states = 50, 2**31  # none is an evaluation state

    def __init__(self, env_id, obs_mode, protocol):
        os.environ.setdefault("MUJOCO_GL", "egl")
        name = env_id.removeprefix("metaworld_")
        self.tasks = metaworld_tasks(name)
        self.prompts = {task: METAWORLD[task]["instruction"] for task in self.tasks}
        self.num_eval_states = 10 if name in ("mt50", "ml45") else 50
        self.max_episode_steps = {"paper": 100, "openpi": 500}[protocol]
        self.obs_mode, self.envs, self.renderers = (
            obs_mode,
            {},
            {},
        )  # one environment per task, built when it is needed

    def reset(self, task, state):
        from metaworld import env_dict, policies

        self.name = self.tasks[task]
        if self.name not in self.envs:
            env_dict.SawyerXYZEnv.touching_object = touching_object
            env = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{self.name}-goal-observable"](seed=0)
            env._freeze_rand_vec, env.seeded_rand_vec = False, True  # initial positions follow env.seed
            env.model.cam_pos[2] = 0.75, 0.075, 0.7  # of corner2, as in the public demonstrations
            if self.obs_mode == "fast":
                env.model.vis.quality.offsamples = env.model.light_castshadow[:] = 0
                env.model.mat_reflectance[:] = 0
            self.envs[self.name] = env
        self.env, self.expert = self.envs[self.name], getattr(policies, METAWORLD[self.name]["expert"])()
        self.env.seed(int(state))
        self.obs, _ = self.env.reset()

    def observe(self):
        if self.obs_mode == "state":
            return {"images": np.zeros((0, 1, 1, 3), np.uint8), "state": np.float32(self.obs)}
        return {"images": self.render(480)[None], "state": np.float32(self.obs[:4])}

    def step(self, action):
        self.obs, _, _, _, info = self.env.step(action)
        return float(info["success"]), bool(info["success"])

    def render(self, size):
        if (self.name, size) not in self.renderers:
            import mujoco

            self.renderers[self.name, size] = mujoco.Renderer(self.env.model, size, size)
        renderer = self.renderers[self.name, size]
        renderer.update_scene(self.env.data, "corner2")
        return renderer.render()[::-1, ::-1]  # this camera hangs upside down

    def expert_action(self):
        return np.clip(self.expert.get_action(self.obs), -1, 1).astype(np.float32)
