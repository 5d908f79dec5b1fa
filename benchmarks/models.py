"""The models of the model suites, each with the layers of a provider, eager or compiled."""

import copy
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnext
from benchmarks import networks
from benchmarks.memory import checkpointed_to, held_by
from benchmarks.operators import MEMORY_FORMATS, SEED
from benchmarks.suites import CHECKPOINT, COMPILE, RECOMPUTE, WITHOUT, Case
from benchmarks.traffic import Shape

# Back ends of torch.compile, by provider: bnext's fuses torch's own layers.
BACKENDS = {"torch-compile": "inductor", "bnext-compile": "bnext"}

# The dtype that the reference of a dtype is computed in.
REFERENCE_DTYPES = {"float32": torch.float64, "bfloat16": torch.float32}


def conv_bn_relu(shape: Shape) -> nn.Module:
    channels = shape[1]
    layers = [(networks.conv(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) for _ in range(3)]
    return nn.Sequential(*chain.from_iterable(layers))


# Each is called with the shape of the input; "package/name" is a model of torchvision or timm.
MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "resnet50": lambda _: networks.ResNet50(),
    "bn": lambda shape: nn.BatchNorm2d(shape[1]),
    "conv-bn-relu": conv_bn_relu,
    "bottleneck": lambda shape: networks.Bottleneck(shape[1], shape[1] // networks.EXPANSION),
    "resnet20": lambda _: networks.ResNet20(),
    "unet": lambda _: networks.UNet(),
    "dcgan-discriminator": lambda _: networks.discriminator(),
    "pointnet": lambda _: networks.PointNet(),
}


@dataclass(frozen=True)
class Built:
    """A provider's model. ``call`` runs ``module``, which has its own parameters and buffers, with or without
    autocast."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]

    def __call__(self, input: Tensor) -> Tensor:
        with self.autocast():
            return self.call(input)


def make_model(case: Case, device: str) -> nn.Module:
    """The model with torch's layers, with the same values at every call; the caller's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        package, _, name = case.model.rpartition("/")
        model = make_packaged(package, name) if package else MODELS[name](case.shape)
    return model.to(device, memory_format=MEMORY_FORMATS[case.layout])


def make_data(case: Case, device: str, shape: Shape, seed: int = SEED) -> Tensor:
    """Normally distributed values in the layout, which depend on the seed and not on the device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape).normal_(generator=generator)
    return values.to(device).contiguous(memory_format=MEMORY_FORMATS[case.layout])


def remove_batch_norms(model: nn.Module) -> None:
    """Replace each batch norm by the identity, or by its activation, if it has one, as timm's BatchNormAct2d."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            model.set_submodule(name, getattr(module, "act", nn.Identity()))


def build(case: Case, provider: str, model: nn.Module, device: str) -> Built:
    """A copy of the model with a provider's layers, or compiled by its back end."""
    module = copy.deepcopy(model)
    if provider == WITHOUT:
        remove_batch_norms(module)
    elif provider == CHECKPOINT:
        input = make_data(case, device, case.shape)
        recomputing = bnext.convert(copy.deepcopy(model), fuse=True, recompute=True)
        held_by(recomputing, input)  # what the first call allocates for good is not counted
        module = checkpointed_to(model, input, held_by(recomputing, input))
    elif provider in ("bnext", "bnext-fused", RECOMPUTE):
        bnext.convert(module, fuse=provider != "bnext", recompute=provider == RECOMPUTE)
    call: Callable[[Tensor], Tensor] = module
    if provider.endswith(COMPILE):
        call = torch.compile(module, backend=BACKENDS[provider], dynamic=False, fullgraph=True)
    enabled = case.dtype == "bfloat16"
    return Built(module, call, lambda: torch.autocast(device, torch.bfloat16, enabled=enabled))


def build_reference(case: Case, model: nn.Module, device: str) -> Built:
    """torch's layers, eager, in a dtype whose rounding is negligible beside that of the case's dtype."""
    module = copy.deepcopy(model).to(REFERENCE_DTYPES[case.dtype])
    return Built(module, module, lambda: torch.autocast(device, torch.bfloat16, enabled=False))


# Models of packages.

_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library object


def make_packaged(package: str, name: str, **options: object) -> nn.Module:
    """An untrained model by its name in its package; raises ModuleNotFoundError where the package is missing."""
    torchvision = import_torchvision()  # which timm imports too
    if package == "torchvision":
        return torchvision.models.get_model(name, weights=None, **options)
    import timm

    return timm.create_model(name, **options)


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part does not load, as the CUDA build's beside a CPU build of torch.

    Models need no compiled operator, but importing registers fake kernels, which fails if the operators do not exist.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # modules that were imported before the failure
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
