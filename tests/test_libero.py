"""LIBERO: the fixed initial states, its own physics, pictures and success, and what a user can get wrong."""

import gc
import os
import subprocess
import sys
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import flow_sde_ppo
from envs import make_envs
from flow_sde_ppo import Agent
from pi_models import load_policy
from processes import Block
from simulators.libero import LIBERO_STEPS, PACKAGES, Libero, import_libero
from simulators.libero_experts import TASKS as EXPERTS
from simulators.libero_experts import LiberoExperts

for package in ("libero", "robosuite", "bddl"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make install", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("assets")
library = find_library("EGL") or find_library("OSMesa")
draws = pytest.mark.skipif(not library, reason="neither libEGL nor libOSMesa is installed: make apt")

BOWL_ON_PLATE, MIDDLE_DRAWER = 8, 0  # tasks of libero_goal
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (10, 7)).astype(np.float32)
OPEN, CLOSE = np.zeros(7), np.zeros(7)
OPEN[6], CLOSE[6] = -1, 1


@pytest.fixture(scope="module")
def goal():
    return Libero("libero_goal", "fast", "paper")


def run(code, tmp_path, **env):
    """A fresh process with an empty home and no standard input; None unsets a variable."""
    env = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", **env}
    env = {key: value for key, value in env.items() if value is not None}
    options = {"cwd": Path(__file__).parents[1], "env": env, "stdin": subprocess.DEVNULL, "timeout": 300}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in ("images", "state"))


@pytest.mark.parametrize("suite", LIBERO_STEPS)
def test_tasks_and_initial_states(suite):
    sim, openpi = Libero(suite, "state", "paper"), Libero(suite, "state", "openpi")
    assert (sim.max_episode_steps, openpi.max_episode_steps) == LIBERO_STEPS[suite]
    assert len(sim.prompts) == (90 if suite == "libero_90" else 10)
    for name, prompt in sim.prompts.items():
        assert prompt == prompt.strip().lower() and "_" not in prompt and "scene" not in prompt
        states = torch.load(f"{sim.folder}/init_files/{suite}/{name}.pruned_init", weights_only=False)
        assert states.shape[0] == 50 and states.ndim == 2 and np.isfinite(states).all()
        assert len(np.unique(states, axis=0)) > 40


def test_evaluation_states():
    """Ten tasks, fifty states each: what a number stands for, in the processes as well."""
    envs = make_envs("libero_goal", 2, 0, obs_mode="state", group_size=2)
    assert envs.num_eval_states == 500 and len(envs.tasks) == 10 and envs.max_episode_steps == 320
    assert envs.prompts[BOWL_ON_PLATE] == "put the bowl on the plate"
    obs, _ = envs.reset(options={"eval_states": [BOWL_ON_PLATE * 50 + 3, BOWL_ON_PLATE * 50 + 49]})
    assert obs["prompt"] == ["put the bowl on the plate"] * 2
    assert obs["images"].shape == (2, 0, 1, 1, 3) and obs["state"].shape == (2, 8)
    for row, state in enumerate((3, 49)):
        sim = Libero("libero_goal", "state", "paper")
        sim.reset(BOWL_ON_PLATE, state)
        assert np.array_equal(obs["state"][row], sim.observe()["state"])
    assert not np.array_equal(*obs["state"])
    obs, _ = envs.reset()  # a group: the same start
    assert np.array_equal(*obs["state"]) and envs.task[0] == envs.task[1] and envs.state[0] == envs.state[1]
    actions = np.stack([ACTIONS[:5], ACTIONS[5:]])
    obs, reward, terminated, truncated, info = envs.step_chunk(actions)
    assert not np.array_equal(*obs["state"]) and reward.shape == (2, 5) and not reward.any()
    assert not terminated.any() and not truncated.any() and (info["steps"] == 5).all()
    envs.close()


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_10"])
def test_every_suite_steps(suite):
    envs = make_envs(suite, 1, 0, obs_mode="state")
    before, _ = envs.reset(options={"eval_states": [3 * 50 + 49]})
    assert before["prompt"] == [envs.prompts[3]]
    after, reward, terminated, *_ = envs.step_chunk(np.tile([0.5, 0, 0.5, 0, 0, 0, -1], (1, 5, 1)))
    assert not reward.any() and not terminated.any()
    moved = (after["state"] - before["state"])[0, :3]
    assert moved[0] > 0.01 and moved[2] > 0.01 and abs(moved[1]) < 0.01  # forward and up, not sideways
    assert after["state"][0, 6] > 0.03 > -0.03 > after["state"][0, 7]  # -1 opens the fingers
    after = envs.step_chunk(np.tile(CLOSE, (1, 15, 1)))[0]
    assert np.abs(after["state"][0, 6:]).max() < 0.01  # +1 closes them
    envs.close()


