"""What the committed results of whole models, which test_document.py compares with their tables, do not show."""

from math import nan

import pytest
from canned import imagined_costs, imagined_training, row, trained

from benchmarks.model_report import block, compare, compare_costs, compiled_bar, cost_gone, cost_means, fused_bar
from benchmarks.shares import by_kind


def test_what_torch_was_not_measured_beside_is_left_out() -> None:
    found = compare(imagined_training()).set_index("provider")["speedup"]
    assert dict(found) == pytest.approx({"torch": 1.0, "bnext": 2.0, "torch-compile": 1.0, "bnext-compile": 3.0})
    alone = [row for row in imagined_training() if row.provider != "torch-compile"]
    assert set(compare(alone)["provider"]) == {"torch", "bnext"}


def test_saved_cost_of_slower_layers_of_no_cost_and_of_what_was_not_measured() -> None:
    costs = compare_costs(compare([*trained(0.4, {"bnext": 0.2}), *imagined_costs()]))
    assert costs["model"].tolist() == ["resnet20", "unet", "unet"], "training alone and compiled models have no cost"
    gone = [[cost_gone(costs.loc[[line]], name) for line in costs.index] for name in ("bnext", "bnext-fused")]
    assert gone[0] == pytest.approx([0.5, 0.25, nan], nan_ok=True)
    assert gone[1] == pytest.approx([1, -0.4, nan], nan_ok=True)
    assert cost_gone(costs[:2], "bnext") == pytest.approx((0.125 + 0.0625) / (0.25 + 0.25))
    speedups = ["1.10 (1.07-1.14)", "1.10 (0.91-1.33)", "1.33 (1.33-1.33)"]
    assert list(cost_means(costs).cells.iloc[0]) == ["float32", "contiguous", "2", *speedups, "38%", "30%"]
    costs.loc[1, "bnext"] = nan
    assert cost_gone(costs[:2], "bnext") == pytest.approx(0.5)


def test_kinds_of_operators() -> None:
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
    expected = {"batch norm": 9.0, "batch norm backward": 6.0, "convolution": 16.0, "matrix product": 32.0}
    assert by_kind(events, 1000.0) == {**expected, "activation": 64.0, "optimizer": 0.0, "rest": 873.0}


def test_a_bar_counts_what_passes() -> None:
    times = {"forward_backward": (0.4, 0.1), "eval": (0.1, 0.2)}
    called = [
        row(name, seconds, suite="compiled", model="bottleneck", op=op, shape=(8, 256, 28, 28))
        for op, both in times.items()
        for name, seconds in zip(("torch-compile", "bnext-compile"), both, strict=True)
    ]
    assert compiled_bar(compare([*imagined_training(), *called])).endswith("1 of 2 pass; geometric mean 1.41.")
    rows = [
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.2}, suite="small-models"),
        *trained(0.4, {"bnext": 0.3, "bnext-fused": 0.31}, suite="small-models", layout="channels_last"),
    ]
    assert fused_bar(compare(rows)).endswith("1.500, 0.968. 1 of 2 pass.")


def test_training_on_a_gpu_and_without_a_peak() -> None:
    gpu = block(imagined_training(device="cuda"))
    assert "`python -m benchmarks --device cuda --suite training` on" in gpu
    assert "allocated memory" in gpu
    assert "peak" not in block(imagined_training(peak_bytes=None)).lower()
