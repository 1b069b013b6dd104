"""The tests have the same names in every process, or several processes could not share them out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_another_process_at_another_time_finds_the_same_tests(request):
    """With another hash seed, and in another second than this process: gzip and others write the time."""
    config = request.config
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    mine = [item.nodeid for item in request.session.items]
    files = sorted({name.partition("::")[0] for name in mine})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "--override-ini=addopts=", "-qp", "no:cacheprovider"]
        + (["-m", config.option.markexpr] if config.option.markexpr else [])
        + files,
        cwd=config.rootpath,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    theirs = [line for line in done.stdout.splitlines() if "::" in line]
    assert [name for name in mine if name not in set(theirs)] == []


def test_no_name_holds_what_a_terminal_cannot_show(request):
    """Long, binary or many-lined values get the name of their parameter (tests/conftest.py)."""
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if not name.isprintable() or "\\x" in name or len(name) > 200] == []


@pytest.mark.parametrize("value", [b"\x00\xff", 0.1 + 0.2, "two\nlines", "x" * 1000])
def test_such_values_have_names(value, request):
    assert request.node.name.endswith(("[2 bytes]", "[0.3]", "[value0]", "[value1]", "[value]"))
