"""The measured tables of docs/benchmarks.md, each rewritten between two markers of its own."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.rows import InputError, write_atomically

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"

# The blocks that are not made from rows.
NUMERICS, TUNING, TUNING_RANGE = "numerics", "tuning", "tuning:range"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def rewritten(text: str, name: str, block: str) -> str:
    """The document with a block replaced; raises InputError unless it has exactly one place for the block."""
    begin, end = markers(name)
    changed, places = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)
    if places != 1:
        raise InputError(f"expected one {begin} and, after it, one {end}")
    return changed


def update(command: str, path: Path, new: Mapping[str, str], check: bool) -> int:
    """Update a document's blocks, or with ``check`` only compare them; print what was found, and return the exit
    status."""
    text = changed = path.read_text(encoding="utf-8")
    for name, block in new.items():
        changed = rewritten(changed, name, block)
    if changed == text:
        print(f"{path} was current")
    elif check:
        print(f"{path} is out of date; run {command} --document {path}", file=sys.stderr)
        return 1
    else:
        write_atomically(path, changed.encode())
        print(f"{path} rewritten")
    return 0
