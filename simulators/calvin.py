"""CALVIN: a Franka arm at a desk with drawer, sliding door, button, switch and three blocks, on Bullet.

Scenes A to D differ in textures and in where things are. Policies learn in A, B and C and are evaluated in D,
on 1,000 chains of five instructions. Each begins where the one before was solved, the first failure ends the
chain, and the result is how many were solved. A chain is an episode.

    state      position (3) and Euler angles (3) of the gripper, its opening (1); without pictures: the arm's
               15 numbers and the desk's 24, with the blocks as red, blue, pink
    action     motion (3), 1 is 2 cm; rotation (3), 1 is 0.05; gripper (1): above 0 opens, otherwise closes
    picture    2 x 200 x 200: from beside the desk, and the gripper's, enlarged from 84 x 84
    reward     1 for every solved instruction; the last one is the success
    calvin_d   or _a, _b, _c, _abc: chains in these scenes. Evaluation: 360 steps for each instruction
    ..._480    RLinf's evaluation: 480 steps for a whole chain
    ..._open_drawer, and other tasks that can come first: one instruction, 360 steps

Initial states below 1,000 are an evaluation's. Those above are training as in RLinf: the same chains, 480
steps, and the number draws the scene and which of the training prompts is given.

Written anew after github.com/mees/calvin and calvin_env (MIT). Meshes (calvin.tar.xz, with their licences),
instructions, rules and chains (calvin.json, calvin_chains.py) are theirs.
"""

import contextlib
import ctypes
import json
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
TASKS = json.loads((HERE / "calvin.json").read_text())  # {name: instructions, category, condition}
ROBOT, DESKS, CHAINS = json.loads((HERE / "calvin_chains.json").read_text()).values()  # as numbers
NAMES, COLOURS = list(TASKS), ("red", "blue", "pink")
ENDS = "", "_480", *sorted({f"_{NAMES[chain[1]]}" for chain in CHAINS})  # of ids; 27 tasks can come first
INSTRUCTION_STEPS, CHAIN_STEPS = 360, 480  # CALVIN's for each, RLinf's for a chain

# ------------------------------------------------------------------------------------------ the 34 conditions


def solved(task, start, now):
    """Is it solved between two moments of a World? Contacts are pairs (body, its link)."""
    (rule, *terms), blocks = TASKS[task]["condition"], set(COLOURS)

    def bodies(moment, name):
        return {body for body, _ in moment["contacts"][name]}

    def slow(moment, block):
        return (np.abs(moment["velocity"][block]) < 1).all()

    def beyond(change, least):
        return change > least if least > 0 else change < least

    if rule == "move_door_rel":
        joint, least = terms
        return beyond(now["joints"][joint] - start["joints"][joint], least)
    if rule == "toggle_light":
        light, before, after = terms
        return (start["lights"][light], now["lights"][light]) == (before, after)
    if rule == "stack_objects":
        tops = [b for b in COLOURS if not bodies(start, b) & blocks and bodies(now, b)]
        return any(bodies(now, b) <= blocks and slow(now, b) for b in tops)
    if rule == "unstack_objects":
        tops = [b for b in COLOURS if bodies(start, b) and not bodies(now, b) & blocks]
        return any(bodies(start, b) <= blocks and slow(start, b) for b in tops)
    if rule == "place_object":
        (held, *more), place = bodies(start, "robot") or {None}, tuple(terms)
        if more or held not in blocks or bodies(start, held) != {"robot"}:
            return False
        return held not in bodies(now, "robot") and place in now["contacts"][held]
    if rule == "push_object_into":  # upstream means to forbid the robot's touch now, but allows it
        before, after = tuple(terms[1:3]), tuple(terms[3:])
        contacts = [(start["contacts"][b], now["contacts"][b]) for b in COLOURS]
        return any(first == {before} and after in last for first, last in contacts)

    block = terms[0].removeprefix("block_")
    motion, touched = now["position"][block] - start["position"][block], bodies(now, block)
    if rule == "rotate_object":
        turn = now["rotation"][block] @ start["rotation"][block].T
        x, z = np.arctan2(turn[[2, 1], [1, 0]], turn[[2, 0], [2, 0]])  # Euler angles, about fixed axes
        x, y, z = np.degrees([x, -np.arcsin(np.clip(turn[2, 0], -1, 1)), z])
        level = abs(x) < 30 and abs(y) < 30 and np.linalg.norm(motion) <= 0.1
        return level and abs(z) < 180 and beyond(z, terms[1]) and bool(touched - {"robot"})
    if rule == "push_object":
        first, last = ({c for c in m["contacts"][block] if c[0] != "robot"} for m in (start, now))
        return bool(first) and first <= last and beyond(motion[0], terms[1])
    return motion[2] > terms[1] and touched == {"robot"} and tuple(terms[2:]) in start["contacts"][block]


