"""The numbers that evaluate.py reports, against the episodes that they are about."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HYBRID
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate as script
import flow_sde_ppo
from envs import make_envs
from evaluate import Args, main, play_expert
from pi_models import CHECKPOINTS, TINY, Policy, load_policy, save_policy
from reports import draw_video, group_means, markdown, summarize, wilson
from simulators import tabletop

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained policy."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    stats = {key: {"mean": [0.0] * size, "std": [1.0] * size} for key, size in (("state", 4), ("actions", 3))}
    policy = Policy(TINY, stats)
    policy.tokenizer_json = (CHECKPOINTS / "tiny/tokenizer.json").read_text()
    save_policy(policy, folder)
    return str(folder)


@pytest.fixture
def few_states(monkeypatch):
    """Six evaluation states per task instead of fifty."""
    monkeypatch.setattr(tabletop, "EVAL_STATES", 6)


def cells(table):
    """{first cell: the other cells} of a Markdown table."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert len({len(row) for row in rows}) == 1 and set("".join(rows[1])) == {"-"}
    return {row[0]: row[1:] for row in rows}


# --- the interval ---


def score_interval(successes, episodes, z=1.959964):
    """The rates p that a score test does not reject, |rate - p| <= z sqrt(p (1 - p) / n), by bisection."""
    rate = successes / episodes

    def rejected(p):
        return abs(rate - p) > z * math.sqrt(p * (1 - p) / episodes)

    def edge(inside, outside):
        if not rejected(outside):
            return outside
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return edge(rate, 0.0), edge(rate, 1.0)


@pytest.mark.parametrize(
    "successes, episodes", [(8, 10), (1, 10), (232, 500), (1, 500), (499, 500), (0, 50), (500, 500), (1, 1)]
)
def test_interval_solves_the_score_equation(successes, episodes):
    low, high = wilson(successes, episodes)
    assert (low, high) == pytest.approx(score_interval(successes, episodes), abs=1e-6)
    assert 0 <= low <= successes / episodes <= high <= 1


def test_interval_known_values():
    z2 = 1.959964**2
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert wilson(0, 50) == pytest.approx((0, z2 / (50 + z2)))  # closed forms at the ends
    assert wilson(500, 500) == pytest.approx((500 / (500 + z2), 1))


# --- the table ---


class Expert:
    """An agent that acts like the scripted expert, or not at all where the drawer is on the right."""

    chunk_len, action_dim, device, config = 1, 3, "cpu", TINY

    def __init__(self, envs):
        self.envs, self.policy = envs, self

    def preprocess(self, obs):
        return obs

    def encode(self, obs):
        return obs

    def act(self, obs, generator, deterministic, noise):
        return torch.zeros(len(obs["prompt"]), 1), None, None

    def postprocess(self, x, obs):
        envs = self.envs
        actions = np.where(envs.handle_x[:, None] > 0, 0, envs.expert_action())
        return actions[envs.alive][:, None].astype(np.float32)


def test_expert_is_compared_on_the_same_states(few_states):
    envs = make_envs("tabletop", 30, 0, partial_reset=False)  # two rounds
    expert = play_expert(make_envs("tabletop", 60, 0, partial_reset=False))
    left = (envs.eval_scenes[1] <= 0).reshape(10, 6)
    assert expert.shape == (10, 6) and expert.min() > 1 and expert.max() < 40 and 0.2 < left.mean() < 0.8
    result = summarize([script.evaluate(Expert(envs), envs)], expert, envs.tasks)
    assert [result["tasks"][task]["successes"] for task in envs.tasks] == left.sum(axis=1).tolist()
    assert result["length"] == result["expert_length"] == pytest.approx(expert[left].mean())
    assert result["length"] != pytest.approx(expert.mean(), abs=0.02)  # all states have another mean


