"""The reader of JSON documents: what it refuses, and that it names the file and the field."""

from __future__ import annotations

import json
import math

import pytest

from recon.errors import CheckpointError
from recon.support.files.documents import Document, parse_document, read_document

REMEDY = "Make it again."
REFUSED = {
    "twice": (b'{"seed": 1, "seed": 2}', "the key 'seed' twice"),
    "twice within": (b'{"results": [{"a": 1, "a": 1}]}', "the key 'a' twice"),
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "-Infinity"),
    "overflow": (b'{"a": 1e999}', "too large"),
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "whole JSON"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "deep and whole": (b"[" * 30 + b"]" * 30, "nested too deeply"),
    "no utf-8": (b'{"a": "\xff"}', "no UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
    "surrogate": (rb'{"a": ["\ud800"]}', "surrogate"),
    "cut": (b'{"a": [1, 2', "truncated"),
    "empty": (b"", "truncated"),
    "list": (b"[1]", "not one JSON object"),
    "number": (b"1", "not one JSON object"),
    "large": (b'{"a": "' + b"x" * 4096 + b'"}', "larger"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_or_hostile_document_is_refused_by_name(tmp_path, kind):
    content, what = REFUSED[kind]
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_document(path, CheckpointError, REMEDY, most=2048 if kind == "large" else 10**6)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and what in message and message.endswith(REMEDY)
    assert len(message) < len(str(path)) + 300


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(CheckpointError, match=rf"{path}: (there is no such file|cannot be read)"):
            read_document(path, CheckpointError, REMEDY)


def test_what_recon_writes_is_read_as_it_was(tmp_path):
    document = {"a": [[1, 2.5, None, True], {"b": "é 😀 \u2028"}], "n": -(2**62)}
    (tmp_path / "plain.json").write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "letters.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    for name in ("plain.json", "letters.json"):
        assert read_document(tmp_path / name, CheckpointError, REMEDY).values == document


def document(**fields: object) -> Document:
    return parse_document(json.dumps(fields), "f.json", CheckpointError, REMEDY)


FIELDS = {
    "missing": (lambda: document().text("a"), "field 'a' is missing"),
    "type": (lambda: document(a=1).text("a"), r"field 'a' has the wrong type \(int\)"),
    "bool": (lambda: document(a=True).integer("a"), r"wrong type \(bool\)"),
    "float": (lambda: document(a=1.0).integer("a"), r"wrong type \(float\)"),
    "negative": (lambda: document(a=-1).integer("a"), "field 'a' is -1, not a whole number of at least 0"),
    "huge": (lambda: document(a=10**30).integer("a"), "field 'a' is 10{5}"),
    "huge number": (lambda: document(a=10**400).number("a"), "field 'a' is 1000"),
    "below": (lambda: document(a=-0.5).number("a", least=0), "field 'a' is -0.5"),
    "empty": (lambda: document(a="").text("a", empty=False), "field 'a' is empty"),
    "names": (lambda: document(a=["x", 1]).names("a"), "field 'a' is not a list of names"),
    "same names": (lambda: document(a=["x", "y", "x"]).names("a"), "field 'a' names 'x' twice"),
    "few names": (lambda: document(a=["x"]).names("a", least=2), "2 or more different names"),
    "within": (lambda: document(a={"b": {"c": 1}}).table("a").table("b").text("c"), "field 'a.b.c'"),
    "in a list": (lambda: [t.text("c") for t in document(a=[{"c": ""}, {}]).tables("a")], r"field 'a\[1\].c' is"),
    "no table": (lambda: list(document(a=[{}, 1]).tables("a")), r"field 'a\[1\]' has the wrong type"),
    "format": (lambda: document(format="x", version=1).check_format("recon run", 1), "not 'recon run'"),
    "version": (lambda: document(format="x", version=9).check_format("x", 1), "is 9, but this recon reads version 1"),
    "escapes": (lambda: document(**{"\x1b[31m": 1}).text("\x1b[31m"), r"field '\\x1b\[31m' has"),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_a_wrong_field_is_named(kind):
    read, message = FIELDS[kind]
    with pytest.raises(CheckpointError, match=message):
        read()


def test_right_fields_are_read():
    fields = document(t="x", i=3, n=1e300, z=0, nan=None, f=False, s=["a", "b"])
    assert fields.text("t") == "x" and fields.integer("i") == 3 and fields.flag("f") is False
    assert fields.number("n") == 1e300 and math.isnan(fields.number_or_nan("nan")) and fields.number_or_nan("z") == 0
    assert fields.names("s") == ("a", "b") and "i" in fields and "j" not in fields
