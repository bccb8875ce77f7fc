"""The tabletop: chunks and ends, the scripted expert, and pictures that show what is there."""

import copy
import json
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from envs import make_envs
from simulators import tabletop
from simulators.tabletop import BLUE, BUTTON, HANDLE, PLATE, TASKS

ALL = np.arange(500)  # fixed evaluation states, 50 per task
SOME = ALL[::5]


def play(chosen, delay=0):
    """The expert from fixed states, step by step: actions (N, 40, 3) and a list of what every step gave.

    `delay` (N, 1) or 0: how many steps an environment waits before the expert begins.
    """
    envs = make_envs("tabletop", len(chosen), 0, partial_reset=False)
    envs.reset(options={"eval_states": chosen})
    actions, results = [], []
    for t in range(40):
        actions.append(np.where(t >= delay, envs.expert_action(), 0))
        results.append(envs.step(actions[-1]))
    return np.stack(actions, axis=1), results


@pytest.fixture(scope="module")
def expert():
    return play(SOME)


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in ("images", "state", "prompt"))


class Single(gym.Env):
    """The first of one tabletop, for gymnasium's checker."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(self):
        self.envs = make_envs("tabletop", 1, 0, partial_reset=False)
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        obs, info = self.envs.reset(seed=seed, options=options)
        return {k: v[0] for k, v in obs.items()}, info

    def step(self, action):
        obs, *result, _ = self.envs.step(action[None])
        reward, terminated, truncated = (value[0].item() for value in result)
        return {k: v[0] for k, v in obs.items()}, reward, terminated, truncated, {}

    def render(self):
        return self.envs.render()[0]


def test_gymnasium_checker():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(Single())
    complaints = [str(w.message) for w in caught if "spec" not in str(w.message)]  # it is not registered
    assert not complaints


def test_spaces():
    envs = make_envs("tabletop", 20, 0)
    obs, _ = envs.reset()
    assert obs in envs.observation_space
    for prompt in envs.prompts:
        assert len(prompt.encode("ascii")) <= 33 and prompt in envs.single_observation_space["prompt"]
    assert envs.action_space.shape == (20, 3)
    assert envs.step_chunk(np.zeros((20, 2, 3)))[0] in envs.observation_space
    assert obs["prompt"] == [envs.prompts[task] for task in envs.task]


def test_seeding():
    def rollout(envs, obs):
        seen = [obs]
        for _ in range(15):
            seen.append(envs.step_chunk(envs.expert_action()[:, None].repeat(5, axis=1))[0])
        return seen

    first, second, other = (make_envs("tabletop", 16, seed) for seed in (1, 1, 2))
    a, b, c = (rollout(envs, envs.reset()[0]) for envs in (first, second, other))
    assert all(map(same, a, b))  # also through the resets on the way
    onwards = rollout(first, first.reset()[0])
    for k in a[0]:
        assert not np.array_equal(a[0][k], c[0][k]) and not np.array_equal(a[0][k], onwards[0][k])
    again = rollout(first, first.reset(seed=1)[0])
    assert all(map(same, a, again)) and all(map(same, onwards, rollout(first, first.reset()[0])))


def test_tasks_are_drawn_evenly():
    envs = make_envs("tabletop", 4000, 0)
    envs.reset()
    assert np.bincount(envs.task, minlength=10).min() > 320  # 400 +- 4 standard deviations
    gaps = np.linalg.norm(envs.objects[:, :, None] - envs.objects[:, None], axis=-1)
    assert gaps[:, ~np.eye(6, dtype=bool)].min() >= 0.3 and np.abs(envs.objects).max() < 0.85


def test_expert():
    success, length = (play(ALL)[1][-1][4][key].reshape(10, 50) for key in ("success", "episode_length"))
    assert (success.mean(axis=1) > 0.95).all()
    mean = length.mean(axis=1)
    assert (mean[:8] > 11).all() and (mean[:8] < 16).all() and (mean[8:] > 5).all() and (mean[8:] < 11).all()
    assert mean[6:8].mean() < mean[:6].mean() * 1.15  # stacking is hardly longer than placing


def test_aim_error():
    """The expert takes hold and lets go beside the things, where its error sends it."""
    envs = make_envs("tabletop", 80, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME[:80]})
    error = np.random.default_rng(0).uniform(-0.1, 0.1, (80, 4))
    aim, went = envs.targets() + error, np.zeros((80, 4))
    for _ in range(30):
        held = envs.held >= 0
        envs.step(envs.expert_action(error))
        taken, left = ~held & (envs.held >= 0), held & (envs.held < 0)
        went[taken, :2], went[left, 2:] = envs.gripper[taken], envs.gripper[left]
    assert envs.success.all() and np.allclose(went, aim, atol=1e-5)


def test_other_tasks_do_not_count():
    envs = make_envs("tabletop", 100, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME})
    other = copy.deepcopy(envs)
    other.task = (other.task + 1) % 10
    for _ in range(40):
        actions = other.expert_action()
        info, done = envs.step(actions)[4], other.step(actions)[4]["success"]
    assert done.all() and not info["success"].any()


def test_moving_the_destination_is_no_success():
    """Green put on red is not red put on green."""
    envs = make_envs("tabletop_stack_red_green", 50, 0, partial_reset=False)
    envs.reset(options={"eval_states": np.arange(50)})
    other = copy.deepcopy(envs)
    other.goals = envs.goals[:, ::-1]
    for _ in range(40):
        actions = other.expert_action()
        info, done = envs.step(actions)[4], other.step(actions)[4]["success"]
    assert done.all() and not info["success"].any()


def test_released_elsewhere_is_no_success():
    envs = make_envs("tabletop", 80, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME[:80]})
    dropped = np.zeros(80, bool)
    for _ in range(30):
        held = envs.held >= 0
        envs.step(np.where(held[:, None], (0, 0, -1), envs.expert_action()))
        dropped |= held & (envs.held < 0)
    assert dropped.all() and not envs.success.any()


def test_held_over_the_destination_is_no_success():
    envs = make_envs("tabletop", 80, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME[:80]})
    for _ in range(30):
        actions = envs.expert_action()
        actions[:, 2] = np.where(envs.held >= 0, 1, actions[:, 2])
        envs.step(actions)
    assert np.abs(envs.targets()[:, 2:] - envs.gripper).max() < 0.05 and not envs.success.any()
    assert envs.step(np.full((80, 3), (0, 0, -1)))[2].all()


def test_evaluation_states_are_fixed():
    obs, _ = make_envs("tabletop", 500, 0).reset(options={"eval_states": ALL})
    assert len(np.unique(obs["state"], axis=0)) == 500
    assert obs["prompt"] == [TASKS[task][0] for task in TASKS for _ in range(50)]
    few = make_envs("tabletop", 7, 3)
    few.reset()
    for chosen in (np.array([499, 0, 250, 7, 7, 100, 3]), ALL[60:67]):
        got = few.reset(options={"eval_states": chosen})[0]
        assert same(got, {k: np.array(v)[chosen] for k, v in obs.items()})
    alone = make_envs("tabletop_open_drawer", 50, 5)
    got = alone.reset(options={"eval_states": np.arange(50)})[0]
    assert same(got, {k: v[400:450] for k, v in obs.items()}) and alone.num_eval_states == 50
    with pytest.raises(ValueError, match="from 0 to 49"):
        alone.reset(options={"eval_states": np.arange(50) + 1})


def test_evaluation_leaves_the_generator_alone():
    a, b = make_envs("tabletop", 8, 1), make_envs("tabletop", 8, 1)
    a.reset(options={"eval_states": np.arange(8)})
    assert same(a.reset()[0], b.reset()[0])


@pytest.mark.parametrize("partial_reset", [True, False])
def test_set_state(partial_reset):
    """In the middle of an episode, into another tabletop: all goes on to the last bit."""
    envs, other = (make_envs("tabletop", 40, seed, partial_reset) for seed in (0, 1))
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, (40, 40, 1, 3))
    envs.reset(options={"eval_states": SOME[:40]})
    ends = [envs.step_chunk(envs.expert_action()[:, None] + n)[2] for n in noise[:20]]
    assert 5 < np.sum(ends) < 35  # these wait for a reset, or are in a random scene
    saved, expected = envs.get_state(), []
    assert json.loads(json.dumps(saved["rng"])) == saved["rng"]
    saved = {name: x if name == "rng" else x.copy() for name, x in saved.items()}
    now = envs._observe()
    for n in noise:
        expected.append(envs.step_chunk(envs.expert_action()[:, None] + n))
    assert same(other.set_state(saved), now)
    for n, (obs, *told, info) in zip(noise, expected):
        obs_, *told_, info_ = other.step_chunk(other.expert_action()[:, None] + n)
        assert same(obs, obs_) and all(map(np.array_equal, told, told_))
        assert (info["final_obs"] is None) == (info_["final_obs"] is None)
        if info["final_obs"]:
            assert same(info["final_obs"], info_["final_obs"])
        assert all(np.array_equal(info[key], info_[key]) for key in info if key != "final_obs")
    assert same(envs.reset()[0], other.reset()[0])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_wrong_actions(capsys, wrong):
    envs, actions = make_envs("tabletop", 3, 0, partial_reset=False), np.zeros((3, 5, 3))
    actions[1, 4, 2] = wrong
    for options, state in ({"eval_states": [7, 77, 7]}, "initial state 27"), (None, "a random initial state"):
        envs.reset(options=options)
        envs.step_chunk(np.zeros((3, 2, 3)))
        with pytest.raises(SystemExit) as stop:
            envs.step_chunk(actions)
        told = f"tabletop, task {envs.task[1]}, {state}, step 2: the policy's action is NaN or infinite"
        assert stop.value.code == 1 and capsys.readouterr().err == f"error: {told}\n"
    envs.step_chunk(np.zeros((3, 38, 3)))
    assert not envs.step_chunk(actions)[4]["alive"].any()  # of an ended episode they are not looked at


def test_groups(capsys):
    envs = make_envs("tabletop", 32, 0, partial_reset=False, group_size=4)
    obs, _ = envs.reset()
    for k in obs:
        groups = np.array(obs[k]).reshape(8, 4, -1)
        assert (groups == groups[:, :1]).all()
    assert len(np.unique(obs["state"], axis=0)) == 8 and len(np.unique(envs.task)) > 2
    with pytest.raises(SystemExit) as stop:
        make_envs("tabletop", 32, 0, partial_reset=False, group_size=5)
    assert stop.value.code == 2 and "group_size 5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="group_sise"):
        envs.reset(options={"group_sise": 4})


@pytest.mark.parametrize("chunk", [5, 7])
def test_chunks_are_steps(expert, chunk):
    """Chunks against the same actions one by one; an episode that ends mid-chunk executes nothing more."""
    actions, results = expert
    wild = actions + np.random.default_rng(0).normal(0, 0.3, actions.shape)  # some succeed late or never
    single, envs = (make_envs("tabletop", 100, 0, partial_reset=False) for _ in range(2))
    for moves, together in ((actions, results), (wild, None)):
        single.reset(options={"eval_states": SOME})
        together = together or [single.step(moves[:, t]) for t in range(40)]
        envs.reset(options={"eval_states": SOME})
        midway, total = 0, 0
        for t in range(0, 40, chunk):
            rest = np.ones((100, max(0, t + chunk - 40), 3))  # beyond the step limit
            part = np.concatenate([moves[:, t : t + chunk], rest], axis=1)
            obs, reward, terminated, truncated, info = envs.step_chunk(part)
            steps = together[t : t + chunk]
            assert same(obs, steps[-1][0])
            assert np.array_equal(reward[:, : len(steps)], np.stack([s[1] for s in steps], axis=1))
            assert np.array_equal(terminated, np.any([s[2] for s in steps], axis=0))
            assert np.array_equal(truncated, np.any([s[3] for s in steps], axis=0))
            assert np.array_equal(info["steps"], np.sum([s[4]["steps"] for s in steps], axis=0))
            assert np.array_equal(info["alive"], steps[0][4]["alive"])
            for key in ("success", "episode_length", "episode_return", "task"):
                assert np.array_equal(info[key], steps[-1][4][key])
            midway += (terminated & (info["steps"] < chunk)).sum()
            total = total + reward.sum(axis=1)
        assert midway > 10 and not envs.alive.any()
        assert np.array_equal(total, info["success"]) and np.array_equal(total, info["episode_return"])


@pytest.mark.parametrize("chunk, limit", [(1, 40), (5, 40), (7, 40), (5, 12)])
def test_step_limit(chunk, limit):
    lower = {"max_episode_steps": limit} if limit < 40 else {}
    envs = make_envs("tabletop", 4, 0, partial_reset=False, **lower)
    envs.reset()
    for t in range(0, limit, chunk):
        _, reward, terminated, truncated, info = envs.step_chunk(np.zeros((4, chunk, 3)))
        assert truncated.all() == truncated.any() == (t + chunk >= limit)
    assert not terminated.any() and not reward.any() and (info["episode_length"] == limit).all()
    assert (info["steps"] == limit - t).all()


def test_success_at_the_last_step(expert):
    length = expert[1][-1][4]["episode_length"][:, None]
    for late in (0, 1):
        *_, terminated, truncated, info = play(SOME, 40 - length + late)[1][-1]
        # one step late is too late, and at step 40 success is an end and no truncation
        assert (terminated == (late == 0)).all() and (truncated == (late == 1)).all()
        assert (info["episode_length"] == 40).all() and np.array_equal(info["success"], terminated)


def test_new_episode_and_final_obs(expert):
    """Environments that start anew at once against twins that stay ended."""
    moves = expert[0]
    envs, twin = make_envs("tabletop", 100, 3), make_envs("tabletop", 100, 3, partial_reset=False)
    first = envs.reset(options={"eval_states": SOME})[0]
    assert same(first, twin.reset(options={"eval_states": SOME})[0])
    envs.record = twin.record = 4
    ended = np.zeros(100, bool)
    for t in range(0, 16, 4):
        obs, _, terminated, _, info = envs.step_chunk(moves[:, t : t + 4])
        kept, _, kept_terminated, _, kept_info = twin.step_chunk(moves[:, t : t + 4])
        now = np.flatnonzero(terminated)  # by 16 steps nobody succeeded twice
        assert np.array_equal(terminated, kept_terminated) and not ended[now].any()
        for k in obs:
            last, new = np.array(kept[k])[now], np.array(obs[k])[now]
            if len(now):
                assert np.array_equal(info["final_obs"][k], last)
                assert (new.reshape(len(now), -1) != last.reshape(len(now), -1)).any()
            going = ~ended & ~terminated
            assert np.array_equal(np.array(obs[k])[going], np.array(kept[k])[going])
        assert (len(now) == 0) == (info["final_obs"] is None)
        assert (obs["state"][now, 2:] == -1).all()  # a new episode: open, holding nothing
        assert (envs.length[now] == 0).all() and envs.alive.all() and info["alive"].all()
        for key in ("episode_length", "task", "success", "steps"):
            assert np.array_equal(info[key][~ended], kept_info[key][~ended])
        shown = np.flatnonzero(~ended[:4])
        assert all(np.array_equal(a[shown], b[shown]) for a, b in zip(info["frames"], kept_info["frames"]))
        ended[now] = True
        assert same(obs, envs._observe())
    assert ended[:4].any() and 50 < ended.sum() < 100 and (envs.task != twin.task)[ended].any()


def test_ended_episodes_stay_ended(expert):
    actions, _ = expert
    envs = make_envs("tabletop", 100, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME})
    obs, _, terminated, _, before = envs.step_chunk(actions)
    assert terminated.all()
    envs.record = 2
    noise = np.random.default_rng(0).uniform(-1, 1, (100, 5, 3))
    after, reward, terminated, truncated, info = envs.step_chunk(noise)
    assert same(obs, after) and not (reward.any() or terminated.any() or truncated.any())
    assert not info["alive"].any() and not info["steps"].any() and info["final_obs"] is None
    assert np.array_equal(info["episode_length"], before["episode_length"]) and info["success"].all()
    assert len(info["frames"]) == 5 and info["frames"][0].shape == (2, 256, 256, 3)
    assert np.array_equal(info["frames"][0], envs.render()[:2])
    envs.reset()
    assert envs.step_chunk(noise)[4]["alive"].all()


def test_speed():
    envs = make_envs("tabletop", 256, 0)
    envs.reset()
    noise = np.random.default_rng(0).uniform(-1, 1, (256, 5, 3))
    start, steps = time.perf_counter(), 0
    for _ in range(10):
        steps += envs.step_chunk(noise)[4]["steps"].sum()
    assert steps / (time.perf_counter() - start) > 2000  # about 60,000 on one quiet core


@pytest.mark.parametrize("shape", [(3, 5, 3), (4, 5, 2), (4, 3)])
def test_wrong_shape(shape):
    envs = make_envs("tabletop", 4, 0)
    envs.reset()
    with pytest.raises(ValueError) as error:
        envs.step_chunk(np.zeros(shape))
    assert "(4, chunk_len, 3)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("thing, radius", [(0, 0.16), (HANDLE, 0.18), (BUTTON, 0.18)])
def test_reach(thing, radius):
    """Within its radius a thing is taken (or pressed), and not when the fingers are half closed."""
    envs = make_envs("tabletop_blue_bowl", 2, 0, partial_reset=False)
    envs.reset()
    envs.objects[:] = np.linspace(-0.8, 0.8, 6)[:, None] * (1, 0)  # in a row, away from the drawer
    envs.gripper = envs.places()[:, thing] + [(0, radius - 0.01), (0, radius + 0.01)]
    envs.step(np.full((2, 3), (0, 0, 1)))
    assert not envs.pressed.any() and (envs.held == -1).all()
    envs.step(np.full((2, 3), (0, 0, 1)))
    assert list(envs.pressed if thing == BUTTON else envs.held == thing) == [True, False]


def test_handle_slips():
    envs = make_envs("tabletop_red_plate", 1, 0, partial_reset=False)
    envs.reset()
    envs.gripper = envs.places()[:, HANDLE]
    held, pull, aside = [], (0, -2 / 3, 0), (2 / 3, 0, 0)  # by 0.1
    for action in [(0, 0, 1)] * 2 + [pull] * 2 + [aside] * 3 + [pull]:
        envs.step(np.array([action]))
        held.append(envs.held[0] == HANDLE)
    assert held == [False, True, True, True, True, True, False, False] and np.isclose(envs.opening[0], 0.2)


def test_actions_are_clipped():
    envs = make_envs("tabletop", 4, 0)
    before = envs.reset()[0]["state"]
    after = envs.step(np.full((4, 3), 9.0))[0]["state"]
    assert np.allclose(after - before, (0.15, 0.15, 1, 0), atol=1e-6)


def pixel(pictures, places):
    """Colours at the places (N, 2) of the pictures, and the pixels' row and column."""
    size = pictures.shape[1]
    column, row = ((places * (1, -1) / tabletop.VIEW + 1) / 2 * size).astype(int).T
    return pictures[np.arange(len(pictures)), row, column].astype(float), row, column


