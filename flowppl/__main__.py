"""The command line: `python -m flowppl doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flowppl.doctor import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand; an unknown one prints the usage and exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m flowppl")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print what is installed, what it runs on, and what is missing")
    parser.parse_args(arguments)
    print(report())


if __name__ == "__main__":
    main()
