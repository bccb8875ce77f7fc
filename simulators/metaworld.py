"""MetaWorld: a Sawyer arm, 50 tasks of one object or two each, simulated by MuJoCo.

MT10 and MT50 train on ten and on all fifty tasks; ML45 trains on 45 and leaves out five. metaworld.json has
each task's instruction, class of difficulty, scripted expert and benchmarks. State and action are the same:

    state    with pictures: end effector (3) and gripper (1); without: all 39 numbers, the goal too
    action   motion of the end effector (3), gripper (1): 1 closes, -1 opens
    picture  480 x 480, camera corner2, placed as in the public demonstrations; fast: of the policy's size

An initial state is a seed of the simulator, which draws where objects and goal are.
"""

import json
import os
from pathlib import Path

import numpy as np

METAWORLD = json.loads(Path(__file__).with_suffix(".json").read_text())  # 50 tasks
BENCHMARKS = "mt10", "mt50", "ml45", "ml45_test"
SOURCE, DESTINATION = slice(4, 7), slice(36, 39)  # of the 39 numbers: the first object, the goal
MIDDLE, UNIT = np.array([0, 0.7, 0.1]), 8  # of the table, and of places: 0.16 are 2 cm, what a grasp forgives


def metaworld_tasks(name):
    """The task of that name, with or without its -v3, or the tasks of a benchmark; or of several, by a +."""
    found = []
    for part in name.split("+"):
        about = METAWORLD.items()
        tasks = [task for task, its in about if part in (task, task.removesuffix("-v3"), *its["benchmarks"])]
        if not tasks:
            raise ValueError(f"MetaWorld has no task {part!r}")
        found += [task for task in tasks if task not in found]
    return found


def touching_object(self, geom):
    """MetaWorld's own goes through all contacts in Python, twice: a third of a step's time."""
    pads = [self.data.geom(name).id for name in ("leftpad_geom", "rightpad_geom")]
    between = [(np.sort(self.data.contact.geom) == sorted((geom, pad))).all(axis=1) for pad in pads]
    return all(self.data.efc_force[self.data.contact.efc_address[rows]].sum() > 0 for rows in between)


class MetaWorld:
    env_ids = [f"metaworld_{name}" for name in (*BENCHMARKS, *METAWORLD)]
    env_ids += [f"metaworld_{task.removesuffix('-v3')}" for task in METAWORLD]
    env_ids += ["metaworld_*+*"]  # tasks together
    trials = ("metaworld_reach-v3", "state"), ("metaworld_reach-v3", "rgb")
    action_dim = 4
    train_states = 50, 2**31  # none is an evaluation state
    image_size = 480
    renderers = {}  # 60 MB each, so all environments of a process share one per task

    def __init__(self, env_id, obs_mode, protocol, image_size=image_size):
        os.environ.setdefault("MUJOCO_GL", "egl")
        name = env_id.removeprefix("metaworld_")
        self.tasks = metaworld_tasks(name)
        self.prompts = {task: METAWORLD[task]["instruction"] for task in self.tasks}
        self.num_eval_states = 10 if name in ("mt50", "ml45") else 50
        self.max_episode_steps = {"paper": 100, "openpi": 500}[protocol]
        self.obs_mode, self.image_size = obs_mode, image_size
        self.envs = {}  # one environment per task, built when it is needed

    def reset(self, task, state):
        import mujoco
        from metaworld import env_dict, policies

        self.name = self.tasks[task]
        if self.name not in self.envs:
            env_dict.SawyerXYZEnv.touching_object = touching_object
            env = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{self.name}-goal-observable"](seed=0)
            env._freeze_rand_vec, env.seeded_rand_vec = False, True  # initial positions follow env.seed
            env.model.cam_pos[2] = 0.75, 0.075, 0.7  # of corner2, as in the public demonstrations
            if self.obs_mode == "fast":
                env.model.vis.quality.offsamples = env.model.light_castshadow[:] = 0
                env.model.vis.quality.shadowsize = 0  # 70 MB of every renderer
                env.model.mat_reflectance[:] = 0
            self.envs[self.name] = env
        self.env, self.expert = self.envs[self.name], getattr(policies, METAWORLD[self.name]["expert"])()
        self.env.seed(int(state))
        self.obs, _ = self.env.reset()
        # a reset moves the goal's marker in the model only: the picture would have that of the last episode
        mujoco.mj_kinematics(self.env.model, self.env.data)

    def observe(self):
        if self.obs_mode == "state":
            return {"images": np.zeros((0, 1, 1, 3), np.uint8), "state": np.float32(self.obs)}
        return {"images": self.render(self.image_size)[None], "state": np.float32(self.obs[:4])}

    def step(self, action):
        self.obs, _, _, _, info = self.env.step(action)
        return float(info["success"]), bool(info["success"])

    def render(self, size):
        which = self.name, self.obs_mode, size
        if which not in self.renderers:
            import mujoco

            self.renderers[which] = mujoco.Renderer(self.env.model, size, size)
        renderer = self.renderers[which]
        renderer.update_scene(self.env.data, "corner2")
        return renderer.render()[::-1, ::-1]  # this camera hangs upside down

    def expert_action(self, aim_error=0):
        """The scripted expert's, which reads where source and destination are; aim_error (6,) moves them."""
        obs, moved = self.obs.copy(), np.zeros(6) + aim_error / UNIT
        obs[SOURCE] += moved[:3]
        obs[DESTINATION] += moved[3:]
        return np.clip(self.expert.get_action(obs), -1, 1).astype(np.float32)

    def places(self):
        """Privileged: where hand, source and destination are (3, 3)."""
        seen = np.stack([self.obs[:3], self.obs[SOURCE], self.obs[DESTINATION]])
        return ((seen - MIDDLE) * UNIT).astype(np.float32)

    def targets(self):
        """Privileged: where source and destination are (6,)."""
        return self.places()[1:].flatten()