@draws
def test_pictures_of_a_chunk():
    envs = make_envs("libero_goal", 1, 0, obs_mode="fast")
    obs, _ = envs.reset(options={"eval_states": [BOWL_ON_PLATE * 50]})
    assert obs["images"].shape == (1, 2, 256, 256, 3) and obs["images"].dtype == np.uint8
    envs.record = 1
    after, *_, info = envs.step_chunk(ACTIONS[None, :3])
    assert not np.array_equal(obs["images"], after["images"]) and len(info["frames"]) == 3
    last = info["frames"][-1][0]
    assert np.array_equal(last[:, ::-1], after["images"][0, 0])  # people see it upright, the policy mirrored
    assert not np.array_equal(info["frames"][0][0], last)
    envs.close()
    small = make_envs("libero_goal", 1, 0, obs_mode="fast", image_size=64)
    assert small.single_observation_space["images"].shape == (2, 64, 64, 3)


@draws
def test_same_state_same_episode(goal):
    def episode():
        goal.reset(BOWL_ON_PLATE, 7)
        first = goal.observe()
        for action in ACTIONS[:5]:
            goal.step(action)
        return first, goal.observe()

    one = episode()
    goal.reset(BOWL_ON_PLATE, 8)  # another state, other furniture, closed gripper
    assert not same(one[0], goal.observe())
    for _ in range(5):
        goal.step(CLOSE)
    two = episode()
    goal.reset(MIDDLE_DRAWER, 0)  # and in a scene that is built anew
    three = episode()
    for other in (two, three):
        assert same(one[0], other[0]) and same(one[1], other[1])


def test_no_end_of_its_own(goal):
    goal.reset(BOWL_ON_PLATE, 0)
    goal.env.env.timestep = 10 * goal.env.env.horizon
    goal.step(OPEN)
    assert goal.step(OPEN) == (0.0, False)


def test_success_bowl_on_plate(goal):
    goal.reset(BOWL_ON_PLATE, 0)
    assert goal.step(OPEN) == (0.0, False)
    data = goal.env.sim.data
    plate = data.get_joint_qpos("plate_1_joint0")
    bowl = data.get_joint_qpos("akita_black_bowl_1_joint0")
    bowl[:3] = plate[:3] + [0, 0, 0.02]
    data.set_joint_qpos("akita_black_bowl_1_joint0", bowl)
    results = [goal.step(OPEN) for _ in range(5)]
    assert results[-1] == (1.0, True)
    assert goal.step(OPEN) == (1.0, True)  # it goes on: ending the episode is the caller's


