"""make_envs and the vector of processes, on a simulator whose every number can be worked out by hand."""

import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from envs import SIMULATORS, find_simulator, make_envs, write_gif

ROOT = Path(__file__).resolve().parents[1]
EVAL = np.array([0, 1, 5, 3, 4, 2])  # fixed states: three of each task
LIMIT = 9


class Walk:
    """A walker on a line, who has to go two steps to the left or to the right of the start."""

    env_ids = ["walk"]
    prompts = {"left": "go to the left", "right": "go to the right"}
    action_dim = 2
    num_eval_states, train_states = 3, (3, 200)

    def __init__(self, env_id, obs_mode, protocol):
        self.max_episode_steps = {"paper": LIMIT, "openpi": 12}[protocol]

    def reset(self, task, state):
        self.start, self.place, self.direction = float(state), float(state), (-1, 1)[task]

    def observe(self):
        state = np.float32([self.place, self.direction])
        return {"images": self.render(4)[None], "state": state}

    def step(self, action):
        if action[1] == 0.5:
            raise ZeroDivisionError("the walker fell")
        self.place += float(action[0])
        success = (self.place - self.start) * self.direction >= 2
        return float(success), success

    def render(self, size):
        return np.full((size, size, 3), round(10 * self.place) % 256, np.uint8)

    def expert_action(self):
        return np.float32([self.direction, 0])


@pytest.fixture
def walk(monkeypatch):
    """A function that makes vectors of walkers; they are closed afterwards."""
    monkeypatch.setitem(SIMULATORS, "walk", f"{__name__}:Walk")
    made = []

    def make(n=6, **changed):
        made.append(make_envs("walk", n, **dict(seed=0, partial_reset=False) | changed))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def wander(n, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, steps, 2)).astype(np.float32)


# --- which simulator ---


NEAREST = [("tabletop_press_buton", "tabletop_press_button"), ("liberty", "libero_90"), ("zzz", "tabletop,"),
           ("metaworld_puhs-v3", "metaworld_push-v3"), ("maniskill_carot", "maniskill_carrot"),
           ("tabletop_", "tabletop_"), ("libero:goal", "libero_goal")]  # fmt: skip  # pairs


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
def test_chunks_are_steps(walk, chunk):
    """Every number of three episodes' chunks, from sums of the actions."""
    envs, actions = walk(), 1.5 * wander(6, 36, seed=67)  # beyond [-1, 1] too
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


def test_success_at_the_limit(walk):
    """At the last step success is an end and no truncation; a step later is too late."""
    envs = walk(2)
    envs.reset(options={"eval_states": [3, 3]})
    actions = np.zeros((2, LIMIT + 1, 2))
    actions[0, LIMIT - 2 : LIMIT, 0] = actions[1, LIMIT - 1 :, 0] = 1
    _, _, terminated, truncated, info = envs.step_chunk(actions)
    assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]
    assert (info["episode_length"] == LIMIT).all()


def test_protocol(walk):
    assert walk(protocol="openpi").max_episode_steps == 12 and walk().max_episode_steps == LIMIT


def test_partial_reset(walk):
    """An ended walker starts anew at once, from a training state; the others walk on."""
    envs = walk(partial_reset=True)
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


def test_seeds_and_groups(walk):
    grouped, plain, other = walk(12, group_size=3), walk(12), walk(12, seed=1)
    first = grouped.reset()[0]["state"].reshape(4, 3, 2)
    assert (first == first[:, :1]).all() and len(np.unique(first[:, 0], axis=0)) == 4
    states = plain.reset()[0]["state"]
    assert not np.array_equal(states, other.reset()[0]["state"])
    assert (states[:, 0] >= 3).all() and set(states[:, 1]) == {-1, 1}
    later = plain.reset()[0]["state"]
    assert not np.array_equal(states, later)
    np.testing.assert_array_equal(states, plain.reset(seed=0)[0]["state"])  # also after other episodes
    plain.reset(options={"eval_states": np.resize(EVAL, 12)})  # draws nothing
    np.testing.assert_array_equal(later, plain.reset()[0]["state"])


def test_evaluation_states(walk):
    envs = walk(2)
    assert envs.num_eval_states == 6 and envs.tasks == ["left", "right"] and envs.num_eval_envs == 2
    assert walk(8).num_eval_envs == 6
    for states in ([0, 1], [2, 3], [4, 5]):
        state = envs.reset(options={"eval_states": states})[0]["state"]
        assert state.tolist() == [[s % 3, (-1, 1)[s // 3]] for s in states]


def test_film(walk):
    envs = walk(4)
    envs.reset(options={"eval_states": [0, 1, 2, 3]})
    envs.record = 3
    actions = np.float32([[1, 0], [1, 0], [-0.5, 0]] * 4).reshape(4, 3, 2)
    frames = envs.step_chunk(actions)[4]["frames"]
    assert len(frames) == 3 and frames[0].shape == (3, 256, 256, 3) and frames[0].dtype == np.uint8
    assert [frame[:, 0, 0, 0].tolist() for frame in frames] == [[10, 20, 30], [20, 30, 40], [15, 25, 35]]
    envs.record = 0
    assert "frames" not in envs.step_chunk(actions)[4]


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
    with pytest.raises(Exception, match="reset"):
        envs.step_chunk(wander(4, 1))


def test_a_killed_process_is_named(walk, one_line_error):
    before, envs, saved = set(multiprocessing.active_children()), walk(2), []
    envs.reset()
    envs.on_failure = lambda: saved.append(True)
    os.kill(envs.processes.processes[-1].pid, signal.SIGKILL)
    message = one_line_error(envs.step_chunk, wander(2, 5))
    assert "walk broke down" in message and "exit code [-9]" in message
    assert f"tasks {sorted(set(envs.task.tolist()))}" in message
    assert saved == [True] and set(multiprocessing.active_children()) <= before


def test_an_error_is_named(walk, one_line_error):
    envs = walk(2)
    envs.reset(options={"eval_states": [1, 5]})
    actions = np.zeros((2, 5, 2), np.float32)
    envs.step_chunk(actions)
    actions[1, 2] = 0, 0.5
    message = one_line_error(envs.step_chunk, actions)
    assert "task 1, initial state 2, step 7: ZeroDivisionError: the walker fell" in message


def test_wrong_shape(walk):
    envs = walk(4)
    envs.reset()
    for shape in ((4, 2), (3, 5, 2), (4, 5, 3)):
        with pytest.raises(ValueError, match=r"expected shape \(4, chunk_len, 2\), got"):
            envs.step_chunk(np.zeros(shape))


def test_gif(tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    write_gif(tmp_path / "plain.gif", frames)
    write_gif(tmp_path / "text.gif", frames, "one two three")
    plain, text = Image.open(tmp_path / "plain.gif"), Image.open(tmp_path / "text.gif")
    assert plain.n_frames == text.n_frames == 3 and plain.size == (64, 64) and plain.info["duration"] == 100
    strip = np.array(text.convert("L"))[64:]
    assert text.size[1] > 64 and strip.min() < 100 and strip.max() > 200  # dark letters on white
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.gif", "text.gif"]