def test_colours():
    """The pixel in the middle of a thing is nearest to its own colour, also between the fingers."""
    named = [getattr(tabletop, name) for name in ("WHITE", "BOWL_INSIDE", "MAGENTA", "YELLOW", "TABLE")]
    palette = np.array([*tabletop.BLOCKS, *named])  # in the order of the things' numbers
    colours = np.array([*palette, tabletop.ORANGE, tabletop.DARK, tabletop.CYAN])
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1)
    assert apart[~np.eye(len(colours), dtype=bool)].min() > 70
    envs = make_envs("tabletop", 100, 0)
    envs.reset()
    for hand in ("away", "over"):
        for size, count in ((32, 100), (256, 8)):
            for thing in range(7):
                places = envs.places()[:, thing]
                envs.gripper = places.copy() if hand == "over" else np.full((100, 2), -1.0)
                colour, *_ = pixel(envs.render(size, slice(count)), places[:count])
                nearest = np.linalg.norm(colour[:, None] - palette, axis=-1).argmin(axis=1)
                assert (nearest == thing).mean() > 0.97, (hand, size, thing)


@pytest.mark.parametrize("thing", range(6))
def test_moving_a_thing_changes_its_surroundings_only(thing):
    envs = make_envs("tabletop", 64, 0)
    before = envs.reset()[0]["images"][:, 0].astype(int)
    envs.objects[:, thing] += (0.06, 0)
    changed = np.abs(envs.render(32) - before).max(axis=-1) > 0
    _, row, column = pixel(envs.render(32), envs.objects[:, thing])
    grid = np.arange(32)
    far = np.maximum(np.abs(grid[:, None] - row[:, None, None]), np.abs(grid - column[:, None, None])) > 6
    assert changed.any(axis=(1, 2)).all() and not (changed & far).any()


