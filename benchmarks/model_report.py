"""The report on rows of whole models: each provider beside torch's layers, and the cost of batch norm in a model."""

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd

from benchmarks.rows import Row
from benchmarks.suites import BNEXT, COMPILE, COPY, EAGER_PROVIDERS, TORCH, WITHOUT
from benchmarks.tables import (
    Sheet,
    foldable,
    how_measured,
    mean_and_range,
    mean_of,
    operation_label,
    spread,
    texts,
)
from benchmarks.traffic import MB, STEP, WALKS, shape_label

BUDGET = 1000 * MB
COMPILED_SUITE, SMALL_SUITE = "compiled", "small-models"
LIMIT = 1.0  # a compiled model is not slower with bnext, nor a small one by fusing

# The columns that identify a measurement, those that identify its case, and how a case is shown.
KEYS = ["suite", "model", "op", "shape", "dtype", "layout"]
CASE = ["model", "input", "dtype", "layout"]

OURS = EAGER_PROVIDERS[1:]
PROVIDERS = (*OURS, WITHOUT)

# What is counted in a step: the column that shows it for all providers, the field of a row, its unit and format.
COUNTED = {
    "1000 page faults": ("page_faults", 1e3, "{:.1f}"),
    "peak, MB": ("peak_bytes", MB, "{:.0f}"),
}

STEP_LEGEND = "A step is forward, loss, backward and SGD with momentum, on one batch."
COST_LEGEND = (
    "Before it is timed, the losses of a few are held against torch's. x torch: the time with torch's layers / the "
    "provider's, in the geometric mean, and the range over the models. Without: every batch norm replaced by nothing "
    "(activations stay). Cost gone: how much of what batch norm costs torch is gone, (torch - provider) / (torch - "
    "without); of several models the sum of each's share of its step."
)
COUNTED_LEGEND = "Page faults of a step, and the peak of memory: torch, bnext, bnext-fused, without."
TRAINING_LEGEND = (
    "x torch: the time with torch's layers / the provider's, eager against eager, compiled against compiled."
)
PEAK_LEGENDS = {
    "cpu": "Peak: resident memory of a process that does nothing else, beyond what it had before there was a model.",
    "cuda": "Peak: allocated memory of a process that does nothing else.",
}
SHARES_LEGEND = (
    "Milliseconds of a step by kind, as torch's profiler has them, which takes time of its own; what is fused with a "
    "batch norm counts as batch norm."
)
WALK_LEGEND = (
    "A walk calls all batch norms of a model, one after the other, with the tensors of all of them alive, so that each "
    "comes from main memory; hot: its input was written right before. The copy, in backward the addition of two "
    "tensors, moves the same bytes into memory already touched."
)
MEMORY_LEGEND = (
    "Held: bytes that forward leaves allocated for backward, beside parameters; x: what of torch's that is. Peak: the "
    "most that a step has allocated beyond parameters and the optimiser's buffers, gradients included. Images: the "
    f"largest batch whose step keeps within {BUDGET // MB:,} MB of that, by the peaks of this batch and one twice as "
    "large. x time: of torch's step. torch-checkpoint: torch.utils.checkpoint around as many blocks as it takes, from "
    "the first on, to hold no more than bnext-recompute does."
)
CALLS_LEGEND = "x torch: the time with torch alone / that with bnext, both compiled."


