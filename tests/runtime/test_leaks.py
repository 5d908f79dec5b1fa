"""A call leaves nothing behind: no memory, no object, and no reference to what it was given."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator

import leak_jobs as jobs
import pytest
import torch
from leaks import COUNTS_THE_HEAP, MOST, Usage, excess
from marks import linux_only
from outputs import in_new_process
from processes import Pool
from torch import Tensor, nn

import bnext

pytestmark = linux_only

# How many calls a quick test makes. Heap and Python blocks are counted exactly: 4,000 calls show 9 bytes a call.
CALLS = {
    "layers": 6_000,
    "activations": 4_000,
    "synchronized": 3_000,
    "errors": 4_000,
    "dropped_graphs": 4_000,
    "saved_tensors": 5_000,
    "double_backward": 2_000,
    "transforms": 1_000,
    "conversions": 2_000,
    "traced_conversions": 60,
    "copies": 400,
    "threads": 300,
    "recomputed": 1_000,
}
MANY = {calls_of: 1_000 if calls_of == "traced_conversions" else 10_000 for calls_of in CALLS}
# torch.distributed remembers the last 2,000 collectives; threads that end leave their stacks and heaps to the next.
WARM_UP = {"synchronized": 2_500, "traced_conversions": 50, "threads": 200}
# Which of malloc's arenas a thread gets depends on the other threads, so resident memory varies. A leak counts as heap
# all the same, and a stack that is left as a mapping.
RESIDENT = {"threads": 16 * 2**20}


@pytest.fixture(scope="module")
def worker() -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("calls_of", "calls"), [*CALLS.items(), *(pytest.param(*row, marks=pytest.mark.long) for row in MANY.items())]
)
def test_nothing_is_left_behind(calls_of: str, calls: int, worker: Pool) -> None:
    arguments = {"calls_of": calls_of, "calls": calls, "warm_up": WARM_UP.get(calls_of)}
    ((left, alive),) = worker.run(jobs.leave_behind, timeout=300, **arguments)
    most = MOST._replace(resident=RESIDENT.get(calls_of, MOST.resident))
    assert excess(left, most) == {}, f"left behind by {calls} calls: {left}"
    assert alive == [], "tensors of these shapes outlive all that they were made for"


@pytest.mark.parametrize("calls", [14, pytest.param(490, marks=pytest.mark.long)])
def test_large_outputs_leave_only_cached_memory(calls: int) -> None:
    left, cached = in_new_process(jobs.large_outputs, calls, BNEXT_CACHE_MB="100")
    # Inputs are mapped and unmapped by malloc, which counts them among what it has handed out.
    assert excess(left, MOST._replace(resident=2 * 2**20)) == {}, left
    assert 66 * 2**20 <= cached <= 100 * 2**20


def test_a_leak_would_show(worker: Pool) -> None:
    ((left, alive),) = worker.run(jobs.leave_behind, calls_of="hoards", calls=1_000)
    assert excess(left).keys() == set(Usage._fields) - (set() if COUNTS_THE_HEAP else {"heap"})
    assert jobs.SHAPE in alive


def test_inputs_are_referred_to_by_their_graph_alone() -> None:
    layer = bnext.BatchNormAct2d(4, act="silu")
    x, residual = jobs.leaf(), jobs.leaf()
    tensors: list[Tensor] = [x, residual, *layer.parameters(), *layer.buffers()]
    before = [sys.getrefcount(t) for t in tensors]
    y = layer(x, residual)
    y.sum().backward()
    del y
    with pytest.raises(ValueError, match="residual"):
        layer(x, residual[:1])
    gc.collect()
    assert [sys.getrefcount(t) for t in tensors] == before
    y = layer(x, residual)
    alive = weakref.ref(residual)
    del residual, tensors
    assert alive() is not None, "backward needs it"
    del y
    assert alive() is None


def test_class_goes_with_the_model_that_was_fused() -> None:
    """A class may be made in a function, or in a cell of a notebook that is run again."""

    def outlives(prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> bool:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm2d(4)

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(self.bn(x))

        model, alive = prepare(Net()), weakref.ref(Net)
        model(torch.zeros(2, 4, 2, 2))
        del model, Net
        gc.collect()
        return alive() is not None

    if outlives(lambda model: torch.compile(model, backend="eager")):
        pytest.skip("torch.compile of this torch and this Python keeps the class")
    assert not outlives(lambda model: bnext.convert(model, fuse=True))
