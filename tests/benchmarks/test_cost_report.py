"""What batch norm costs models and how much of it is gone, in numbers, tables and picture, from imagined runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from canned import trained

from benchmarks.__main__ import main
from benchmarks.cost import Cost, compare_costs, cost_gone
from benchmarks.cost_plot import draw_costs
from benchmarks.model_report import compare_models, fused_bar
from benchmarks.readme import MARKERS, markdown
from benchmarks.rows import Row, save_rows


def costed(model: str, torch_s: float, bnext_s: float, fused_s: float, without_s: float, **changes: Any) -> list[Row]:
    seconds = {"bnext": bnext_s, "bnext-fused": fused_s, "without": without_s}
    fields: dict[str, Any] = {"suite": "models", "model": model, "peak_bytes": None, **changes}
    rows = trained(torch_s, seconds, **fields)
    return [replace(row, losses=()) if row.provider == "without" else row for row in rows]


def imagined_costs(**changes: Any) -> list[Row]:
    """Half of the cost gone, and fused all of it; a quarter, and fused less than nothing; no cost at all."""
    resnet = costed("resnet20", 0.4, 0.35, 0.3, 0.3, **changes)
    compiled = [replace(row, provider=f"{row.provider}-compile", median_s=row.median_s / 2) for row in resnet[:2]]
    unet = costed("unet", 0.4, 0.375, 0.44, 0.3, **changes)
    return [*resnet, *compiled, *unet, *costed("unet", 0.4, 0.5, 0.4, 0.41, layout="channels_last", **changes)]


def imagined() -> list[Cost]:
    return compare_costs(compare_models(imagined_costs()))[0]


def test_the_cost_that_is_gone() -> None:
    costs = imagined()
    assert [cost.gone("bnext") for cost in costs] == [pytest.approx(0.5), pytest.approx(0.25), None]
    assert [cost.gone("bnext-fused") for cost in costs] == [pytest.approx(1), pytest.approx(-0.4), None]


def test_of_several_models_the_sum_is_gone_and_what_was_not_measured_is_left_out() -> None:
    costs = imagined()[:2]
    assert cost_gone(costs, "bnext") == pytest.approx((0.125 + 0.0625) / (0.25 + 0.25))
    rows = [row for row in imagined_costs() if (row.model, row.provider) != ("unet", "bnext")]
    assert cost_gone(compare_costs(compare_models(rows))[0], "bnext") == pytest.approx(0.5)


def test_what_is_compiled_or_has_no_cost_is_told_apart() -> None:
    training = trained(0.4, {"bnext": 0.2})
    _, others = compare_costs(compare_models([*training, *imagined_costs()]))
    assert [(c.row.suite, c.row.provider) for c in others] == [
        ("training", "torch"),
        ("training", "bnext"),
        ("models", "torch-compile"),
        ("models", "bnext-compile"),
    ]


def test_markdown_leads_with_the_means() -> None:
    lines = markdown(imagined_costs()).splitlines()
    assert lines[0] == (
        "| dtype | layout | models | x torch, bnext | x torch, bnext-fused | x torch, without | cost gone, bnext | "
        "cost gone, bnext-fused |"
    )
    assert lines[2:5] == [
        "| float32 | contiguous | 2 | 1.10 (1.07-1.14) | 1.10 (0.91-1.33) | 1.33 (1.33-1.33) | 38% | 30% |",
        "| float32 | channels_last | 1 | 0.80 (0.80-0.80) | 1.00 (1.00-1.00) | 0.98 (0.98-0.98) |  |  |",
        "| all | all | 2 | 0.99 (0.80-1.14) | 1.07 (0.91-1.33) | 1.20 (0.98-1.33) | -13% | 32% |",
    ]
    assert lines[8:11] == [
        "| resnet20 | 8x3x64x64 | float32 | contiguous | 400.0 | 1.14 | 1.33 | 1.33 | 50% | 100% |",
        "| unet | 8x3x64x64 | float32 | contiguous | 400.0 | 1.07 | 0.91 | 1.33 | 25% | -40% |",
        "| unet | 8x3x64x64 | float32 | channels_last | 400.0 | 0.80 | 1.00 | 0.98 |  |  |",
    ]
    compiled = "| resnet20 | 8x3x64x64 | float32 | contiguous | bnext-compile | 175.0 | 315.0-385.0 | 45.7 | 1.14 |"
    assert compiled in lines[15]
    assert "peak" not in "\n".join(lines).lower(), "none was measured"


def test_a_long_table_is_folded() -> None:
    rows = [row for number in range(25) for row in imagined_costs(shape=(number + 1, 3, 64, 64))]
    text = markdown(rows)
    assert text.startswith("| dtype |")
    assert text.count("<details>") == text.count("</details>") == 2
    assert "<details>" not in markdown(imagined_costs())


def test_report_draws_a_bar_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, readme = tmp_path / "run.json", tmp_path / "README.md"
    save_rows(file, imagined_costs())
    assert main(["report", str(file)]) == 0
    assert file.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "…" not in printed, "a number was cut"
    assert "-40%" in printed
    figure = draw_costs(imagined_costs())
    assert figure
    panels = {axes.get_title(): axes for axes in figure.axes}
    widths = {title: [bar.get_width() for bar in axes.patches] for title, axes in panels.items()}
    assert widths == {"float32, contiguous": pytest.approx([1, -0.25]), "float32, channels_last": []}
    assert draw_costs(trained(0.4, {"bnext": 0.2})) is None

    readme.write_text("{}\n{}\n".format(*MARKERS["cpu", "models", False]))
    assert main(["report", str(file), "--readme", str(readme)]) == 0
    assert markdown(imagined_costs()) in readme.read_text()


def test_a_small_model_has_to_be_as_fast_fused_as_not() -> None:
    rows = [
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.2}, suite="small-models"),
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.31}, suite="small-models", layout="channels_last"),
    ]
    assert fused_bar(compare_models(rows)).endswith("1.500, 0.968. 1 of 2 pass.")
    assert fused_bar(compare_models(rows)) in markdown(rows)
    assert fused_bar(compare_models(imagined_costs())) == ""