def test_success_ends_the_episode():
    """A drawer that is pulled out in the middle of a chunk."""
    envs = make_envs("libero_goal", 1, 0, obs_mode="state")
    block = Block(*envs.blocks[0])  # what runs in a process
    block.reset(*(np.full(1, value) for value in (True, MIDDLE_DRAWER, 0)))
    reward, terminated, truncated, _ = block.step(np.tile(OPEN, (1, 2, 1)), [True], 0)
    assert not terminated.any() and not reward.any() and envs.length == [2]
    block.simulators[0].env.sim.data.set_joint_qpos("wooden_cabinet_1_middle_level", -0.15)
    reward, terminated, truncated, _ = block.step(np.tile(OPEN, (1, 3, 1)), [True], 0)
    assert terminated.all() and not truncated.any() and envs.length == [3]
    assert reward.tolist() == [[1, 0, 0]] and not block.broken


@draws
def test_picture_agrees_with_the_camera_matrix(goal):
    """An object that vanishes changes the picture where the camera's geometry says it was."""
    goal.reset(BOWL_ON_PLATE, 0)
    env, data, model = goal.env, goal.env.sim.data, goal.env.sim.model
    camera, size = model.camera_name2id("agentview"), 256
    place = data.get_joint_qpos("cream_cheese_1_joint0")[:3]  # right of the middle, seen from the camera
    x, y, z = data.cam_xmat[camera].reshape(3, 3).T @ (place - data.cam_xpos[camera])
    focal = size / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    column, row = size / 2 + focal * x / -z, size / 2 - focal * y / -z
    assert column > 140 and row > 128

    def pictures():
        env.env._update_observables(force=True)
        return goal.render(size).astype(int), goal.observe()["images"][0].astype(int)

    before = pictures()
    data.set_joint_qpos("cream_cheese_1_joint0", [9, 9, 9, 1, 0, 0, 0])
    env.sim.forward()
    for old, new, where in zip(before, pictures(), (column, size - column)):  # the policy's is mirrored
        changed = np.argwhere(np.abs(old - new).sum(axis=-1) > 60)
        assert 20 < len(changed) < 1000
        assert np.abs(changed.mean(axis=0) - [row, where]).max() < 4


@draws
def test_equal_to_liberos_own_path():
    """Pictures, state, physics and success of OffScreenRenderEnv, which draws at every step."""
    sim = Libero("libero_goal", "rgb", "paper")
    sim.reset(BOWL_ON_PLATE, 4)
    sim.step(CLOSE)  # the next reset reuses this scene
    sim.reset(BOWL_ON_PLATE, 3)
    mine = [sim.observe()]
    for action in ACTIONS[:4]:
        result = sim.step(action)
        mine.append(sim.observe())
    physics, small = sim.env.sim.get_state().flatten(), sim.render(96).shape

    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    folder, name = import_libero(), list(sim.prompts)[BOWL_ON_PLATE]
    bddl = f"{folder}/bddl_files/libero_goal/{name}.bddl"
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=256, camera_widths=256)
    env.seed(3)
    env.reset()
    states = torch.load(f"{folder}/init_files/libero_goal/{name}.pruned_init", weights_only=False)
    env.set_init_state(states[3])
    for step in range(14):
        obs, reward, done, _ = env.step(OPEN.tolist() if step < 10 else ACTIONS[step - 10].tolist())
        if step >= 9:
            here = mine[step - 9]
            pictures = [obs[f"{camera}_image"][::-1, ::-1] for camera in ("agentview", "robot0_eye_in_hand")]
            np.testing.assert_array_equal(here["images"], pictures)
            turn = quat2axisangle(obs["robot0_eef_quat"].copy())
            state = np.concatenate([obs["robot0_eef_pos"], turn, obs["robot0_gripper_qpos"]])
            np.testing.assert_allclose(here["state"], state, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(physics, env.sim.get_state().flatten(), rtol=0, atol=1e-12)
    assert result == (reward, done) and small == (96, 96, 3)
    env.close()


def test_a_step_is_robosuites(scripted):
    """A grasp, a lift: to the last digits in the air, within what MuJoCo's solver leaves open in contact."""
    other = LiberoExperts(f"libero_goal_{list(scripted.prompts)[0]}", "state", "paper")
    scripted.reset(0, 2), other.reset(0, 2)
    rng, results, height = np.random.default_rng(0), [], scripted.place(scripted.source)[2]
    for step in range(45):
        action = np.clip(scripted.expert_action() + rng.normal(0, 0.1, 7), -1, 1)
        _, reward, success, _ = other.env.step(action)
        results.append(scripted.step(action) == (reward, success))
        here, there = (sim.env.sim.get_state().flatten() for sim in (scripted, other))
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-12 if step < 15 else 1e-3)
    assert all(results) and scripted.place(scripted.source)[2] > height + 0.02