def test_position_can_be_read_from_32_pixels():
    """The centroid of a block's pixels is its position to a fraction of a pixel: anti-aliasing carries it."""
    envs = make_envs("tabletop", 100, 0)
    envs.reset()
    envs.gripper[:] = -1
    places = envs.objects[:, 2].copy()
    blue = envs.render(32).astype(float)
    envs.objects[:, 2] = 9  # out of the picture
    weight = np.abs(blue - envs.render(32)).sum(axis=-1)
    weight *= weight > 120  # without the shadow
    centre = (np.arange(32) + 0.5) * 2 * tabletop.VIEW / 32 - tabletop.VIEW
    total = weight.sum(axis=(1, 2))
    found = np.stack([weight.sum(axis=1) @ centre, -weight.sum(axis=2) @ centre], axis=1) / total[:, None]
    assert np.median(np.abs(found - places)) < 0.01  # a sixth of a pixel


def test_state_is_visible():
    """Fingers, a held block, the drawer and the button look different at 32 pixels."""
    envs = make_envs("tabletop_red_plate", 8, 0)
    envs.reset()
    pictures = [envs.render(32)]
    for name, value in (("fingers", 1), ("held", 0), ("opening", 0.2), ("pressed", True)):
        getattr(envs, name)[:] = value
        pictures.append(envs.render(32))
        assert (np.abs(pictures[-1].astype(int) - pictures[-2]).max(axis=(1, 2, 3)) > 80).all(), name