def compare(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per row with ``torch_s``, the seconds with torch's layers: eager beside eager, compiled beside compiled.

    Rows without torch's row, as where torch failed, are left out. ``kind``: the table that shows the row; "cost" where
    the case was also measured without batch norm.
    """
    table = pd.DataFrame([vars(row) for row in rows])
    table["input"] = table["shape"].map(shape_label)
    table["compiled"] = table["provider"].str.endswith(COMPILE)
    is_torch = table["provider"] == (TORCH + table["compiled"].map({True: COMPILE, False: ""}))
    beside = [*KEYS, "compiled"]
    torchs = table.loc[is_torch, [*beside, "median_s"]].rename(columns={"median_s": "torch_s"})
    table = table.assign(is_torch=is_torch).merge(torchs, on=beside, validate="many_to_one")
    table["speedup"] = table["torch_s"] / table["median_s"]
    costed = table.groupby(beside)["provider"].transform(lambda providers: WITHOUT in set(providers))
    kinds = {"cost": costed, "walk": table["op"].isin(list(WALKS)), "memory": table["image_bytes"].notna()}
    kinds["training"] = table["op"] == STEP
    table["kind"] = np.select(list(kinds.values()), list(kinds), "call")
    return table


def compare_costs(table: pd.DataFrame) -> pd.DataFrame:
    """One line per case that was also measured without batch norm: ``torch_s``, and each provider's speed-up."""
    costed = table[table["kind"] == "cost"]
    keys = ["suite", "op", *CASE]
    lines = costed.pivot(index=keys, columns="provider", values="speedup").reindex(columns=list(PROVIDERS))
    for column, (counted, unit, form) in COUNTED.items():
        values = costed.pivot(index=keys, columns="provider", values=counted).reindex(columns=[TORCH, *PROVIDERS])
        lines[column] = [", ".join(texts(line / unit, form)) for line in values.to_numpy(dtype=float)]
        lines.loc[values[TORCH].isna(), column] = ""
    return costed.drop_duplicates(keys)[[*keys, "torch_s"]].join(lines, on=keys).reset_index(drop=True)


def cost_gone(costs: pd.DataFrame, provider: str) -> float:
    """The share of batch norm's cost that a provider removes, over its cases; NaN where batch norm costs nothing."""
    measured = costs.dropna(subset=[provider])
    could = (1 - 1 / measured[WITHOUT]).sum()
    return (1 - 1 / measured[provider]).sum() / could if could > 0 else nan


def cost_means(costs: pd.DataFrame) -> Sheet:
    """One line per dtype and layout, and one of all."""
    groups = dict(list(costs.groupby(["dtype", "layout"], sort=False)))
    if len(groups) > 1:
        groups["all", "all"] = costs
    lines = [
        {
            "dtype": dtype,
            "layout": layout,
            "models": f"{members['model'].nunique()}",
            **{f"x torch, {name}": mean_and_range(members[name].dropna()) for name in PROVIDERS},
            **{f"cost gone, {name}": texts([cost_gone(members, name)], "{:.0%}")[0] for name in OURS},
        }
        for (dtype, layout), members in groups.items()
    ]
    return Sheet(pd.DataFrame(lines), labels=3)


def cost_lines(costs: pd.DataFrame) -> Sheet:
    """One line per case."""
    cells = {
        **costs[CASE],
        "torch, ms": texts(costs["torch_s"] * 1e3, "{:.1f}"),
        **{f"x torch, {name}": texts(costs[name], "{:.2f}") for name in PROVIDERS},
    }
    for name in OURS:
        gone = [cost_gone(costs.loc[[line]], name) for line in costs.index]
        cells[f"cost gone, {name}"] = texts(gone, "{:.0%}")
    cells |= {name: costs[name] for name in COUNTED if costs[name].any()}
    return Sheet(pd.DataFrame(cells), labels=4)


def share_lines(shared: pd.DataFrame) -> Sheet:
    """One line per case and provider: milliseconds of a step by kind."""
    milliseconds = pd.DataFrame(shared["shares"].tolist(), index=shared.index) * 1e3
    labels = shared[[*CASE, "provider"]].rename(columns={"provider": "layers"})
    return Sheet(labels.join(milliseconds.apply(texts, form="{:.1f}")), labels=5)


def training_lines(trained: pd.DataFrame) -> Sheet:
    milliseconds = trained[["median_s", "p20_s", "p80_s"]] * 1e3
    cells = {
        **trained[CASE],
        "layers": trained["provider"],
        "ms a step": texts(milliseconds["median_s"], "{:.1f}"),
        "20-80 %": [f"{low:.1f}-{high:.1f}" for low, high in milliseconds[["p20_s", "p80_s"]].to_numpy()],
        "images/s": texts(trained["shape"].str[0] / trained["median_s"], "{:.1f}"),
        "x torch": texts(trained["speedup"], "{:.2f}"),
        "peak MB": texts(trained["peak_bytes"].astype(float) / MB, "{:.0f}"),
        "last loss": texts(trained["losses"].str[-2], "{:.4f}"),
    }
    lines = pd.DataFrame(cells)
    return Sheet(lines.loc[:, (lines != "").any()], labels=5)


def memory_lines(measured: pd.DataFrame) -> Sheet:
    """One line per case and provider."""
    torchs = measured[measured["is_torch"]].set_index(CASE)["held_bytes"]
    of_torch = torchs.reindex(pd.MultiIndex.from_frame(measured[CASE])).to_numpy()
    room = (BUDGET - measured["allocated_bytes"]) / measured["image_bytes"]
    cells = {
        **measured[CASE],
        "layers": measured["provider"],
        "held, MB": texts(measured["held_bytes"] / MB, "{:.1f}"),
        "x": texts(measured["held_bytes"] / of_torch, "{:.3f}"),
        "peak, MB": texts(measured["allocated_bytes"] / MB, "{:.1f}"),
        "images": texts(measured["shape"].str[0] + np.floor(room), "{:.0f}"),
        "ms a step": texts(measured["median_s"] * 1e3, "{:.1f}"),
        "x time": texts(1 / measured["speedup"], "{:.2f}"),
    }
    return Sheet(pd.DataFrame(cells), labels=5)


def call_lines(called: pd.DataFrame) -> Sheet:
    """One line per case: for each operation torch's time, bnext's, and bnext's speed-up."""
    keys = [*CASE, "provider"]
    lines = called[keys].drop_duplicates().rename(columns={"provider": "layers"})
    columns = [lines.reset_index(drop=True)]
    for op in called["op"].unique():
        of_op = called[called["op"] == op].set_index(keys).reindex(pd.MultiIndex.from_frame(lines))
        cells = {
            f"{operation_label(op)}, torch ms": texts(of_op["torch_s"] * 1e3, "{:.3f}"),
            "ms": texts(of_op["median_s"] * 1e3, "{:.3f}"),
            "x torch": texts(of_op["speedup"], "{:.2f}"),
        }
        columns.append(pd.DataFrame(cells))
    return Sheet(pd.concat(columns, axis=1), labels=5)


def walk_lines(walks: pd.DataFrame) -> Sheet:
    """One line per walk: the copy's time, and the times of torch and bnext as multiples of it."""
    keys = [*CASE, "op"]
    seconds = spread(walks.set_index([*keys, "provider"])["median_s"])
    lines = seconds.index.to_frame(index=False)
    cells = {
        **lines[CASE],
        "operation": [operation_label(op) for op in lines["op"]],
        "copy, ms": texts(seconds[COPY] * 1e3, "{:.2f}"),
        **{f"x copy, {name}": texts(seconds[name] / seconds[COPY], "{:.2f}") for name in (TORCH, BNEXT)},
        "x torch, bnext": texts(seconds[TORCH] / seconds[BNEXT], "{:.2f}"),
    }
    return Sheet(pd.DataFrame(cells), labels=5)


def sheets(table: pd.DataFrame) -> list[Sheet]:
    """The tables that have lines, means first."""
    costs = compare_costs(table)
    makers = (
        *((cost_means, costs), (cost_lines, costs), (training_lines, table[table["kind"] == "training"])),
        *((call_lines, calls(table)), (share_lines, table[table["shares"].map(bool)])),
        *((walk_lines, table[table["kind"] == "walk"]), (memory_lines, table[table["kind"] == "memory"])),
    )
    return [make(lines) for make, lines in makers if len(lines)]


def calls(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["kind"] == "call") & ~table["is_torch"]]


