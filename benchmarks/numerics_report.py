"""The results of ``python -m benchmarks numerics``: their file, their bar, and their tables."""

import json
from collections.abc import Iterable, Mapping
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.rows import InputError, read_json, write_atomically
from benchmarks.tables import Sheet, markdown

FILE = "numerics.json"

# The units of errors: the largest exact value, or the spacing of a 16-bit dtype.
RELATIVE, ULP = "relative", "ulp"

# Quantities: those of the data's size, parameter gradients, and the rest.
DATA = ("output", "grad_input")
SUMS = ("grad_weight", "grad_bias")
QUANTITIES = (*DATA, *SUMS, "running_var")

# The largest relative error of one rounding to float32.
UNIT = 2.0**-24

# Half an ulp for the result, and four roundings before it: x - mean, the scale, the product, the sum.
ELEMENT_LIMIT = (1 + 4) * UNIT

# Each term of a sum has three roundings, of u/sqrt(3) in the root mean square: together u times the terms' norm. A
# lane's 16 additions add u*sqrt(16/6), and the 8 additions of its totals u*sqrt(8/6). Four standard deviations of that,
# 4*sqrt(1 + 16/6 + 8/6) = 9.
SUM_LIMIT = (1 + 9) * UNIT

# An ulp is the spacing at the exact value, or at this fraction of the channel's largest value where that is more: below
# it, float32's rounding is the coarser one. Four roundings of float32 are then at most 1/16 ulp of float16.
FLOOR = 2.0**-7
ULP_LIMIT = 0.5 + 1 / 16

LEGEND = (
    "Error: the largest |result - exact| of a channel, divided by the largest |exact| of that channel (where all of it "
    "is 0, by 1); then the worst channel. Exact is the formula in float64. A parameter's gradient is a sum whose terms "
    "may cancel: its error is divided by the root of the sum of their squares where that is larger than the result. "
    "Outputs and grad_inputs of 16 bits, in ulp: each element's error in spacings of its dtype at the exact value, of "
    f"values below 1/{1 / FLOOR:g} of their channel's largest in the spacing there. Running variances are updated with "
    "momentum 1. Torch: its batch norm; with a residual and ReLU, its three operations one after the other."
)
README_LEGEND = (
    "Errors of bnext and, beside each, of torch; of each case the worst of three paths: contiguous, channels_last, "
    "and (N,C). The others: grad_weight, grad_bias and running_var."
)
BAR = (
    f"Bar: bnext's error is smaller than torch's, or what rounding explains: at most {ELEMENT_LIMIT:.1e} (half an ulp "
    f"and four roundings in float32; {SUM_LIMIT:.1e}, nine of them, for the gradients of parameters) or {ULP_LIMIT:g} "
    "ulp; of constant channels output, grad_weight and running_var are exact. NaN and inf never hold."
)


class Results(NamedTuple):
    """``errors``: one line per case, dtype, path and quantity, with the largest error of bnext and torch in ``unit``.

    ``exact``: the error must be 0. ``holds``: bnext's error is within rounding, or less than torch's.
    """

    machine: dict[str, Any]  # rows.Provenance
    errors: pd.DataFrame

    @property
    def summary(self) -> str:
        return f"{self.errors['holds'].sum()} of {len(self.errors)} hold."


def judged(machine: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Results:
    """The errors to three digits, so that a file and a run give the same tables and verdicts."""
    errors = pd.DataFrame(rows).astype({"bnext": float, "torch": float, "exact": bool})
    for name in ("bnext", "torch"):
        errors[name] = [float(f"{error:.3g}") for error in errors[name]]
    limits = [errors["exact"], errors["unit"] == ULP, errors["quantity"].isin(SUMS)]
    limit = np.select(limits, [0.0, ULP_LIMIT, SUM_LIMIT], ELEMENT_LIMIT)
    nearer = ~errors["exact"] & (errors["bnext"] < distance(errors["torch"]))
    errors["holds"] = (errors["bnext"] <= limit) | nearer
    return Results(dict(machine), errors)


def distance(errors: pd.Series) -> pd.Series:
    """Errors as they are compared: NaN and inf are the largest."""
    return errors.where(np.isfinite(errors), inf)


def save_results(path: Path, results: Results) -> None:
    """Write one row per line. Numbers that are not finite are written in quotes, as JSON has none."""
    rows = results.errors.drop(columns="holds").to_dict("records")
    for row in rows:
        row.update({name: str(row[name]) for name in ("bnext", "torch") if not isfinite(row[name])})
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"machine": {json.dumps(results.machine)},\n"numerics": [\n{lines}\n]}}\n'
    write_atomically(path, text.encode())


