"""``infobatch-mm SUBCOMMAND ...``, also as ``python -m infobatch_mm.cli SUBCOMMAND ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from .subcommands import SUBCOMMANDS, run

PROGRAM = "infobatch-mm"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that the command line names.

    Args:
        argv (Sequence[str], optional): Its name and arguments. Defaults to the command line of this process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # What follows the name is the subcommand's own, also its --help.
    name = _parser().parse_args(given[:1]).subcommand
    sys.argv = [f"{PROGRAM} {name}", *given[1:]]  # where argparse finds the name of the program
    run(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train on fewer samples with InfoBatch, and measure what it is worth",
        epilog=f"{PROGRAM} SUBCOMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name, subcommand in SUBCOMMANDS.items():
        subparsers.add_parser(name, help=subcommand.line, add_help=False)
    return parser


if __name__ == "__main__":
    main()
