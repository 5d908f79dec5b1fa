"""The report on rows of batch norms: bnext beside torch and a copy, for each measurement and as geometric means.

Whole models are reported by model_report.py, the sweep by sweep_report.py, and the variants by variants_report.py.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks import model_report, sweep_report, traffic, variants_report
from benchmarks.acceptance import BARS, bars_text, mean_verdicts, summary, verdicts
from benchmarks.cuda.predict import predicted_us
from benchmarks.rows import CLOCK, GRAPH, Row, is_touched
from benchmarks.suites import BNEXT, COPY, NO_CUDNN, PLANNED, SWEEP, TORCH, TORCH_COMPILE, VARIANTS
from benchmarks.tables import (
    Sheet,
    how_measured,
    markdown,
    mean_of,
    operation_label,
    print_markdown,
    spread,
    texts,
)
from benchmarks.traffic import PLAIN, Epilogue, size_class, tensor_bytes, tensor_label

# The columns that identify a measurement, and those that identify a table of measurements.
KEYS = ["suite", "op", "shape", "act", "residual", "dtype", "layout", "mode"]
GROUP = ["dtype", "layout_shown", "mode", "fused"]

PROVIDERS = (TORCH, BNEXT, COPY, TORCH_COMPILE, NO_CUDNN)  # each has a column, measured or not


def compare(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per measurement, in the order of the rows, images before (N,C), fused ones last.

    One column per provider has its seconds, NaN where it was not measured. Raises ValueError where a provider was
    measured twice.
    """
    measured = pd.DataFrame([vars(row) for row in rows])
    measured["number"] = measured.groupby(KEYS, sort=False).ngroup()
    seconds = measured.pivot(index="number", columns="provider", values="median_s")
    seconds = seconds.reindex(columns=list(dict.fromkeys([*PROVIDERS, *seconds.columns])))
    ours = measured[measured["provider"] == BNEXT].set_index("number")
    table = ours[[*KEYS, "device", "device_name", "plan", "gb_per_s"]].join(seconds).sort_index()
    table["speedup"] = table[TORCH] / table[BNEXT]
    table["over_copy"] = table[BNEXT] / table[COPY]
    table["over_compile"] = table[TORCH_COMPILE] / table[BNEXT]
    table["fused"] = table["act"] != PLAIN.act
    table["label"] = [tensor_label(s, Epilogue(a, r)) for s, a, r in table[["shape", "act", "residual"]].to_numpy()]
    table["bytes"] = [tensor_bytes(shape, dtype) for shape, dtype in zip(table["shape"], table["dtype"], strict=True)]
    classes = [name for name, _ in traffic.SIZE_CLASSES]
    table["size_class"] = pd.Categorical([size_class(size) for size in table["bytes"]], classes, ordered=True)
    table["op"] = pd.Categorical(table["op"], list(traffic.TENSOR_PASSES), ordered=True).remove_unused_categories()
    # An (N,C) tensor is contiguous, but differs from images in traversal and speed.
    table["is_matrix"] = table["shape"].map(len) == 2
    table["layout_shown"] = table["layout"].mask(table["is_matrix"], "(N,C)")
    table = table.sort_values(["fused", "is_matrix"], kind="stable")
    return table.assign(group=table.groupby(GROUP, sort=False).ngroup())


