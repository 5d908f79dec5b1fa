"""What the model predicts for ResNet-50's batch norms: ``python -m benchmarks.cuda.predict``, or ``make cuda-model``.

Plans come from csrc/cuda/launch_plan.cpp, compiled with plans.cpp; instructions from .ci/loop_steps.json, which
.ci/cuda_check.py counts in the machine code. The command writes predictions.json, beside this file, and the tables of
docs/cuda-model.md; with ``--check`` it only checks whether they are current. The report shows predictions beside
measurements (predicted_us).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.cuda.model import DEVICES, Call, Device, Kernel, Plan, Steps, time, without
from benchmarks.document import update
from benchmarks.rows import GRAPH, write_atomically
from benchmarks.suites import Case, select_cases
from benchmarks.tables import Sheet, markdown, print_markdown, spread
from benchmarks.traffic import BN_ADD_RELU, ITEM_BYTES, PLAIN, Epilogue, model_bytes

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SOURCES = (HERE / "plans.cpp", ROOT / "csrc" / "cuda" / "launch_plan.cpp")
STEPS = ROOT / ".ci" / "loop_steps.json"
PREDICTIONS = HERE / "predictions.json"
DOCUMENT = ROOT / "docs" / "cuda-model.md"
BLOCK = "cuda-model"
COMMAND = "make cuda-model"

SUITES = ("resnet50-256", "resnet50-32")
SCALARS = {"bfloat16": "BFloat16", "float32": "float"}
KEYS = ("device", "op", "act", "residual", "shape", "dtype", "layout")
SHOWN_FROM = 1.15  # below, the cause of a time is not shown

# The bars on a device: for large contiguous tensors, and for channels_last ones that are read once.
LARGE_US, LARGE_RATIO, LAST_RATIO = 48.0, 1.15, 1.5


class Operation(NamedTuple):
    op: str
    epilogue: Epilogue
    functors: str  # of its kernel
    call: Call
    # In training, backward also subtracts the terms of the statistics, a branch that the shortest path omits.
    more_a_lane: int = 0


OPERATIONS = (
    Operation("forward", PLAIN, "MomentSums, Normalize", Call(1, 1, 1)),
    Operation("backward", PLAIN, "GradSums, GradInput", Call(2, 2, 1)),
    Operation("forward", BN_ADD_RELU, "MomentSums, ActivatedNormalize", Call(2, 1, 1, writes_mask=True)),
    Operation("backward", BN_ADD_RELU, "ActivatedGradSums, ActivatedGrad", Call(2, 2, 2, reads_mask=True), 2),
)


def counted_steps() -> dict[tuple[str, str, str], Steps]:
    """The instructions of each kernel, by dtype, functors and tile."""
    found = {}
    for name, steps in json.loads(STEPS.read_text(encoding="utf-8")).items():
        scalar, _, *functors, tile = name.partition("<")[2].rstrip(">").split(", ")
        found[scalar, ", ".join(functors), tile] = Steps(*steps)
    return found


def make_plans(program: str, calls: Sequence[tuple[Case, Operation]], device: Device) -> list[Plan]:
    lines = []
    for case, operation in calls:
        batch, channels, height, width = case.shape
        flags = (case.layout == "channels_last", ITEM_BYTES[case.dtype], operation.op == "backward")
        line = (batch, channels, height * width, *map(int, flags), int(bool(operation.epilogue.act)))
        lines.append(" ".join(map(str, line)))
    shared = (device.shared_per_block, device.shared_per_sm, device.reserved_shared)
    limits = (device.sms, *shared, device.max_cluster, int(device.l2_bytes))
    command = [program, *map(str, limits)]
    output = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    return [Plan(**json.loads(line)) for line in output.splitlines()]


@cache
def kernels() -> list[tuple[Device, Case, Operation, Kernel]]:
    """The suites' calls on each device, with their plans and instructions."""
    counted = counted_steps()
    calls = [(case, operation) for case in select_cases(SUITES, "cuda") for operation in OPERATIONS]
    found = []
    with TemporaryDirectory() as folder:
        program = f"{folder}/plans"
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-std=c++20", "-O1", *map(str, SOURCES), "-o", program], check=True)
        for device in DEVICES:
            for (case, operation), plan in zip(calls, make_plans(program, calls, device), strict=True):
                size = ITEM_BYTES[case.dtype]
                steps = counted[SCALARS[case.dtype], operation.functors, plan.tile]
                steps = steps._replace(map=steps.map + operation.more_a_lane * 16 // size)
                found.append((device, case, operation, Kernel(plan, operation.call, steps, size)))
    return found


def predict() -> Iterator[dict[str, Any]]:
    """One row a call: microseconds, the multiple of the floor, and the main cause of what exceeds it."""
    for device, case, operation, kernel in kernels():
        floor = model_bytes(operation.op, case.shape, case.dtype, operation.epilogue) / device.copy_rate
        predicted = time(device, kernel)
        saved = without(device, kernel)
        cause = min(saved, key=saved.__getitem__)
        yield {
            "device": device.name,
            "suite": case.suite,
            "op": operation.op,
            **operation.epilogue._asdict(),
            "shape": case.shape,
            "dtype": case.dtype,
            "layout": case.layout,
            "plan": kernel.plan.description,
            "read_once": not kernel.plan.streamed,
            "us": round(predicted / 1e3, 2),
            "floor_us": round(floor / 1e3, 2),
            "ratio": round(predicted / floor, 2),
            "cause": cause,
            "without": round(saved[cause] / floor, 2),
        }


def assumptions() -> str:
    lines = []
    for each in fields(Device)[1:]:
        values = [getattr(device, each.name) for device in DEVICES]
        shown = dict.fromkeys(f"{value:,.10g}" if isinstance(value, float | int) else str(value) for value in values)
        lines.append((each.name, " / ".join(shown), each.metadata["unit"], each.metadata["source"]))
    names = " / ".join(device.name for device in DEVICES)
    return markdown(Sheet(pd.DataFrame(lines, columns=["assumption", names, "unit", "source"]), labels=4))


def bars(table: pd.DataFrame) -> Iterator[str]:
    large = table[(table["layout"] == "contiguous") & (table["floor_us"] >= LARGE_US)]
    last = table[(table["layout"] == "channels_last") & table["read_once"]]
    for what, rows, limit in (
        (f"contiguous, floor of {LARGE_US:g} µs or more", large, LARGE_RATIO),
        ("channels_last, read once", last, LAST_RATIO),
    ):
        for batch, some in rows.groupby(rows["shape"].str[0], sort=False):
            yield f"* N = {batch}, {what}: {(some['ratio'] <= limit).sum()} of {len(some)} at most {limit:g}."


def block(predictions: Sequence[dict[str, Any]]) -> str:
    """The assumptions; for each device and dtype, the number of rows within the bars, and a table."""
    parts = [assumptions()]
    table = pd.DataFrame(predictions)
    table["cell"] = [
        f"{ratio:.2f}" + (f" {cause}" if ratio > SHOWN_FROM else "")
        for ratio, cause in zip(table["ratio"], table["cause"], strict=True)
    ]
    table["size"] = [f"{channels}x{side}²" for _, channels, side, _ in table["shape"]]
    table["head"] = [
        f"{f'{op} {Epilogue(act, residual)}'.rstrip()}, {shape[0]}"
        for op, act, residual, shape in table[["op", "act", "residual", "shape"]].to_numpy()
    ]
    for (device, dtype), rows in table.groupby(["device", "dtype"], sort=False):
        cells = spread(rows.set_index(["layout", "size", "head"])["cell"]).reset_index()
        parts += [f"### {device}, {dtype}", "\n".join(bars(rows)), markdown(Sheet(cells, labels=2))]
    return "\n\n".join(parts)


@cache
def committed() -> dict[tuple[Any, ...], float]:
    rows = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    return {tuple(tuple(row[key]) if key == "shape" else row[key] for key in KEYS): row["us"] for row in rows}


def predicted_us(table: pd.DataFrame) -> list[float | None]:
    """The prediction for each line of a report that was timed by a graph on a device with predictions."""
    found = []
    for line in table[["device_name", "mode", *KEYS[1:]]].to_dict("records"):
        device = next((each.name for each in DEVICES if each.name in line["device_name"]), "")
        key = (device, *(line[key] for key in KEYS[1:]))
        found.append(committed().get(key) if line["mode"] == GRAPH else None)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether the files are current")
    check = parser.parse_args(argv).check
    predictions = list(predict())
    text = "[\n" + ",\n".join(map(json.dumps, predictions)) + "\n]\n"
    if not check:
        write_atomically(PREDICTIONS, text.encode())
        print_markdown(block(predictions))
    elif not PREDICTIONS.exists() or PREDICTIONS.read_text(encoding="utf-8") != text:
        print(f"{PREDICTIONS} is out of date; run {COMMAND}", file=sys.stderr)
        return 1
    return update(COMMAND, DOCUMENT, {BLOCK: block(predictions)}, check)


if __name__ == "__main__":
    sys.exit(main())
