"""The documentation: links lead somewhere, and the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "checkpoints").rglob("*.md")])
FENCE = re.compile(r"^(```+).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def prose(page):
    """The text of a page without its blocks of code and formulas."""
    return FENCE.sub("", page.read_text())


def anchors(page):
    """What GitHub calls the headings of a page: lower case, without punctuation, hyphens for spaces."""
    found = []
    for title in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)  # of a link its text
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{repeated}" if repeated else name)
    return found


def broken_links(page):
    """Relative links and pictures of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            broken.append(f"{link}: no such heading")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title: `code`, *twice*\n\n## Twice\n\n## Twice\n\n"
        "[good](#a-title-code-twice) [good](#twice-1) [good](https://nowhere.example/x.md#y)\n"
        "[bad](#twice-2) ![bad](nowhere.png) `[code](nowhere.md)`\n\n```\n[code](nowhere.md)\n# code\n```\n"
        "[bad](#code)\n"
    )
    found = [line.split(":")[0] for line in broken_links(page)]
    assert found == ["#twice-2", "nowhere.png", "#code"]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 260
