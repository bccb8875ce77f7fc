"""Put-on-plate: 25 objects, 17 receptacles, 21 scenes, on ManiSkill; "generalization" in the paper's tables.

A WidowX arm, as in SIMPLER, before a photograph of a table: it has to grasp the object of its instruction and
put it on the receptacle. Training has 16 objects, 17 receptacles, 16 scenes, 4,352 combinations; each of the
twelve variants changes one thing that training never showed. RL4VLA's; the paper's numbers are by RLinf's.

    state    six joints, two fingers
    action   motion (3), rotation (3), gripper (1): above 0.5 opens, otherwise closes
    picture  480 x 640, one camera; robot and objects are rendered, all else is the photograph
    reward   0.1 for the first grasp, 0.1 for five steps of it in a row, 1 for success after a grasp
    success  the object lies on the receptacle and presses on it; the gripper may still hold it

An episode is a number, as in RLinf: its digits say which object, receptacle, scene, places and turn. A task
is an instruction, and the states of a task are the episodes that have it. RL4VLA lets objects settle before
an episode; here, as in RLinf, they fall a few centimetres in its first step.

It needs SIMPLER's assets, and RL4VLA's folder of meshes and photographs: RL4VLA_ASSETS.
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np

from simulators.maniskill import Alone, choose_backends
from simulators.put_on_plate_episodes import MOVE_STEP, TEMPLATES, VARIANTS, episode, num_episodes

FOLDERS = {"object": "more_carrot", "receptacle": "more_plate", "scene": "more_table"}
ROBOT = (0.147, 0.028, 0.870), (0, 0, 0, 1)  # where its base stands
JOINTS = -0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037


def find_assets():
    """RL4VLA's folder, and its lists of objects, receptacles and scenes: {kind: [{"file", "name", ...}]}."""
    from mani_skill import ASSET_DIR

    folder, lists = Path(os.environ.get("RL4VLA_ASSETS") or ASSET_DIR / "carrot"), {}
    for kind, part in FOLDERS.items():
        file = folder / part / "model_db.json"
        if not file.is_file():
            advice = "set RL4VLA_ASSETS to ManiSkill/mani_skill/assets/carrot of github.com/gen-robot/RL4VLA"
            raise ValueError(f"put-on-plate's assets are missing, there is no {file}: {advice}")
        lists[kind] = [{"file": name} | line for name, line in json.loads(file.read_text()).items()]
    return folder, lists


def make_scene(backends, things, lists, folder):
    """ManiSkill's environments of SIMPLER's carrot, with other things on each table: `things`, a list."""
    import sapien
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.put_on_in_scene import (
        PutCarrotOnPlateInScene,
    )

    class Scene(PutCarrotOnPlateInScene):  # whose robot, camera, lights and stage it has
        rgb_overlay_mode = "none"  # no photograph: that is `blend`'s work

        def _load_scene(self, options):  # at every reset; of all 42 things only those on the table
            # in the order in which RLinf loads them: physics depends on it
            self.obj_names = [(i, *thing) for i, those in enumerate(self.things) for thing in sorted(those)]
            self.model_db = {(i, kind, index): lists[kind][index] for i, kind, index in self.obj_names}
            self.objs, (self.source_obj_name, self.target_obj_name, *_) = {}, self.obj_names
            self.objects_excluded_from_greenscreening = []
            super()._load_scene(options)

        def _build_actor_helper(self, name):
            i, kind, index = name
            line, builder = self.model_db[name], self.scene.create_actor_builder()
            files = folder / FOLDERS[kind] / line["file"]
            builder.add_multiple_convex_collisions_from_file(
                str(files / "collision.obj"),
                material=sapien.physx.PhysxMaterial(1.0, 1.0, 0.0),  # twice the friction of SIMPLER's objects
                density=line["density"],
            )
            builder.add_visual_from_file(str(next(files.glob("textured.[dg]*"))))  # .dae or .glb
            builder.initial_pose = sapien.Pose(*self.things[i][kind, index])
            builder.set_scene_idxs([i])
            return builder.build(name=f"{i} {line['file']}")

        def _initialize_episode(self, env_idx, options):  # without SIMPLER's settling
            self.agent.robot.set_pose(sapien.Pose(*ROBOT))
            self.agent.reset(init_qpos=np.array(JOINTS))

        def evaluate(self):
            return {}

        def merged(self, kind, indices):
            """One thing of each table, together."""
            from mani_skill.utils.structs import Actor

            return Actor.merge([self.objs[i, kind, index] for i, index in enumerate(indices)], kind)

    Scene.things = things
    return Scene(num_envs=len(things), obs_mode="rgb+segmentation", **backends)


