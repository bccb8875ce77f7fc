"""The notebooks run as they are shipped, asserts and all, and are shipped with what they print and draw."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


def run(*words):
    command = [sys.executable, ROOT / "benchmark/notebook.py", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def small(path, *sources):
    cells = [{"cell_type": "code", "metadata": {}, "source": [s], "outputs": []} for s in sources]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    done = run(path, "--no-write")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shipped_with_its_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum(output["output_type"] == "stream" for output in outputs) >= 5
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert sum("assert" in "".join(cell["source"]) for cell in cells) >= 5
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text())["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((path.parent / link).exists() for link in links)


def test_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["flow_noise", "flow_sde"]


def test_outputs_are_written(tmp_path):
    draws = "import matplotlib.pyplot as plt\nplt.plot([x, 1])\nprint('drawn')"
    path = small(tmp_path / "small.ipynb", "x = 2\nprint(x)\nprint('two')", draws, "x = x + 1")
    assert run(path).returncode == 0
    first, second, third = (cell["outputs"] for cell in code_cells(path))
    assert first[0]["text"] == ["2\n", "two\n"] and third == []
    assert second[0]["text"] == ["drawn\n"] and second[1]["data"]["image/png"].startswith("iVBOR")


def test_a_failing_assert_fails(tmp_path):
    path = small(tmp_path / "small.ipynb", "x = 1", "assert x == 2, 'not two'")
    before = path.read_text()
    done = run(path)
    assert done.returncode == 1 and "not two" in done.stderr and "cell 2" in done.stderr
    assert path.read_text() == before
