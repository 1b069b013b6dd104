"""The layout of the project: what a stranger reads first."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACES = [
    "recon",
    *(f"recon.{name}" for name in "branching experiments maps models plans problems profiling training".split()),
]
NAMES = """BranchPlan ConflictMap Costs Epoch History Metric Problem Profiler Recorder Search Task Verification backward
convert costs delta_m errors evaluate extract_task inputs load lower methods plan profile save train verify""".split()


def folders(top):
    return [top, *(folder for folder in top.rglob("*") if folder.is_dir() and folder.name != "__pycache__")]


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize(("top", "most"), [("recon", 13), ("cli", 10)])
def test_a_listing_fits_on_a_screen(top, most):
    assert len(entries(ROOT / top)) <= most
    crowded = {str(folder): entries(folder) for folder in folders(ROOT / top) if len(entries(folder)) > 15}
    assert not crowded


@pytest.mark.parametrize("top", ["recon", "cli"])
def test_no_file_is_longer_than_300_lines(top):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / top).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 300} == {}


def test_every_package_is_packaged():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    packaged = re.findall(r'"([\w.]+)"', listed[1])
    inside = [folder.relative_to(ROOT).parts for top in ("recon", "cli") for folder in folders(ROOT / top)]
    assert sorted(packaged) == sorted(".".join(parts).replace("cli", "recon_cli", 1) for parts in inside)


@pytest.mark.parametrize("name", FACES)
def test_a_face_lists_what_it_gives(name):
    face = importlib.import_module(name)
    listed = ast.parse(Path(face.__file__).read_text())
    typed = {
        alias.asname or alias.name
        for block in listed.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    own = {statement.name for statement in listed.body if isinstance(statement, ast.FunctionDef)}
    assert set(face.__all__) == typed | {name for name in own if not name.startswith("_")}
    assert set(face.__all__) <= set(dir(face))
    assert all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(face, "no_such_" + "name")


def test_recon_keeps_its_public_names():
    recon = importlib.import_module("recon")
    assert set(NAMES) <= set(recon.__all__)


def test_no_module_bears_the_name_of_a_public_function():
    """Importing a module binds its name in its package, over the function."""
    for name in FACES:
        face = importlib.import_module(name)
        modules = {Path(entry).stem for entry in entries(Path(face.__file__).parent)}
        assert not modules & {public for public in face.__all__ if callable(getattr(face, public))}