def blend(rgb, kept, photo, texture, strength, whole):
    """The picture: rendered where `kept` (H, W), elsewhere the photograph, and a texture over it.

    Over what is kept, the texture is fitted to the box around that. Over the whole picture, it is twice as
    large, and seen from the centre of that box on: it moves with the robot.
    """
    picture = np.where(kept[..., None], rgb, photo).astype(np.float32)
    if strength:
        import torch

        rows, columns = np.nonzero(kept)
        y, x, y_end, x_end = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        if whole:
            height, width = kept.shape
            y = np.clip((y + y_end - 1) // 2, 1, height - 1)
            x = np.clip((x + x_end - 1) // 2, 1, width - 1)
            picture = picture * (1 - strength) + texture[y : y + height, x : x + width] * strength
        else:
            box, channels = picture[y:y_end, x:x_end], torch.tensor(texture).permute(2, 0, 1)
            fitted = torch.nn.functional.interpolate(channels[None], box.shape[:2], mode="bilinear")
            mixed = fitted[0].permute(1, 2, 0).numpy() * strength + box * (1 - strength)
            box[:] = np.where(kept[y:y_end, x:x_end, None], mixed, box)
    return np.clip(picture, 0, 255).astype(np.uint8)


class PutOnPlates:
    """A table for each of `num_envs`: a batch on a GPU (batch_envs.py), or one on the CPU."""

    env_ids = list(VARIANTS)
    trials = (("maniskill_25main", "rgb"),)
    # of both ids of training
    variations = dict.fromkeys(list(VARIANTS)[:2], {e: v.group for e, v in VARIANTS.items() if v.group})
    action_dim, max_episode_steps = 7, 80
    repeats = True  # several of a batch can begin in the same state

    def __init__(self, env_id, obs_mode, protocol, num_envs=1, device="cpu"):
        self.env_id, self.variant = env_id, VARIANTS[env_id]
        # of SIMPLER's task, which has robot, stage and camera
        self.backends = choose_backends("PutCarrotOnPlateInScene-v1", obs_mode, device)
        self.folder, self.lists = find_assets()
        import mani_skill
        from PIL import Image

        self.about = f"PutOnPlateInScene25{self.variant.name}"
        photo = self.folder / FOLDERS["scene"] / "imgs" / self.lists["scene"][0]["file"]
        if Image.open(photo).size != (640, 480):
            self.about += " (reduced assets: not for comparison)"
        mani_skill.logger.setLevel("ERROR")  # otherwise two lines of warnings at every reset
        # an instruction depends on the slowest digits only: each has as many episodes, one after the other
        choices = [self.variant.digits.get(name, (0,)) for name in ("object", "receptacle", "template")]
        said = [self.instruction(*which) for which in itertools.product(*choices)]
        self.prompts = dict(zip(said, said))
        self.num_episodes = num_episodes(env_id) // len(self.prompts)
        self.num_eval_states = max(1, round(320 / len(self.prompts)))  # RLinf evaluates on 320 episodes
        self.train_states = self.num_eval_states, self.num_eval_states + self.num_episodes
        self.scene = None

    def instruction(self, object, receptacle, template):
        names = self.lists["object"][object]["name"], self.lists["receptacle"][receptacle]["name"]
        return TEMPLATES[template].format(o=names[0], p=names[1])

    def number(self, task, state):
        """The first states are an evaluation's, drawn once for all; the others a task's episodes in turn."""
        within = state - self.num_eval_states
        if within < 0:
            within = np.random.default_rng((task, state)).integers(self.num_episodes)
        return int(task) * self.num_episodes + int(within)

    def reset(self, task, state):
        import sapien
        from mani_skill.utils.structs import Pose

        self.now = [episode(self.env_id, self.number(*which)) for which in zip(task, state)]
        things = [now["things"] for now in self.now]
        if self.scene is None:
            self.scene = make_scene(self.backends, things, self.lists, self.folder)
        self.scene.things = things
        self.obs, _ = self.scene.reset(seed=0, options={"reconfigure": True})  # anew: nothing is left over
        chosen = {kind: [now[kind] for now in self.now] for kind in ("object", "receptacle")}
        self.object, self.receptacle = (self.scene.merged(*each) for each in chosen.items())
        self.target = None
        if self.variant.moves:
            poses = [sapien.Pose(*now["target"]) for now in self.now]
            self.target = Pose.create(poses, device=self.scene.device)
        self.backgrounds = [self.read_background(now) for now in self.now]
        boxes = [[self.lists[kind][i]["bbox"] for i in indices] for kind, indices in chosen.items()]
        self.half_sizes = np.array(
            [[np.subtract(box["max"], box["min"]) / 2 for box in each] for each in boxes]
        )
        self.length, self.in_a_row, self.earned = 0, np.zeros(len(task), int), np.zeros(len(task))
        self.grasped, self.held = np.zeros((2, len(task)), bool)

    def step(self, action):
        """ManiSkill's own step without its observation, which draws a picture."""
        action = np.array(action, np.float32)
        action[:, 6] = np.where(action[:, 6] > 0.5, 1, -1)
        self.scene._step_action(action)
        self.obs, self.length = None, self.length + 1
        if self.target and self.length == MOVE_STEP:
            self.object.set_pose(self.target)  # they keep their velocity
            if self.scene.gpu_sim_enabled:
                self.scene.scene._gpu_apply_all()
                self.scene.scene._gpu_fetch_all()
        holds = self.scene.agent.is_grasping(self.object).cpu().numpy()
        self.in_a_row = np.where(holds, self.in_a_row + 1, 0)
        self.grasped |= holds
        self.held |= self.in_a_row == 5
        success = self.is_on()
        before, self.earned = self.earned, 0.1 * self.grasped + 0.1 * self.held + (self.grasped & success)
        return self.earned - before, success

    def is_on(self):
        """Near the receptacle's centre, above it and in contact with it; sizes are those of the beginning."""
        x, y, z = (self.object.pose.p - self.receptacle.pose.p).cpu().numpy().astype(float).T
        object, receptacle = self.half_sizes  # at the beginning nothing is turned but objects about z
        force = self.scene.scene.get_pairwise_contact_forces(self.object, self.receptacle).norm(dim=1)
        near = np.hypot(x, y) <= receptacle.max(axis=1) + 0.01  # the greatest of all three
        above = (z > 0) & (z <= receptacle[:, 2] + object[:, 2] + 0.05)
        return near & above & (force.cpu().numpy() > 0.03)

    def observe(self):
        if self.obs is None:
            self.obs = self.scene.get_obs()
        camera = {name: x.cpu().numpy() for name, x in self.obs["sensor_data"]["3rd_view_camera"].items()}
        robot = [link.per_scene_id.cpu().numpy() for link in self.scene.agent.robot.get_links()]
        kept = [list(ids) for ids in np.stack(robot, axis=1)]  # of each table
        for (i, *_), thing in self.scene.objs.items():
            kept[i].append(int(thing.per_scene_id))
        pictures = [
            blend(rgb, np.isin(segmentation[..., 0], ids), *background, self.variant.whole)
            for rgb, segmentation, ids, background in zip(
                camera["rgb"], camera["segmentation"], kept, self.backgrounds
            )
        ]
        state = self.scene.agent.robot.get_qpos().cpu().numpy()
        return {"images": np.stack(pictures)[:, None], "state": np.float32(state)}

    def read_background(self, now):
        import cv2
        from PIL import Image

        def read(part, file, size):
            path = self.folder / FOLDERS["scene"] / part / file
            return cv2.resize(np.asarray(Image.open(path).convert("RGB")), size)

        scenes = self.lists["scene"]
        chosen = scenes[now["texture"]]  # as in RL4VLA; RLinf takes the scene's own
        photo = read("imgs", scenes[now["scene"]]["file"], (640, 480))
        texture = read("textures", chosen["texture"], (1280, 960) if self.variant.whole else (640, 480))
        return photo, np.float32(texture), self.variant.texture * chosen["mix"]

    def render(self, size):
        from PIL import Image

        pictures = PutOnPlates.observe(self)["images"][:, 0]
        return np.stack([Image.fromarray(picture).resize((size, size)) for picture in pictures])

    def close(self):
        if self.scene is not None:
            self.scene.close()


class PutOnPlate(Alone, PutOnPlates):
    batch = PutOnPlates
