"""CALVIN against the original: chains, physics, pictures, conditions; and scripted motions that solve tasks.

golden/calvin.json was made by the original calvin_env and the original generator of chains, with the motions
of `wander`. The conditions and the chains need no simulator.
"""

import hashlib
import json
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate as script
from envs import make_envs
from pi_models import CHECKPOINTS, TINY, Policy, save_policy
from reports import summarize
from simulators import calvin_chains
from simulators.calvin import CHAINS, COLOURS, DESKS, NAMES, ROBOT, TASKS, Calvin, World, chain_limit, solved

bullet = pytest.mark.skipif(find_spec("pybullet") is None, reason="pybullet is not installed: make install")
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "calvin.json").read_text())
START = np.array(ROBOT[:3])  # of the gripper
HOLD = np.zeros(7, np.float32)


def wander(episode, steps=150):
    rng, actions = np.random.default_rng(episode), []
    for step in range(steps):
        if step % 15 == 0:
            drift = rng.uniform(-1, 1, 7)
            drift[2] -= 0.3
            drift[3:6] *= 0.3
        action = np.clip(drift + rng.normal(0, 0.2, 7), -1, 1)
        action[6] = 1 if drift[6] > 0 else -1
        actions.append(action)
    return np.array(actions)


def numbers(world):
    return [*world.robot_obs(), *world.scene_obs()]


# --- chains ---


def test_chains_are_the_originals():
    desks = calvin_chains.initial_desks()
    told = [[list(desks[desk].values()), [NAMES[task] for task in chain]] for desk, *chain in CHAINS]
    assert [chain for _, chain in told[:3]] == GOLDEN["chains"]["first"] and len(told) == 1000
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest() == GOLDEN["chains"]["sha256"]


def test_generator():
    """Of a few desks the chains are drawn again; so are all desks' numbers."""
    desks, rules = calvin_chains.initial_desks(), calvin_chains.make_rules()
    assert len(desks) == 192 and [calvin_chains.layout(desk).tolist() for desk in desks] == DESKS
    for number in (0, 45, 191):
        share = sorted(chain for chain in CHAINS if chain[0] == number)
        drawn = calvin_chains.draw_chains(number, desks[number], len(share), rules)
        assert sorted(drawn) == share and len(share) == (6 if number < 40 else 5)


@pytest.mark.slow
def test_generator_draws_all():
    assert calvin_chains.make_chains() == CHAINS


def test_feasible():
    desk = calvin_chains.initial_desks()[0]  # all is off and closed, the door on the right
    rules = calvin_chains.make_rules()
    assert desk | {"red_block": "table", "blue_block": "table", "pink_block": "slider_right"} == desk
    for chain, expected in [
        (["open_drawer", "turn_on_led"], True),
        (["close_drawer"], False),  # it is closed
        (["turn_on_led", "turn_on_lightbulb"], False),  # of the same category
        (["lift_red_block_table", "place_in_drawer"], False),  # closed
        (["open_drawer", "lift_red_block_table", "place_in_drawer", "lift_red_block_drawer"], True),
        (["lift_red_block_table", "place_in_slider"], True),
        (["lift_red_block_table", "turn_on_led"], False),  # with the hand full
        (["lift_pink_block_slider"], False),  # behind the door
        (["move_slider_left", "lift_pink_block_slider", "stack_block"], False),  # on red or on blue?
        (["lift_red_block_table", "stack_block", "unstack_block"], True),  # only blue is left
        (["open_drawer", "push_into_drawer"], False),  # two blocks are on the table
    ]:
        assert calvin_chains.feasible(desk, chain, rules) == expected, chain


# --- conditions ---


@pytest.fixture
def moment():
    """Red and blue on the table, pink in the cabinet, the hand open and empty, all off and half open."""
    table, plank = ("table", "base_link"), ("table", "plank_link")
    return {
        "joints": {"base__slide": 0.14, "base__drawer": 0.1},
        "lights": {"lightbulb": 0, "led": 0},
        "contacts": {"robot": set(), "red": {table}, "blue": {table}, "pink": {plank}},
        "position": {c: np.array([0.1 * i, 0, 0.46]) for i, c in enumerate(COLOURS)},
        "rotation": {c: np.eye(3) for c in COLOURS},
        "velocity": {c: np.zeros(6) for c in COLOURS},
    }


def tasks_between(start, now):
    return {task for task in TASKS if solved(task, start, now)}


def about(axis, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])  # about z
    order = np.roll([0, 1, 2], axis - 2)
    return matrix[np.ix_(order, order)] if axis != 2 else matrix


