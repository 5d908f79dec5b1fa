"""How the range that trains depends on batch, ghost batches and initialisation: what is counted, drawn and said."""

from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from tuning_canned import MACHINE, trial

from benchmarks.document import TUNING_RANGE, markers
from benchmarks.style import BLUE, ORANGE, SKY
from studies.tuning.__main__ import main
from studies.tuning.ranges import draw_widths, widths
from studies.tuning.results import Results, load_results, save_results
from studies.tuning.settings import Point, Settings

# Between two α lies half a decade.
SETTINGS = Settings(
    steps=4,
    alphas=(0.1, 10**-0.5, 1.0),
    betas=(0.9, 0.99),
    seeds=(0, 1),
    inits=("torch", "glorot"),
    batch_sizes=(4, 16),
    virtual_batch_sizes=(4, 8),
)


def trains(point: Point) -> bool:
    """Without batch norm nothing trains. Ghost batches train at the smallest α. With batch norm everything trains, but
    from glorot with the second seed only the smallest α at β = 0.9."""
    if not point.batch_norm:
        return False
    if point.virtual_batch_size:
        return point.alpha == 0.1
    return point.init == "torch" or point.seed == 0 or (point.alpha, point.beta) == (0.1, 0.9)


def imagined() -> Results:
    return Results.of(SETTINGS, [MACHINE], [trial(point, [90 if trains(point) else 89]) for point in SETTINGS.points])


def test_a_study_has_each_network_once_and_ghost_batches_of_the_largest_batch() -> None:
    assert len(SETTINGS.points) == len(set(SETTINGS.points)) == 2 * (2 * 2 + 2) * 3 * 2 * 2
    ghosts = {(p.batch_size, p.virtual_batch_size) for p in SETTINGS.points if p.virtual_batch_size}
    assert ghosts == {(16, 4), (16, 8)}
    assert all(p.batch_norm for p in SETTINGS.points if p.virtual_batch_size)
    assert SETTINGS.evaluations == [4]


def test_width_is_the_decades_that_train_over_betas_and_seeds() -> None:
    found = {where: tuple(width) for where, *width in widths(imagined()).itertuples()}
    assert len(found) == 2 * (2 + 2 + 2)
    for values in (4, 16):
        assert found["torch", "without batch norm", values] == (0, 0, 0)
        assert found["torch", "with batch norm", values] == pytest.approx((1.5, 1.5, 1.5))
        # With the second seed one α of three trains at one β of two, and an α stands for half a decade.
        assert found["glorot", "with batch norm", values] == pytest.approx(((1.5 + 0.25) / 2, 0.25, 1.5))
    for values in (4, 8):
        assert found["glorot", "batch of 16 in parts", values] == pytest.approx((0.5, 0.5, 0.5))


def test_picture_has_a_panel_an_initialisation_and_a_line_a_kind() -> None:
    torch, glorot = draw_widths(imagined()).axes
    assert [torch.get_title(), glorot.get_title()] == ["initialisation torch", "initialisation glorot"]
    lines = {to_hex(line.get_color()): (list(line.get_xdata()), list(line.get_ydata())) for line in glorot.lines}
    assert lines == {
        ORANGE: ([4, 16], [0, 0]),
        BLUE: ([4, 16], pytest.approx([0.875, 0.875])),
        SKY: ([4, 8], pytest.approx([0.5, 0.5])),
    }


def test_report_from_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, document = tmp_path / "results.json", tmp_path / "D.md"
    save_results(file, imagined())
    assert load_results(file) == imagined()
    assert main(["report", str(file)]) == 0
    assert "0.9 (0.2 to 1.5)" in capsys.readouterr().out
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")
    document.write_text("".join(markers(TUNING_RANGE)))
    assert main(["report", str(file), "--document", str(document)]) == 0
    text = document.read_text()
    assert "| glorot | with batch norm | 0.9 (0.2 to 1.5) |  | 0.9 (0.2 to 1.5) |" in text
    assert "| glorot | batch of 16 in parts | 0.5 (0.5 to 0.5) | 0.5 (0.5 to 0.5) |  |" in text


@pytest.mark.parametrize("keep", [0, 1, 30])
def test_a_report_of_an_unfinished_study(keep: int, tmp_path: Path) -> None:
    save_results(tmp_path / "part.json", Results.of(SETTINGS, [MACHINE], imagined().trials[:keep]))
    assert main(["report", str(tmp_path / "part.json")]) == 0
