"""Every command that the README and docs show is run here with small numbers, or it says below where else."""

import re
import shlex
from pathlib import Path

import pytest
import tyro
from conftest import make_policy

import evaluate
import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
from flags import parse
from pi_models import save_policy
from simulators import tabletop

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("checkpoints/*/README.md")]
ALGORITHMS = {Path(s.__file__).name: s for s in (flow_sde_ppo, flow_noise_ppo, flow_sde_grpo)}
ELSEWHERE = {  # what a command begins with: where else it is run, or why it is not
    "git clone": "the README's first command, from nothing",
    "source .venv": "a shell's own",
    "python3 -m venv": "make install does it",
    "pip install": "make install does it",
    "make": "test_make.py",
    "bash benchmark/": "hours",
    "JOBS=2 bash benchmark/": "hours",
    "GRPO=": "hours",
    "PRETRAIN=1 bash benchmark/": "half an hour",
    "OMP_NUM_THREADS=1 python benchmark/throughput.py": "minutes",
    "python benchmark/": "test_benchmark.py, or minutes",
    "python envs.py --check": "make check",
    "torchrun": "test_ranks.py, or needs several GPUs",
    "python flow_sft.py": "test_sft.py, or minutes",
    "python flow_sde_ppo.py --env-id metaworld": "test_metaworld.py",
    "python evaluate.py --env-id libero_goal": "needs a checkpoint that is not here",
    "python evaluate.py --env-id maniskill_25main": "needs a checkpoint that is not here; test_evaluate.py",
    "python evaluate.py --env-id calvin_d": "needs a checkpoint that is not here; test_calvin.py",
    "python evaluate.py --env-id mine": "test_docs.py",
    "python evaluate.py --checkpoints runs/<run>/checkpoint --upload": "test_cards.py",
    "python evaluate.py --device cuda": "needs a GPU",
    "python flow_sde_ppo.py --device cuda --env-id": "needs a GPU",
    "python flow_sde_ppo.py --resume": "test_runs.py",
}


def commands():
    """{command: its page} of all bash blocks; lines that end in a backslash joined, comments off."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            block = re.sub(r'^python -c "\n.*?"\n', "", block, flags=re.MULTILINE | re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(re.sub(r"(^|\s+)#.*", "", line).split())
                if command:
                    found.setdefault(command, page.name)
    return found


HERE = {c: page for c, page in commands().items() if not c.startswith(tuple(ELSEWHERE))}
MISTAKES = [c for c, page in HERE.items() if page == "troubleshooting.md"]
TRAINING = [c for c in HERE if c not in MISTAKES and c.split()[1] in ALGORITHMS]
EVALUATION = [c for c in HERE if c not in MISTAKES and c.split()[1] == "evaluate.py"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An untrained policy, with a noise head."""
    folder, policy = tmp_path_factory.mktemp("start"), make_policy()
    policy.need_noise_head(0.2, 0.6)
    save_policy(policy, folder)
    return str(folder)


def test_each_is_known():
    assert len(TRAINING) > 20 and EVALUATION and MISTAKES
    assert set(HERE) == {*MISTAKES, *TRAINING, *EVALUATION}
    for beginning in ELSEWHERE:  # none is left behind
        assert any(command.startswith(beginning) for command in commands()), beginning


@pytest.mark.parametrize("command", TRAINING)
def test_training(command, start, tmp_path, monkeypatch):
    script, *flags = shlex.split(command.replace("runs/<run>/checkpoint", start))[1:]
    module = ALGORITHMS[script]
    if "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            parse(module.Args, module.defaults, flags)
        assert not stop.value.code
        return
    small = f"--env-id tabletop_press_button --checkpoint {start} --run-dir {tmp_path}"
    small += " --obs-mode rgb --device cpu"
    small += " --eval-freq -1 --num-envs 16 --num-steps 8 --total-timesteps 1 --update-epochs 1"
    module.main(parse(module.Args, module.defaults, flags + small.split()))
    (run,) = tmp_path.iterdir()
    assert (run / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", EVALUATION)
def test_evaluation(command, start, monkeypatch, capsys):
    monkeypatch.setattr(tabletop, "EVAL_STATES", 2)
    monkeypatch.setattr(tabletop.Tabletop, "max_episode_steps", 5)
    flags = shlex.split(command.replace("runs/<run>/checkpoint", start))[2:]
    evaluate.main(tyro.cli(evaluate.Args, args=flags))
    assert "Protocol: tabletop" in capsys.readouterr().out


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake(command, tmp_path, monkeypatch, one_line_error):
    monkeypatch.chdir(ROOT)
    script, *flags = shlex.split(command)[1:]
    module = ALGORITHMS[script]
    args = parse(module.Args, module.defaults, [*flags, "--run-dir", str(tmp_path)])
    one_line_error(module.main, args)
    assert not list(tmp_path.iterdir())
