"""One make_envs() for every simulator: a vector of environments stepped in chunks of actions.

    envs = make_envs("tabletop", num_envs=256, seed=1)
    obs, info = envs.reset()                                               # {"images", "state", "prompt"}
    obs, reward, terminated, truncated, info = envs.step_chunk(actions)    # (N, C, D) -> reward (N, C)

The observation is {"images": (N, cams, H, W, 3) uint8, "state": (N, S) float32, "prompt": [str] * N}. Success
is a true end (terminated); the step limit is not (truncated), so a value function bootstraps there from the
observation the episode ended with, info["final_obs"].

The tabletop is built in and computes all environments at once. The others run in processes: a class for each
of them (MetaWorld, Libero, ManiSkill) says what differs, `Block` is some of them in one process, `Simulators`
is all blocks. `python envs.py --check` tries each of them and says what is missing.
"""

import difflib
import functools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.utils import batch_space

from tabletop import EVAL_STATES, TASKS, Tabletop, select_rows


def fail(message):
    """A user's mistake: one line on stderr and exit code 2, never a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_envs(env_id, num_envs, seed, partial_reset=True, group_size=1, obs_mode="rgb", protocol="paper"):
    """`partial_reset`: an environment whose episode ended starts a new one instead of waiting for reset().

    `group_size`: at a reset, so many neighbours start from the same state and task. Not by a partial reset.
    `obs_mode`: "state" is without pictures, and the state is all that the simulator tells; "fast" pictures
    are without shadows. `protocol`: whose step limit, where openpi's or lerobot's is not the paper's.
    """
    known = ["tabletop", *(f"tabletop_{task}" for task in TASKS), *LIBERO_STEPS]
    known += [f"metaworld_{name}" for name in (*METAWORLD, "mt10", "mt50", "ml45", "ml45_test")]
    env_id = f"{env_id}-v3" if f"{env_id}-v3" in known else env_id
    known += [f"maniskill_{name}" for name in SIMPLER]
    if env_id not in known and not env_id.startswith("maniskill:"):
        families = "tabletop", *LIBERO_STEPS, "metaworld_<task>", "maniskill_carrot", "maniskill:<Id>"
        nearest = difflib.get_close_matches(env_id, known, n=5) or families
        fail(f"unknown env_id {env_id!r}; did you mean one of: {', '.join(nearest)}?")
    if num_envs < 1:
        fail(f"num_envs must be at least 1, got {num_envs}")
    if group_size < 1 or num_envs % group_size:
        fail(f"group_size {group_size} does not divide num_envs {num_envs}")
    if env_id.startswith("tabletop"):
        tasks = list(TASKS) if env_id == "tabletop" else [env_id.removeprefix("tabletop_")]
        return Tabletop(tasks, num_envs, seed, partial_reset, group_size)
    family, name = re.split("[_:]", env_id, maxsplit=1)
    if family == "libero":
        build, eval_states, train_states = functools.partial(Libero, env_id), EVAL_STATES, (0, EVAL_STATES)
    elif family == "metaworld":
        build = functools.partial(MetaWorld, metaworld_tasks(name))
        eval_states = 10 if name in ("mt50", "ml45") else EVAL_STATES
        train_states = EVAL_STATES, 2**31  # of a seeded simulator: none is an evaluation state
    else:
        full, eval_states = SIMPLER.get(name, (name, EVAL_STATES))
        build = functools.partial(ManiSkill, full)
        train_states = (0, eval_states) if name in SIMPLER else (EVAL_STATES, 2**31)
    build = functools.partial(build, obs_mode=obs_mode, protocol=protocol)
    return Simulators(env_id, build, eval_states, train_states, num_envs, seed, partial_reset, group_size)


# Simulators in processes ------------------------------------------------------------------------------------

METAWORLD = json.loads((Path(__file__).parent / "metaworld.json").read_text())  # 50 tasks


def metaworld_tasks(name):
    """The task of that name, or the tasks of a benchmark."""
    return [task for task, about in METAWORLD.items() if name in (task, *about["benchmarks"])]


def touching_object(self, geom):
    """MetaWorld's own goes through all contacts in Python, twice: a third of a step's time."""
    pads = [self.data.geom(name).id for name in ("leftpad_geom", "rightpad_geom")]
    between = [(np.sort(self.data.contact.geom) == sorted((geom, pad))).all(axis=1) for pad in pads]
    return all(self.data.efc_force[self.data.contact.efc_address[rows]].sum() > 0 for rows in between)


class MetaWorld:
    """Sawyer arm, 50 tasks. State: end effector and gripper (4); without pictures all 39, the goal too."""

    def __init__(self, tasks, obs_mode, protocol):
        os.environ.setdefault("MUJOCO_GL", "egl")
        self.prompts = {task: METAWORLD[task]["instruction"] for task in tasks}
        self.tasks, self.obs_mode, self.envs, self.renderers = tasks, obs_mode, {}, {}
        self.max_episode_steps, self.action_dim = {"paper": 100, "openpi": 500}[protocol], 4

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


LIBERO_STEPS = {  # an episode's: (the paper's, openpi's); the ten steps in which objects settle do not count
    "libero_spatial": (240, 220), "libero_object": (320, 280), "libero_goal": (320, 300),
    "libero_10": (480, 520), "libero_90": (400, 400),
}  # fmt: skip


def import_libero():
    """LIBERO's folder. Imports it without its questions and without files in the user's home."""
    with tempfile.TemporaryDirectory() as folder:  # its config.yaml must exist; nothing reads it
        Path(folder, "config.yaml").touch()
        os.environ["LIBERO_CONFIG_PATH"] = folder
        import libero.libero
    folder = os.environ.get("LIBERO_ASSETS") or libero.libero.get_assets_path()  # downloads them, once
    if not Path(folder, "scenes").is_dir():
        advice = "unpack them and set LIBERO_ASSETS to the folder"
        raise ValueError(f"LIBERO's assets are missing, {folder} has no scenes: {advice}")
    libero.libero._assets_path_cache = folder  # it does not read the entry of its config file
    return Path(libero.libero.__file__).parent


class Libero:
    """Franka arm, suites of ten tasks with fifty fixed initial states each.

    State: position (3) and axis-angle (3) of the end effector, the two fingers. Action -1 opens the gripper.
    """

    action_dim = 7
    # What a picture depends on. robosuite takes a step's observation in the 24th of its 25 substeps; these
    # are noted there and drawn when asked for: its own cameras' pictures, but not one for every step.
    POSES = "geom_xpos geom_xmat site_xpos site_xmat cam_xpos cam_xmat light_xpos light_xdir".split()

    def __init__(self, suite, obs_mode, protocol):
        os.environ.setdefault("MUJOCO_GL", "egl")
        self.suite, self.obs_mode, self.task, self.env = suite, obs_mode, None, None
        self.folder = import_libero()
        from libero.libero.benchmark import task_maps

        self.prompts = {task.name: task.language for task in task_maps[suite].values()}
        self.max_episode_steps = dict(zip(("paper", "openpi"), LIBERO_STEPS[suite]))[protocol]

    def _build(self, task):
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # three lines about macros per process
        import torch
        from libero.libero.envs.env_wrapper import ControlEnv
        from robosuite.utils.observables import Observable, sensor

        if self.env is not None:
            self.env.close()
        name = list(self.prompts)[task]
        self.env = ControlEnv(
            bddl_file_name=f"{self.folder}/bddl_files/{self.suite}/{name}.bddl",
            use_camera_obs=False, has_offscreen_renderer=False,
            ignore_done=True,  # how long an episode lasts is decided in Block
            hard_reset=False,  # a reset keeps the compiled scene
        )  # fmt: skip
        rebuild = np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"  # NumPy 1's name
        numpy = [rebuild, np.ndarray, np.dtype, np.dtypes.Float64DType]
        with torch.serialization.safe_globals(numpy):  # arrays, and nothing else
            file = f"{self.folder}/init_files/{self.suite}/{name}.pruned_init"
            self.states, self.task = torch.load(file, weights_only=True), task  # (50, 1 + nq + nv)

        @sensor(modality="poses")
        def note_poses(_):
            self.poses = {name: getattr(self.env.sim.data, name).copy() for name in self.POSES}
            return np.zeros(1)

        robosuite, needed = self.env.env, ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        robosuite._observables = {name: robosuite._observables[name] for name in needed}
        robosuite.add_observable(Observable("poses", note_poses))

    def reset(self, task, state):
        if task != self.task:
            self._build(task)
        from robosuite.utils.errors import RandomizationError

        np.random.seed(state)  # the furniture is no part of the initial state: a reset draws it, within 1 cm
        while True:
            try:
                self.env.env.reset()  # LIBERO's own reset() retries after any error, so some hang for ever
                break
            except RandomizationError:  # objects did not fit where they were drawn
                pass
        self.env.robots[0].gripper.current_action = np.zeros(1)  # the last episode's, as the scene was kept
        self.obs = self.env.set_init_state(self.states[state])
        for _ in range(10):  # objects settle, the gripper opens
            self.step([0, 0, 0, 0, 0, 0, -1])

    def step(self, action):
        self.obs, reward, success, _ = self.env.step(np.asarray(action, np.float64))
        return float(reward), bool(success)

    def observe(self):
        quat = self.obs["robot0_eef_quat"]  # x, y, z, w
        cos = np.clip(quat[3], -1, 1)  # of half the angle, which is in [0, 2 pi]: not the shorter way
        sin = np.sqrt(1 - cos * cos)
        axis_angle = quat[:3] / sin * 2 * np.arccos(cos) if sin > 0 else np.zeros(3)
        state = np.concatenate([self.obs["robot0_eef_pos"], axis_angle, self.obs["robot0_gripper_qpos"]])
        images = np.zeros((0, 1, 1, 3), np.uint8)
        if self.obs_mode != "state":  # the checkpoints were trained on mirrored pictures
            images = np.stack([self.render(256, eye)[:, ::-1] for eye in ("agentview", "robot0_eye_in_hand")])
        return {"images": images, "state": state.astype(np.float32)}

    def render(self, size, camera="agentview"):
        """The scene as the camera sees it, upright: left is the left of LIBERO's instructions."""
        sim = self.env.sim
        if sim._render_context_offscreen is None:
            from robosuite.utils.binding_utils import MjRenderContextOffscreen

            if self.obs_mode == "fast":  # before the context, which reads offsamples once
                sim.model.vis.quality.offsamples = 0
                sim.model.light_castshadow[:], sim.model.mat_reflectance[:] = 0, 0
            MjRenderContextOffscreen(sim, device_id=-1).vopt.geomgroup[0] = 0  # no collision shapes
        sim._render_context_offscreen.gl_ctx.make_current()
        for name, value in self.poses.items():
            getattr(sim.data, name)[:] = value  # the next step computes them anew
        return sim.render(size, size, camera_name=camera)[::-1]  # OpenGL's first row is the lowest


