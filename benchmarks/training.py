"""Training: steps of SGD with momentum on one synthetic batch, and the loss that they lead to."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.closeness import require_as_close
from benchmarks.model_suites import STEP, ModelCase
from benchmarks.models import Built, build, build_reference, make_data, make_model
from benchmarks.operations import SEED
from benchmarks.timing import Call

# The loss falls by half and more within the steps, so that each of them shows in it; one more would learn the batch by
# heart, and a later one divide rounding by nearly nothing.
STEPS = 4
LEARNING_RATE, MOMENTUM = 0.01, 0.9
NUM_CLASSES = 1000


class Trainer:
    """A model in training, on its one batch."""

    def __init__(self, case: ModelCase, model: Built, device: str) -> None:
        self.losses: tuple[float, ...] = ()
        self._model = model
        parameters = list(model.module.parameters())
        self._optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
        self._input = make_data(case, device, case.shape).to(parameters[0].dtype)
        generator = torch.Generator().manual_seed(SEED)
        self._target = torch.randint(NUM_CLASSES, case.shape[:1], generator=generator).to(device)

    def step(self) -> Tensor:
        """Returns the loss before the update; it stays on the device."""
        self._optimizer.zero_grad()
        loss = self._loss(self._model(self._input))
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def evaluate(self) -> Tensor:
        """The loss by running statistics: never compiled, as it is not timed."""
        module = self._model.module
        module.eval()
        with torch.no_grad(), self._model.autocast():
            loss = self._loss(module(self._input))
        module.train()
        return loss

    def curve(self) -> Tensor:
        """The loss at each of a few steps, and after them in evaluation, which shows the running statistics."""
        losses = torch.stack([*(self.step() for _ in range(STEPS)), self.evaluate()])
        self.losses = tuple(losses.tolist())
        return losses

    def prepared(self, operation: str) -> Call:
        return {STEP: self.step}[operation]

    def _loss(self, output: Tensor) -> Tensor:
        return F.cross_entropy(output.float() if output.dtype == torch.bfloat16 else output, self._target)


class TrainingChecker:
    """Knows the right loss curve of one case."""

    def __init__(self, case: ModelCase, device: str) -> None:
        self._case = case
        self._device = device
        self._model = make_model(case, device)
        self._reference = self._trainer(build_reference(case, self._model, device)).curve()
        self._torchs = self._trainer(build(case, "torch", self._model, device)).curve()

    def _trainer(self, model: Built) -> Trainer:
        return Trainer(self._case, model, self._device)

    def make(self, provider: str) -> Trainer:
        return self._trainer(build(self._case, provider, self._model, self._device))

    def check(self, provider: str, trainer: Trainer) -> None:
        """Train it; raise MismatchError where its losses are others."""
        curves = ({"losses": curve} for curve in (trainer.curve(), self._torchs, self._reference))
        require_as_close(f"{self._case}: {{}} of {provider}", *curves)
