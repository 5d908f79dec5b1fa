"""The sweep: its grid, its steps, and its picture. test_document.py compares its tables with 1,740 measured points."""

from itertools import chain

import pytest
from canned import rows_of

from benchmarks.pictures import draw
from benchmarks.rows import Row
from benchmarks.suites import select_cases
from benchmarks.sweep_report import points, steps
from benchmarks.traffic import LAYOUTS, Shape, model_bytes

SMALL, MIDDLE, LARGE = (8, 16, 4, 4), (8, 64, 4, 4), (8, 256, 4, 4)


def point(shape: Shape, bnext_s: float, torch_s: float = 9.0) -> list[Row]:
    """The 20th and 80th percentiles are 0.9 and 1.1 medians; copies take as long as they have bytes."""
    moved = model_bytes("forward", shape, "float32")
    return rows_of(torch_s, bnext_s, moved, suite="sweep", shape=shape, bytes=moved)


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


def test_a_step_is_more_than_overhead_and_bytes() -> None:
    # A second of overhead, and one for each tensor of SMALL's size.
    assert found_steps(point(SMALL, 2.0), point(MIDDLE, 5.0), point(LARGE, 17.0), point((1, 16, 16, 1), 1.0)) == []
    # 2 s predict 1 + (1.1 * 2 - 1) * 4 = 5.8 s for MIDDLE, whose 20th percentile is 9 s.
    ((slow, beside, step),) = found_steps(point(SMALL, 2.0), point(MIDDLE, 10.0), point((2, 3, 8, 8), 1.0))
    assert (slow, beside) == (MIDDLE, SMALL)
    assert step == pytest.approx(9.0 / 5.8)
    # The smaller of two may be the slow one: 1 + (1.1 * 5 - 1) / 4 = 2.125, and 0.9 * 4 = 3.6.
    ((slow, beside, step),) = found_steps(point(SMALL, 4.0), point(MIDDLE, 5.0), point((2, 3, 8, 8), 1.0))
    assert (slow, beside) == (SMALL, MIDDLE)
    assert step == pytest.approx(3.6 / 2.125)


def test_picture_has_a_panel_a_batch_and_a_dot_where_it_is_slower() -> None:
    figure = draw([*point((8, 64, 4, 4), 1.3, 1.0), *point((8, 16), 1.0, 4.0), *point((32, 64), 1.0, 2.0)])
    assert figure
    eight, others, _ = figure.axes
    assert (eight.get_title(), others.get_title()) == ("N = 8", "N = 32")
    speedups = [axes.images[0].get_array().filled(0).tolist() for axes in (eight, others)]
    assert speedups == [[[4.0, 0.0], [0.0, pytest.approx(1 / 1.3)]], [[0.0, 0.0], [2.0, 0.0]]]
    assert [axes.collections[0].get_offsets().tolist() for axes in (eight, others)] == [[[1.0, 1.0]], []]
