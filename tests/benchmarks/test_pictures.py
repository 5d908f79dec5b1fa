"""The pictures beside results and of the README."""

from pathlib import Path

import pytest
from canned import (
    imagined_costs,
    imagined_gpu_run,
    imagined_run,
    imagined_training,
    remembered,
    row,
    rows_of,
)
from matplotlib.colors import to_hex
from matplotlib.image import imread
from test_numeric_errors import imagined, result

from benchmarks.__main__ import RESULTS, main
from benchmarks.document import DOCUMENT
from benchmarks.numerics_report import ULP
from benchmarks.pictures import LARGEST_ERROR, SMALLEST_ERROR, draw, draw_accuracy, draw_operators, drawn
from benchmarks.rows import TOUCHED, save_rows
from benchmarks.style import BLUE, ORANGE, SKY


def test_picture_has_two_bars_a_model_and_a_mark_without_batch_norm() -> None:
    figure = draw(imagined_costs(dtype="bfloat16"))
    assert figure
    (panel,) = figure.axes
    assert panel.get_title() == "bfloat16"
    # unet over both layouts: sqrt(0.4 / 0.375 * 0.4 / 0.5).
    unet = [(0.4 / 0.375 * 0.8) ** 0.5, (0.4 / 0.44) ** 0.5]
    assert [1 + bar.get_width() for bar in panel.patches] == pytest.approx([0.4 / 0.35, 0.4 / 0.3, *unet])
    *marks, _ = (line.get_xdata()[0] for line in panel.lines)  # the last is the line at 1
    assert marks == pytest.approx([4 / 3, (4 / 3 * 0.4 / 0.41) ** 0.5])
    assert draw(imagined_training()) is None


def test_memory_has_a_panel_of_what_is_held_and_one_of_time() -> None:
    figure = draw([*remembered(), *remembered(layout="channels_last", shape=(16, 3, 64, 64))])
    assert figure
    held, time = figure.axes
    assert [label.get_text() for label in held.get_yticklabels()] == ["vovnet39a"]
    for panel, ratios in ((held, [0.5, 0.4]), (time, [0.5, 1.25])):
        assert [1 + bar.get_width() for bar in panel.patches] == pytest.approx(ratios)
        assert [to_hex(bar.get_facecolor()) for bar in panel.patches] == [BLUE, ORANGE]


def test_variants_have_a_mark_at_bnexts_bar() -> None:
    seconds = {"plain": 2.0, "bnext": 2.4, "bnext-by-hand": 12.0, "torch-by-hand": 16.0}
    figure = draw([row(name, each, suite="variants", variant="lengths") for name, each in seconds.items()])
    assert figure
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["lengths, contiguous"]
    assert [1 + bar.get_width() for bar in panel.patches] == pytest.approx([1.2, 6.0, 8.0])
    assert panel.lines[0].get_xdata()[0] == 1.25


def test_operators_have_a_bar_a_group_and_size() -> None:
    rows = [*imagined_run(), *rows_of(0.5, 1.0, 1.0, op="backward")]
    forward, backward = draw_operators(rows, ["forward", "backward"]).axes
    assert [label.get_text() for label in forward.get_yticklabels()] == ["float32, contiguous", "float32, (N,C)"]
    assert [1 + bar.get_width() for bar in forward.patches] == pytest.approx([4.0, 1.5, 0.5])
    assert [to_hex(bar.get_facecolor()) for bar in forward.patches] == [BLUE, SKY, ORANGE]
    assert [text.get_text() for text in backward.texts] == ["0.50"]


def test_beside_a_file_all_operations_are_drawn_and_of_a_gpu_its_own_time() -> None:
    figure = draw(imagined_gpu_run())
    assert figure
    assert [axes.get_title() for axes in figure.axes] == ["forward", "backward", "eval"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["bfloat16, contiguous, graph"]


def test_accuracy_has_the_worst_error_of_each_case_and_labels_errors_beyond_the_scale() -> None:
    results = imagined(
        result(1e-7, 2e-3),
        result(2e-7, 1e-3, path="channels_last"),
        result(0.0, float("nan"), case="constant"),
        result(1e-8, float("inf"), quantity="grad_input"),
        result(0.5, 0.6, case="16 bits", unit=ULP),
    )
    output, grad_input = draw_accuracy(results).axes
    assert [label.get_text() for label in output.get_yticklabels()] == ["c", "constant"]
    points = [collection.get_offsets()[:, 0].tolist() for collection in output.collections[1:]]
    assert points == [pytest.approx([2e-7, SMALLEST_ERROR]), pytest.approx([2e-3, LARGEST_ERROR])]
    assert [text.get_text() for text in output.texts] == ["0", "NaN or inf"]
    assert [text.get_text() for text in grad_input.texts] == ["NaN or inf"]


def test_command_draws_a_picture_for_each_kind_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, output = tmp_path / "results", tmp_path / "new" / "pictures"
    results.mkdir()
    save_rows(results / "a.json", imagined_run())
    save_rows(results / "touched.json", rows_of(4.0, 1.0, 0.5, environment=dict(TOUCHED)))
    save_rows(results / "models.json", imagined_costs())
    command = ["pictures", "--results", str(results), "--output", str(output)]
    assert main(command) == 0
    names = ["models.png", "operators.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == set(names)
    save_rows(results / "b.json", imagined_run())
    assert main(command) == 2
    assert "two files for operators.png" in capsys.readouterr().err


def test_every_picture_is_committed() -> None:
    files = {path.name: path for path in (DOCUMENT.parent / "pictures").glob("*.png")}
    assert set(files) == {"tuning.png", "tuning-range.png", *(name for name, _ in drawn(RESULTS))}
    for name, file in files.items():
        assert imread(file).shape[1] == 800, name
        assert file.stat().st_size < 100_000, name
