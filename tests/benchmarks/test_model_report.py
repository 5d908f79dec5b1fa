"""Whole models in rows, bars, tables and README, from imagined runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from canned import imagined_calls, imagined_run, imagined_training, trained

from benchmarks.__main__ import main
from benchmarks.model_report import bar_summary, compare_models, curves_line
from benchmarks.readme import BEGIN, END, MARKERS, markdown, rewritten
from benchmarks.rows import InputError, load_rows, save_rows
from benchmarks.touched import VARIABLES


def test_rows_survive_the_file_and_old_rows_are_of_no_model(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rows = [*imagined_training(), *imagined_calls()]
    save_rows(path, rows)
    assert load_rows(path) == rows
    fields = json.loads(path.read_text())
    for name in ("model", "peak_bytes", "losses"):
        del fields[0][name]
    path.write_text(json.dumps(fields))
    old = load_rows(path)[0]
    assert (old.model, old.peak_bytes, old.losses) == ("", None, ())


def test_eager_is_compared_with_eager_and_compiled_with_compiled() -> None:
    speedups = {c.row.provider: c.speedup for c in compare_models(imagined_training())}
    assert speedups == pytest.approx({"torch": 1.0, "bnext": 2.0, "torch-compile": 1.0, "bnext-compile": 3.0})


def test_what_torch_was_not_measured_beside_is_left_out() -> None:
    rows = [row for row in imagined_training() if row.provider != "torch-compile"]
    assert {c.row.provider for c in compare_models(rows)} == {"torch", "bnext"}


def test_two_runs_in_one_report_are_an_error() -> None:
    with pytest.raises(InputError, match="bnext step resnet50 8x3x64x64 float32 contiguous is there twice"):
        compare_models([*imagined_training(), *trained(1.0, {"bnext": 1.0})[1:]])


def test_a_compiled_model_has_a_bar_and_training_none() -> None:
    text = bar_summary(compare_models([*imagined_training(), *imagined_calls()]))
    assert text.endswith("2 of 3 pass; geometric mean 2.00.")
    assert bar_summary(compare_models(imagined_training())) == ""
    assert [c.passed for c in compare_models(imagined_calls()) if c.has_bar] == [True, False, True]


def test_the_curves_are_summed_up() -> None:
    line = curves_line(compare_models(imagined_training()))
    assert line == (
        "Losses of 3 steps from 7.0000 to 5.0000, then 6.5000 in evaluation; the providers' differ by 0.001 at most."
    )
    assert curves_line(compare_models(imagined_calls())) == ""


def test_report_prints_tables_and_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    save_rows(path, [*imagined_training(), *imagined_calls()])
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    for part in ("bnext-compile", "40.0", "3.00", "500", "5.0000", "8x256x28x28", "4.00", "0.50", "2 of 3 pass"):
        assert part in printed, part
    assert "…" not in printed, "a number was cut"
    assert [found.name for found in tmp_path.iterdir()] == ["run.json"]


def test_markdown_of_training() -> None:
    text = markdown(imagined_training())
    lines = text.splitlines()
    assert lines[0].startswith("| model | input | dtype | layout | layers | ms a step |")
    assert lines[2:6] == [
        "| resnet50 | 8x3x64x64 | float32 | contiguous | torch | 400.0 | 360.0-440.0 | 20.0 | 1.00 | 500 | 5.0000 |",
        "| resnet50 | 8x3x64x64 | float32 | contiguous | bnext | 200.0 | 180.0-220.0 | 40.0 | 2.00 | 500 | 5.0000 |",
        "| resnet50 | 8x3x64x64 | float32 | contiguous | torch-compile | 300.0 | 270.0-330.0 | 26.7 | 1.00 | 500 | "
        "5.0000 |",
        "| resnet50 | 8x3x64x64 | float32 | contiguous | bnext-compile | 100.0 | 90.0-110.0 | 80.0 | 3.00 | 500 | "
        "5.0000 |",
    ]
    assert "resident memory" in text
    assert "`python -m benchmarks --suite training` on Imagined CPU" in text
    gpu = markdown(imagined_training(device="cuda"))
    assert "`python -m benchmarks --device cuda --suite training` on" in gpu
    assert "allocated memory" in gpu


def test_markdown_of_calls_has_a_column_an_operation() -> None:
    lines = markdown(imagined_calls()).splitlines()
    assert lines[0] == (
        "| model | input | dtype | layout | layers | forward + backward, torch ms | ms | x torch | eval, torch ms | ms "
        "| x torch |"
    )
    assert lines[2:4] == [
        "| bottleneck | 8x256x28x28 | float32 | contiguous | bnext-compile | 400.000 | 100.000 | 4.00 | 100.000 | "
        "200.000 | 0.50 |",
        "| bn | 8x256x28x28 | float32 | contiguous | bnext-compile | 400.000 | 100.000 | 4.00 |  |  |  |",
    ]


def test_each_suite_has_its_own_block_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, readme = tmp_path / "run.json", tmp_path / "README.md"
    save_rows(file, [*imagined_training(), *imagined_calls(), *imagined_run()])
    command = ["report", str(file), "--readme", str(readme)]
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(command) == 2
    assert "<!-- benchmark:training:begin -->" in capsys.readouterr().err
    kinds = ("", "training", "compiled")
    readme.write_text("".join("{}\n{}\n".format(*MARKERS["cpu", what, False]) for what in kinds))
    assert main([*command, "--check"]) == 1
    assert main(command) == 0
    blocks = map(markdown, (imagined_run(), imagined_training(), imagined_calls()))
    expected = (
        "{0}\n{2}\n{1}\n".format(*MARKERS["cpu", what, False], block) for what, block in zip(kinds, blocks, strict=True)
    )
    assert readme.read_text() == "".join(expected)
    assert main([*command, "--check"]) == 0


@pytest.mark.parametrize(("what", "named"), [("fused", "fused"), ("training", "training")])
def test_there_is_no_block_of_them_in_touched_memory(what: str, named: str) -> None:
    assert VARIABLES
    with pytest.raises(InputError, match=f"no table for {named} in memory already touched"):
        rewritten("", "", ("cpu", what, True))
