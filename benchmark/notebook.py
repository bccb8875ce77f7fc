"""Runs a notebook without Jupyter, one cell after another, and writes what it printed and drew back into it.

python benchmark/notebook.py docs/flow_sde.ipynb docs/flow_noise.ipynb    # under two minutes each
python benchmark/notebook.py docs/flow_sde.ipynb --no-write               # only runs it, asserts and all
"""

import base64
import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro


@dataclass
class Args:
    notebooks: tyro.conf.Positional[tuple[Path, ...]]
    """files to run"""
    write: bool = True
    """keep the outputs in the file"""


def run_cell(source, names, name):
    """The outputs of a cell of code, as a notebook stores them: what it printed, then its figures."""
    printed, outputs = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), names)
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=60, bbox_inches="tight")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["a figure"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    plt.close("all")
    return outputs


def run(path, write):
    notebook, names = json.loads(path.read_text()), {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    here = os.getcwd()
    os.chdir(path.resolve().parent)  # where Jupyter starts a notebook
    for number, cell in enumerate(code, 1):
        cell["outputs"] = run_cell("".join(cell["source"]), names, f"{path.name}, cell {number}")
        cell["execution_count"] = number
    os.chdir(here)
    if write:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main(args):
    for path in args.notebooks:
        run(path, args.write)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
