"""The bars of a GPU, and its rows in tables, plot and README, from imagined runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from canned import imagined_gpu_run, imagined_run, on_gpu

from benchmarks.__main__ import main
from benchmarks.bars import mean_verdicts, summary, verdicts
from benchmarks.plot import draw
from benchmarks.readme import BEGIN, CUDA_BEGIN, CUDA_END, END, markdown
from benchmarks.report import compare, how_measured
from benchmarks.rows import Row, load_rows, save_rows

NATIVE = {"torch-no-cudnn": 9.0}


def passes(bnext_s: float, copy_s: float = 1.0, torch_s: float = 9.0, others: Any = NATIVE, **changes: Any) -> Any:
    found = verdicts(compare(on_gpu(torch_s, bnext_s, copy_s, others, **changes)))
    return {verdict.bar: verdict.passed for verdict in found}


@pytest.mark.parametrize(
    ("op", "shape", "limit"),
    [
        ("forward", (256, 256, 56, 56), 1.6),
        ("eval", (256, 2048, 7, 7), 1.25),
        ("backward", (256, 64, 112, 112), 1.6),
    ],
)
def test_the_bar_against_the_copy_is_the_operations(op: str, shape: tuple[int, ...], limit: float) -> None:
    assert passes(limit, op=op, shape=shape)["copy"]
    assert not passes(limit + 0.01, op=op, shape=shape)["copy"]


@pytest.mark.parametrize(("op", "limit"), [("forward", 1.15), ("backward", 1.2)])
def test_the_mean_over_the_suite_has_a_bar_in_each_layout(op: str, limit: float) -> None:
    def mean(over_copy: float, layout: str) -> list[Row]:
        shapes = {(256, 64, 56, 56): 2.0, (256, 128, 28, 28): 0.5}
        return [
            row
            for shape, factor in shapes.items()
            for row in on_gpu(9.0, over_copy * factor, 1.0, NATIVE, op=op, shape=shape, layout=layout)
        ]

    rows = mean(limit - 0.01, "contiguous") + mean(limit + 0.01, "channels_last")
    assert [str(verdict) for verdict in mean_verdicts(compare(rows))] == [
        f"resnet50-256, {op}, bfloat16, contiguous, graph, 2 shapes: {limit - 0.01:.2f} x copy, bar {limit:g}: pass",
        f"resnet50-256, {op}, bfloat16, channels_last, graph, 2 shapes: {limit + 0.01:.2f} x copy, bar {limit:g}: MISS",
    ]


@pytest.mark.parametrize(
    "changes",
    [{"suite": "resnet50-32"}, {"dtype": "float32"}, {"mode": "eager"}, {"op": "forward_backward"}],
)
def test_elsewhere_there_is_only_the_bar_against_torch(changes: dict[str, Any]) -> None:
    assert passes(5.0, **changes) == {"torch": True}


def test_torch_is_the_faster_of_with_and_without_cudnn_but_not_the_compiled_one() -> None:
    assert passes(1.0, torch_s=1.0)["torch"]
    assert not passes(1.01, torch_s=1.0)["torch"]
    assert not passes(1.01, torch_s=2.0, others={"torch-no-cudnn": 1.0})["torch"]
    assert passes(1.01, torch_s=2.0, others={"torch-no-cudnn": 2.0, "torch-compile": 0.5})["torch"]


def test_a_cpu_has_no_bars() -> None:
    assert not verdicts(compare(imagined_run()))


def test_summary_counts_each_bar() -> None:
    found = verdicts(compare(imagined_gpu_run()))
    assert summary(found) == "2 of 3 pass the bar against copy; 4 of 5 pass the bar against torch"


def test_rows_of_a_gpu_survive_the_file_and_old_rows_get_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_rows(path, imagined_gpu_run())
    assert load_rows(path) == imagined_gpu_run()
    fields = json.loads(path.read_text())
    new = ("mode", "buffer_sets", "note", "driver_version", "cuda_version", "cudnn_version", "memory_bytes", "l2_bytes")
    for name in new:
        del fields[0][name]
    path.write_text(json.dumps(fields))
    assert load_rows(path)[0].mode == "clock"
    assert load_rows(path)[0].note == ""


def test_report_prints_bars_rates_other_providers_and_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    rows = imagined_gpu_run()
    rows += on_gpu(
        1.0,
        0.5,
        0.4,
        {"bnext-no-clusters": 0.6},
        suite="2d",
        plan="cluster of 8, read once",
        shape=(4, 8),
        note="eager, not captured: reasons",
    )
    save_rows(path, rows)
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "GB/s",
        "cuDNN",
        "bfloat16, contiguous, graph",
        "bfloat16, contiguous, eager",
        "1.25 pass",
        "1.6 MISS",
        "cluster of 8, read once",
        "no-clusters",
        "256x256x56x56",
        "2d 4x8 bfloat16 contiguous forward graph: bnext eager, not captured: reasons",
        "Imagined GPU (sm_90, driver 580.65), CUDA 13.0, cuDNN 91300",
    ):
        assert part in printed
    assert "…" not in printed, "a number was cut"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_the_time_of_the_device() -> None:
    titles = {axes.get_title() for axes in draw(imagined_gpu_run()).axes}
    assert "bfloat16, contiguous, graph: forward" in titles
    assert not any("eager" in title for title in titles)


def test_markdown_of_a_gpu_shows_graphs_and_bars() -> None:
    text = markdown(imagined_gpu_run())
    lines = text.splitlines()
    assert lines[0] == "| dtype | layout | tensor | forward | backward | eval |"
    assert lines[2:4] == [
        "| bfloat16 | contiguous | > 32 MB | **2.00** (1.05) | **1.60** (1.72) | **2.00** (1.05) |",
        "| bfloat16 | contiguous | 1-32 MB | **2.00** (2.00) |  |  |",
    ]
    assert "a device copy of the same bytes; passes" in text
    assert "2 of 3 pass the bar against copy; 4 of 4 pass the bar against torch" in text
    assert "`python -m benchmarks --device cuda` on Imagined GPU" in text


def test_each_device_has_its_own_block_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu, gpu, readme = tmp_path / "cpu.json", tmp_path / "gpu.json", tmp_path / "README.md"
    save_rows(cpu, imagined_run())
    save_rows(gpu, imagined_gpu_run())
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(["report", str(gpu), "--readme", str(readme)]) == 2
    assert CUDA_BEGIN in capsys.readouterr().err
    assert readme.read_text() == f"{BEGIN}\n{END}\n"
    readme.write_text(f"{BEGIN}\n{END}\nbetween\n{CUDA_BEGIN}\n{CUDA_END}\n")
    for file in (cpu, gpu):
        assert main(["report", str(file), "--readme", str(readme)]) == 0
    expected = f"{BEGIN}\n{markdown(imagined_run())}\n{END}\nbetween\n{CUDA_BEGIN}\n{markdown(imagined_gpu_run())}\n"
    assert readme.read_text() == f"{expected}{CUDA_END}\n"
    for file in (cpu, gpu):
        assert main(["report", str(file), "--readme", str(readme), "--check"]) == 0


def test_how_it_was_measured_is_one_line() -> None:
    assert "\n" not in how_measured(imagined_gpu_run())
    assert "allocator as it comes" in how_measured(imagined_gpu_run())
