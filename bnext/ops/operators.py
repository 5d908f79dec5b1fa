"""The operators, and the arguments of their calls by name, as the schemas say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bnext import _C  # noqa: F401  (registers the operators)

batch_norm_train = torch.ops.bnext.batch_norm_train.default
batch_norm_eval = torch.ops.bnext.batch_norm_eval.default
batch_norm_backward = torch.ops.bnext.batch_norm_backward.default
batch_norm_recompute = torch.ops.bnext.batch_norm_recompute.default
batch_norm_stats = torch.ops.bnext.batch_norm_stats.default
batch_norm_gathered = torch.ops.bnext.batch_norm_gathered.default
batch_norm_sync = torch.ops.bnext.batch_norm_sync.default
batch_norm_sync_backward = torch.ops.bnext.batch_norm_sync_backward.default
sequence_mask = torch.ops.bnext.sequence_mask.default
all_reduce_sum = torch.ops.bnext.all_reduce_sum.default


def bind(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call, those left at their defaults included, in the schema's order."""
    schema = op._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def number_of_parts(images: int, virtual_batch_size: int) -> int:
    """How many parts, each normalised by itself, a batch has: as in csrc/common/problem.h, without a guard on a
    symbolic number of images."""
    return torch.sym_max(1, -(-images // virtual_batch_size)) if virtual_batch_size else 1
