"""Put-on-plate: 25 objects, 17 receptacles, 21 scenes, on ManiSkill; "generalization" in the paper's tables.

A WidowX arm, as in SIMPLER, before a photograph of a table: it has to grasp the object of its instruction and
put it on the receptacle. Training has 16 objects, 17 receptacles, 16 scenes, 4,352 combinations; each of the
twelve variants changes one thing that training never showed. RL4VLA made the benchmark, RLinf's version of it
gave the paper's numbers.

    state    six joints, two fingers
    action   motion (3), rotation (3), gripper (1): above 0.5 opens, otherwise closes
    picture  480 x 640, one camera; robot and objects are rendered, all else is the photograph
    reward   0.1 for the first grasp, 0.1 for five steps of it in a row, 1 for success after a grasp
    success  the object lies on the receptacle and presses on it; the gripper may still hold it

An episode is a number, as in RLinf: its digits say which object, receptacle, scene, places and turn. A task
is an instruction, and the states of a task are the episodes that have it. RL4VLA lets objects settle before
an episode; here, as in RLinf, they fall a few centimetres in its first step.

RL4VLA's folder of meshes and photographs is needed, RL4VLA_ASSETS says where it is, and what SIMPLER needs.
"""

import itertools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simulators.maniskill import check_maniskill

# Where things can stand: points of a grid of 3 cm, (a, b) with a the slower one, 0 to 5 in each direction
GRID = list(itertools.product(range(6), range(6)))
RING = [point for point in itertools.product(range(-1, 7), range(-1, 7)) if point not in GRID]
# Pairs of points that are 15 cm apart and were more than that in RLinf's floating point: 6 a + b of each
ROUNDED_UP = {(6, 28), (6, 33), (7, 29), (7, 34), (8, 35), (9, 30), (10, 24), (10, 31), (11, 25), (11, 32)}


def over_7_cm(p, q):
    return math.dist(p, q) > 7 / 3


def over_15_cm(p, q):
    return math.dist(p, q) > 5 or tuple(sorted((6 * p[0] + p[1], 6 * q[0] + q[1]))) in ROUNDED_UP


# places of the object and the receptacle, and of a third: another thing's, or where the object moves to
PAIRS, RING_PAIRS = ([(o, r) for o in grid for r in grid if over_7_cm(o, r)] for grid in (GRID, RING))
FAR_OBJECT = [(*p, t) for p in PAIRS for t in GRID if over_7_cm(p[1], t) and over_15_cm(p[0], t)]
FAR_RECEPTACLE = [(*p, t) for p in PAIRS for t in GRID if over_15_cm(p[1], t) and over_7_cm(p[0], t)]
TURNS, NEW_TURNS = (0, 45, 90, 135), (-22.5, -67.5, -112.5, -157.5)  # of the objects, in degrees
TEMPLATES = (
    "put {o} on {p}",  # wherever the instruction is not what changes
    "Place the {o} on the {p}",
    "set {o} on {p}",
    "move the {o} to the {p}",
    "Take the {o} and put it on the {p}",
    "pick up {o} and set it down on {p}",
    "please put the {o} on the {p}",
    "Put {o} onto {p}.",
    "place the {o} onto the {p} surface",
    "Make sure {o} is on {p}.",
    "on the {p}, put the {o}",
    "put the {o} where the {p} is",
    "Move the {o} from the table to the {p}",
    "Move {o} so it’s on {p}.",
    "Can you put {o} on {p}?",
    "{o} on the {p}, please.",
    "the {o} should be placed on the {p}.",
)


class Variant(NamedTuple):
    """`digits`: of an episode's number, the slowest first, and what each can be. Receptacle 0 is the plate."""

    name: str  # the reference's, PutOnPlateInScene25<name>
    digits: dict
    heights: tuple = (0.90, 0.90)  # in which they begin: object, receptacle, third
    texture: float = 0  # how much of it is mixed in,
    whole: bool = False  # over the whole picture, not only over robot and objects
    moves: bool = False  # the object, to the third place, after MOVE_STEP steps