def notes(table: pd.DataFrame) -> list[str]:
    """What the tables mean, and what follows from them."""
    kinds = dict(list(table.groupby("kind")))
    found = []
    if "cost" in kinds:
        counted = kinds["cost"]["page_faults"].notna().any()
        found.append(" ".join([STEP_LEGEND, COST_LEGEND, *([COUNTED_LEGEND, PEAK_LEGENDS["cpu"]] if counted else [])]))
    if "training" in kinds:
        trained = kinds["training"]
        peak = PEAK_LEGENDS[trained["device"].iloc[0]] if trained["peak_bytes"].notna().any() else ""
        parts = ("" if "cost" in kinds else STEP_LEGEND, TRAINING_LEGEND, peak, curves_line(trained))
        found.append(" ".join(filter(None, parts)))
    found += [CALLS_LEGEND] if "call" in kinds else []
    found += [SHARES_LEGEND] if table["shares"].map(bool).any() else []
    found += [WALK_LEGEND] if "walk" in kinds else []
    found += [f"{STEP_LEGEND} {MEMORY_LEGEND}"] if "memory" in kinds else []
    return [*found, *filter(None, [compiled_bar(table), fused_bar(table)])]


def compiled_bar(table: pd.DataFrame) -> str:
    """A line, or nothing where no compiled model was measured."""
    called = calls(table)
    speedups = called.loc[called["suite"] == COMPILED_SUITE, "speedup"]
    if speedups.empty:
        return ""
    return (
        "Bar: a compiled model is with bnext not slower than with torch alone. "
        f"{(speedups >= LIMIT).sum()} of {len(speedups)} pass; geometric mean {mean_of(speedups):.2f}."
    )


def fused_bar(table: pd.DataFrame) -> str:
    """A line, or nothing where no small model was measured."""
    small = table[table["suite"] == SMALL_SUITE]
    seconds = spread(small.set_index([*CASE, "provider"])["median_s"]).reindex(columns=list(OURS))
    ratios = (seconds["bnext"] / seconds["bnext-fused"]).dropna()
    if ratios.empty:
        return ""
    return (
        "Bar: a small model is not slower fused than with bnext's layers alone. bnext's time / bnext-fused's: "
        f"{', '.join(texts(ratios, '{:.3f}'))}. {(ratios >= LIMIT).sum()} of {len(ratios)} pass."
    )


def curves_line(trained: pd.DataFrame) -> str:
    """The largest difference between the losses of a case."""
    keys = ["suite", *CASE]
    curves = pd.DataFrame(trained["losses"].tolist(), index=pd.MultiIndex.from_frame(trained[keys]))
    spread = curves.groupby(level=keys).max() - curves.groupby(level=keys).min()
    first, *steps, last = trained["losses"].iloc[0]
    return (
        f"Losses of {len(steps) + 1} steps from {first:.4f} to {steps[-1]:.4f}, then {last:.4f} in evaluation; the "
        f"providers' differ by {spread.max().max():.1g} at most."
    )


def block(rows: Sequence[Row]) -> str:
    """One suite's tables and notes as Markdown."""
    table = compare(rows)
    parts = [foldable(sheet, "Every model") for sheet in sheets(table)]
    return "\n\n".join([*parts, *notes(table), how_measured(rows)])
