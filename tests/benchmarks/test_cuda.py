"""What the benchmark does on a GPU alone: sets of tensors in rotation, times by events and graphs, what is missing."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from host_gpu import HostGpu

from benchmarks.cuda import device as gpu
from benchmarks.cuda.profiled import kernels
from benchmarks.cuda.rotation import GRAPH_BYTES, MAX_GRAPH_CALLS, MAX_SETS, Rotation, buffer_sets, calls_per_graph
from benchmarks.cuda.stopwatch import EmptyGraphError, EventStopwatch, graph_stopwatch, require_replay_writes
from bnext import _C

MB = 1_000_000


def test_sets_exceed_three_times_the_cache_as_far_as_memory_and_number_allow() -> None:
    for moved in (MB, 7 * MB, 59 * MB, 180 * MB - 1):
        sets = buffer_sets(moved, l2_bytes=60 * MB, memory_bytes=10**12)
        assert sets * moved > 3 * 60 * MB >= (sets - 1) * moved
    assert buffer_sets(181 * MB, l2_bytes=60 * MB, memory_bytes=10**12) == 1, "larger than the cache"
    assert buffer_sets(10 * MB, l2_bytes=60 * MB, memory_bytes=50 * MB) == 5
    assert buffer_sets(10 * MB, l2_bytes=60 * MB, memory_bytes=1) == 1
    assert buffer_sets(128, l2_bytes=60 * MB, memory_bytes=10**12) == MAX_SETS


@pytest.mark.parametrize(("moved", "sets"), [(128, MAX_SETS), (MB, 181), (70 * MB, 3), (10**9, 1), (10**10, 1)])
def test_a_graph_has_whole_rotations_and_enough_bytes_or_calls(moved: int, sets: int) -> None:
    calls = calls_per_graph(moved, sets)
    assert calls % sets == 0
    assert calls * moved >= GRAPH_BYTES or calls + sets > MAX_GRAPH_CALLS
    assert calls <= max(MAX_GRAPH_CALLS, sets)


def test_calls_rotate_in_the_context_and_results_stay_until_their_next_turn() -> None:
    events: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    def call(index: int) -> Callable[[], object]:
        def result() -> object:
            events.append(f"{index}")
            return f"{index}, turn {events.count(str(index))}"

        return result

    rotation = Rotation([call(index) for index in range(3)], context)
    assert rotation.run(5) == ["0, turn 2", "1, turn 2", "2, turn 1"]
    assert events == ["enter", "0", "1", "2", "0", "1", "leave"]


def test_events_give_seconds_and_nothing_is_collected_between_them() -> None:
    collecting: list[bool] = []
    device = HostGpu(clock=lambda: 0.25 * len(collecting))

    def call() -> None:
        collecting.append(gc.isenabled())

    assert EventStopwatch(device, Rotation([call] * 2).run).timeit(3) == pytest.approx(0.75)
    assert device.log == ["synchronize", "record", "record", "wait"]
    assert collecting == [False] * 3
    assert gc.isenabled()


def test_a_graph_is_replayed_whole_and_its_time_scaled() -> None:
    replays: list[int] = []
    device = HostGpu(clock=lambda: 0.25 * 10 * sum(replays))
    stopwatch = EventStopwatch(device, replays.append, calls=10, head_start=True)
    assert stopwatch.timeit(1) == pytest.approx(0.25)
    assert stopwatch.timeit(21) == pytest.approx(5.25)
    assert replays == [1, 3]
    assert device.log[:4] == ["synchronize", "occupy", "record", "record"], "busy before the clock starts"


def test_a_graph_is_captured_warm_and_replayed() -> None:
    made: list[int] = []

    def call() -> torch.Tensor:
        made.append(1)
        return torch.ones(3)

    stopwatch = graph_stopwatch(Rotation([call] * 2), 4, HostGpu())
    warm, captured, checked = 3, 4, 4
    assert len(made) == warm + captured + checked
    stopwatch.timeit(8)
    assert len(made) == warm + captured + checked + 8
    assert stopwatch.head_start


@pytest.mark.parametrize("result", [torch.ones(4), (torch.ones(4), torch.ones(2))])
def test_a_graph_that_does_not_write_the_result_is_an_error(result: Any) -> None:
    gpu = HostGpu()
    tensor = result[0] if isinstance(result, tuple) else result
    require_replay_writes(lambda: tensor.fill_(2.0), result, gpu)
    with pytest.raises(EmptyGraphError, match="does not write"):
        require_replay_writes(lambda: tensor[:2].fill_(2.0), result, gpu)
    with pytest.raises(EmptyGraphError, match="NoneType"):
        require_replay_writes(lambda: None, None, gpu)


@pytest.mark.parametrize(
    ("cuda_version", "available", "kernels", "message"),
    [
        (None, False, False, "was built without CUDA"),
        ("13.0", False, True, "no GPU is visible"),
        ("13.0", True, False, "bnext was built without its CUDA kernels"),
        ("13.0", True, True, "None"),
    ],
)
def test_what_is_missing_is_named(
    cuda_version: str | None, available: bool, kernels: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(_C, "cuda", kernels)
    assert message in str(gpu.missing())


def test_what_is_profiled_runs() -> None:
    calls = dict(kernels("cpu", batch=1))
    assert len(calls) == 6
    for call in calls.values():
        call()
