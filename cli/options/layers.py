"""The options that say which layers a profile counts in, and which count as one. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _ActionsContainer

NAMES = ("layers", "exclude", "units")
"""The arguments, as `recon.profile` has them too."""


def add_layer_options(parser: _ActionsContainer) -> None:
    """Add them to a parser, or to a group of it."""
    parser.add_argument(
        "--layers", nargs="+", metavar="REGEX", help="only layers whose whole name matches (default: all shared ones)"
    )
    parser.add_argument("--exclude", nargs="+", metavar="REGEX", help="without those whose whole name matches")
    parser.add_argument(
        "--units",
        nargs="+",
        metavar="REGEX",
        help=r"join layers into one: 'layer\d+\.\d+' every block, 'lora_[AB]' the two matrices of every adapter",
    )
