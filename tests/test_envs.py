"""make_envs and the vector of processes, on a simulator whose every number can be worked out by hand."""

import ctypes
import functools
import json
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from envs import SIMULATORS, find_simulator, make_envs, write_gif
from vector_envs import MAX_BREAKDOWNS

ROOT = Path(__file__).resolve().parents[1]
EVAL = np.array([0, 1, 5, 3, 4, 2])  # fixed states: three of each task
LIMIT = 9
RAISES, DIES, HANGS, NAN_REWARD, NAN_STATE = 0.5, 0.25, 0.75, -0.5, -0.25  # a second action that does it


class Walk:
    """A walker on a line, who has to go two steps to the left or to the right of the start.

    A file "raises" or "dies" in the folder after "walk:" lets one reset break down, "always" every one.
    """

    env_ids = ["walk", "walk:*"]
    prompts = {"left": "go to the left", "right": "go to the right"}
    action_dim = 2
    num_eval_states, train_states = 3, (3, 200)

    def __init__(self, env_id, obs_mode, protocol):
        self.max_episode_steps = {"paper": LIMIT, "openpi": 12}[protocol]
        self.folder = Path(env_id.removeprefix("walk:"))
        if env_id == "walk:never":
            ctypes.PyDLL(None).sleep(1000)

    def reset(self, task, state):
        for name in ("raises", "dies"):
            if (self.folder / name).exists():
                (self.folder / name).unlink()
                die() if name == "dies" else 1 / 0
        if (self.folder / "always").exists():
            raise ValueError("no ground")
        self.start, self.place, self.direction = float(state), float(state), (-1, 1)[task]

    def observe(self):
        state = np.float32([self.place, self.direction])
        return {"images": self.render(4)[None], "state": state}

    def step(self, action):
        if action[1] == RAISES:
            raise ZeroDivisionError("the walker\nfell")
        if action[1] == DIES:
            die()
        if action[1] == HANGS:
            ctypes.PyDLL(None).sleep(1000)  # no other thread of Python runs meanwhile
        if action[1] == NAN_STATE:
            self.direction = np.nan
        if action[1] == NAN_REWARD:
            return np.nan, False
        self.place += float(action[0])
        success = (self.place - self.start) * self.direction >= 2
        return float(success), success

    def render(self, size):
        return np.full((size, size, 3), round(10 * self.place) % 256, np.uint8)

    def expert_action(self):
        return np.float32([self.direction, 0])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def walk():
    """A function that makes vectors of walkers; they are closed afterwards."""
    made = []

    def make(n, **changed):
        made.append(make_envs(**dict(env_id="walk", num_envs=n, seed=0, partial_reset=False) | changed))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIMULATORS, "walk", f"{__name__}:Walk")
        if len(os.sched_getaffinity(0)) == 1:  # there are tests of one process beside another
            patch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        yield make
    for envs in made:
        envs.close()


@pytest.fixture(scope="module")
def six(walk):
    return walk(6)


def wander(n, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, steps, 2)).astype(np.float32)


# --- which simulator ---


NEAREST = [("tabletop_press_buton", "tabletop_press_button"), ("liberty", "libero_90"), ("zzz", "tabletop,"),
           ("metaworld_puhs-v3", "metaworld_push-v3"), ("maniskill_carot", "maniskill_carrot"),
           ("tabletop_", "tabletop_"), ("tabletop_ood_word", "tabletop_ood_new_words"),
           ("libero:goal", "libero_goal")]  # fmt: skip  # pairs


@pytest.mark.parametrize("wrong, nearest", NEAREST)
def test_unknown_id(one_line_error, wrong, nearest):
    message = one_line_error(make_envs, wrong, 4, 0)
    assert repr(wrong) in message and nearest in message


@pytest.mark.parametrize("family", SIMULATORS)
def test_every_id_is_found(family):
    simulator = pkgutil.resolve_name(SIMULATORS[family])
    assert simulator.env_ids and all(find_simulator(env_id) is simulator for env_id in simulator.env_ids)
    assert simulator.trials and all(find_simulator(env_id) is simulator for env_id, _ in simulator.trials)


