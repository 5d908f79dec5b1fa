"""The results: one flat row per measurement. A JSON file holds the fields that all rows share once, and the
measurements of a tensor or model on one line."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.traffic import Epilogue, Shape


class InputError(Exception):
    """Invalid input of the user; the message has one line."""


# Modes: how the calls were started and timed.
CLOCK = "clock"  # from Python, by the host's clock
EAGER = "eager"  # from Python, by events on the device: includes the host's overhead where the device waits
GRAPH = "graph"  # replays of a CUDA graph, by events on the device: the device's own time


# With these variables glibc's malloc maps no block by itself, and returns none to the system: freed memory stays in the
# heap with its pages, ready for the next output of any provider. So measurements exclude page faults, which are most of
# torch's time on large tensors.
TOUCHED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "30000000000"}


def is_touched(environment: Mapping[str, str]) -> bool:
    return all(environment.get(name) == value for name, value in TOUCHED.items())


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured, and the seconds a call took over the rounds."""

    suite: str
    op: str
    provider: str
    shape: Shape
    dtype: str
    layout: str
    median_s: float
    p20_s: float
    p80_s: float
    rounds: int
    bytes: int  # of the single-pass model: traffic.model_bytes; of whole models 0, as is the rate
    gb_per_s: float  # bytes / median_s / 1e9
    # Fields that were added later have a default, so that older files can be read.
    mode: str = CLOCK
    buffer_sets: int = 1  # how many sets of tensors the calls rotate through, so that caches are cold
    note: str = ""  # how the measurement differs from its mode, and why
    plan: str = ""  # the path of bnext's kernels on a GPU
    # What follows the batch norm in the same call: traffic.Epilogue.
    act: str = ""
    residual: bool = False
    variant: str = ""  # of the suite variants: which
    # Of a forward with an activation: the bytes that its graph holds, as operators.held counts them.
    held_arguments_bytes: int | None = None
    held_result_bytes: int | None = None
    held_bytes: int | None = None  # of a step, too: the bytes from forward to backward
    # Of a step of the suite memory: the most that is allocated, and what one more image adds to it.
    allocated_bytes: int | None = None
    image_bytes: float | None = None
    # Of the suites of whole models: the model's name; in training, what trainer_process.py counts, and Trainer.losses.
    model: str = ""
    peak_bytes: int | None = None
    page_faults: float | None = None  # a step's; on a CPU
    shares: dict[str, float] = field(default_factory=dict)  # seconds of a step by kind: shares.py
    losses: tuple[float, ...] = ()

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.act, self.residual)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where, with what and when it was measured."""

    device: str
    device_name: str
    isa: str
    threads: int
    torch_version: str
    bnext_version: str
    python_version: str
    commit: str
    date: str
    environment: dict[str, str]  # the variables that change the memory allocator, where they are set
    driver_version: str = ""
    cuda_version: str = ""
    cudnn_version: str = ""
    memory_bytes: int = 0  # of the device, where it is not the host
    l2_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Row(Provenance, Measurement):
    """One measurement with its provenance, so that rows of many files can be combined."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file as a whole: if interrupted, the old file remains."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    whole = [asdict(row) for row in rows]
    common = {name: value for name, value in whole[0].items() if all(row[name] == value for row in whole)}
    lines = []
    for _, of_one in groupby(whole, key=lambda row: (row["suite"], row["model"], row["shape"])):
        own = ({name: value for name, value in row.items() if name not in common} for row in of_one)
        lines.append(", ".join(map(json.dumps, own)))
    text = f'{{"common": {json.dumps(common)}, "rows": [\n{f",{chr(10)}".join(lines)}\n]}}\n'
    write_atomically(path, text.encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def as_row(fields: dict[str, Any]) -> Row:
    return Row(**{**fields, "shape": tuple(fields["shape"]), "losses": tuple(fields.get("losses", ()))})


def load_rows(path: Path) -> list[Row]:
    """The rows of a file; raises InputError where it is not one of ours."""
    try:
        content = read_json(path)
        rows = [as_row({**content["common"], **own}) for own in content["rows"]]
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} holds no benchmark rows: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no benchmark rows")
    return rows