# -------------------------------------------------------------------------------------------------- the world

SCENES = {  # blocks as they are loaded; in x: table, left and right half of the cabinet
    "A": (("pink_small", "blue_big", "red_middle"), (-0.20, 0.35), (-0.32, -0.16), (-0.05, 0.13)),
    "B": (("red_small", "blue_big", "pink_middle"), (-0.35, 0.15), (-0.12, 0.06), (0.15, 0.33)),
    "C": (("blue_small", "red_big", "pink_middle"), (0.00, 0.35), (-0.12, 0.06), (0.15, 0.30)),
    "D": (("red_middle", "blue_small", "pink_big"), (0.00, 0.35), (-0.32, -0.16), (-0.05, 0.13)),
}
JOINTS = SLIDE, DRAWER, BUTTON, SWITCH = "base__slide", "base__drawer", "base__button", "base__switch"
LIGHTS = {"lightbulb": ("light_link", (1, 1, 0, 1)), "led": ("led_link", (0, 1, 0, 1))}  # link, colour
ARM, FINGERS, CAMERA, TCP = range(7), (9, 11), 14, 15  # joints and links of the robot
REST = -1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866
LOW = -2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973
HIGH = 2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973
EYE = 2.871459009488717, -2.166602199425597, 2.555159848480571
TARGET = -0.026242351159453392, -0.0302329882979393, 0.3920000493526459
UP = 0.4041403970338857, 0.22629790978217404, 0.8862616969685161


def data_folder():
    """calvin.tar.xz, unpacked beside it once."""
    folder = HERE / "calvin_env_data"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=HERE) as fresh, tarfile.open(HERE / "calvin.tar.xz") as tar:
            tar.extractall(fresh, filter="data")
            with contextlib.suppress(OSError):  # another process was faster
                Path(fresh, folder.name).rename(folder)
    return folder


def connect():
    """A simulation without a window. Bullet would greet on stdout and stderr, in C."""
    kept, nothing = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    try:
        from pybullet_utils.bullet_client import BulletClient, pybullet

        return BulletClient(pybullet.DIRECT)
    finally:
        ctypes.CDLL(None).fflush(None)
        for number, stream in enumerate(kept, start=1):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nothing)


