"""The measured table of a README, rewritten between two markers."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.bars import COPY_DTYPE, COPY_LIMITS, LARGE_LIMIT, LARGE_SIZE, verdicts
from benchmarks.bars import summary as bars_summary
from benchmarks.report import MeanKey, compare, device_times, geometric_means, how_measured, operations
from benchmarks.rows import GRAPH, InputError, Row, write_atomically
from benchmarks.suites import TENSOR_PASSES

BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"
CUDA_BEGIN = "<!-- benchmark:cuda:begin -->"
CUDA_END = "<!-- benchmark:cuda:end -->"
MARKERS = {"cpu": (BEGIN, END), "cuda": (CUDA_BEGIN, CUDA_END)}


def markdown(rows: Sequence[Row]) -> str:
    """Geometric means by dtype, layout and size class, an operation a column, and how they were measured."""
    rows = device_times(rows)
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
        lines.append(_line([group.dtype, group.layout, size_class, *cells]))
    passes = ", ".join(f"{op.replace('_', ' + ')} {TENSOR_PASSES[op]}" for op in ops)
    on_gpu = rows[0].device == "cuda"
    copy = "a device copy" if on_gpu else "torch's copy (or addition)"
    touched = "" if on_gpu else " into memory already touched"
    lines += [
        "",
        "Bold: torch's time / bnext's time, geometric mean over the shapes. In brackets: bnext's time / the "
        f"time of {copy} of the same bytes{touched}; passes over the tensor: {passes}.",
    ]
    found = verdicts(comparisons)
    if found:
        lines += ["", f"{_mode(rows)} {_bars()} {bars_summary(found)}."]
    command = "python -m benchmarks --device cuda" if on_gpu else "python -m benchmarks"
    lines += ["", f"Measured by `{command}` on {how_measured(rows)}."]
    return "\n".join(lines)


def _mode(rows: Sequence[Row]) -> str:
    return "Replays of CUDA graphs." if rows[0].mode == GRAPH else "Calls from Python."


def _bars() -> str:
    limits = ", ".join(f"{op} {limit:g}" for op, limit in COPY_LIMITS.items())
    return (
        f"Bars: at most so many times the copy's time on ResNet-50's layers at batch 256 in {COPY_DTYPE}: {limits}, "
        f"planes of {LARGE_SIZE}² {LARGE_LIMIT:g}; and nowhere slower than torch, with cuDNN or without."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rewritten(text: str, block: str, device: str = "cpu") -> str:
    """The text with what is between a device's markers replaced; InputError unless each is there once, in order."""
    begin, end = MARKERS[device]
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end or text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"expected one {begin} and, after it, one {end}")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def update_readme(path: Path, rows: Sequence[Row], check: bool) -> bool:
    """Bring the README up to date, or with ``check`` only look; tells whether it was current."""
    try:
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, markdown(rows), rows[0].device)
        if new != text and not check:
            write_atomically(path, new.encode())
    except OSError as error:
        raise InputError(f"cannot rewrite {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return new == text
