"""What is measured: the suites of batch norms and of whole models, and their cases."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import NamedTuple

from benchmarks.traffic import (
    BN_ADD_RELU,
    BN_RELU,
    BOTH_TOO,
    LAYOUTS,
    PLAIN,
    STEP,
    WALKS,
    Epilogue,
    Shape,
    tensor_label,
)

# Providers of a batch norm; the last ones are not measured everywhere.
TORCH, BNEXT, COPY = "torch", "bnext", "copy"
NO_CUDNN = "torch-no-cudnn"
COMPILE = "-compile"
TORCH_COMPILE = "torch-compile"
PLANNED = "bnext-"  # bnext with plans for a device with lower limits; benchmarks/cuda/providers.py
PLANS = ("clusters-of-8", "no-clusters", "half-memory", "narrow-tiles")

# Providers of whole models: those of its layers, or of the back end of torch.compile.
EAGER_PROVIDERS = ("torch", "bnext", "bnext-fused")
COMPILED_PROVIDERS = ("torch-compile", "bnext-compile")
WITHOUT = "without"  # no batch norm at all: its cost is the most that can be gained, fusing aside

# Providers of the suite memory: outputs recomputed in backward; torch's layers with so many blocks checkpointed that
# they hold no more.
RECOMPUTE, CHECKPOINT = "bnext-recompute", "torch-checkpoint"

# Providers of batches with padding and ghost batches: batch norm of the whole tensor, for comparison; and what people
# write by hand.
WHOLE = "plain"
BY_HAND = "-by-hand"
BNEXT_BY_HAND, TORCH_BY_HAND = f"bnext{BY_HAND}", f"torch{BY_HAND}"

QUICK_MAX_ELEMENTS = 2_000_000

# In the order in which they are measured and shown. Models run in float32, or in bfloat16 by autocast: parameters,
# statistics and the loss stay float32.
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}
MODEL_DTYPES = ("float32", "bfloat16")

# The total time budget of the suites that are measured when none is named.
DEFAULT_SECONDS = {"cpu": 110.0, "cuda": 150.0}


class Input(NamedTuple):
    """The input of a batch norm, or of a whole model."""

    shape: Shape
    model: str = ""
    epilogue: Epilogue = PLAIN
    variant: str = ""


@dataclass(frozen=True)
class Suite:
    """A list of inputs, and what is measured on each of them."""

    inputs: tuple[Input, ...]
    operations: tuple[str, ...] = ("forward", "backward", "eval")
    compiled: tuple[Shape | str, ...] | None = ()  # on which torch.compile is measured, too; None: all
    compiled_dtypes: tuple[str, ...] = ()  # if given, only in these
    providers: tuple[str, ...] = ()  # of models and variants
    dtypes: tuple[str, ...] = ()  # empty: those of the device
    layouts: tuple[str, ...] = LAYOUTS
    seconds: float | None = None  # a budget, with compiling, of a suite that has to be named; None: the device's
    compile_s: float = 0  # seconds that compiling a model takes
    peak_s: float = 0  # seconds to examine a provider's memory and where its time goes; 0: not examined
    allocations: bool = False  # what a step allocates is examined, and not where its time goes
    quick: tuple[str, ...] = ()  # the models of a quick run, which compiles nothing
    threads: int | None = None  # None: torch's number

    def is_compiled(self, input: Input, dtype: str) -> bool:
        chosen = self.compiled is None or (input.model or input.shape) in self.compiled
        return chosen and dtype in (self.compiled_dtypes or (dtype,))


@dataclass(frozen=True)
class Case:
    """One input, the operations to measure on it, and their providers."""

    suite: str
    shape: Shape
    dtype: str
    layout: str
    operations: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    model: str = ""
    epilogue: Epilogue = PLAIN
    variant: str = ""

    @property
    def count(self) -> int:
        """The number of elements a channel."""
        return prod(self.shape) // self.shape[1]

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.variant, self.model, tensor_label(self.shape, self.epilogue))))
        return f"{self.suite} {what} {self.dtype} {self.layout}"


# (C, H) of every distinct BatchNorm input of ResNet-50 on 224x224 images, in the order of the network.
_RESNET50_SIZES: tuple[tuple[int, int], ...] = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
)

# Those whose batch norm is followed by a ReLU, and those where the shortcut is added before the ReLU.
_FUSED_SIZES = {
    BN_RELU: ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)),
    BN_ADD_RELU: ((256, 56), (512, 28), (1024, 14), (2048, 7)),
}
_ALL_FUSED_SIZES = sum(_FUSED_SIZES.values(), ())


def _images(batch: int, sizes: Iterable[tuple[int, int]] = _RESNET50_SIZES) -> tuple[Shape, ...]:
    return tuple((batch, channels, size, size) for channels, size in sizes)


def _plain(*shapes: Shape) -> tuple[Input, ...]:
    return tuple(map(Input, shapes))


def _fused(batch: int, compiled: Iterable[tuple[int, int]], dtypes: tuple[str, ...], seconds: float) -> Suite:
    """ResNet-50's layers, a call that is mostly overhead, and the other activations on one shape."""
    small: Shape = (8, 64, 14, 14)
    layers = [(shape, epilogue) for epilogue, sizes in _FUSED_SIZES.items() for shape in _images(batch, sizes)]
    layers += [(small, epilogue) for epilogue in _FUSED_SIZES]
    layers += [((batch, 128, 28, 28), Epilogue(act)) for act in ("silu", "hardswish", "gelu")]
    return Suite(
        inputs=tuple(Input(shape, epilogue=epilogue) for shape, epilogue in layers),
        operations=BOTH_TOO,
        compiled=(*_images(batch, compiled), small),
        compiled_dtypes=dtypes,
        seconds=seconds,
    )