def test_the_stacked_block_is_on_top(expert):
    obs = expert[1][-1][0]
    envs = make_envs("tabletop", 100, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME})
    envs.step_chunk(expert[0])
    for rows, block in ((slice(60, 70), 0), (slice(70, 80), BLUE)):
        colour, *_ = pixel(obs["images"][rows, 0], envs.objects[rows, block])
        assert (np.linalg.norm(colour[:, None] - tabletop.BLOCKS, axis=-1).argmin(axis=1) == block).all()


def test_targets():
    envs = make_envs("tabletop", 100, 0, partial_reset=False)
    envs.reset(options={"eval_states": SOME})
    targets = envs.targets()
    assert targets.shape == (100, 4) and targets.dtype == np.float32
    assert np.allclose(targets[:10], np.concatenate([envs.objects[:10, 0], envs.objects[:10, PLATE]], axis=1))
    assert np.allclose(targets[90:], np.tile(envs.objects[90:, BUTTON], 2))
    assert np.allclose(targets[80:90, 2:] - targets[80:90, :2], (0, -0.4), atol=1e-6)
    for _ in range(30):  # all take hold and then hold still, a little aside
        envs.step(np.where((envs.held >= 0)[:, None], (0.05, -0.05, 0), envs.expert_action()))
    assert (envs.held[:80] <= BLUE).all() and (envs.held[80:90] == HANDLE).all()
    assert np.allclose(envs.targets()[:80, :2], envs.gripper[:80]) and (envs.opening[80:90] > 0).all()
    assert np.allclose(envs.targets()[80:90, 1], 0.7 - envs.opening[80:90])
    assert np.array_equal(envs.targets()[:, 2:], targets[:, 2:])
