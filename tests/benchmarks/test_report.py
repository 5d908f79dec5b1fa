"""JSON, tables, plot and README block of python -m benchmarks, from an imagined run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from canned import imagined_run, row, rows_of

from benchmarks.__main__ import main
from benchmarks.readme import BEGIN, END, MARKERS, blocks, markdown, rewritten, update_blocks
from benchmarks.report import Group, MeanKey, compare, geometric_means, how_measured
from benchmarks.rows import InputError, load_rows, save_rows, write_atomically
from benchmarks.touched import VARIABLES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    save_rows(path, imagined_run())
    return path


def test_rows_survive_the_file(file: Path) -> None:
    assert load_rows(file) == imagined_run()


@pytest.mark.parametrize("content", ["", "{}", "[]", "[1]", '[{"shape": [4, 8]}]', '[{"shape": 3}]'])
def test_foreign_file_is_one_line_and_status_2(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(content)
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert "foreign.json" in error
    assert error.count("\n") == 1


def test_missing_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    path.write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_geometric_means_by_group_size_and_operation() -> None:
    means = geometric_means(compare(imagined_run()))
    images, table = Group("float32", "contiguous"), Group("float32", "(N,C)")
    assert list(means) == [
        MeanKey(images, "> 32 MB", "forward"),
        MeanKey(images, "1-32 MB", "forward"),
        MeanKey(table, "< 1 MB", "forward"),
        MeanKey(table, "< 1 MB", "forward_backward"),
    ]
    big = means[MeanKey(images, "> 32 MB", "forward")]
    assert big.speedup == pytest.approx(4.0)  # sqrt(8 * 2)
    assert big.over_copy == pytest.approx(2.0)
    assert big.worst_speedup == pytest.approx(2.0)
    assert big.shapes == 2


def test_a_row_without_its_providers_is_an_error() -> None:
    with pytest.raises(InputError, match="no measurement of copy, torch"):
        compare([row("bnext", 1.0)])


def test_two_runs_in_one_report_are_an_error() -> None:
    with pytest.raises(InputError, match="twice"):
        compare([*rows_of(1.0, 1.0, 1.0), *rows_of(2.0, 1.0, 1.0)])


def test_line_says_machine_versions_commit_and_environment() -> None:
    rows = [*rows_of(1.0, 1.0, 1.0, environment={"THP_MEM_ALLOC_ENABLE": "1"}), row("x", 1.0, rounds=5)]
    line = how_measured(rows)
    for part in (
        "Imagined CPU (avx2)",
        "2 threads",
        "torch 2.13.0",
        "bnext 0.1.0",
        "commit 0123456789ab",
        "2025-01-02",
        "median of 5 to 9 rounds",
        "THP_MEM_ALLOC_ENABLE=1",
    ):
        assert part in line
    assert "\n" not in line


def test_report_prints_every_shape_and_draws(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(file)]) == 0
    printed = capsys.readouterr().out
    for part in ("32x64x112x112", "32x256x56x56", "32x512x7x7", "4x8", "8.00", "0.50", "geometric means"):
        assert part in printed
    assert "…" not in printed, "a number was cut"
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_markdown_has_a_line_a_size_and_a_column_an_operation() -> None:
    lines = markdown(imagined_run()).splitlines()
    assert lines[0] == "| dtype | layout | tensor | forward | forward + backward |"
    assert lines[2:5] == [
        "| float32 | contiguous | > 32 MB | **4.00** (2.00) |  |",
        "| float32 | contiguous | 1-32 MB | **1.50** (2.00) |  |",
        "| float32 | (N,C) | < 1 MB | **0.50** (2.00) | **1.25** (4.00) |",
    ]


def test_rewriting_keeps_what_is_outside_the_markers() -> None:
    text = f"# title\n{BEGIN}\nold\n{END}\nend\n"
    new = rewritten(text, "block")
    assert new == f"# title\n{BEGIN}\nblock\n{END}\nend\n"
    assert rewritten(new, "block") == new


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_rewriting_needs_one_pair_of_markers(text: str) -> None:
    with pytest.raises(InputError):
        rewritten(text, "block")


def test_readme_is_checked_then_rewritten(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    command = ["report", str(file), "--readme", str(readme)]
    assert main([*command, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert readme.read_text() == f"before\n{BEGIN}\n{END}\nafter\n"
    assert main(command) == 0
    assert markdown(imagined_run()) in readme.read_text()
    assert main([*command, "--check"]) == 0
    assert not file.with_suffix(".png").exists(), "--readme only rewrites the README"


def test_readme_without_markers_is_one_line_and_status_2(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# title\n")
    assert main(["report", str(file), "--readme", str(readme)]) == 2
    assert main(["report", str(file), "--readme", str(tmp_path / "nothing.md")]) == 2
    assert main(["report", str(file), "--check"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert readme.read_text() == "# title\n"


def test_touched_memory_has_a_table_of_its_own(tmp_path: Path) -> None:
    rows = rows_of(4.0, 1.0, 0.5, environment=dict(VARIABLES))
    begin, end = MARKERS["cpu", "", True]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nas the user calls it\n{END}\n{begin}\n{end}\n")
    assert not update_blocks(readme, blocks(rows), check=False)
    text = readme.read_text()
    assert text.startswith(f"{BEGIN}\nas the user calls it\n{END}\n{begin}\n| dtype |")
    assert "`python -m benchmarks --touched`" in text
