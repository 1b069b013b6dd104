"""The --rename option: a conflict map's layers under other names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recon_cli.parser import Parser


def add_rename_option(parser: Parser, whose: str) -> None:
    """Add `--rename`; its help begins with `whose`."""
    parser.add_argument(
        "--rename",
        type=_rename,
        action="append",
        metavar="OLD=NEW",
        help=f"{whose} by their first components: backbone=encoder.net; =net puts one before every name, module= "
        "removes one; may be repeated",
    )


def renames(args: argparse.Namespace) -> dict[str, str]:
    """The names that --rename was given: `{old: new}`."""
    pairs = args.rename or []
    old_names = [old for old, _ in pairs]
    twice = next((old for old in old_names if old_names.count(old) > 1), None)
    if twice is not None:
        args.parser.error(f"--rename gives {twice!r} two new names; give it one")
    return dict(pairs)


def _rename(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals or "=" in new or old == new:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW, two different beginnings of layer names")
    return old, new
