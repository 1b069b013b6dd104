"""What is printed: safe for a terminal, of bounded length, in whatever encoding stdout has."""

import io
import json
import logging
import os
import sys

import pytest

from recon.branching.partition import Partition
from recon.errors import PlanError, ReconError, UnknownNameError, cut, printable, readable
from recon.maps.conflict_map import ConflictMap
from recon.support.tables import text_table
from recon_cli.main import main
from recon_cli.terminal import for_terminals, tell
from tests.maps.test_conflict_map import make_map

HOSTILE = "conv\x1b]0;owned\x07\x1b[2J\r\u202egnp.\x9b31m"
CONTROLS = [chr(code) for code in (*range(32), *range(127, 160), 0x202E, 0x200B, 0xDC80) if chr(code) != "\n"]


@pytest.fixture
def printed(monkeypatch):
    """Runs a command line with stdout and stderr of an encoding; gives exit code, stdout, stderr."""

    def printed(encoding, *argv):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", streams[0])
            patched.setattr(sys, "stderr", streams[1])
            code = main([str(word) for word in argv])
        for stream in streams:
            stream.flush()
        return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return printed


def test_control_characters_are_shown_escaped():
    shown = printable("".join(CONTROLS) + "ä\n×")
    assert shown.endswith("ä\n×") and shown.count("\n") == 1
    assert not any(control in shown for control in CONTROLS)
    assert printable("\x1b[31m\x85") == r"\x1b[31m\x85"
    assert printable("two\nlines", keep="") == r"two\nlines"


@pytest.mark.parametrize(
    "make", [ReconError, lambda text: UnknownNameError("layer", text, [text + "x"])], ids=["message", "unknown name"]
)
def test_errors_are_bounded_and_safe(make):
    for text in (HOSTILE, "a" * 10_000_000, HOSTILE * 100_000, "two words " * 1_000_000):
        message = str(make(text))
        assert len(message) <= 4000
        assert not any(control in message for control in CONTROLS)


def test_a_short_message_is_left_alone_and_a_long_one_keeps_its_end():
    assert str(ReconError("No file /a/b.\nTry c.")) == "No file /a/b.\nTry c."
    message = str(ReconError("Groups " + ", ".join(f"task{i}" for i in range(100_000)) + " overlap. Split them."))
    assert message.startswith("Groups task0, task1") and message.endswith("overlap. Split them.") and " ... " in message
    assert readable(message) == message
    assert cut("abc", 3) == "abc" and len(cut("a" * 100, 20)) == 20


def test_a_hundred_thousand_groups_are_cut():
    tasks = [f"task{i}" for i in range(100_000)]
    with pytest.raises(PlanError, match="leave out") as error:
        Partition.of_groups([[task] for task in tasks[1:]], tasks)
    assert len(str(error.value)) <= 4000


def test_a_table_is_no_wider_than_its_terminal_can_bear():
    table = text_table(["layer", "score"], [["a" * 10_000, "3"], ["x\ny\x1b[2J", "4"]])
    assert max(map(len, table.splitlines())) < 300
    assert len(table.splitlines()) == 4 and "\x1b" not in table


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
@pytest.mark.parametrize(
    "line", ["methods", "methods --markdown", "problems", "train --help", "map show kä\udcffß.json"]
)
def test_any_encoding_will_do(printed, encoding, line):
    code, out, err = printed(encoding, *line.split())
    assert code == (2 if "show" in line else 0)
    if line == "methods" and encoding == "ascii":
        assert "sqrt (T ||J J" in out
    if "show" in line:
        assert "error: k" in err and "Traceback" not in err and "\\udcff" in err


def test_names_of_a_received_map_are_shown_escaped(printed, tmp_path):
    make_map(layers=("fc", HOSTILE, "b" * 10_000), tasks=("left", "ri\x1b[31mght")).save(tmp_path / "map.json")
    path = str(tmp_path / "map.json")
    for words in (["show", path], ["show", path, "--top-k", "9"], ["compare", path, path]):
        _, out, err = printed("utf-8", "map", *words)
        assert not any(control in out + err for control in CONTROLS)
        assert max(map(len, (out + err).splitlines())) < 1200
    code, out, _ = printed("utf-8", "map", "show", path, "--json")
    assert code == 0 and HOSTILE in [layer["name"] for layer in json.loads(out)["layers"]]


def test_log_messages_are_safe(capsys):
    record = logging.makeLogRecord({"msg": "layer %s", "args": (HOSTILE + "a" * 10_000,), "levelno": logging.WARNING})
    with for_terminals():
        logging.lastResort.handle(record)  # where nobody has set up logging, as in the command line
    err = capsys.readouterr().err
    assert "conv\\x1b]0" in err and "\x1b" not in err and len(err) < 2000


def test_the_streams_are_as_they_were_afterwards(capsys):
    before = sys.stdout.errors, sys.stderr.errors, logging.lastResort.formatter
    with for_terminals():
        tell("said")
    assert (sys.stdout.errors, sys.stderr.errors, logging.lastResort.formatter) == before
    assert capsys.readouterr() == ("", "said\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("line", ["methods", "methods --json", "--help", "map show nowhere.json --json"])
def test_a_full_stdout_is_an_error(monkeypatch, capsys, line):
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        code = main(line.split())
    words = "no such file" if "nowhere" in line else "Cannot print the results"
    assert code == (2 if "nowhere" in line else 1)
    assert words in capsys.readouterr().err


def test_a_stdout_whose_reader_has_gone_is_none(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert main(["methods"]) == 0
    assert capsys.readouterr().err == ""


def test_a_map_of_nothing_but_layers_is_still_shown(printed, tmp_path):
    cmap = make_map(layers=tuple(f"layer{i}" for i in range(2000)))
    cmap.save(tmp_path / "map.json")
    assert ConflictMap.load(tmp_path / "map.json").tasks == cmap.tasks
    code, out, _ = printed("ascii", "map", "show", tmp_path / "map.json", "--top", "3")
    assert code == 0 and "... and 1997 more" in out
