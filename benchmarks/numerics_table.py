"""The errors as tables: every row for the terminal and for a page of its own, a line a case for the README."""

from collections.abc import Sequence
from math import isfinite, isnan

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.numerics_results import (
    DATA,
    ELEMENT_LIMIT,
    FLOOR,
    SUM_LIMIT,
    ULP,
    ULP_LIMIT,
    Results,
    Row,
    by_case,
    distance,
)

HEADERS = ("case", "dtype", "path", "quantity", "bnext's error", "torch's error", "torch / bnext", "")
README_HEADERS = ("case", "dtype", "output", "torch", "grad_input", "torch", "the others", "torch", "hold")
COMMAND = "python -m benchmarks numerics"

# As table.MIN_WIDTH: rich would cut numbers in what has no width of its own.
MIN_WIDTH = 140

LEGEND = (
    "Error: the largest |result - exact| of a channel, divided by the largest |exact| of that channel (where all of it "
    "is 0, by 1); then the worst channel. Exact is the formula in float64. A parameter's gradient is a sum whose terms "
    "may cancel: its error is divided by the root of the sum of their squares where that is larger than the result. "
    "Outputs and grad_inputs of 16 bits, in ulp: each element's error in spacings of its dtype at the exact value, of "
    f"values below 1/{1 / FLOOR:g} of their channel's largest in the spacing there. Running variances are updated with "
    "momentum 1. Torch: its batch norm; with a residual and ReLU, its three operations one after the other."
)
BAR = (
    f"Bar: bnext's error is smaller than torch's, or what rounding explains: at most {ELEMENT_LIMIT:.1e} (half an ulp "
    f"and four roundings in float32; {SUM_LIMIT:.1e}, nine of them, for the gradients of parameters) or {ULP_LIMIT:g} "
    "ulp; of constant channels output, grad_weight and running_var are exact. NaN and inf never hold."
)


def number(value: float) -> str:
    """Two digits."""
    if isnan(value):
        return "NaN"
    if not isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.1e}" if value < 0.01 or value >= 1e4 else f"{value:.2g}"


def error(value: float, unit: str) -> str:
    return f"{value:.2f} ulp" if unit == ULP and isfinite(value) else number(value)


def ratio(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 100 else f"{value:.0f}" if 100 <= value < 1e5 else number(value)


def cells(row: Row) -> list[str]:
    bnext, torch = (error(value, row.unit) for value in (row.bnext, row.torch))
    verdict = "" if row.holds else "FAILS"
    return [row.case, row.dtype, row.path, row.quantity, bnext, torch, ratio(row.ratio), verdict]


def worst(rows: Sequence[Row]) -> list[str]:
    """The largest error of bnext and of torch; both of the same quantity's unit, or nothing where there is none."""
    if not rows:
        return ["", ""]
    unit = rows[0].unit
    return [
        error(max((row.bnext for row in rows), key=distance), unit),
        error(max((row.torch for row in rows), key=distance), unit),
    ]


def readme_lines(results: Results) -> list[list[str]]:
    """A line a case: output, grad_input and the rest, each the worst of the paths."""
    lines = []
    for (case, dtype), rows in by_case(results.rows).items():
        of = {name: [row for row in rows if row.quantity == name] for name in DATA}
        others = [row for row in rows if row.quantity not in DATA]
        held = sum(row.holds for row in rows)
        lines.append(
            [case, dtype, *worst(of["output"]), *worst(of["grad_input"]), *worst(others), f"{held} of {len(rows)}"]
        )
    return lines


def how_measured(results: Results) -> str:
    machine = results.machine
    return (
        f"Measured by `{COMMAND}` on {machine['device_name']} ({machine['isa']}), {machine['threads']} threads, torch "
        f"{machine['torch_version']}, bnext {machine['bnext_version']}, commit {machine['commit']}, "
        f"{machine['date'][:10]}."
    )


def markdown(headers: Sequence[str], left: int, lines: Sequence[Sequence[str]]) -> str:
    """``left`` columns of words, the others of numbers."""
    ruler = ["---"] * left + ["--:"] * (len(headers) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headers, ruler, *lines))


def readme_block(results: Results) -> str:
    table = markdown(README_HEADERS, 2, readme_lines(results))
    which = (
        "Errors of bnext and, beside each, of torch; of each case the worst of three paths: contiguous, channels_last, "
        "and (N,C). The others: grad_weight, grad_bias and running_var."
    )
    return "\n\n".join([table, f"{which} {LEGEND}", f"{BAR} {results.summary}", how_measured(results)])


def page(results: Results) -> str:
    """Every row."""
    parts = [
        "# Accuracy of bnext and of torch, every row",
        LEGEND,
        f"{BAR} {results.summary}",
        markdown(HEADERS, 4, [cells(row) for row in results.rows]),
        how_measured(results),
    ]
    return "\n\n".join(parts) + "\n"


def print_table(results: Results) -> None:
    """For the terminal: what fails is red, and the last line says how many do not."""
    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1))
    for index, header in enumerate(HEADERS):
        table.add_column(header, justify="left" if index < 4 else "right", no_wrap=True)
    for rows in by_case(results.rows).values():
        for row in rows:
            table.add_row(*cells(row), style=None if row.holds else "red")
        table.add_section()
    Console(width=max(Console().width, MIN_WIDTH)).print(table)
    print("\n".join([LEGEND, BAR, how_measured(results)]))
