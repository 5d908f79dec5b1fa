"""The measured table of a README, rewritten between two markers."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import MeanKey, compare, geometric_means, how_measured, operations
from benchmarks.rows import InputError, Row, write_atomically
from benchmarks.suites import TENSOR_PASSES

BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"


def markdown(rows: Sequence[Row]) -> str:
    """Geometric means by dtype, layout and size class, an operation a column, and how they were measured."""
    comparisons = compare(rows)
    means = geometric_means(comparisons)
    ops = operations(comparisons)
    header = ["dtype", "layout", "tensor", *(op.replace("_", " + ") for op in ops)]
    lines = [_line(header), _line(["---"] * 3 + ["--:"] * len(ops))]
    for group, size_class in dict.fromkeys((key.group, key.size_class) for key in means):
        cells = []
        for op in ops:
            mean = means.get(MeanKey(group, size_class, op))
            cells.append(f"**{mean.speedup:.2f}** ({mean.over_copy:.2f})" if mean else "")
        lines.append(_line([*group, size_class, *cells]))
    passes = ", ".join(f"{op.replace('_', ' + ')} {TENSOR_PASSES[op]}" for op in ops)
    lines += [
        "",
        "Bold: torch's time / bnext's time, geometric mean over the shapes. In brackets: bnext's time / the "
        "time of torch's copy (or addition) of the same bytes into memory already touched; passes over the "
        f"tensor: {passes}.",
        "",
        f"Measured by `python -m benchmarks` on {how_measured(rows)}.",
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rewritten(text: str, block: str) -> str:
    """The text with what is between its markers replaced; InputError unless each is there once, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"expected one {BEGIN} and, after it, one {END}")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def update_readme(path: Path, rows: Sequence[Row], check: bool) -> bool:
    """Bring the README up to date, or with ``check`` only look; tells whether it was current."""
    try:
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, markdown(rows))
        if new != text and not check:
            write_atomically(path, new.encode())
    except OSError as error:
        raise InputError(f"cannot rewrite {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return new == text
