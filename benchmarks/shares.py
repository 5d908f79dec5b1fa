"""Where the time of a training step goes, by torch's profiler."""

import re
from collections.abc import Callable, Iterable
from timeit import Timer

from torch.profiler import ProfilerActivity, profile

# The kind of an operator is that of the first of these words that its name contains.
KINDS = {
    "batch norm backward": r"batch_?norm\w*_backward",
    "batch norm": r"batch_?norm",
    "convolution": r"convolution",
    "matrix product": r"::(addmm|mm|bmm|addmv|linear)$",
    "activation": r"relu|hardtanh|clamp|silu|hardswish|hardsigmoid|sigmoid|gelu|threshold|mish|elu",
    "optimizer": r"_foreach|Optimizer",
}
REST = "rest"


def by_kind(events: Iterable[tuple[str, float]], whole: float) -> dict[str, float]:
    """The seconds of named events, summed by kind, and the rest of ``whole``."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, seconds in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)
        if kind is not None:
            found[kind] += seconds
    return {**found, REST: whole - sum(found.values())}


def step_shares(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of a step by kind; an operator's exclude those it calls. The profiler's own time is included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        whole = Timer(step).timeit(steps)
    events = [(event.key, event.self_cpu_time_total / 1e6 / steps) for event in profiled.key_averages()]
    return by_kind(events, whole / steps)
