"""The documentation: links lead somewhere, and code that is shown runs."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs
from pi_models import load_policy

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


def code_after(page, marker):
    """The block of code that follows a marker in a page of docs/."""
    text = (ROOT / "docs" / page).read_text()
    return re.search(rf"<!-- {re.escape(marker)} -->\n\n```python\n(.*?)```", text, re.DOTALL)[1]


def test_environment_of_the_docs(tmp_path, monkeypatch):
    """The simulator of your_own_environment.md keeps the contract, and its expert solves it."""
    (tmp_path / "mine.py").write_text(code_after("your_own_environment.md", "simulators/mine.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(envs.SIMULATORS, "mine", "mine:Mine")
    for obs_mode, images, state in (("rgb", (8, 1, 32, 32, 3), (8, 2)), ("state", (8, 0, 1, 1, 3), (8, 6))):
        mine = envs.make_envs("mine", 8, 0, partial_reset=False, obs_mode=obs_mode)
        obs, _ = mine.reset(options={"eval_states": np.arange(46, 54)})  # of both tasks
        assert obs["images"].shape == images and obs["state"].shape == state
        assert obs["prompt"] == ["touch the red square"] * 4 + ["touch the blue square"] * 4
        for _ in range(mine.max_episode_steps):
            *_, info = mine.step_chunk(mine.expert_action()[:, None])
        assert info["success"].all()
        mine.close()


def test_demonstrations_of_the_docs(tmp_path, monkeypatch):
    """The script of your_own_demonstrations.md makes a policy of another robot from files."""
    rng = np.random.default_rng(0)
    for i in range(3):
        episode = {
            "images": rng.integers(0, 256, (6, 1, 32, 32, 3), np.uint8),
            "state": rng.normal(size=(6, 5)),
        }
        np.savez(tmp_path / f"{i}.npz", **episode, actions=rng.uniform(-1, 1, (6, 2)), prompt=f"task {i}")
    script = code_after("your_own_demonstrations.md", "demonstrations").replace("300, 3e-4", "2, 3e-4")
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path), str(tmp_path / "policy")])
    exec(compile(script, "your_own_demonstrations.md", "exec"), {})
    policy = load_policy(str(tmp_path / "policy"))
    assert (policy.config.state_dim, policy.env_action_dim) == (5, 2)
    actions = np.concatenate([np.load(tmp_path / f"{i}.npz")["actions"] for i in range(3)])
    np.testing.assert_allclose(policy.stats["actions"]["mean"], actions.mean(axis=0), atol=1e-6)