def test_table_and_json_count_the_episodes(few_states, checkpoint, monkeypatch, tmp_path, capsys):
    rng, played = np.random.default_rng(0), {}

    def invented(agent, envs, deterministic=True, seed=0, record=0):
        task = np.tile(np.arange(10), 6)
        result = {"success": rng.random(60) < 0.3 + 0.05 * task, "length": rng.integers(5, 40, 60)}
        played.setdefault((agent.policy, deterministic), {})[seed] = result
        return result | {"task": task}

    monkeypatch.setattr(script, "evaluate", invented)
    path = tmp_path / "numbers.json"
    args = Args(checkpoints=(checkpoint, checkpoint), labels=("SFT", "RL"), seeds=(3, 4), stochastic=True)
    args.json = str(path)
    main(args)
    out = capsys.readouterr().out
    table, report = cells(out), json.loads(path.read_text())
    names = ["SFT, ODE", "SFT, SDE", "RL, ODE", "RL, SDE"]
    assert table["task"] == ["expert length", *names] and names == [r["name"] for r in report["results"]]
    assert [deterministic for _, deterministic in played] == [True, False, True, False]
    expert = play_expert(make_envs("tabletop", 60, 0, partial_reset=False))
    assert table["**mean**"][0] == f"{expert.mean():.1f}"
    for column, (runs, result) in enumerate(zip(played.values(), report["results"]), 1):
        assert sorted(runs) == [3, 4]
        wins = sum(int(run["success"].sum()) for run in runs.values())
        steps = np.concatenate([run["length"][run["success"]] for run in runs.values()]).mean()
        assert (result["successes"], result["episodes"], result["success_rate"]) == (wins, 120, wins / 120)
        assert result["length"] == pytest.approx(steps)
        assert table["length of successes"][column] == f"{steps:.1f}"
        assert table["**mean**"][column] == f"**{wins / 120:.1%} ({wins}/120)**"
        assert table["spread (ODE: over A^0, else given it)"][column] == f"{result['spread']:.2f}"
        assert table["95% interval"][column] == "{:.1%} to {:.1%}".format(*wilson(wins, 120))
        for i, task in enumerate(tabletop.TASKS):
            wins = sum(int(success) for run in runs.values() for success in run["success"][i::10])
            assert table[task][column] == f"{wins / 12:.1%} ({wins}/12)"
            assert result["tasks"][task] == {"success_rate": wins / 12, "successes": wins, "episodes": 12}
            assert table[task][0] == f"{expert[i].mean():.1f}"
    assert "Protocol: tabletop, rgb observations, 1 of 32 x 32 pixels, 60 fixed states, at most 40" in out
    assert "steps (paper's limit), success at any step, chunks of 5" in out
    assert "chunks of 5, K = 4 (defaults for tabletop), deterministic ODE and with noise (two-layer, " in out
    assert "euler, level 0.7), evaluation seed 3, 4, torch " + torch.__version__ in out
    protocol = {"env_id": "tabletop", "num_states": 60, "max_episode_steps": 40, "seeds": [3, 4]}
    assert protocol.items() <= report["protocol"].items()
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_records_say_which_episode(few_states, capsys):
    """A line for each, whose success is that of its own scene."""
    envs = make_envs("tabletop", 30, 0, partial_reset=False)  # two rounds, which are counted while they last
    lines = script.records(script.evaluate(Expert(envs), envs), envs, "mine", 7)
    assert "evaluation:  50%" in capsys.readouterr().err
    left = (envs.eval_scenes[1] <= 0).reshape(10, 6)
    expert = play_expert(make_envs("tabletop", 60, 0, partial_reset=False))
    seen = set()
    for line in lines:
        task, state = envs.tasks.index(line["task"]), line["state"]
        seen.add((task, state))
        length = int(expert[task, state]) if left[task, state] else 40
        same = {"policy": "mine", "env_id": "tabletop", "seed": 7, "length": length}
        assert same.items() <= line.items() and len(line) == 8
        assert line["success"] is bool(left[task, state]) and line["return"] == float(line["success"])
    assert len(lines) == len(seen) == 60


