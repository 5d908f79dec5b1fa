"""Batch norm with an activation in rows, bars, tables, plot and README, from imagined runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from canned import imagined_fused_gpu_run, imagined_fused_run, imagined_gpu_run, imagined_run

from benchmarks.__main__ import main
from benchmarks.bars import mean_verdicts, summary, verdicts
from benchmarks.plot import draw
from benchmarks.readme import BEGIN, CUDA_BEGIN, CUDA_END, END, MARKERS, markdown
from benchmarks.report import Group, HeldKey, HeldShare, MeanKey, compare, geometric_means, held_shares
from benchmarks.rows import Row, load_rows, save_rows
from benchmarks.suites import BN_ADD_RELU

FUSED_BEGIN, FUSED_END = MARKERS["cpu", "fused", False]


def test_rows_survive_the_file_and_old_rows_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_rows(path, imagined_fused_run())
    assert load_rows(path) == imagined_fused_run()
    fields = json.loads(path.read_text())
    for name in ("act", "residual", "held_arguments_bytes", "held_result_bytes", "held_bytes"):
        del fields[0][name]
    path.write_text(json.dumps(fields))
    old = load_rows(path)[0]
    assert (old.act, old.residual, old.held_bytes) == ("", False, None)


def test_activations_of_one_shape_are_told_apart() -> None:
    labels = [comparison.label for comparison in compare(imagined_fused_run())]
    assert labels == [
        "32x256x56x56 add+relu",
        "32x256x56x56 add+relu",
        "32x64x112x112 relu",
        "8x64x14x14 relu",
        "8x64x14x14 silu",
    ]


def test_plain_and_fused_do_not_share_a_mean() -> None:
    means = geometric_means(compare([*imagined_fused_run(), *imagined_run()]))
    fused = Group("float32", "contiguous", fused=True)
    assert means[MeanKey(fused, "> 32 MB", "forward")].speedup == pytest.approx(2.0)
    assert means[MeanKey(fused, "> 32 MB", "forward_backward")].over_compile == pytest.approx((8.0 * 7.9) ** 0.5)
    assert means[MeanKey(fused, "< 1 MB", "forward_backward")].over_compile is None
    assert means[MeanKey(Group("float32", "contiguous"), "> 32 MB", "forward")].speedup == pytest.approx(4.0)
    assert [key.group.fused for key in means] == sorted(key.group.fused for key in means), "fused ones last"


def test_a_cpu_has_the_bars_of_the_issue() -> None:
    found = [(verdict.bar, verdict.limit, verdict.passed) for verdict in verdicts(compare(imagined_fused_run()))]
    assert found == [
        ("torch", 1.0, True),  # forward
        ("torch", 3.0, True),
        ("compile", 8.0, True),
        ("torch", 3.0, False),
        ("compile", 8.0, False),
        ("torch", 1.0, False),  # small
        ("torch", 1.0, True),
    ]
    assert summary(verdicts(compare(imagined_fused_run()))) == (
        "3 of 5 pass the bar against torch; 1 of 2 pass the bar against compile"
    )
    assert not mean_verdicts(compare(imagined_fused_run()))


@pytest.mark.parametrize(("torch_s", "compile_s", "passed"), [(2.0, 1.3, True), (1.99, 1.29, False)])
def test_a_gpu_has_those_of_the_means_over_resnet50(torch_s: float, compile_s: float, passed: bool) -> None:
    found = mean_verdicts(compare(imagined_fused_gpu_run(torch_s, compile_s)))
    assert [(verdict.bar, verdict.limit, verdict.passed) for verdict in found] == [
        ("torch", 2.0, passed),
        ("compile", 1.3, passed),
    ]
    assert [verdict.value for verdict in found] == pytest.approx([torch_s, compile_s])
    ending = "pass" if passed else "MISS"
    expected = (
        f"fused-256, forward + backward, bfloat16, channels_last, graph, 2 shapes: {torch_s:.2f} x torch, bar 2: "
    )
    assert str(found[0]) == expected + ending


def test_a_gpu_has_no_other_limits_a_shape() -> None:
    assert {verdict.limit for verdict in verdicts(compare(imagined_fused_gpu_run()))} == {1.0}


def test_without_torch_compile_on_all_shapes_there_is_no_bar_against_it() -> None:
    rows = imagined_fused_gpu_run()
    first = next(row for row in rows if row.provider == "torch-compile")
    rows.remove(first)
    assert [verdict.bar for verdict in mean_verdicts(compare(rows))] == ["torch"]


def test_memory_is_in_sizes_of_the_input() -> None:
    assert held_shares(imagined_fused_run()) == {
        HeldKey("float32", BN_ADD_RELU): {
            "torch": HeldShare(1.0, 1.0),
            "bnext": HeldShare(1 / 32, 0.0),
            "torch-compile": HeldShare(0.25, 0.0),
        }
    }
    assert not held_shares(imagined_run())


def report(rows: list[Row], path: Path) -> int:
    save_rows(path, rows)
    return main(["report", str(path)])


def test_report_prints_bars_compiled_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fused.json"
    assert report([*imagined_run(), *imagined_fused_run()], path) == 0
    printed = capsys.readouterr().out
    for part in (
        "float32, contiguous, fused",
        "32x256x56x56 add+relu",
        "3 pass",
        "3 MISS",
        "8 pass",
        "held by the graph",
        "0.031",
        "0.250",
        "3 of 5 pass the bar against torch",
    ):
        assert part in printed
    assert "no cuDNN" not in printed
    assert "copy bar" not in printed
    assert "…" not in printed, "a number was cut"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert report(imagined_run(), path) == 0
    plain = capsys.readouterr().out
    assert "compile" not in plain
    assert "held by" not in plain


def test_report_prints_the_means_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(imagined_fused_gpu_run(), tmp_path / "fused.json") == 0
    assert "channels_last, graph, 2 shapes: 1.30 x compile, bar 1.3: pass" in capsys.readouterr().out


def test_plot_has_a_bar_a_tensor() -> None:
    (panel,) = (axes for axes in draw(imagined_fused_run()).axes if axes.get_title().endswith("forward + backward"))
    assert panel.get_title() == "float32, contiguous, fused: forward + backward"
    assert [label.get_text() for label in panel.get_yticklabels()][-2:] == ["8x64x14x14 relu", "8x64x14x14 silu"]


def test_markdown_has_torch_compile_memory_and_bars() -> None:
    text = markdown(imagined_fused_run())
    assert "| float32 | contiguous | > 32 MB | **2.00** / 4.00 (2.00) | **2.95** / 7.95 (2.00) |" in text
    assert "| float32 | add+relu | 1.000 (1.000) | 0.031 (0.000) | 0.250 (0.000) |" in text
    assert "forward 2 (3 with a residual), forward + backward 5 (7 with a residual), and there a bit" in text
    assert "at least 3 times as fast as torch, 8 times as torch.compile" in text
    assert "1 of 2 pass the bar against compile." in text
    assert "`python -m benchmarks --suite fused` on" in text
    gpu = markdown(imagined_fused_gpu_run())
    assert "`python -m benchmarks --device cuda --suite fused-256` on" in gpu
    assert "2 shapes: 1.30 x compile, bar 1.3: pass." in gpu


def test_each_kind_has_its_own_block_of_the_readme(tmp_path: Path) -> None:
    file, readme = tmp_path / "run.json", tmp_path / "README.md"
    save_rows(file, [*imagined_fused_run(), *imagined_run()])
    command = ["report", str(file), "--readme", str(readme)]
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(command) == 2
    assert readme.read_text() == f"{BEGIN}\n{END}\n", "rewritten in part"
    readme.write_text(f"{BEGIN}\n{END}\nbetween\n{FUSED_BEGIN}\n{FUSED_END}\n")
    assert main(command) == 0
    blocks = markdown(imagined_run()), markdown(imagined_fused_run())
    assert readme.read_text() == f"{BEGIN}\n{blocks[0]}\n{END}\nbetween\n{FUSED_BEGIN}\n{blocks[1]}\n{FUSED_END}\n"
    assert main([*command, "--check"]) == 0


def test_the_blocks_of_a_gpu_are_others(tmp_path: Path) -> None:
    begin, end = MARKERS["cuda", "fused", False]
    file, readme = tmp_path / "run.json", tmp_path / "README.md"
    save_rows(file, [*imagined_gpu_run(), *imagined_fused_gpu_run()])
    readme.write_text(f"{CUDA_BEGIN}\n{CUDA_END}\n{begin}\n{end}\n")
    assert main(["report", str(file), "--readme", str(readme)]) == 0
    blocks = markdown(imagined_gpu_run()), markdown(imagined_fused_gpu_run())
    assert readme.read_text() == f"{CUDA_BEGIN}\n{blocks[0]}\n{CUDA_END}\n{begin}\n{blocks[1]}\n{end}\n"