def is_fused_layer(shape: Shape, epilogue: Epilogue) -> bool:
    """Whether it is a layer of ResNet-50, at any batch size."""
    return shape[1:3] in _FUSED_SIZES.get(epilogue, ())


# The shapes of a batch norm alone, of three 3x3 convolutions with one each, and of ResNet-50's bottlenecks.
_COMPILED = Suite(
    inputs=(
        Input((32, 64, 56, 56), "bn"),
        Input((32, 256, 14, 14), "bn"),
        Input((8, 64, 28, 28), "conv-bn-relu"),
        Input((8, 256, 28, 28), "bottleneck"),
        Input((8, 1024, 14, 14), "bottleneck"),
    ),
    operations=("forward_backward", "eval"),
    providers=COMPILED_PROVIDERS,
    compiled=None,
    seconds=180,
    compile_s=3,
)

_TRAINING = Suite(
    inputs=(Input((8, 3, 64, 64), "resnet50"),),
    operations=(STEP,),
    providers=(*EAGER_PROVIDERS, *COMPILED_PROVIDERS),
    compiled=None,
    dtypes=("float32",),
    seconds=270,
    compile_s=25,
    peak_s=5,
)

# Models that people train, as package/name, or from networks.py.
_PICTURES: Shape = (16, 3, 128, 128)
_OF_TORCHVISION = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"),
    *("efficientnet_b0", "densenet121", "shufflenet_v2_x1_0", "regnet_y_400mf"),
)
_MODELS = (
    Input((128, 3, 32, 32), "resnet20"),
    *(Input(_PICTURES, f"torchvision/{name}") for name in _OF_TORCHVISION),
    Input((8, 3, 128, 128), "unet"),
    Input((64, 3, 64, 64), "dcgan-discriminator"),
    Input((32, 3, 1024), "pointnet"),
    *(Input(_PICTURES, f"timm/{name}") for name in ("efficientnet_b0", "densenet121", "regnety_004")),
)

# A grid of N, C and the side of a plane that shows jumps in time. A notch is about four times as many elements.
SWEEP = "sweep"
_SWEEP_GRID = ((1, 2, 8, 32, 128), (3, 16, 64, 256, 1024, 4096), (1, 2, 4, 7, 14, 28, 56, 112))
_SWEEP_ELEMENTS = range(4096, 10_000_001)


def _sweep() -> tuple[Shape, ...]:
    """The grid, except small tensors (all overhead), large ones (slow), and one value a channel (refused in
    training)."""
    grid = [(n, c) if side == 1 else (n, c, side, side) for n, c, side in product(*_SWEEP_GRID)]
    return tuple(shape for shape in grid if prod(shape) in _SWEEP_ELEMENTS and prod(shape) > shape[1])