def test_without_a_success_there_is_no_length():
    never = {"success": np.zeros(4, bool), "length": np.full(4, 40), "task": np.array([0, 1, 0, 1])}
    result = {"name": "never"} | summarize([never], np.full((2, 2), 9), ["a", "b"])
    assert result["length"] is None and result["expert_length"] is None and result["interval"][0] == 0
    protocol = {"env_id": "x", "obs_mode": "rgb", "eval_protocol": "paper", "num_states": 4, "torch": "0"}
    protocol |= {"max_episode_steps": 40, "stochastic": False, "seeds": [0]}
    result |= {"sampler": {"chunk_len": 5, "denoise_steps": 4}, "sampler_source": "y", "deterministic": True}
    report = {"protocol": protocol, "expert_length": {"a": 9.0, "b": 9.0}, "results": [result]}
    assert cells(markdown(report))["length of successes"] == ["", "-"]
    protocol["about"] = "what it is"  # as a simulator says of itself
    assert "\nProtocol: x (what it is), rgb observations, 4 fixed states" in markdown(report)
    protocol["pictures"] = (2, 64, 48, 3)
    assert "rgb observations, 2 of 64 x 48 pixels, 4 fixed states" in markdown(report)
    protocol["pictures"] = (0, 1, 1, 3)
    assert "rgb observations, 4 fixed states" in markdown(report)
    tasks = {f"task {i}": 9.0 for i in range(101)}  # too many for a table: only the mean is left
    many = result | {"tasks": dict.fromkeys(tasks, {"success_rate": 0, "successes": 0, "episodes": 1})}
    assert "task 7" not in markdown(report | {"expert_length": tasks, "results": [many]})


# --- the table of variations ---


def one_policy(**rates):
    """Results by variation of a policy: {name: (group, successes, episodes)} as in a report."""
    return {
        name: {"group": group, "results": [{"success_rate": s / n, "successes": s, "episodes": n}]}
        for name, (group, s, n) in rates.items()
    }


def test_means_of_table_3():
    """From the rates of Table 9, pi0 and Flow-SDE, of 320 episodes thrice: Table 3."""
    vision, semantics = (64.58, 68.75, 66.04, 55.83, 62.40, 48.96), (28.23, 36.46, 16.35, 20.52)
    rates = {"vision": vision, "semantics": semantics, "execution": (17.40, 45.63)}
    told = {
        f"{g}{i}": (g, round(9.6 * rate), 960) for g, many in rates.items() for i, rate in enumerate(many)
    }
    found = {
        group: round(100 * means[0]["success_rate"], 1)
        for group, means in group_means(one_policy(**told)).items()
    }
    assert found == {"vision": 61.1, "semantics": 25.4, "execution": 31.5, "mean": 39.3}


def test_a_mean_is_worth_so_many_episodes():
    found = group_means(one_policy(a=("x", 8, 10), b=("x", 20, 40), c=("y", 5, 20)))
    x, y, mean = (found[group][0] for group in ("x", "y", "mean"))
    assert x["success_rate"] == pytest.approx(0.65) and mean["success_rate"] == pytest.approx(0.45)
    assert (x["successes"], x["episodes"]) == (28, 50) and (mean["successes"], mean["episodes"]) == (33, 70)
    # p (1 - p) sum w^2 / n, as of one rate of that many episodes
    for result, worth in (x, 1 / (0.25 / 10 + 0.25 / 40)), (y, 20), (mean, 16 / (1 / 10 + 1 / 40 + 4 / 20)):
        expected = score_interval(result["success_rate"] * worth, worth)
        assert result["interval"] == pytest.approx(expected, abs=1e-6)
    equal = group_means(one_policy(a=("x", 8, 10), b=("x", 5, 10)))["x"][0]
    assert equal["interval"] == pytest.approx(wilson(13, 20))


