"""The model of the CUDA kernels' times: its limits, that more work takes longer, and that its tables are current."""

import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from canned import imagined_gpu_run, on_gpu

from benchmarks.cuda import predict
from benchmarks.cuda.model import DEVICES, LATENCIES, Kernel, Steps, time, traffic
from benchmarks.report import compare, measurements
from benchmarks.suites import Case
from benchmarks.traffic import model_bytes

H200 = DEVICES[0]

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="plans need a C++ compiler: CXX, or c++"
)


def kernels() -> list[tuple[Case, predict.Operation, Kernel]]:
    return [call for device, *call in predict.kernels() if device is H200]


def floor(case: Case, operation: predict.Operation) -> float:
    return model_bytes(operation.op, case.shape, case.dtype, operation.epilogue) / H200.copy_rate


def test_committed_predictions_and_their_tables_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--check"]) == 0, capsys.readouterr().err


def test_with_slow_memory_the_bytes_decide() -> None:
    """With a copy a thousand times slower, time ÷ floor is the ratio of the bytes, and 1 where all is read once."""
    slow = replace(H200, copy_rate=H200.copy_rate / 1000, row_start=0.0)
    once = again = 0
    for case, operation, kernel in kernels():
        ratio = time(slow, kernel) / (1000 * floor(case, operation))
        if kernel.plan.streamed:
            again += 1
            assert 1.0 < ratio < 2.0, (case, operation)
        elif not (kernel.call.reads_mask or kernel.call.writes_mask):  # a mask takes more than a bit an element
            once += 1
            assert ratio == pytest.approx(1.0, abs=0.02), (case, operation)
    assert once > 100
    assert again > 10


def test_more_work_is_never_faster_and_somewhere_slower() -> None:
    """A slower device; more instructions in a loop; less of a tile kept; no tile requested while another is stored."""
    longer = dict.fromkeys((*LATENCIES, "row_start", "sector"), 2.0)
    less = ("copy_rate", "l2_rate", "l2_bytes", "l2_share", "clock", "most_issued", "warp_issues", "sm_rate")
    changes = longer | dict.fromkeys(less, 0.5)
    devices = {name: replace(H200, **{name: factor * getattr(H200, name)}) for name, factor in changes.items()}
    slower = dict.fromkeys((*devices, *Steps._fields, "kept", "prefetch"), 0)
    for case, operation, kernel in kernels():
        plan = kernel.plan
        now = time(H200, kernel)
        assert now >= floor(case, operation), (case, operation)
        pairs = {name: (now, time(device, kernel)) for name, device in devices.items()}
        for phase, count in kernel.steps._asdict().items():
            more = kernel.steps._replace(**{phase: 1.5 * count})
            pairs[phase] = (now, time(H200, replace(kernel, steps=more)))
        pairs["kept"] = (time(H200, replace(kernel, plan=replace(plan, kept=plan.steps))), now)
        apart, ahead = (time(H200, replace(kernel, plan=replace(plan, prefetch=value))) for value in (0, 1))
        pairs["prefetch"] = (ahead, apart)
        for name, (less_work, more_work) in pairs.items():
            assert more_work >= less_work - 1e-6, (case, operation, name)
            slower[name] += more_work > less_work + 1
    assert slower.pop("sm_rate") > 0, "it limits only groups that leave SMs idle, which are few"
    assert min(slower.values()) > 10, slower


def test_bytes_of_a_call_follow_from_what_the_plan_keeps() -> None:
    """Forward and backward move 2 S and 3 S where all of a tile is kept, 3 S and 5 S where nothing is."""
    for case, operation, kernel in kernels():
        if operation.epilogue.act:
            continue
        tensor = kernel.plan.rows * kernel.plan.tile_width * kernel.element_bytes
        for kept, passes in ((kernel.plan.steps, (2, 3)), (0, (3, 5))):
            moved = traffic(H200, replace(kernel, plan=replace(kernel.plan, kept=kept)))
            total = moved.kept + 2 * moved.streamed + moved.late + moved.stored
            assert total == passes[operation.op == "backward"] * tensor, (case, operation)


def test_report_shows_the_prediction_beside_the_graph_of_a_known_device() -> None:
    real = {"device_name": "NVIDIA H200"}
    rows = [
        *on_gpu(4e-4, 2e-4, 1.9e-4, {}, **real),
        *on_gpu(4e-4, 2e-4, 1.9e-4, {}, **real, act="relu", residual=True),
        *on_gpu(4e-4, 2e-4, 1.9e-4, {}, **real, op="eval"),
        *on_gpu(4e-4, 2e-4, 1.9e-4, {}, **real, mode="eager"),
        *on_gpu(4e-4, 2e-4, 1.9e-4, {}, **real, shape=(4, 4, 4, 4)),
    ]
    table = compare(rows)
    shown = pd.concat([measurements(group) for _, group in table.groupby("group")]).reindex(table.index)
    found = predict.predicted_us(table)
    assert [value is not None and 150 < value < 900 for value in found] == [
        op == "forward" and mode == "graph" and shape[0] == 256
        for op, mode, shape in table[["op", "mode", "shape"]].to_numpy()
    ]
    assert sum(value is not None for value in found) == 2
    assert any(f"{found[0]:.1f}" == cell for cell in shown["predicted"].dropna())
    (unknown,) = {*predict.predicted_us(compare(imagined_gpu_run()))}
    assert unknown is None
