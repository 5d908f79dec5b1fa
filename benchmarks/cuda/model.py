"""A model of the CUDA kernels' times: from the bytes, instructions and latencies of a launch plan to nanoseconds.

docs/cuda-model.md explains it, and lists the assumptions: the fields of Device. Nothing here is a measurement.
"""

from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import Any, NamedTuple

VECTOR_BYTES = 16
LINE_BYTES = 128  # of L2


def assumed(value: Any, unit: str, source: str = "assumed") -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True, kw_only=True)
class Device:
    """The assumptions about a GPU. 1 GB/s is a byte a nanosecond."""

    name: str
    copy_rate: float = assumed(
        0.0, "GB/s", "assumed of a large copy, read and written: 0.9 of the data sheet's 4,800 / 3,350"
    )
    l2_bytes: float = assumed(0.0, "bytes", "data sheet")
    sms: int = assumed(132, "", "data sheet, SXM")
    gpcs: tuple[int, ...] = assumed(
        (18, 18, 16, 16, 16, 16, 16, 16), "SMs", "assumed: 132 in eight; a cluster lies within one"
    )
    shared_per_block: int = assumed(227 * 1024, "bytes", "CUDA Programming Guide, compute capability 9.0")
    shared_per_sm: int = assumed(228 * 1024, "bytes", "likewise")
    reserved_shared: int = assumed(1024, "bytes a block", "likewise")
    max_cluster: int = assumed(16, "blocks", "likewise, if the driver says that they fill the device")
    resident_threads: int = assumed(512, "an SM", "65,536 registers, 128 a thread (`make cuda-check`)")
    clock: float = assumed(1.9, "GHz", "assumed; at most 1.98")
    issue_slots: float = assumed(4.0, "a clock and SM", "four schedulers")
    most_issued: float = assumed(0.75, "of the slots", "assumed: integer instructions have half of them")
    warp_issues: float = assumed(0.33, "a clock", "assumed: otherwise a warp waits for its own results")
    not_whole: float = assumed(
        2.0, "times the instructions", "loops for vectors that may be cut: docs/cuda.md, before and now"
    )
    sm_rate: float = assumed(64.0, "bytes a clock", "from L2 to an SM")
    l2_rate: float = assumed(5500.0, "GB/s")
    l2_share: float = assumed(0.4, "of L2", "assumed: what of it has still got what was read last")
    sector: float = assumed(32.0, "bytes", "the least that is moved: of a mask, by a row of a narrow tile")
    row_start: float = assumed(28.0, "bytes", "assumed: n bytes of a row take the time of n + 28")
    launch: float = assumed(1500.0, "ns", "assumed: each node of a graph")
    tile_start: float = assumed(250.0, "ns", "assumed: divisions of 32 bits, first requests")
    memory: float = assumed(700.0, "ns", "assumed: a load from DRAM")
    merge: float = assumed(300.0, "ns", "assumed: a block's sums")
    merge_swap: float = assumed(20.0, "ns", "assumed: a double that the rows of a warp exchange, 16 warps an SM")
    merge_round: float = assumed(120.0, "ns", "assumed: each round of a column tile's merge, two barriers")
    cluster_barrier: float = assumed(500.0, "ns")
    remote_read: float = assumed(400.0, "ns", "assumed: distributed shared memory, 16 loads at once")
    grid_barrier: float = assumed(1300.0, "ns", "assumed: release, poll, acquire")
    l2_read: float = assumed(300.0, "ns", "assumed: eight loads at once")
    finish: float = assumed(600.0, "ns", "assumed: weight, bias, running statistics, which lie in L2; float64")


