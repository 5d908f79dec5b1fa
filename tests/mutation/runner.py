"""What every mutation run shares: its command line, its verdicts and exit status, and pytest in a process."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

ROOT = Path(__file__).resolve().parents[2]


class Mutant(Protocol):
    """A change that tests should notice. Its ``str`` is its name and what it changes."""

    @property
    def name(self) -> str: ...


M = TypeVar("M", bound=Mutant)
T = TypeVar("T")
R = TypeVar("R")


def run(command: Sequence[str], timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command; both its outputs are in `stdout`.

    Raises:
        RuntimeError: it took longer than `timeout` seconds.
    """
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} took more than {timeout:.0f} s") from None


def in_parallel(jobs: int, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The function's results for the items, from threads. After an error no further item is started."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, items))


def failed_test(*arguments: str, timeout: float = 600, **environment: str) -> str | None:
    """The first test that fails, None if all pass.

    Raises:
        RuntimeError: pytest came to no verdict. What cannot be imported, or crashes, fails no test.
    """
    options = ("-q", "-x", "-rf", "--tb=short", "--color=no", "-p", "no:cacheprovider")
    done = run([sys.executable, "-m", "pytest", *options, *arguments], timeout, **environment)
    failed = re.search(r"^FAILED (.*?)( - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return None
    if done.returncode == 1 and failed is not None:
        return failed[1]
    raise RuntimeError(f"{' '.join(done.args)} ended with status {done.returncode}:\n{done.stdout[-6000:]}")


def main(
    description: str | None,
    mutants: Sequence[M],
    prepare: Callable[[Sequence[M], Path], Callable[[M], str | None]],
    jobs: int = 1,
) -> int:
    """Judges the mutants that the command line names, `jobs` at a time; returns the exit status.

    `prepare` does what they need in common, in a temporary folder, and gives a function that finds the test that fails
    with one of them, if any does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not arguments.names or mutant.name in arguments.names]
    if arguments.list:
        print("\n".join(map(str, chosen)))
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            caught = _judge_all(chosen, prepare(chosen, Path(folder)), jobs)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{caught} of {len(chosen)} mutants caught")
    return 0 if caught == len(chosen) else 1


def _judge_all(mutants: Sequence[M], judge: Callable[[M], str | None], jobs: int) -> int:
    """Prints a line about each mutant as soon as it is judged; returns how many are caught."""
    judged = 0
    lock = threading.Lock()

    def is_caught(mutant: M) -> bool:
        nonlocal judged
        started = time.monotonic()
        try:
            test = judge(mutant)
            verdict, more = ("caught", f"  by {test}") if test else ("SURVIVED", "")
        except RuntimeError as error:
            verdict, more = "BROKEN", f"\n{error}"
        with lock:
            judged += 1
            seconds = time.monotonic() - started
            print(f"[{judged}/{len(mutants)}] {verdict:<8} {seconds:3.0f} s  {mutant}{more}", flush=True)
        return verdict == "caught"

    return sum(in_parallel(jobs, is_caught, mutants))
