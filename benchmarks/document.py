"""The measured tables of docs/benchmarks.md, each rewritten between two markers of its own."""

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.rows import InputError, write_atomically

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"

# The blocks that are not of rows.
NUMERICS, TUNING = "numerics", "tuning"

UNMEASURED = "Not measured yet."  # what is between the markers of a table whose results are not committed


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def rewritten(text: str, name: str, block: str) -> str:
    """The document with another block; raises InputError where it has no single place for it."""
    begin, end = markers(name)
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end or text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"expected one {begin} and, after it, one {end}")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def update(path: Path, new: Mapping[str, str], check: bool) -> bool:
    """Bring the document's blocks up to date, or with ``check`` only look; tells whether they were current."""
    try:
        text = changed = path.read_text(encoding="utf-8")
        for name, block in new.items():
            changed = rewritten(changed, name, block)
        if changed != text and not check:
            write_atomically(path, changed.encode())
    except OSError as error:
        raise InputError(f"cannot rewrite {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return changed == text


def report_update(command: str, path: Path, new: Mapping[str, str], check: bool) -> int:
    """Bring a document up to date, say what was done, and choose the exit status."""
    current = update(path, new, check)
    if check and not current:
        program = " ".join(command.split()[:3])
        print(f"{program}: {path} is out of date; run {command} --document {path}", file=sys.stderr)
        return 1
    print(f"{path} {'was current' if current else 'rewritten'}")
    return 0