# Batches with padding, given by the lengths of sequences or a mask of images, or in parts.
VARIANTS = "variants"
LENGTHS, RECTANGLES, RANDOM, GHOST = "lengths", "mask of rectangles", "random mask", "ghost batches"
_VARIANTS: dict[str, tuple[Shape, ...]] = {
    LENGTHS: ((32, 256, 512), (16, 512, 1000)),
    RECTANGLES: ((32, 64, 56, 56), (16, 256, 28, 28)),
    RANDOM: ((32, 64, 56, 56), (16, 256, 28, 28)),
    GHOST: ((256, 64, 28, 28), (256, 256, 14, 14), (4096, 256)),
}

MEMORY = "memory"
_SMALL_PICTURES: Shape = (8, 3, 96, 96)
_OF_MEMORY = (
    *("torchvision/efficientnet_b0", "torchvision/mobilenet_v2", "torchvision/mobilenet_v3_large"),
    *("torchvision/densenet121", "timm/vovnet39a", "torchvision/resnet50"),
)

SUITES = {
    "cpu": {
        "resnet50": Suite(_plain(*_images(32))),
        "large": Suite(_plain((8, 64, 224, 224), (128, 64, 32, 32))),
        # A small (N,C) call is mostly overhead, which forward and backward share: hence forward_backward.
        "2d": Suite(_plain((1024, 1024), (4096, 256), (64, 512), (4, 8)), BOTH_TOO),
        # Beside the small one, shapes above 32 MB in some dtype are compiled: the bars apply to these.
        "fused": _fused(32, ((64, 112), (256, 56), (512, 28)), ("float32", "bfloat16"), seconds=360),
        "training": _TRAINING,
        "models": Suite(
            inputs=_MODELS,
            operations=(STEP,),
            providers=(*EAGER_PROVIDERS, WITHOUT, *COMPILED_PROVIDERS),
            compiled=("resnet20", "torchvision/resnet18"),  # models without dropout, which inductor draws its own way
            dtypes=MODEL_DTYPES,
            seconds=1400,
            compile_s=20,
            peak_s=2,
            quick=("resnet20", "torchvision/mobilenet_v3_large", "timm/regnety_004"),
        ),
        # The batch norms of a model as in a training step, without the rest of the step.
        "walk": Suite(
            inputs=tuple(Input(_PICTURES, f"torchvision/{name}") for name in ("mobilenet_v2", "resnet50")),
            operations=tuple(WALKS),
            providers=(TORCH, BNEXT),
            dtypes=MODEL_DTYPES,
            seconds=180,
        ),
        # Models whose step is mostly Python and dispatch: the cost of a fused model's guards must not show.
        "small-models": Suite(
            inputs=(Input((8, 3, 32, 32), "resnet20"),),
            operations=(STEP,),
            providers=EAGER_PROVIDERS,
            dtypes=("float32",),
            seconds=20,
            threads=1,
        ),
        MEMORY: Suite(
            inputs=tuple(Input(_SMALL_PICTURES, name) for name in _OF_MEMORY),
            operations=(STEP,),
            providers=(*EAGER_PROVIDERS, RECOMPUTE, CHECKPOINT),
            dtypes=("float32",),
            seconds=300,
            peak_s=2,
            allocations=True,
            quick=("torchvision/mobilenet_v3_large",),
        ),
        SWEEP: Suite(_plain(*_sweep()), seconds=300),
        VARIANTS: Suite(
            inputs=tuple(Input(shape, variant=name) for name, shapes in _VARIANTS.items() for shape in shapes),
            operations=("forward", "forward_backward"),
            providers=(WHOLE, BNEXT, BNEXT_BY_HAND, TORCH_BY_HAND),
            seconds=240,
        ),
        "compiled": _COMPILED,
    },
    "cuda": {
        # A training step's batch: most of these tensors are far larger than a GPU's L2 cache.
        "resnet50-256": Suite(
            _plain(*_images(256)),
            compiled=_images(256, ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))),
            compiled_dtypes=("bfloat16",),
        ),
        # Tensors whose time depends on launches, and on the number of blocks that share a channel.
        "resnet50-32": Suite(_plain(*_images(32))),
        "2d": Suite(_plain((32768, 1024), (4096, 1024), (1024, 1024), (4096, 256), (64, 512), (4, 8)), BOTH_TOO),
        "fused": _fused(32, _ALL_FUSED_SIZES, ("bfloat16",), seconds=200),
        "fused-256": _fused(256, _ALL_FUSED_SIZES, ("bfloat16",), seconds=240),
        "training": replace(
            _TRAINING,
            inputs=(Input((256, 3, 224, 224), "resnet50"),),
            dtypes=("bfloat16",),
            layouts=("channels_last",),
            seconds=240,
            compile_s=30,
            peak_s=15,
        ),
        "compiled": replace(
            _COMPILED,
            inputs=(
                Input((256, 64, 56, 56), "bn"),
                Input((256, 1024, 14, 14), "bn"),
                Input((256, 64, 56, 56), "conv-bn-relu"),
                Input((256, 256, 56, 56), "bottleneck"),
                Input((256, 1024, 14, 14), "bottleneck"),
            ),
            seconds=240,
        ),
    },
}


