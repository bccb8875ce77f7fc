"""Every target of the Makefile: with small numbers, or only what it would run where that is long."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
# the tests are inside of the last two; the others install, or take minutes
LONG = ["install", "apt", "libero-assets", "check", "test", "test-fast"]
installed = pytest.mark.skipif(not (ROOT / ".venv" / "installed").exists(), reason="tests run outside .venv")


def make(*words):
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.+)", MAKEFILE, re.MULTILINE)[1].split()
    listed = re.findall(r"^make (\S+) ", make("help").stdout, re.MULTILINE)
    assert sorted([*listed, "help"]) == sorted(targets) and make().stdout == make("help").stdout
    assert set(LONG) | {"help", "lint", "demo", "sft", "vlm", "diffs"} == set(targets)  # all are below


@pytest.mark.parametrize("target", LONG)
def test_long(target):
    done = make("-n", target)
    assert done.returncode == 0 and (done.stdout or target == "install")


def test_old_python(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    done = make("-B", f"PYTHON={tmp_path}/python3", ".venv/core")
    assert done.returncode and "error: " in done.stderr and "Python 3.11" in done.stderr


@installed
def test_lint():
    done = make("lint")
    assert done.returncode == 0, done.stdout


@installed
def test_diffs():
    before = (ROOT / "docs" / "diffs.md").read_text()
    assert make("diffs").returncode == 0 and (ROOT / "docs" / "diffs.md").read_text() == before


@installed
def test_demo():
    """A single iteration of RL, then both policies on all states."""
    before = set(ROOT.glob("runs/demo-*"))
    done = make("demo", "ARGS=--total-timesteps 1 --num-envs 16 --eval-freq -1 --update-epochs 1")
    assert done.returncode == 0, done.stderr
    (folder,) = set(ROOT.glob("runs/demo-*")) - before
    (run,) = folder.iterdir()
    try:
        assert "Protocol: tabletop" in done.stdout and done.stdout.strip().endswith("learning_curve.png")
        for name in ("learning_curve.png", "sft_rl.gif", "evaluation.json", "metrics.csv"):
            assert (run / name).stat().st_size > 0
    finally:
        subprocess.run(["rm", "-r", folder], check=True)


@installed
def test_sft(tmp_path):
    done = make("sft", f"ARGS=--total-steps 2 --num-demos 1 --output {tmp_path}/sft")
    assert done.returncode == 0 and (tmp_path / "sft" / "model.safetensors").is_file()


@installed
def test_vlm(tmp_path):
    """In so few steps it sees nothing, which it says, and saves nothing."""
    done = make("vlm", f"ARGS=--vlm-steps 2 --batch-size 8 --output {tmp_path}/tiny")
    assert done.returncode and "error: the VLM is stuck" in done.stderr and not list(tmp_path.iterdir())
