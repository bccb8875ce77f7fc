"""Writes the diffs between the three algorithm scripts into docs/diffs.md, in place (make diffs)."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "diffs.md"


def section(first, second):
    """What stands on the page between its marker and the end of the code block."""
    diff = subprocess.run(["diff", first, second], capture_output=True, text=True, cwd=ROOT).stdout
    return f"<!-- diff {first} {second} -->\n\n```diff\n{diff}```\n"


if __name__ == "__main__":
    block = r"<!-- diff (\S+) (\S+) -->\n\n```diff\n.*?\n```\n"
    PAGE.write_text(re.sub(block, lambda found: section(*found.groups()), PAGE.read_text(), flags=re.DOTALL))
