"""The tabletop's shifts: each changes one thing and nothing else, repeats to the bit, and can be solved."""

import re

import numpy as np
import pytest

import flow_sde_ppo
from envs import find_simulator, find_variations, make_envs
from pi_models import load_policy
from simulators.tabletop import BUTTON, HANDLE, TASKS, VIEW
from simulators.tabletop_shifts import SHIFTS, ShiftedTabletop

ALL = np.arange(500)
SOME = ALL[::10]
GROUPS = {
    **dict.fromkeys(("new_table", "lamp", "noise"), "vision"),
    **dict.fromkeys(("new_words", "new_colours", "distractors"), "semantics"),
    **dict.fromkeys(("new_places", "new_start", "moving_target"), "execution"),
}


def begin(env_id, chosen=SOME, seed=0):
    envs = make_envs(env_id, len(chosen), seed, partial_reset=False)
    return envs, envs.reset(options={"eval_states": chosen})[0]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in ("images", "state", "prompt"))


def test_names():
    assert find_variations("tabletop") == {f"tabletop_ood_{name}": group for name, group in GROUPS.items()}
    assert all(find_simulator(env_id) is ShiftedTabletop for env_id in SHIFTS)


@pytest.mark.parametrize("env_id", SHIFTS)
def test_expert(env_id):
    """Every one can be solved, each of its instructions."""
    envs, _ = begin(env_id, ALL)
    for _ in range(40):
        *_, info = envs.step_chunk(envs.expert_action()[:, None])
    assert (info["success"].reshape(10, 50).mean(axis=1) >= 0.95).all()


@pytest.mark.parametrize("env_id", SHIFTS)
def test_one_thing_is_another(env_id):
    """At the beginning, beside the tabletop's own state of that number."""
    (envs, obs), (twin, usual) = begin(env_id), begin("tabletop")
    name = env_id.removeprefix("tabletop_ood_")
    changed = {
        "pictures": (obs["images"] != usual["images"]).any(axis=(1, 2, 3, 4)).all(),
        "words": all(a != b for a, b in zip(obs["prompt"], usual["prompt"])),
        "objects": (envs.objects != twin.objects).all(),
        "gripper": (envs.gripper != twin.gripper).any(axis=1).all(),
    }
    expected = {
        **dict.fromkeys(("new_table", "lamp", "noise", "distractors"), {"pictures"}),
        "new_words": {"words"},
        "new_colours": {"pictures"},  # and the words where they name a block
        "new_places": {"pictures", "objects"},
        "new_start": {"pictures", "gripper"},
        "moving_target": set(),  # so far
    }[name]
    assert {key for key, value in changed.items() if value} == expected
    assert np.array_equal(envs.objects, twin.objects) == (name != "new_places")
    assert np.array_equal(envs.gripper, twin.gripper) == (name != "new_start")
    assert np.array_equal(obs["images"], usual["images"]) == ("pictures" not in expected)
    assert (obs["prompt"] == usual["prompt"]) == (name not in ("new_words", "new_colours"))
    assert np.array_equal(envs.task, twin.task) and np.array_equal(envs.handle_x, twin.handle_x)
    assert np.array_equal(envs.goals, twin.goals) and obs in envs.observation_space


@pytest.mark.parametrize("env_id", SHIFTS)
def test_a_state_is_the_same_in_whatever_company(env_id):
    few = ALL[[499, 0, 250, 7, 7, 130, 481]]
    (envs, obs), (others, got) = begin(env_id, ALL), begin(env_id, few, seed=5)
    for t in range(9):
        assert same(got, {k: np.array(v)[few] for k, v in obs.items()}), t
        actions = envs.expert_action()[:, None]
        obs, got = envs.step_chunk(actions)[0], others.step_chunk(actions[few])[0]
        film = envs.render(64, few), others.render(64)
        assert np.array_equal(*film)


@pytest.mark.parametrize("env_id", SHIFTS)
def test_set_state(env_id):
    """Within an episode, into another one: all goes on to the last bit, through new episodes too."""
    envs, other = (make_envs(env_id, 30, seed) for seed in (0, 1))
    noise = np.random.default_rng(0).normal(0, 0.3, (32, 30, 1, 3))
    envs.reset()
    for n in noise[:2]:
        envs.step_chunk(envs.expert_action()[:, None] + n)
    now, began = other.set_state(envs.get_state()), 0
    assert same(now, envs._observe())
    for n in noise[2:]:
        a, b = (e.step_chunk(e.expert_action()[:, None] + n) for e in (envs, other))
        assert same(a[0], b[0]) and all(map(np.array_equal, a[1:4], b[1:4]))
        began += a[2].sum()
    assert began > 10


