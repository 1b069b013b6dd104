"""`recon problems`: the problems that come with recon."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recon.problems import descriptions
from recon.support.tables import text_table
from recon_cli.parser import Report, add_verb

if TYPE_CHECKING:
    from recon_cli.parser import Verbs


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    add_verb(verbs, "problems", run, "list the built-in problems", "recon problems\nrecon problems --json")


def run(args: argparse.Namespace) -> Report:
    """List them."""
    problems = descriptions()
    table = text_table(["problem", "what it is"], [[name, line] for name, line in problems.items()], left=2)
    own = "Your own: path/to/file.py:function or package.module:function, which returns a recon.Problem."
    data = {"problems": [{"name": name, "description": line} for name, line in problems.items()]}
    return Report(f"{table}\n\n{own}", data)
