"""What MkDocs needs beside the pages in `docs/`: the reference, other files of the repository, and a last check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import command_line
import reference
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
COPIED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages that lie outside of `docs/`, because there is where one looks for them."""

_OUT = re.compile(r"\]\((?:\.\./)+(examples/[\w./-]+|[A-Z]+\.md)(#[^)]*)?\)")
_CODE = re.compile(r"^(```|~~~).*?^\1|\[[^\]\n]*\]\([^)]*\)|`(recon\.[\w.]+)`", re.DOTALL | re.MULTILINE)
_IN = re.compile(r"\]\((?:docs/)?([^):]+)\)")


def on_config(config: Any) -> Any:
    """Add the pages of the reference and of the examples to the navigation."""
    sections = {title: pages for entry in config["nav"] for title, pages in entry.items()}
    sections["Reference"] += [{"Command line": command_line.PAGE}]
    sections["Reference"] += [{page.package: page.path} for page in reference.pages()]
    sections["Examples"] += [{path.name: f"examples/{path.stem}.md"} for path in _examples()]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are made, and the examples."""
    found = reference.pages()
    made = {page.path: reference.markdown(page) for page in found}
    made["reference/index.md"] = reference.index(found)
    made[command_line.PAGE] = command_line.markdown()
    for source, target in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        made[target] = _IN.sub(lambda link: f"]({COPIED.get(link[1], link[1])})", text)
    for path in _examples():
        made[f"examples/{path.stem}.md"] = _example(path)
    for target, content in made.items():
        files.append(File.generated(config, target, content=content))
    return files


def _examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))


def _example(path: Path) -> str:
    return f"# examples/{path.name}\n\n~~~~python\n{path.read_text(encoding='utf-8')}~~~~\n"


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Let links out of `docs/` lead to the pages of the same files here, and public names to the reference."""
    up = "../" * page.file.src_uri.count("/")

    def link(found: re.Match[str]) -> str:
        target = COPIED.get(found[1], found[1].removesuffix(".py") + ".md")
        return f"]({up}{target}{found[2] or ''})"

    def name(found: re.Match[str]) -> str:
        known = places.get(found[2])
        return f"[{found[0]}]({up}{known})" if known else found[0]

    markdown = _OUT.sub(link, markdown)
    if page.file.src_uri.startswith(("reference/", "changelog")):
        return markdown
    listed = [entry for listing in reference.pages() for entry in listing.listed]
    places = {entry.public: entry.page if entry.is_module else f"{entry.page}#{entry.home}" for entry in listed}
    return _CODE.sub(name, markdown)


def on_post_build(*, config: Any) -> None:
    """Every public name must have its place in the site."""
    texts: dict[str, str] = {}
    for page, anchor in reference.documented(reference.pages()):
        path = Path(config["site_dir"], page.removesuffix(".md") + ".html")
        text = texts.setdefault(page, path.read_text(encoding="utf-8") if path.exists() else "")
        if f'id="{anchor}"' not in text:
            raise PluginError(f"The public name {anchor} is missing from {page}.")
