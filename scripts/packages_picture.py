"""docs/pictures/packages.svg: the packages of recon from top to bottom, by the import contract in pyproject.toml.

python scripts/packages_picture.py        writes the picture anew, after a change of the contract
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "pictures" / "packages.svg"

WIDTH, HEIGHT, GAP, MARGIN = 880, 68, 16, 12
LETTERS = WIDTH / 7.4
"""So many letters of the small text fill the picture's width."""


def layers() -> list[list[str]]:
    """The packages of `recon`, in layers from top to bottom."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'containers = \["recon"\]\s*layers = (\[.*?\n\])', text, re.DOTALL)
    if found is None:
        raise SystemExit("pyproject.toml has no contract of layers for the container 'recon'.")
    return [[name.strip() for name in layer.split("|")] for layer in ast.literal_eval(found[1])]


def summary(folder: Path) -> str:
    """The first sentence of a package's docstring, or of a file's."""
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.) ", " ".join(text.split()))[0].rstrip(".")


def draw() -> str:
    """The picture."""
    rows = [[("recon_cli (the folder cli)", summary(ROOT / "cli"))]]
    rows += [[(name, summary(ROOT / "recon" / name)) for name in layer] for layer in layers()]
    height = len(rows) * (HEIGHT + GAP) - GAP + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The packages of recon: one imports those below it, never one above or beside it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, row in enumerate(rows):
        width = (WIDTH - 2 * MARGIN - (len(row) - 1) * GAP) / len(row)
        top = MARGIN + number * (HEIGHT + GAP)
        for column, (name, text) in enumerate(row):
            parts += _box(MARGIN + column * (width + GAP), top, width, name, text, command_line=not number)
        if number + 1 < len(rows):
            x, y = WIDTH / 2, top + HEIGHT + 3
            parts.append(f'<path d="M{x - 7:g} {y:g}h14l-7 10z" fill="#5f6b6d"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(x: float, y: float, width: float, name: str, text: str, command_line: bool) -> list[str]:
    fill = "#fff3e0" if command_line else "#e0f2f1"
    lines = textwrap.wrap(text, int(LETTERS * (width - 20) / WIDTH), max_lines=2, placeholder=" ...")
    middle = x + width / 2
    box = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="#5f6b6d"/>'
    title = f'<text x="{middle:g}" y="{y + 24:g}" font-size="16" font-weight="bold" text-anchor="middle">{name}</text>'
    small = [
        f'<text x="{middle:g}" y="{y + 44 + 17 * i:g}" font-size="13" text-anchor="middle">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    return [box, title, *small]


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    sys.stderr.write(f"Wrote {PICTURE.relative_to(ROOT)}.\n")
