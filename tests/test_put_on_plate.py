"""Put-on-plate against its reference: episodes, physics, pictures; rewards, the moving object, missing files.

golden/put_on_plate.json was written by RLinf's code. It has no say in textures, whose order is RL4VLA's: they
are compared with a plain computation, pixel by pixel.
"""

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from batch_envs import Batch
from envs import find_variations, make_envs
from simulators.put_on_plate import PutOnPlate, blend, find_assets
from simulators.put_on_plate_episodes import PAIRS, VARIANTS, episode, num_episodes

if find_spec("mani_skill") is None:
    pytest.skip("mani_skill is not installed: make install", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("assets")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "put_on_plate.json").read_text())


@pytest.fixture(scope="module")
def build(assets):
    """Builds the simulator of an id; the scenes of all are closed in the end."""
    built = {}

    def build(env_id):
        try:
            return built.get(env_id) or built.setdefault(env_id, PutOnPlate(env_id, "rgb", "paper"))
        except ValueError as error:
            if "Vulkan" not in str(error):
                raise
            pytest.skip(str(error))

    yield build
    for sim in built.values():
        if sim.scene is not None:
            sim.scene.close()


def play(sim, number, actions):
    """From an episode's number, whatever its task: no draw of an evaluation."""
    task, within = divmod(number, sim.num_episodes)
    sim.reset(task, sim.num_eval_states + within)
    return [sim.step(action) for action in actions]


def random_actions(seed, n=12):
    return np.random.default_rng(seed).uniform(-0.03, 0.03, (n, 7)).astype(np.float32)


@pytest.mark.parametrize("env_id", VARIANTS)
def test_episodes(env_id):
    """Objects, receptacles, scenes, poses and instructions of fifteen episodes, the last one included."""
    total, rows = GOLDEN["episodes"][env_id]
    assert num_episodes(env_id) == total
    names = {kind: [line["name"] for line in lines] for kind, lines in find_assets()[1].items()}
    sim = object.__new__(PutOnPlate)
    sim.lists = find_assets()[1]
    for number, wanted, receptacle, extra, scene, places, turn, instruction in rows:
        told = episode(env_id, number)
        assert (told["object"], told["receptacle"], told["scene"]) == (wanted, receptacle, scene)
        assert sim.instruction(wanted, receptacle, told["template"]) == instruction
        assert names["object"][wanted] in instruction and names["receptacle"][receptacle] in instruction
        poses = {("object", wanted): (places[0], turn), ("receptacle", receptacle): (places[1], [1, 0, 0, 0])}
        if "other_object" in VARIANTS[env_id].digits:
            poses["object", extra] = places[2], turn
        elif "other_receptacle" in VARIANTS[env_id].digits:
            poses["receptacle", extra] = places[2], [1, 0, 0, 0]
        elif "texture" in VARIANTS[env_id].digits:
            assert told["texture"] == extra
        assert list(told["things"]) == list(poses)
        for key, pose in poses.items():
            for a, b in zip(told["things"][key], pose):
                np.testing.assert_allclose(a, b, atol=1e-7)
        if told["target"]:
            np.testing.assert_allclose(told["target"][0], places[2], atol=1e-7)
        assert (told["target"] is not None) == (env_id == "maniskill_25_moving_object")
        assert episode(env_id, number + total) == told  # they begin anew


def test_groups():
    """Those of Table 9, whose rows have the reference's names."""
    rows = {"Instruct": "vision", "Vision": "vision", "Multi": "semantics", "Position": "execution"}
    groups = find_variations("maniskill_25main_plate")
    assert groups == find_variations("maniskill_25main") and list(groups) == list(VARIANTS)[2:]
    for env_id, group in groups.items():
        assert [found for row, found in rows.items() if VARIANTS[env_id].name.startswith(row)] == [group]


def test_places():
    """As many as the reference has, and each one once."""
    assert len(set(PAIRS)) == len(PAIRS) == 784
    for env_id, count in (
        ("maniskill_25_moving_object", 2104),
        ("maniskill_25_two_receptacles", 2104),
        ("maniskill_25_new_positions", 628),
    ):
        places = VARIANTS[env_id].digits["places"]
        assert len(set(places)) == len(places) == count


def test_no_other_object():
    """An episode in eight of the new objects has none: the reference's arithmetic."""
    alone = [len(episode("maniskill_25_two_new_objects", i * 16 * 2104 * 4)["things"]) for i in range(72)]
    assert alone.count(2) == 9 and alone.count(3) == 63


