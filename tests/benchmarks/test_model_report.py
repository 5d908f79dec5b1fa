"""Whole models in bars, costs and tables, from imagined runs."""

from __future__ import annotations

import pytest
from canned import imagined_calls, imagined_costs, imagined_training, trained

from benchmarks.model_report import block, compare, compare_costs, compiled_bar, cost_gone, curves_line, fused_bar
from benchmarks.rows import InputError


def test_eager_is_compared_with_eager_and_compiled_with_compiled() -> None:
    found = compare(imagined_training()).set_index("provider")["speedup"]
    assert dict(found) == pytest.approx({"torch": 1.0, "bnext": 2.0, "torch-compile": 1.0, "bnext-compile": 3.0})
    alone = [row for row in imagined_training() if row.provider != "torch-compile"]
    assert set(compare(alone)["provider"]) == {"torch", "bnext"}, "what torch was not measured beside is left out"


def test_two_runs_in_one_report_are_an_error() -> None:
    with pytest.raises(InputError, match="bnext step resnet50 8x3x64x64 float32 contiguous is there twice"):
        compare([*imagined_training(), *trained(1.0, {"bnext": 1.0})[1:]])


def test_the_cost_that_is_gone() -> None:
    costs = compare_costs(compare([*trained(0.4, {"bnext": 0.2}), *imagined_costs()]))
    assert costs["model"].tolist() == ["resnet20", "unet", "unet"], "what has no cost, or is compiled, is told apart"
    gone = [[cost_gone(costs.loc[[line]], name) for line in costs.index] for name in ("bnext", "bnext-fused")]
    assert gone[0] == pytest.approx([0.5, 0.25, float("nan")], nan_ok=True)
    assert gone[1] == pytest.approx([1, -0.4, float("nan")], nan_ok=True)
    # Of several models the sum; what was not measured is left out.
    assert cost_gone(costs[:2], "bnext") == pytest.approx((0.125 + 0.0625) / (0.25 + 0.25))
    costs.loc[1, "bnext"] = float("nan")
    assert cost_gone(costs[:2], "bnext") == pytest.approx(0.5)


def test_a_compiled_model_has_a_bar_and_a_small_one_has_to_be_as_fast_fused() -> None:
    calls = compare([*imagined_training(), *imagined_calls()])
    assert compiled_bar(calls[~calls["is_torch"]]).endswith("2 of 3 pass; geometric mean 2.00.")
    assert compiled_bar(compare(imagined_training())) == fused_bar(compare(imagined_costs())) == ""
    rows = [
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.2}, suite="small-models"),
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.31}, suite="small-models", layout="channels_last"),
    ]
    assert fused_bar(compare(rows)).endswith("1.500, 0.968. 1 of 2 pass.")
    assert fused_bar(compare(rows)) in block(rows)


def test_the_curves_are_summed_up() -> None:
    assert curves_line(compare(imagined_training())) == (
        "Losses of 3 steps from 7.0000 to 5.0000, then 6.5000 in evaluation; the providers' differ by 0.001 at most."
    )
    assert curves_line(compare(imagined_calls())) == ""


def test_block_of_training() -> None:
    text = block(imagined_training())
    lines = text.splitlines()
    assert lines[0] == (
        "| model | input | dtype | layout | layers | ms a step | 20-80 % | images/s | x torch | peak MB | last loss |"
    )
    case = "| resnet50 | 8x3x64x64 | float32 | contiguous |"
    assert lines[2:6] == [
        f"{case} torch | 400.0 | 360.0-440.0 | 20.0 | 1.00 | 500 | 5.0000 |",
        f"{case} bnext | 200.0 | 180.0-220.0 | 40.0 | 2.00 | 500 | 5.0000 |",
        f"{case} torch-compile | 300.0 | 270.0-330.0 | 26.7 | 1.00 | 500 | 5.0000 |",
        f"{case} bnext-compile | 100.0 | 90.0-110.0 | 80.0 | 3.00 | 500 | 5.0000 |",
    ]
    assert "resident memory" in text
    assert "`python -m benchmarks --suite training` on Imagined CPU" in text
    gpu = block(imagined_training(device="cuda"))
    assert "`python -m benchmarks --device cuda --suite training` on" in gpu
    assert "allocated memory" in gpu
    assert "peak" not in block(imagined_training(peak_bytes=None)).lower(), "none was measured"


def test_block_of_calls_has_columns_an_operation() -> None:
    lines = block(imagined_calls()).splitlines()
    assert lines[0] == (
        "| model | input | dtype | layout | layers | forward + backward, torch ms | ms | x torch | eval, torch ms | ms "
        "| x torch |"
    )
    case = "8x256x28x28 | float32 | contiguous | bnext-compile | 400.000 | 100.000 | 4.00 |"
    assert lines[2:4] == [f"| bottleneck | {case} 100.000 | 200.000 | 0.50 |", f"| bn | {case}  |  |  |"]


def test_block_of_costs_leads_with_the_means_and_folds_a_long_table() -> None:
    lines = block(imagined_costs()).splitlines()
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
    assert "<details>" not in "\n".join(lines)
    long = block([row for number in range(25) for row in imagined_costs(shape=(number + 1, 3, 64, 64))])
    assert long.startswith("| dtype |")
    assert long.count("<details>") == long.count("</details>") == 2
