"""How much of real models is fused, and why the rest is not.

    python tests/fusion [NAME ...]

of all models, or of those whose name holds one of the words; "=resnet50" is that alone.
"""

from __future__ import annotations

import copy
import sys

import torch
from counting import census, left, tensors
from real_models import MODELS, RealModel, why_not

import bnext

ROW = "{:44} {:>6} {:>6} {:>6} {:>6}  {}"


def counts(model: RealModel) -> tuple[list[int], list[str]]:
    """Batch norms, of those bnext's, what could be fused, what is; and lines about what is left."""
    original = model.make()
    converted = bnext.convert(copy.deepcopy(original), fuse=True)
    taken = []
    for each in (original, converted):
        torch.manual_seed(17)
        taken.append(census(each.train(), tensors(each(model.input().requires_grad_()))))
    unfused = left(*taken)
    could = len(taken[0].pairs)
    why: dict[str, list[str]] = {}
    for name, reason in bnext.fusion_report(converted).left:
        why.setdefault(name, []).append(reason)
    lines = [f"{pair}: {'; '.join(r for norm in pair.norms for r in why.get(norm, ['?']))}" for pair in unfused]
    if taken[0].norms != taken[1].norms:
        lines.append(f"{taken[0].norms} batch norms before")
    torch._dynamo.reset()
    return [taken[1].norms, taken[1].ours, could, could - len(unfused)], lines


def is_wanted(model: RealModel, words: list[str]) -> bool:
    return not words or any(word[1:] == model.name if word[:1] == "=" else word in str(model) for word in words)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    total = [0, 0, 0, 0]
    print(ROW.format("model", "norms", "ours", "could", "fused", "left"))
    for model in MODELS:
        reason = why_not(model.library)
        if not is_wanted(model, words) or reason is not None:
            continue
        numbers, lines = counts(model)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        print(ROW.format(str(model), *numbers, "; ".join(lines[:3])), flush=True)
    print(ROW.format("all", *total, ""))


main(sys.argv[1:])
