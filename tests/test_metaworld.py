"""MetaWorld: its own steps and successes, its fixed initial states, its pictures, and a short training."""

import json
import multiprocessing
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("metaworld", reason="MetaWorld is not installed: make install")
import mujoco
from conftest import Silent
from metaworld import env_dict
from PIL import Image

import flow_sde_ppo
import flow_sft
from envs import find_simulator, make_envs
from flow_sde_ppo import Agent
from pi_models import load_policy
from simulators.metaworld import METAWORLD, MetaWorld, metaworld_tasks, touching_object

THEIR_TOUCHING_OBJECT = env_dict.SawyerXYZEnv.touching_object  # a MetaWorld of ours replaces it
TASK = "reach-v3"
STATES = np.array([3, 4, 5, 6])


def make(n=4, task=TASK, **changed):
    return make_envs(f"metaworld_{task}", n, **dict(seed=0, obs_mode="state", partial_reset=False) | changed)


@pytest.fixture(scope="module")
def envs():
    made = make()
    yield made
    made.close()


def bare(task, seed, actions):
    """MetaWorld's own environment, stepped by hand: observations and successes until the first one."""
    env = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=0)
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    env.seed(int(seed))
    obs, successes = [env.reset(seed=int(seed))[0]], []
    for action in actions:
        step = env.step(action)
        obs.append(step[0])
        successes.append(bool(step[4]["success"]))
        if successes[-1]:
            break
    return np.float32(obs), successes


def wander(n, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, steps, 4)).astype(np.float32)


# --- tasks ---


def test_tasks(capsys):
    assert len(METAWORLD) == 50 and set(METAWORLD) == set(env_dict.ALL_V3_ENVIRONMENTS)
    classes = Counter(task["difficulty"] for task in METAWORLD.values())
    assert classes == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}
    for name, theirs in [("mt10", env_dict.MT10_V3), ("mt50", env_dict.MT50_V3)]:
        assert set(metaworld_tasks(name)) == set(theirs)
    assert set(metaworld_tasks("ml45")) == set(env_dict.ML45_V3["train"])
    assert set(metaworld_tasks("ml45_test")) == set(env_dict.ML45_V3["test"])
    assert metaworld_tasks("push-v3") == metaworld_tasks("push") == ["push-v3"]
    assert metaworld_tasks("push+reach-v3+push") == ["push-v3", "reach-v3"]
    assert find_simulator("metaworld_push+reach") is MetaWorld
    with pytest.raises(SystemExit):
        make_envs("metaworld_push+reech", 2, 0)
    assert capsys.readouterr().err == "error: metaworld_push+reech: MetaWorld has no task 'reech'\n"


# --- chunks and ends ---


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_are_metaworlds_steps(envs, chunk):
    actions = wander(4, 16)
    obs, _ = envs.reset(options={"eval_states": STATES})
    expected = [bare(TASK, seed, actions[n]) for n, seed in enumerate(STATES)]
    np.testing.assert_array_equal(obs["state"], [e[0][0] for e in expected])
    assert obs["state"].dtype == np.float32 and obs["images"].shape == (4, 0, 1, 1, 3)
    assert obs["prompt"] == [METAWORLD[TASK]["instruction"]] * 4
    for start in range(0, 16, chunk):
        obs, reward, terminated, truncated, info = envs.step_chunk(actions[:, start : start + chunk])
        assert reward.shape == (4, chunk) and not reward.any() and not (terminated | truncated).any()
        np.testing.assert_array_equal(obs["state"], [e[0][start + chunk] for e in expected])
        assert (info["steps"] == chunk).all() and (info["episode_length"] == start + chunk).all()


def test_draws(envs):
    """Without drawing an observation stays what it was, and the episode goes on; the next is up to date."""
    actions = wander(4, 8)
    before, _ = envs.reset(options={"eval_states": STATES})
    envs.draws = False
    obs, *_, info = envs.step_chunk(actions[:, :4])
    np.testing.assert_array_equal(obs["state"], before["state"])
    assert (info["episode_length"] == 4).all()
    envs.draws = True
    obs, *_ = envs.step_chunk(actions[:, 4:])
    expected = [bare(TASK, seed, actions[n])[0][8] for n, seed in enumerate(STATES)]
    np.testing.assert_array_equal(obs["state"], expected)