def test_first_import(tmp_path):
    """Nothing is asked, and no configuration is left in the user's home."""
    code = "from simulators.libero import Libero; sim = Libero('libero_goal', 'state', 'paper')\n"
    code += "sim.reset(8, 0); print(sim.observe()['state'].shape)"
    done = run(code, tmp_path, LIBERO_CONFIG_PATH=None)
    assert done.stdout == "(8,)\n", done.stderr
    assert not list(tmp_path.glob("**/*libero*")) and not list(tmp_path.glob("**/config.yaml"))


def test_missing_assets(tmp_path):
    code = "from envs import make_envs; make_envs('libero_goal', 1, 0)"
    nowhere, download = str(tmp_path / "nowhere"), None  # which LIBERO would do, here without a network
    for folder in (nowhere, download) if find_spec(PACKAGES) is None else (nowhere,):
        done = run(code, tmp_path, LIBERO_ASSETS=folder)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: libero_goal: LIBERO's assets are missing")
        assert "Traceback" not in done.stderr and "set LIBERO_ASSETS" in last


def test_unknown_suite(one_line_error):
    assert "libero_goal" in one_line_error(make_envs, "libero_gaol", 1, 0)


# --- the scripted experts of LIBERO-Goal ---


@pytest.fixture(scope="module")
def scripted():
    return LiberoExperts("libero_goal_experts", "state", "paper")


@pytest.mark.parametrize("task", range(len(EXPERTS)))
def test_expert(scripted, task):
    """It solves a state of each task, by LIBERO's own predicates, well within the limit."""
    assert scripted.max_episode_steps == 320 and list(scripted.prompts) == list(EXPERTS)
    scripted.reset(task, 11 + task)
    bowl = scripted.place("akita_black_bowl_1")
    for _ in range(120):
        reward, success = scripted.step(scripted.expert_action())
        if success:
            break
    assert success and reward == 1
    source, destination = scripted.targets().reshape(2, 3) / 8
    assert np.linalg.norm((source - destination)[:2]) < 0.05
    if task == 0:
        np.testing.assert_allclose(source + [-0.05, 0, 0.95], scripted.place("akita_black_bowl_1"), atol=1e-6)
        assert np.linalg.norm(scripted.place("akita_black_bowl_1") - bowl) > 0.1


def test_expert_aims_where_it_is_told(scripted):
    """An error of the aim moves the hand by as much, in units of which 8 are a metre."""
    scripted.reset(0, 3)
    ends = []
    for error in (np.zeros(6), np.float32([0.32, -0.4, 0, 0, 0, 0])):
        scripted.reset(0, 3)
        for _ in range(20):  # until it is above, or on its way down
            scripted.step(scripted.expert_action(error))
        ends.append(scripted.obs["robot0_eef_pos"][:2])
    np.testing.assert_allclose(ends[1] - ends[0], [0.04, -0.05], atol=0.01)


def test_an_expert_picks_it_up_again(scripted):
    """It has no memory: the bowl slips, and is grasped anew."""
    scripted.reset(0, 5)
    for step in range(200):
        action = scripted.expert_action()
        if 34 <= step < 40:
            action[6] = -1
        _, success = scripted.step(action)
        if success:
            break
    assert success and step > 80