class World:
    """A scene and the arm. Which call comes first decides the last bits of the physics: as upstream."""

    def __init__(self, scene):
        self.p = p = connect()
        p.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        p.setTimeStep(1 / 240)
        p.resetSimulation()
        p.setGravity(0, 0, -9.8)
        folder, (blocks, *ranges) = str(data_folder()), SCENES[scene]
        p.setAdditionalSearchPath(folder)

        robot = p.loadURDF("franka_panda/panda_longer_finger.urdf", (-0.34, -0.46, 0.24), useFixedBase=True)
        stand = {"radius": 0.13, "length": 0.24, "visualFramePosition": (-0.39, -0.46, 0.12)}
        shape = p.createVisualShape(p.GEOM_CYLINDER, rgbaColor=(1, 1, 1, 1), **stand)
        p.createMultiBody(baseVisualShapeIndex=shape)
        pair, zero = (robot, FINGERS[0], robot, FINGERS[1]), (0, 0, 0)
        gear = p.createConstraint(*pair, p.JOINT_GEAR, (1, 0, 0), zero, zero)
        p.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50)
        self.null_space = [[n] * p.computeDofCount(robot) for n in (-7, 7, 7)] + [[*REST, 0.04, 0.04]]
        self.robot, self.gripper = robot, 1
        self._set_robot(REST, 0.04)

        self.blocks, rng = {}, np.random.default_rng(0)  # in the order of loading; drawn once, until a reset
        boxes = list(zip(ranges, (-0.15, 0.05, 0.05), (-0.03, 0.12, 0.12)))
        for block in blocks:
            (x_low, x_high), y_low, y_high = boxes[rng.choice(3)]
            place = rng.uniform((x_low, y_low, 0.46), (x_high, y_high, 0.46))
            rotation = p.getQuaternionFromEuler(rng.uniform((0, 0, -np.pi), (0, 0, np.pi)))
            file = f"{folder}/blocks/block_{block}.urdf"
            self.blocks[block.split("_")[0]] = p.loadURDF(file, place, rotation, globalScaling=0.8)

        file = f"{folder}/calvin_table_{scene}/urdf/calvin_table_{scene}.urdf"
        self.table = p.loadURDF(file, zero, (0, 0, 0, 1), globalScaling=0.8)
        infos = [p.getJointInfo(self.table, i) for i in range(p.getNumJoints(self.table))]
        self.joints = {info[1].decode(): info[0] for info in infos}
        self.links = {info[12].decode(): info[0] for info in infos} | {"base_link": -1}
        self.half_way = {info[1].decode(): (info[8] + info[9]) / 2 for info in infos}
        for joint in JOINTS:  # friction; the button springs back
            control = p.POSITION_CONTROL if joint == BUTTON else p.VELOCITY_CONTROL
            p.setJointMotorControl2(self.table, self.joints[joint], control, force=4)
        self.lights, self.pressed, self.switched = {}, False, False
        plane = p.loadURDF(f"{folder}/plane/plane.urdf")
        uids = {"robot": robot, **self.blocks, "table": self.table, "plane": plane}
        self.names = {uid: name for name, uid in uids.items()}

    def _drive(self, joint, position, force, speed):
        how = self.p.POSITION_CONTROL
        self.p.setJointMotorControl2(self.robot, joint, how, position, force=force, maxVelocity=speed)

    def _set_robot(self, arm, finger):
        for joint, position in zip((*ARM, *FINGERS), (*arm, finger, finger)):
            self.p.resetJointState(self.robot, joint, position)
            self._drive(joint, position, 200, 2 if joint in ARM else 1)
        place, rotation = self.p.getLinkState(self.robot, TCP)[:2]
        self.target = np.array(place), np.array(self.p.getEulerFromQuaternion(rotation))

    def _set_light(self, name, on):
        link, colour = LIGHTS[name]
        self.lights[name] = int(on)
        self.p.changeVisualShape(self.table, self.links[link], rgbaColor=colour if on else (1, 1, 1, 1))

    def joint(self, name):
        return self.p.getJointState(self.table, self.joints[name])[0]

    def reset(self, robot_obs, scene_obs):
        """To these numbers (15,) and (24,), the blocks in the order of loading."""
        *values, bulb, led = scene_obs[:6]
        self._set_light("lightbulb", bulb)
        self._set_light("led", led)
        for joint, value in zip(JOINTS, values):
            self.p.resetJointState(self.table, self.joints[joint], value)
        self.switched = False
        for uid, pose in zip(self.blocks.values(), np.reshape(scene_obs[6:], (3, 6))):
            self.p.resetBasePositionAndOrientation(uid, pose[:3], self.p.getQuaternionFromEuler(pose[3:]))
        self._set_robot(robot_obs[7:14], robot_obs[6] / 2)
        self.p.stepSimulation()

    def step(self, action):
        """A thirtieth of a second. The action moves the target, wherever the gripper is."""
        place, angles = self.target
        place += 0.02 * action[:3]
        angles += 0.05 * action[3:6]
        goal = place, self.p.getQuaternionFromEuler(angles)
        arm = self.p.calculateInverseKinematics(self.robot, TCP, *goal, *self.null_space)[:7]
        for joint, position in zip(ARM, np.clip(arm, LOW, HIGH)):
            self._drive(joint, position, 200, 2)
        self.gripper = 1 if action[6] > 0 else -1
        for joint in FINGERS:
            self._drive(joint, *((0.04, 2) if self.gripper == 1 else (0, 200)), 1)
        for _ in range(8):
            self.p.stepSimulation()
        was_pressed, was_switched = self.pressed, self.switched
        self.pressed, self.switched = (self.joint(name) > self.half_way[name] for name in (BUTTON, SWITCH))
        if self.pressed and not was_pressed:
            self._set_light("led", not self.lights["led"])
        if self.switched != was_switched:
            self._set_light("lightbulb", self.switched)

    def robot_obs(self):
        place, rotation = self.p.getLinkState(self.robot, TCP)[:2]
        *arm, left, right = (self.p.getJointState(self.robot, joint)[0] for joint in (*ARM, *FINGERS))
        return np.array([*place, *self.p.getEulerFromQuaternion(rotation), left + right, *arm, self.gripper])

    def scene_obs(self, colours=None):
        """Blocks in the order of loading, or in another."""
        numbers = [self.joint(name) for name in JOINTS] + [self.lights["lightbulb"], self.lights["led"]]
        for colour in colours or self.blocks:
            place, rotation = self.p.getBasePositionAndOrientation(self.blocks[colour])
            numbers += [*place, *self.p.getEulerFromQuaternion(rotation)]
        return np.array(numbers)

    def moment(self):
        """What the conditions compare."""
        links, contacts = {number: name for name, number in self.links.items()}, {}
        for name, uid in {"robot": self.robot, **self.blocks}.items():
            touched = {(self.names[point[2]], point[4]) for point in self.p.getContactPoints(uid)}
            contacts[name] = {(body, links[link] if body == "table" else link) for body, link in touched}
        poses = {name: self.p.getBasePositionAndOrientation(uid) for name, uid in self.blocks.items()}
        return {
            "joints": {name: self.joint(name) for name in (SLIDE, DRAWER)},
            "lights": dict(self.lights),
            "contacts": contacts,
            "position": {name: np.array(place) for name, (place, _) in poses.items()},
            "rotation": {name: self._matrix(rotation) for name, (_, rotation) in poses.items()},
            "velocity": {name: np.ravel(self.p.getBaseVelocity(uid)) for name, uid in self.blocks.items()},
        }

    def static_picture(self, size=200):
        projection = self.p.computeProjectionMatrixFOV(10, 1, 0.01, 10)
        return self._draw(size, self.p.computeViewMatrix(EYE, TARGET, UP), projection)

    def gripper_picture(self, size=84):
        place, rotation = self.p.getLinkState(self.robot, CAMERA)[:2]
        _, ahead, down = self._matrix(rotation).T
        view = self.p.computeViewMatrix(place, place + ahead, -down)
        return self._draw(size, view, self.p.computeProjectionMatrixFOV(75, 1, 0.01, 2))

    def _draw(self, size, view, projection):
        pixels = self.p.getCameraImage(size, size, view, projection)[2]
        return np.reshape(pixels, (size, size, 4))[..., :3].astype(np.uint8)

    def _matrix(self, quaternion):
        return np.reshape(self.p.getMatrixFromQuaternion(quaternion), (3, 3))


