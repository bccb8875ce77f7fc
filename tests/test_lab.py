"""The lab: the commands of benchmark/ablations.py, how they are run and told, and the leaderboard."""

import csv
import importlib
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import ablations  # noqa: E402
import leaderboard  # noqa: E402
from ablations import ABLATIONS, CURVES, MEASURES, REPORTED, Ablation  # noqa: E402

import evaluate  # noqa: E402
import flow_sde_ppo  # noqa: E402
from flags import parse, read  # noqa: E402

COMMANDS = sorted({command for ablation in ABLATIONS.values() for command in ablation.rows.values()})


def flags_of(command):
    script, *words = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    return module, parse(module.Args, module.defaults, words)


def make_run(folder, rates, seed=1, eval_freq=2, iterations=40, finished=True, **flags):
    """100 steps and 60 seconds an iteration; KL and clip fraction 0.01 times the iteration, and so on."""
    folder.mkdir(parents=True)
    args = asdict(flow_sde_ppo.Args(seed=seed, eval_freq=eval_freq, total_timesteps=100 * iterations))
    (folder / "args.json").write_text(json.dumps(args | flags))
    (folder / "commit.txt").write_text("abc1234\n")
    (folder / "resume").mkdir()
    (folder / "resume/0000040.rank0of2.safetensors").touch()
    times = ["time/rollout", "time/encode", "time/update"]
    names = sorted({*CURVES.values(), "flow/exploration"})
    with open(folder / "metrics.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(["iteration", "global_step", *names, *times, "eval/success_rate"])
        for i in range(1, iterations + 1):
            rate = rates[min(i // eval_freq, len(rates) - 1)]
            table.writerow([i, 100 * i, *[i / 100] * len(names), 30, 10, 20, rate])
    if finished:
        (folder / "learning_curve.png").touch()
    return folder


# --- the list ---


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    module, args = flags_of(command)
    module.check(args)
    assert args.env_id == "tabletop" and args.seed == 1 and not args.resume
    words = [word for word in command.split() if word.startswith("--")]
    assert len(words) == len(set(words)), "a flag is given twice"
    usual = asdict(module.Args())
    changed = {f"--{name.replace('_', '-')}" for name, value in asdict(args).items() if value != usual[name]}
    default = {"--noise-level": 0.7, "--critic-warmup": 2, "--chunk-len": 5}  # said, though it is the default
    for word in {*words} - changed:
        assert f"{word} {default[word]}" in command
    assert changed <= {*words}


def test_rows_differ_in_what_the_title_says():
    """Of a row against another only these flags change."""
    may = {
        "start": {"noise_level", "denoise_steps"},
        "noise": {"noise_level"},
        "first-updates": {"noise_level"},
        "steps": {"denoise_steps"},
        "critic": {"critic", "critic_layers"},
        "warmup": {"critic_warmup"},
        "learned": {"noise"},
        "solver": {"sde_solver", "noise_level"},
        "cosine": {"learning_rate", "lr_schedule"},
        "chunk": {"chunk_len", "num_steps", "num_minibatches"},
        "lora": {"train", "learning_rate", "num_minibatches"},
        "last-step": {"mdp", "noisy_last_step", "noise_level"},
    }
    for name, flags in may.items():
        rows = [asdict(flags_of(command)[1]) for command in ABLATIONS[name].rows.values()]
        assert len(rows) > 1
        assert {key for key in rows[0] for row in rows if row[key] != rows[0][key]} == flags


def test_chunks_of_every_length_have_as_many_steps_and_minibatches_as_large():
    for command in ABLATIONS["chunk"].rows.values():
        _, args = flags_of(command)
        chunks = args.num_envs * args.num_steps
        assert chunks * args.chunk_len == 5120 and chunks // args.num_minibatches == 256


@pytest.mark.parametrize("name", ABLATIONS)
def test_columns_and_panels_are_known(name):
    ablation = ABLATIONS[name]
    assert {*ablation.columns} <= {*MEASURES, *REPORTED}
    assert {*ablation.panels} <= {"ODE", *CURVES}


def test_the_policy_at_the_start_is_played_as_the_row_plays():
    files = set()
    for ablation in filter(ablations.needs_report, ABLATIONS.values()):
        for command in ablation.rows.values():
            file, words = ablations.report_of(command)
            files.add(file)
            _, args = flags_of(command)
            told = read(evaluate.Args, words[1:])
            assert told.stochastic and told.json == str(file) and told.checkpoints == (args.checkpoint,)
            for flag in evaluate.SAMPLER:
                if getattr(told, flag) is not None:
                    assert getattr(told, flag) == getattr(args, flag)
                else:
                    assert getattr(args, flag) == getattr(flow_sde_ppo.Args, flag)
    assert len(files) == 7 + 3 + 1  # of start, chunk and length


# --- running ---


def test_runs_once_and_tells(tmp_path, monkeypatch, capsys):
    """Two rows with one command, a row that fails, one seed: one finished run, and it is not run again."""
    tiny = "flow_sde_ppo.py --num-envs 4 --total-timesteps 40 --eval-freq -1 --num-minibatches 1"
    rows = {"one": tiny, "the same": tiny, "wrong": "flow_sde_ppo.py --num-envs 3"}
    trial = Ablation("A trial", rows, ("KL", "clip fraction"), ("KL",))
    monkeypatch.setattr(ablations, "ABLATIONS", {"trial": trial})
    monkeypatch.setattr(ablations, "RUNS", tmp_path / "runs")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- ablation trial -->\nold\n<!-- ablation trial end -->\nafter\n")
    args = ablations.Args(("trial",), seeds=(3,), jobs=1, page=page)
    ablations.main(args)
    told = capsys.readouterr()
    assert told.out.count(tiny) == 1
    assert "1 of 2 commands failed" in told.err
    run = ablations.finished(tiny, 3)
    assert (run / "commit.txt").read_text().strip() and not ablations.finished(tiny, 1)
    text = page.read_text()
    assert text.startswith("before\n<!-- ablation trial -->\n\n|") and text.endswith("end -->\nafter\n")
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if "|" in line}
    assert cells["one"] == cells["the same"] and cells["one"][-1].strip() == "3"
    assert [cell.strip() for cell in cells["wrong"]] == ["not run", "not run", "none"]
    assert not (tmp_path / "page").exists()  # there is no other row to compare with
    monkeypatch.setattr(ablations, "call", lambda words, log: pytest.fail("run again"))
    trial.rows.pop("wrong")
    ablations.main(args)


def test_show_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(ablations, "call", lambda words, log: pytest.fail("something was run"))
    ablations.main(ablations.Args(("all",), only="show"))
    printed = capsys.readouterr().out.splitlines()
    trained = {command for a in ABLATIONS.values() if ablations.trains(a) for command in a.rows.values()}
    assert sum("# seeds (1, 2, 3)" in line for line in printed) == len(trained) < len(COMMANDS)
    assert sum(line.startswith("python evaluate.py --stochastic") for line in printed) == 11


def test_unknown_name(one_line_error):
    assert "noise" in one_line_error(ablations.main, ablations.Args(("nois",)))


# --- the tables ---


@pytest.fixture
def two_rows(tmp_path, monkeypatch):
    trial = Ablation(
        "Trial",
        {"a": "flow_sde_ppo.py", "b": "flow_noise_ppo.py"},
        ("start", "lowest", "ODE", "KL"),
        ("ODE",),
    )
    monkeypatch.setattr(ablations, "RUNS", tmp_path)
    for seed, rates in ((1, [0.3, 0.2, 0.5]), (2, [0.3, 0.25, 0.7]), (3, [0.3, 0.3, 0.6])):
        make_run(ablations.place("flow_sde_ppo.py") / f"tabletop__x__{seed}__5", rates, seed)
    make_run(ablations.place("flow_noise_ppo.py") / "tabletop__x__1__5", [0.3, 0.4])
    make_run(ablations.place("flow_noise_ppo.py") / "tabletop__x__2__5", [0.9], finished=False)
    return trial


def table(trial, folder, *seeds):
    """Of the runs that have finished, and of those that are recorded beside a page in the folder."""
    args = ablations.Args(("trial",), seeds, page=folder / "page.md")
    known = ablations.recorded(args)
    ablations.collect({"trial": trial}, args, known)
    return ablations.table(trial, args, known)


def test_table_by_hand(two_rows, tmp_path):
    head, _, a, b = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(two_rows, tmp_path, 1, 2, 3).splitlines()
    )
    assert head == ["", "start", "lowest", "ODE", "KL", "seeds"]
    # Student's t with two degrees of freedom is 4.303: of 0.5, 0.7, 0.6 the standard error is 0.1 / sqrt(3)
    assert a[3].startswith("60.0% [") and b[3] == "40.0%"
    low, high = map(float, re.findall(r"(-?[\d.]+)%", a[3])[1:])
    assert (low, high) == pytest.approx((60 - 24.84, 60 + 24.84), abs=0.1)
    assert a[1] == "30.0% [30.0%, 30.0%]" and a[2].startswith("25.0% [") and b[2] == "30.0%"
    assert "| 22.5% (20.0%, 25.0%) |" in re.sub(" +", " ", table(two_rows, tmp_path, 1, 2))
    assert b[4] == "0.380"  # of iterations 36 to 40
    assert (a[5], b[5]) == ("1, 2, 3", "1")  # the second run of b has not finished


def test_what_is_recorded_needs_no_folder(two_rows, tmp_path, monkeypatch):
    """Figures of a run outlive its folder, and it is not run again, but for what it lacks."""
    before = table(two_rows, tmp_path, 1, 2)
    for folder in tmp_path.glob("*/tabletop__*"):
        shutil.rmtree(folder)
    assert table(two_rows, tmp_path, 1, 2) == before
    assert " 2 " not in table(two_rows, tmp_path, 1).split("|")[-2]
    known, asked = ablations.recorded(ablations.Args((), page=tmp_path / "page.md"))["runs"], []
    monkeypatch.setattr(ablations, "call", lambda words, log: asked.append(words) or 1)
    assert ablations.train("flow_sde_ppo.py", 2, False, known) == 0 and not asked
    assert ablations.train("flow_sde_ppo.py", 2, True, known) == 1  # with noise
    assert ablations.train("flow_sde_ppo.py", 4, False, known) == 1 and len(asked) == 2


def test_success_with_noise_is_that_of_the_evaluation(two_rows, tmp_path):
    two_rows.columns = ("with noise",)
    run = ablations.finished("flow_sde_ppo.py", 2)
    (run / "noise.json").write_text(json.dumps({"results": [{"success_rate": 0.7}, {"success_rate": 0.6}]}))
    a, b = table(two_rows, tmp_path, 1, 2).splitlines()[2:]
    assert "60.0%" in a and "not run" in b


def test_page_and_picture(two_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ABLATIONS", {"trial": two_rows})
    page = tmp_path / "page.md"
    page.write_text("<!-- ablation trial -->\n<!-- ablation trial end -->")
    ablations.main(ablations.Args(("trial",), only="tables", page=page))
    text = page.read_text()
    assert "![Trial](page/trial.png)" in text and "python flow_noise_ppo.py  # b" in text
    assert "Commit abc1234." in text and (tmp_path / "page/trial.png").stat().st_size > 1000
    ablations.main(ablations.Args(("trial",), only="tables", page=page))  # again: the same page
    assert page.read_text() == text


def test_report_columns(two_rows, tmp_path):
    two_rows.columns = ("SFT, with noise", "SFT, ODE", "expert's length")
    assert "seeds" not in table(two_rows, tmp_path, 1)  # nothing was trained
    assert "not run | not run | not run" in re.sub(" +", " ", table(two_rows, tmp_path, 1))
    file, _ = ablations.report_of("flow_sde_ppo.py")
    results = [{"success_rate": 0.32}, {"success_rate": 0.26}]
    file.write_text(json.dumps({"results": results, "expert_length": {"one": 10, "two": 13}}))
    assert "| 26.0% | 32.0% | 11.5 |" in re.sub(" +", " ", table(two_rows, tmp_path, 1))


# --- the leaderboard ---


def test_leaderboard(tmp_path, capsys, one_line_error):
    page = tmp_path / "page.md"
    args = leaderboard.Args((tmp_path / "a",), "abc", "here", page)
    assert "two marks" in one_line_error(leaderboard.main, args) or not page.exists()
    page.write_text("top\n\n<!-- leaderboard -->\n\n<!-- leaderboard end -->\n\nend\n")
    make_run(tmp_path / "a", [0.32, 0.6, 0.89, 0.9, 0.87])  # there after six iterations of a minute
    make_run(tmp_path / "b", [0.32, 0.95], noise_level=0.5, seed=2)
    make_run(tmp_path / "never", [0.32, 0.899])
    leaderboard.main(args)
    leaderboard.main(leaderboard.Args((tmp_path / "never", tmp_path / "b"), "def", "there", page))
    assert "never had 90%" in capsys.readouterr().out
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")][2:]
    launch = "torchrun --standalone --nproc_per_node=2 flow_sde_ppo.py"
    ends = "--eval-freq 2 --total-timesteps 4000"
    assert rows == [
        f"| 2.0 | 200 | 95.0% | `{launch} --seed 2 {ends} --noise-level 0.5` | def | there |",
        f"| 6.0 | 600 | 87.0% | `{launch} {ends}` | abc | here |",
    ]
    before = page.read_text()
    leaderboard.main(args)  # again: the same page
    assert page.read_text() == before and before.endswith("\n\nend\n")


def test_leaderboard_refuses(tmp_path, one_line_error):
    page = tmp_path / "page.md"
    page.write_text("<!-- leaderboard -->\n<!-- leaderboard end -->\n")
    run = make_run(tmp_path / "other", [0.95], env_id="libero_goal")
    assert "libero_goal" in one_line_error(leaderboard.main, leaderboard.Args((run,), "abc", "here", page))
    run = make_run(tmp_path / "old", [0.95], strange_flag=1)
    assert "as they are now" in one_line_error(
        leaderboard.main, leaderboard.Args((run,), "abc", "here", page)
    )
