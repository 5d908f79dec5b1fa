"""The acceptance limits, which documents call bars: of bnext's time beside a copy of the same bytes, and torch's."""

import numpy as np
import pandas as pd

from benchmarks.rows import GRAPH
from benchmarks.suites import BNEXT, COPY, GHOST, LENGTHS, NO_CUDNN, RANDOM, RECTANGLES, TORCH, is_fused_layer
from benchmarks.tables import mean_of
from benchmarks.traffic import LARGE_CLASS, Epilogue

# What bnext is compared with; a table of measurements is one of report.compare.
COMPILE = "compile"
BARS = (COPY, TORCH, COMPILE)

# bnext's time / the time of a copy of as many bytes as the single-read model has: 2 S forward, 3 S backward.
# Of each tensor, and of the geometric mean over the suite in each layout.
COPY_LIMITS = {"forward": 1.6, "eval": 1.25, "backward": 1.6}
COPY_MEAN_LIMITS = {"forward": 1.15, "backward": 1.2}
COPY_SUITE, COPY_DTYPE = "resnet50-256", "bfloat16"

# The time of torch's eager functions, with or without cuDNN, whichever is less, / bnext's: everywhere.
TORCH_LIMIT = 1.0

# Of a batch norm with an activation: the times of torch's eager functions and of torch.compile / bnext's. On a CPU for
# each tensor of the largest class; on a GPU in the geometric mean over ResNet-50's fused layers.
FUSED_OP = "forward_backward"
FUSED_LIMITS = {"cpu": {TORCH: 3.0, COMPILE: 8.0}, "cuda": {TORCH: 2.0, COMPILE: 1.3}}
CUDA_FUSED = {"dtype": "bfloat16", "layout": "channels_last", "mode": GRAPH, "op": FUSED_OP}

# bnext's time with padding or in parts / that of its batch norm of the whole tensor, in the geometric mean.
VARIANT_LIMITS = {LENGTHS: 1.25, RECTANGLES: 1.25, RANDOM: 1.25, GHOST: 1.15}


def copy_limits(table: pd.DataFrame) -> pd.Series:
    """The limits on multiples of the copy's time, for the device's own time on one network's tensors; NaN elsewhere."""
    listed = (table["suite"] == COPY_SUITE) & (table["dtype"] == COPY_DTYPE) & (table["mode"] == GRAPH)
    return table["op"].astype(str).map(COPY_LIMITS).where(listed)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """One line per measurement and bar: ``bar``, ``value``, ``limit``, ``passed``; the index is the measurement's."""
    on_gpu = table["device"] == "cuda"
    large = ~on_gpu & (table["op"] == FUSED_OP) & (table["size_class"] == LARGE_CLASS)
    limits = FUSED_LIMITS["cpu"]
    measured = {
        COPY: (table["over_copy"], copy_limits(table)),
        TORCH: (table[[TORCH, NO_CUDNN]].min(axis=1) / table[BNEXT], np.where(large, limits[TORCH], TORCH_LIMIT)),
        COMPILE: (table["over_compile"], np.where(large, limits[COMPILE], np.nan)),
    }
    parts = [pd.DataFrame({"bar": bar, "value": value, "limit": limit}) for bar, (value, limit) in measured.items()]
    with_bars = on_gpu | table["fused"]  # on a CPU a plain batch norm has none
    found = pd.concat([part[with_bars] for part in parts]).dropna().sort_index(kind="stable")
    # Against the copy the value is a multiple of its time, which has to be small; otherwise it is a speed-up.
    found["passed"] = (found["value"] <= found["limit"]).where(found["bar"] == COPY, found["value"] >= found["limit"])
    return found


def summary(found: pd.DataFrame) -> str:
    """A line that says of each bar how many measurements pass it."""
    passed = {bar: found.loc[found["bar"] == bar, "passed"] for bar in BARS}
    return "; ".join(f"{of.sum()} of {len(of)} pass the bar against {bar}" for bar, of in passed.items() if len(of))


def mean_verdicts(table: pd.DataFrame) -> list[str]:
    """One line per bar for a geometric mean on a GPU: against the copy in each layout, of fused layers in each suite.

    The line for torch.compile exists only where torch.compile was measured on all shapes.
    """
    table = table[table["device"] == "cuda"].assign(op=lambda gpu: gpu["op"].astype(str))
    lines = []
    copies = table[copy_limits(table).notna() & table["op"].isin(COPY_MEAN_LIMITS)]
    for (_, op), members in copies.groupby(["layout", "op"], sort=False):
        lines.append(mean_line(members, COPY, members["over_copy"], COPY_MEAN_LIMITS[op]))
    listed = (table[list(CUDA_FUSED)] == pd.Series(CUDA_FUSED)).all(axis=1)
    tensors = table[["shape", "act", "residual"]].to_numpy()
    listed &= np.array([is_fused_layer(shape, Epilogue(act, residual)) for shape, act, residual in tensors], bool)
    for _, members in table[listed].groupby("suite", sort=False):
        lines.append(mean_line(members, TORCH, members["speedup"], FUSED_LIMITS["cuda"][TORCH]))
        if members["over_compile"].notna().all():
            lines.append(mean_line(members, COMPILE, members["over_compile"], FUSED_LIMITS["cuda"][COMPILE]))
    return lines


def mean_line(members: pd.DataFrame, bar: str, values: pd.Series, limit: float) -> str:
    value = mean_of(values)
    passed = value <= limit if bar == COPY else value >= limit
    row = members.iloc[0]
    how = ", ".join((row["suite"], row["op"].replace("_", " + "), row["dtype"], row["layout"], row["mode"]))
    ending = "pass" if passed else "MISS"
    return f"{how}, {len(members)} shapes: {value:.2f} x {bar}, bar {limit:g}: {ending}"


def bars_text(device: str, fused: bool) -> str:
    """What the bars of a device are, in a sentence."""
    if fused:
        where = f"on each tensor {LARGE_CLASS}" if device == "cpu" else "in the geometric mean over ResNet-50's layers"
        limits = FUSED_LIMITS[device]
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
