"""Batch normalisation for PyTorch: drop-in layers, a functional call, and a converter for whole models."""

from bnext import functional
from bnext._version import __version__
from bnext.convert import convert, fusion_report, revert
from bnext.freezing import freeze, unfreeze
from bnext.heap import keep_freed_memory
from bnext.memory import recompute
from bnext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from bnext.population import update_bn
from bnext.sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "__version__",
    "convert",
    "freeze",
    "functional",
    "fusion_report",
    "keep_freed_memory",
    "recompute",
    "revert",
    "unfreeze",
    "update_bn",
]
