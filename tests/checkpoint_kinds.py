"""The kinds of activation checkpoints: arguments of ``torch.utils.checkpoint.checkpoint`` by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def saves(word: str) -> Callable[[], Any]:
    """A `context_fn` of a checkpoint that saves the results of operators with this word in their names."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if word in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


KINDS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "save convolutions": {"use_reentrant": False, "context_fn": saves("conv")},
    "save batch norms": {"use_reentrant": False, "context_fn": saves("batch_norm")},
}