def test_condition_nothing_happened(moment):
    assert tasks_between(moment, deepcopy(moment)) == set()


def test_condition_doors_and_lights(moment):
    for joint, change, task in [
        ("base__slide", 0.151, "move_slider_left"),
        ("base__slide", -0.151, "move_slider_right"),
        ("base__drawer", 0.121, "open_drawer"),
        ("base__drawer", -0.121, "close_drawer"),
    ]:
        now = deepcopy(moment)
        now["joints"][joint] += change
        assert tasks_between(moment, now) == {task}
        now["joints"][joint] = moment["joints"][joint] + change * 0.99
        assert tasks_between(moment, now) == set()
    for light in ("lightbulb", "led"):
        lit = deepcopy(moment)
        lit["lights"][light] = 1
        assert tasks_between(moment, lit) == {f"turn_on_{light}"}
        assert tasks_between(lit, moment) == {f"turn_off_{light}"} and tasks_between(lit, lit) == set()


@pytest.mark.parametrize("colour", COLOURS)
def test_condition_rotate(moment, colour):
    for degrees, side in ((61, "left"), (-61, "right"), (170, "left"), (59, None), (-59, None)):
        now = deepcopy(moment)
        now["rotation"][colour] = about(2, degrees)
        assert tasks_between(moment, now) == ({f"rotate_{colour}_block_{side}"} if side else set()), degrees
    now["rotation"][colour] = about(2, 90) @ about(0, 31)  # tilted too
    assert tasks_between(moment, now) == set()
    now["rotation"][colour] = about(2, 90) @ about(0, 29)
    assert tasks_between(moment, now) == {f"rotate_{colour}_block_left"}
    turned = deepcopy(moment)  # what counts is the change, in the world's axes
    turned["rotation"][colour] = about(2, 200)
    assert tasks_between(now | {"rotation": turned["rotation"] | {colour: about(2, 120)}}, turned) == {
        f"rotate_{colour}_block_left"
    }
    now["position"][colour] = moment["position"][colour] + [0, 0.11, 0]  # too far away
    assert tasks_between(moment, now) == set()
    now["position"][colour] = moment["position"][colour]
    now["contacts"][colour] = {("robot", 10)}  # in the hand
    assert tasks_between(moment, now) == set()


@pytest.mark.parametrize("colour", COLOURS)
def test_condition_push(moment, colour):
    for dx, side in ((0.101, "right"), (-0.101, "left"), (0.099, None)):
        now = deepcopy(moment)
        now["position"][colour][0] += dx
        now["contacts"][colour] |= {("robot", 10)}  # the robot does not matter
        assert tasks_between(moment, now) == ({f"push_{colour}_block_{side}"} if side else set())
    now["position"][colour][0] += 0.1
    now["contacts"][colour] |= {("plane", -1)}
    assert tasks_between(moment, now) == {f"push_{colour}_block_right"}
    now["contacts"][colour] = {("plane", -1)}  # not where it was
    assert tasks_between(moment, now) == set()
    now["contacts"][colour] = moment["contacts"][colour] = set()  # in the air
    assert tasks_between(moment, now) == set()


@pytest.mark.parametrize("colour", COLOURS)
def test_condition_lift(moment, colour):
    for place, link, dz in (
        ("table", "base_link", 0.051),
        ("slider", "plank_link", 0.031),
        ("drawer", "drawer_link", 0.051),
    ):
        start = deepcopy(moment)
        start["contacts"][colour] = {("table", link), ("robot", 10)}
        now = deepcopy(start)
        now["position"][colour][2] += dz
        now["contacts"][colour] = {("robot", 10), ("robot", 12)}
        now["contacts"]["robot"] = {(colour, -1)}
        assert tasks_between(start, now) == {f"lift_{colour}_block_{place}"}
        now["contacts"][colour] |= {("table", link)}  # still on it
        assert tasks_between(start, now) == set()
        now["contacts"][colour] = {("robot", 10)}
        now["position"][colour][2] = start["position"][colour][2] + dz - 0.002
        assert tasks_between(start, now) == set()


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("place, link", [("slider", "plank_link"), ("drawer", "drawer_link")])
def test_condition_place(moment, colour, place, link):
    start = deepcopy(moment)
    start["contacts"][colour], start["contacts"]["robot"] = {("robot", 10), ("robot", 12)}, {(colour, -1)}
    now = deepcopy(moment)
    now["contacts"][colour] = {("table", link)}
    assert tasks_between(start, now) == {f"place_in_{place}"}
    now["contacts"]["robot"] = {(colour, -1)}  # not let go
    assert tasks_between(start, now) == set()
    now["contacts"]["robot"] = {("table", "base_link")}  # of something else
    assert tasks_between(start, now) == {f"place_in_{place}"}
    start["contacts"][colour] |= {("table", "base_link")}  # was not lifted
    assert tasks_between(start, now) == set()
    start["contacts"][colour] = {("robot", 10)}
    start["contacts"]["robot"] |= {("table", "base_link")}
    assert tasks_between(start, now) == set()


