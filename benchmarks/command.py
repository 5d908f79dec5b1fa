"""What the commands of this package share: how they complain, where they write, and how they end.

Exit status: what the command says; 2 on bad input; 130 on Ctrl-C.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NoReturn

from benchmarks.rows import InputError


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    program: ClassVar[str]  # a subcommand's parser has a longer `prog`

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.program}: error: {message}\n")


def make_writable(folder: Path) -> None:
    """Find out before the minutes of measuring, not after, that the results have no place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to the folder {folder}")


def run_command(parser: OneLineParser, arguments: Sequence[str], default: str) -> int:
    """The exit status of the subcommand that the arguments name; of ``default`` where they begin with its options."""
    arguments = list(arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, default)
    parsed = parser.parse_args(arguments)
    parsed.argv = arguments
    try:
        status: int = parsed.run(parsed)
    except InputError as error:
        print(f"{parser.program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as head, has seen enough; what is buffered for it has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