def test_variations(few_states, checkpoint, monkeypatch, tmp_path, capsys):
    """Rows, means and records are those of the episodes that were played where they say."""
    rng, played = np.random.default_rng(0), {}

    def invented(agent, envs, deterministic=True, seed=0, record=0):
        run = {"success": rng.random(60) < rng.random(), "length": rng.integers(5, 40, 60)}
        played.setdefault(envs.env_id, []).append(run["success"])
        return run | {"return": run["success"].astype(float), "task": np.tile(np.arange(10), 6)}

    monkeypatch.setattr(script, "evaluate", invented)
    path, lines = tmp_path / "numbers.json", tmp_path / "lines.jsonl"
    args = Args(checkpoints=(checkpoint, checkpoint), labels=("SFT", "RL"), variations=True, seeds=(0, 1))
    args.json, args.records = str(path), str(lines)
    main(args)
    out = capsys.readouterr().out
    table, report = cells(out), json.loads(path.read_text())
    names = ["new_table", "lamp", "noise", "new_words", "new_colours", "distractors"]
    names = [f"tabletop_ood_{name}" for name in [*names, "new_places", "new_start", "moving_target"]]
    assert list(played) == ["tabletop", *names] and table["success"] == ["SFT", "RL"]
    order = ["success", "---", "tabletop, in distribution", *names[:3], "**vision**", *names[3:6]]
    order += ["**semantics**", *names[6:], "**execution**", "**mean of the groups**"]
    assert [key if key.strip("-") else "---" for key in table] == order
    rates = {}
    for env_id, runs in played.items():  # SFT by both seeds, then RL
        counts = [int(sum(run.sum() for run in runs[i : i + 2])) for i in (0, 2)]
        rates[env_id] = np.array(counts) / 120
        if env_id != "tabletop":
            assert table[env_id] == [f"{n / 120:.1%} ({n}/120)" for n in counts]
            results = report["variations"][env_id]["results"]
            assert [result["successes"] for result in results] == counts
        of_this = [json.loads(line) for line in lines.read_text().splitlines() if f'"{env_id}"' in line]
        assert [sum(e["success"] for e in of_this if e["policy"] == name) for name in ("SFT", "RL")] == counts
        assert len(of_this) == 240
    groups = {"vision": names[:3], "semantics": names[3:6], "execution": names[6:]}
    means = {group: np.mean([rates[name] for name in members], axis=0) for group, members in groups.items()}
    means["mean of the groups"] = np.mean(list(means.values()), axis=0)
    means["tabletop, in distribution"] = rates["tabletop"]
    for title, mean in means.items():
        row = table.get(f"**{title}**") or table[title]
        episodes = {"tabletop, in distribution": 120, "mean of the groups": 1080}.get(title, 360)
        for cell, rate in zip(row, mean):
            low, high = score_interval(rate * episodes, episodes)
            assert cell == f"**{rate:.1%}** [{low:.1%}, {high:.1%}]"
    assert "Protocol: tabletop and 9 variations of it, rgb observations, 1 of 32 x 32 pixels, 60 " in out
    assert sorted(tmp_path.iterdir()) == [lines, path]


# --- the whole script ---


def test_run_with_video(few_states, checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tabletop.Tabletop, "max_episode_steps", 15)
    gif, path, lines = (tmp_path / name for name in ("demo.gif", "numbers.json", "lines.jsonl"))
    args = Args(checkpoints=(checkpoint, checkpoint), labels=("before", "after"), capture_video=str(gif))
    args.env_id, args.json, args.records, args.seeds = "tabletop_press_button", str(path), str(lines), (0, 3)
    main(args)
    episodes = list(map(json.loads, lines.read_text().splitlines()))
    assert [(e["policy"], e["seed"], e["state"]) for e in episodes] == [
        (policy, seed, state) for policy in ("before", "after") for seed in (0, 3) for state in range(6)
    ]
    report = json.loads(path.read_text())
    first, second = report["results"]
    assert {**first, "name": ""} == {**second, "name": ""}  # the same policy, the same noise
    assert list(report["expert_length"]) == ["press_button"] and first["episodes"] == 12
    assert first["successes"] == sum(episode["success"] for episode in episodes[:12])
    assert f"video: {gif}" in capsys.readouterr().out and sorted(tmp_path.iterdir()) == [gif, lines, path]
    picture = Image.open(gif)
    assert picture.size[0] > 6 * 128 and picture.size[1] > 2 * 128 and gif.stat().st_size < 1.5e6
    assert picture.n_frames == 15
    picture.seek(14)
    assert picture.info["duration"] >= 2000  # the end can be read