def test_success_is_an_end(envs):
    """The scripted expert: reward 1 at the step of MetaWorld's first success, which ends the episode."""
    envs.reset(options={"eval_states": STATES})
    actions, ended = [], np.zeros(4, bool)
    for _ in range(100):
        actions.append(envs.expert_action())
        obs, reward, terminated, truncated, info = envs.step_chunk(actions[-1][:, None])
        assert (reward[:, 0] == terminated).all() and not truncated.any()
        assert (info["alive"] == ~ended).all() and (info["steps"] == ~ended).all()
        if terminated.any():
            np.testing.assert_array_equal(info["final_obs"]["state"], obs["state"][terminated])
            assert len(info["final_obs"]["prompt"]) == terminated.sum()
        ended |= terminated
        if ended.all():
            break
    assert info["success"].all() and (info["episode_return"] == 1).all()
    for n, seed in enumerate(STATES):
        _, successes = bare(TASK, seed, np.stack(actions, axis=1)[n])
        assert successes[-1] and info["episode_length"][n] == len(successes)
    again = envs.step_chunk(wander(4, 3))  # ended episodes stay as they are
    assert not again[4]["steps"].any() and not again[1].any() and not (again[2] | again[3]).any()
    np.testing.assert_array_equal(again[0]["state"], obs["state"])


def test_touching_object():
    """While the scripted expert grasps a puck: at every step and for every geom what MetaWorld says."""
    simulator, touched = MetaWorld("metaworld_pick-place-v3", "state", "paper"), []
    simulator.reset(0, 3)
    for _ in range(60):
        simulator.step(simulator.expert_action())
        for geom in range(simulator.env.model.ngeom):
            touched.append(bool(touching_object(simulator.env, geom)))
            assert touched[-1] == THEIR_TOUCHING_OBJECT(simulator.env, geom)
    assert 0 < sum(touched) < 60


@pytest.mark.parametrize("protocol, limit", [("paper", 100), ("openpi", 500)])
def test_step_limit(protocol, limit):
    envs = make(2, "assembly-v3", protocol=protocol)
    assert envs.max_episode_steps == limit
    envs.reset()
    for start in range(0, limit, 40):
        _, _, terminated, truncated, info = envs.step_chunk(wander(2, 40, start))
        assert not terminated.any() and truncated.all() == (start + 40 >= limit)
    assert (info["episode_length"] == limit).all() and len(info["final_obs"]["prompt"]) == 2
    envs.close()


def test_partial_reset():
    envs = make(3, partial_reset=True, seed=5)
    first, _ = envs.reset()
    for _ in range(100):
        obs, _, terminated, _, info = envs.step_chunk(np.repeat(envs.expert_action()[:, None], 1, axis=1))
        if terminated.any():
            break
    new, rest = np.flatnonzero(terminated), np.flatnonzero(~terminated)
    assert np.abs(obs["state"][new] - info["final_obs"]["state"]).max(axis=1).min() > 0.01
    assert info["success"][new].all() and (info["episode_length"][new] > 10).all()
    after, _, _, _, info = envs.step_chunk(np.zeros((3, 2, 4)))
    assert (info["episode_length"][new] == 2).all() and (info["episode_length"][rest] > 10).all()
    assert not info["success"][new].any() and info["alive"].all()
    assert (envs.state >= 50).all()  # never an evaluation state
    assert np.abs(first["state"] - after["state"]).max() > 0
    envs.close()


# --- initial states ---


def test_seeds_and_groups():
    a, b, c = make(6, "mt10", seed=1, group_size=3), make(6, "mt10", seed=1), make(6, "mt10", seed=2)
    grouped, plain, other = (e.reset()[0] for e in (a, b, c))
    for start in (0, 3):
        assert (grouped["state"][start] == grouped["state"][start : start + 3]).all()
        assert len(set(grouped["prompt"][start : start + 3])) == 1
    assert not np.array_equal(grouped["state"][0], grouped["state"][3])
    assert len(set(plain["prompt"])) > 1 and not np.array_equal(plain["state"], other["state"])
    np.testing.assert_array_equal(plain["state"], b.reset(seed=1)[0]["state"])  # also after another episode
    moved = a.step_chunk(np.tile(wander(1, 5), (6, 1, 1)))[0]["state"]
    assert (moved[0] == moved[:3]).all() and (moved[3] == moved[3:]).all()
    for envs in (a, b, c):
        envs.close()