def test_condition_stack(moment):
    start = deepcopy(moment)
    start["contacts"]["red"] = {("robot", 10)}
    now = deepcopy(moment)
    now["contacts"]["red"] = {("blue", -1)}
    now["contacts"]["blue"] |= {("red", -1)}
    assert tasks_between(start, now) == {"stack_block"}
    assert tasks_between(now, start) == {"unstack_block"}
    fast = deepcopy(now)
    fast["velocity"]["red"][4] = -1.1
    assert tasks_between(start, fast) == tasks_between(fast, start) == set()
    now["contacts"]["red"] |= {("robot", 10)}  # not let go
    assert tasks_between(start, now) == tasks_between(now, start) == set()


def test_condition_push_into_drawer(moment):
    now = deepcopy(moment)
    now["contacts"]["blue"] = {("table", "drawer_link"), ("table", "base_link")}
    assert tasks_between(moment, now) == {"push_into_drawer"}
    moment["contacts"]["blue"] |= {("red", -1)}
    assert tasks_between(moment, now) == set()


# --- the world ---


@bullet
@pytest.mark.parametrize("scene", "ABCD")
def test_world_is_the_originals(scene):
    """Two episodes: the numbers to the last bit, both pictures, and every condition that held in between."""
    world, golden, moments = World(scene), GOLDEN["scenes"][scene], []
    for episode, desk in enumerate((7, 107)):
        world.reset(ROBOT, np.array(DESKS[desk]))
        for action in [None, *wander(episode)]:
            if action is not None:
                world.step(action)
            if str(len(moments)) in golden["states"]:
                assert numbers(world) == golden["states"][str(len(moments))], len(moments)
            moments.append(world.moment())
        pictures = [world.static_picture(), world.gripper_picture()]
        assert [p.shape for p in pictures] == [(200, 200, 3), (84, 84, 3)]
        digests = [hashlib.sha256(picture.tobytes()).hexdigest()[:16] for picture in pictures]
        assert digests == golden["pictures"][2 * episode : 2 * episode + 2]
    assert len(golden["solved"]) == 60
    for first, last, tasks in golden["solved"]:
        assert tasks_between(moments[first], moments[last]) == set(tasks)


@bullet
def test_lights():
    world = World("D")
    desk = np.array(DESKS[0])
    assert not desk[:6].any()
    world.reset(ROBOT, desk)
    assert world.lights == {"lightbulb": 0, "led": 0}
    table, button, switch = world.table, world.joints["base__button"], world.joints["base__switch"]
    for place, led in ((0.02, 1), (0.02, 1), (0.0, 1), (0.02, 0), (0.0, 0)):  # toggles when it is pressed
        world.p.resetJointState(table, button, place)
        world.step(HOLD)
        assert world.lights["led"] == led
    for place, bulb in ((0.05, 1), (0.05, 1), (0.03, 0)):  # follows the switch
        world.p.resetJointState(table, switch, place)
        world.step(HOLD)
        assert world.lights["lightbulb"] == bulb
    desk[4] = 1  # on, with the switch down
    world.reset(ROBOT, desk)
    world.step(HOLD)
    assert world.lights["lightbulb"] == 1


# --- episodes ---


def path(*points):
    """Actions that lead through points (x, y, z, gripper, steps to wait there)."""
    actions, place = [], START
    for x, y, z, gripper, wait in points:
        way = np.array([x, y, z]) - place
        steps = max(1, int(np.ceil(np.abs(way).max() / 0.02)))
        actions += [[*(way / steps / 0.02), 0, 0, 0, gripper]] * steps + [[*[0] * 6, gripper]] * wait
        place = place + way
    return np.reshape(actions, (-1, 7))