MOVE_STEP = 5
ENDING = {"scene": range(16), "places": PAIRS, "turn": TURNS}  # the last digits of most
MAIN = {"object": range(16), **ENDING}
TEXTURES = {"object": range(16), "texture": range(1, 17), **ENDING}
VARIANTS = {
    "maniskill_25main": Variant(
        "Main-v3, train, 17 receptacles", {"object": range(16), "receptacle": range(17), **ENDING}
    ),
    "maniskill_25main_plate": Variant("Main-v3, train, 1 receptacle", MAIN),
    # vision
    "maniskill_25_new_scenes": Variant("VisionImage-v1, test", MAIN | {"scene": range(16, 21)}),
    "maniskill_25_texture_03": Variant("VisionTexture03-v1, test", TEXTURES, texture=0.3),
    "maniskill_25_texture_05": Variant("VisionTexture05-v1, test", TEXTURES, texture=0.5),
    "maniskill_25_whole_03": Variant("VisionWhole03-v1, test", TEXTURES, texture=0.3, whole=True),
    "maniskill_25_whole_05": Variant("VisionWhole05-v1, test", TEXTURES, texture=0.5, whole=True),
    # semantics
    "maniskill_25_new_instructions": Variant(
        "Instruct-v1, test", {"object": range(16), "template": range(1, 17), **ENDING}
    ),
    "maniskill_25_two_objects": Variant(
        "MultiCarrot-v1, train",
        {"object": range(16), "other_object": range(15), **ENDING, "places": FAR_OBJECT},
        heights=(0.95, 0.92, 1.00),
    ),
    "maniskill_25_two_new_objects": Variant(
        "MultiCarrot-v1, test",
        {"object": range(16, 25), "other_object": range(8), **ENDING, "places": FAR_OBJECT},
        heights=(0.95, 0.92, 1.00),
    ),
    "maniskill_25_two_receptacles": Variant(
        "MultiPlate-v1, train",
        {
            "object": range(16),
            "other_receptacle": range(16),
            "scene": range(21),
            "places": FAR_RECEPTACLE,
            "turn": TURNS,
        },
        heights=(1.00, 0.92, 0.96),
    ),
    "maniskill_25_two_new_receptacles": Variant(
        "MultiPlate-v1, test",
        {
            "object": range(16),
            "receptacle": range(1, 17),
            "other_receptacle": range(15),
            "scene": range(21),
            "places": FAR_RECEPTACLE,
            "turn": TURNS,
        },
        heights=(1.00, 0.92, 0.96),
    ),
    # execution
    "maniskill_25_new_positions": Variant(
        "Position-v1, test", MAIN | {"places": RING_PAIRS, "turn": NEW_TURNS}, heights=(0.95, 0.95)
    ),
    "maniskill_25_moving_object": Variant(
        "PositionChangeTo-v1, test", MAIN | {"places": FAR_OBJECT}, heights=(0.95, 0.92, 1.00), moves=True
    ),
}


def episodes(env_id):
    """How many there are."""
    return math.prod(map(len, VARIANTS[env_id].digits.values()))


def episode(env_id, number):
    """What the reference's episode of that number is.

    "object", "receptacle", "scene", "template", "texture": indices in the files. "things": what is on the
    table, {(kind, index): (position, quaternion)}. "target": where the object moves to, or None.
    """
    variant, number = VARIANTS[env_id], int(number) % episodes(env_id)
    told = {"receptacle": 0, "template": 0, "texture": 0}
    for name, choices in reversed(variant.digits.items()):
        number, digit = divmod(number, len(choices))
        told[name] = choices[digit]
    half = math.radians(told.pop("turn")) / 2
    turned, straight = (math.cos(half), 0.0, 0.0, math.sin(half)), (1.0, 0.0, 0.0, 0.0)
    positions = [
        ((2 * (a / 5) - 1) * 0.075 - 0.16, (2 * (b / 5) - 1) * 0.075, z)
        for (a, b), z in zip(told.pop("places"), variant.heights)
    ]
    told["things"] = things = {
        ("object", told["object"]): (positions[0], turned),
        ("receptacle", told["receptacle"]): (positions[1], straight),
    }
    if (
        "other_object" in told
    ):  # one of the same set, counted from the right one: in the test set of nine, whose
        known = variant.digits[
            "object"
        ]  # first is number 16, from seven further, so that 1 is the object itself
        index = (told["object"] + told.pop("other_object") + 1) % len(known) + known[0]
        things["object", index] = positions[2], turned
    if "other_receptacle" in told:
        known = variant.digits.get("receptacle", range(17))
        index = (told["receptacle"] - known[0] + told.pop("other_receptacle") + 1) % len(known) + known[0]
        things["receptacle", index] = positions[2], straight
    return told | {"target": (positions[2], turned) if variant.moves else None}


ROBOT = (0.147, 0.028, 0.870), (0, 0, 0, 1)  # where its base stands
JOINTS = -0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037
FOLDERS = {"object": "more_carrot", "receptacle": "more_plate", "scene": "more_table"}