def test_wrong_numbers(one_line_error):
    assert "num_envs" in one_line_error(make_envs, "tabletop", 0, 0)
    assert "group_size 5" in one_line_error(make_envs, "tabletop", 32, 0, False, 5)
    assert "group_size 0" in one_line_error(make_envs, "tabletop", 32, 0, False, 0)


def python(*arguments, **env):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_tabletop_needs_no_other():
    code = "import sys, envs; envs.make_envs('tabletop', 2, 0).reset()\n"
    code += "print(*sorted({name for name in sys.modules if name.startswith('simulators.')}))"
    assert python("-c", code).stdout == "simulators.tabletop\n"


def test_trial():
    """What --check runs for each simulator."""
    assert python("envs.py", "--try", "tabletop", "rgb").stdout == "works: images (1, 32, 32, 3), state 4\n"
    done = python("envs.py", "--chekc")
    assert done.returncode == 2 and done.stderr == "error: use: python envs.py --check\n"


HIDDEN = """
import sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    "env_id, package, says",
    [
        ("metaworld_push", "metaworld", "MetaWorld is not installed here"),
        ("libero_goal", "libero", "Libero is not installed here"),
        ("maniskill:PickCube-v1", "mani_skill", "ManiSkill is not installed here"),
    ],
)
def test_not_installed(tmp_path, env_id, package, says):
    """A Python that cannot find the package, in its processes too: one line that says what to do."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format([package]))
    code = f"from envs import make_envs; make_envs({env_id!r}, 2, 0, obs_mode='state')"
    done = python("-c", code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {env_id}: {says} (No module named '{package}'): make install\n"


# --- chunks and ends ---


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_chunks_are_steps(six, chunk):
    """Every number of three episodes' chunks, from sums of the actions."""
    envs, actions = six, 1.5 * wander(6, 36, seed=67)  # beyond [-1, 1] too
    obs, _ = envs.reset(options={"eval_states": EVAL})
    start, side = EVAL % 3, np.where(EVAL < 3, -1, 1)
    assert obs["prompt"] == [("go to the left", "go to the right")[task] for task in EVAL // 3]
    np.testing.assert_array_equal(obs["state"], np.float32(np.stack([start, side], axis=1)))
    moved = np.clip(actions[..., 0], -1, 1).astype(np.float64).cumsum(axis=1)  # (N, steps)
    arrived = (moved * side[:, None] >= 2) & (np.arange(36) < LIMIT)
    length = np.where(arrived.any(axis=1), arrived.argmax(axis=1) + 1, LIMIT)
    assert 0 < arrived.any(axis=1).sum() < 6 and len(set(length)) > 2
    for t in range(0, 36, chunk):
        obs, reward, terminated, truncated, info = envs.step_chunk(actions[:, t : t + chunk])
        now = np.minimum(length, t + chunk)
        ended = (length > t) & (length <= t + chunk)
        place = start + moved[np.arange(6), now - 1]
        np.testing.assert_allclose(obs["state"][:, 0], place, rtol=1e-6)
        assert (obs["images"][:, 0, 0, 0, 0] == np.round(10 * place) % 256).all()
        for n in range(6):
            expected = [length[n] == t + c + 1 and arrived[n].any() for c in range(chunk)]
            assert reward[n].tolist() == expected
        assert (terminated == ended & arrived.any(axis=1)).all()
        assert (truncated == ended & ~arrived.any(axis=1)).all()
        assert (info["episode_length"] == now).all() and (info["alive"] == (length > t)).all()
        assert (info["steps"] == np.clip(length - t, 0, chunk)).all()
        assert (info["success"] == (arrived.any(axis=1) & (length <= t + chunk))).all()
        assert (info["episode_return"] == info["success"]).all() and (info["task"] == EVAL // 3).all()
        assert (info["final_obs"] is None) == (not ended.any())
        if ended.any():
            np.testing.assert_array_equal(info["final_obs"]["state"], obs["state"][ended])
            assert info["final_obs"]["prompt"] == [obs["prompt"][n] for n in np.flatnonzero(ended)]


def test_success_at_the_limit(six):
    """At the last step success is an end and no truncation; a step later is too late."""
    six.reset(options={"eval_states": [3] * 6})
    actions = np.zeros((6, LIMIT + 1, 2))
    actions[:3, LIMIT - 2 : LIMIT, 0] = actions[3:, LIMIT - 1 :, 0] = 1
    _, _, terminated, truncated, info = six.step_chunk(actions)
    assert terminated.tolist() == [True] * 3 + [False] * 3 and truncated.tolist() == [False] * 3 + [True] * 3
    assert (info["episode_length"] == LIMIT).all()


def test_a_lower_limit(walk, one_line_error):
    """Success at its last step is an end, a step later it is too late; the limit is not a chunk's end."""
    envs = walk(6, max_episode_steps=4)
    envs.reset(options={"eval_states": [3] * 6})
    actions = np.zeros((6, 6, 2))
    actions[:3, 2:4, 0] = actions[3:, 3:5, 0] = 1
    _, _, terminated, truncated, info = envs.step_chunk(actions)
    assert terminated.tolist() == [True] * 3 + [False] * 3 and truncated.tolist() == [False] * 3 + [True] * 3
    assert (info["episode_length"] == 4).all() and envs.max_episode_steps == 4
    assert walk(2, max_episode_steps=LIMIT).max_episode_steps == LIMIT
    beyond = functools.partial(walk, max_episode_steps=LIMIT + 1)
    assert "--max-episode-steps 10: walk ends after 9" in one_line_error(beyond, 2)


def test_protocol(walk, six):
    assert walk(2, protocol="openpi").max_episode_steps == 12 and six.max_episode_steps == LIMIT


def test_partial_reset(walk):
    """An ended walker starts anew at once, from a training state; the others walk on."""
    envs = walk(6, partial_reset=True)
    envs.reset(options={"eval_states": EVAL})
    speed = np.float32([1, 1, 1, 0.1, 0.1, 0.1])[:, None]
    obs, _, terminated, _, info = envs.step_chunk((envs.expert_action() * speed)[:, None].repeat(3, axis=1))
    assert terminated.tolist() == [True] * 3 + [False] * 3 and (info["episode_length"][:3] == 2).all()
    side = np.where(EVAL < 3, -1, 1)
    np.testing.assert_array_equal(info["final_obs"]["state"][:, 0], (EVAL % 3 + 2 * side)[:3])
    assert ((envs.state[:3] >= 3) & (envs.state[:3] < 200)).all() and (envs.length[:3] == 0).all()
    np.testing.assert_array_equal(obs["state"][:3, 0], envs.state[:3])
    np.testing.assert_array_equal(obs["state"][:3, 1], np.where(envs.task == 0, -1, 1)[:3])
    np.testing.assert_allclose(obs["state"][3:, 0], (EVAL % 3 + 0.3 * side)[3:], rtol=1e-6)
    after = envs.step_chunk(np.zeros((6, 2, 2)))[4]
    assert (after["episode_length"] == [2, 2, 2, 5, 5, 5]).all() and after["alive"].all()
    assert not after["success"].any() and not after["episode_return"].any()


# --- initial states ---


def test_groups(walk):
    envs = walk(6, group_size=3)
    first, second = (envs.reset()[0]["state"].reshape(2, 3, 2) for _ in range(2))
    assert (first == first[:, :1]).all() and (second == second[:, :1]).all()
    assert len(np.unique(np.concatenate([first, second])[:, 0], axis=0)) == 4


def test_seeds(walk, six):
    states = walk(6, seed=1).reset()[0]["state"]
    assert (states[:, 0] >= 3).all() and len(np.unique(states, axis=0)) == 6
    np.testing.assert_array_equal(states, six.reset(seed=1)[0]["state"])  # also after other episodes
    later = six.reset()[0]["state"]
    assert not np.array_equal(states, later) and not np.array_equal(states, six.reset(seed=0)[0]["state"])
    np.testing.assert_array_equal(states, six.reset(seed=1)[0]["state"])
    six.reset(options={"eval_states": EVAL})  # draws nothing
    np.testing.assert_array_equal(later, six.reset()[0]["state"])


def test_evaluation_states(walk, six):
    assert six.num_eval_states == 6 and six.tasks == ["left", "right"] and six.num_eval_envs == 6
    assert walk(8).num_eval_envs == 6 and walk(4).num_eval_envs == 4
    for order in (np.arange(6), EVAL[::-1]):
        state = six.reset(options={"eval_states": order})[0]["state"]
        assert state.tolist() == [[s % 3, (-1, 1)[s // 3]] for s in order]


@pytest.mark.parametrize("wrong", [[1, 2, 3], [-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 6]])
def test_wrong_evaluation_states(six, wrong):
    with pytest.raises(ValueError, match="expected 6 indices from 0 to 5"):
        six.reset(options={"eval_states": wrong})


def test_film(six):
    six.reset(options={"eval_states": [0, 1, 2, 3, 4, 5]})
    six.record = 4  # of both processes
    actions = np.float32([[-0.5, 0], [1, 0], [1, 0]] * 6).reshape(6, 3, 2)
    frames = six.step_chunk(actions)[4]["frames"]
    assert len(frames) == 3 and frames[0].shape == (4, 256, 256, 3) and frames[0].dtype == np.uint8
    shown = [frame[:, 0, 0, 0].tolist() for frame in frames]
    assert shown == [[251, 5, 15, 251], [5, 15, 25, 5], [15, 25, 35, 15]]  # ten times the place, modulo 256
    six.record = 0
    assert "frames" not in six.step_chunk(actions)[4]


# --- processes ---


def test_close_leaves_no_process(walk):
    before = set(multiprocessing.active_children())
    envs = walk(4)
    envs.reset()
    assert len(set(multiprocessing.active_children()) - before) == min(4, len(os.sched_getaffinity(0)))
    envs.close()
    assert set(multiprocessing.active_children()) == before
    obs, _ = envs.reset(options={"eval_states": EVAL[:4]})  # and begins again
    assert obs["state"].shape == (4, 2)
    envs.close()
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        envs.step_chunk(wander(4, 1))


# --- breakdowns ---


def still(n, row=None, does=0, step=0, steps=5):
    """A chunk in which all go on by a tenth, and `row` does something else at a step."""
    actions = np.full((n, steps, 2), (0.1, 0), np.float32)
    if row is not None:
        actions[row, step, 1] = does
    return actions


def pids(envs):
    return [process.pid for process, _ in envs.processes]


def last_line(function, *args, capsys):
    """Calls what has to end with exit code 1, and returns the last line of stderr."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


TOLD = {
    RAISES: ("step 7: ZeroDivisionError: the walker fell", False),
    NAN_REWARD: ("step 8: FloatingPointError: its reward is NaN or infinite", False),
    NAN_STATE: ("step 10: FloatingPointError: its state is NaN or infinite", False),
    DIES: ("step 7: its process ended with exit code -9", True),
    HANGS: ("step 7: its process hangs, nothing has moved for 2 s", True),
}


@pytest.fixture(scope="module")
def faulty(walk):
    """With and without partial resets: six walkers in two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: [0, 1])
        return [walk(6, partial_reset=on, patience=2, protocol="openpi") for on in (False, True)]


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("does", TOLD)
def test_breakdown(faulty, capsys, does, partial):
    """Row 4 of six breaks down in its second chunk, or the process of rows 3 to 5 with it."""
    says, whole_process = TOLD[does]
    lost = np.arange(6) == 4
    envs = faulty[partial]
    lost |= whole_process & (np.arange(6) // 3 == 1)
    envs.reset(options={"eval_states": EVAL})
    before = envs.step_chunk(still(6))[0]
    processes, state = pids(envs), envs.state.copy()
    obs, reward, terminated, truncated, info = envs.step_chunk(still(6, row=4, does=does, step=2))
    fate = f"episodes that count as failures: {lost.sum()}"
    told = f"walk broke down, task {EVAL[4] // 3}, initial state {EVAL[4] % 3}, {says}"
    assert capsys.readouterr().err == f"{told}; built anew, 1 of at most 5 times in a row; {fate}\n"
    assert (np.array(pids(envs)) != processes).tolist() == [False, whole_process]
    assert (info["dropped"] == lost).all() and (truncated == lost).all() and not terminated.any()
    assert (info["alive"] == ~lost).all() and (info["steps"] == np.where(lost, 0, 5)).all()
    assert (info["episode_length"] == np.where(lost, 5, 10)).all() and not reward.any()
    np.testing.assert_array_equal(info["final_obs"]["state"], before["state"][lost])  # the last good one
    np.testing.assert_array_equal(info["final_obs"]["images"], before["images"][lost])
    assert info["final_obs"]["prompt"] == [before["prompt"][n] for n in np.flatnonzero(lost)]
    np.testing.assert_allclose(obs["state"][~lost, 0], EVAL[~lost] % 3 + 1, rtol=1e-5)
    assert (envs.state[~lost] == state[~lost]).all()
    if partial:
        assert (envs.state[lost] >= 3).all() and (obs["state"][lost, 0] == envs.state[lost]).all()
    _, _, terminated, truncated, info = envs.step_chunk(still(6, steps=1))
    assert (info["alive"] == (~lost | partial)).all() and not info["dropped"].any()
    assert not terminated.any() and not truncated.any() and info["final_obs"] is None
    assert (info["steps"] == info["alive"]).all()
    assert (info["episode_length"] == np.where(lost, 1 if partial else 5, 11)).all()
    if (
        not partial and does != HANGS
    ):  # an episode that had ended before, and was not dropped, stays as it was
        info = envs.step_chunk(still(6, row=0, does=does, steps=1))[4]
        assert info["dropped"].tolist() == [True, *[whole_process] * 2, *[False] * 3]
        obs, _ = envs.reset(options={"eval_states": EVAL})
        assert envs.step_chunk(still(6))[4]["alive"].all()
    assert "Traceback" not in capsys.readouterr().err


def test_a_simulator_that_hangs_while_it_is_built(walk, capsys):
    with pytest.raises(SystemExit) as stop:
        walk(2, env_id="walk:never", patience=0.5)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: walk:never: hangs while it is built, nothing came for 1 s\n"


def test_dropped_in_training(walk, capsys):
    envs = walk(2, partial_reset=True)
    envs.reset()
    envs.step_chunk(still(2, row=1, does=RAISES))
    assert capsys.readouterr().err.endswith("in a row; episodes dropped: 1\n")


def test_the_line_is_above_the_progress_bar(walk, capsys, monkeypatch):
    """It says which rank it is of, and the bar is drawn anew below it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    envs = walk(2, partial_reset=True)
    envs.reset()
    with tqdm(total=9, desc="training", file=sys.stderr, mininterval=0) as bar:
        bar.update(4)
        envs.step_chunk(still(2, row=1, does=RAISES))
    lines = capsys.readouterr().err.split("\n")
    (told,) = [line for line in lines if "walk broke down" in line]
    assert told.split("\r")[-1].startswith("rank 1: walk broke down, task ")
    assert told.split("\r")[-2].strip() == "" and "training" in told  # the bar was wiped off
    assert "training:  44%" in lines[lines.index(told) + 1]


def test_a_reward_of_a_dropped_chunk_is_not_paid(walk):
    """Success, and then the observation is not a number."""
    envs = walk(2)
    envs.reset(options={"eval_states": [4, 4]})
    actions = np.float32([[[1, 0], [1, 0]], [[1, 0], [1, NAN_STATE]]])
    _, reward, terminated, truncated, info = envs.step_chunk(actions)
    assert reward.tolist() == [[0, 1], [0, 0]] and terminated.tolist() == [True, False]
    assert info["success"].tolist() == [True, False] == info["episode_return"].tolist()
    assert info["dropped"].tolist() == truncated.tolist() == [False, True]


@pytest.mark.parametrize("does", ["raises", "dies"])
def test_a_reset_that_breaks_down_is_repeated(walk, capsys, tmp_path, does):
    """From the same state. A process that dies in a partial reset takes others along, after a good chunk."""
    envs = walk(6, partial_reset=True, env_id=f"walk:{tmp_path}", protocol="openpi")
    (tmp_path / does).touch()
    obs, _ = envs.reset(options={"eval_states": EVAL})
    assert obs["state"].tolist() == [[s % 3, (-1, 1)[s // 3]] for s in EVAL]
    assert "; built anew, 1 of at most 5 times in a row; episodes that count as failures: 0\n" in (
        capsys.readouterr().err
    )
    (tmp_path / does).touch()
    actions = still(6)
    actions[0, :, 0] = 1 if EVAL[0] >= 3 else -1
    obs, reward, terminated, truncated, info = envs.step_chunk(actions)
    assert "built anew, 1 of at most 5 times" in capsys.readouterr().err
    others = (np.arange(6) // 3 == 0) & (np.arange(6) > 0) & (does == "dies")
    assert terminated.tolist() == [True, *[False] * 5] and (truncated == others).all()
    assert (
        info["alive"].all() and (info["steps"] == [2, *[5] * 5]).all() and (info["dropped"] == others).all()
    )
    ended = terminated | others
    np.testing.assert_allclose(info["final_obs"]["state"][1:, 0], EVAL[others] % 3 + 0.5)
    assert (obs["state"][ended, 0] == envs.state[ended]).all() and (envs.state[ended] >= 3).all()
    assert (envs.length == np.where(ended, 0, 5)).all()


def test_the_end_after_some(walk, capsys):
    """A chunk that works forgives. The sixth in a row saves, names the state and ends with exit code 1."""
    before, envs, saved = set(multiprocessing.active_children()), walk(2, partial_reset=True), []
    envs.reset()
    envs.on_failure = lambda: saved.append(True)
    for n in range(2 * MAX_BREAKDOWNS):
        envs.step_chunk(still(2, row=n % 2, does=RAISES))
        if n == MAX_BREAKDOWNS - 1:
            envs.step_chunk(still(2))
    assert len(capsys.readouterr().err.splitlines()) == 2 * MAX_BREAKDOWNS and not saved
    where = f"walk broke down, task {envs.task[1]}, initial state {envs.state[1]}, step 3: ZeroDivisionError"
    line = last_line(envs.step_chunk, still(2, row=1, does=RAISES, step=3), capsys=capsys)
    assert line == f"error: {where}: the walker fell; before, it was built anew 5 times in a row"
    assert saved == [True] and set(multiprocessing.active_children()) <= before


def test_a_reset_that_never_works(walk, capsys, tmp_path):
    envs = walk(2, env_id=f"walk:{tmp_path}")
    (tmp_path / "always").touch()
    line = last_line(envs.reset, capsys=capsys)
    assert "step 0: ValueError: no ground; before" in line and line.startswith(f"error: walk:{tmp_path} ")


def test_a_killed_process(walk, capsys):
    """Between two chunks, from outside."""
    envs = walk(6, partial_reset=True)
    envs.reset()
    os.kill(pids(envs)[0], signal.SIGKILL)
    info = envs.step_chunk(still(6))[4]
    assert info["dropped"].tolist() == [True] * 3 + [False] * 3
    assert "its process ended with exit code -9; built anew" in capsys.readouterr().err
    assert not envs.step_chunk(still(6))[4]["dropped"].any()


def test_a_broken_expert(walk, capsys):
    envs = walk(2)
    envs.reset()
    os.kill(pids(envs)[1], signal.SIGKILL)
    assert envs.expert_action().shape == (2, 2)
    assert envs.step_chunk(still(2))[4]["dropped"].tolist() == [False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_wrong_actions(walk, capsys, value):
    """They end the run without saving such a policy. Of an episode that has ended they are not looked at."""
    envs, actions = walk(2, protocol="openpi"), still(2)
    envs.reset(options={"eval_states": [4, 2]})
    envs.on_failure = lambda: 1 / 0
    actions[0, :, 0] = 1
    envs.step_chunk(actions)
    actions[0, 3, 1] = value
    assert envs.step_chunk(actions[:, :3])[4]["alive"].tolist() == [False, True]
    envs.step_chunk(actions[:, 3:4])
    actions[1, 4, 0] = value
    line = last_line(envs.step_chunk, actions, capsys=capsys)
    assert line == "error: walk, task 0, initial state 2, step 9: the policy's action is NaN or infinite"


def test_set_state(walk, capsys):
    """The draws go on; episodes begin anew, and a line says so."""
    envs, other = walk(4, seed=1, partial_reset=True), walk(4, seed=2, partial_reset=True)
    envs.reset()
    saved = json.loads(json.dumps(envs.get_state()))
    expected = envs.reset()[0]
    obs = other.set_state(saved)
    assert capsys.readouterr().err == "walk: episodes begin anew, its state is not saved\n"
    np.testing.assert_array_equal(obs["state"], expected["state"])
    ends = [e.step_chunk(wander(4, 30))[0]["state"] for e in (envs, other)]
    np.testing.assert_array_equal(*ends)


RUN = """
import signal
import numpy as np
from envs import SIMULATORS, make_envs
SIMULATORS["walk"] = "test_envs:Walk"
if __name__ == "__main__":
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    envs = make_envs("walk", 2, 0)
    envs.reset()
    print("ready", flush=True)
    actions = np.zeros((2, 5, 2), np.float32)
    actions[:, 1:2, 1] = {does}
    while not asked:
        envs.step_chunk(actions)
    print("dropped", envs.step_chunk(actions)[4]["dropped"].sum(), flush=True)
    while True:
        envs.step_chunk(actions)
"""


@pytest.fixture
def another_run(tmp_path):
    """A function that starts a run of its own, in a session of its own; nothing of it is left afterwards."""
    started = []

    def begin(does):
        (tmp_path / "run.py").write_text(RUN.format(does=does))
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        command = [sys.executable, str(tmp_path / "run.py")]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes))
        assert started[0].stdout.readline() == "ready\n"
        time.sleep(0.5)
        return started[0]

    yield begin
    for pid in family(started[0].pid):
        os.kill(pid, signal.SIGKILL)
    started[0].communicate()


def family(session):
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.name))
    return found


proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@proc
@pytest.mark.parametrize("does", [0, HANGS])
def test_nothing_outlives_the_run(another_run, does):
    """Its SIGKILL ends simulators, also those that hang in a step, and the servers that made them."""
    run = another_run(does)
    assert len(family(run.pid)) >= 2 + min(2, len(os.sched_getaffinity(0)))
    run.kill()
    run.wait()
    until = time.monotonic() + 10
    while family(run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not family(run.pid)


@proc
def test_interrupt(another_run):
    """What a terminal sends to the whole group on Ctrl-C is answered by the run alone."""
    run = another_run(0)
    os.killpg(run.pid, signal.SIGINT)
    assert run.stdout.readline() == "dropped 0\n"
    run.kill()
    assert not run.communicate()[1]


@pytest.mark.parametrize("shape", [(6, 2), (3, 5, 2), (6, 5, 3)])
def test_wrong_shape(six, shape):
    six.reset()
    with pytest.raises(ValueError, match=r"expected shape \(6, chunk_len, 2\), got"):
        six.step_chunk(np.zeros(shape))


def test_gif(tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    write_gif(tmp_path / "plain.gif", frames)
    write_gif(tmp_path / "text.gif", frames, ["one"])
    plain, text = Image.open(tmp_path / "plain.gif"), Image.open(tmp_path / "text.gif")
    assert plain.n_frames == text.n_frames == 3 and plain.size == (64, 64) and plain.info["duration"] == 100
    strip = np.array(text.convert("L"))[64:]
    assert text.size[1] > 64 and strip.min() < 100 and strip.max() > 200  # dark letters on white
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.gif", "text.gif"]


def test_captions_stand_under_their_pictures(tmp_path):
    """In turn, and a long one in several lines; one alone has the whole width."""
    from PIL import Image

    def letters(*captions):
        """(columns,) where there is something dark below the pictures, and how high that is."""
        write_gif(tmp_path / "x.gif", np.full((1, 64, 256, 3), 255, np.uint8), captions)
        dark = np.array(Image.open(tmp_path / "x.gif").convert("L"))[64:] < 100
        return dark.reshape(len(dark), 4, 64).any(axis=(0, 2)).tolist(), len(dark)

    assert letters("one", "", "") == ([True, False, False, True], 23)
    assert letters("one", "", "long as it is") == ([True, False, True, True], 40)
    assert letters("one", *[""] * 7, "far") == ([True, False, False, False], 23)
    assert letters("one two three four five") == ([True, True, True, False], 23)
