"""Models of torchvision and timm, as people train them."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

_declared: list[torch.library.Library] = []  # what is declared is so for as long as its library lives


def make(package: str, name: str) -> nn.Module:
    """A model by its package's name of it, untrained; raises ModuleNotFoundError where the package is missing."""
    torchvision = import_torchvision()  # which timm imports too
    if package == "torchvision":
        return torchvision.models.get_model(name, weights=None)
    import timm

    return timm.create_model(name)


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part does not load, as the CUDA build's beside a CPU build of torch.

    Models need none of it, but without the operators whose fake kernels it registers, importing fails.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what was imported of it before it failed
        _declare_operators()
        import torchvision
    return torchvision


def _declare_operators() -> None:
    folder = Path(find_spec("torchvision").origin).parent
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in set(re.findall(r'register_fake\("torchvision::(\w+)"', source)):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor input) -> Tensor")
    _declared.append(library)
