"""What `make` says where it cannot install, and what is installed.

The Pythons are shell scripts, which do what those of such machines do.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
case "$*" in
    *print*) echo {version} ;;
    *version_info*) exit {too_old} ;;
    *ensurepip*) exit {no_venv} ;;
    "-m venv --clear"*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "pip was here: $*" && test -z "$NO_NETWORK" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a clone, whose path has a space, with a Python of some kind; gives exit code and stderr."""
    folder = tmp_path / "a clone"
    (folder / "scripts").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "scripts/install.sh"):
        shutil.copy(ROOT / name, folder / name)

    def make(version="3.11.2", too_old=0, no_venv=0, no_network="", python="my python", target=".ready"):
        script = folder / "my python"
        script.write_text(PYTHON.format(version=version, too_old=too_old, no_venv=no_venv))
        script.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
        done = subprocess.run(
            ["make", f".venv/{target}", f"PYTHON=./{python}"],
            cwd=folder,
            env=environment | {"NO_NETWORK": no_network, "LC_ALL": "C"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == (folder / ".venv" / target).exists()
        return done.returncode, done.stderr

    return make


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (
            {"python": "nowhere"},
            "error: there is no ./nowhere here, but recon needs Python 3.10 or newer. Name",
        ),
        ({"version": "3.9.18", "too_old": 1}, "error: ./my python is Python 3.9.18, but recon needs 3.10 or newer."),
        ({"no_venv": 1}, "On Debian and Ubuntu they are the package python3.11-venv."),
    ],
    ids=["no Python", "an old Python", "no venv"],
)
def test_a_python_that_does_not_serve_is_refused_before_anything_is_made(make, tmp_path, machine, message):
    code, err = make(**machine)
    assert code != 0 and message in err and "Installing" not in err
    assert not (tmp_path / "a clone" / ".venv").exists()


def test_without_network_it_says_so_and_goes_on_later(make):
    code, err = make(no_network="1")
    assert code != 0 and "about 5 GB" in err and "check the network" in err and "run make again" in err
    code, err = make(python="nowhere")  # the environment is there, and enough
    assert code == 0 and "about 5 GB" in err and "error" not in err
    code, err = make()
    assert (code, err) == (0, "")  # nothing to do


def test_a_half_made_environment_is_made_again(make, tmp_path):
    half = tmp_path / "a clone" / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    half.symlink_to("/nowhere/python3")
    assert make()[0] == 0 and not half.is_symlink()


def test_an_installed_recon_has_all_of_its_files(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for folder in ("recon", "cli"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    installed = tmp_path / "installed"
    zipfile.ZipFile(next(wheels.iterdir())).extractall(installed)

    files = {path.relative_to(source) for path in source.glob("recon/**/*") if path.is_file()}
    found = {path.relative_to(installed) for path in installed.glob("recon/**/*") if path.is_file()}
    assert found == files
    read = "from recon.problems import paper; print(paper.__file__, paper.results('nyuv2', 'MTAN').number)"
    run = subprocess.run([sys.executable, "-c", read], cwd=installed, check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(installed / "recon" / "problems" / "paper.py"), "5"]


def test_the_documentation_installs_what_it_needs_beside_the_rest(make):
    code, err = make(target=".ready-for-docs")
    assert code == 0 and "about 5 GB" in err and "what 'docs' needs" in err
    assert make(target=".ready-for-docs") == (0, "")