DRAWER, BUTTON, SWITCH = (0.18, -0.235), (-0.12, -0.12), 0.3  # where they are in scene D
MOTIONS = {
    "open_drawer": [(*DRAWER, 0.5, -1, 5), (*DRAWER, 0.36, -1, 8), (0.18, -0.48, 0.36, -1, 8)],
    "turn_on_led": [(-0.12, -0.2, 0.57, -1, 4), (*BUTTON, 0.55, -1, 3), (*BUTTON, 0.45, -1, 8)],
    "move_slider_right": [
        (-0.34, -0.14, 0.56, -1, 5),
        (-0.34, -0.01, 0.53, -1, 8),
        (-0.02, -0.01, 0.53, -1, 10),
    ],
    "move_slider_left": [
        (0.14, -0.12, 0.57, -1, 5),
        (0.14, -0.01, 0.53, -1, 8),
        (-0.16, -0.01, 0.53, -1, 10),
    ],
    "turn_on_lightbulb": [
        *[(SWITCH, -0.12, 0.56, -1, 4), (SWITCH, -0.03, 0.48, -1, 6), (SWITCH, 0.01, 0.52, -1, 3)],
        *[(SWITCH, 0.05, 0.59, -1, 3), (SWITCH, 0.08, 0.66, -1, 8)],
    ],
    "place_in_drawer": [(0.18, -0.3, 0.58, -1, 6), (0.18, -0.3, 0.43, -1, 8), (0.18, -0.3, 0.43, 1, 8)],
}
MOTIONS["turn_off_led"] = MOTIONS["turn_on_led"]
for moves in MOTIONS.values():  # and back above the table
    moves += [(moves[-1][0], min(moves[-1][1], -0.12), 0.57, moves[-1][3], 4)]


def plan(chain):
    """Actions for the first tasks of a chain, as far as there are motions for them."""
    desk, *tasks = CHAINS[chain]
    points = []
    for task in (NAMES[number] for number in tasks):
        if task.startswith("lift") and task.endswith("table"):
            x, y = DESKS[desk][6 + 6 * COLOURS.index(task.split("_")[1]) :][:2]
            points += [(x, y, 0.57, 1, 8), (x, y, 0.46, 1, 6), (x, y, 0.46, -1, 8), (x, y, 0.58, -1, 8)]
        elif task in MOTIONS:
            points += MOTIONS[task]
        else:
            break
    return path(*points)


def play(simulator, actions):
    """The first step with success, or None."""
    for step, action in enumerate(actions, start=1):
        if simulator.step(action)[1]:
            return step


@bullet
@pytest.mark.parametrize("task", [*list(MOTIONS)[:5], "turn_off_led", "lift_red_block_table"])
def test_scripts_solve_single_instructions(task):
    simulator = Calvin(f"calvin_d_{task}", "state", "paper")
    assert simulator.prompts == {task: TASKS[task]["instruction"]}
    for state in (0, 1):
        chain = [i for i, chain in enumerate(CHAINS) if NAMES[chain[1]] == task][state]
        simulator.reset(0, state)
        assert simulator.max_episode_steps == 360 and simulator.tasks == [task]
        steps = play(simulator, plan(chain))
        assert steps and 10 < steps < 80, (task, state)


@pytest.fixture(scope="module")
def envs():
    made = make_envs("calvin_d", 2, 0, obs_mode="state", partial_reset=False)
    yield made
    made.close()


def chunks(actions, size=5):
    padded = np.concatenate([actions, np.repeat(actions[-1:], -len(actions) % size, axis=0)])
    return padded.reshape(-1, 1, size, 7).astype(np.float32)


@bullet
def test_a_chain_is_solved(envs):
    """Drawer, button, door, block: five instructions by a script, beside an environment that does nothing."""
    assert envs.num_eval_states == 1000 and envs.tasks == ["chain"] and envs.max_episode_steps == 480
    tasks = [NAMES[task] for task in CHAINS[65][1:]]
    actions = plan(65)
    obs, _ = envs.reset(options={"eval_states": [65, 3]})
    assert obs["state"].shape == (2, 39) and obs["images"].shape == (2, 0, 1, 1, 3)
    prompts, rewards = [obs["prompt"][0]], 0
    idle = TASKS[NAMES[CHAINS[3][1]]]["instruction"]
    for chunk in chunks(actions):
        assert obs["prompt"][1] == idle
        obs, reward, terminated, truncated, info = envs.step_chunk(np.concatenate([chunk, 0 * chunk]))
        rewards += reward[0].sum()
        if reward[0].any():
            prompts.append(obs["prompt"][0])
        assert not truncated.any() and not terminated[1]
        if terminated[0]:
            break
    assert terminated[0] and info["success"][0] and rewards == 5 and info["episode_length"][0] < 300
    assert prompts == [TASKS[task]["instruction"] for task in [*tasks, tasks[-1]]]
    assert info["final_obs"]["prompt"] == prompts[-1:]
    assert info["episode_return"].tolist() == [5, 0]


