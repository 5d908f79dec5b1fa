"""Training: steps of SGD with momentum on one synthetic batch, and the loss that they lead to."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.closeness import require_as_close
from benchmarks.model_suites import STEP, WITHOUT, ModelCase
from benchmarks.models import Built, build, build_reference, make_data, make_model
from benchmarks.operations import SEED
from benchmarks.timing import Call

# The loss falls by half and more within the steps, so that each of them shows in it; one more would learn the batch by
# heart, and a later one divide rounding by nearly nothing.
STEPS = 4
LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Trainer:
    """A model in training, on its one batch."""

    def __init__(self, case: ModelCase, model: Built, device: str, learning_rate: float = LEARNING_RATE) -> None:
        self.losses: tuple[float, ...] = ()
        self._model = model
        parameters = list(model.module.parameters())
        self._optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=MOMENTUM)
        self._input = make_data(case, device, case.shape).to(parameters[0].dtype)
        self._target: Tensor | None = None

    def step(self) -> Tensor:
        """Returns the loss before the update; it stays on the device."""
        self._optimizer.zero_grad()
        loss = self._loss(self._model(self._input))
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def evaluate(self) -> Tensor:
        """The loss by running statistics: never compiled, nor captured, as it is not timed."""
        module = self._model.module
        module.eval()
        with torch.no_grad(), self._model.autocast():
            loss = self._loss(module.forward(self._input))
        module.train()
        return loss

    def curve(self) -> Tensor:
        """The loss at each of a few steps, and after them in evaluation, which shows the running statistics.

        What a step drops at random is the same whoever takes it.
        """
        found = []
        with torch.random.fork_rng():
            for number in range(STEPS):
                torch.manual_seed(SEED + number)
                found.append(self.step())
        losses = torch.stack([*found, self.evaluate()])
        self.losses = tuple(losses.tolist())
        return losses

    def prepared(self, operation: str) -> Call:
        return {STEP: self.step}[operation]

    def _loss(self, output: Tensor) -> Tensor:
        output = output.float() if output.dtype == torch.bfloat16 else output
        if self._target is None:
            self._target = make_target(output)
        if output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output[:, 0], self._target.to(output.dtype))
        return F.cross_entropy(output, self._target)


def make_target(output: Tensor) -> Tensor:
    """A class for each sample, or each of its pixels; of a single output, yes or no."""
    samples, classes, *pixels = output.shape
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(max(classes, 2), (samples, *pixels), generator=generator).to(output.device)


@cache
def reference_curve(case: ModelCase, device: str) -> Tensor:
    """In double precision it takes longer than all else: once for both layouts, in which it is the same."""
    return Trainer(case, build_reference(case, make_model(case, device), device), device).curve()


class TrainingChecker:
    """Knows the right loss curve of one case."""

    def __init__(self, case: ModelCase, device: str) -> None:
        self._case = case
        self._device = device
        self._model = make_model(case, device)
        plain = replace(case, suite="", layout="contiguous", operations=(), providers=())
        self._reference = reference_curve(plain, device)
        self._torch = Trainer(case, build(case, "torch", self._model, device), device)
        self._torchs = self._torch.curve()

    def make(self, provider: str) -> Trainer:
        if provider == "torch":
            return self._torch
        built = build(self._case, provider, self._model, self._device)
        # The same work at rate 0: without batch norm some go to inf within a few steps.
        return Trainer(self._case, built, self._device, 0.0 if provider == WITHOUT else LEARNING_RATE)

    def check(self, provider: str, trainer: Trainer) -> None:
        """Train it; raise MismatchError where its losses are others. Without batch norm they may be."""
        if provider == WITHOUT:
            trainer.step()
        if provider in ("torch", WITHOUT):
            return
        curves = ({"losses": curve} for curve in (trainer.curve(), self._torchs, self._reference))
        require_as_close(f"{self._case}: {{}} of {provider}", *curves)
