"""ManiSkill: its own physics and pictures, success, SIMPLER's layouts and rewards, and what may be missing.

Without a Vulkan device nothing can be built, not even in state mode.
"""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from batch_envs import Batch
from envs import make_envs
from simulators.maniskill import SIMPLER, ManiSkill, check_maniskill

if find_spec("mani_skill") is None:
    pytest.skip("mani_skill is not installed: make install", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("assets")


@pytest.fixture(scope="module")
def renderer(assets):
    try:
        return check_maniskill("PickCube-v1", "rgb")  # which needs no assets
    except ValueError as error:
        if "Vulkan" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cube(renderer):
    sim = ManiSkill("maniskill:PickCube-v1", "state", "paper")
    yield sim
    sim.env.close()


@pytest.fixture(scope="module")
def cube_rgb(renderer):
    sim = ManiSkill("maniskill:PickCube-v1", "rgb", "paper")
    yield sim
    sim.env.close()


@pytest.fixture(scope="module")
def carrot(renderer):
    sim = ManiSkill("maniskill_carrot", "rgb", "paper")
    yield sim
    sim.env.close()


def draw(sim, n, scale=1.0):
    return scale * np.random.default_rng(0).uniform(-1, 1, (n, sim.action_dim)).astype(np.float32)


def play(sim, state, chunk):
    sim.reset(0, state)
    first = sim.observe()
    results = [sim.step(action) for action in chunk]
    return first["state"], sim.observe(), results, sim.env.get_state().numpy()


def check_reproducible(sim, chunk):
    """The same state gives the same episode, to the bit, also after other ones; another one differs."""
    before, after, results, physics = play(sim, 5, chunk)
    play(sim, 6, chunk[::-1])
    other_physics = play(sim, 7, chunk)[3]
    again_before, again, again_results, again_physics = play(sim, 5, chunk)
    np.testing.assert_array_equal(before, again_before)
    np.testing.assert_array_equal(physics, again_physics)
    np.testing.assert_array_equal(after["state"], again["state"])
    np.testing.assert_array_equal(after["images"], again["images"])
    assert results == again_results
    assert np.abs(physics - other_physics).max() > 1e-3


def pixel(sim, point):
    """Where the first camera sees a point of the world: column, row."""
    (params,) = sim.env.get_sensor_params().values()
    camera = params["intrinsic_cv"][0] @ params["extrinsic_cv"][0]
    x, y, z = (camera @ torch.cat([point, torch.ones(1)])).tolist()
    return round(x / z), round(y / z)


def test_episodes(renderer):
    """Groups, evaluation states, the step limit and what follows it, in the processes."""
    envs = make_envs("maniskill:PickCube-v1", 2, 0, group_size=2, obs_mode="state")
    assert envs.num_eval_states == 50 and envs.max_episode_steps == 50 and envs.prompts == ["pick cube"]
    obs, _ = envs.reset()
    assert obs["images"].shape == (2, 0, 1, 1, 3) and obs["state"].shape == (2, 42)
    assert np.array_equal(*obs["state"]) and envs.state[0] == envs.state[1] >= 50  # no evaluation state
    obs, _ = envs.reset(options={"eval_states": [3, 4]})
    again, _ = envs.reset(options={"eval_states": [4, 3]})
    assert np.array_equal(obs["state"], again["state"][::-1]) and not np.array_equal(*obs["state"])
    for t in range(0, 50, 10):
        obs, reward, terminated, truncated, info = envs.step_chunk(np.zeros((2, 10, 8)))
        assert (truncated == (t == 40)).all() and not terminated.any() and not reward.any()
    assert (info["episode_length"] == 50).all() and envs.alive.all() and (envs.length == 0).all()
    assert info["final_obs"]["state"].shape == (2, 42)
    assert not np.array_equal(info["final_obs"]["state"], obs["state"]) and (envs.state >= 50).all()
    envs.close()


def test_state_mode(cube):
    cube.reset(0, 0)
    obs = cube.observe()
    assert obs["images"].shape == (0, 1, 1, 3) and obs["images"].dtype == np.uint8
    assert obs["state"].shape == (42,) and obs["state"].dtype == np.float32
    check_reproducible(cube, draw(cube, 10))


def test_step_is_maniskills_step(cube, renderer):
    """Less its observation and reward: the same physics as gymnasium's loop."""
    import gymnasium as gym

    backends = {"sim_backend": "physx_cpu", "render_backend": renderer}
    env = gym.make("PickCube-v1", obs_mode="state", **backends)
    expected, _ = env.reset(seed=3)
    cube.reset(0, 3)
    for action in draw(cube, 10):
        np.testing.assert_array_equal(cube.observe()["state"], expected[0].numpy())
        expected, _, terminated, _, _ = env.step(action)
        assert cube.step(action)[1] == bool(terminated)
    env.close()


def test_success(cube):
    cube.reset(0, 1)
    still = np.zeros(8, np.float32)
    assert cube.step(still) == (0.0, False)
    for _ in range(20):  # hold it there until the robot rests
        cube.env.cube.set_pose(cube.env.goal_site.pose)
        cube.env.cube.set_linear_velocity(torch.zeros(3))
        reward, success = cube.step(still)
        if success:
            break
    assert success and reward == 1.0


def test_pictures_are_maniskills(cube_rgb, renderer):
    import gymnasium as gym

    backends = {"sim_backend": "physx_cpu", "render_backend": renderer}
    env = gym.make("PickCube-v1", obs_mode="rgb", **backends)
    env.reset(seed=3)
    cube_rgb.reset(0, 3)
    for action in draw(cube_rgb, 3):
        expected, *_ = env.step(action)
        cube_rgb.step(action)
    obs = cube_rgb.observe()
    assert obs["images"].shape == (1, 128, 128, 3) and obs["images"].dtype == np.uint8
    np.testing.assert_array_equal(obs["images"], expected["sensor_data"]["base_camera"]["rgb"].numpy())
    assert obs["state"].shape == (9 + 9 + 1 + 7 + 3,)
    env.close()


def test_cube_is_where_the_camera_says(cube_rgb):
    cube_rgb.reset(0, 2)
    column, row = pixel(cube_rgb, cube_rgb.env.cube.pose.p[0])
    red, green, blue = cube_rgb.observe()["images"][0, row, column].astype(int)
    assert red > 100 and red > green + 60 and red > blue + 60
    assert cube_rgb.render(64).shape == (64, 64, 3) and cube_rgb.render(64).dtype == np.uint8


def test_carrot_in_a_process(renderer, carrot):
    envs = make_envs("maniskill_carrot", 1, 0, protocol="openpi")
    assert envs.num_eval_states == 24 and envs.train_states == (0, 24) and envs.max_episode_steps == 60
    assert carrot.max_episode_steps == 48
    obs, _ = envs.reset(options={"eval_states": [23]})
    assert obs["images"].shape == (1, 1, 480, 640, 3) and obs["state"].shape == (1, 8)
    assert obs["prompt"] == ["put carrot on plate"]
    carrot.reset(0, 23)
    here = carrot.observe()
    assert np.array_equal(obs["images"][0], here["images"]) and np.array_equal(obs["state"][0], here["state"])
    envs.record = 1
    actions = draw(carrot, 2, scale=0.03)
    after, *_, info = envs.step_chunk(actions[None])
    for action in actions:
        carrot.step(action)
    assert np.array_equal(after["images"][0], carrot.observe()["images"])
    assert len(info["frames"]) == 2 and np.array_equal(info["frames"][1][0], carrot.render(256))
    envs.close()


@pytest.mark.parametrize("name", SIMPLER)
def test_layouts(renderer, name):
    """As many as SIMPLER says: the first one after them is the first one again."""
    sim, seen, count = ManiSkill(f"maniskill_{name}", "rgb", "paper"), [], SIMPLER[name][1]
    for state in (0, 1, count - 1, count):
        sim.reset(0, state)
        seen.append(np.stack([thing.pose.raw_pose.numpy().copy() for thing in sim.env.objs.values()]))
    assert np.array_equal(seen[0], seen[3])
    assert min(np.abs(seen[a] - seen[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
    assert sim.max_episode_steps == 48 and sim.step(np.zeros(7)) == (0.0, False)
    sim.env.close()


def test_simpler_picture(carrot):
    carrot.reset(0, 0)
    picture = carrot.observe()["images"][0]
    column, row = pixel(carrot, carrot.env.objs[carrot.env.source_obj_name].pose.p[0])
    red, green, blue = picture[row, column].astype(int)
    assert red > green + 40 and green > blue  # orange; the plate is pale, the table brown behind the gripper
    column, row = pixel(carrot, carrot.env.objs[carrot.env.target_obj_name].pose.p[0])
    assert picture[row, column, :2].min() > 180


def test_simpler_episodes_repeat(carrot):
    check_reproducible(carrot, draw(carrot, 5, scale=0.03))


def test_simpler_pictures_are_maniskills(carrot):
    carrot.reset(0, 4)
    chunk = draw(carrot, 3, scale=0.03)
    for action in chunk:
        carrot.step(action)
    picture = carrot.observe()["images"]
    carrot.env.reset(seed=4, options={"episode_id": 4, "reconfigure": True})
    for action in chunk:
        action[6] = 1 if action[6] > 0.5 else -1
        expected, *_ = carrot.env.step(action)
    np.testing.assert_array_equal(picture, expected["sensor_data"]["3rd_view_camera"]["rgb"].numpy())


def test_simpler_rewards(carrot):
    """A script grasps the carrot and puts it down: 0.1 at the first grasp, 1 at the success."""
    env, rewards = carrot.env, []
    carrot.reset(0, 0)
    source, target = env.objs[env.source_obj_name], env.objs[env.target_obj_name]
    hand = env.agent.robot.links_map["ee_gripper_link"]
    for link in env.agent.robot._objs[0].links:  # the cut-down assets' gripper holds its own fingers fast
        for shape in link.collision_shapes:
            groups = shape.collision_groups
            shape.set_collision_groups([*groups[:2], groups[2] | 1 << 29, groups[3]])

    def go(place, height, gripper, steps):  # actions are in the robot's frame, turned by 180 degrees
        for _ in range(steps):
            offset = place.numpy() + [0, 0, height] - hand.pose.p[0].numpy()
            reward, success = carrot.step([*np.clip(offset * [-1, -1, 1], -0.04, 0.04), 0, 0, 0, gripper])
            rewards.append(reward)
            if success:
                return True

    start = source.pose.p[0].clone()
    go(start, 0.08, 1, 6), go(start, 0, 1, 6), go(start, 0, 0, 4), go(start, 0.1, 0, 5)
    goal = target.pose.p[0].clone()
    assert go(goal, 0.12, 0, 8) or go(goal, 0.05, 0, 4) or go(goal, 0.05, 1, 4)
    assert sorted(rewards)[-2:] == [0.1, 1.0] and sum(rewards) == 1.1
    assert rewards.index(0.1) < rewards.index(1.0) == len(rewards) - 1


@pytest.mark.parametrize(
    "env_id, obs_mode, turns", [("maniskill:PickCube-v1", "state", 5), ("maniskill_carrot", "rgb", 1)]
)
def test_a_batch_of_one(renderer, env_id, obs_mode, turns):
    """What the batch of a GPU gives: with one environment, on the CPU, the same as a process of one."""
    build = functools.partial(ManiSkill.batch, env_id, obs_mode, "paper", device="cpu")
    batch, other = (
        Batch(build, env_id, 1, 0, 1),
        make_envs(env_id, 1, 0, partial_reset=False, obs_mode=obs_mode),
    )
    for name in ("tasks", "prompts", "max_episode_steps", "num_eval_states", "num_eval_envs", "train_states"):
        assert getattr(batch, name) == getattr(other, name)
    assert batch.single_observation_space == other.single_observation_space
    batch.record = other.record = 1
    for options in ({"eval_states": [7]}, None):
        (obs, _), (expected, _) = batch.reset(options=options), other.reset(options=options)
        for _ in range(turns):
            for name in ("images", "state", "prompt"):
                np.testing.assert_array_equal(obs[name], expected[name])
            actions = draw(batch.scene, 3, scale=0.03)[None]
            obs, *given, info = batch.step_chunk(actions)
            expected, *others, other_info = other.step_chunk(actions)
            for a, b in zip(given, others):
                np.testing.assert_array_equal(a, b)
            assert info.keys() == other_info.keys()
            for name in info.keys() - {"final_obs"}:
                np.testing.assert_array_equal(info[name], other_info[name])
    assert batch.get_state() == other.get_state()
    batch.close(), other.close()
    assert batch.reset()[0]["state"].shape == expected["state"].shape  # it is built anew
    batch.close()


class Tables:
    """Stands in for a batch of three: the first one succeeds at step 2, the last breaks down at step 3."""

    prompts, action_dim, max_episode_steps = {"a": "do it"}, 2, 4
    num_eval_states, train_states, repeats = 5, (5, 9), True

    def __init__(self, num_envs):
        self.done = 0

    def reset(self, task, state):
        self.steps, self.began = 0, state

    def observe(self):
        state = np.float32([[i, self.steps] for i in self.began])
        state[2, 1] = np.nan if self.steps >= 3 else self.steps
        return {"images": np.zeros((3, 1, 2, 2, 3), np.uint8), "state": state}

    def step(self, action):
        self.steps, self.seen = self.steps + 1, action
        return np.float64([self.steps == 2, 0, 0]), np.array([self.steps >= 2, False, False])

    def close(self):
        self.done = True


def test_a_batch_of_three(capsys):
    """Success, the step limit and a breakdown, each of one environment; the others go on."""
    batch = Batch(Tables, "tables", 3, 0, 3)
    batch.reset()
    assert len(set(batch.state)) == 1 and 5 <= batch.state[0] < 9  # a group
    batch.reset(options={"eval_states": [0, 1, 2]})
    actions = np.ones((3, 3, 2))
    obs, reward, terminated, truncated, info = batch.step_chunk(actions)
    assert reward.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert terminated.tolist() == [True, False, False] and truncated.tolist() == [False, False, True]
    assert info["episode_length"].tolist() == [2, 3, 0] and info["steps"].tolist() == [2, 3, 0]
    assert info["alive"].tolist() == [True, True, False] and info["dropped"].tolist() == [False, False, True]
    assert obs["state"].tolist() == [[0, 3], [1, 3], [2, 0]] and batch.scene.seen[0].tolist() == [0, 0]
    assert info["final_obs"]["state"].tolist() == [[0, 3], [2, 0]]
    assert capsys.readouterr().err == (
        "tables broke down, task 0, initial state 2, step 3: NaN or infinite; its episode is dropped\n"
    )
    obs, reward, terminated, truncated, info = batch.step_chunk(actions)
    assert truncated.tolist() == [False, True, False] and not terminated.any() and not reward.any()
    assert info["steps"].tolist() == [0, 1, 0] and info["success"].tolist() == [True, False, False]
    assert info["alive"].tolist() == [False, True, False] and not capsys.readouterr().err
    assert np.isfinite(obs["state"]).all()


def test_a_batch_needs_a_gpu(renderer, one_line_error):
    gpu = functools.partial(make_envs, sim_device="cuda", partial_reset=False)
    if not torch.cuda.is_available():
        assert "torch finds no GPU here" in one_line_error(gpu, "maniskill:PickCube-v1", 2, 0)
    together = functools.partial(gpu, partial_reset=True)
    assert "--no-partial-reset" in one_line_error(together, "maniskill_carrot", 2, 0)
    assert "libero_goal runs on the CPU only" in one_line_error(gpu, "libero_goal", 2, 0)


def fails(env_id, **env):
    """The last line of a fresh process that builds it, is asked nothing and ends with exit code 2."""
    code, root = f"from envs import make_envs; make_envs({env_id!r}, 1, 0)", Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **env},
        input="n\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_missing_assets(tmp_path):
    message = fails("maniskill_carrot", MS_ASSET_DIR=str(tmp_path))
    assert message.startswith("error: maniskill_carrot: ") and str(tmp_path) in message
    for name in ("bridge_v2_real2sim", "widowx250s"):
        assert f"python -m mani_skill.utils.download_asset -y {name}" in message


def test_no_vulkan_device():
    hidden = {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
    message = fails("maniskill:PickCube-v1", **hidden)
    assert message.startswith("error: maniskill:PickCube-v1: ") and "Vulkan device" in message


def test_unknown_id(one_line_error):
    assert "PickCube-v1" in one_line_error(make_envs, "maniskill:PickCubes-v1", 1, 0)
    assert "maniskill_carrot" in one_line_error(make_envs, "maniskill_carott", 1, 0)


def test_simpler_has_pictures_only(one_line_error):
    message = one_line_error(functools.partial(make_envs, obs_mode="state"), "maniskill_carrot", 1, 0)
    assert "pictures only" in message and "--obs-mode rgb" in message
