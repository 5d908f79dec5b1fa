"""What is measured of whole models: the suites, their models, shapes and providers."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

from benchmarks.suites import LAYOUTS, QUICK_MAX_ELEMENTS, Shape, shape_label

# Providers: whose layers are in the model, or whose back end of torch.compile it goes through.
COMPILE = "-compile"
EAGER_PROVIDERS = ("torch", "bnext", "bnext-fused")
COMPILED_PROVIDERS = ("torch-compile", "bnext-compile")
WITHOUT = "without"  # no batch norm at all: what it costs is what can be gained, fusing apart

STEP = "step"  # forward, loss, backward and the optimiser's update
FORWARD_BACKWARD, EVAL = "forward_backward", "eval"

# float32 as it is; bfloat16 is autocast: parameters, statistics and the loss stay float32.
MODEL_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelSuite:
    """Models and the shapes of their inputs, and the seconds that all of it takes, compiling included.

    ``compile_s`` and ``peak_s`` are about what compiling a provider, and measuring its memory, take on each case;
    without ``peak_s`` memory is not measured. ``compiled``: the models that torch.compile is measured on, and
    ``quick``: those of a quick look, which then compiles nothing; None: all. ``threads``, unless told: None is torch's
    own number.
    """

    models: tuple[tuple[str, tuple[Shape, ...]], ...]
    operations: tuple[str, ...]
    providers: tuple[str, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    seconds: float
    compile_s: float
    peak_s: float = 0.0
    compiled: tuple[str, ...] | None = None
    quick: tuple[str, ...] | None = None
    threads: int | None = None

    def providers_of(self, model: str, with_compile: bool) -> tuple[str, ...]:
        compiled = with_compile and (self.compiled is None or model in self.compiled)
        return tuple(name for name in self.providers if compiled or not name.endswith(COMPILE))


@dataclass(frozen=True)
class ModelCase:
    """A model, the input that it is given, and what is measured of it with which providers."""

    suite: str
    model: str
    shape: Shape
    dtype: str
    layout: str
    operations: tuple[str, ...]
    providers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.suite} {self.model} {shape_label(self.shape)} {self.dtype} {self.layout}"


# The shapes of a batch norm alone, of three 3x3 convolutions with one each, and of ResNet-50's bottlenecks.
_COMPILED = ModelSuite(
    models=(
        ("bn", ((32, 64, 56, 56), (32, 256, 14, 14))),
        ("conv-bn-relu", ((8, 64, 28, 28),)),
        ("bottleneck", ((8, 256, 28, 28), (8, 1024, 14, 14))),
    ),
    operations=(FORWARD_BACKWARD, EVAL),
    providers=("torch-compile", "bnext-compile"),
    dtypes=("float32", "bfloat16"),
    layouts=LAYOUTS,
    seconds=180,
    compile_s=3,
)

# What people train, by the package that has it, or of networks.py.
_PICTURES: Shape = (16, 3, 128, 128)
_MODELS: tuple[tuple[str, tuple[Shape, ...]], ...] = (
    ("resnet20", ((128, 3, 32, 32),)),
    ("torchvision/resnet18", (_PICTURES,)),
    ("torchvision/resnet50", (_PICTURES,)),
    ("torchvision/mobilenet_v2", (_PICTURES,)),
    ("torchvision/mobilenet_v3_large", (_PICTURES,)),
    ("torchvision/efficientnet_b0", (_PICTURES,)),
    ("torchvision/densenet121", (_PICTURES,)),
    ("torchvision/shufflenet_v2_x1_0", (_PICTURES,)),
    ("torchvision/regnet_y_400mf", (_PICTURES,)),
    ("unet", ((8, 3, 128, 128),)),
    ("dcgan-discriminator", ((64, 3, 64, 64),)),
    ("pointnet", ((32, 3, 1024),)),
    ("timm/efficientnet_b0", (_PICTURES,)),
    ("timm/densenet121", (_PICTURES,)),
    ("timm/regnety_004", (_PICTURES,)),
)

# Measured when they are named, as the fused suites.
MODEL_SUITES: dict[str, dict[str, ModelSuite]] = {
    "cpu": {
        "training": ModelSuite(
            models=(("resnet50", ((8, 3, 64, 64),)),),
            operations=(STEP,),
            providers=(*EAGER_PROVIDERS, *COMPILED_PROVIDERS),
            dtypes=("float32",),
            layouts=LAYOUTS,
            seconds=270,
            compile_s=25,
            peak_s=5,
        ),
        "models": ModelSuite(
            models=_MODELS,
            operations=(STEP,),
            providers=(*EAGER_PROVIDERS, WITHOUT, *COMPILED_PROVIDERS),
            dtypes=MODEL_DTYPES,
            layouts=LAYOUTS,
            seconds=1400,
            compile_s=20,
            compiled=("resnet20", "torchvision/resnet18"),  # no dropout, which inductor has of its own
            quick=("resnet20", "torchvision/mobilenet_v3_large", "timm/regnety_004"),
        ),
        # Where a step is mostly Python and dispatch: what a fused model's guards cost must not show.
        "small-models": ModelSuite(
            models=(("resnet20", ((8, 3, 32, 32),)),),
            operations=(STEP,),
            providers=EAGER_PROVIDERS,
            dtypes=("float32",),
            layouts=LAYOUTS,
            seconds=20,
            compile_s=0,
            threads=1,
        ),
        "compiled": _COMPILED,
    },
    "cuda": {
        "training": ModelSuite(
            models=(("resnet50", ((256, 3, 224, 224),)),),
            operations=(STEP,),
            providers=(*EAGER_PROVIDERS, *COMPILED_PROVIDERS),
            dtypes=("bfloat16",),
            layouts=("channels_last",),
            seconds=240,
            compile_s=30,
            peak_s=15,
        ),
        "compiled": replace(
            _COMPILED,
            models=(
                ("bn", ((256, 64, 56, 56), (256, 1024, 14, 14))),
                ("conv-bn-relu", ((256, 64, 56, 56),)),
                ("bottleneck", ((256, 256, 56, 56), (256, 1024, 14, 14))),
            ),
            dtypes=("bfloat16", "float32"),
            seconds=240,
        ),
    },
}


def model_names() -> list[str]:
    suites = (suite for device in MODEL_SUITES.values() for suite in device.values())
    return list(dict.fromkeys(model for suite in suites for model, _ in suite.models))


def default_model_seconds(device: str, suites: Collection[str]) -> float:
    return sum(suite.seconds for name, suite in MODEL_SUITES[device].items() if name in suites)


def select_model_cases(
    suites: Collection[str],
    device: str,
    dtypes: Collection[str] | None = None,
    layouts: Collection[str] | None = None,
    operations: Collection[str] | None = None,
    quick: bool = False,
    with_compile: bool = True,
    models: Collection[str] | None = None,
) -> list[ModelCase]:
    """The cases of the chosen suites of a device, in their order; ``None`` is what the suite has.

    A dtype or layout that a suite does not have by itself is measured where it is asked for.
    """
    cases = []
    for name, suite in MODEL_SUITES[device].items():
        chosen = tuple(op for op in suite.operations if operations is None or op in operations)
        if name not in suites or not chosen:
            continue
        looked_at = suite.quick if quick else None
        cases += [
            ModelCase(name, model, shape, dtype, layout, chosen, providers)
            for dtype in dtypes or suite.dtypes
            if dtype in MODEL_DTYPES
            for layout in layouts or suite.layouts
            for model, shapes in suite.models
            if (models is None or model in models) and (looked_at is None or model in looked_at)
            if (providers := suite.providers_of(model, with_compile and looked_at is None))
            for shape in shapes
            if (layout == "contiguous" or len(shape) == 4) and not (quick and prod(shape) > QUICK_MAX_ELEMENTS)
        ]
    return cases


# Of the progress bar and the budget: what a second is in bytes on a CPU, in measurements on a GPU; see suites.py.
SECOND_WORK = {"cpu": 100_000_000, "cuda": 1}


def operation_work(case: ModelCase, device: str) -> int:
    """An operation is timed for as long as any other of its suite."""
    return SECOND_WORK[device] * 2 * len(case.providers)


def check_work(case: ModelCase, device: str) -> int:
    """Making the models, compiling them, and comparing what they do."""
    suite = MODEL_SUITES[device][case.suite]
    compiled = sum(provider.endswith(COMPILE) for provider in case.providers)
    return round(SECOND_WORK[device] * (len(case.providers) + suite.compile_s * compiled))


def peak_work(case: ModelCase, device: str) -> int:
    return round(SECOND_WORK[device] * MODEL_SUITES[device][case.suite].peak_s * len(case.providers))


def model_case_work(case: ModelCase, device: str) -> int:
    operations = operation_work(case, device) * len(case.operations)
    return check_work(case, device) + peak_work(case, device) + operations
