"""The three algorithm scripts as a user runs them: alike, reproducible, clear about mistakes; they learn."""

import ast
import csv
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import Silent, make_policy

import evaluate
import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
import flow_sft
from envs import make_envs
from flags import as_command, check_ranges, parse, read
from pi_models import TINY_POLICIES, load_policy, save_policy
from simulators.tabletop import Tabletop

ROOT = Path(__file__).resolve().parents[1]
THREE = flow_sde_ppo, flow_noise_ppo, flow_sde_grpo
GRPO = dict(num_envs=6, group_size=3, num_steps=8)
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if '__name__ == "__main__"' in p.read_text())
SCRIPTS.remove("envs.py")
METRICS = {
    "charts": ["episodic_return", "episodic_length", "success_once", "learning_rate", "SPS"],
    "losses": ["policy_loss", "entropy", "approx_kl", "clipfrac"],
    "flow": ["std_mean", "exploration", "grad_norm", "refused_steps"],
    "eval": ["success_rate"],
    "time": ["rollout", "encode", "update"],
}
CRITIC = {"losses/value_loss", "losses/explained_variance"}
GROUPS = {"losses/reference_kl", "charts/groups_all_solved", "charts/groups_none_solved"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained policy: enough to see that the loop does what it says."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_policy(make_policy(), folder)
    return str(folder)


def train(run_dir, checkpoint, script=flow_sde_ppo, **changed):
    """Two iterations, in which every episode reaches its end; the folder and the rows of its metrics.csv."""
    small = dict(num_envs=6, num_steps=12, total_timesteps=361, critic_warmup=1)
    small = GRPO | dict(total_timesteps=241) if script is flow_sde_grpo else small
    small |= dict(env_id="tabletop_press_button", eval_freq=0, save_model=False, update_epochs=2)
    args = dataclasses.replace(script.Args(), checkpoint=checkpoint, run_dir=str(run_dir), **small | changed)
    script.main(args)
    (folder,) = Path(run_dir).iterdir()
    with open(folder / "metrics.csv") as file:
        return args, folder, list(csv.DictReader(file))


def curve(rows):
    """What has to be the same every time."""
    timed = "charts/SPS", "eval/success_rate"
    return [{k: v for k, v in row.items() if k not in timed and not k.startswith("time/")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, changed",
    [
        (flow_sde_ppo, {}),
        (flow_sde_ppo, dict(critic="expert", mdp="two-layer", partial_reset=False, sde_solver="cps")),
        (flow_sde_ppo, dict(noise="learned")),
        (flow_noise_ppo, dict(critic="expert", logprob_reduction="mean")),
        (flow_sde_grpo, dict(kl_coef=0.1)),
    ],
)
def test_same_seed_same_curve(tmp_path, checkpoint, script, changed):
    runs = dict(first={}, again={}, evaluated={"eval_freq": 1}, other={"seed": 2})
    curves = {
        name: curve(train(tmp_path / name, checkpoint, script, **changed | other)[2])
        for name, other in runs.items()
    }
    assert len(curves["first"]) == 2 and curves["first"][0] != curves["first"][1]
    assert curves["again"] == curves["first"] and curves["evaluated"] == curves["first"]
    assert curves["other"] != curves["first"]


@pytest.mark.parametrize("script", THREE, ids=lambda script: script.__name__)
def test_results(tmp_path, checkpoint, script):
    args, folder, rows = train(tmp_path, checkpoint, script, save_model=True, learning_rate=3e-3)
    parts = folder.name.split("__")
    assert parts[:3] == ["tabletop_press_button", script.__name__, "1"] and parts[3].isdigit()
    assert json.loads((folder / "args.json").read_text()) == dataclasses.asdict(args)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG") and any(
        folder.glob("events.*")
    )
    usual = {f"{part}/{name}" for part in METRICS for name in METRICS[part]}
    usual |= GROUPS if script is flow_sde_grpo else CRITIC
    assert rows[0].keys() == usual | {"iteration", "global_step"}
    assert all(float(row["charts/episodic_length"]) > 0 for row in rows)
    assert [int(row["iteration"]) for row in rows] == [1, 2]
    steps = [int(row["global_step"]) for row in rows]
    assert 0 < steps[0] < args.total_timesteps <= steps[1] < 2 * args.total_timesteps
    if script is not flow_sde_grpo:  # one iteration of critic warm-up
        assert [float(row["charts/learning_rate"]) for row in rows] == [0, 3e-3]

    policy = load_policy(folder / "checkpoint")
    before, after = load_policy(checkpoint).state_dict(), policy.state_dict()
    changed = {key.split(".")[0] for key in before if not before[key].equal(after[key])}
    assert (policy.noise_head is None) == (script is not flow_noise_ppo)
    assert (policy.value_head is None) == (script is flow_sde_grpo)
    assert "expert" in changed and not changed & {"vision_tower", "multi_modal_projector", "language_model"}
    policy.fit_prompts(["press the button"])
    result = script.evaluate(script.Agent(policy, args), make_envs(args.env_id, 50, 0, partial_reset=False))
    assert float(rows[-1]["eval/success_rate"]) == result["success"].mean()


@pytest.mark.slow
@pytest.mark.parametrize("script", THREE, ids=lambda script: script.__name__)
def test_learning_rate_rises(tmp_path, checkpoint, script):
    """To the full rate in lr_warmup iterations, which begin when the critic's warm-up is over."""
    changed = dict(lr_warmup=3, learning_rate=4e-3, total_timesteps=721, num_envs=2, num_minibatches=1)
    changed |= {"group_size": 2} if script is flow_sde_grpo else {}
    _, _, rows = train(tmp_path, checkpoint, script, **changed)
    rates = [float(row["charts/learning_rate"]) for row in rows]
    waits = script is not flow_sde_grpo
    assert rates[waits:] == pytest.approx([1e-3, 2e-3, 3e-3] + [4e-3] * (len(rates) - waits - 3))
    assert rates[:waits] == [0] * waits and len(rates) > 4


@pytest.mark.slow
@pytest.mark.parametrize("script", THREE, ids=lambda script: script.__name__)
def test_other_policies(tmp_path, script):
    """pi0.5 with its state in the prompt and a horizon that is longer than a chunk, in 64-pixel pictures."""
    sizes = dict(horizon=7, action_dim=6, state_dim=6, max_token_len=200, image_size=64, patch_size=16)
    save_policy(make_policy(variant="pi05", state_in_prompt=True, **sizes), tmp_path / "pi05")
    _, folder, rows = train(tmp_path / "run", str(tmp_path / "pi05"), script, save_model=True)
    assert len(rows) == 2 and load_policy(folder / "checkpoint").config.variant == "pi05"


def test_video(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(Tabletop, "max_episode_steps", 10)  # pictures take time
    _, folder, _ = train(tmp_path, checkpoint, capture_video=True, total_timesteps=360)
    assert [f.read_bytes()[:6] for f in folder.glob("*.gif")] == [b"GIF89a"] * 2  # before and after


MISTAKES = {  # what: (flags, what the message has to say)
    "unknown environment": ("--env-id tabletop_open_drawr", ["tabletop_open_drawr", "tabletop_open_drawer"]),
    "no checkpoint": ("--checkpoint {tmp}/nowhere", ["nowhere", "does not exist"]),
    "another architecture": ("--checkpoint {tmp}/other", ["architecture", "depth is 2 and not 3"]),
    "no environments": ("--num-envs 0", ["--num-envs"]),
    "fewer than none": ("--num-envs -4", ["--num-envs"]),
    "another robot": ("--checkpoint {tmp}/robot", ["4 numbers of state and 4 of action", "4 and 3"]),
    "no chunks": ("--num-steps 0", ["--num-steps"]),
    "no denoise steps": ("--denoise-steps 0", ["--denoise-steps"]),
    "CPS with nothing but its last step": ("--denoise-steps 1 --sde-solver cps", ["--denoise-steps", "cps"]),
    "negative noise": ("--noise-level -1", ["--noise-level"]),
    "no noise": ("--noise-level 0", ["--noise-level"]),
    "longer than the horizon": ("--chunk-len 6", ["--chunk-len 6", "5"]),
    "empty chunks": ("--chunk-len 0", ["--chunk-len"]),
    "no whole episode": ("--no-partial-reset", ["--num-steps 4", "40"]),
    "longer episodes": ("--max-episode-steps 41", ["--max-episode-steps 41", "tabletop", "40"]),
    "uneven minibatches": ("--num-envs 3 --num-steps 1 --num-minibatches 2", ["minibatches", "3 "]),
    "no minibatches": ("--num-minibatches 0", ["--num-minibatches"]),
    "a discount above one": ("--gamma 2", ["--gamma must be from 0 to 1, not 2.0"]),
    "negative clipping": ("--clip-coef -1", ["--clip-coef must be above 0 and at most 1, not -1.0"]),
    "a rate that is no number": ("--learning-rate nan", ["--learning-rate", "nan"]),
    "an infinite rate": ("--critic-learning-rate inf", ["--critic-learning-rate", "inf"]),
    "a negative limit": ("--max-grad-norm -1", ["--max-grad-norm must be above 0"]),
    "a deep critic": ("--critic-layers 20", ["--critic-layers must be from 1 to 9, not 20"]),
    "noise that is no number": ("--noise-level nan", ["--noise-level", "nan"]),
    "bounds that are no numbers": ("--noise-std-max nan", ["--noise-std-max", "nan"]),
    "a negative seed": ("--seed -1", ["--seed"]),
    "no rank": ("--train expert+lora --lora-rank 0", ["--lora-rank"]),
    "below never": ("--eval-freq -5", ["--eval-freq must be from -1"]),
    "nowhere": ("--run-dir= ", ["--run-dir must not be empty"]),
    "a name that leaves its folder": ("--exp-name ../../x", ["--exp-name ../../x", "not a path"]),
    "no name": ("--exp-name= ", ["--exp-name must not be empty"]),
    "a long path": ("--checkpoint " + "x" * 300, ["--checkpoint xxx", "too long"]),
    "negative micro batch": ("--micro-batch-size -1", ["--micro-batch-size"]),
    "negative warm-up": ("--lr-warmup -1", ["--lr-warmup"]),
    "no epochs": ("--update-epochs 0", ["--update-epochs"]),
    "no critic": ("--critic-layers 0", ["--critic-layers"]),
    "no threads": ("--num-threads 0", ["--num-threads"]),
    "never saved": ("--save-model --save-freq 0", ["--save-freq"]),
    "no steps": ("--total-timesteps 0", ["--total-timesteps"]),
    "learned noise of no width": ("--noise learned --noise-std-min 0", ["--noise-std-min"]),
    "bounds of noise in the wrong order": ("--noise-std-min 0.7", ["--noise-std-min", "--noise-std-max"]),
    "a file in the way": ("--run-dir {tmp}/file", ["--run-dir", "file"]),
}  # fmt: skip  # a table


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, checkpoint, mistake, one_line_error):
    """One line, exit code 2, before anything is written."""
    save_policy(load_policy(checkpoint), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"depth": 3}))
    (tmp_path / "file").write_text("")
    another = load_policy(checkpoint)
    another.fit_robot(4, 4)
    save_policy(another, tmp_path / "robot")
    before = sorted(tmp_path.rglob("*"))
    flags, says = MISTAKES[mistake]
    usual = ["--checkpoint", checkpoint, "--env-id", "tabletop_press_button", "--run-dir", f"{tmp_path}/runs"]
    usual += "--num-envs 2 --num-steps 4 --total-timesteps 80 --critic-warmup 0 --no-save-model".split()
    args = parse(flow_sde_ppo.Args, flow_sde_ppo.defaults, usual + flags.format(tmp=tmp_path).split())
    message = one_line_error(flow_sde_ppo.main, args)
    assert all(part in message for part in says), message
    assert sorted(tmp_path.rglob("*")) == before


