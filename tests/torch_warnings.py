"""Warnings are errors in the tests, but for those that torch gives of itself."""

from __future__ import annotations

import warnings

# The beginning of the message, its category, and the module that warns; empty: any.
TORCHS_OWN: tuple[tuple[str, type[Warning], str], ...] = (
    # It still scripts its forward-mode rules when the first of them is needed.
    ("`torch.jit", DeprecationWarning, ""),
    ("`torch.jit", FutureWarning, ""),  # since 2.14
    # opcheck, since 2.14, looks at the gradient of whatever tensor it is given.
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning, "torch._subclasses.meta_utils"),
    # Dynamo does, and hides the warning from who does not make it an error.
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning, "torch._dynamo.variables.builder"),
    # 2.11's torch.export.load and profiler.
    ("The given buffer is not writable", UserWarning, "torch.export.pt2_archive._package"),
    ("Warning. Profiler clears events", UserWarning, "torch.profiler.profiler"),
)


def pytest_lines() -> list[str]:
    """As lines of pytest's setting `filterwarnings`."""
    return [f"ignore:{message}:{category.__name__}:{module}" for message, category, module in TORCHS_OWN]


def all_but_torchs_own_are_errors() -> None:
    """Set the filters of this process, or of the warnings.catch_warnings() around the call."""
    warnings.simplefilter("error")
    for message, category, module in TORCHS_OWN:
        warnings.filterwarnings("ignore", message, category, module)
