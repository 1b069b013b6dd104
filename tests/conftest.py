import json
import os
import signal
import sys

# Threads that wait must not spin: two processes of two threads each on two cores would take five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import pytest
import torch

from recon_cli.main import main

# The tests' tensors are small: a second thread costs more than it brings, most of all on a busy machine. But they must
# pass with any number.
torch.set_num_threads(int(os.environ.get("RECON_TEST_THREADS", "1")))
# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = {"test_bench", "test_families", "test_lowering", "test_profiler_zoo", "test_torchrun"}


def pytest_collection_modifyitems(items):
    """The longest files first: two workers take one file after another, and are to end together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_make_parametrize_id(val, argname):
    """Names of tests are short, and the same in every process: bytes may hold the time, and a float its rounding."""
    if isinstance(val, bytes):
        return f"{len(val)} bytes"
    if isinstance(val, float):
        return f"{val:.6g}"
    if isinstance(val, str) and (len(val) > 100 or not val.isprintable()):
        return argname
    return None  # pytest's own


@pytest.fixture
def command(files, monkeypatch, capsys):
    """Runs a command line in the folder of the module's `files`; gives exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # importing a problem's file puts its folder there
    monkeypatch.chdir(files)
    capsys.readouterr()

    def command(line, *more):
        code = main([*line.split(), *map(str, more)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def ask(command):
    """Runs a command line that must succeed with --json; gives the object."""

    def ask(line, *more):
        code, out, err = command(line, *more, "--json")
        assert code == 0, (out, err)
        return json.loads(out)

    return ask


@pytest.fixture
def refused(command, files):
    """Checks that a command line is refused as wrong input, with certain words, and leaves no file."""

    def refused(line, words):
        before = _names(files)
        code, out, err = command(line)
        assert (code, out) == (2, "")
        assert words in err and "error: " in err and "Traceback" not in err
        code, out, _ = command(line, "--json")
        error = json.loads(out)["error"]
        assert code == 2
        assert words in error["message"] and error["type"].endswith("Error")
        assert _names(files) == before

    return refused


def _names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
