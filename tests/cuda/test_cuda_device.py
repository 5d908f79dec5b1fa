"""What only a GPU can show: streams, graphs, no synchronisation, the same bits at every run, 2^31 elements and more."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import reference
import torch
from cases import make_input, make_parameters, same_bits, to_layout
from checks import check_forward
from marks import needs_gpu
from steps import step
from torch import Tensor

from bnext.functional import batch_norm

pytestmark = [needs_gpu, pytest.mark.gpu]

# On an H200 a tile of the first belongs to a block, of the second to a cluster, of the third to the grid; the input of
# the fourth is read twice.
SHAPES = ((64, 512, 7, 7), (64, 256, 28, 28), (128, 8, 96, 96), (256, 3, 224, 224))


def arguments(
    shape: tuple[int, ...], layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The arguments of `step`, with bfloat16 data, which are drawn on the GPU because they are large."""
    drawn = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x, g = (to_layout(values, layout) for values in drawn)
    p = make_parameters(shape[1], device="cuda")
    return x, g, p.weight, p.bias, [p.running_mean, p.running_var, torch.zeros((), dtype=torch.int64, device="cuda")]


@pytest.mark.parametrize(
    ("shape", "format_"),
    [
        pytest.param((2**15, 64, 32, 32), torch.contiguous_format, id="2^31-contiguous"),
        pytest.param((2**15, 64, 32, 32), torch.channels_last, id="2^31-channels_last"),
        pytest.param((2**15 + 1, 64, 32, 32), torch.contiguous_format, id="an image more-contiguous"),
        pytest.param((2**15 + 1, 64, 32, 32), torch.channels_last, id="an image more-channels_last"),
        pytest.param((2**31 - 1, 1), torch.contiguous_format, id="2^31 - 1"),
        pytest.param(((2**31 + 1) // 3, 3), torch.contiguous_format, id="2^31 + 1"),
    ],
)
def test_around_the_int32_range(shape: tuple[int, ...], format_: torch.memory_format) -> None:
    if torch.cuda.mem_get_info()[0] < 50 << 30:
        pytest.skip("takes 50 GB of a GPU")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=format_).normal_(3.0, 2.0)
    y = batch_norm(x, None, None, training=True)
    # The last images lie at the end of the int32 range, or beyond it. In float64 there is room for one channel only.
    for channel in (0, shape[1] - 1):
        values = x[:, channel].double()
        centred = values[-64:] - values.mean()
        expected = centred / (values.var(correction=0) + 1e-5).sqrt()
        error = (y[-64:, channel].double() - expected).abs()
        assert (error <= 2.0**-8 * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_current_stream_is_used(shape: tuple[int, ...]) -> None:
    values = make_input(shape, device="cuda")
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # on any other stream the zeros would be seen
        x.copy_(values)
        y = batch_norm(x, None, None, training=True)
        torch.cuda.current_stream().synchronize()
    assert same_bits(y, batch_norm(values, None, None, training=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_and_a_graph_run_at_once(shape: tuple[int, ...]) -> None:
    x, g, weight, bias, stats = arguments(shape)
    expected = step(x, g, weight, bias, [t.clone() for t in stats])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(x, g, weight, bias, [t.clone() for t in stats])
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(5):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(step(x, g, weight, bias, [t.clone() for t in stats]))
        graph.replay()
    torch.cuda.synchronize()
    for result in (*results, replayed):
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_captured_in_a_graph_and_replayed(shape: tuple[int, ...]) -> None:
    x, g, weight, bias, stats = arguments(shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, g, weight, bias, [t.clone() for t in stats])
    torch.cuda.current_stream().wait_stream(side)
    captured = [t.clone() for t in stats]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, g, weight, bias, captured)
    eager = [t.clone() for t in stats]
    for _ in range(3):
        x.normal_(3.0, 2.0)
        graph.replay()
        expected = step(x, g, weight, bias, eager)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
        assert all(same_bits(a, b) for a, b in zip(captured, eager, strict=True))


# The kernels' attributes are set, their code is loaded and the device is asked for its limits, all while a stream is
# being captured.
FIRST_CALL = """
import sys
import torch
import bnext
shape = tuple(map(int, sys.argv[1:]))
x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = bnext.functional.batch_norm(x, None, None, training=True)
graph.replay()
assert torch.equal(y, bnext.functional.batch_norm(x, None, None, training=True))
"""


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_the_first_call_of_a_process_is_captured(shape: tuple[int, ...]) -> None:
    command = [sys.executable, "-c", FIRST_CALL, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=45, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_waits_for_the_device(shape: tuple[int, ...]) -> None:
    prepared = arguments(shape)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        step(*prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_at_every_run(shape: tuple[int, ...], layout: str) -> None:
    x, g, weight, bias, stats = arguments(shape, layout)
    first = step(x, g, weight, bias, [t.clone() for t in stats])
    for _ in range(99):
        again = step(x, g, weight, bias, [t.clone() for t in stats])
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_tensors(shape: tuple[int, ...], layout: str) -> None:
    x = make_input(shape, layout, torch.bfloat16, "cuda")
    check_forward(x, make_parameters(shape[1], device="cuda"), training=True)


def test_a_tensor_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = make_input((64, 256, 28, 28), device="cuda:1")
    with torch.cuda.device(0):
        y = batch_norm(x, None, None, training=True)
    assert y.device == x.device
    fwd = reference.forward(x)
    assert (y.cpu().double() - fwd.output).abs().max() <= 1e-5