def test_evaluation_states_are_fixed(envs):
    assert envs.num_eval_states == 50 and make(2, "mt10").num_eval_states == 500
    assert make_envs("metaworld_mt50", 1, 0, obs_mode="state").num_eval_states == 500
    first = envs.reset(options={"eval_states": STATES})[0]["state"]
    envs.reset()
    np.testing.assert_array_equal(first, envs.reset(options={"eval_states": STATES})[0]["state"])
    assert len(np.unique(first, axis=0)) == 4


# --- pictures ---


@pytest.fixture(scope="module")
def picture():
    try:
        simulator = MetaWorld("metaworld_push-v3", "rgb", "paper")
        simulator.reset(0, 0)
        return simulator, simulator.observe()
    except Exception as error:  # of any class, without the libraries
        pytest.skip(f"MuJoCo cannot draw here ({error}): make apt")


def test_pictures_are_metaworlds(picture):
    """The pixels of its own renderer, of the camera of the public demonstrations, turned by 180 degrees."""
    simulator, obs = picture
    assert obs["images"].shape == (1, 480, 480, 3) and obs["state"].shape == (4,)
    np.testing.assert_array_equal(obs["state"], np.float32(simulator.obs[:4]))
    kind = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["push-v3-goal-observable"]
    env = kind(seed=0, render_mode="rgb_array")
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    env.model.cam_pos[2] = [0.75, 0.075, 0.7]
    env.mujoco_renderer.camera_id = 2
    assert env.model.camera(2).name == "corner2"
    env.seed(0)
    env.reset()
    mujoco.mj_kinematics(env.model, env.data)  # or the goal's marker is not yet where the reset has put it
    theirs = env.render()[::-1, ::-1].astype(int)
    assert np.abs(theirs - obs["images"][0]).max() <= 2 and theirs.std() > 20


def test_picture_is_upright(picture):
    """A point of the world lies where the camera says; the higher one is further up, after the rotation."""
    simulator, obs = picture
    data, camera = simulator.env.data, simulator.env.model.camera("corner2").id
    focal = 240 / np.tan(np.radians(simulator.env.model.cam_fovy[camera]) / 2)

    def pixel(point):  # column and row of the picture that the policy gets
        x, y, z = data.cam_xmat[camera].reshape(3, 3).T @ (point - data.cam_xpos[camera])
        return 480 - (240 + focal * x / -z), 480 - (240 - focal * y / -z)

    puck = data.body("obj").xpos.copy()
    before, (column, row) = obs["images"][0].astype(int), pixel(puck)
    assert pixel(puck + [0, 0, 0.1])[1] < row - 10  # up is up
    qpos, qvel = data.qpos.copy(), data.qvel.copy()
    hidden = qpos.copy()
    hidden[9:12] = [0, 0.9, -1]
    simulator.env.set_state(hidden, qvel)
    changed = np.argwhere(np.abs(simulator.render(480).astype(int) - before).sum(axis=-1) > 60)
    simulator.env.set_state(qpos, qvel)
    assert 50 < len(changed) < 8000
    assert np.abs(np.median(changed, axis=0) - [row, column]).max() < 25  # its shadow lies beside it


def test_fast_pictures_and_films(picture):
    envs = make(3, "push-v3", obs_mode="fast")
    obs, _ = envs.reset(options={"eval_states": np.zeros(3, int)})
    assert obs["images"].shape == (3, 1, 480, 480, 3)
    difference = np.abs(obs["images"][0, 0].astype(int) - picture[1]["images"][0])
    assert 0 < difference.mean() < 40  # the same scene, without shadows
    envs.record = 2
    _, _, _, _, info = envs.step_chunk(wander(3, 4))
    assert len(info["frames"]) == 4 and info["frames"][0].shape == (2, 256, 256, 3)
    assert (info["frames"][0] != info["frames"][3]).any()
    envs.record = 0
    assert "frames" not in envs.step_chunk(wander(3, 1))[4]
    envs.close()