EVERY = *THREE, flow_sft, evaluate
WORDS = {  # what tyro does not understand: (flags, what the message has to say)
    "unknown": ("--num-env 3", "--num-env, 3; did you mean --num-envs?"),
    "far from all": ("--qqq 3", "--qqq, 3 (--help"),
    "a word too many": ("--num-envs 3 4", "4"),
    "another type": ("--num-envs many", "--num-envs: invalid literal"),
    "another choice": ("--device tpu", "'tpu' for argument '--device'"),
    "no value": ("--num-envs", "Missing value for argument '--num-envs'"),
}


@pytest.mark.parametrize("script", EVERY, ids=lambda script: script.__name__)
@pytest.mark.parametrize("words", WORDS)
def test_words_that_are_not_understood(words, script, one_line_error):
    flags, says = WORDS[words]
    ask = (parse, script.Args, script.defaults) if script in THREE else (read, script.Args)
    assert says in one_line_error(*ask, flags.split())


@pytest.mark.parametrize("script", EVERY, ids=lambda script: script.__name__)
def test_every_number_has_a_range(script, one_line_error):
    """The defaults are inside, infinity is not."""
    check_ranges(script.Args())
    for field in dataclasses.fields(script.Args):
        if re.search(r"\b(int|float)\b", str(field.type)):
            for wrong in (float("nan"), float("inf"), -float("inf"), -2):
                value = (wrong,) if "tuple" in str(field.type) else wrong
                args = dataclasses.replace(script.Args(), **{field.name: value})
                assert f"--{field.name.replace('_', '-')} must be" in one_line_error(check_ranges, args)


