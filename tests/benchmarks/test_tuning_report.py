"""The report of a tuning study from stored results, and the command's answers to bad input."""

from pathlib import Path

import pytest
from tuning_canned import SETTINGS, curve, imagined_study, trial

from studies.tuning.__main__ import RESULTS, main, make_parser, settings_of, study_name
from studies.tuning.analysis import conclusion, sides, trials
from studies.tuning.pictures import PICTURES, heat_maps, inputs, losses, moves, of_seeds
from studies.tuning.results import Results, load_results, save_results
from studies.tuning.settings import ALPHAS, BETAS, RANGE, SEEDS, Point, Settings


def test_report_from_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    save_results(file, imagined_study())
    assert main(["report", str(file)]) == 0
    printed = capsys.readouterr().out
    for part in (*conclusion(imagined_study()), "8 of 8", "4 of 8"):
        assert part in printed
    page = (tmp_path / "README.md").read_text()
    assert "| without | 4 of 8 | 50 % | 4 | 4 | 92.0 % | 0.1, 0.9 | 3 | 3 |" in page
    assert "| with batch norm | 8 of 8 | 100 % | 8 | 0 | 97.5 % | 0.1, 0.9 | 2 | 2 |" in page
    assert "| 0.999 → 0.9995 | 0.1 | 20.00 | 0.50 | 0.00 | 0.25 |" in page
    assert "Imagined CPU (avx2)" in page
    for name in PICTURES:
        assert name in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_heat_maps_show_the_cells() -> None:
    without, with_it, *_ = heat_maps(imagined_study()).axes
    assert without.images[0].get_array().tolist() == [[92, 92], [0, 0]]
    assert with_it.images[0].get_array().tolist() == [[97.5, 97.5], [97.5, 97.5]]
    assert [text.get_text() for text in without.texts] == ["92", "92", "0 ×", "0 ×"]  # noqa: RUF001
    assert without.images[0].get_clim() == with_it.images[0].get_clim() == (0, 100)


def test_curves_end_where_a_trial_diverged() -> None:
    without, with_it = losses(imagined_study()).axes
    lengths = sorted(len(line.get_xdata()) for line in without.lines)
    assert lengths == [1, 1, 2, 2, 4, 4]  # two crosses, two trials that diverged, two that did not
    assert {tuple(line.get_xdata()) for line in with_it.lines} == {(1, 2, 3, 4)}


def test_percentiles_are_drawn_at_the_best_without_batch_norm() -> None:
    study = imagined_study()
    for seed, axes in enumerate(inputs(study).axes):
        for line, batch_norm in zip(axes.lines, (False, True), strict=True):
            assert list(line.get_ydata()) == of_seeds(study, 0.1, 0.9, batch_norm)[seed].percentiles[1]


def test_bars_are_the_effects_of_the_moves() -> None:
    small, large = moves(imagined_study()).axes
    assert [bar.get_height() for bar in small.patches] == [0, 0, 0, 0]
    assert [bar.get_height() for bar in large.patches] == [20, 0, 0, 0]


