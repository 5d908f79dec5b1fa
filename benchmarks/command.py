"""What the commands share: error messages, places to write to, processes, and exit status.

Exit status: what the command says; 2 on bad input; 130 on Ctrl-C.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from benchmarks.rows import InputError


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


@dataclass(frozen=True)
class Number:
    """A type of argument."""

    kind: type
    what: str
    allowed: Callable[[float], bool]

    def __call__(self, text: str) -> float:
        with suppress(ValueError):
            value: float = self.kind(text)
            if self.allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {self.what}, got {text!r}")

    def list(self, text: str) -> tuple[float, ...]:
        """Numbers with commas between them, sorted and each once."""
        return tuple(sorted({self(part) for part in text.split(",")}))


def listed(choices: Collection[str], text: str) -> list[str]:
    """A comma-separated list of known names."""
    chosen = text.split(",")
    for name in chosen:
        if name not in choices:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(choices)}")
    return chosen


WHOLE = Number(int, "a positive whole number", lambda value: value > 0)
POSITIVE = Number(float, "positive numbers", lambda value: 0 < value < float("inf"))


def add_report_options(parser: argparse.ArgumentParser, default: Path) -> None:
    file = {"type": Path, "nargs": "?", "const": default, "metavar": "FILE.md"}
    meaning = "only rewrite the measured blocks of this file (default: docs/benchmarks.md)"
    parser.add_argument("--document", **file, help=meaning)
    parser.add_argument("--check", action="store_true", help="with --document: only tell whether it is current")


def make_writable(folder: Path) -> None:
    """Create the folder of the results, to fail before the minutes of measuring and not after."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to the folder {folder}")


def error_summary(error: BaseException) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")


@contextmanager
def signals_to_end() -> Iterator[list[int]]:
    """Signals to end raise KeyboardInterrupt, and are recorded: Python drops what is raised while a finalizer runs."""
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # under nohup the end of the terminal is ignored
            signal.signal(number, end)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(number: int) -> None:
    """Have this process sent a signal when its parent ends, in whatever way."""
    parent = parent_process()

    def wait_for_parent() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), number)

    Thread(target=wait_for_parent, daemon=True).start()


@contextmanager
def process_pool(
    count: int, begin: Callable[..., None], *arguments: Any, preload: Sequence[str] = ()
) -> Iterator[ProcessPoolExecutor]:
    """At most ``count`` processes, each of which first calls ``begin``; all have ended after the block.

    They are spawned, or forked from a process that has only imported the modules ``preload``.
    """
    context = get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    others = active_children()
    with ProcessPoolExecutor(count, context, begin, arguments) as pool:
        try:
            yield pool
            pool.shutdown()  # idle processes end by themselves, and clean up
        finally:
            for child in active_children():
                if child not in others:
                    child.kill()


def submit(pool: ProcessPoolExecutor, function: Callable[..., Any], *arguments: object) -> Future[Any]:
    """Call a function in one of the processes. They ignore Ctrl-C, which a terminal sends to all: the parent ends
    them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def processes(
    function: Callable[..., Any], calls: Collection[tuple[Any, ...]], begin: Callable[..., None], *arguments: Any
) -> Iterator[Collection[Future[Any]]]:
    """A new process for each call, which first calls ``begin``; all have ended after the block."""
    with process_pool(len(calls) or 1, begin, *arguments) as pool:
        yield [submit(pool, function, *call) for call in calls]


def run_command(parser: OneLineParser, arguments: Sequence[str], default: str) -> int:
    """The exit status of the subcommand that the arguments name; of ``default`` where they begin with its options."""
    arguments = list(arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, default)
    parsed = parser.parse_args(arguments)
    parsed.argv = arguments
    try:
        status: int = parsed.run(parsed)
        return status
    except BrokenPipeError:
        # The reader of the pipe, such as head, has closed it: buffered output cannot be written any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        message = f"{error} (make build builds bnext; the extra bench has what else is needed)"
    except (InputError, OSError) as error:
        message = str(error)
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    return 2