def test_pictures_of_the_policys_size():
    """Fast ones are drawn at the size that is asked for; rgb are the simulator's own."""
    envs, simulator = (
        make(2, "push-v3", obs_mode="fast", image_size=64),
        MetaWorld("metaworld_push-v3", "fast", "paper"),
    )
    obs, _ = envs.reset(options={"eval_states": [3, 4]})
    assert obs["images"].shape == (2, 1, 64, 64, 3) and obs["state"].shape == (2, 4)
    for n, state in enumerate((3, 4)):
        simulator.reset(0, state)
        np.testing.assert_array_equal(obs["images"][n, 0], simulator.render(64))
    envs.close()
    own = make(1, "push-v3", obs_mode="rgb", image_size=64)
    assert own.single_observation_space["images"].shape == (1, 480, 480, 3)


@pytest.mark.parametrize("task", ["stick-push-v3", "window-open-v3"])
def test_a_renderer_is_shared(picture, task):
    """What is drawn by the renderer of another environment is what one of its own would draw."""
    one, other = (MetaWorld(f"metaworld_{task}", "fast", "paper", image_size=64) for _ in "ab")
    one.reset(0, 0), other.reset(0, 7)
    first = one.observe()["images"]
    for action in wander(1, 10)[0]:
        one.step(action), other.step(action)
    own = mujoco.Renderer(other.env.model, 64, 64)
    own.update_scene(other.env.data, "corner2")
    expected = own.render()[::-1, ::-1]
    own.close()
    np.testing.assert_array_equal(other.render(64), expected)
    assert (one.observe()["images"] != first).any() and (one.render(64) != expected).any()
    assert one.renderers is other.renderers


def test_no_privileged_number_reaches_the_policy(picture):
    """All that is known of objects and goal set to zero: the same observation, and the same actions."""
    simulator, _ = picture
    policy = load_policy("tiny")
    policy.fit_robot(4, 4)
    agent = Agent(policy, flow_sde_ppo.Args())

    def act(state, images, prompt):
        obs = {"images": images[None], "state": state[None], "prompt": [prompt]}
        prefix = policy.encode(policy.preprocess(obs))
        chain, *_ = agent.act(prefix, torch.Generator().manual_seed(0), deterministic=True)
        return policy.postprocess(chain[:, -1], obs)

    simulator.reset(0, 7)
    seen, prompt = simulator.observe(), simulator.prompts["push-v3"]
    assert set(seen) == {"images", "state"} and seen["state"].shape == (4,)
    before, known = act(**seen, prompt=prompt), simulator.obs.copy()
    assert (known[[4, 5, 36, 37]] != 0).all()  # where the puck is, and the goal
    simulator.obs[4:] = 0
    again = simulator.observe()
    simulator.obs_mode = "state"
    assert not np.array_equal(simulator.observe()["state"], known.astype(np.float32))  # which would see it
    simulator.obs_mode = "rgb"
    np.testing.assert_array_equal(act(**again, prompt=prompt), before)
    moved = seen["images"].copy()
    moved[:, 200:300, 200:300] = 0  # a picture is read
    assert np.abs(act(seen["state"], moved, prompt) - before).max() > 1e-4


