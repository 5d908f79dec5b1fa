"""Checks an installed bnext: one training step of a small converted network against torch's own.

Needs only torch, not even numpy.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

import bnext
import bnext.__main__


def step(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and then every gradient and buffer."""
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def main() -> None:
    where = Path(bnext.__file__).resolve()
    if not where.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"expected the installed bnext, got {where}")
    bnext.__main__.main()
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        native = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).double()
        x = torch.randn(4, 3, 9, 9, dtype=torch.float64).to(memory_format=layout)
        expected = step(copy.deepcopy(native), x)
        for fuse in (False, True):
            got = step(bnext.convert(copy.deepcopy(native), fuse=fuse), x)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    print(f"bnext {bnext.__version__} works as installed in {where.parent}")


if __name__ == "__main__":
    main()
