"""Put-on-plate's episodes: what the digits of an episode's number say, in each variant, as in RLinf.

`VARIANTS` are the ids of put_on_plate.py. `episode` is a number's: objects, receptacle, scene, places, turn.
"""

import itertools
import math
from typing import NamedTuple

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