@bullet
def test_limits(envs):
    """360 steps for each instruction of an evaluation; 480 for a chain of training, or by the id."""
    actions = plan(65)
    simulator = Calvin("calvin_d", "state", "paper")
    simulator.reset(0, 65)
    rewards = [simulator.step(action)[0] for action in actions[:50]]
    (solved_at,) = np.flatnonzero(rewards) + 1
    assert simulator.max_episode_steps == solved_at + 360
    for row, other in ((0, 1), (1, 0)):  # each environment has its own limit, whichever is the last of them
        envs.reset(options={"eval_states": [65, 3] if row == 0 else [3, 65]})
        for chunk in chunks(actions[:50]):
            both = np.concatenate([chunk, 0 * chunk])[[row, other]]
            _, _, terminated, truncated, info = envs.step_chunk(both)
        ended = np.zeros(2, int)
        while not ended.all():
            _, _, _, truncated, info = envs.step_chunk(np.zeros((2, 20, 7), np.float32))
            ended[truncated] = info["episode_length"][truncated]
            assert not info["success"].any()
        assert ended[row] == solved_at + 360 and ended[other] == 360
        assert info["episode_return"][[row, other]].tolist() == [1, 0]
    for env_id, state, limit in [
        ("calvin_d", 999, 360),
        ("calvin_d", 1000, 480),
        ("calvin_d_480", 999, 480),
        ("calvin_abc", 1000, 480),
        ("calvin_abc_open_drawer", 5000, 360),
    ]:
        simulator = Calvin(env_id, "state", "openpi")
        simulator.reset(0, state)
        assert simulator.max_episode_steps == limit
        if limit == 480:  # and stays so
            simulator.tasks[0] = "open_drawer"
            simulator.start["joints"]["base__drawer"] -= 1
            assert simulator.step(HOLD) == (1.0, False) and simulator.max_episode_steps == 480


@bullet
def test_training_states():
    """The number is the episode: scene, chain and prompts; of the latter there are the training ones."""
    simulator = Calvin("calvin_abc", "state", "paper")
    drawn = set()
    for state in (1000, 1001, 70_002, 2**31 - 1):
        simulator.reset(0, state)
        first = simulator.observe(), simulator.instructions
        desk, *chain = CHAINS[state % 1000]
        for name, prompt in zip(map(NAMES.__getitem__, chain), simulator.instructions):
            assert prompt in TASKS[name]["train_instructions"] and prompt in simulator.more_prompts
        blocks = first[0]["state"][21:].reshape(3, 6)  # a colour lies where the chain says, in any scene
        assert np.abs(blocks[:, :2] - np.reshape(DESKS[desk][6:], (3, 6))[:, :2]).max() < 0.03
        drawn.add(tuple(simulator.world.blocks))
        for action in wander(1, 5):
            simulator.step(action)
        simulator.reset(0, state)
        assert np.array_equal(simulator.observe()["state"], first[0]["state"])
        assert simulator.instructions == first[1]
    assert len(drawn) > 1  # scenes
    assert len(simulator.more_prompts) == 34 + 389