def test_scripted_tasks_are_liberos(scripted, goal):
    """The same states, pictures and successes; what is privileged is no part of an observation."""
    sim = LiberoExperts("libero_goal_put_the_bowl_on_the_plate", "fast", "paper", image_size=64)
    sim.reset(0, 4), goal.reset(BOWL_ON_PLATE, 4)
    assert sim.observe()["images"].shape == (2, 64, 64, 3) and sim.observe().keys() == goal.observe().keys()
    for action in ACTIONS:
        assert sim.step(action) == goal.step(action)
    np.testing.assert_array_equal(sim.observe()["state"], goal.observe()["state"])
    assert sim.places().shape == (7, 3)


@draws
def test_what_is_out_of_sight_is_not_drawn(monkeypatch):
    """Fast pictures leave out geoms that no pixel shows: the same pixels, at every pose."""
    sim = LiberoExperts("libero_goal_put_the_bowl_on_the_plate", "fast", "paper", image_size=64)
    sim.reset(0, 2)
    rng, left_out = np.random.default_rng(0), []
    find = LiberoExperts._out_of_sight
    for _ in range(8):
        for camera, size in (("agentview", 64), ("robot0_eye_in_hand", 64), ("agentview", 256)):
            picture = sim.render(size, camera)
            left_out.append(find(sim, camera).mean())
            with monkeypatch.context() as patch:
                patch.setattr(LiberoExperts, "_out_of_sight", lambda *_: [])
                np.testing.assert_array_equal(sim.render(size, camera), picture)
        for action in rng.uniform(-1, 1, (6, 7)):
            sim.step(action)
    assert 0.1 < min(left_out) and picture.std() > 20


@draws
def test_simulators_of_a_scene_share_its_context():
    """Drawn in turn in one context: the pictures that one of its own gives. It ends with the last of them."""
    one, other = (LiberoExperts("libero_goal_experts", "fast", "paper", image_size=64) for _ in "ab")
    one.reset(0, 0), other.reset(1, 7)
    for action in ACTIONS:
        one.step(action), other.step(action)
    first, second = one.observe()["images"], other.observe()["images"]
    assert one.env.sim._render_context_offscreen is other.env.sim._render_context_offscreen
    assert (first != second).any()
    np.testing.assert_array_equal(one.observe()["images"], first)
    other.env.sim._render_context_offscreen = None
    Libero.contexts.clear()
    np.testing.assert_array_equal(other.observe()["images"], second)  # in a new one
    one.env.close(), other.env.close()
    del one, other
    gc.collect()
    assert not Libero.contexts


@draws
def test_no_privileged_number_reaches_the_policy():
    """All that is known of where things are set to zero, the pictures kept: the same actions."""
    sim = LiberoExperts("libero_goal_put_the_bowl_on_the_plate", "fast", "paper", image_size=32)
    policy = load_policy("tiny")
    policy.fit_robot(8, 7)
    agent = Agent(policy, flow_sde_ppo.Args())

    def act(seen):
        images = seen["images"][:1]  # this policy has one camera
        obs = {"images": images[None], "state": seen["state"][None], "prompt": ["put the bowl on the plate"]}
        chain, *_ = agent.act(policy.encode(policy.preprocess(obs)), torch.Generator().manual_seed(0))
        return policy.postprocess(chain[:, -1], obs)

    sim.reset(0, 7)
    seen, known = sim.observe(), sim.places()
    assert set(seen) == {"images", "state"} and seen["state"].shape == (8,)
    data = sim.env.sim.data
    for numbers in (data.qpos, data.qvel, data.body_xpos, data.body_xquat, data.xpos):
        numbers[:] = 0
    assert not np.allclose(sim.places()[1:], known[1:])
    again = sim.observe()
    np.testing.assert_array_equal(act(again), act(seen))
    again["images"] = again["images"] * np.uint8(0)
    assert np.abs(act(again) - act(seen)).max() > 1e-4  # a picture is read