# ----------------------------------------------------------------------------------------------- the episodes


def chain_limit(env_id):
    """The step limit of an evaluation of chains, in words; None for other ids."""
    if not env_id.startswith("calvin_") or env_id.endswith(tuple(TASKS)):
        return None
    each, whole = f"{INSTRUCTION_STEPS} steps an instruction", f"{CHAIN_STEPS} steps a chain"
    return whole if env_id.endswith("_480") else each


class Calvin:
    env_ids = [f"calvin_{s}{end}" for s in ("abc", "d", "a", "b", "c") for end in ENDS]
    trials = ("calvin_d", "state"), ("calvin_d", "rgb")
    action_dim = 7
    train_states = 1000, 2**31

    def __init__(self, env_id, obs_mode, protocol):
        _, scenes, *rest = env_id.split("_", 2)
        self.obs_mode, self.scenes, self.whole = obs_mode, scenes.upper(), rest == ["480"]
        tasks = [name for name in rest if name in TASKS]  # one or none
        self.chains = [chain[:2] for chain in CHAINS if NAMES[chain[1]] in tasks] or CHAINS
        self.num_eval_states = len(self.chains)
        self.max_episode_steps = INSTRUCTION_STEPS if tasks else CHAIN_STEPS  # in training
        self.prompts = {task: TASKS[task]["instruction"] for task in tasks} or {"chain": "five in a row"}
        told = [TASKS[task] for task in tasks or TASKS]
        self.more_prompts = sum(([task["instruction"], *task["train_instructions"]] for task in told), [])

    def reset(self, task, state):
        """Builds the scene anew, in 0.1 s: nothing is left of the last episode, not even in the last bit."""
        (desk, *chain), training = self.chains[state % len(self.chains)], state >= self.train_states[0]
        self.tasks, self.solved, self.steps = [NAMES[number] for number in chain], 0, 0
        rng, told = np.random.default_rng(state), [TASKS[name] for name in self.tasks]
        drawn = [str(rng.choice(task["train_instructions"])) for task in told]
        self.instructions = drawn if training else [task["instruction"] for task in told]
        self.each = len(chain) == 1 or not (training or self.whole)  # is the limit one of each instruction?
        self.max_episode_steps = INSTRUCTION_STEPS if self.each else CHAIN_STEPS
        self.world = World(self.scenes[(state + state // len(self.chains)) % len(self.scenes)])
        numbers = np.array(DESKS[desk])
        poses = dict(zip(COLOURS, numbers[6:].reshape(3, 6)))  # upstream fills them in the order of loading
        self.world.reset(ROBOT, np.concatenate([numbers[:6], *(poses[name] for name in self.world.blocks)]))
        self.start = self.world.moment()

    def step(self, action):
        self.world.step(action)
        self.steps += 1
        now = self.world.moment()
        if not solved(self.tasks[self.solved], self.start, now):
            return 0.0, False
        self.solved, self.start = self.solved + 1, now
        if self.each:
            self.max_episode_steps = self.steps + INSTRUCTION_STEPS
        return 1.0, self.solved == len(self.tasks)

    def observe(self):
        told = {"prompt": self.instructions[min(self.solved, len(self.tasks) - 1)]}
        if self.obs_mode == "state":
            state = np.concatenate([self.world.robot_obs(), self.world.scene_obs(COLOURS)])
            return told | {"images": np.zeros((0, 1, 1, 3), np.uint8), "state": np.float32(state)}
        hand = Image.fromarray(self.world.gripper_picture()).resize((200, 200), Image.Resampling.BILINEAR)
        images = np.stack([self.world.static_picture(), np.asarray(hand)])
        return told | {"images": images, "state": np.float32(self.world.robot_obs()[:7])}

    def render(self, size):
        return self.world.static_picture(size)
