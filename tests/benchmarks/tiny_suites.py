"""Suites, models and a device that take no time, and runs of them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from host_gpu import HostGpu
from torch import nn

from benchmarks import measure, models, operators, timing, trainer_process, training
from benchmarks.__main__ import main
from benchmarks.cuda import device, rotation
from benchmarks.cuda import measure as cuda
from benchmarks.networks import Bottleneck, conv
from benchmarks.rows import Row, load_rows
from benchmarks.suites import (
    CHECKPOINT,
    COMPILED_PROVIDERS,
    EAGER_PROVIDERS,
    RECOMPUTE,
    SUITES,
    WITHOUT,
    Case,
    Input,
    Suite,
)
from benchmarks.traffic import BN_ADD_RELU, BN_RELU, BOTH_TOO, STEP, WALKS
from benchmarks.trainer_process import TrainerProcess
from benchmarks.training import Trainer

SHAPE = (4, 3, 8, 8)
CLASSES = 10
FIVE = (*EAGER_PROVIDERS, *COMPILED_PROVIDERS)


def classifier(_: object) -> nn.Module:
    layers = (conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), Bottleneck(16, 4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


PLAIN = Suite((Input((2, 3, 4, 4)), Input((4, 8))), BOTH_TOO, compiled=None, compiled_dtypes=("bfloat16",))
FUSED = replace(
    PLAIN,
    inputs=tuple(Input((2, 3, 4, 4), epilogue=epilogue) for epilogue in (BN_RELU, BN_ADD_RELU)),
    compiled_dtypes=("float32", "bfloat16"),
)
TRAINING = Suite(
    inputs=(Input(SHAPE, "tiny"),),
    operations=(STEP,),
    compiled=None,
    providers=FIVE,
    dtypes=("float32",),
    seconds=1,
    compile_s=1,
    peak_s=1,
)
TINY = {
    "tiny": PLAIN,
    "tiny-fused": FUSED,
    "training": TRAINING,
    "models": replace(TRAINING, providers=(*EAGER_PROVIDERS, WITHOUT), peak_s=0, threads=1),
    "memory": replace(
        TRAINING,
        compiled=(),
        providers=(*EAGER_PROVIDERS, RECOMPUTE, CHECKPOINT),
        layouts=("contiguous",),
        allocations=True,
    ),
    "walk": replace(TRAINING, operations=tuple(WALKS), providers=("torch", "bnext"), compiled=(), peak_s=0),
    "compiled": Suite(
        inputs=(Input((4, 8, 6, 6), "bn"), Input((4, 16, 6, 6), "bottleneck")),
        operations=("forward_backward", "eval"),
        compiled=None,
        providers=COMPILED_PROVIDERS,
        dtypes=("float32", "bfloat16"),
        layouts=("channels_last",),
        seconds=1,
    ),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suites, compiled by dynamo alone, on both devices; processes of trainers are in this one."""
    for suites in SUITES.values():
        for name, suite in TINY.items():
            monkeypatch.setitem(suites, name, suite)
    monkeypatch.setitem(models.MODELS, "tiny", classifier)
    training.reference_curve.cache_clear()  # another test may have had another "tiny"
    monkeypatch.setattr(models, "BACKENDS", dict.fromkeys(COMPILED_PROVIDERS, "eager"))
    monkeypatch.setattr(operators, "compiled", operators.out_of_place)
    monkeypatch.setattr(measure, "trainer_process", trainer_here)
    monkeypatch.setattr(measure, "WARM_BYTES", 1)
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(cuda, "Gpu", HostGpu)
    # What the calls take does not matter here: few of them.
    monkeypatch.setattr(rotation, "MAX_GRAPH_CALLS", 4)
    monkeypatch.setattr(timing, "MIN_ROUND_S", 1e-5)


class TrainerHere(TrainerProcess):
    """In this process, where its models have the suites' names; every peak is 5 MB."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(ProcessPoolExecutor(1))
        self._trainer = trainer

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function is trainer_process.peak_here:
            return 5_000_000
        with mock.patch.object(trainer_process, "_trainer", self._trainer, create=True):
            return function(*arguments)


@contextmanager
def trainer_here(case: Case, provider: str, device: str, threads: int) -> Iterator[TrainerHere]:
    yield TrainerHere(training.make_trainer(case, provider, training.make_model(case, device), device))


Run = Callable[..., "tuple[int, list[Row], list[str]]"]


@pytest.fixture
def run(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on a suite: the exit status, the rows it left in tmp_path, and the lines of its errors."""

    def measured(suite: str, *options: str, threads: int | None = 1) -> tuple[int, list[Row], list[str]]:
        threaded = ["--threads", str(threads)] if threads else []
        status = main(["--suite", suite, "--rounds", "1", *threaded, "--output", str(tmp_path), *options])
        file = tmp_path / "results.json"
        return status, load_rows(file) if file.exists() else [], capsys.readouterr().err.splitlines()

    return measured


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