def find_assets():
    """RL4VLA's folder, and its lists of objects, receptacles and scenes: {kind: [{"file", "name", ...}]}."""
    folder, lists = Path(os.environ.get("RL4VLA_ASSETS", "RL4VLA_ASSETS")), {}
    for kind, part in FOLDERS.items():
        file = folder / part / "model_db.json"
        if not file.is_file():
            advice = "set RL4VLA_ASSETS to ManiSkill/mani_skill/assets/carrot of github.com/gen-robot/RL4VLA"
            raise ValueError(f"put-on-plate's assets are missing, there is no {file}: {advice}")
        lists[kind] = [{"file": name} | line for name, line in json.loads(file.read_text()).items()]
    return folder, lists


def make_scene(backend, things, lists, folder):
    """ManiSkill's environment of SIMPLER's carrot, with other things on the table."""
    import sapien
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.put_on_in_scene import (
        PutCarrotOnPlateInScene,
    )

    class Scene(PutCarrotOnPlateInScene):  # whose robot, camera, lights and stage it has
        rgb_overlay_mode = "none"  # no photograph: that is `blend`'s work

        def _load_scene(self, options):  # at every reset, only what is needed: {(kind, index): pose}
            self.chosen = {lists[kind][index]["file"]: (kind, index) for kind, index in self.things}
            self.model_db = {name: lists[kind][index] for name, (kind, index) in self.chosen.items()}
            self.objs, self.obj_names = {}, list(self.chosen)
            self.source_obj_name, self.target_obj_name, *_ = self.obj_names
            self.objects_excluded_from_greenscreening = []
            super()._load_scene(options)

        def _build_actor_helper(self, name):
            kind, index = self.chosen[name]
            files, builder = folder / FOLDERS[kind] / name, self.scene.create_actor_builder()
            builder.add_multiple_convex_collisions_from_file(
                str(files / "collision.obj"),
                material=sapien.physx.PhysxMaterial(1.0, 1.0, 0.0),  # twice the friction of SIMPLER's objects
                density=self.model_db[name]["density"],
            )
            builder.add_visual_from_file(str(next(files.glob("textured.[dg]*"))))  # .dae or .glb
            builder.initial_pose = sapien.Pose(*self.things[kind, index])
            return builder.build(name=name)

        def _initialize_episode(self, env_idx, options):  # without SIMPLER's settling
            self.agent.robot.set_pose(sapien.Pose(*ROBOT))
            self.agent.reset(init_qpos=np.array(JOINTS))

        def evaluate(self):
            return {}

    Scene.things = things
    return Scene(obs_mode="rgb+segmentation", sim_backend="physx_cpu", render_backend=backend)


