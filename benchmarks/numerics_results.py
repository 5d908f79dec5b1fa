"""The results of ``python -m benchmarks numerics``: errors of bnext and of torch, the bar, and the file they are in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

from benchmarks.rows import InputError, write_atomically

FILE = "numerics.json"

# What an error is measured in: a largest exact value, or the spacing of a 16-bit dtype.
RELATIVE, ULP = "relative", "ulp"

# Quantities: those of the data's size, parameter gradients, and the rest.
DATA = ("output", "grad_input")
SUMS = ("grad_weight", "grad_bias")
QUANTITIES = (*DATA, *SUMS, "running_var")

# The largest relative error of one rounding to float32.
UNIT = 2.0**-24

# Half an ulp for the result, and four roundings on the way: x - mean, the scale, the product, the sum.
ELEMENT_LIMIT = (1 + 4) * UNIT

# The terms of a sum carry three roundings each, u/sqrt(3) in the root mean square: u of the terms' norm together. A
# lane's 16 additions add u*sqrt(16/6), the outer lanes' 8 of its totals u*sqrt(8/6). Four standard deviations of that,
# 4*sqrt(1 + 16/6 + 8/6) = 9.
SUM_LIMIT = (1 + 9) * UNIT

# An ulp is that at the exact value, but of values that are smaller than this part of their channel's largest the one
# there: below, it is float32 that rounds coarser. Four of its roundings are then at most 1/16 ulp of float16.
FLOOR = 2.0**-7
ULP_LIMIT = 0.5 + 1 / 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """The largest error of one quantity, of bnext and of torch."""

    case: str
    dtype: str
    path: str
    quantity: str
    unit: str
    bnext: float
    torch: float
    exact: bool = False  # nothing but an error of 0 will do

    @property
    def limit(self) -> float:
        """What rounding explains."""
        if self.exact:
            return 0.0
        if self.unit == ULP:
            return ULP_LIMIT
        return SUM_LIMIT if self.quantity in SUMS else ELEMENT_LIMIT

    @property
    def holds(self) -> bool:
        """Whether bnext is right to rounding, or else nearer than torch. Nothing is further than NaN and inf."""
        return self.bnext <= self.limit or (not self.exact and self.bnext < distance(self.torch))

    @property
    def ratio(self) -> float:
        """How many times nearer bnext is than torch."""
        bnext, torch = distance(self.bnext), distance(self.torch)
        if bnext == torch:
            return 1.0
        if bnext == 0:
            return inf
        return 0.0 if bnext == inf else torch / bnext

    def __str__(self) -> str:
        return f"{self.case}, {self.dtype}, {self.path}, {self.quantity}"


def distance(error: float) -> float:
    """An error to be compared by: NaN is as far off as inf."""
    return error if isfinite(error) else inf


def _rounded(error: float) -> float:
    return float(f"{error:.3g}")


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]  # rows.Provenance
    rows: list[Row]

    @staticmethod
    def of(machine: dict[str, Any], rows: Sequence[Row]) -> "Results":
        """The errors to three digits, so that a file and a run give the same tables and verdicts."""
        return Results(machine, [replace(row, bnext=_rounded(row.bnext), torch=_rounded(row.torch)) for row in rows])

    @property
    def failing(self) -> list[Row]:
        return [row for row in self.rows if not row.holds]

    @property
    def summary(self) -> str:
        return f"{len(self.rows) - len(self.failing)} of {len(self.rows)} hold."


def save_results(path: Path, results: Results) -> None:
    """A row a line. What is not finite is written in quotes, as JSON has no number for it."""
    lines = ",\n".join(json.dumps(_to_json(row)) for row in results.rows)
    text = f'{{"machine": {json.dumps(results.machine)},\n"numerics": [\n{lines}\n]}}\n'
    write_atomically(path, text.encode())


def _to_json(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    for name in ("bnext", "torch"):
        fields[name] = fields[name] if isfinite(fields[name]) else str(fields[name])
    return fields


def is_numerics(path: Path) -> bool:
    """Whether a file holds such results. What cannot be read is for others to complain about."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "numerics" in content


def load_results(path: Path) -> Results:
    """The results of a file; raises InputError where it is not one of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [_from_json(fields) for fields in content["numerics"]]
        results = Results(dict(content["machine"]), rows)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} holds no results of numerics: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no results of numerics: no rows")
    return results


def _from_json(fields: dict[str, Any]) -> Row:
    row = Row(**{**fields, "bnext": float(fields["bnext"]), "torch": float(fields["torch"])})
    if row.quantity not in QUANTITIES or row.unit not in (RELATIVE, ULP):
        raise ValueError(f"a row of quantity {row.quantity!r} in {row.unit!r}")
    return row


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each case and dtype, in order."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.dtype), []).append(row)
    return cases
