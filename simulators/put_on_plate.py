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
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simulators.maniskill import check_maniskill

# Where things can stand: points (a, b) of a grid of 3 cm, a the slower one
GRID = list(itertools.product(range(6), range(6)))
RING = [point for point in itertools.product(range(-1, 7), range(-1, 7)) if point not in GRID]  # around it
# Points 15 cm from each other that RLinf's floating point has farther, as 6 a + b: other ways to write the
# grid keep others, and then the same number is another episode
ROUNDED_UP = {(6, 28), (6, 33), (7, 29), (7, 34), (8, 35), (9, 30), (10, 24), (10, 31), (11, 25), (11, 32)}


def over_7_cm(p, q):
    return math.dist(p, q) > 7 / 3


def over_15_cm(p, q):
    return math.dist(p, q) > 5 or tuple(sorted(6 * a + b for a, b in (p, q))) in ROUNDED_UP


def at(heights, places):
    """[((a, b, z) of the object, of the receptacle, ...)]: where they begin, some centimetres too high."""
    return [tuple((*point, z) for point, z in zip(points, heights)) for points in places]


def pairs(grid):
    return [(o, r) for o in grid for r in grid if over_7_cm(o, r)]


# with a third place: another object's or where the object moves to, and another receptacle's
THIRD_FROM_OBJECT = [(o, r, t) for o, r in pairs(GRID) for t in GRID if over_7_cm(r, t) and over_15_cm(o, t)]
THIRD_FROM_PLATE = [(o, r, t) for o, r in pairs(GRID) for t in GRID if over_15_cm(r, t) and over_7_cm(o, t)]
PAIRS, NEW_PAIRS = at((0.90, 0.90), pairs(GRID)), at((0.95, 0.95), pairs(RING))
OBJECT_TRIPLES = at((0.95, 0.92, 1.00), THIRD_FROM_OBJECT)
PLATE_TRIPLES = at((1.00, 0.92, 0.96), THIRD_FROM_PLATE)
TURNS, NEW_TURNS = (0, 45, 90, 135), (-22.5, -67.5, -112.5, -157.5)  # of objects, in degrees
MOVE_STEP = 5  # after which an object moves, where it does
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
    name: str  # the reference's, without PutOnPlateInScene25
    group: str  # of Table 3, which counts instructions as vision; "" is training
    digits: dict  # of an episode's number, the slowest first: what each one chooses from
    texture: float = 0  # how much of it is mixed in,
    whole: bool = False  # over the whole picture or only over robot and objects
    moves: bool = False  # the object, to the third place


def digits(places=PAIRS, turn=TURNS, scene=range(16), **slower):
    return {"object": range(16)} | slower | {"scene": scene, "places": places, "turn": turn}


TEXTURES, NEW_TEMPLATES = digits(texture=range(1, 17)), digits(template=range(1, 17))
MOVED = digits(OBJECT_TRIPLES)
OTHER_OBJECT = digits(OBJECT_TRIPLES, other_object=range(15))
NEW_OBJECTS = digits(OBJECT_TRIPLES, object=range(16, 25), other_object=range(8))
OTHER_PLATE = digits(PLATE_TRIPLES, scene=range(21), other_receptacle=range(16))
NEW_PLATES = digits(PLATE_TRIPLES, scene=range(21), receptacle=range(1, 17), other_receptacle=range(15))
VARIANTS = {  # where a receptacle is not chosen it is the plate, number 0
    "maniskill_25main": Variant("Main-v3 train, 17 receptacles", "", digits(receptacle=range(17))),
    "maniskill_25main_plate": Variant("Main-v3 train, 1 receptacle", "", digits()),
    "maniskill_25_new_instructions": Variant("Instruct-v1 test", "vision", NEW_TEMPLATES),
    "maniskill_25_new_scenes": Variant("VisionImage-v1 test", "vision", digits(scene=range(16, 21))),
    "maniskill_25_texture_03": Variant("VisionTexture03-v1 test", "vision", TEXTURES, 0.3),
    "maniskill_25_texture_05": Variant("VisionTexture05-v1 test", "vision", TEXTURES, 0.5),
    "maniskill_25_whole_03": Variant("VisionWhole03-v1 test", "vision", TEXTURES, 0.3, whole=True),
    "maniskill_25_whole_05": Variant("VisionWhole05-v1 test", "vision", TEXTURES, 0.5, whole=True),
    "maniskill_25_two_objects": Variant("MultiCarrot-v1 train", "semantics", OTHER_OBJECT),
    "maniskill_25_two_new_objects": Variant("MultiCarrot-v1 test", "semantics", NEW_OBJECTS),
    "maniskill_25_two_receptacles": Variant("MultiPlate-v1 train", "semantics", OTHER_PLATE),
    "maniskill_25_two_new_receptacles": Variant("MultiPlate-v1 test", "semantics", NEW_PLATES),
    "maniskill_25_new_positions": Variant("Position-v1 test", "execution", digits(NEW_PAIRS, NEW_TURNS)),
    "maniskill_25_moving_object": Variant("PositionChangeTo-v1 test", "execution", MOVED, moves=True),
}


def num_episodes(env_id):
    return math.prod(map(len, VARIANTS[env_id].digits.values()))