@pytest.mark.parametrize("keep", [0, 3])
def test_a_report_of_an_unfinished_study(keep: int, tmp_path: Path) -> None:
    study = imagined_study()
    part = Settings(steps=4, alphas=(0.1,), betas=(0.99,), seeds=(0,)) if keep == 0 else study.settings
    save_results(tmp_path / "part.json", Results.of(part, study.machines, study.trials[:keep]))
    assert main(["report", str(tmp_path / "part.json")]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "expected a positive whole number, got '0'"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--alphas", "0.1,nan"], "expected positive numbers, got 'nan'"),
        (["--betas", "1"], "expected numbers from 0 to below 1, got '1'"),
        (["--seeds", "0.5"], "got '0.5'"),
        (["--inits", "glorot,he"], "'he' is not one of glorot, torch, normal"),
        (["--batch-sizes", "1"], "expected whole numbers from 2 on, got '1'"),
        (["--virtual-batch-sizes", "4,7"], "expected divisors of the largest batch, 60, got 7"),
        (["--batch-sizes", "8,16", "--virtual-batch-sizes", "16"], "of the largest batch, 16, got 16"),
        (["--storage", "sqlite:////no/such/folder/study.db"], "the storage failed: "),
        (["report", "/no/such.json"], "/no/such.json"),
        (["report", __file__], "is not JSON"),
        (["report", str(RESULTS.parent / "numerics.json")], "numerics.json holds no results of a tuning study"),
        (["report", "--check"], "--check needs --document"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] != "report":
        arguments = [*arguments, "--output", str(tmp_path)]
    try:
        status: object = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2
    assert said in error
    assert error.startswith("python -m benchmarks tuning")
    assert error.count("\n") == 1


def test_different_studies_have_different_names() -> None:
    options = ["", "--range", "--optimizer average", "--inits torch", "--steps 5", "--seeds 7", "--range --steps 5"]
    options += ["--batch-sizes 60,120", "--virtual-batch-sizes 4", "--inits torch --steps 5"]
    names = [study_name(settings_of(make_parser().parse_args(["run", *option.split()]))) for option in options]
    assert names[:2] == ["default", "range"]
    assert names[7] == "batch_sizes=60,120"
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 255, "it is the name of a folder"


@pytest.mark.parametrize(("folder", "settings"), [(".", Settings()), ("range", RANGE)], ids=["default", "range"])
def test_committed_results_are_the_two_studies(folder: str, settings: Settings) -> None:
    file = RESULTS / folder / "results.json"
    results = load_results(file)
    assert results.settings == settings
    assert [t.point for t in results.trials] == sorted(settings.points)
    assert file.stat().st_size < 350_000
    assert all(picture.stat().st_size < 150_000 for picture in (RESULTS / folder).glob("*.png"))


def test_curves_are_rounded_for_the_file_and_counts_are_not() -> None:
    point = Point(0.1, 0.9, True, 0)
    kept = trial(point, curve(point), loss=[1.23456789] * 4).rounded()
    assert kept.loss == [1.235] * 4
    assert kept.correct == curve(point)


# What is counted and compared.


def test_grid_is_complete_and_without_duplicates() -> None:
    points = Settings().points
    assert len(points) == len(set(points))
    grid = {(p.alpha, p.beta, p.batch_norm, p.seed) for p in points if p.beta in BETAS}
    assert grid == {(a, b, n, s) for a in ALPHAS for b in BETAS for n in (False, True) for s in SEEDS}
    # The end of one move of β is tried as well, and is not in the grid.
    assert {p.beta for p in points} - set(BETAS) == {0.9005}
    assert len(points) == 5 * 8 * 2 * 3


@pytest.mark.parametrize("steps", [1, 7, 300, 2000])
def test_evaluations_end_with_the_last_step(steps: int) -> None:
    found = Settings(steps=steps).evaluations
    assert found == sorted(set(found))
    assert found[0] >= 1
    assert found[-1] == steps
    assert len(found) <= 36


def test_a_diverged_trial_has_no_accuracy_from_there_on() -> None:
    found = trials(Results.of(SETTINGS, [], [trial(Point(1.0, 0.9, False, 0), [20, 30])])).iloc[0]
    assert found["curve"].tolist() == [20, 30, 0, 0]
    assert (found["final"], found["diverged_at"]) == (0, 3)


def test_a_trial_that_reached_the_goal_and_lost_it_does_not_train() -> None:
    points = [Point(0.1, 0.9, False, seed) for seed in (0, 1)]
    results = Results.of(SETTINGS, [], [trial(points[0], [50, 95, 96, 60]), trial(points[1], [50, 60, 80, 90])])
    found = sides(results).loc[False]
    assert (found["at_goal"], found["reached"], found["fewest"], found["steps"]) == (1, 2, 2, 3)


def test_conclusion_has_a_line_for_each_claim() -> None:
    assert conclusion(imagined_study()) == [
        "8 of 8 trials end at ≥ 90 % with batch norm, 4 of 8 without; best accuracy 97.5 % and 92.0 %; steps to 90 % "
        "where both train 2 and 3 (median).",
        "Where both train, the medians of the last hidden layer's inputs travel 1.0 widths (15th to 85th percentile) "
        "with batch norm, 3.0 without; the shorter way is batch norm's in 4 of 4 pairs.",
        # The medians of changes 20, 0, 0, 0 and of spreads 0.5, 0, 0.25, 0.25: two α, without and with batch norm.
        "β from 0.9 to 0.9005 changes 0.00 points of accuracy (another seed 0.25), from 0.999 to 0.9995 changes 0.00 "
        "points of accuracy (another seed 0.25); medians over α without and with batch norm.",  # noqa: RUF001
    ]