LATENCIES = tuple(name for name, each in Device.__dataclass_fields__.items() if each.metadata.get("unit") == "ns")
DEVICES = (
    Device(name="H200", copy_rate=4300.0, l2_bytes=60e6),
    Device(name="H100", copy_rate=2950.0, l2_bytes=50e6),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The part of a LaunchPlan (csrc/cuda/launch_plan.h) that plans.cpp prints."""

    description: str
    group: str  # block, cluster, grid
    tile: str  # kChannel, kColumns
    tiles: int
    tile_width: int
    tile_channels: int
    rows: int
    parts: int
    groups: int
    group_blocks: int
    threads_x: int
    threads_y: int
    threads: int
    merge_rows: int
    whole: int
    inputs: int
    kept: int
    ring: int
    share: int
    shared_bytes: int
    load_stages: int
    prefetch: int  # whether a group requests its next tile while it stores this one

    @property
    def steps(self) -> int:
        """The vectors of each input that a thread takes in a tile."""
        return -(-self.rows * self.parts // (self.threads_y * self.group_blocks))

    @property
    def streamed(self) -> float:
        """The share of the vectors that is not kept."""
        return max(0.0, 1 - self.kept / self.steps)


class Call(NamedTuple):
    """What a call reads and writes, in tensors of the input's size, and whether it has a mask."""

    reads: int
    sums_read: int  # those that the sums read
    writes: int
    reads_mask: bool = False
    writes_mask: bool = False


class Steps(NamedTuple):
    """A warp's instructions for 16 bytes of each input, in the three loops."""

    request: float
    reduce: float
    map: float


@dataclass(frozen=True)
class Kernel:
    """What a time depends on, besides the device."""

    plan: Plan
    call: Call
    steps: Steps
    element_bytes: int


class Traffic(NamedTuple):
    """The bytes of one tile."""

    kept: float  # read into the slots, once
    streamed: float  # read through the ring for the sums, and again for the map
    late: float  # read for the map alone
    stored: float


def traffic(device: Device, kernel: Kernel) -> Traffic:
    plan, call = kernel.plan, kernel.call
    tensor = plan.rows * plan.tile_width * kernel.element_bytes
    # A byte for each vector.
    mask = tensor / VECTOR_BYTES * max(1.0, device.sector / (plan.threads_x * plan.parts))
    share = plan.streamed
    return Traffic(
        kept=(1 - share) * (plan.inputs * tensor + call.reads_mask * mask),
        streamed=share * (call.sums_read * tensor + call.reads_mask * mask),
        late=(call.reads - plan.inputs + share * (plan.inputs - call.sums_read)) * tensor,
        stored=call.writes * tensor + call.writes_mask * mask,
    )


def groups_at_once(device: Device, plan: Plan) -> int:
    by_memory = device.shared_per_sm // (plan.shared_bytes + device.reserved_shared)
    resident = max(1, min(by_memory, device.resident_threads // plan.threads))
    places = device.gpcs if plan.group == "cluster" else (device.sms,)
    fit = sum(resident * sms // plan.group_blocks for sms in places)
    return max(1, min(fit, plan.groups, plan.tiles))


def exchange(device: Device, kernel: Kernel) -> float:
    """The nanoseconds from a block's last addition to the map: merge, all-reduce, coefficients."""
    plan = kernel.plan
    swaps, rounds, row, rows = 0, 0, plan.threads_x, plan.threads_y
    if plan.tile == "kColumns":  # as in merge_columns
        shares_warps = 32 % row == 0 and row * rows == plan.threads
        half = VECTOR_BYTES // kernel.element_bytes
        while shares_warps and half > 0 and row < 32:
            swaps, half, row, rows = swaps + half, half // 2, 2 * row, rows // 2
        while rows > 1:
            rows = (rows + 1) // 2 if rows // 2 < plan.merge_rows else rows - plan.merge_rows
            rounds += 1
    time = device.merge + swaps * device.merge_swap + rounds * device.merge_round + device.finish
    values = 2 * plan.tile_channels
    if plan.group == "cluster":
        time += device.cluster_barrier + ceil(values / plan.threads) * device.remote_read
    if plan.group == "grid":
        count = plan.share or values
        adders = max(1, min(plan.threads // count, plan.group_blocks))
        reads = ceil(plan.group_blocks / (8 * adders)) * ceil(adders * count / plan.threads)
        time += device.grid_barrier + reads * device.l2_read
        if plan.share:
            time += device.grid_barrier + device.l2_read
    return time


class Wave(NamedTuple):
    """Groups at work at once, each on a tile: nanoseconds of the memory, of the SMs' issue slots, and of latency."""

    load: float
    map: float
    load_issue: float
    last_stage: float  # of the reduction: it waits for the last bytes
    map_issue: float
    exchange: float
    around: float  # before the first byte arrives, after the last is stored

    @property
    def busiest(self) -> float:
        return max(self.load + self.map, self.load_issue + self.last_stage + self.map_issue)

    @property
    def serial(self) -> float:
        """Phase after phase."""
        load = max(self.load, self.load_issue) + self.last_stage
        return self.around + load + self.exchange + max(self.map, self.map_issue)

    @property
    def prefetched(self) -> float:
        """Phase after phase, but the tile was requested while the previous tile was stored."""
        return max(self.load + self.map, self.load_issue + self.map_issue) + self.last_stage + self.exchange


def wave(device: Device, kernel: Kernel, groups: int) -> Wave:
    plan, call, steps, moved = kernel.plan, kernel.call, kernel.steps, traffic(device, kernel)
    blocks = groups * plan.group_blocks
    sms = min(device.sms, blocks)
    blocks_per_sm = blocks / sms
    row_bytes = plan.tile_width * kernel.element_bytes
    # Two of the tiles at work at once are adjacent. Where a single tile takes whole rows, memory is read in order.
    run = row_bytes * min(groups, 2) if plan.tiles > 1 else inf
    dram_rate = device.copy_rate / (1 + device.row_start / run)
    most = min(device.l2_rate, sms * device.sm_rate * device.clock)
    # A thread has so many bytes of the ring in flight, for the latency of a load.
    under_way = blocks * plan.ring * plan.threads_x * plan.threads_y * VECTOR_BYTES * call.sums_read
    ring_rate = min(most, under_way / device.memory) if plan.streamed and device.memory else most
    hits = min(moved.streamed, device.l2_share * device.l2_bytes * min(1.0, row_bytes / LINE_BYTES) / groups)

    def transfer(size: float, rate: float = inf, hits: float = 0.0) -> float:
        return groups * max((size - hits) / dram_rate, size / min(most, rate))

    warps = ceil(plan.threads / 32)
    issued = min(device.most_issued * device.issue_slots, device.warp_issues * warps * blocks_per_sm) * device.clock
    step = blocks_per_sm * warps * plan.steps * (1.0 if plan.whole else device.not_whole) / issued
    last_stage = step * steps.reduce / plan.load_stages
    mapped = transfer(moved.streamed + moved.late + moved.stored, hits=hits)
    return Wave(
        load=transfer(moved.kept) + transfer(moved.streamed, ring_rate),
        map=max(mapped, transfer(moved.streamed, ring_rate, hits)),
        load_issue=step * (steps.request + steps.reduce) - last_stage,
        last_stage=last_stage,
        map_issue=step * (steps.map + plan.streamed * steps.request),
        exchange=exchange(device, kernel),
        around=device.tile_start + device.memory,
    )


def time(device: Device, kernel: Kernel) -> float:
    """Nanoseconds of a call, launch included."""
    plan = kernel.plan

    def later(groups: int) -> float:
        # Groups drift apart, so that some move memory while others wait: k groups lose a k-th of what they would in
        # lockstep.
        many, one = wave(device, kernel, groups), wave(device, kernel, 1)
        lockstep, least = (many.prefetched, one.prefetched) if plan.prefetch else (many.serial, one.serial)
        bound = max(many.busiest, least)
        return bound + max(0.0, lockstep - bound) / groups

    at_once = groups_at_once(device, plan)
    full, rest = divmod(plan.tiles, at_once)
    first = wave(device, kernel, at_once).serial
    return device.launch + first + (full - 1) * later(at_once) + (later(rest) if rest else 0.0)


def without(device: Device, kernel: Kernel) -> dict[str, float]:
    """The time without one of its causes."""
    plan = kernel.plan
    kept = replace(plan, kept=plan.steps, ring=0)
    none: dict[str, Any] = dict.fromkeys(LATENCIES, 0.0)
    return {
        "latency": time(replace(device, **none), kernel),
        "issue": time(replace(device, most_issued=inf, warp_issues=inf), kernel),
        "reread": time(device, replace(kernel, plan=kept)),
        "rows": time(replace(device, row_start=0.0, sector=1.0), kernel),
    }