def test_tasks(build):
    """A task is an instruction; its states are all of its episodes, after those of the evaluation."""
    for env_id, tasks, states in (
        ("maniskill_25main", 16 * 17, 1),
        ("maniskill_25main_plate", 16, 20),
        ("maniskill_25_two_new_objects", 9, 36),
        ("maniskill_25_new_instructions", 256, 1),
    ):
        sim = build(env_id)
        low, high = sim.train_states
        assert (len(sim.prompts), sim.num_eval_states, low) == (tasks, states, states)
        assert tasks * (high - low) == num_episodes(env_id)
        for task in (0, tasks - 1):
            numbers = [sim.number(task, low), sim.number(task, high - 1)]
            assert numbers == [task * (high - low), (task + 1) * (high - low) - 1]
            said = [list(sim.prompts)[task]] * 2
            keys = "object", "receptacle", "template"
            assert said == [sim.instruction(*map(episode(env_id, i).get, keys)) for i in numbers]
        drawn = {sim.number(0, state) for state in range(states)}
        assert len(drawn) == states and max(drawn) < high - low


@pytest.mark.parametrize("env_id, number, poses, joints, picture", GOLDEN["rollouts"])
def test_rollouts(build, env_id, number, poses, joints, picture):
    """After twelve random actions robot and things are where RLinf has them, and the picture is the same."""
    sim = build(env_id)
    play(sim, number, random_actions(number))
    first = [(0, kind, sim.now[0][kind]) for kind in ("object", "receptacle")]
    keys = first + [key for key in sim.scene.objs if key not in first]
    things = [sim.scene.objs[key] for key in keys]
    here = np.stack([thing.pose.raw_pose[0].numpy() for thing in things])
    np.testing.assert_allclose(here, poses, atol=1e-3)  # physics depends on the processor: up to 5e-4
    obs = sim.observe()
    np.testing.assert_allclose(obs["state"], joints, atol=1e-3)
    parts = obs["images"][0].reshape(6, 80, 8, 80, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(parts, picture, atol=1.5)  # of 255
    assert len(sim.scene.objs) == len(poses)  # and no others


@pytest.mark.slow
@pytest.mark.parametrize("env_id", VARIANTS)
def test_repeats(build, env_id):
    """Each state is the same episode to the bit, whatever was played before; another one differs."""
    sim, actions, seen = build(env_id), random_actions(0, 6), []
    for task, state in ((1, 0), (2, sim.train_states[0] + 77), (1, 0)):
        sim.reset(task, state)
        before = sim.observe()
        results = [sim.step(action) for action in actions]
        after, physics = sim.observe(), sim.scene.get_state().numpy()
        seen.append([before["images"], before["state"], after["images"], after["state"], physics, results])
        assert before["images"].shape == (1, 480, 640, 3) and before["images"].dtype == np.uint8
        assert before["state"].shape == (8,) and sim.render(64).shape == (64, 64, 3)
    for a, b in zip(seen[0], seen[2]):
        np.testing.assert_array_equal(a, b)
    assert (seen[0][0] != seen[1][0]).mean() > 0.05


def test_success_needs_a_grasp_for_its_reward(build):
    sim = build("maniskill_25main_plate")
    still = np.zeros(7)
    sim.reset(0, sim.train_states[0])
    assert sim.step(still) == (0.0, False)
    x, y, z = sim.receptacle.pose.p[0].tolist()
    half = sim.half_sizes[1, 0].max()

    def put(offset):
        pose = sim.object.pose.raw_pose.clone()
        pose[0, :3] = torch.tensor([x + offset, y, z + 0.05])
        sim.object.set_pose(type(sim.object.pose).create(pose))
        sim.object.set_linear_velocity(torch.zeros(3))
        return [sim.step(still) for _ in range(3)][-1]

    assert put(half + 0.03) == (0.0, False)  # beside it
    assert put(0.0) == (0.0, True)  # on it, but it was never in the gripper
    sim.object.set_pose(type(sim.object.pose).create(torch.tensor([[x, y, z + 0.3, 1, 0, 0, 0]])))
    assert not sim.is_on()  # above it, not on it


def test_rewards_of_a_grasp(build):
    """A script grasps the carrot, lifts it and puts it down: 0.1, 0.1 four steps later, and 1 at the end."""
    sim, rewards = build("maniskill_25main_plate"), []
    play(sim, 4 * PAIRS.index(((2, 2, 0.9), (2, 5, 0.9))), np.zeros((1, 7)))  # in which they fall
    for link in sim.scene.agent.robot._objs[
        0
    ].links:  # the reduced assets' gripper holds its own fingers fast
        for shape in link.collision_shapes:
            groups = shape.collision_groups
            shape.set_collision_groups([*groups[:2], groups[2] | 1 << 29, groups[3]])
    hand = sim.scene.agent.robot.links_map["ee_gripper_link"]

    def go(place, height, gripper, steps):  # actions are in the robot's frame, turned by 180 degrees
        for _ in range(steps):
            offset = place.numpy() + [0, 0, height] - hand.pose.p[0].numpy()
            reward, success = sim.step([*np.clip(offset * [-1, -1, 1], -0.04, 0.04), 0, 0, 0, gripper])
            rewards.append(round(float(reward), 6))
            if success:
                return True

    start, goal = sim.object.pose.p[0].clone(), sim.receptacle.pose.p[0].clone()
    go(start, 0.08, 1, 6), go(start, 0, 1, 6), go(start, 0, 0, 6), go(start, 0.1, 0, 5)
    assert go(goal, 0.12, 0, 8) or go(goal, 0.05, 0, 4) or go(goal, 0.05, 1, 4)
    steps = [step for step, reward in enumerate(rewards) if reward]
    assert [rewards[step] for step in steps] == [0.1, 0.1, 1.0]
    assert steps[1] == steps[0] + 4 and steps[2] == len(rewards) - 1


def test_the_object_moves(build):
    """After the fifth action, before its picture, and with the velocity that it had."""
    sim = build("maniskill_25_moving_object")
    sim.reset(3, sim.train_states[0] + 12345)
    for _ in range(4):
        sim.step(np.zeros(7))
    before, (target, turn) = sim.object.pose.p[0].numpy().copy(), sim.now[0]["target"]
    begun = sim.now[0]["things"]["object", 3][0]
    assert np.hypot(*(before[:2] - begun[:2])) < 0.02 < 0.1 < np.hypot(*(before[:2] - target[:2]))
    sim.step(np.zeros(7))
    np.testing.assert_allclose(sim.object.pose.p[0].numpy(), target, atol=1e-6)
    np.testing.assert_allclose(sim.object.pose.q[0].numpy(), turn, atol=1e-6)
    sim.step(np.zeros(7))
    fallen = sim.object.pose.p[0].numpy()
    assert np.hypot(*(fallen[:2] - target[:2])) < 0.05 and fallen[2] < 0.99


def test_picture(build):
    """Behind robot and things is the photograph, untouched; the bread is where the camera says."""
    sim = build("maniskill_25_new_scenes")
    play(sim, 3 * 784 * 4 + 4 * 700, [])
    picture, photo = sim.observe()["images"][0], sim.backgrounds[0][0]
    assert sim.now[0]["scene"] == 19 and photo.shape == (480, 640, 3)
    behind = (picture == photo).all(axis=-1)
    assert behind[:, :150].all() and behind[400:].mean() > 0.9 and 0.5 < behind.mean() < 0.99
    (params,) = sim.scene.get_sensor_params().values()
    point = torch.cat([sim.object.pose.p[0], torch.ones(1)])
    x, y, z = (params["intrinsic_cv"][0] @ params["extrinsic_cv"][0] @ point).tolist()
    red, green, blue = picture[round(y / z), round(x / z)].astype(int)
    assert red > green + 40 and green > blue  # orange


def plain_blend(rgb, kept, photo, texture, m, whole):
    """Pixel by pixel, from the words of the docs."""
    rows, columns = np.nonzero(kept)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    height, width = bottom - top + 1, right - left + 1
    out = np.zeros(rgb.shape)
    for y in range(rgb.shape[0]):
        for x in range(rgb.shape[1]):
            base = rgb[y, x] if kept[y, x] else photo[y, x]
            if whole:
                colour = texture[y + (top + bottom) // 2, x + (left + right) // 2]
            elif kept[y, x]:  # between the four pixels around, at half-pixel centres
                v = np.clip((y - top + 0.5) * texture.shape[0] / height - 0.5, 0, texture.shape[0] - 1)
                u = np.clip((x - left + 0.5) * texture.shape[1] / width - 0.5, 0, texture.shape[1] - 1)
                i, j = int(v), int(u)
                i2, j2 = min(i + 1, texture.shape[0] - 1), min(j + 1, texture.shape[1] - 1)
                above = texture[i, j] * (1 - u + j) + texture[i, j2] * (u - j)
                below = texture[i2, j] * (1 - u + j) + texture[i2, j2] * (u - j)
                colour = above * (1 - v + i) + below * (v - i)
            else:
                colour = base
            out[y, x] = colour * m + base * (1 - m)
    return out


@pytest.mark.parametrize("m", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("whole", [False, True])
def test_blend(m, whole):
    rng, size = np.random.default_rng(0), (24, 32)
    rgb, photo = rng.integers(0, 256, (2, *size, 3), np.uint8)
    kept = np.zeros(size, bool)
    kept[3:15, 6:25] = rng.random((12, 19)) < 0.6
    scale = 2 if whole else 1
    texture = rng.integers(0, 256, (size[0] * scale, size[1] * scale, 3)).astype(np.float32)
    ours, plain = blend(rgb, kept, photo, texture, m, whole), plain_blend(rgb, kept, photo, texture, m, whole)
    assert ours.dtype == np.uint8 and (plain - ours > -1e-3).all() and (plain - ours < 1.001).all()


def test_textures(build):
    """The texture is that of its own digit, not the scene's; the strength is the name's."""
    for env_id, strength, size in (
        ("maniskill_25_texture_03", 0.3, (480, 640, 3)),
        ("maniskill_25_whole_05", 0.5, (960, 1280, 3)),
    ):
        sim, seen = build(env_id), []
        for texture in (0, 9):  # digits, of textures 1 and 10; scene 0 has none of its own
            play(sim, texture * 16 * 784 * 4, [])
            assert sim.now[0]["scene"] == 0 and sim.now[0]["texture"] == texture + 1
            assert sim.backgrounds[0][1].shape == size and sim.backgrounds[0][2] == strength
            seen.append(sim.observe()["images"][0].astype(int))
        changed = (np.abs(seen[0] - seen[1]) > 2).any(axis=-1).mean()
        assert changed > 0.5 if "whole" in env_id else 0.02 < changed < 0.4


def test_in_a_process(build):
    envs = make_envs("maniskill_25main", 1, 0)
    assert (len(envs.tasks), envs.num_eval_states, envs.max_episode_steps) == (272, 272, 80)
    assert (
        envs.about == "PutOnPlateInScene25Main-v3 train, 17 receptacles (reduced assets: not for comparison)"
    )
    obs, _ = envs.reset(options={"eval_states": [17 * 3 + 5]})
    assert obs["prompt"] == ["put plastic bottle on drawing tablet"]
    sim = build("maniskill_25main")
    sim.reset(17 * 3 + 5, 0)
    here = sim.observe()
    assert np.array_equal(obs["images"][0], here["images"]) and np.array_equal(obs["state"][0], here["state"])
    *_, info = envs.step_chunk(np.zeros((1, 5, 7)))
    assert info["steps"] == [5] and not info["success"].any()
    envs.close()


def test_a_batch_of_one(build):
    """What the batch of a GPU gives: with one environment, on the CPU, the same as the simulator alone."""
    env_id = "maniskill_25_moving_object"
    sim = build(env_id)
    batch = Batch(functools.partial(PutOnPlate.batch, env_id, "rgb", "paper", device="cpu"), env_id, 1, 0, 1)
    obs, _ = batch.reset(options={"eval_states": [3 * sim.num_eval_states]})
    sim.reset(3, 0)
    for actions in random_actions(0, 10).reshape(2, 1, 5, 7):
        here = sim.observe()
        assert np.array_equal(obs["images"][0], here["images"]) and np.array_equal(
            obs["state"][0], here["state"]
        )
        obs, reward, *_ = batch.step_chunk(actions)
        assert reward[0].tolist() == [np.float32(sim.step(action)[0]) for action in actions[0]]
    batch.close()


def test_missing(tmp_path, monkeypatch, one_line_error):
    monkeypatch.setenv("RL4VLA_ASSETS", str(tmp_path))
    with pytest.raises(ValueError, match="set RL4VLA_ASSETS to .*github.com/gen-robot/RL4VLA") as told:
        find_assets()
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
    assert "maniskill_25_texture_03" in one_line_error(make_envs, "maniskill_25_texture", 1, 0)
