"""The measured tables of a README, each rewritten between two markers of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.bars import (
    COMPILE,
    COPY_DTYPE,
    COPY_LIMITS,
    COPY_MEAN_LIMITS,
    CPU_FUSED_LIMITS,
    CUDA_FUSED_LIMITS,
    TORCH,
    mean_verdicts,
    verdicts,
)
from benchmarks.bars import summary as bars_summary
from benchmarks.model_suites import MODEL_SUITES
from benchmarks.model_table import model_markdown
from benchmarks.report import (
    LARGE_CLASS,
    TORCH_COMPILE,
    Mean,
    MeanKey,
    compare,
    device_times,
    geometric_means,
    held_shares,
    how_measured,
    operations,
)
from benchmarks.rows import GRAPH, InputError, Row, write_atomically
from benchmarks.suites import PLAIN, RESIDUAL_PASSES, TENSOR_PASSES
from benchmarks.touched import is_touched

BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"
CUDA_BEGIN = "<!-- benchmark:cuda:begin -->"
CUDA_END = "<!-- benchmark:cuda:end -->"

# What a table is of: the device; nothing for a batch norm, "fused" for one with an activation in the same call, or the
# suite of whole models; and whether memory was touched before.
Kind = tuple[str, str, bool]
MARKERS: dict[Kind, tuple[str, str]] = {
    ("cpu", "", False): (BEGIN, END),
    ("cuda", "", False): (CUDA_BEGIN, CUDA_END),
    ("cpu", "", True): ("<!-- benchmark:touched:begin -->", "<!-- benchmark:touched:end -->"),
}
for _what in ("fused", *MODEL_SUITES["cpu"]):
    MARKERS["cpu", _what, False] = (f"<!-- benchmark:{_what}:begin -->", f"<!-- benchmark:{_what}:end -->")
    MARKERS["cuda", _what, False] = (f"<!-- benchmark:cuda:{_what}:begin -->", f"<!-- benchmark:cuda:{_what}:end -->")
# Not of measurements: the errors of numerics_results.
NUMERICS: Kind = ("cpu", "numerics", False)
MARKERS[NUMERICS] = ("<!-- numerics:begin -->", "<!-- numerics:end -->")


def kind(row: Row) -> Kind:
    what = row.suite if row.model else "fused" if row.epilogue != PLAIN else ""
    return row.device, what, is_touched(row.environment)


def markdown(rows: Sequence[Row]) -> str:
    """The block of rows that are all of one kind."""
    if rows[0].model:
        return model_markdown(rows)
    rows = device_times(rows)
    fused = rows[0].epilogue != PLAIN
    held = ["", *_held(rows)] if fused else []
    return "\n".join([*_means(rows), "", _legend(rows), *held, *_verdicts(rows), "", _command(rows)])


def _means(rows: Sequence[Row]) -> list[str]:
    """Geometric means by dtype, layout and size class, an operation a column."""
    comparisons = compare(rows)
    means = geometric_means(comparisons)
    ops = operations(comparisons)
    header = ["dtype", "layout", "tensor", *(op.replace("_", " + ") for op in ops)]
    lines = [_line(header), _line(["---"] * 3 + ["--:"] * len(ops))]
    for group, size_class in dict.fromkeys((key.group, key.size_class) for key in means):
        cells = (_cell(means.get(MeanKey(group, size_class, op)), group.fused) for op in ops)
        lines.append(_line([group.dtype, group.layout, size_class, *cells]))
    return lines


def _cell(mean: Mean | None, fused: bool) -> str:
    if mean is None:
        return ""
    over_compile = f" / {mean.over_compile:.2f}" if fused and mean.over_compile is not None else ""
    return f"**{mean.speedup:.2f}**{over_compile} ({mean.over_copy:.2f})"


def _legend(rows: Sequence[Row]) -> str:
    on_gpu, fused = rows[0].device == "cuda", rows[0].epilogue != PLAIN
    passes = ", ".join(f"{op.replace('_', ' + ')} {_passes(op, fused)}" for op in operations(compare(rows)))
    copy = "a device copy" if on_gpu else "torch's copy (or addition)"
    touched = "" if on_gpu else " into memory already touched"
    compiled = fused and any(row.provider == TORCH_COMPILE for row in rows)
    slash = " After the slash, where it was measured: torch.compile's time / bnext's." if compiled else ""
    mask = ", and there a bit an element in forward and backward" if fused else ""
    return (
        f"Bold: torch's time / bnext's time, geometric mean over the shapes.{slash} In brackets: bnext's time / the "
        f"time of {copy} of the same bytes{touched}; passes over the tensor: {passes}{mask}."
    )


def _passes(op: str, fused: bool) -> str:
    passes = TENSOR_PASSES[op]
    return f"{passes} ({passes + RESIDUAL_PASSES[op]} with a residual)" if fused else f"{passes}"


def _held(rows: Sequence[Row]) -> list[str]:
    """A line a dtype and activation, a column a provider."""
    shares = held_shares(rows)
    providers = list(dict.fromkeys(provider for by_provider in shares.values() for provider in by_provider))
    lines = [_line(["dtype", "after batch norm", *providers]), _line(["---"] * 2 + ["--:"] * len(providers))]
    for key, by_provider in shares.items():
        found = [by_provider.get(provider) for provider in providers]
        cells = (f"{share.beyond_arguments:.3f} ({share.of_it_result:.3f})" if share else "" for share in found)
        lines.append(_line([key.dtype, str(key.epilogue), *cells]))
    meaning = (
        "Memory that the graph holds from forward to backward, beyond the arguments, in sizes of the input; in "
        "brackets what of it is the result, which the next layer holds as well."
    )
    return [*lines, "", meaning] if shares else []


def _verdicts(rows: Sequence[Row]) -> list[str]:
    comparisons = compare(rows)
    found = verdicts(comparisons)
    if not found:
        return []
    how = f"{_mode(rows)} " if rows[0].device == "cuda" else ""
    means = "".join(f" {verdict}." for verdict in mean_verdicts(comparisons))
    return ["", f"{how}{_bars(rows)} {bars_summary(found)}.{means}"]


def _command(rows: Sequence[Row]) -> str:
    parts = ["python -m benchmarks"]
    if rows[0].device == "cuda":
        parts.append("--device cuda")
    if is_touched(rows[0].environment):
        parts.append("--touched")
    if rows[0].epilogue != PLAIN:
        parts.append(f"--suite {','.join(dict.fromkeys(row.suite for row in rows))}")
    return f"Measured by `{' '.join(parts)}` on {how_measured(rows)}."


def _mode(rows: Sequence[Row]) -> str:
    return "Replays of CUDA graphs." if rows[0].mode == GRAPH else "Calls from Python."


def _bars(rows: Sequence[Row]) -> str:
    if rows[0].epilogue != PLAIN:
        on_gpu = rows[0].device == "cuda"
        limits = CUDA_FUSED_LIMITS if on_gpu else CPU_FUSED_LIMITS
        where = "in the geometric mean over ResNet-50's layers" if on_gpu else f"on each tensor {LARGE_CLASS}"
        return (
            f"Bars: forward + backward {where} at least {limits[TORCH]:g} times as fast as torch, {limits[COMPILE]:g} "
            "times as torch.compile; and nothing slower than torch."
        )
    copies, means = (
        ", ".join(f"{op} {limit:g}" for op, limit in limits.items()) for limits in (COPY_LIMITS, COPY_MEAN_LIMITS)
    )
    return (
        f"Bars: at most so many times the copy's time on ResNet-50's layers at batch 256 in {COPY_DTYPE}: {copies}, "
        f"in the geometric mean {means}; and nowhere slower than torch, with cuDNN or without."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rewritten(text: str, block: str, of: Kind = ("cpu", "", False)) -> str:
    """The text with what is between two markers replaced; InputError unless each is there once, in order."""
    if of not in MARKERS:
        where = "in memory already touched" if of[2] else f"of {of[0]}"
        raise InputError(f"there is no table for {of[1] or 'batch norm'} {where}")
    begin, end = MARKERS[of]
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end or text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"expected one {begin} and, after it, one {end}")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def blocks(rows: Sequence[Row]) -> dict[Kind, str]:
    """A block for each kind of rows that occurs."""
    return {of: markdown([row for row in rows if kind(row) == of]) for of in dict.fromkeys(map(kind, rows))}


def update_blocks(path: Path, new: Mapping[Kind, str], check: bool) -> bool:
    """Bring the README's blocks up to date, or with ``check`` only look; tells whether they were current."""
    try:
        text = changed = path.read_text(encoding="utf-8")
        for of, block in new.items():
            changed = rewritten(changed, block, of)
        if changed != text and not check:
            write_atomically(path, changed.encode())
    except OSError as error:
        raise InputError(f"cannot rewrite {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return changed == text