def test_rows_of_the_paper_pass():
    paper = tomllib.loads((ROOT / "paper.toml").read_text())
    rows = [(model, name) for model in paper for name in paper[model] if name != "all"]
    for script in THREE:
        for model, name in rows:
            check_ranges(script.defaults(name, model))
    assert len(rows) > 10


NOTHING = {  # flags that do nothing where they stand: (script, flags, what the message has to say)
    "rank of no adapters": (flow_sde_ppo, "--lora-rank 8", "--lora-rank has no effect"),
    "never saved": (flow_noise_ppo, "--no-save-model --save-freq 5", "--save-freq has no effect"),
    "never filmed": (flow_sde_grpo, "--capture-video --eval-freq -1", "--capture-video has no effect"),
    "numbers for pictures": (flow_sde_ppo, "--obs-mode state", "--obs-mode has no effect on the tabletop"),
    "its limits": (flow_sde_ppo, "--eval-protocol openpi", "--eval-protocol has no effect"),
    "the same seed": (evaluate, "--seeds 0 0 0", "--seeds: each only once"),
    "evaluated as numbers": (evaluate, "--obs-mode state", "--obs-mode has no effect on the tabletop"),
    "a negative seed": (evaluate, "--seeds 0 -1", "--seeds must be from 0"),
    "steps of stage 0": (flow_sft, "--vlm-steps 5", "--vlm-steps has no effect without --pretrain"),
    "corrections of stage 0": (flow_sft, "--corrections", "--corrections has no effect without --pretrain"),
    "a stride of nothing": (flow_sft, "--pretrain --play-stride 0", "--play-stride must be"),
    "demonstrations of stage 1": (flow_sft, "--pretrain --num-demos 7", "--num-demos has no effect with"),
    "no expert": (flow_sft, "--env-id libero_goal", "libero_goal has no scripted expert"),
    "another policy": (flow_sft, "--pretrain --checkpoint checkpoints/tiny", "makes tiny or tiny-gr00t only"),
    "elsewhere": (flow_sft, "--env-id libero_goal --pretrain", "--pretrain: tabletop, MetaWorld"),
    "half a patch": (flow_sft, "--pretrain --image-size 36", "must be a multiple of --patch-size"),
    "a file in the way": (flow_sft, "--output {tmp}/file", "file also has a file of this name"),
    "below a file": (flow_sft, "--output {tmp}/file/x", "cannot be written"),
    "a folder of others": (flow_sft, "--output {tmp}/folder", "folder also has mine.txt"),
    "a long output": (flow_sft, "--output {tmp}/" + "x" * 300, "too long"),
    "no demonstrations": (flow_sft, "--num-demos 0", "--num-demos must be"),
}  # fmt: skip  # a table


