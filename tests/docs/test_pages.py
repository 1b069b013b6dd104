"""What the pages say of the repository is so: names, files, links, verbs, methods."""

import importlib
import inspect
import re

import pytest

import recon
from recon_cli.main import VERBS, main
from scripts import packages_picture
from tests.docs.pages import PAGES, ROOT

NAME = re.compile(r"(?<![\w./-])recon((?:\.[A-Za-z_]\w*)+)")
FOLDERS = "recon|cli|tests|benchmarks|examples|scripts|artifacts|docs"
FILE = re.compile(rf"(?<![\w/])((?:{FOLDERS})/(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|json|md|toml))?)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
MADE = ("docs/reference/", "docs/contributing.md", "docs/changelog.md")  # by `make docs`


@pytest.mark.parametrize("page", PAGES)
def test_names_are_public(page):
    """Guides show what `__all__` lists, and never a module inside."""
    for path in set(NAME.findall(PAGES[page])):
        assert is_public(path.split(".")[1:]), f"recon{path}"


def is_public(names):
    owner = recon
    for name in names:
        if inspect.ismodule(owner):
            listed = getattr(owner, "__all__", None)
            if listed is not None and name not in listed and not is_face(owner, name):
                return False
            owner = getattr(owner, name, None) or importlib.import_module(f"{owner.__name__}.{name}")
        elif not hasattr(owner, name) and name not in getattr(owner, "__annotations__", {}):
            return False
        else:
            owner = getattr(owner, name, None)
    return True


def is_face(owner, name):
    """A package below that lists public names."""
    if not (ROOT / owner.__name__.replace(".", "/") / name / "__init__.py").exists():
        return False
    return bool(getattr(importlib.import_module(f"{owner.__name__}.{name}"), "__all__", None))


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    for path in set(FILE.findall(PAGES[page])):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_point_at_files(page):
    prose = re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(prose):
        target = ((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix()
        assert (ROOT / target).exists() or target.startswith(MADE), link


def test_the_readme_is_a_front_door():
    assert len(PAGES["README.md"].splitlines()) <= 150
    for verb in VERBS:
        assert re.search(rf"\b(recon|make) {verb}\b", PAGES["README.md"]), verb


def test_the_methods_table_is_that_of_the_registry(capsys):
    """After a change: `recon methods --markdown` prints the new one."""
    assert main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert table in PAGES["docs/method/gradient_methods.md"]
    for name in recon.methods.names():
        entry = recon.methods.entry(name)
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(part in line for part in (entry.title, entry.family, entry.scale, entry.paper, *entry.options))


def test_the_picture_of_the_packages_is_that_of_the_contract():
    """After a change: `python scripts/packages_picture.py` draws the new one."""
    assert packages_picture.PICTURE.read_text(encoding="utf-8") == packages_picture.draw()
