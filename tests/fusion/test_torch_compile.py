"""torch.compile of a model or its parts before and after convert(fuse=True), and with the back end "bnext", which lets
inductor choose the memory format."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from networks import Basic, assert_close
from observe import assert_fuses, assert_same_steps, pair, sequential, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

import bnext


@pytest.mark.parametrize("order", ["before", "after", "after a call"])
def test_a_compilation_of_the_users_own_wins(order: str, caplog: pytest.LogCaptureFixture) -> None:
    own = CompileCounter()
    original = Basic(3).double()  # whether torch captures an nn.Sequential in compile() depends on what ran before
    model = copy.deepcopy(original)
    if order == "before":
        model.compile(backend=own)
    bnext.convert(model, fuse=True)
    if order == "after a call":
        model(small())
        original(small())
        model.load_state_dict(original.state_dict())
    if order != "before":
        model.compile(backend=own)
    assert_close(model(small() * 0 + 1), original(small() * 0 + 1), "output")
    assert own.frame_count == 1
    if order == "before":
        assert any("compiled" in r.getMessage() for r in caplog.records if r.name == "bnext")
    installed = model._compiled_call_impl
    bnext.revert(model)
    assert model._compiled_call_impl is installed
    assert type(model.bn1) is nn.BatchNorm2d


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("called", [False, True])
def test_torch_compile_on_top(called: bool) -> None:
    original, fused = pair()
    if called:
        assert_same_steps(original, fused, small(), modes=("training",))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same_steps(original, compiled, small())
    assert_fuses(original, fused, small())


def test_a_compiled_submodule_is_captured_with_the_model_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    own = CompileCounter()
    original = nn.Sequential(sequential(), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()).double()
    for compile in (lambda m: m[0].compile(backend=own), lambda m: m.__setitem__(0, torch.compile(m[0], backend=own))):
        model = copy.deepcopy(original)
        compile(model)
        caplog.clear()
        bnext.convert(model, fuse=True)
        said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        x = small()
        assert_close(model(x), original(x), "output")
        original.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in model.state_dict().items()})
        assert len(said) == 1
        assert "compile" in said[0]
    assert own.frame_count == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            input = torch.relu(norm(convolution(input)))
        return self.convolutions[-1](input)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_equals_torchs_in_the_format_that_inductor_chooses() -> None:
    """Inductor chooses channels last around convolutions on the CPU."""
    model = Block().double()
    compiled = torch.compile(copy.deepcopy(model), backend="bnext")
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    # Caches of graphs would leave no code to look at. The cache of compiled code stays on, which saves compilations.
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        _, codes = run_and_get_code(lambda: assert_same_steps(model, compiled, x, modes=("training",), steps=1))
    assert [code.count("= torch.ops.bnext.batch_norm_") for code in codes] == [2, 2]
    # Outputs lie as the convolutions want them, (N, H, W, C) in memory: nothing is copied for a batch norm.
    shape, strides = r"\(3, 8, 6, 5\)", r"\(240, 1, 40, 8\)"
    # assert_size_stride, and from torch 2.14 on assert_tensor_metadata, which has the dtype as well.
    outputs = rf"assert_\w+\(\w+, {shape}, {strides}, (torch\.\w+, )?'torch\.ops\.bnext\.batch_norm_"
    assert [len(re.findall(outputs, code)) for code in codes] == [2, 2]