def episode(env_id, number):
    """The reference's episode of that number.

    "object", "receptacle", "scene", "template", "texture": which of them. "things": all that is on the table,
    {(kind, index): (position, quaternion)}. "target": the pose that the object moves to, or None.
    """
    variant, number = VARIANTS[env_id], int(number) % num_episodes(env_id)
    told = {"receptacle": 0, "template": 0, "texture": 0}
    for name, choices in reversed(variant.digits.items()):
        number, digit = divmod(number, len(choices))
        told[name] = choices[digit]
    half = math.radians(told.pop("turn")) / 2
    turned, straight = (math.cos(half), 0.0, 0.0, math.sin(half)), (1.0, 0.0, 0.0, 0.0)
    first, second, *third = (  # in metres
        ((2 * (a / 5) - 1) * 0.075 - 0.16, (2 * (b / 5) - 1) * 0.075, z) for a, b, z in told.pop("places")
    )
    things = {("object", told["object"]): (first, turned)}
    things["receptacle", told["receptacle"]] = second, straight
    # Another one of the same set, so many after the right one. Among the new objects the reference counts 16
    # too many: one episode in eight has no other object, and the right one is in the third place
    if "other_object" in told:
        known, step = variant.digits["object"], told.pop("other_object") + 1
        things["object", (told["object"] + step) % len(known) + known[0]] = *third, turned
    if "other_receptacle" in told:
        known, step = variant.digits.get("receptacle", range(17)), told.pop("other_receptacle") + 1
        index = (told["receptacle"] - known[0] + step) % len(known) + known[0]
        things["receptacle", index] = *third, straight
    return told | {"things": things, "target": (*third, turned) if variant.moves else None}


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


def make_scene(backend, things, lists, folder):
    """ManiSkill's environment of SIMPLER's carrot, with other things on the table."""
    import sapien
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.put_on_in_scene import (
        PutCarrotOnPlateInScene,
    )

    class Scene(PutCarrotOnPlateInScene):  # whose robot, camera, lights and stage it has
        rgb_overlay_mode = "none"  # no photograph: that is `blend`'s work

        def _load_scene(self, options):  # at every reset; of all 42 things only those on the table
            ordered = sorted(self.things)  # as RLinf loads them: physics depends on it
            self.chosen = {lists[kind][index]["file"]: (kind, index) for kind, index in ordered}
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


class PutOnPlate:
    env_ids = list(VARIANTS)
    trials = (("maniskill_25main", "rgb"),)
    # of both ids of training
    variations = dict.fromkeys(list(VARIANTS)[:2], {e: v.group for e, v in VARIANTS.items() if v.group})
    action_dim = 7
    max_episode_steps = 80

    def __init__(self, env_id, obs_mode, protocol):
        self.env_id, self.variant = env_id, VARIANTS[env_id]
        self.backend = check_maniskill("PutCarrotOnPlateInScene-v1", obs_mode)  # robot, stage, camera
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

        self.now = episode(self.env_id, self.number(task, state))
        if self.scene is None:
            self.scene = make_scene(self.backend, self.now["things"], self.lists, self.folder)
        self.scene.things = self.now["things"]
        self.obs, _ = self.scene.reset(seed=0, options={"reconfigure": True})  # anew: nothing is left over
        chosen = [self.lists[kind][self.now[kind]] for kind in ("object", "receptacle")]
        self.object, self.receptacle = (self.scene.objs[line["file"]] for line in chosen)
        self.target = self.now["target"] and sapien.Pose(*self.now["target"])
        self.background = self.read_background()
        self.half_sizes = [np.subtract(line["bbox"]["max"], line["bbox"]["min"]) / 2 for line in chosen]
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
        """Near the receptacle's centre, above it and in contact with it; sizes are those of the beginning."""
        x, y, z = (self.object.pose.p - self.receptacle.pose.p)[0].tolist()
        object, receptacle = self.half_sizes  # at the beginning nothing is turned but objects about z
        force = self.scene.scene.get_pairwise_contact_forces(self.object, self.receptacle).norm()
        near = math.hypot(x, y) <= receptacle.max() + 0.01  # the greatest of all three
        return bool(near and 0 < z <= receptacle[2] + object[2] + 0.05 and force > 0.03)

    def observe(self):
        if self.obs is None:
            self.obs = self.scene.get_obs()
        camera = self.obs["sensor_data"]["3rd_view_camera"]
        things = [*self.scene.agent.robot.get_links(), *self.scene.objs.values()]
        kept = np.isin(camera["segmentation"][0, ..., 0], [int(thing.per_scene_id) for thing in things])
        picture = blend(camera["rgb"][0].numpy(), kept, *self.background, self.variant.whole)
        state = self.scene.agent.robot.get_qpos()[0].numpy()
        return {"images": picture[None], "state": np.float32(state)}

    def read_background(self):
        import cv2
        from PIL import Image

        def read(part, file, size):
            path = self.folder / FOLDERS["scene"] / part / file
            return cv2.resize(np.asarray(Image.open(path).convert("RGB")), size)

        scenes = self.lists["scene"]
        chosen = scenes[self.now["texture"]]  # as in RL4VLA; RLinf takes the scene's own
        photo = read("imgs", scenes[self.now["scene"]]["file"], (640, 480))
        texture = read("textures", chosen["texture"], (1280, 960) if self.variant.whole else (640, 480))
        return photo, np.float32(texture), self.variant.texture * chosen["mix"]

    def render(self, size):
        from PIL import Image

        return np.asarray(Image.fromarray(self.observe()["images"][0]).resize((size, size)))
