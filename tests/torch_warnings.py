"""Warnings are errors in the tests, except those that torch itself causes."""

from __future__ import annotations

import warnings

# The beginning of the message, its category, and the module that warns; empty: any.
TORCHS_OWN: tuple[tuple[str, type[Warning], str], ...] = (
    # torch still scripts its forward-mode rules when the first of them is needed.
    ("`torch.jit", DeprecationWarning, ""),
    ("`torch.jit", FutureWarning, ""),  # since 2.14
    # opcheck, since 2.14, looks at the gradient of whatever tensor it is given.
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning, "torch._subclasses.meta_utils"),
    # Dynamo does so, too; it hides the warning, unless the warning is an error.
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning, "torch._dynamo.variables.builder"),
    # torch.export.load and the profiler give these in 2.11.
    ("The given buffer is not writable", UserWarning, "torch.export.pt2_archive._package"),
    ("Warning. Profiler clears events", UserWarning, "torch.profiler.profiler"),
)


def pytest_lines() -> list[str]:
    """The warnings to ignore, as lines of pytest's setting `filterwarnings`."""
    return [f"ignore:{message}:{category.__name__}:{module}" for message, category, module in TORCHS_OWN]


def all_but_torchs_own_are_errors() -> None:
    """Set the filters of this process, or of the warnings.catch_warnings() around the call."""
    warnings.simplefilter("error")
    for message, category, module in TORCHS_OWN:
        warnings.filterwarnings("ignore", message, category, module)
