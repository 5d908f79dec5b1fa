"""The files of rows, and the report on batch norms of imagined runs: bars, and what a GPU's tables say.

test_document.py compares a CPU's tables with the committed results, among them files without the fields of today.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from canned import imagined_costs, imagined_fused_gpu_run, imagined_gpu_run, imagined_run, on_gpu, row

from benchmarks.__main__ import main
from benchmarks.acceptance import mean_verdicts, verdicts
from benchmarks.report import block, compare, slower
from benchmarks.rows import Row, load_rows, save_rows, write_atomically


@pytest.mark.parametrize("rows", [imagined_gpu_run(), imagined_costs()], ids=len)
def test_rows_survive_the_file(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_rows(path, rows)
    assert load_rows(path) == rows
    assert rows[0].device in json.loads(path.read_text())["common"].values()


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '[{"shape": [4, 8]}]', '{"numerics": []}'])
def test_foreign_or_missing_file_is_one_line_and_status_2(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert "foreign.json" in error
    assert error.count("\n") == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    monkeypatch.delattr(Path, "replace")  # the write fails before the new file takes the old one's place
    with pytest.raises(AttributeError):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# The bars.


def passes(bnext_s: float, torch_s: float = 9.0, others: Any = None, **changes: Any) -> dict[str, bool]:
    rows = on_gpu(torch_s, bnext_s, 1.0, others or {"torch-no-cudnn": 9.0}, **changes)
    found = verdicts(compare(rows))
    return dict(zip(found["bar"], found["passed"], strict=True))


@pytest.mark.parametrize(("op", "limit"), [("forward", 1.6), ("eval", 1.25), ("backward", 1.6)])
def test_each_operation_has_its_bar_against_the_copy(op: str, limit: float) -> None:
    assert passes(limit, op=op) == {"copy": True, "torch": True}
    assert passes(limit + 0.01, op=op) == {"copy": False, "torch": True}


@pytest.mark.parametrize(
    "changes", [{"suite": "resnet50-32"}, {"dtype": "float32"}, {"mode": "eager"}, {"op": "forward_backward"}]
)
def test_other_tensors_have_only_the_bar_against_torch(changes: dict[str, Any]) -> None:
    assert passes(5.0, **changes) == {"torch": True}


def test_torch_is_the_faster_of_with_and_without_cudnn_and_not_the_compiled_one() -> None:
    assert passes(1.0, torch_s=1.0)["torch"]
    assert not passes(1.01, torch_s=1.0)["torch"]
    assert not passes(1.01, torch_s=2.0, others={"torch-no-cudnn": 1.0})["torch"]
    assert passes(1.01, torch_s=2.0, others={"torch-no-cudnn": 2.0, "torch-compile": 0.5})["torch"]


def test_a_cpu_has_bars_for_fused_layers_alone() -> None:
    large: dict[str, Any] = {"device": "cpu", "mode": "clock", "act": "relu", "op": "forward_backward"}
    assert passes(1.0, 3.0, {"torch-compile": 8.0}, **large) == {"torch": True, "compile": True}
    assert passes(1.0, 2.9, {"torch-compile": 7.9}, **large) == {"torch": False, "compile": False}
    small = {**large, "shape": (8, 64, 14, 14)}
    assert passes(1.0, 1.0, {"torch-compile": 0.5}, **small) == {"torch": True}
    assert passes(1.1, 1.0, **small) == {"torch": False}
    assert passes(1.0, 1.0, **{**large, "op": "forward"}) == {"torch": True}
    assert verdicts(compare(imagined_run())).empty


@pytest.mark.parametrize(("op", "limit"), [("forward", 1.15), ("backward", 1.2)])
def test_the_mean_over_the_suite_has_a_bar_in_each_layout(op: str, limit: float) -> None:
    rows = [
        row
        for layout, over_copy in (("contiguous", limit - 0.01), ("channels_last", limit + 0.01))
        for shape, factor in (((256, 64, 56, 56), 2.0), ((256, 128, 28, 28), 0.5))
        for row in on_gpu(9.0, over_copy * factor, 1.0, {}, op=op, shape=shape, layout=layout)
    ]
    assert mean_verdicts(compare(rows)) == [
        f"resnet50-256, {op}, bfloat16, contiguous, graph, 2 shapes: {limit - 0.01:.2f} x copy, bar {limit:g}: pass",
        f"resnet50-256, {op}, bfloat16, channels_last, graph, 2 shapes: {limit + 0.01:.2f} x copy, bar {limit:g}: MISS",
    ]


@pytest.mark.parametrize(("torch_s", "compile_s", "ending"), [(2.0, 1.3, "pass"), (1.99, 1.29, "MISS")])
def test_fused_layers_have_bars_for_the_means_over_resnet50(torch_s: float, compile_s: float, ending: str) -> None:
    rows = imagined_fused_gpu_run(torch_s, compile_s)
    how = "fused-256, forward + backward, bfloat16, channels_last, graph, 2 shapes"
    assert mean_verdicts(compare(rows)) == [
        f"{how}: {torch_s:.2f} x torch, bar 2: {ending}",
        f"{how}: {compile_s:.2f} x compile, bar 1.3: {ending}",
    ]
    assert set(verdicts(compare(rows))["limit"]) == {1.0}
    # torch.compile's is there where it was measured on all shapes.
    rows.remove(next(row for row in rows if row.provider == "torch-compile"))
    assert len(mean_verdicts(compare(rows))) == 1


# The tables.


def test_report_prints_every_measurement_and_the_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    note = "eager, not captured: reasons"
    small = {"suite": "2d", "shape": (4, 8), "plan": "cluster of 8", "note": note}
    save_rows(file, [*imagined_gpu_run(), *on_gpu(1.0, 0.5, 0.4, {"bnext-no-clusters": 0.6}, **small)])
    assert main(["report", str(file)]) == 0
    assert file.with_suffix(".png").exists()
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        *("32x512x7x7", "2.00", "(N,C)", "GB/s", "no cuDNN", "graph", "eager", "1.25 pass", "1.6 MISS", "1.20"),
        f"2d 4x8 bfloat16 contiguous forward graph: bnext {note}",
        "2 of 3 pass the bar against copy; 5 of 5 pass the bar against torch",
    ):
        assert part in text
    assert "compile bar" not in text, "a column of what was not measured"
    assert "…" not in text, "a number was cut"


def test_block_says_how_many_measurements_are_slower_and_which_least() -> None:
    pair = [row("torch", 1.0), row("bnext", 2.0), row("torch", 1.0, op="backward"), row("bnext", 1.5, op="backward")]
    pair += [row("torch", 1.0, op="eval"), row("bnext", 1.0, op="eval")]
    text = slower(compare(pair))
    assert text.startswith("bnext is slower than torch in 2 of 3 measurements; the slowest is forward of ")
    assert text.endswith(", at 0.50 of torch's speed.")
    assert slower(compare(pair[-2:])) == "bnext is slower than torch in 0 of 1 measurements."
    assert text in block(pair)


def test_block_of_a_gpu_has_replays_alone_and_its_bars() -> None:
    text = block(imagined_gpu_run())
    assert text.splitlines()[2:5] == [
        "| bfloat16 | contiguous | > 32 MB | **2.00** (1.05) | **1.60** (1.72) | **2.00** (1.05) |",
        "| bfloat16 | contiguous | 1-32 MB | **2.00** (2.00) |  |  |",
        "",
    ]
    for part in (
        "a device copy of the same bytes; passes",
        "Replays of CUDA graphs. Bars: ",
        "2 of 3 pass the bar against copy; 4 of 4 pass the bar against torch",
        "1.05 x copy, bar 1.15: pass.",
        "`python -m benchmarks --device cuda` on Imagined GPU (sm_90, driver 580.65), CUDA 13.0, cuDNN 91300, torch",
    ):
        assert part in text
    fused = block(imagined_fused_gpu_run())
    assert "`python -m benchmarks --device cuda --suite fused-256` on" in fused
    assert "1.30 x compile, bar 1.3: pass." in fused
