"""The pages of the documentation, and the code in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}


def blocks(page, language):
    """`(line number, code)` of each block of a language; other blocks are not meant to run."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [(PAGES[page].count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def with_blocks(language):
    return [page for page in PAGES if blocks(page, language)]


def command_lines(code):
    """The words of each command in a shell block; where some lines have a prompt, the others are output."""
    lines = code.splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    found = (shlex.split(line, comments=True) for line in prompted or lines)
    return [words for words in found if words]