def group_label(line: pd.Series) -> str:
    """Dtype and layout, the mode where there are several, and what follows the batch norm, if anything does."""
    mode = "" if line["mode"] == CLOCK else line["mode"]
    return ", ".join(filter(None, (line["dtype"], line["layout_shown"], mode, "fused" if line["fused"] else "")))


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Geometric means of each group, size class and operation that occurs, in reading order."""
    kept, averaged = dict.fromkeys(GROUP, "first"), dict.fromkeys(("speedup", "over_copy", "over_compile"), mean_of)
    return table.groupby(["group", "size_class", "op"], observed=True).agg(kept | averaged)


def means_by_operation(table: pd.DataFrame) -> Sheet:
    """One line per dtype, layout and size class, one column per operation."""
    found = means(table)
    compiled = np.where(found["fused"], texts(found["over_compile"], " / {:.2f}"), "")
    found["cell"] = [
        f"**{speedup:.2f}**{slash} ({over_copy:.2f})"
        for speedup, slash, over_copy in zip(found["speedup"], compiled, found["over_copy"], strict=True)
    ]
    found = found.reset_index()
    lines = found.pivot(index=["group", "dtype", "layout_shown", "size_class"], columns="op", values="cell")
    lines = lines.astype(object).where(lines.notna(), "")
    lines.columns = [operation_label(op) for op in lines.columns]
    labels = lines.index.to_frame(index=False).drop(columns="group").astype(str)
    labels.columns = ["dtype", "layout", "tensor"]
    return Sheet(labels.join(lines.reset_index(drop=True)), labels=3)


def measurements(table: pd.DataFrame) -> pd.DataFrame:
    """One line of text per measurement, without columns of what was not measured at all."""
    others = {"no cuDNN": NO_CUDNN, "compile": TORCH_COMPILE}
    others |= {name.removeprefix(PLANNED): name for name in table.columns if name.startswith(PLANNED)}
    limits = verdicts(table)
    limits["cell"] = [
        f"{limit:g} {'pass' if passed else 'MISS'}" for limit, passed in limits[["limit", "passed"]].to_numpy()
    ]
    by_bar = limits.pivot(columns="bar", values="cell").reindex(index=table.index, columns=list(BARS))
    cells = {
        "suite": table["suite"],
        "shape": table["label"],
        "operation": table["op"].astype(str),
        "MB": texts(table["bytes"] / 1e6, "{:.2f}"),
        "us": texts(table[BNEXT] * 1e6, "{:.1f}"),
        "predicted": texts(predicted_us(table), "{:.1f}"),
        "GB/s": texts(table["gb_per_s"], "{:.1f}"),
        "x torch": texts(table["speedup"], "{:.2f}"),
        **{head: texts(table[name] / table[BNEXT], "{:.2f}") for head, name in others.items()},
        "x copy": texts(table["over_copy"], "{:.2f}"),
        **{f"{bar} bar": texts(by_bar[bar], "{}") for bar in BARS},
        "plan": table["plan"],
    }
    lines = pd.DataFrame(cells)
    return lines.loc[:, (lines != "").any()]


def held_sheet(held: pd.DataFrame) -> Sheet:
    """What a forward's graph holds beyond the arguments, in sizes of the input: one line per dtype and activation.

    The result's part is in brackets. A tensor that was timed in two modes counts twice.
    """
    held["after batch norm"] = [str(Epilogue(a, r)) for a, r in held[["act", "residual"]].to_numpy()]
    held["size"] = [tensor_bytes(shape, dtype) for shape, dtype in zip(held["shape"], held["dtype"], strict=True)]
    keys = ["dtype", "after batch norm", "provider"]
    sums = held.groupby(keys, sort=False)[["size", "held_result_bytes", "held_bytes"]].sum()
    result = sums["held_result_bytes"] / sums["size"]
    total = (sums["held_result_bytes"] + sums["held_bytes"]) / sums["size"]
    cells = pd.Series([f"{a:.3f} ({b:.3f})" for a, b in zip(total, result, strict=True)], sums.index)
    lines = spread(cells).fillna("").reset_index()
    return Sheet(lines.rename_axis(columns=None), labels=2)


HELD_LEGEND = (
    "Memory that the graph holds from forward to backward, beyond the arguments, in sizes of the input; in "
    "brackets what of it is the result, which the next layer holds as well."
)


def device_times(rows: Sequence[Row]) -> list[Row]:
    """The rows of CUDA graphs, if there are any, since their times include no Python; otherwise all."""
    return [row for row in rows if row.mode == GRAPH] or list(rows)


def block(rows: Sequence[Row]) -> str:
    """The means, the memory and the bars as Markdown, of rows that are all plain batch norms or all fused."""
    rows = device_times(rows)
    table = compare(rows)
    parts = [markdown(means_by_operation(table)), legend(table), slower(table)]
    held = pd.DataFrame([vars(row) for row in rows if row.held_bytes is not None])
    if len(held):
        parts += [markdown(held_sheet(held)), HELD_LEGEND]
    found = verdicts(table)
    if len(found):
        how = {GRAPH: "Replays of CUDA graphs. "}.get(rows[0].mode, "Calls from Python. ")
        endings = "".join(f" {line}." for line in mean_verdicts(table))
        prefix = how if rows[0].device == "cuda" else ""
        parts.append(f"{prefix}{bars_text(rows[0].device, bool(rows[0].act))} {summary(found)}.{endings}")
    parts.append(how_measured(rows))
    return "\n\n".join(parts)


def slower(table: pd.DataFrame) -> str:
    """How many measurements are slower than torch, and the slowest."""
    found = table[table["speedup"] < 1].sort_values("speedup")
    text = f"bnext is slower than torch in {len(found)} of {table['speedup'].notna().sum()} measurements"
    if not len(found):
        return f"{text}."
    slowest = found.iloc[0]
    what = f"{operation_label(slowest['op'])} of {slowest['label']}, {group_label(slowest)}"
    return f"{text}; the slowest is {what}, at {slowest['speedup']:.2f} of torch's speed."


def legend(table: pd.DataFrame) -> str:
    on_gpu, fused = table["device"].iloc[0] == "cuda", table["fused"].iloc[0]
    passes = ", ".join(
        f"{operation_label(op)} {traffic.TENSOR_PASSES[op]}"
        + (f" ({traffic.TENSOR_PASSES[op] + traffic.RESIDUAL_PASSES[op]} with a residual)" if fused else "")
        for op in table["op"].cat.categories
    )
    copy = "a device copy" if on_gpu else "torch's copy (or addition)"
    touched = "" if on_gpu else " into memory already touched"
    compiled = fused and table["over_compile"].notna().any()
    slash = " After the slash, where it was measured: torch.compile's time / bnext's." if compiled else ""
    mask = ", and there a bit an element in forward and backward" if fused else ""
    return (
        f"Bold: torch's time / bnext's time, geometric mean over the shapes.{slash} In brackets: bnext's time / the "
        f"time of {copy} of the same bytes{touched}; passes over the tensor: {passes}{mask}."
    )


# The function that makes a block from rows, by their kind.
TENSORS, MODELS = "tensors", "models"
MAKERS = {TENSORS: block, MODELS: model_report.block, SWEEP: sweep_report.block, VARIANTS: variants_report.block}


def kind(row: Row) -> str:
    """The sweep, the variants, whole models, or batch norms."""
    return row.suite if row.suite in (SWEEP, VARIANTS) else MODELS if row.model else TENSORS


def of_kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every kind, empty kinds included."""
    return {each: [row for row in rows if kind(row) == each] for each in MAKERS}


def block_name(row: Row) -> str:
    """The name has the device, the suite or whether an activation follows, and whether memory was touched."""
    device = "" if row.device == "cpu" else row.device
    what = row.suite if kind(row) != TENSORS else "fused" if row.act else ""
    return ":".join(filter(None, ("benchmark", device, what, "touched" if is_touched(row.environment) else "")))


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """The text of each document block that these rows give, by name."""
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(block_name(row), []).append(row)
    return {name: MAKERS[kind(of[0])](of) for name, of in members.items()}


def print_report(rows: Sequence[Row]) -> None:
    """Print every measurement of batch norms, one table per group, and then the document's blocks."""
    tensors = of_kinds(rows)[TENSORS]
    if tensors:
        for _, members in compare(tensors).groupby("group"):
            print(f"{group_label(members.iloc[0])}\n{measurements(members).to_string(index=False)}\n")
    for row in filter(lambda row: row.note, tensors):
        what = f"{row.suite} {tensor_label(row.shape, row.epilogue)} {row.dtype} {row.layout} {row.op} {row.mode}"
        print(f"{what}: {row.provider} {row.note}")
    for text in blocks(rows).values():
        print_markdown(text)