def is_numerics(path: Path) -> bool:
    """Whether a file holds such results."""
    content = read_json(path)
    return isinstance(content, dict) and "numerics" in content


def load_results(path: Path) -> Results:
    """The results of a file; raises InputError where it is not one of ours."""
    content = read_json(path)
    try:
        return judged(content["machine"], content["numerics"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} holds no results of numerics: {error}") from None


def number(value: float) -> str:
    """Two digits."""
    if isnan(value):
        return "NaN"
    if not isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.1e}" if value < 0.01 or value >= 1e4 else f"{value:.2g}"


def error_text(value: float, unit: str) -> str:
    return f"{value:.2f} ulp" if unit == ULP and isfinite(value) else number(value)


def ratio_text(bnext: float, torch: float) -> str:
    """How many times smaller bnext's error is than torch's."""
    bnext, torch = (error if isfinite(error) else inf for error in (bnext, torch))
    ratio = 1.0 if bnext == torch else inf if bnext == 0 else torch / bnext
    return f"{ratio:.2f}" if 0.01 <= ratio < 100 else f"{ratio:.0f}" if 100 <= ratio < 1e5 else number(ratio)


def every_row(errors: pd.DataFrame) -> Sheet:
    texts = {
        f"{name}'s error": [error_text(*pair) for pair in zip(errors[name], errors["unit"], strict=True)]
        for name in ("bnext", "torch")
    }
    cells = {
        **errors[["case", "dtype", "path", "quantity"]],
        **texts,
        "torch / bnext": [ratio_text(*pair) for pair in zip(errors["bnext"], errors["torch"], strict=True)],
        "": ["" if holds else "FAILS" for holds in errors["holds"]],
    }
    return Sheet(pd.DataFrame(cells), labels=4)


def worst(errors: pd.DataFrame) -> list[str]:
    """The largest errors of bnext and of torch, all in the same unit; empty where there are none."""
    if errors.empty:
        return ["", ""]
    largest = (errors[name][distance(errors[name]).idxmax()] for name in ("bnext", "torch"))
    return [error_text(value, errors["unit"].iloc[0]) for value in largest]


def line_a_case(errors: pd.DataFrame) -> Sheet:
    """Output, grad_input and the rest, each the worst of the paths."""
    lines = []
    for (case, dtype), rows in errors.groupby(["case", "dtype"], sort=False):
        quantities = rows["quantity"]
        parts = [*(rows[quantities == name] for name in DATA), rows[~quantities.isin(DATA)]]
        held = f"{rows['holds'].sum()} of {len(rows)}"
        lines.append([case, dtype, *(cell for part in parts for cell in worst(part)), held])
    heads = ["case", "dtype", "output", "torch", "grad_input", "torch", "the others", "torch", "hold"]
    return Sheet(pd.DataFrame(lines, columns=heads), labels=2)


def how_measured(machine: Mapping[str, Any]) -> str:
    return (
        f"Measured by `python -m benchmarks numerics` on {machine['device_name']} ({machine['isa']}), "
        f"{machine['threads']} threads, torch {machine['torch_version']}, bnext {machine['bnext_version']}, "
        f"commit {machine['commit']}, {machine['date'][:10]}."
    )


def block(results: Results) -> str:
    """One line per case, for a document."""
    table = markdown(line_a_case(results.errors))
    legends = [f"{README_LEGEND} {LEGEND}", f"{BAR} {results.summary}"]
    return "\n\n".join([table, *legends, how_measured(results.machine)])


def page(results: Results) -> str:
    """Every row."""
    title = "# Accuracy of bnext and of torch, every row"
    table = markdown(every_row(results.errors))
    parts = [title, LEGEND, f"{BAR} {results.summary}", table, how_measured(results.machine)]
    return "\n\n".join(parts) + "\n"
