"""The back end "bnext" and the memory format that inductor chooses: channels_last around convolutions on the CPU."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Block(nn.Module):
    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms, self.residual = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)), residual

    def forward(self, input: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            output = norm(convolution(input))
            input = torch.relu(output + input if self.residual else output)
        return self.convolutions[-1](input)


def step(model: nn.Module, call: nn.Module, input: Tensor) -> list[Tensor]:
    """Output, gradients and statistics of a training step."""
    x = input.detach().requires_grad_()
    output = call(x)
    output.square().sum().backward()
    assert x.grad is not None
    return [output, x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_step_equals_torchs_in_the_format_that_inductor_chooses(residual: bool) -> None:
    torch.manual_seed(0)
    model = Block(residual).double()
    input = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    expected = step(other := copy.deepcopy(model), other, input)
    with torch._inductor.utils.fresh_cache():
        actual, codes = run_and_get_code(lambda: step(model, torch.compile(model, backend="bnext"), input))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert [code.count("= torch.ops.bnext.batch_norm_") for code in codes] == [2, 2]
    if not residual:
        # Outputs lie as the convolutions want them, (N, H, W, C) in memory: nothing is copied for a batch norm.
        shape, strides = r"\(3, 8, 6, 5\)", r"\(240, 1, 40, 8\)"
        # assert_size_stride, and from torch 2.14 on assert_tensor_metadata, which has the dtype as well.
        outputs = rf"assert_\w+\(\w+, {shape}, {strides}, (torch\.\w+, )?'torch\.ops\.bnext\.batch_norm_"
        assert [len(re.findall(outputs, code)) for code in codes] == [2, 2]