def default_suites(device: str) -> list[str]:
    return [name for name, suite in SUITES[device].items() if suite.seconds is None]


def default_seconds(device: str, suites: Collection[str]) -> float:
    """The time budget of the chosen suites of a device."""
    own = [SUITES[device][name].seconds for name in set(suites)]
    shared = DEFAULT_SECONDS[device] if None in own else 0.0
    return shared + sum(seconds or 0.0 for seconds in own)


def select_cases(
    suites: Collection[str],
    device: str = "cpu",
    dtypes: Collection[str] = (),
    layouts: Collection[str] = (),
    operations: Collection[str] = (),
    models: Collection[str] = (),
    quick: bool = False,
    with_compile: bool = True,
    with_plans: bool = False,
) -> list[Case]:
    """The cases of the chosen suites of a device, in order, restricted to the given dtypes, layouts and operations.

    An empty choice means all that a suite has; a dtype or layout outside a suite's own is measured on request. A tensor
    that is not (N, C, H, W) has one layout, contiguous; sequences of the variants have two, like images. ``quick``
    leaves out tensors above ``QUICK_MAX_ELEMENTS``, and models that are not among a suite's quick ones.
    """
    cases = []
    for name, suite in SUITES[device].items():
        chosen = tuple(op for op in suite.operations if op in (operations or suite.operations))
        if name not in suites or not chosen:
            continue
        inputs = [input for input in suite.inputs if not models or input.model in (*models, "")]
        compiles = with_compile and not (quick and suite.quick)
        if quick:
            small = [input for input in inputs if prod(input.shape) <= QUICK_MAX_ELEMENTS]
            inputs = [input for input in small if not suite.quick or input.model in suite.quick]
        of_suite = (dtypes or suite.dtypes or DEFAULT_DTYPES[device], layouts or suite.layouts, inputs)
        for dtype, layout, input in product(*of_suite):
            has_layout = layout == "contiguous" or len(input.shape) >= (3 if input.variant else 4)
            has_dtype = not input.model or dtype in MODEL_DTYPES
            providers = _providers(suite, input, device, compiles and suite.is_compiled(input, dtype), with_plans)
            if has_layout and has_dtype and providers:
                fields = {"dtype": dtype, "layout": layout, "operations": chosen, "providers": providers}
                cases.append(Case(name, **fields, **input._asdict()))
    return cases


def _providers(suite: Suite, input: Input, device: str, compiles: bool, with_plans: bool) -> tuple[str, ...]:
    """The providers; torch.compile, which may fail, is last."""
    if suite.providers:
        return tuple(name for name in suite.providers if compiles or not name.endswith(COMPILE))
    on_gpu = (NO_CUDNN, *(f"{PLANNED}{name}" for name in PLANS if with_plans)) if device == "cuda" else ()
    return (TORCH, BNEXT, *on_gpu, *((TORCH_COMPILE,) if compiles else ()))
