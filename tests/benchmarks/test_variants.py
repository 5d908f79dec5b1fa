"""The variants: what a batch is told of, the ways that are compared, a run of them, and what their report says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from canned import row
from matplotlib.colors import to_hex
from tiny_suites import Run

from benchmarks import variants
from benchmarks.__main__ import main
from benchmarks.operators import make_tensors, results
from benchmarks.pictures import draw, drawn
from benchmarks.report import blocks
from benchmarks.rows import Row
from benchmarks.style import BLUE, ORANGE, SKY
from benchmarks.suites import GHOST, LENGTHS, RANDOM, RECTANGLES, SUITES, VARIANTS, Input, select_cases
from bnext import functional

SUITE = SUITES["cpu"][VARIANTS]
TINY = {
    LENGTHS: ((4, 3, 8),),
    RECTANGLES: ((4, 3, 6, 6),),
    RANDOM: ((4, 3, 6, 6),),
    GHOST: ((64, 3, 2, 2), (64, 3)),
}


@pytest.fixture
def small(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tuple(Input(shape, variant=name) for name, shapes in TINY.items() for shape in shapes)
    monkeypatch.setitem(SUITES["cpu"], VARIANTS, replace(SUITE, inputs=inputs))


def test_batches_are_padded_from_half_to_full() -> None:
    for case in select_cases([VARIANTS], dtypes=["float32"], layouts=["contiguous"]):
        ((name, told),) = variants.options(case).items()
        assert name == {LENGTHS: "lengths", GHOST: "virtual_batch_size"}.get(case.variant, "mask")
        n, _, *sizes = case.shape
        if case.variant == GHOST:
            assert told * 32 == n
        elif case.variant == RANDOM:
            assert float(told.float().mean()) == pytest.approx(0.8, abs=0.01)
        else:
            sides = [told] if case.variant == LENGTHS else [told.sum(1).amax(1), told.sum(2).amax(1)]
            for ends, size in zip(sides, sizes, strict=True):
                assert size // 2 <= ends.min() < ends.max() <= size
            if case.variant == RECTANGLES:
                assert torch.equal(told.sum((1, 2)), sides[0] * sides[1])
                assert told[:, 0, 0].all()


def test_by_hand_each_part_is_normalised_and_padding_left_out(small: None) -> None:
    # The mean of a normalised channel is its bias, and its variance that of the weight.
    for case in select_cases([VARIANTS], dtypes=["float64"]):
        tensors = make_tensors(case)
        assert (tensors.input.stride(1) == 1) == (case.layout == "channels_last" or len(case.shape) == 2)
        told = variants.options(case)
        output = results(variants.functions(case)["torch-by-hand"], tensors)["output"].movedim(1, -1)
        if case.variant == GHOST:
            parts = list(output.split(told["virtual_batch_size"]))
        else:
            valid = told["mask"] if "mask" in told else torch.arange(8) < told["lengths"][:, None]
            parts = [output[valid]]
            assert not output[~valid].any()
        for part in parts:
            torch.testing.assert_close(part.flatten(0, -2).mean(0), tensors.bias.detach())
            assert (part.flatten(0, -2).var(0) > 0.2).all()


def test_command_leaves_a_picture_and_a_report_that_are_made_again(
    small: None, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows, errors = run(VARIANTS)
    assert (status, errors) == (0, [])
    keys = {(row.variant, row.shape, row.dtype, row.layout, row.op, row.provider) for row in rows}
    # Four tensors in two layouts and a matrix; dtypes, operations, providers.
    assert len(keys) == len(rows) == (4 * 2 + 1) * 2 * 2 * 4
    assert list(blocks(rows)) == ["benchmark:variants"]
    (tmp_path / "results.png").unlink()
    assert main(["report", str(tmp_path / "results.json")]) == 0
    assert "python -m benchmarks --suite variants" in capsys.readouterr().out
    assert (tmp_path / "results.png").exists()
    assert [name for name, _ in drawn(tmp_path)] == ["variants.png"]


def test_what_is_computed_without_the_variant_is_an_error(
    small: None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = SimpleNamespace(batch_norm=lambda *arguments, **told: functional.batch_norm(*arguments))
    monkeypatch.setattr(variants, "functional", deaf)
    status, rows, errors = run(VARIANTS, "--dtype", "float32", "--layout", "contiguous")
    assert (status, rows) == (1, [])
    said = [line.partition(" float32 contiguous: ")[::2] for line in errors]
    assert [what.split(" variants ")[1] for what, _ in said] == [
        "lengths 4x3x8",
        "mask of rectangles 4x3x6x6",
        "random mask 4x3x6x6",
        "ghost batches 64x3x2x2",
        "ghost batches 64x3",
    ]
    assert all(wrong.startswith("output of bnext: ") for _, wrong in said)


def timed(bnext_s: float, by_hand_s: float | None, **changes: Any) -> list[Row]:
    """Plain takes 2 s; the 20th and 80th percentiles are 0.9 and 1.1 medians."""
    seconds = {"plain": 2.0, "bnext": bnext_s, "bnext-by-hand": by_hand_s, "torch-by-hand": 16.0}
    fields = {"suite": VARIANTS, "variant": LENGTHS, "shape": (4, 3, 8), **changes}
    return [row(name, value, **fields) for name, value in seconds.items() if value]


ROWS = [
    *timed(2.0, 8.0),
    *timed(4.0, 9.0, variant=GHOST, shape=(64, 3)),
    *timed(2.88, 18.0, dtype="bfloat16"),
    *timed(2.0, None, op="forward_backward"),
]


def test_ratios_have_their_spread_their_mean_and_their_bar() -> None:
    (text,) = blocks(ROWS).values()
    lines = text.splitlines()
    for line in (
        "| lengths | forward | 1.20 (1.00-1.44) | 6.00 (4.00-9.00) | 8.00 (8.00-8.00) | 1.25 pass |",
        "| lengths | forward + backward | 1.00 (1.00-1.00) |  | 8.00 (8.00-8.00) | 1.25 pass |",
        "| ghost batches | forward | 2.00 (2.00-2.00) | 4.50 (4.50-4.50) | 8.00 (8.00-8.00) | 1.15 MISS |",
        "| lengths | bfloat16 | contiguous | 4x3x8 | forward | 2000.000 "
        "| 1.44 (1.30-1.58) | 9.00 (8.10-9.90) | 8.00 (7.20-8.80) |",
    ):
        assert line in lines
    assert "2 of 4 single measurements are within them" in text


def test_picture_has_a_panel_an_operation_and_a_mark_at_the_bar() -> None:
    figure = draw([row for row in ROWS if row.op == "forward"])
    assert figure
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "lengths, contiguous",
        "ghost batches, contiguous",
    ]
    assert [1 + bar.get_width() for bar in panel.patches] == pytest.approx([1.2, 6.0, 8.0, 2.0, 4.5, 8.0])
    assert [to_hex(bar.get_facecolor()) for bar in panel.patches[:3]] == [BLUE, SKY, ORANGE]
    *marks, _ = (line.get_xdata()[0] for line in panel.lines)  # the last is the line at 1
    assert marks == [1.25, 1.15]