def blend(rgb, kept, photo, texture, strength, whole):
    """The picture: rendered where `kept` (H, W), else the photograph; a texture over what is kept or over all.

    `texture` is fitted to the box around what is kept; or, over all, it is twice the picture's size and seen
    from that box's centre on, so that it moves with the robot.
    """
    picture = np.where(kept[..., None], rgb, photo).astype(np.float32)
    if strength:
        import torch

        (y, x), (y_end, x_end) = np.argwhere(kept).min(axis=0), np.argwhere(kept).max(axis=0) + 1
        if whole:
            height, width = kept.shape
            y = np.clip((y + y_end - 1) // 2, 1, height - 1)
            x = np.clip((x + x_end - 1) // 2, 1, width - 1)
            picture = picture * (1 - strength) + texture[y : y + height, x : x + width] * strength
        else:
            fitted = torch.nn.functional.interpolate(  # half-pixel centres, not rounded
                torch.tensor(texture, dtype=torch.float32).permute(2, 0, 1)[None],
                (int(y_end - y), int(x_end - x)),
                mode="bilinear",
            )[0].permute(1, 2, 0)
            box = picture[y:y_end, x:x_end]
            mixed = fitted.numpy() * strength + box * (1 - strength)
            box[:] = np.where(kept[y:y_end, x:x_end, None], mixed, box)
    return np.clip(picture, 0, 255).astype(np.uint8)


class PutOnPlate:
    env_ids = list(VARIANTS)
    trials = (("maniskill_25main", "rgb"),)
    action_dim = 7
    max_episode_steps = 80

    def __init__(self, env_id, obs_mode, protocol):
        self.env_id, self.variant = env_id, VARIANTS[env_id]
        self.backend = check_maniskill("PutCarrotOnPlateInScene-v1", obs_mode)  # robot, stage, camera
        self.folder, self.lists = find_assets()
        import mani_skill

        mani_skill.logger.setLevel("ERROR")  # otherwise two lines of warnings at every reset
        # the digits that an instruction depends on are the slowest, so each has the same number of episodes
        said = {"object": (0,), "receptacle": (0,), "template": (0,)} | self.variant.digits
        self.prompts = {
            text: text
            for o, r, t in itertools.product(said["object"], said["receptacle"], said["template"])
            for text in [self.instruction({"object": o, "receptacle": r, "template": t})]
        }
        self.num_episodes = episodes(env_id) // len(self.prompts)
        self.num_eval_states = max(1, round(320 / len(self.prompts)))  # RLinf evaluates on 320 episodes
        self.train_states = self.num_eval_states, self.num_eval_states + self.num_episodes
        self.scene = None

    def instruction(self, told):
        o, p = (self.lists[kind][told[kind]]["name"] for kind in ("object", "receptacle"))
        return TEMPLATES[told["template"]].format(o=o, p=p)

    def number(self, task, state):
        """The first states are an evaluation's, drawn once for all; the others a task's episodes in turn."""
        within = state - self.num_eval_states
        if within < 0:
            within = np.random.default_rng((task, state)).integers(self.num_episodes)
        return int(task) * self.num_episodes + int(within)

    def reset(self, task, state):
        import sapien

        self.now = episode(self.env_id, self.number(task, state))
        if self.scene is None:
            self.scene = make_scene(self.backend, self.now["things"], self.lists, self.folder)
        self.scene.things = self.now["things"]
        self.obs, _ = self.scene.reset(seed=0, options={"reconfigure": True})  # anew: nothing is left over
        self.object, self.receptacle, *_ = self.scene.objs.values()
        self.target = self.now["target"] and sapien.Pose(*self.now["target"])
        boxes = [self.lists[kind][self.now[kind]]["bbox"] for kind in ("object", "receptacle")]
        self.half = [np.subtract(box["max"], box["min"]) / 2 for box in boxes]
        self.length = self.in_a_row = self.earned = 0
        self.grasped = self.held = False

    def step(self, action):
        """ManiSkill's own step without its observation, which draws a picture."""
        action = np.array(action, np.float32)
        action[6] = 1 if action[6] > 0.5 else -1
        self.scene._step_action(action)
        self.obs, self.length = None, self.length + 1
        if self.target and self.length == MOVE_STEP:
            self.object.set_pose(self.target)  # it keeps its velocity
        holds = bool(self.scene.agent.is_grasping(self.object))
        self.in_a_row = self.in_a_row + 1 if holds else 0
        self.grasped |= holds
        self.held |= self.in_a_row == 5
        success = self.is_on()
        before, self.earned = self.earned, 0.1 * self.grasped + 0.1 * self.held + (self.grasped and success)
        return self.earned - before, success

    def is_on(self):
        """Whether the object is above the receptacle, near it and in contact with it.

        Boxes are those at the beginning, when the receptacle was not turned and the object about z only.
        """
        x, y, z = (self.object.pose.p - self.receptacle.pose.p)[0].tolist()
        (*_, height), half = self.half
        force = self.scene.scene.get_pairwise_contact_forces(self.object, self.receptacle).norm()
        near = math.hypot(x, y) <= half.max() + 0.01
        return bool(near and 0 < z <= height + half[2] + 0.05 and force > 0.03)

    def observe(self):
        if self.obs is None:
            self.obs = self.scene.get_obs()
        camera = self.obs["sensor_data"]["3rd_view_camera"]
        things = [*self.scene.agent.robot.get_links(), *self.scene.objs.values()]
        kept = np.isin(camera["segmentation"][0, ..., 0], [int(thing.per_scene_id) for thing in things])
        photo, texture, mix = self.background()
        picture = blend(camera["rgb"][0].numpy(), kept, photo, texture, mix, self.variant.whole)
        state = self.scene.agent.robot.get_qpos()[0].numpy()
        return {"images": picture[None], "state": np.float32(state)}

    def background(self):
        import cv2

        def read(part, name, *size):
            picture = cv2.imread(str(self.folder / "more_table" / part / name))
            return cv2.resize(picture, size)[..., ::-1]  # to red, green, blue

        scenes = self.lists["scene"]
        chosen = scenes[self.now["texture"]]  # RLinf takes the scene's own instead
        scale = 2 if self.variant.whole else 1
        photo = read("imgs", scenes[self.now["scene"]]["file"], 640, 480)
        texture = read("textures", chosen["texture"], 640 * scale, 480 * scale)
        return photo, texture, self.variant.texture * chosen["mix"]

    def render(self, size):
        from PIL import Image

        return np.asarray(Image.fromarray(self.observe()["images"][0]).resize((size, size)))