def test_targets(envs):
    """Stage 0 is told where MuJoCo has the puck and the goal; a wrong aim leads the expert beside them."""
    simulator = MetaWorld("metaworld_push-v3", "state", "paper")
    simulator.reset(0, 5)
    metres = (simulator.places() / 8 + [0, 0.7, 0.1]).astype(np.float64)
    np.testing.assert_allclose(metres[0], simulator.env.data.body("hand").xpos, atol=0.1)
    np.testing.assert_allclose(metres[1], simulator.env.data.body("obj").xpos, atol=1e-3)
    np.testing.assert_allclose(metres[2], simulator.env.data.site("goal").xpos, atol=1e-3)
    np.testing.assert_array_equal(simulator.targets(), simulator.places()[1:].flatten())
    simulator.reset(0, 6)  # the marker is moved by a reset too, not by the first step
    np.testing.assert_allclose(simulator.env.data.site("goal").xpos, simulator.obs[36:39], atol=1e-3)
    ends = []
    for error in (0, np.float32([0.8, 0, 0, 0, 0, 0])):  # 10 cm beside the puck
        simulator.reset(0, 5)
        for _ in range(25):
            simulator.step(simulator.expert_action(error))
        ends.append(simulator.obs[:3].copy())
    assert 0.07 < ends[1][0] - ends[0][0] < 0.13

    vector = make(2, "push-v3")
    vector.reset(options={"eval_states": [4, 5]})
    simulator.reset(0, 5)
    np.testing.assert_array_equal(vector.targets()[1], simulator.targets())
    np.testing.assert_array_equal(vector.places()[1], simulator.places())
    errors = np.float32([[0] * 6, [0.8, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(vector.expert_action(errors)[1], simulator.expert_action(errors[1]))
    vector.close()


# --- scripts ---


def test_play(monkeypatch):
    """What is learned of sloppy play: pairs a stride apart, actions of its own aim or of the right one."""
    monkeypatch.setattr(flow_sft, "tqdm", lambda steps, **_: Silent(steps))
    pairs = {}
    for corrections in (False, True):
        for stride in (1, 3):
            envs, rng = make(2, "push-v3", seed=5), np.random.default_rng(0)
            how = 0.4, rng, corrections, stride
            pairs[corrections, stride] = flow_sft.collect_demonstrations(envs, 1, 5, *how)
            envs.close()
    obs, did = pairs[False, 1]
    for corrections in (False, True):  # the episode, and what was seen of it, are the same
        every, actions = pairs[corrections, 1]
        np.testing.assert_array_equal(every["state"], obs["state"])
        np.testing.assert_array_equal(pairs[corrections, 3][0]["state"], obs["state"][::3])
        np.testing.assert_array_equal(pairs[corrections, 3][1], actions[::3])
        np.testing.assert_array_equal(actions[1:-5, 0], actions[:-6, 1])  # a chunk goes on as the next begins
    meant = pairs[True, 1][1]
    assert np.abs(meant - did).max() > 0.1
    simulator = MetaWorld("metaworld_push-v3", "state", "paper")
    draws = np.random.default_rng(5)
    draws.integers(1, size=2)  # tasks
    starts = draws.integers(*MetaWorld.train_states, size=2)
    for first in starts:  # of the two the episode that ended earlier
        simulator.reset(0, first)
        if np.array_equal(np.float32(simulator.obs), obs["state"][0]):
            break
    for n in range(len(did)):  # the expert with the right aim, in the states that the sloppy one has met
        np.testing.assert_array_equal(np.float32(simulator.obs), obs["state"][n])
        np.testing.assert_allclose(simulator.expert_action(), meant[n, 0], atol=1e-6)
        simulator.step(did[n, 0])


def test_pretrain(tmp_path, monkeypatch, picture):
    """Stage 0 from MetaWorld's pictures in a few steps: scenes that are repeated, play of two tasks."""
    monkeypatch.setattr(flow_sft, "tqdm", lambda steps, **_: Silent(steps))
    few = dict(pretrain=True, env_id="metaworld_push+reach", obs_mode="fast", num_envs=2, num_scenes=6)
    few |= dict(scene_chunks=2, vlm_steps=2, batch_size=4, max_error=10, play_episodes=1, play_steps=2)
    few |= dict(image_size=48, patch_size=16, output=str(tmp_path / "tiny"))
    drawn = []
    scenes = flow_sft.draw_scenes

    def count(*given):
        for scene in scenes(*given):
            drawn.append(scene)
            yield scene

    monkeypatch.setattr(flow_sft, "draw_scenes", count)
    flow_sft.main(flow_sft.Args(**few))
    assert len(drawn) == 3 + 20  # six scenes of two environments, and 20 batches of others at the end
    obs, targets, places = drawn[0]
    assert obs["images"].shape == (2, 1, 48, 48, 3) and targets.shape == (2, 6) and places.shape == (2, 9)
    policy = load_policy(tmp_path / "tiny")
    assert (policy.config.image_size, policy.config.patch_size, policy.env_action_dim) == (48, 16, 4)
    assert len(policy.stats["state"]["mean"]) == 4
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "--env-id metaworld_push+reach --obs-mode fast --num-envs 2" in card and "nan" not in card
    shapes = []  # SFT sees pictures of the policy's size, as RL will
    monkeypatch.setattr(flow_sft, "finetune", lambda policy, obs, *_: shapes.append(obs["images"].shape) or 0)
    start = dict(env_id="metaworld_reach", obs_mode="fast", checkpoint=few["output"], num_envs=1, num_demos=1)
    flow_sft.main(flow_sft.Args(**start, output=str(tmp_path / "sft")))
    assert shapes[0][1:] == (1, 48, 48, 3)


def test_sft_then_rl(tmp_path, monkeypatch):
    """A demonstration, an iteration of each script, and the report; from the shipped tiny policy."""
    import evaluate

    before, start = set(multiprocessing.active_children()), str(tmp_path / "sft")
    monkeypatch.setattr(flow_sft, "tqdm", lambda steps, **_: Silent(steps))
    flow_sft.main(
        flow_sft.Args(
            env_id="metaworld_reach-v3",
            obs_mode="state",
            num_envs=2,
            num_demos=2,
            total_steps=30,
            output=start,
        )
    )
    sizes = dict(
        env_id="metaworld_reach-v3",
        obs_mode="state",
        checkpoint=start,
        num_envs=4,
        eval_freq=0,
        num_minibatches=2,
        total_timesteps=100,
        run_dir=str(tmp_path / "runs"),
        capture_video=True,
    )

    def short(agent, envs, record, **_):
        envs.reset(options={"eval_states": np.arange(4)})
        envs.record = record
        return {"success": np.zeros(2), "frames": envs.step_chunk(np.zeros((4, 2, 4)))[4]["frames"]}

    monkeypatch.setattr(flow_sde_ppo, "evaluate", short)
    flow_sde_ppo.main(flow_sde_ppo.Args(**sizes, num_steps=6))
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoint")
    films = [Image.open(path).size for path in checkpoint.parent.glob("eval_*.gif")]
    assert films == [(4 * 256, 256 + 23)] * 2  # before and after: four episodes, a line of text
    monkeypatch.undo()
    evaluate.main(
        evaluate.Args(
            env_id="metaworld_reach-v3",
            obs_mode="state",
            checkpoints=(start, str(checkpoint)),
            num_envs=25,
            json=str(tmp_path / "report.json"),
        )
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [r["episodes"] for r in report["results"]] == [50, 50]
    assert report["protocol"]["max_episode_steps"] == 100 and report["protocol"]["obs_mode"] == "state"
    assert set(multiprocessing.active_children()) <= before


def test_a_killed_process(capsys):
    """The other process goes on as it would have; a new one begins its episodes as the old one did."""
    both = [make(partial_reset=True) for _ in range(2)]
    first = [envs.reset(options={"eval_states": STATES})[0] for envs in both]
    actions = wander(4, 30)
    for envs in both:
        envs.step_chunk(actions[:, :10])
    process, _ = both[1].processes[-1]
    os.kill(process.pid, signal.SIGKILL)
    intact, broken = (envs.step_chunk(actions[:, 10:20]) for envs in both)
    assert capsys.readouterr().err.startswith("metaworld_reach-v3 broke down, task 0, initial state ")
    dropped = broken[4]["dropped"]
    assert (dropped == (np.arange(4) >= both[1].rows[-1].start)).all()
    if not dropped.all():
        np.testing.assert_array_equal(intact[0]["state"][~dropped], broken[0]["state"][~dropped])
    assert (both[1].state[dropped] >= 50).all() and (both[1].length[dropped] == 0).all()
    obs, *_, info = both[1].step_chunk(actions[:, 20:])
    assert info["alive"].all() and (info["episode_length"] == np.where(dropped, 10, 30)).all()
    assert np.isfinite(obs["state"]).all()
    again = both[1].reset(options={"eval_states": STATES})[0]
    np.testing.assert_array_equal(again["state"], first[0]["state"])
    for envs in both:
        envs.close()
