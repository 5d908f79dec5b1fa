"""The sweep: its grid, a run of it, and what it finds among points whose times are easy to compute with."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from canned import rows_of
from tiny_suites import PLAIN, Run

from benchmarks.__main__ import main
from benchmarks.pictures import draw, drawn
from benchmarks.report import blocks
from benchmarks.rows import Row
from benchmarks.suites import SUITES, Input, select_cases
from benchmarks.sweep_report import points, steps
from benchmarks.traffic import LAYOUTS, Shape, model_bytes


def point(shape: Shape, bnext_s: float, torch_s: float = 9.0, copies: float = 1.0, op: str = "forward") -> list[Row]:
    """The 20th and 80th percentiles are 0.9 and 1.1 medians; copies take as long as they have bytes."""
    moved = model_bytes(op, shape, "float32")
    return rows_of(torch_s, bnext_s, copies * moved, suite="sweep", shape=shape, op=op, bytes=moved)


def found_steps(*measured: list[Row]) -> list[tuple[Shape, Shape, float]]:
    found = steps(points(list(chain(*measured))))
    return list(found[["shape", "shape_beside", "step"]].itertuples(index=False, name=None))


def test_grid_is_of_tensors_that_can_be_trained_on() -> None:
    cases = select_cases(["sweep"], "cpu", ["float32"])
    contiguous, channels_last = ({case.shape for case in cases if case.layout == layout} for layout in LAYOUTS)
    assert contiguous - channels_last == {shape for shape in contiguous if len(shape) == 2}
    assert {(2, 4096), (8, 1024), (128, 3, 112, 112)} <= contiguous
    assert not {(1, 4096), (8, 256), (128, 16, 112, 112)} & contiguous
    assert all(case.providers == ("torch", "bnext") for case in cases)


def test_command_leaves_a_picture_and_a_report_that_are_made_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tuple(map(Input, ((2, 3, 4, 4), (4, 3, 4, 4), (8, 16))))
    operations = ("forward", "backward", "eval")
    monkeypatch.setitem(SUITES["cpu"], "sweep", replace(PLAIN, inputs=inputs, operations=operations, compiled=()))
    status, rows, errors = run("sweep", "--dtype", "bfloat16")
    assert (status, errors) == (0, [])
    assert list(blocks(rows)) == ["benchmark:sweep"]
    assert len(points(rows)) == (3 + 2) * 3
    (tmp_path / "results.png").unlink()
    assert main(["report", str(tmp_path / "results.json")]) == 0
    output = capsys.readouterr().out
    assert "15 points" in output
    assert "python -m benchmarks --suite sweep" in output
    assert (tmp_path / "results.png").exists()
    assert [name for name, _ in drawn(tmp_path)] == ["sweep.png"]


def test_slower_is_what_the_spread_does_not_explain() -> None:
    # torch's 80th percentile is 1.1; bnext's 20th are 1.08 and 1.17.
    rows = [*point((8, 16, 4, 4), 1.2, 1.0), *point((8, 64, 4, 4), 1.3, 1.0), *point((8, 16), 1.0, 4.0, op="eval")]
    assert points(rows)["slower"].tolist() == [False, True, False]
    (text,) = blocks(rows).values()
    assert "3 points. bnext is slower than torch at 1 of them; the worst runs at 0.77 of torch's speed" in text
    assert "| float32 | contiguous | forward | 2 | 1 | 0.77 | 0.80 | 0 |" in text
    assert "| float32 | contiguous | eval | 1 | 0 | 4.00 | 4.00 | 0 |" in text
    assert "| float32 | contiguous | forward | 8x64x4x4 | 0.03 | 1300000.0 | 0.77 |" in text
    assert "8x16x4x4" not in text
    assert "Steps:" not in text


SMALL, MIDDLE, LARGE = (8, 16, 4, 4), (8, 64, 4, 4), (8, 256, 4, 4)


def test_a_step_is_more_than_overhead_and_bytes() -> None:
    # A second of overhead, and one for each tensor of SMALL's size.
    assert found_steps(point(SMALL, 2.0), point(MIDDLE, 5.0), point(LARGE, 17.0), point((1, 16, 16, 1), 1.0)) == []
    # From 2 follows 1 + (1.1 * 2 - 1) * 4 = 5.8 for MIDDLE, whose 20th percentile is 9.
    ((slow, beside, step),) = found_steps(point(SMALL, 2.0), point(MIDDLE, 10.0), point((2, 3, 8, 8), 1.0))
    assert (slow, beside) == (MIDDLE, SMALL)
    assert step == pytest.approx(9.0 / 5.8)
    # The smaller of two may be the slow one: 1 + (1.1 * 5 - 1) / 4 = 2.125, and 0.9 * 4 = 3.6.
    ((slow, beside, step),) = found_steps(point(SMALL, 4.0), point(MIDDLE, 5.0), point((2, 3, 8, 8), 1.0))
    assert (slow, beside) == (SMALL, MIDDLE)
    assert step == pytest.approx(3.6 / 2.125)


def test_a_step_is_listed_once_beside_what_predicts_least() -> None:
    overhead = point((2, 3, 8, 8), 1.0)
    ((slow, beside, _),) = found_steps(point(SMALL, 2.0), point(MIDDLE, 99.0), point(LARGE, 3.0), overhead)
    assert (slow, beside) == (MIDDLE, LARGE)


def test_a_step_that_the_copy_takes_too_is_none() -> None:
    overhead = point((2, 3, 8, 8), 1.0)
    assert found_steps(point(SMALL, 2.0), point(MIDDLE, 10.0, copies=1.5), overhead) == []


@pytest.mark.parametrize(
    ("shape", "op", "count"),
    [
        ((32, 16, 4, 4), "forward", 1),
        ((8, 64, 4, 4), "forward", 1),
        ((8, 16, 7, 7), "forward", 1),
        ((8, 16), "forward", 1),
        ((8, 256, 4, 4), "forward", 0),
        ((32, 64, 4, 4), "forward", 0),
        ((8, 64, 4, 4), "eval", 0),
    ],
)
def test_steps_are_between_neighbours_on_one_axis_of_one_operation(shape: Shape, op: str, count: int) -> None:
    # The grid has a notch between 16 and 256 channels, and an overhead in each operation.
    others = [*point((2, 64, 56, 56), 0.1), *point((2, 64, 56, 56), 0.1, op="eval")]
    assert len(found_steps(point(SMALL, 1.0), point(shape, 99.0, op=op), others)) == count


def test_picture_has_a_panel_a_batch_and_a_dot_where_it_is_slower() -> None:
    figure = draw([*point((8, 64, 4, 4), 1.3, 1.0), *point((8, 16), 1.0, 4.0), *point((32, 64), 1.0, 2.0)])
    assert figure
    eight, others, _ = figure.axes
    assert (eight.get_title(), others.get_title()) == ("N = 8", "N = 32")
    speedups = [axes.images[0].get_array().filled(0).tolist() for axes in (eight, others)]
    assert speedups == [[[4.0, 0.0], [0.0, pytest.approx(1 / 1.3)]], [[0.0, 0.0], [2.0, 0.0]]]
    assert [axes.collections[0].get_offsets().tolist() for axes in (eight, others)] == [[[1.0, 1.0]], []]
