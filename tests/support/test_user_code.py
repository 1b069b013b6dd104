"""Whose code a file holds, wherever in its package it lies; and the line that an error names."""

import os
import sysconfig

import pytest
import torch

import recon
import recon_cli
from recon.branching.fans.statement import where, where_raised
from recon.support.user_code import is_users, user_frame, user_line

RECON, CLI = recon.__path__[0], recon_cli.__path__[0]

OWN = [f"{RECON}/fan.py", f"{RECON}/a/b/c.py", f"{CLI}/main.py", f"{CLI}/a/b.py", torch.__file__, os.__file__]
TAKEN = [
    f"{RECON}/models/no_such_file.py",
    f"{RECON}/models/a/b.py",
    f"{RECON}/problems/a/b.py",
    f"{sysconfig.get_path('purelib')}/timm/models/vit.py",
    "<code without a file>",
]
USERS = ["/home/me/net.py", f"{RECON}_of_mine/net.py", f"{os.path.dirname(RECON)}/net.py", __file__]


def namespace(path):
    names = {"where": where}
    exec(compile("def fail():\n    1 / 0\n\ndef place():\n    return where()\n", path, "exec"), names)
    return names


@pytest.mark.parametrize("path", OWN)
def test_machinery(path):
    assert not is_users(path, installed=False) and not is_users(path, installed=True)
    place = namespace(path)["place"]()
    assert place.startswith(f" at {os.path.basename(__file__)}:")  # the line above, not that in the file


@pytest.mark.parametrize("path", TAKEN)
def test_code_that_users_run_but_did_not_write(path):
    assert is_users(path, installed=True) and not is_users(path, installed=False)
    assert namespace(path)["place"]() == f" at {os.path.basename(path)}:5, in place"


@pytest.mark.parametrize("path", USERS)
def test_users(path):
    assert is_users(path, installed=False) and is_users(path, installed=True)


@pytest.mark.parametrize("path", [*OWN, *TAKEN, *USERS])
def test_the_line_of_an_error(path):
    try:
        namespace(path)["fail"]()
    except ZeroDivisionError as error:
        inner = path in USERS
        frame = user_frame(error)
        assert (frame.filename, frame.name) == ((path, "fail") if inner else (__file__, "test_the_line_of_an_error"))
        assert user_line(error) == f" ({frame.filename}:{frame.lineno}, in {frame.name})"
        assert ("in fail" in where_raised(error)) == (path not in OWN)