def test_video_tells_how_episodes_end():
    pictures = np.full((8, 2, 128, 128, 3), 255, np.uint8)
    rows = [("before", pictures, [True, False], [3, 8]), ("after", pictures[:6], [False, True], [6, 5])]
    frames = draw_video(rows, ["open the drawer", "press the button"])

    def colours(t):  # of the four results, at their left ends
        pixels = np.array([frames[t, y + 138, x + 3] for y in (74, 254) for x in (4, 136)], float)
        known = np.array([(128, 128, 128), (0, 128, 0), (178, 34, 34)])
        distance = np.abs(pixels[:, None] - known).max(axis=2)
        assert (distance.min(axis=1) < 10).all()
        return distance.argmin(axis=1).tolist()

    gray, green, red = range(3)
    assert len(frames) == 8 + 20 and (frames[7:] == frames[7]).all()
    assert colours(1) == [gray] * 4
    assert colours(2) == [green, gray, gray, gray]
    assert colours(4) == [green, gray, gray, green]
    assert colours(5) == [green, gray, red, green]
    assert colours(7) == colours(-1) == [green, red, red, green]


def test_name_of_a_run(checkpoint, few_states, monkeypatch, capsys):
    monkeypatch.chdir(Path(checkpoint).parent.parent)
    main(Args(checkpoints=(checkpoint + "/",), env_id="tabletop_press_button"))
    assert cells(capsys.readouterr().out)["task"][1] == Path(checkpoint).parent.name


def test_a_checkpoint_is_played_as_it_was_trained(few_states, checkpoint, monkeypatch, tmp_path, capsys):
    """By its args.json, beside the weights or above; a flag goes before; who chose it is said."""
    seen = []

    def invented(agent, envs, deterministic=True, seed=0, record=0):
        seen.append((agent.chunk_len, agent.K, agent.noise_level))
        return {"success": np.zeros(6, bool), "length": np.full(6, 40), "task": np.zeros(6, int)}

    monkeypatch.setattr(script, "evaluate", invented)
    for name in ("inside", "run/checkpoint"):
        save_policy(load_policy(checkpoint), tmp_path / name)
    told = {"chunk_len": 3, "denoise_steps": 2, "noise_level": 0.7, "mdp": "two-layer", "exp_name": "mine"}
    (tmp_path / "inside" / "args.json").write_text(json.dumps(told))
    (tmp_path / "run" / "args.json").write_text(json.dumps(told | {"denoise_steps": 3}))
    three = (checkpoint, str(tmp_path / "inside"), str(tmp_path / "run" / "checkpoint"))
    args = Args(checkpoints=three, labels=("a", "b", "c"), env_id="tabletop_press_button", noise_level=0.6)
    main(args)
    assert seen == [(5, 4, 0.6), (3, 2, 0.6), (3, 3, 0.6)]
    out = capsys.readouterr().out
    assert (
        "chunks of 5, K = 4 (defaults for tabletop_press_button, --noise-level), deterministic ODE (a)" in out
    )
    assert "chunks of 3, K = 2 (as it was trained, --noise-level), deterministic ODE (b)" in out
    monkeypatch.setattr("layouts.download", {"owner/name": tmp_path / "inside"}.get)  # there is no network
    main(Args(checkpoints=("owner/name",), env_id="tabletop_press_button"))
    assert seen[3:] == [(3, 2, 0.7)]
    capsys.readouterr()
    (tmp_path / "inside" / "args.json").write_text(json.dumps(told | {"denoise_steps": "four"}))
    with pytest.raises(SystemExit):
        main(args)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "denoise_steps is 'four'" in err


