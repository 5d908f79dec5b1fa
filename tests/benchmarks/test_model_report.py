"""Whole models in bars and costs, from imagined runs; docs/benchmarks.md shows their tables."""

import pytest
from canned import imagined_costs, imagined_training, remembered, row, trained

from benchmarks import model_report
from benchmarks.model_report import block, compare, compare_costs, compiled_bar, cost_gone, cost_means, fused_bar
from benchmarks.shares import by_kind


def test_eager_is_compared_with_eager_and_compiled_with_compiled() -> None:
    found = compare(imagined_training()).set_index("provider")["speedup"]
    assert dict(found) == pytest.approx({"torch": 1.0, "bnext": 2.0, "torch-compile": 1.0, "bnext-compile": 3.0})
    alone = [row for row in imagined_training() if row.provider != "torch-compile"]
    assert set(compare(alone)["provider"]) == {"torch", "bnext"}, "what torch was not measured beside is left out"


def test_the_cost_that_is_gone() -> None:
    costs = compare_costs(compare([*trained(0.4, {"bnext": 0.2}), *imagined_costs()]))
    assert costs["model"].tolist() == ["resnet20", "unet", "unet"], "what has no cost, or is compiled, is told apart"
    gone = [[cost_gone(costs.loc[[line]], name) for line in costs.index] for name in ("bnext", "bnext-fused")]
    assert gone[0] == pytest.approx([0.5, 0.25, float("nan")], nan_ok=True)
    assert gone[1] == pytest.approx([1, -0.4, float("nan")], nan_ok=True)
    # Of several models the sum; what was not measured is left out.
    assert cost_gone(costs[:2], "bnext") == pytest.approx((0.125 + 0.0625) / (0.25 + 0.25))
    means = cost_means(costs).cells.to_numpy().tolist()
    speedups = ["1.10 (1.07-1.14)", "1.10 (0.91-1.33)", "1.33 (1.33-1.33)"]
    assert means[0] == ["float32", "contiguous", "2", *speedups, "38%", "30%"]
    assert [line[:3] for line in means[1:]] == [["float32", "channels_last", "1"], ["all", "all", "2"]]
    costs.loc[1, "bnext"] = float("nan")
    assert cost_gone(costs[:2], "bnext") == pytest.approx(0.5)


def test_what_was_counted_of_a_step_is_shown_of_every_provider() -> None:
    seconds = {"bnext": 0.3, "bnext-fused": 0.25, "without": 0.2}
    rows = trained(0.4, seconds, suite="models", page_faults=12_340.0)
    text = block(rows)
    assert "| 12.3, 12.3, 12.3, 12.3 | 500, 500, 500, 500 |" in text
    assert "each in a process of its own" in text
    bare = block(trained(0.4, seconds, suite="models", peak_bytes=None))
    assert "page faults" not in bare.lower()
    assert "in one process" in bare


def test_where_the_time_of_a_step_goes() -> None:
    events = [
        ("bnext::batch_norm_train", 1.0),
        ("aten::native_batch_norm_backward", 2.0),
        ("bnext::batch_norm_backward", 4.0),
        ("aten::native_batch_norm", 8.0),
        ("aten::mkldnn_convolution", 16.0),
        ("aten::addmm", 32.0),
        ("aten::hardtanh_backward", 64.0),
        ("aten::copy_", 128.0),
    ]
    found = by_kind(events, 1000.0)
    expected = {"batch norm": 9.0, "batch norm backward": 6.0, "convolution": 16.0, "matrix product": 32.0}
    assert found == {**expected, "activation": 64.0, "optimizer": 0.0, "rest": 873.0}
    text = block(trained(0.4, {"bnext": 0.3}, shares={kind: seconds / 1e3 for kind, seconds in found.items()}))
    assert "| bnext | 6.0 | 9.0 | 16.0 | 32.0 | 64.0 | 0.0 | 873.0 |" in text
    assert "profiler" not in block(trained(0.4, {"bnext": 0.3}))


def test_what_a_step_holds_beside_torchs() -> None:
    text = block(remembered())
    # 1000 MB - 70 MB is room for 93 images more than 8.
    assert "| bnext-recompute | 50.0 | 0.500 | 70.0 | 101 | 200.0 | 0.50 |" in text
    assert "| torch-checkpoint | 40.0 | 0.400 | 70.0 | 101 | 500.0 | 1.25 |" in text
    assert "last loss" not in text, "no other table"
    assert model_report.MEMORY_LEGEND in text
    assert model_report.MEMORY_LEGEND not in block(imagined_training())


def test_a_walk_is_shown_in_copies() -> None:
    seconds = {"torch": 0.006, "bnext": 0.003, "copy": 0.002}
    rows = [row(name, each, suite="walk", model="resnet50", op="walk_backward") for name, each in seconds.items()]
    assert "| walk + backward | 2.00 | 3.00 | 1.50 | 2.00 |" in block(rows)


def test_a_compiled_model_has_a_bar_and_a_small_one_has_to_be_as_fast_fused() -> None:
    times = {"forward_backward": (0.4, 0.1), "eval": (0.1, 0.2)}
    called = [
        row(name, seconds, suite="compiled", model="bottleneck", op=op, shape=(8, 256, 28, 28))
        for op, both in times.items()
        for name, seconds in zip(("torch-compile", "bnext-compile"), both, strict=True)
    ]
    calls = compare([*imagined_training(), *called])
    assert compiled_bar(calls[~calls["is_torch"]]).endswith("1 of 2 pass; geometric mean 1.41.")
    assert compiled_bar(compare(imagined_training())) == fused_bar(compare(imagined_costs())) == ""
    rows = [
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.2}, suite="small-models"),
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.31}, suite="small-models", layout="channels_last"),
    ]
    assert fused_bar(compare(rows)).endswith("1.500, 0.968. 1 of 2 pass.")
    assert model_report.curves_line(compare(called)) == ""


def test_training_has_memory_and_the_curves_summed_up() -> None:
    curves = model_report.curves_line(compare(imagined_training()))
    assert "7.0000 to 5.0000, then 6.5000 in evaluation; the providers' differ by 0.001 at most." in curves
    gpu = block(imagined_training(device="cuda"))
    assert "`python -m benchmarks --device cuda --suite training` on" in gpu
    assert "allocated memory" in gpu
    assert "peak" not in block(imagined_training(peak_bytes=None)).lower(), "none was measured"
