"""The page of the command line: what `recon VERB --help` prints, for every verb."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from recon_cli.main import root_parser

PAGE = "reference/command_line.md"


def markdown() -> str:
    """The page."""
    lines = ["# recon on the command line", "", "What `recon --help` and `recon VERB --help` print."]
    for parser in _parsers(root_parser()):
        lines += ["", f"## {parser.prog}", "", "```text", _help(parser).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _help(parser: argparse.ArgumentParser) -> str:
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # as argparse finds out how wide a terminal is
    try:
        return parser.format_help()
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _parsers(verb)
