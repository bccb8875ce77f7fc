"""benchmark/faults.py in short: it tells the ends apart, and every mistake ends in a line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import faults  # noqa: E402

import evaluate  # noqa: E402
import flow_sde_ppo  # noqa: E402
from flags import fail  # noqa: E402


def test_ends_are_told_apart(monkeypatch):
    """Of functions whose end is known, and of command lines and a checkpoint without a mistake."""
    monkeypatch.chdir(ROOT)

    def lines(n):
        print("\n".join("abc"[:n]), file=sys.stderr)
        sys.exit(2)

    known = [
        (lambda: fail("no"), "refused"),
        (lambda: lines(2), "refused"),
        (lambda: lines(3), "longer"),
        (lambda: 1 / 0, "traceback"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed"),
        (lambda: None, "accepted"),
        (lambda: faults.load_and_look(ROOT / "checkpoints/tiny"), "accepted"),
        (lambda: faults.run_script(flow_sde_ppo, ["--no-save-model", "--run-dir", "/dev/null/x"]), "refused"),
        (lambda: faults.run_script(evaluate, ["--seeds", "3"]), "accepted"),
    ]
    for function, end in known:
        assert faults.attempt(function)[0] == end


@pytest.mark.parametrize("part, cases", [("checkpoints", 27), ("flags", 40)])
def test_all_are_refused(part, cases):
    """Except flipped bits that leave usual numbers."""
    rows = faults.table(part, cases, seed=1, verbose=True)
    assert sum(row["tried"] for row in rows.values()) == cases
    for what, row in rows.items():
        assert row["refused"] + row["unseen"] == row["tried"], (what, row)
        assert not row["unseen"] or what in ("bit of weight", "bit of text")


@pytest.mark.slow
@pytest.mark.parametrize("part, cases", [("kills", 3), ("disk", 1), ("nan", 2), ("ranks", 1)])
def test_broken_runs_end_as_if_they_were_not(part, cases):
    """In a process of its own: what other tests have left in this one would be in the forked runs too."""
    words = [sys.executable, "benchmark/faults.py", "--only", part, "--cases", str(cases), "--seed", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, everything = done.stdout.splitlines()
    assert everything.split("|")[1:] == [" **all** ", *[f" {cases} "] * 3, " 0 ", ""]
