"""What a training step holds in memory, and torch's own way to reduce it: checkpointing of blocks."""

import bisect
import copy
import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint


class Allocated(NamedTuple):
    """Bytes that a call has allocated: those that its result keeps alive, and the most at any time."""

    held: int
    peak: int


def allocated(call: Callable[[], object]) -> Allocated:
    """What a call allocates on the CPU, by torch's profiler, to which every allocator reports: exact, unlike resident
    memory."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    held = peak = 0
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return Allocated(held, peak)


def blocks_of(model: nn.Module) -> list[str]:
    """The names of a model's largest repeated parts that hold batch norms, in order: residual blocks, dense blocks and
    the like."""
    norms = {name: sum(isinstance(part, _BatchNorm) for part in m.modules()) for name, m in model.named_modules()}
    several = {name: m for name, m in model.named_modules() if norms[name] > 1 and not isinstance(m, nn.Sequential)}
    kinds = Counter(map(type, several.values()))
    found: list[str] = []
    for name, module in several.items():
        if kinds[type(module)] > 1 and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def checkpointed(model: nn.Module, blocks: list[str]) -> nn.Module:
    """A copy in which these parts keep only their inputs, and are computed again in backward."""
    module = copy.deepcopy(model)
    for name in blocks:
        block = module.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return module


def checkpointed_to(model: nn.Module, input: Tensor, limit: int) -> nn.Module:
    """A copy with the fewest first blocks checkpointed, one at least, that holds at most ``limit`` bytes, or else with
    all."""
    blocks = blocks_of(model)

    def fits(count: int) -> bool:
        return held_by(checkpointed(model, blocks[:count]), input) <= limit  # measured on a copy that is discarded

    count = 1 + bisect.bisect_left(range(1, len(blocks)), x=True, key=fits)
    return checkpointed(model, blocks[:count])


def held_by(model: nn.Module, input: Tensor) -> int:
    """The bytes that a model holds from forward to backward."""
    return allocated(lambda: model(input)).held