SIMPLER = {  # the WidowX tasks, and how many layouts they have
    "carrot": ("PutCarrotOnPlateInScene-v1", 24), "spoon": ("PutSpoonOnTableClothInScene-v1", 24),
    "eggplant": ("PutEggplantInBasketScene-v1", 64),
    "cube": ("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 24),
}  # fmt: skip


def check_maniskill(env_id, obs_mode):
    """The backend that renders; a ValueError, one line, if this environment could not be built here."""
    import mani_skill.envs
    import sapien
    from mani_skill.utils import assets, download_asset
    from mani_skill.utils.registration import REGISTERED_ENVS

    if env_id not in REGISTERED_ENVS:
        nearest = ", ".join(difflib.get_close_matches(env_id, REGISTERED_ENVS)) or "PickCube-v1"
        raise ValueError(f"unknown id {env_id!r}; did you mean one of: {nearest}?")
    if obs_mode == "state" and "state" not in REGISTERED_ENVS[env_id].cls.SUPPORTED_OBS_MODES:
        raise ValueError(f"{env_id} has pictures only, use --obs-mode rgb")
    needed = assets.expand_data_group_into_individual_data_source_ids(env_id)
    needed += ["widowx250s"] if env_id in dict(SIMPLER.values()) else []  # the robot's, not listed
    missing = [name for name in needed if not assets.is_data_source_downloaded(name)]
    if missing:
        download = " && ".join(f"python -m mani_skill.utils.download_asset -y {name}" for name in missing)
        raise ValueError(f"{env_id} needs assets that are not in {mani_skill.ASSET_DIR}: {download}")

    def refuse(question):  # ManiSkill would ask (y|n) on stdin, for a robot's assets even while building
        raise ValueError(f"{question} Use: python -m mani_skill.utils.download_asset")

    download_asset.prompt_yes_no = refuse
    for backend, device in {"gpu": "cuda", "cpu": "pci:0"}.items():  # "cpu" says no even where it renders
        try:
            if sapien.Device(device).can_render():
                return backend
        except RuntimeError:  # there is no such device
            pass
    raise ValueError("no Vulkan device, which it needs even without pictures: a GPU's or Mesa 25's, make apt")


class ManiSkill:
    """Any task of ManiSkill that says what success is. SIMPLER: WidowX arm before a photograph, one camera.

    Its state is six joints and two fingers, action 1 opens the gripper and 0 closes it, 0.1 for a grasp.
    """

    def __init__(self, env_id, obs_mode, protocol):
        backends = {"sim_backend": "physx_cpu", "render_backend": check_maniskill(env_id, obs_mode)}
        import mani_skill
        from mani_skill.utils.registration import REGISTERED_ENVS

        mani_skill.logger.setLevel("ERROR")  # otherwise two lines of warnings at every reset
        self.simpler, spec = env_id in dict(SIMPLER.values()), REGISTERED_ENVS[env_id]
        self.max_episode_steps = 48 if self.simpler and protocol == "paper" else spec.max_episode_steps
        modes = spec.cls.SUPPORTED_OBS_MODES  # the photograph needs the segmentation
        rgb = "rgb+segmentation" if "rgb+segmentation" in modes else "rgb"
        self.env = spec.make(num_envs=1, obs_mode="state" if obs_mode == "state" else rgb, **backends)
        if "success" not in self.env.get_info():
            raise ValueError(f"{env_id} does not say what success is")
        self.action_dim = self.env.single_action_space.shape[0]
        words = re.sub("(?<=[a-z0-9])(?=[A-Z])", " ", env_id.rsplit("-v", 1)[0]).lower()
        self.prompts = {env_id: getattr(self.env, "get_language_instruction", lambda: [words])()[0]}

    def reset(self, task, state):
        # SIMPLER's objects settle with the robot where the last episode left it: a new scene forgets that
        options = {"episode_id": int(state), "reconfigure": True} if self.simpler else {}
        self.obs, self.info = self.env.reset(seed=int(state), options=options)
        self.grasped = False

    def observe(self):
        if self.obs is None:  # with info: otherwise SIMPLER's count of consecutive grasps would go up
            self.obs = self.env.get_obs(self.info)
        if self.env.obs_mode == "state":
            return {"images": np.zeros((0, 1, 1, 3), np.uint8), "state": np.float32(self.obs[0].numpy())}
        images = [camera["rgb"][0].numpy() for camera in self.obs["sensor_data"].values()]
        state = self.env.agent.robot.get_qpos()
        if not self.simpler:
            from mani_skill.utils.common import flatten_state_dict

            state = flatten_state_dict({k: self.obs[k] for k in ("agent", "extra")}, use_torch=True)
        return {"images": np.stack(images), "state": np.float32(state[0].numpy())}

    def step(self, action):
        """ManiSkill's own step without its observation, which draws a picture, and without its reward."""
        action = np.array(action, np.float32)
        if self.simpler:
            action[6] = 1 if action[6] > 0.5 else -1
        self.env._step_action(action)
        self.env._elapsed_steps += 1
        self.obs, self.info = None, self.env.get_info()
        success, reward = bool(self.info["success"]), float(self.info["success"])
        if self.simpler and self.info["is_src_obj_grasped"] and not self.grasped:  # once in an episode
            self.grasped, reward = True, reward + 0.1
        return reward, success

    def render(self, size):
        from PIL import Image

        # SIMPLER's camera for people lacks the photograph behind the robot
        picture = self.observe()["images"][0] if self.simpler else self.env.render_rgb_array()[0].numpy()
        return np.asarray(Image.fromarray(picture).resize((size, size)))


class Block(gym.Env):
    """Some simulators in one process, stepped one after the other: to AsyncVectorEnv one environment."""

    def __init__(self, build, observation_space, action_space, index, count):
        self.build, self.rows, self.count = build, slice(index * count, (index + 1) * count), count
        self.observation_space, self.action_space = observation_space, action_space
        self.simulators, self.record, self.frames = [], 0, []  # built when they are needed
        self.obs = {key: np.zeros(box.shape, box.dtype) for key, box in observation_space.items()}
        self.task, self.state, self.length = np.zeros((3, count), int)
        self.alive = np.zeros(count, bool)

    def _tell(self, row, error):  # with what is needed to meet it again
        where = f"task {self.task[row]}, initial state {self.state[row]}, step {self.length[row]}"
        return RuntimeError(f"{where}: {type(error).__name__}: {str(error).strip()}")

    def _observe(self, row):
        for key, value in self.simulators[row].observe().items():
            self.obs[key][row] = value

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
        return self.obs, {}

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
        truncated = self.alive & ~success & (self.length >= simulator.max_episode_steps)
        self.alive &= ~(success | truncated)
        told = {"reward": reward, "terminated": success, "truncated": truncated, "length": self.length.copy()}
        return self.obs, 0.0, False, False, told

    def expert_action(self):
        return np.stack([simulator.expert_action() for simulator in self.simulators])


def describe(build):
    """What has to be known before the processes begin: step limit, sizes, prompts."""
    simulator = build()
    simulator.reset(0, 0)
    images, state = (simulator.observe()[key].shape for key in ("images", "state"))
    return simulator.max_episode_steps, simulator.action_dim, simulator.prompts, images, state


class Simulators(gym.vector.VectorEnv):
    """Simulators in at most as many processes as there are cores. An episode: a task and an initial state."""

    def __init__(self, env_id, build, eval_states, train_states, num_envs, seed, partial_reset, group_size):
        self.env_id, self.num_envs, self.group_size = env_id, num_envs, group_size
        self.partial_reset, self.eval_states, self.train_states = partial_reset, eval_states, train_states
        try:  # one first, where an error can be told in a line, in a process, where nothing is left of it
            with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
                self.max_episode_steps, dim, prompts, images, state = pool.submit(describe, build).result()
        except Exception as error:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            advice = "" if isinstance(error, ValueError) else " (make install; as root, make apt; make check)"
            fail(f"{env_id}: {what}{advice}")
        self.tasks, self.prompts = list(prompts), list(prompts.values())
        self.num_eval_states = self.eval_states * len(self.tasks)
        self.num_eval_envs = min(self.num_eval_states, num_envs)  # at once
        images, state = spaces.Box(0, 255, images, np.uint8), spaces.Box(-np.inf, np.inf, state, np.float32)
        self.single_observation_space = spaces.Dict({"images": images, "state": state})
        self.single_action_space = spaces.Box(-1, 1, (dim,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        workers = max(n for n in range(1, len(os.sched_getaffinity(0)) + 1) if num_envs % n == 0)
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

    def reset(self, *, seed=None, options=None):
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
        return self._observation(self._ask("reset", options=options)[0])

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

    def _observation(self, obs):
        obs = {key: value.reshape(self.num_envs, *value.shape[2:]) for key, value in obs.items()}
        return obs | {"prompt": [self.prompts[task] for task in self.task]}

    def step_chunk(self, actions):
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
        obs, names = self._observation(obs), ("reward", "terminated", "truncated", "length")
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

    def expert_action(self, aim_error=0):  # MetaWorld's scripted experts
        return np.concatenate(self._ask("call", "expert_action"))

    def close(self):
        if self.processes is not None:
            for process in self.processes.processes:
                process.kill()
                process.join()
            self.processes.closed, self.processes = True, None


def write_gif(path, frames, caption="", fps=10):
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
    for trial in ("tabletop rgb", "metaworld_reach-v3 state", "metaworld_reach-v3 rgb", "libero_goal state",
                  "libero_goal rgb", "maniskill:PickCube-v1 state", "maniskill:PickCube-v1 rgb",
                  "maniskill_carrot rgb"):  # fmt: skip
        command = [sys.executable, __file__, "--try", *trial.split()]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        told = (done.stderr if done.returncode else done.stdout).strip() or f"exit code {done.returncode}"
        print("| {:22} | {:5} |".format(*trial.split()), told.splitlines()[-1].removeprefix("error: "))


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
