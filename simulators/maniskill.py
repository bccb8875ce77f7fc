"""ManiSkill: robot tasks on SAPIEN. Among them SIMPLER's: a WidowX arm before a photograph of the real one.

`maniskill_carrot` and its siblings are SIMPLER's four tasks, `maniskill:<Id>` is any task of ManiSkill that
says what success is, such as `maniskill:PickCube-v1`.

                     SIMPLER                                    another task
    state            six joints, two fingers                    robot and goal; without pictures, its own
    action           motion (3), rotation (3), gripper (1):     its default control
                     above 0.5 opens, otherwise closes
    picture          480 x 640, one camera                      its cameras
    reward           1 at success, 0.1 for the first grasp      1 at success
    initial states   its layouts, in training too               seeds of the simulator

Physics runs on the CPU, one environment at a time, or on a GPU for all at once (`--sim-device cuda`). SAPIEN
needs a Vulkan device, with or without pictures.
"""

import difflib
import os
import re

import numpy as np

SIMPLER = {  # the WidowX tasks, and how many layouts they have
    "carrot": ("PutCarrotOnPlateInScene-v1", 24),
    "spoon": ("PutSpoonOnTableClothInScene-v1", 24),
    "eggplant": ("PutEggplantInBasketScene-v1", 64),
    "cube": ("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 24),
}


def check_maniskill(name, obs_mode):
    """The backend that renders; a ValueError, one line, if ManiSkill's `name` could not be built here."""
    import mani_skill.envs
    import sapien
    from mani_skill.utils import assets, download_asset
    from mani_skill.utils.registration import REGISTERED_ENVS

    if name not in REGISTERED_ENVS:
        nearest = ", ".join(difflib.get_close_matches(name, REGISTERED_ENVS)) or "PickCube-v1"
        raise ValueError(f"unknown id {name!r}; did you mean one of: {nearest}?")
    if obs_mode == "state" and "state" not in REGISTERED_ENVS[name].cls.SUPPORTED_OBS_MODES:
        raise ValueError(f"{name} has pictures only, use --obs-mode rgb")
    needed = assets.expand_data_group_into_individual_data_source_ids(name)
    needed += ["widowx250s"] if name in dict(SIMPLER.values()) else []  # the robot's, not listed
    missing = [source for source in needed if not assets.is_data_source_downloaded(source)]
    if missing:
        download = " && ".join(f"python -m mani_skill.utils.download_asset -y {source}" for source in missing)
        raise ValueError(f"{name} needs assets that are not in {mani_skill.ASSET_DIR}: {download}")

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


def choose_backends(name, obs_mode, device):
    """ManiSkill's words for where physics and pictures are computed: "cuda" is this rank's GPU."""
    renders = check_maniskill(name, obs_mode)
    if device == "cpu":
        return {"sim_backend": "physx_cpu", "render_backend": renders}
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--sim-device cuda: torch finds no GPU here")
    rank = os.environ.get("LOCAL_RANK", 0)
    return {"sim_backend": f"physx_cuda:{rank}", "render_backend": f"cuda:{rank}"}


class ManiSkills:
    """`num_envs` of them in one scene: a batch on a GPU (batch_envs.py), or one on the CPU."""

    env_ids = [*(f"maniskill_{name}" for name in SIMPLER), "maniskill:*"]
    trials = ("maniskill:PickCube-v1", "state"), ("maniskill:PickCube-v1", "rgb"), ("maniskill_carrot", "rgb")

    def __init__(self, env_id, obs_mode, protocol, num_envs=1, device="cpu"):
        name = env_id[len("maniskill_") :]
        self.num_eval_states, self.train_states = 50, (50, 2**31)
        if name in SIMPLER:
            name, self.num_eval_states = SIMPLER[name]
            self.train_states = 0, self.num_eval_states
        backends = choose_backends(name, obs_mode, device)
        import mani_skill
        from mani_skill.utils.registration import REGISTERED_ENVS

        mani_skill.logger.setLevel("ERROR")  # otherwise two lines of warnings at every reset
        self.simpler, spec = name in dict(SIMPLER.values()), REGISTERED_ENVS[name]
        self.max_episode_steps = 48 if self.simpler and protocol == "paper" else spec.max_episode_steps
        modes = spec.cls.SUPPORTED_OBS_MODES  # the photograph needs the segmentation
        rgb = "rgb+segmentation" if "rgb+segmentation" in modes else "rgb"
        self.env = spec.make(num_envs=num_envs, obs_mode="state" if obs_mode == "state" else rgb, **backends)
        self.repeats = self.simpler  # can several of a batch begin in the same state?
        if "success" not in self.env.get_info():
            raise ValueError(f"{name} does not say what success is")
        self.action_dim = self.env.single_action_space.shape[0]
        words = re.sub("(?<=[a-z0-9])(?=[A-Z])", " ", name.rsplit("-v", 1)[0]).lower()
        self.prompts = {name: getattr(self.env, "get_language_instruction", lambda: [words])()[0]}

    def reset(self, task, state):
        import torch

        # SIMPLER's objects settle with the robot where the last episode left it: a new scene forgets that
        layouts = {"episode_id": torch.tensor(state, device=self.env.device), "reconfigure": True}
        self.obs, self.info = self.env.reset(seed=list(state), options=layouts if self.simpler else {})
        self.grasped = np.zeros(len(state), bool)

    def observe(self):
        if self.obs is None:  # with info: otherwise SIMPLER's count of consecutive grasps would go up
            self.obs = self.env.get_obs(self.info)
        if self.env.obs_mode == "state":
            state = np.float32(self.obs.cpu().numpy())
            return {"images": np.zeros((len(state), 0, 1, 1, 3), np.uint8), "state": state}
        images = [camera["rgb"].cpu().numpy() for camera in self.obs["sensor_data"].values()]
        state = self.env.agent.robot.get_qpos()
        if not self.simpler:
            from mani_skill.utils.common import flatten_state_dict

            state = flatten_state_dict({k: self.obs[k] for k in ("agent", "extra")}, use_torch=True)
        return {"images": np.stack(images, axis=1), "state": np.float32(state.cpu().numpy())}

    def step(self, action):
        """ManiSkill's own step without its observation, which draws a picture, and without its reward."""
        action = np.array(action, np.float32)
        if self.simpler:
            action[:, 6] = np.where(action[:, 6] > 0.5, 1, -1)
        self.env._step_action(action)
        self.env._elapsed_steps += 1
        self.obs, self.info = None, self.env.get_info()
        success = self.info["success"].cpu().numpy()
        reward = success.astype(float)
        if self.simpler:  # once in an episode
            reward += 0.1 * (self.info["is_src_obj_grasped"].cpu().numpy() & ~self.grasped)
            self.grasped |= self.info["is_src_obj_grasped"].cpu().numpy()
        return reward, success

    def render(self, size):
        from PIL import Image

        # SIMPLER's camera for people lacks the photograph behind the robot
        pictures = (
            ManiSkills.observe(self)["images"][:, 0]
            if self.simpler
            else self.env.render_rgb_array().cpu().numpy()
        )
        return np.stack([Image.fromarray(picture).resize((size, size)) for picture in pictures])

    def close(self):
        self.env.close()


class Alone:
    """One of a batch of one, as envs.py asks for it: to be derived from beside the batch."""

    def reset(self, task, state):
        super().reset([int(task)], [int(state)])

    def observe(self):
        return {name: field[0] for name, field in super().observe().items()}

    def step(self, action):
        reward, success = super().step(np.asarray(action)[None])
        return float(reward[0]), bool(success[0])

    def render(self, size):
        return super().render(size)[0]


class ManiSkill(Alone, ManiSkills):
    batch = ManiSkills