def test_noise_belongs_to_a_state(monkeypatch):
    """An episode by the ODE is the same in whatever company: among all states or in rounds of seven."""
    monkeypatch.setattr(tabletop, "EVAL_STATES", 3)
    policy = load_policy("checkpoints/tabletop-sft")
    results = []
    for num_envs, seed in ((30, 0), (7, 0), (30, 1)):
        envs = make_envs("tabletop", num_envs, 0, partial_reset=False)
        policy.fit_prompts(envs.prompts)
        results.append(script.evaluate(script.Agent(policy, flow_sde_ppo.Args()), envs, seed=seed))
    all_at_once, rounds, other = ([r[key].tolist() for key in ("success", "length", "task")] for r in results)
    assert all_at_once == rounds != other and 0 < sum(rounds[0]) < 30


@pytest.mark.parametrize(
    "changed, kept, variance",
    [
        ({}, [1 / 2, 1 / 2, 3 / 4, 5 / 6], [1, 3 / 4, 1 / 4, 1 / 12]),  # (1 - k / K) / k, the first 1
        ({"noisy_last_step": False}, [1 / 2, 1 / 2, 3 / 4], [1, 3 / 4, 1 / 4]),
        ({"sde_solver": "cps"}, [1 / 4, 2 / 4, 3 / 4], [9 / 16, 4 / 16, 1 / 16]),  # tau', (1 - tau')^2
    ],
)
def test_spread_of_a_flow_that_stands_still(changed, kept, variance, few_states, checkpoint, monkeypatch):
    """With velocity 0 the ODE ends at A^0, and the noisy step k at kept[k] of it, with its whole noise."""
    envs = make_envs("tabletop", 60, 0, partial_reset=False)
    policy = load_policy(checkpoint)
    monkeypatch.setattr(policy, "velocity", lambda prefix, x, tau: (torch.zeros_like(x), x))
    ode, noisy = script.spreads(script.Agent(policy, flow_sde_ppo.Args(**HYBRID | changed)), envs)
    assert ode == pytest.approx(1, rel=0.08)
    assert noisy == pytest.approx(math.sqrt(np.mean(variance) + np.var(kept)), rel=0.1)


def test_the_ode_needs_no_noise_head(few_states, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(tabletop.Tabletop, "max_episode_steps", 5)
    tables = []
    for noise in ("sde", "learned"):
        main(Args(checkpoints=(checkpoint,), env_id="tabletop_press_button", noise=noise))
        tables.append(cells(capsys.readouterr().out))
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"env_id": "tabletop_red_plat"}, "tabletop_red_plate"),
        ({"env_id": "tabletop_red_plate", "variations": True}, "--variations"),
        ({"checkpoints": ("nowhere",)}, "nowhere"),
        ({"checkpoints": ()}, "--checkpoints"),
        ({"seeds": ()}, "--seeds"),
        ({"labels": ("a", "b")}, "--labels"),
        ({"chunk_len": 6}, "--chunk-len 6"),
        ({"chunk_len": 0}, "--chunk-len"),
        ({"num_threads": 0}, "--num-threads"),
        ({"denoise_steps": 0}, "--denoise-steps must be from 1 to"),
        ({"denoise_steps": 1, "sde_solver": "cps"}, "--denoise-steps must be at least 2"),
        ({"denoise_steps": 1, "sde_solver": "exponential"}, "--denoise-steps must be at least 2"),
        ({"noise_level": 1.5, "sde_solver": "cps"}, "--noise-level must be at most 1"),
        ({"stochastic": True, "noise_level": 0.0}, "--noise-level"),
        ({"stochastic": True, "noise": "learned"}, "no noise head"),
        ({"capture_video": "demo.mp4"}, ".gif"),
        ({"capture_video": "nowhere/demo.gif"}, "nowhere/demo.gif"),
        ({"json": "file/numbers.json"}, "file/numbers.json"),
        ({"json": "folder"}, "folder"),
        ({"records": "nowhere/lines.jsonl"}, "nowhere/lines.jsonl"),
        ({"records": "folder"}, "folder"),
        ({"records": "same", "json": "same"}, "--records and --json"),
    ],
)
def test_mistakes_are_one_line(wrong, words, checkpoint, few_states, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    monkeypatch.setattr(script, "evaluate", lambda *_: pytest.fail("episodes were played"))
    with pytest.raises(SystemExit) as stop:
        main(Args(**{"checkpoints": (checkpoint,), **wrong}))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