@pytest.mark.parametrize("env_id", SHIFTS)
def test_training_episodes(env_id):
    """Observations of episodes that begin anew are those of their scenes; groups begin alike."""
    envs = make_envs(env_id, 40, 3)
    envs.reset()
    for _ in range(20):
        obs, _, terminated, _, info = envs.step_chunk(envs.expert_action()[:, None])
        assert same(obs, envs._observe()) and obs in envs.observation_space
        if terminated.any():
            assert len(info["final_obs"]["prompt"]) == terminated.sum()
    groups = make_envs(env_id, 32, 0, partial_reset=False, group_size=4).reset()[0]
    for key in groups:
        four = np.array(groups[key]).reshape(8, 4, -1)
        assert (four == four[:, :1]).all()


def test_pictures():
    """What the names say, read off the pixels."""
    envs, obs = begin("tabletop_ood_noise", ALL)
    _, usual = begin("tabletop", ALL)
    middle = (usual["images"] > 90) & (usual["images"] < 165)  # where nothing is clipped
    noise = (obs["images"].astype(float) - usual["images"])[middle]
    assert abs(noise.mean()) < 0.6 and abs(noise.std() - 25) < 0.3  # rounded down
    envs.length += 1
    again = (envs._observe()["images"].astype(float) - usual["images"])[middle]
    assert abs(np.corrcoef(noise, again)[0, 1]) < 0.02  # another picture, other noise

    _, obs = begin("tabletop_ood_lamp", ALL)
    ratio = obs["images"].sum(axis=0, dtype=float) / usual["images"].sum(axis=0, dtype=float)
    corners = ratio[0, [0, 0, -1, -1], [0, -1, 0, -1]]  # (4, RGB)
    assert np.allclose(corners, np.outer([1.1, 0.75, 0.75, 0.4], [1, 0.9, 0.75]), atol=0.02)

    envs, _ = begin("tabletop_ood_new_table")
    envs.gripper[:], envs.objects[:] = 9, 9  # out of the picture
    cloth = envs.render(256)[0, 100:240, 10:-10].reshape(-1, 3).astype(float)
    dark = np.linalg.norm(cloth - (128, 152, 160), axis=1) < 3
    light = np.linalg.norm(cloth - (214, 222, 226), axis=1) < 3
    assert (dark | light).all() and 0.45 < dark.mean() < 0.55


def test_new_colours():
    """A block has the colour that the instruction calls it by."""
    colours = {"pink": (255, 150, 190), "teal": (0, 150, 150), "purple": (110, 40, 170)}
    envs, obs = begin("tabletop_ood_new_colours", ALL)
    envs.gripper[:] = 9
    pictures, found = envs.render(64).astype(float), 0
    for n, (prompt, task) in enumerate(zip(obs["prompt"], envs.task)):
        name = re.search("pink|teal|purple", prompt)
        assert (name is None) == (task >= 8) and not re.search(r"\b(red|green|blue)\b", prompt)
        if name:
            x, y = envs.objects[n, envs.goals[task, 0]]
            column, row = (np.array([x, -y]) / VIEW + 1) / 2 * 64
            found += np.linalg.norm(pictures[n, int(row), int(column)] - colours[name[0]]) < 5
    assert found == 400


def test_new_words():
    """Thirty sentences, none of training; the shipped policy reads or spells every word of them."""
    envs, obs = begin("tabletop_ood_new_words", ALL)
    said = set(obs["prompt"])
    assert said == set(envs.prompts) and len(said) == 30 and not said & {told for told, *_ in TASKS.values()}
    for task, prompt in zip(envs.task, obs["prompt"]):
        words = re.findall("red|green|blue|plate|bowl|drawer|handle|button", prompt)
        name, swapped = list(TASKS)[task], prompt.startswith("on the") and task in (6, 7)
        colours = [word for word in name.split("_") if word in ("red", "green", "blue")]
        assert [word for word in words if word in ("red", "green", "blue")] == colours[
            :: -1 if swapped else 1
        ]
        for thing in ("plate", "bowl", "button"):
            assert (thing in words) == (thing in name)
        assert ("drawer" in words or "handle" in words) == (name == "open_drawer")
    policy = load_policy("checkpoints/tabletop-sft")
    unknown = policy.tokenizer().token_to_id("<unk>")
    others = [prompt for env_id in SHIFTS for prompt in make_envs(env_id, 1, 0).prompts]
    assert len(set(others)) == 10 + 30 + 8
    for prompt in others:
        tokens = policy.tokenize(prompt)
        assert unknown not in tokens and len(tokens) <= policy.config.max_token_len