@bullet
def test_same_state_same_episode():
    def episode(simulator):
        simulator.reset(0, 11)
        for action in wander(3, 40):
            simulator.step(action)
        return simulator.observe()

    one, two = Calvin("calvin_d", "rgb", "paper"), Calvin("calvin_d", "rgb", "paper")
    first = episode(one)
    two.reset(0, 12)
    for action in wander(4, 40):
        two.step(action)
    for other in (episode(one), episode(two)):
        assert all(np.array_equal(first[key], other[key]) for key in ("state", "images"))
    assert first["images"].shape == (2, 200, 200, 3) and first["state"].shape == (7,)
    assert np.array_equal(first["images"][0], one.world.static_picture())
    small = one.world.gripper_picture().astype(int)
    middle = first["images"][1].astype(int)[np.ix_(*[np.arange(84) * 200 // 84 + 1] * 2)]
    assert np.abs(small - middle).mean() < 8  # enlarged
    assert one.render(256).shape == (256, 256, 3)


def test_ids(one_line_error):
    ids = set(Calvin.env_ids)
    assert {"calvin_abc", "calvin_d", "calvin_d_480", "calvin_a", "calvin_d_push_into_drawer"} <= ids
    assert len(ids) == 5 * (2 + 27)
    never_first = {"stack_block", "unstack_block", "place_in_drawer", "place_in_slider"}
    never_first |= {f"lift_{colour}_block_drawer" for colour in COLOURS}
    assert {task for task in TASKS if f"calvin_d_{task}" not in ids} == never_first
    assert "calvin_d_" in one_line_error(make_envs, "calvin_d_stack_block", 1, 0)
    assert chain_limit("calvin_abc") == "360 steps an instruction" and chain_limit("calvin_d_480")
    assert chain_limit("calvin_d_open_drawer") is None and chain_limit("tabletop") is None


@pytest.mark.skipif(find_spec("pybullet") is not None, reason="pybullet is installed")
def test_without_pybullet(one_line_error):
    assert "make install" in one_line_error(make_envs, "calvin_d", 1, 0)


@bullet
def test_nothing_is_printed():
    """Bullet greets; where a table is printed, that is in the way."""
    code = "from simulators.calvin import World; World('A'); print('alone')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("alone\n", "")


# --- evaluate.py ---


class Scripted:
    """An agent that plays `plan` of the first chains and then does nothing."""

    chunk_len, action_dim, device, config = 5, 7, "cpu", TINY

    def __init__(self, envs):
        self.policy, self.envs = self, envs
        self.plans = [chunks(plan(state)) for state in range(envs.num_eval_states)]

    def preprocess(self, obs):
        return obs

    def encode(self, obs):
        return obs

    def act(self, obs, generator, deterministic, noise):
        return torch.zeros(len(obs["prompt"]), 1), None, None

    def postprocess(self, x, obs):
        rows = np.flatnonzero(self.envs.alive)[: len(obs["prompt"])]  # spare environments are the last ones
        now = [(self.plans[self.envs.state[row]], self.envs.length[row] // 5) for row in rows]
        return np.stack([p[i, 0] if i < len(p) else np.zeros((5, 7), np.float32) for p, i in now])


@bullet
def test_scripted_chains_are_counted():
    """Through `evaluate` and `summarize`, in two rounds, against the rewards of a bare simulator."""
    envs = make_envs("calvin_d", 4, 0, obs_mode="state", partial_reset=False)
    envs.num_eval_states = 7  # the second round has one environment to spare
    run, expected = script.evaluate(Scripted(envs), envs), []
    simulator = Calvin("calvin_d", "state", "paper")
    for state in range(7):
        simulator.reset(0, state)
        for action in plan(state):
            simulator.step(action)
        expected.append(simulator.solved)
    assert max(expected) >= 1 and min(expected) == 0 and not run["success"].any()
    assert run["return"].tolist() == expected
    assert ((run["length"] > 360) == (np.array(expected) > 0)).all()
    result = summarize([run | {"solved": run["return"].astype(int)}], None, envs.tasks)
    assert result["chain_length"] == pytest.approx(np.mean(expected))
    for k in range(1, 6):
        assert result["classes"][f"len-{k}"]["successes"] == sum(n >= k for n in expected)
    envs.close()


@bullet
def test_chain_table(monkeypatch, tmp_path, capsys):
    """A random policy, from the command line to the table, on two of the chains."""
    torch.manual_seed(0)
    policy = Policy(TINY)
    policy.tokenizer_json = (CHECKPOINTS / "tiny/tokenizer.json").read_text()
    policy.fit_robot(39, 7)
    save_policy(policy, tmp_path / "random")

    def two_chains(*args, **mode):
        envs = make_envs(*args, **mode)
        envs.num_eval_states = 2
        return envs

    monkeypatch.setattr(script, "make_envs", two_chains)
    args = script.Args(
        env_id="calvin_d", checkpoints=(str(tmp_path / "random"),), obs_mode="state", num_envs=2
    )
    args.json = str(tmp_path / "report.json")
    script.main(args)
    table = capsys.readouterr().out
    (result,) = json.loads(Path(args.json).read_text())["results"]
    for k in range(1, 6):
        row = result["classes"][f"len-{k}"]
        assert row["episodes"] == 2 and f"{row['success_rate']:.1%} ({row['successes']}/2)" in table
        assert f"| *len-{k}*" in table
    assert result["chain_length"] == sum(result["classes"][f"len-{k}"]["success_rate"] for k in range(1, 6))
    assert f"| {result['chain_length']:.3f}" in table and "at most 360 steps an instruction" in table
