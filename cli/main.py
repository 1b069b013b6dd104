"""`recon VERB ...`: finds the verb, runs it, prints what it reports, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version

from recon.errors import ReconError, UnknownNameError, UsageError, readable
from recon.support import launch
from recon.support.files.documents import json_values
from recon.support.user_code import user_frame
from recon_cli.parser import Parser
from recon_cli.terminal import StdoutError, flush, for_terminals, show, tell

VERBS = tuple("check profile plan convert train evaluate compare map problems methods bench demo".split())
"""Each is a module of `recon_cli.verbs` with `add_parser(verbs)`, which calls `recon_cli.parser.add_verb`."""

SHARED_VERBS = ("profile", "train")
"""The verbs that several processes can do together."""

DONE, FAILED, WRONG_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed while running, 2 wrong usage or input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with for_terminals():
        return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        args = _parse(argv)
        if args is None:
            return DONE
        if launch.number() and args.verb not in SHARED_VERBS:
            return DONE  # number 0 refuses; if another one failed first, number 0 would be stopped before it could
        _check_verb(args.verb)
        # Only results go to stdout, whatever a problem's code prints; of several processes, the first one prints.
        with _silenced() if launch.number() else redirect_stdout(sys.stderr):
            report = args.run(args)
        if launch.number() == 0:
            show(json.dumps(json_values(report.data), indent=1) if args.json else report.text)
        return FAILED if report.failed else DONE
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return _fail(error, as_json="--json" in argv, debug="--debug" in argv)


def _parse(argv: list[str]) -> argparse.Namespace | None:
    """The arguments; None if `--help` or `--version` has been answered."""
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise UnknownNameError("verb", argv[0], VERBS, "See `recon --help`.")
    try:
        args, unknown = root_parser().parse_known_args(argv)
    except SystemExit:
        flush()
        return None
    for option in unknown:
        near = difflib.get_close_matches(option.partition("=")[0], args.parser.option_names(), n=1)
        args.parser.error(f"unrecognized argument {option!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return args


def _check_verb(verb: str) -> None:
    """Refuse a verb of which each process would do all the work again."""
    if launch.count() > 1 and verb not in SHARED_VERBS:
        raise UsageError(
            f"`recon {verb}` runs in one process, but {launch.count()} were started. Run it without torchrun; "
            f"{' and '.join(SHARED_VERBS)} can use several."
        )


@contextmanager
def _silenced() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def root_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="recon",
        description="Find the layers where the tasks of a multi-task network fight, and give each task its own copy.",
        epilog="`recon VERB --help` shows a verb's options and examples. Begin with `recon demo`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"recon {version('recon-mtl')}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f"recon_cli.verbs.{verb}").add_parser(verbs)
    return parser


def _fail(error: BaseException, *, as_json: bool, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = _message(error)
    if launch.number():
        tell(f"[rank {launch.number()}] error: {message}")
    elif as_json and not isinstance(error, StdoutError):
        try:
            show(json.dumps({"error": {"type": type(error).__name__, "message": message}}, indent=1))
        except StdoutError:
            tell(f"error: {message}")
    else:
        tell(f"error: {message}")
    return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def _message(error: BaseException) -> str:
    if isinstance(error, ReconError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    what = f"{type(error).__name__}: {error}"
    frame = user_frame(error)
    if frame is None:
        return f"{readable(what)}\nThis was not expected; rerun with --debug for the traceback."
    where = f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return f"Your code raised {readable(what)} ({where}). Rerun with --debug for the traceback."


if __name__ == "__main__":
    sys.exit(main())
