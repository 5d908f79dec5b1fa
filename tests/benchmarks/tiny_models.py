"""Models, suites and runs that take no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import measure, model_measure, models, timing
from benchmarks.__main__ import main
from benchmarks.model_suites import COMPILED_PROVIDERS, EAGER_PROVIDERS, MODEL_SUITES, STEP, WITHOUT, ModelSuite
from benchmarks.resnet import Bottleneck, conv

SHAPE = (4, 3, 8, 8)
FIVE = (*EAGER_PROVIDERS, *COMPILED_PROVIDERS)
CLASSES = 10


def classifier(_: object) -> nn.Module:
    layers = (conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), Bottleneck(16, 4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


TRAINING = ModelSuite(
    models=(("tiny", (SHAPE,)),),
    operations=(STEP,),
    providers=FIVE,
    dtypes=("float32",),
    layouts=("contiguous", "channels_last"),
    seconds=1,
    compile_s=1,
    peak_s=1,
)
CALLS = ModelSuite(
    models=(("bn", ((4, 8, 6, 6),)), ("bottleneck", ((4, 16, 6, 6),))),
    operations=("forward_backward", "eval"),
    providers=COMPILED_PROVIDERS,
    dtypes=("float32", "bfloat16"),
    layouts=("channels_last",),
    seconds=1,
    compile_s=1,
)


MODELS = replace(TRAINING, providers=(*EAGER_PROVIDERS, WITHOUT), compile_s=0, peak_s=0)


def make_tiny(monkeypatch: pytest.MonkeyPatch, *names: str, threads: int | None = None) -> None:
    """Of the suites, that of models with these models; compiled by dynamo alone; and every peak is 5 MB."""
    chosen = tuple((name, (SHAPE,)) for name in names or ("tiny",))
    monkeypatch.setitem(MODEL_SUITES["cpu"], "models", replace(MODELS, models=chosen, threads=threads))
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(MODEL_SUITES[device], "training", TRAINING)
        monkeypatch.setitem(MODEL_SUITES[device], "compiled", CALLS)
    monkeypatch.setitem(models.MODELS, "tiny", classifier)
    monkeypatch.setattr(models, "BACKENDS", dict.fromkeys(COMPILED_PROVIDERS, "eager"))
    monkeypatch.setattr(model_measure, "measure_peak", lambda *_: 5_000_000)
    monkeypatch.setattr(timing, "MIN_ROUND_S", 1e-5)
    monkeypatch.setattr(measure, "WARM_BYTES", 1)


def run(output: Path, suite: str, *options: str, own_threads: bool = False) -> int:
    threads = [] if own_threads else ["--threads", "1"]
    return main(["--suite", suite, "--rounds", "1", *threads, "--output", str(output), *options])


def spoil(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Give bnext's layers other settings than the model has."""
    convert = models.bnext.convert

    def wrong(module: nn.Module, **options: Any) -> nn.Module:
        convert(module, **options)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for name, value in settings.items():
                    setattr(layer, name, value)
        return module

    monkeypatch.setattr(models.bnext, "convert", wrong)