@pytest.mark.parametrize("mistake", NOTHING)
def test_no_effect(tmp_path, mistake, one_line_error):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    script, flags, says = NOTHING[mistake]
    ask = (parse, script.Args, script.defaults) if script in THREE else (read, script.Args)
    message = one_line_error(
        lambda words: script.main(ask[0](*ask[1:], words)), flags.format(tmp=tmp_path).split()
    )
    assert says in message and sorted(tmp_path.rglob("*")) == before, message


def test_mistake_in_a_shell(tmp_path):
    """The whole process: nothing else on stderr, such as a traceback or a library's warning."""
    command = [sys.executable, ROOT / "flow_sde_ppo.py", "--checkpoint", "nowhere", "--run-dir", "runs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, script
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_help():
    """Every flag and its line, in the groups of Args, without any simulator."""
    done = subprocess.run([sys.executable, "-c", HELP, *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *text, modules = done.stdout.splitlines()
    assert "flow_sde_ppo.py" in SCRIPTS and sum("usage:" in line for line in text) == len(SCRIPTS)
    for field in (field for script in THREE for field in dataclasses.fields(script.Args)):
        flag = "--" + field.name.replace("_", "-")
        assert any(re.search(rf"{flag}[ ,]", line) for line in text), flag
    titles = [m[1] for line in text if (m := re.match(r"╭─ (\w+) options ─", line))]
    assert titles == ["experiment", "environment", "optimisation", "algorithm"] * 3
    simulators = {"mujoco", "sapien", "robosuite", "libero", "mani_skill", "metaworld", "calvin_env", "gym"}
    assert not simulators & set(modules.split())


@pytest.mark.parametrize("script", THREE, ids=lambda script: script.__name__)
def test_printed_command_runs(tmp_path, checkpoint, script, capsys):
    """The resolved flags, read again as a shell would, are the same Args, whatever the defaults are then."""
    args, *_ = train(
        tmp_path / "a run", checkpoint, script, total_timesteps=1, target_kl=0.5, update_epochs=1
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("python "))
    interpreter, name, *words = shlex.split(line)
    assert (interpreter, name) == ("python", Path(script.__file__).name)
    assert parse(script.Args, lambda **_: script.Args(seed=77, noise_level=0.3), words) == args
    assert (
        parse(script.Args, script.defaults, shlex.split(as_command("x.py", script.Args()))[2:])
        == script.Args()
    )


def test_flags_go_before_the_paper():
    """--env-id and --model choose the defaults, wherever they stand in the command."""
    args = parse(
        flow_sde_ppo.Args, flow_sde_ppo.defaults, "--num-envs 8 --env-id libero_goal --model=pi05".split()
    )
    assert (args.num_envs, args.num_steps, args.denoise_steps, args.model) == (8, 512, 5, "pi05")
    row = flow_sde_ppo.defaults("libero_goal", "pi05")
    assert args == dataclasses.replace(row, num_envs=8, env_id="libero_goal", model="pi05")


def test_paper_rows():
    """Numbers of the paper's Tables 7 and 8, typed from there once more."""
    row = flow_sde_ppo.defaults("libero_goal", "pi05")
    assert (row.num_envs, row.num_steps * row.chunk_len, row.chunk_len) == (64, 8 * 320, 5)
    assert row.num_envs * row.num_steps / row.num_minibatches == 2048 and row.update_epochs == 3
    assert (row.learning_rate, row.critic_learning_rate) == (5e-6, 1e-4)
    assert (row.gamma, row.gae_lambda) == (0.99, 0.95)
    assert (row.denoise_steps, row.noise_level, row.clip_coef, row.critic) == (5, 0.3, 0.2, "vlm")
    assert row.checkpoint == "RLinf/RLinf-Pi05-LIBERO-SFT" and row.lr_schedule == "constant"
    long = flow_noise_ppo.defaults("libero_10", "pi05")
    assert (long.lr_schedule, long.chunk_len, long.num_steps * long.chunk_len) == ("cosine", 10, 8 * 480)
    assert (long.noise_std_min, long.noise_std_max, long.ent_coef) == (0.04, 0.10, 0.005)
    spatial = flow_sde_ppo.defaults("libero_spatial", "pi0")
    assert (spatial.learning_rate, spatial.update_epochs, spatial.critic) == (1e-5, 2, "expert")
    assert (spatial.noise_std_min, spatial.noise_std_max, spatial.denoise_steps) == (0.08, 0.16, 4)
    assert spatial.total_timesteps == 400 * 64 * 8 * 240
    for suite in ("spatial", "object", "goal", "10"):  # Appendix C: pi0's, without further tuning
        pi0, groot = (
            dataclasses.asdict(flow_sde_ppo.defaults(f"libero_{suite}", m)) for m in ("pi0", "gr00t")
        )
        assert groot.pop("checkpoint") == f"RLinf/RLinf-Gr00t-SFT-{suite.capitalize()}"
        assert pi0.pop("checkpoint") and groot == pi0 and groot["critic"] == "expert"
    carrot = flow_sde_grpo.defaults("maniskill_carrot", "pi0")
    assert (carrot.num_envs, carrot.num_envs * carrot.num_steps, carrot.learning_rate) == (256, 2560, 5.6e-6)
    cube = flow_sde_ppo.defaults("maniskill_cube", "pi0")
    assert cube.total_timesteps == 130 * 2560 * 5 and cube.critic_learning_rate == 1.1e-4
    for model, epochs in (("pi0", 4), ("pi05", 5)):
        row = flow_sde_ppo.defaults("maniskill_25main", model)
        assert (row.num_envs, row.num_envs * row.num_steps, row.num_minibatches) == (320, 5120, 1)
        assert (row.learning_rate, row.critic_learning_rate, row.update_epochs) == (7.91e-6, 1.55e-4, epochs)
        assert row.total_timesteps == 150 * 5120 * 5
    assert flow_sde_ppo.defaults("metaworld_push", "pi0").checkpoint == "RLinf/RLinf-Pi0-MetaWorld-SFT"
    limits = {name: flow_sde_ppo.defaults(name, "pi05").bootstrap for name in ("libero_10", "maniskill_cube")}
    assert limits == {"libero_10": False, "maniskill_cube": True}
    assert flow_sde_ppo.defaults("tabletop", "pi0") == flow_sde_ppo.Args()
    for env_id in ("maniskill:PickCube-v1", "libero_90"):  # no row: a checkpoint has to be given
        assert flow_sde_ppo.defaults(env_id, "pi0").checkpoint == ""


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_pretrain(tmp_path, monkeypatch, name):
    """Stage 0 from end to end, in a few steps: where it is not blind it writes a policy, else nothing."""
    monkeypatch.setattr(flow_sft, "tqdm", lambda steps, **_: Silent(steps))
    few = dict(
        pretrain=True,
        checkpoint=name,
        vlm_steps=3,
        play_steps=2,
        play_episodes=1,
        batch_size=8,
        env_id="tabletop_press_button",
    )
    with pytest.raises(SystemExit):
        flow_sft.main(flow_sft.Args(**few, output=str(tmp_path / "stuck")))
    assert not list(tmp_path.iterdir())
    real = flow_sft.pretrain_vlm
    monkeypatch.setattr(flow_sft, "pretrain_vlm", lambda *args: real(*args) * 0)  # errors of 0
    flow_sft.main(flow_sft.Args(**few, output=str(tmp_path / "tiny")))
    policy, shipped = load_policy(tmp_path / "tiny"), load_policy(name)
    assert policy.config == shipped.config and policy.value_head is None
    assert all(not p.equal(q) for p, q in zip(policy.parameters(), shipped.parameters()) if p.std() > 0)


@pytest.mark.slow
def test_learns(tmp_path):
    """A real run from the shipped policy on one instruction; 200 episodes by the ODE before and after."""
    start = str(ROOT / "checkpoints" / "tabletop-sft")
    changed = dict(env_id="tabletop_red_plate", num_envs=128, num_steps=8, total_timesteps=14 * 5120)
    changed |= dict(learning_rate=1e-4, update_epochs=4, save_model=True)
    args, folder, _ = train(tmp_path, start, **changed)
    envs, success = make_envs(args.env_id, 50, 0, partial_reset=False), []
    for where in (start, folder / "checkpoint"):
        policy = load_policy(where)
        policy.fit_prompts(envs.prompts)
        agent = flow_sde_ppo.Agent(policy, args)
        runs = [flow_sde_ppo.evaluate(agent, envs, seed=seed)["success"] for seed in range(4)]
        success.append(np.mean(runs))
    assert success[1] > success[0] + 0.08, success


# --- siblings ---


def flags(script):
    """{name: (type and default, help)} of a script's Args, as they are written."""
    field = r'^    (\w+): (.+?)(?:  # (.+)|\n    """(.+)""")$'
    found = re.findall(field, inspect.getsource(script.Args), re.MULTILINE)
    return {name: (written, comment or text) for name, written, comment, text in found}


def test_flags_are_alike():
    """A flag that two scripts have means the same and has the same default, except which noise is theirs and,
    as GRPO compares whole episodes, how large an iteration is."""
    sde, noise, grpo = map(flags, THREE)
    for script in THREE:  # every flag has its line of help
        assert flags(script).keys() == {field.name for field in dataclasses.fields(script.Args)}
    sde["noise"] = noise["noise"] = grpo["noise"] = None
    for name in ("num_envs", "num_steps", "update_epochs"):
        assert sde[name] == noise[name] != grpo[name] and sde[name][1] == grpo[name][1]
        grpo[name] = sde[name]
    for a, b in ((sde, noise), (sde, grpo), (noise, grpo)):
        assert {k: a[k] for k in a.keys() & b.keys()} == {k: b[k] for k in a.keys() & b.keys()}
    assert noise.keys() - sde.keys() == {"logprob_reduction", "ent_coef"}
    assert sde.keys() - noise.keys() == {"sde_solver", "noisy_last_step", "mdp"}
    assert grpo.keys() - sde.keys() == {"group_size", "kl_coef"}
    critic = {"critic", "critic_layers", "critic_learning_rate", "critic_warmup", "clip_vloss"}
    assert sde.keys() - grpo.keys() == critic | {"gamma", "gae_lambda", "bootstrap", "partial_reset"}


@pytest.mark.parametrize("other, budget", [(flow_noise_ppo, 80), (flow_sde_grpo, 120)])
def test_the_diff_is_the_explanation(other, budget):
    """So it has to be short, and in both files the sections come in the same order."""
    paths = [flow_sde_ppo.__file__, other.__file__]
    diff = subprocess.run(["diff", *paths], capture_output=True, text=True).stdout
    changed = [line for line in diff.splitlines() if line[0] in "<>"]
    assert 0 < len(changed) <= budget
    shown = f"<!-- diff flow_sde_ppo.py {Path(other.__file__).name} -->\n\n```diff\n{diff}```\n"
    assert shown in (ROOT / "docs" / "diffs.md").read_text(), "make diffs writes docs/diffs.md anew"
    names = [[n.name for n in ast.parse(Path(p).read_text()).body if hasattr(n, "name")] for p in paths]
    order = [name for name in names[0] if name in names[1]]
    assert order == [name for name in names[1] if name in names[0]]
    sections = ["Args", "defaults", "transition", "log_prob", "Agent", "now", "rollout", "compute_advantages"]
    assert order == [*sections, "update", "evaluate", "check", "main"]


def test_budgets():
    """Lines of the files, of each script's `main`, and of the README; a longer one needs a simpler design."""
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in ROOT.glob("[!.]*/*.py")}
    lines = {name: n for name, n in lines.items() if name.startswith("simulators")}
    lines |= {p.name: len(p.read_text().splitlines()) for p in [*ROOT.glob("*.py"), ROOT / "README.md"]}
    budgets = {
        "pi_models.py": 750,
        "gr00t_models.py": 500,
        "layouts.py": 450,
        "envs.py": 350,
        "vector_envs.py": 350,
        "batch_envs.py": 150,
        "processes.py": 200,
        "flow_sft.py": 350,
        "evaluate.py": 350,
        "reports.py": 250,
        "cards.py": 150,
        "flags.py": 240,
        "ranks.py": 100,
        "runs.py": 300,
    }
    budgets |= {Path(script.__file__).name: 540 for script in THREE} | {"README.md": 260}
    budgets |= {name: 350 for name in lines if name.startswith("simulators")}
    assert lines.keys() == budgets.keys()
    assert all(lines[name] <= budgets[name] for name in lines), lines
    for script in THREE:
        assert len(inspect.getsource(script.main).splitlines()) <= 140, script


def test_formatter_is_skipped_for_a_reason():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]:
        for line in path.read_text().splitlines():
            assert not re.search(r"# fmt: (skip|off)$", line), f"{path.name}: {line}"
