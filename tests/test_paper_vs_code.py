"""docs/paper_vs_code.md and the README's table of equations: what they name is there."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

from ablations import ABLATIONS  # noqa: E402

PAGES = ["docs/paper_vs_code.md", "docs/results/claims.md", "README.md"]
# a file, and behind the colon one or several of its names: `file.py`: `name`, `Class.method`
NAMED = re.compile(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)")


def names_of(text):
    """(file, name) of everything that a page names."""
    return [(file, name) for file, names in NAMED.findall(text) for name in re.findall(r"`([\w.]+)`", names)]


def defined(file):
    """Functions, classes and methods of a file, as Class.method."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def missing(text):
    return [
        f"{file}: {name}"
        for file, name in names_of(text)
        if not (ROOT / file).exists() or name not in defined(file)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page):
    assert missing((ROOT / page).read_text()) == []


def test_what_does_not_exist_is_found():
    text = "`flow_sde_ppo.py`: `transition`, `Agent.nothing`; `nowhere.py`: `main`; `flow_sft.py`: `Args`"
    assert missing(text) == ["flow_sde_ppo.py: Agent.nothing", "nowhere.py: main"]


def test_every_equation_figure_and_table_has_a_row():
    text = (ROOT / "docs/paper_vs_code.md").read_text()
    assert len(names_of(text)) > 40
    equations = set()
    for first, last in re.findall(r"^\| Eqs?\. (\d+)(?:, (\d+))?", text, re.MULTILINE):
        equations |= {int(first), int(last or first)}
    assert equations == set(range(1, 18))
    for number in (1, 2, 3, 4, 5, 6, 9, 10):  # 7 and 8 are section 5 of the page
        assert f"| Table {number}," in text
    for number in range(5, 16):
        assert re.search(rf"^\| .*Fig\. {number}\b", text, re.MULTILINE), number


def test_every_ablation_is_named_and_has_its_place():
    page = (ROOT / "docs/results/ablations.md").read_text()
    named = (ROOT / "docs/paper_vs_code.md").read_text()
    for name, ablation in ABLATIONS.items():
        assert f"| `{name}`" in named
        assert f"## {ablation.title}\n" in page
        assert page.count(f"<!-- ablation {name} -->") == page.count(f"<!-- ablation {name} end -->") == 1
    for picture in re.findall(r"\]\((ablations/[\w-]+\.png)\)", page):
        assert (ROOT / "docs/results" / picture).exists()
