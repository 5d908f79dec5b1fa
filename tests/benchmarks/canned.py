"""Rows of runs that never took place, with times that are easy to compute with."""

from dataclasses import replace
from typing import Any

from benchmarks.rows import Row

ROW: dict[str, Any] = {
    "suite": "resnet50",
    "op": "forward",
    "shape": (32, 64, 112, 112),
    "dtype": "float32",
    "layout": "contiguous",
    "rounds": 9,
    "bytes": 1_000_000,
    "device": "cpu",
    "device_name": "Imagined CPU",
    "isa": "avx2",
    "threads": 2,
    "torch_version": "2.13.0",
    "bnext_version": "0.1.0",
    "python_version": "3.11.7",
    "commit": "0123456789ab",
    "date": "2025-01-02T03:04:05+00:00",
    "environment": {},
}
GPU: dict[str, Any] = {
    "suite": "resnet50-256",
    "shape": (256, 256, 56, 56),
    "dtype": "bfloat16",
    "device": "cuda",
    "device_name": "Imagined GPU",
    "isa": "sm_90",
    "mode": "graph",
    "buffer_sets": 2,
    "driver_version": "580.65",
    "cuda_version": "13.0",
    "cudnn_version": "91300",
}


def row(provider: str, median_s: float, **changes: Any) -> Row:
    times = {"median_s": median_s, "p20_s": 0.9 * median_s, "p80_s": 1.1 * median_s, "gb_per_s": 1e-3 / median_s}
    return Row(**{**ROW, **times, **changes}, provider=provider)


def rows_of(torch_s: float, bnext_s: float, copy_s: float, others: Any = None, **changes: Any) -> list[Row]:
    """One measurement: one row per provider."""
    seconds = {"torch": torch_s, "bnext": bnext_s, "copy": copy_s, **(others or {})}
    return [row(provider, median_s, **changes) for provider, median_s in seconds.items()]


def imagined_run() -> list[Row]:
    """Two shapes over 32 MB (speed-ups 8 and 2), one below, and one (N,C) tensor in two operations."""
    return [
        *rows_of(8.0, 1.0, 0.5),
        *rows_of(2.0, 1.0, 0.5, shape=(32, 256, 56, 56)),
        *rows_of(3.0, 2.0, 1.0, shape=(32, 512, 7, 7)),
        *rows_of(1.0, 2.0, 1.0, suite="2d", shape=(4, 8)),
        *rows_of(5.0, 4.0, 1.0, suite="2d", shape=(4, 8), op="forward_backward"),
    ]


def on_gpu(torch_s: float, bnext_s: float, copy_s: float, others: dict[str, float], **changes: Any) -> list[Row]:
    return rows_of(torch_s, bnext_s, copy_s, others, **{**GPU, **changes})


def imagined_gpu_run() -> list[Row]:
    """One large tensor in graphs, in all operations, and a small one in both modes."""
    compiled = {"torch-no-cudnn": 5e-4, "torch-compile": 3e-4}
    native = {"torch-no-cudnn": 3e-5}
    small: dict[str, Any] = {"suite": "resnet50-32", "shape": (32, 512, 7, 7)}
    return [
        *on_gpu(4e-4, 2e-4, 1.9e-4, compiled),
        *on_gpu(8e-4, 5e-4, 2.9e-4, compiled, op="backward"),
        *on_gpu(4e-4, 2e-4, 1.9e-4, {"torch-no-cudnn": 4e-4}, op="eval"),
        *on_gpu(2e-5, 1e-5, 0.5e-5, native, **small),
        *on_gpu(2e-5, 4e-5, 1e-5, native, **small, mode="eager"),
    ]


def imagined_fused_gpu_run(torch_s: float = 2.0, compile_s: float = 1.3) -> list[Row]:
    """A BN+ReLU and a BN+add+ReLU of ResNet-50, on which bnext takes a second; and slow rows outside of the mean."""
    listed: dict[str, Any] = {"suite": "fused-256", "op": "forward_backward", "layout": "channels_last", "act": "relu"}
    providers = {"torch-no-cudnn": 2 * torch_s, "torch-compile": compile_s}
    rows = [
        *on_gpu(torch_s, 1.0, 0.5, providers, **listed, shape=(256, 64, 112, 112)),
        *on_gpu(torch_s, 1.0, 0.5, providers, **listed, shape=(256, 256, 56, 56), residual=True),
    ]
    others: tuple[dict[str, Any], ...] = (
        *({"act": "silu"}, {"layout": "contiguous"}, {"dtype": "float32"}, {"op": "forward"}, {"mode": "eager"}),
        {"shape": (8, 64, 14, 14)},
    )
    for other in others:
        rows += on_gpu(0.5, 1.0, 0.5, {}, **{**listed, "shape": (256, 128, 28, 28), **other})
    return rows


def trained(torch_s: float, seconds: dict[str, float], **changes: Any) -> list[Row]:
    """A model in training."""
    fields = {"suite": "training", "model": "resnet50", "op": "step", "shape": (8, 3, 64, 64)}
    fields |= {"bytes": 0, "peak_bytes": 500_000_000, "losses": (7.0, 6.0, 5.0, 6.5), **changes}
    return [row(name, median_s, **fields) for name, median_s in {"torch": torch_s, **seconds}.items()]


def imagined_training(**changes: Any) -> list[Row]:
    """Twice as fast as torch eager, three times compiled."""
    rows = trained(0.4, {"bnext": 0.2, "torch-compile": 0.3, "bnext-compile": 0.1}, **changes)
    return [replace(row, losses=(7.0, 6.0, 5.0, 6.501)) if row.provider == "bnext" else row for row in rows]


def costed(model: str, torch_s: float, bnext_s: float, fused_s: float, without_s: float, **changes: Any) -> list[Row]:
    seconds = {"bnext": bnext_s, "bnext-fused": fused_s, "without": without_s}
    rows = trained(torch_s, seconds, **{"suite": "models", "model": model, "peak_bytes": None, **changes})
    return [replace(row, losses=()) if row.provider == "without" else row for row in rows]


def remembered(**changes: Any) -> list[Row]:
    """A step that holds half of torch's memory, and one that holds less, in more time."""
    rows = trained(0.4, {"bnext-recompute": 0.2, "torch-checkpoint": 0.5}, model="timm/vovnet39a", **changes)
    held = (100, 50, 40)
    return [replace(row, held_bytes=bytes, image_bytes=1.0) for row, bytes in zip(rows, held, strict=True)]


def imagined_costs(**changes: Any) -> list[Row]:
    """bnext saves a half of the cost, and fused all of it; a quarter, and fused less than nothing; there is no cost."""
    resnet = costed("resnet20", 0.4, 0.35, 0.3, 0.3, **changes)
    compiled = [replace(row, provider=f"{row.provider}-compile", median_s=row.median_s / 2) for row in resnet[:2]]
    unet = costed("unet", 0.4, 0.375, 0.44, 0.3, **changes)
    return [*resnet, *compiled, *unet, *costed("unet", 0.4, 0.5, 0.4, 0.41, layout="channels_last", **changes)]