def test_distractors():
    """Away from all that is needed, where they are for the whole episode, and not to be taken."""
    envs, _ = begin("tabletop_ood_distractors", ALL)
    before = envs.distractors.copy()
    gaps = np.linalg.norm(before[:, :, None] - envs.objects[:, None], axis=-1)  # (N, 2, 6)
    assert gaps.min() >= 0.3 and np.linalg.norm(before[:, 0] - before[:, 1], axis=-1).min() > 0.4
    assert len(np.unique(before[:, 0], axis=0)) == 12  # anywhere
    for _ in range(10):
        envs.step_chunk(envs.expert_action()[:, None])
    assert np.array_equal(envs.distractors, before)
    envs.reset(options={"eval_states": ALL})
    envs.gripper = before[:, 0].copy()
    for _ in range(2):
        envs.step_chunk(np.full((500, 1, 3), (0, 0, 1)))
    assert (envs.held == -1).all() and not envs.pressed.any()


def test_places_are_new():
    """No object's row or column is one of training's, of 2000 scenes; no gripper begins where one did."""
    usual, places, start = (
        make_envs(name, 2000, 0) for name in ("tabletop", "tabletop_ood_new_places", "tabletop_ood_new_start")
    )
    for envs in (usual, places, start):
        envs.reset()
    for axis in (0, 1):
        trained = np.unique(usual.objects[..., axis].round(2))
        assert np.abs(places.objects[..., axis, None] - trained).min() > 0.05
    gaps = np.linalg.norm(places.objects[:, :, None] - places.objects[:, None], axis=-1)
    assert gaps[:, ~np.eye(6, dtype=bool)].min() >= 0.3
    inside = np.abs(usual.gripper[:, 0]).max()
    assert inside < np.abs(start.gripper[:, 0]).min() and np.abs(start.gripper).max() <= 1


def test_the_target_moves():
    """After the third step, once, the target alone, unless it is held; to a place without another thing."""
    (envs, _), (twin, _) = begin("tabletop_ood_moving_target", ALL), begin("tabletop", ALL)
    every, source = ALL, envs.goals[envs.task, 0]
    hold = np.where(source[:, None] == BUTTON, 0, (0, 0, 1))  # pressing it would end the episode
    for held in (False, True):
        for e in (envs, twin):
            e.reset(options={"eval_states": ALL})
            if held:
                e.gripper = e.places()[every, source]
        for step in range(6):
            actions = np.broadcast_to(hold if held else np.zeros(3), (500, 3))[:, None]
            for e in (envs, twin):
                e.step_chunk(actions)
            moved = np.linalg.norm(envs.places() - twin.places(), axis=-1) > 0  # (N, 7)
            expected = np.zeros((500, 7), bool)
            expected[every, source] = step >= 2 and (not held or source == BUTTON)
            assert np.array_equal(moved, expected), (held, step)
        if not held:
            gap = np.linalg.norm(envs.objects[:, :, None] - envs.objects[:, None], axis=-1)
            assert gap[:, ~np.eye(6, dtype=bool)].min() >= 0.3 and np.abs(envs.objects).max() < 0.85
            assert np.abs(envs.handle_x).max() <= 0.6
            drawers = source == HANDLE
            assert np.abs(envs.handle_x - twin.handle_x)[drawers].min() > 0.59


def test_it_trains(tmp_path):
    """An iteration of RL on a shift, and the run's evaluation."""
    small = dict(env_id="tabletop_ood_new_words", num_envs=16, num_steps=8, num_minibatches=2, eval_freq=-1)
    small |= dict(total_timesteps=1, update_epochs=1, run_dir=str(tmp_path), device="cpu")
    flow_sde_ppo.main(flow_sde_ppo.Args(**small, checkpoint="checkpoints/tabletop-sft"))
    (run,) = tmp_path.iterdir()
    assert (run / "checkpoint" / "model.safetensors").is_file()
