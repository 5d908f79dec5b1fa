"""The launch geometry of the CUDA kernels, a pure host function: what holds of any plan, and some worked examples."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, name
from hypothesis import given, settings
from hypothesis import strategies as st
from simt.device import GROUPS, TILES, load
from ways import KB, LAYOUTS, PATHS, WAYS

pytestmark = pytest.mark.simt

MAX_THREADS = 512
MAX_GRID = 2**31 - 1


class Device(NamedTuple):
    sms: int
    shared_per_block: int
    max_cluster: int
    l2_bytes: int
    cooperative: bool = True


H200 = Device(132, 227 * KB, 16, 60 << 20)
RTX5090 = Device(170, 99 * KB, 8, 96 << 20)
A100 = Device(108, 163 * KB, 1, 40 << 20)
L4 = Device(58, 99 * KB, 1, 48 << 20)
TINY = Device(1, 99 * KB, 1, 1 << 20)
SHARED_H200 = H200._replace(cooperative=False)
GPUS = (H200, RTX5090, A100, L4, TINY, SHARED_H200)


def gpu_name(gpu: Device) -> str:
    return f"{gpu.sms}SMs{'' if gpu.cooperative else '-shared'}"


# The channels and the side of the square planes of ResNet-50.
RESNET = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
# (N, C, HW) at the edges of the index types.
HUGE = ((2**33, 1, 1), (1, 2**33, 1), (1, 1, 2**33), (70_000, 64, 1), (900_000, 3, 49), (2**20, 2**11, 2**9))


class Call(NamedTuple):
    """What of a call the geometry depends on."""

    inputs: int
    reads_mask: bool = False
    reduces: bool = True
    activated: bool = False


FORWARD = Call(1)
BACKWARD = Call(2)
CALLS = (
    FORWARD,
    BACKWARD,
    Call(1, reduces=False),
    Call(1, activated=True),  # forward, also with a residual: only the map reads it
    Call(2, activated=True),  # backward of a smooth activation
    Call(3, activated=True),  # the same with a residual
    Call(1, reads_mask=True, activated=True),  # backward by a mask, without the input
    Call(2, reads_mask=True, activated=True),  # backward by a mask, with the input
    Call(1, reads_mask=True, reduces=False, activated=True),  # backward by a mask in evaluation
)


def make_plan(shape: tuple[int, int, int], last: bool, dtype: torch.dtype, call: Call, gpu: Device) -> dict[str, int]:
    load()
    return dict(torch.ops.bnext_simt.plan(*shape, last, dtype, *call, *gpu))


def assert_sound(
    plan: dict[str, int], shape: tuple[int, int, int], dtype: torch.dtype, call: Call, gpu: Device
) -> None:
    """The plan covers every element, and the device can run it."""
    batch, channels, spatial = shape
    # Every channel has a tile, every column of a row a thread, every row a step.
    assert plan["tiles"] * plan["tile_channels"] >= channels
    assert (plan["tiles"] - 1) * plan["tile_channels"] < channels
    assert plan["rows"] * plan["row_width"] >= batch * channels * spatial
    assert plan["parts"] * plan["threads_x"] * (16 // dtype.itemsize) >= plan["tile_width"]
    half = (gpu.shared_per_block + KB) // 2 - KB
    per_sm = 2 if plan["shared_bytes"] <= half else 1
    assert 1 <= plan["threads_x"] * plan["threads_y"] <= plan["threads"] <= MAX_THREADS
    assert plan["threads"] % 32 == 0
    assert 1 <= plan["groups"] * plan["group_blocks"] <= MAX_GRID
    if TILES[plan["tile"]] == "columns":
        assert plan["parts"] == 1
    steps = -(-plan["rows"] * plan["parts"] // (plan["threads_y"] * plan["group_blocks"]))
    if plan["ring"] == 0:
        assert steps <= plan["kept"]
    assert plan["shared_bytes"] <= gpu.shared_per_block
    group = GROUPS[plan["group"]]
    if group == "cluster":
        assert plan["group_blocks"] in (2, 4, 8, 16)
        assert plan["group_blocks"] <= gpu.max_cluster
    blocks = plan["groups"] * plan["group_blocks"]
    if group == "grid" or (call.reduces and plan["whole"]):
        # All blocks run at once.
        assert blocks <= gpu.sms * per_sm
        assert per_sm * plan["threads"] <= MAX_THREADS
    if group == "grid":
        assert gpu.cooperative
        assert plan["counters"] == plan["groups"]
        assert plan["doubles"] >= blocks * 4 * plan["tile_channels"]
    else:
        assert plan["counters"] == plan["doubles"] == 0


# (N, C, HW), and whether it is channels_last, of calls whose plans have to be sound.
BATCHES_OF_256 = [((256, C, side * side), last) for last in (False, True) for C, side in RESNET]
HUGE_BATCHES = list(itertools.product(HUGE, (False, True)))
# Each number of channels has a way of its own to fill vectors, and its sums and coefficients take shared memory.
ANY_CHANNELS = [call for C in range(1, 1100) for call in (((64, C, 49), True), ((64, C, 3), False))]
# Planes and numbers of channels that do not fill vectors: column tiles of many channels, or of long rows.
RAGGED = [
    ((N, C, side * side), last)
    for C in (16, 24, 36, 60, 100, 132, 196, 250, 340, 436, 500, 512, 1001)
    for side in (1, 7, 9, 11, 13, 15, 17, 21, 35)
    for N in (64, 512, 4096)
    for last in (False, True)
]


@pytest.mark.parametrize("gpu", GPUS, ids=gpu_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_plans_are_sound(dtype: torch.dtype, gpu: Device) -> None:
    # Ragged batches are tried with the least shared memory.
    batches = BATCHES_OF_256 + HUGE_BATCHES + RAGGED * (gpu.shared_per_block == 99 * KB)
    for (shape, last), call in (*itertools.product(batches, CALLS), *itertools.product(ANY_CHANNELS, CALLS[:2])):
        assert_sound(make_plan(shape, last, dtype, call, gpu), shape, dtype, call, gpu)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 20_000)),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(CALLS),
    st.sampled_from(GPUS),
)
def test_any_plan_is_sound(
    shape: tuple[int, int, int], last: bool, dtype: torch.dtype, call: Call, gpu: Device
) -> None:
    assert_sound(make_plan(shape, last, dtype, call, gpu), shape, dtype, call, gpu)


def test_a_thread_adds_up_at_most_eight_values_in_an_all_reduce() -> None:
    # The all-reduce has up to 128 values a block, over as many blocks as an H200 runs at once.
    seen = set()
    for channels, side in RESNET:
        for last, dtype, call in itertools.product((False, True), DTYPES, CALLS):
            plan = make_plan((256, channels, side * side), last, dtype, call, H200)
            values = 2 * plan["tile_channels"]
            if GROUPS[plan["group"]] != "grid" or values > 128:
                continue
            count = plan["share"] or values
            adders = max(1, min(plan["threads"] // count, plan["group_blocks"]))
            assert -(-plan["group_blocks"] // adders) <= 8, plan
            seen.add(plan["share"] > 0)
    assert seen == {False, True}


@pytest.mark.parametrize("inputs", [1, 2], ids=["forward", "backward"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "side"), RESNET, ids=str)
def test_what_an_h200_reads_once(channels: int, side: int, last: bool, inputs: int) -> None:
    # At N = 256 in bfloat16, a tile that fits into three quarters of all shared memory is read once.
    plan = make_plan((256, channels, side * side), last, torch.bfloat16, Call(inputs), H200)
    tile_bytes = plan["rows"] * plan["tile_width"] * 2 * inputs
    assert plan["ring"] == 0 or tile_bytes > 0.75 * H200.sms * H200.shared_per_block, plan


@pytest.mark.parametrize(
    ("shape", "last", "dtype", "group", "tile"),
    [
        # 7x7 planes: 8 of them are 49 vectors.
        ((256, 2048, 49), False, torch.bfloat16, "cluster", "columns"),
        ((256, 1024, 196), False, torch.bfloat16, "cluster", "columns"),
        ((256, 512, 784), False, torch.bfloat16, "cluster", "channel"),
        ((256, 64, 3136), False, torch.bfloat16, "cluster", "channel"),
        ((256, 64, 12544), False, torch.bfloat16, "grid", "channel"),
        ((256, 2048, 49), True, torch.bfloat16, "cluster", "columns"),
        ((256, 64, 3136), True, torch.bfloat16, "grid", "columns"),
        ((64, 512, 1), True, torch.float32, "block", "columns"),
        # 17 channels are no multiple of a vector: eight pixels are one row.
        ((64, 17, 784), True, torch.bfloat16, "cluster", "columns"),
        ((256, 17, 784), True, torch.bfloat16, "grid", "columns"),
    ],
    ids=str,
)
def test_worked_examples(shape: tuple[int, int, int], last: bool, dtype: torch.dtype, group: str, tile: str) -> None:
    plan = make_plan(shape, last, dtype, FORWARD, H200)
    assert (GROUPS[plan["group"]], TILES[plan["tile"]]) == (group, tile), plan


def test_small_tensors_take_no_workspace() -> None:
    for shape in ((64, 512, 1), (8, 64, 196), (32, 128, 49)):
        for last in (False, True):
            plan = make_plan(shape, last, torch.float32, FORWARD, H200)
            assert plan["counters"] == plan["doubles"] == 0


def dealt(available: int, *launches: tuple[int, int]) -> list[range | None]:
    """The counters of each launch, given its stream, -1 for one that is captured, and how many it needs."""
    streams, counts = map(list, zip(*launches, strict=True))
    firsts = torch.ops.bnext_simt.deal_counters(available, streams, counts)
    return [range(first, first + count) if first >= 0 else None for first, count in zip(firsts, counts, strict=True)]


def test_launches_that_may_run_at_once_share_no_counter() -> None:
    load()
    # Streams 5 and 7 launch in turn, with more groups and then with fewer, and some of what they launch is captured.
    streams = [5, 7, -1, 5, 7, -1, 5, -1]
    counts = [4, 1, 3, 264, 33, 264, 2, 1]
    counters = dealt(65536, *zip(streams, counts, strict=True))
    for (stream, mine), (other, theirs) in itertools.combinations(zip(streams, counters, strict=True), 2):
        assert mine is not None
        assert theirs is not None
        assert (stream == other != -1) or not set(mine) & set(theirs)


def test_a_stream_keeps_its_counters() -> None:
    load()
    few, as_many, more, again = dealt(65536, (1, 3), (1, 3), (1, 100), (1, 3))
    assert few == as_many
    assert more is not None
    assert again is not None
    assert more.start == again.start
    # Streams that have some go on with them where no other gets any.
    assert dealt(64, (1, 32), (2, 32), (3, 1), (-1, 1), (1, 32)) == [range(32), range(32, 64), None, None, range(32)]


def test_the_ways_take_every_path() -> None:
    seen = set()
    for way in WAYS:
        path, (shape, layout) = way.values
        for dtype in DTYPES:
            for inputs in (1, 2, 3):
                batch, channels, height, width = shape
                last = layout != "contiguous"
                call, device = Call(inputs, activated=inputs == 3), Device(*path.limits[:3], 50 << 20)
                plan = make_plan((batch, channels, height * width), last, dtype, call, device)
                kind = "folded" if last and plan["row_width"] > channels else layout
                large_cluster = GROUPS[plan["group"]] == "cluster" and plan["group_blocks"] > 8
                way_taken = (GROUPS[plan["group"]], large_cluster, plan["ring"] > 0)
                seen.add((*way_taken, TILES[plan["tile"]], kind, dtype, inputs))
    tiles = (("channel", "contiguous"), ("columns", "contiguous"), ("columns", "channels_last"), ("columns", "folded"))
    wanted = {
        (path.group, path.large_cluster, path.two_reads, *tile, dtype, inputs)
        for path in PATHS
        for tile in (tiles if path.layouts == LAYOUTS else (tiles[0], tiles[3]))
        for dtype in DTYPES
        for inputs in (1, 2, 3)
        if (dtype, inputs) != (torch.float64, 3)  # too much for some of these devices to read once
    }
    assert wanted - seen == set()
