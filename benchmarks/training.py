"""What is timed of a whole model, training steps or single calls, and the check of its results."""

from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.correctness import require_as_close
from benchmarks.models import REFERENCE_DTYPES, Built, build, build_reference, make_data, make_model
from benchmarks.operators import SEED
from benchmarks.suites import CHECKPOINT, TORCH, WITHOUT, Case
from benchmarks.timing import Call
from benchmarks.traffic import STEP

# The second loss depends on the first step's gradients. Rounding errors grow with each step, in some models tenfold,
# until two right computations no longer agree.
STEPS = 2
LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Trainer:
    """Trains a model by SGD with momentum on one synthetic batch."""

    def __init__(self, case: Case, model: Built, device: str, learning_rate: float = LEARNING_RATE) -> None:
        self.losses: tuple[float, ...] = ()
        self._case, self._model, self._device = case, model, device
        parameters = list(model.module.parameters())
        self._optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=MOMENTUM)
        self.input = make_data(case, device, case.shape).to(parameters[0].dtype)
        self._target: Tensor | None = None

    def twice_as_large(self) -> "Trainer":
        """The same model in training on a batch twice as large."""
        images, *image = self._case.shape
        return Trainer(replace(self._case, shape=(2 * images, *image)), self._model, self._device)

    def forward(self) -> Tensor:
        """Returns the loss, with its graph."""
        return self._loss(self._model(self.input))

    def step(self) -> Tensor:
        """Returns the loss before the update; it stays on the device."""
        self._optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def prepared(self, operation: str) -> Call:
        return self.step

    def evaluate(self) -> Tensor:
        """The loss with running statistics, neither compiled nor captured, as it is not timed."""
        module = self._model.module
        module.eval()
        with torch.no_grad(), self._model.autocast():
            loss = self._loss(module.forward(self.input))
        module.train()
        return loss

    def results(self) -> dict[str, Tensor]:
        """The losses of a few steps, and then the loss in evaluation, which depends on the running statistics.

        Dropout is the same for every provider.
        """
        found = []
        with torch.random.fork_rng():
            for number in range(STEPS):
                torch.manual_seed(SEED + number)
                found.append(self.step())
        losses = torch.stack([*found, self.evaluate()])
        self.losses = tuple(losses.tolist())
        return {"losses": losses}

    def _loss(self, output: Tensor) -> Tensor:
        output = output.float() if output.dtype == torch.bfloat16 else output
        if self._target is None:
            self._target = make_target(output)
        if output.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(output[:, 0], self._target.to(output.dtype))
        return F.cross_entropy(output, self._target)


def make_target(output: Tensor) -> Tensor:
    """A class for each sample, or for each of its pixels; for a single output, 0 or 1."""
    samples, classes, *pixels = output.shape
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(max(classes, 2), (samples, *pixels), generator=generator).to(output.device)


def make_trainer(case: Case, provider: str, model: nn.Module, device: str) -> Trainer:
    """A trainer of a copy of the model with a provider's layers."""
    # Rate 0 takes the same work: without batch norm some models diverge to inf within a few steps.
    rate = 0.0 if provider == WITHOUT else LEARNING_RATE
    return Trainer(case, build(case, provider, model, device), device, rate)


class Calls:
    """A model whose input requires a gradient, as in the middle of a network.

    Input and gradient are rounded to the case's dtype, whatever dtype the model computes in.
    """

    losses: tuple[float, ...] = ()

    def __init__(self, case: Case, model: Built, device: str, dtype: torch.dtype) -> None:
        rounded: torch.dtype = getattr(torch, case.dtype)
        self._model = model
        self._input = make_data(case, device, case.shape).to(rounded).to(dtype, copy=True).requires_grad_()
        # Values other than the input's: with those, batch norm's gradient would be zero except for rounding.
        with torch.no_grad(), model.autocast():
            shape = tuple(model.module.eval()(self._input).shape)
        self._grad_output = make_data(case, device, shape, SEED + 1).to(rounded).to(dtype)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of the input and the parameters."""
        output = self._model(self._input)
        leaves = (self._input, *self._model.module.parameters())
        return output, *torch.autograd.grad(output, leaves, self._grad_output)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self._model(self._input)

    def prepared(self, operation: str) -> Call:
        """The call of an operation. This sets the model's mode, until another operation is prepared."""
        training = operation == "forward_backward"
        self._model.module.train(training)
        return self.forward_backward if training else self.evaluate

    def results(self) -> dict[str, Tensor]:
        """The results by name; running statistics are those after one call in training."""
        module = self._model.module
        self.prepared("forward_backward")
        output, grad_input, *gradients = self.forward_backward()
        found = {"output": output.detach(), "grad_input": grad_input}
        names = (name for name, _ in module.named_parameters())
        found |= {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
        found |= {name: buffer.clone() for name, buffer in module.named_buffers() if "running" in name}
        self.prepared("eval")
        return {**found, "eval output": self.evaluate()}


class ModelChecker:
    """Makes the providers of one case, each a Trainer, here or in a process of its own, or Calls, and checks them."""

    def __init__(self, case: Case, device: str) -> None:
        self._case = case
        self._device = device
        reference = reference_curve if STEP in case.operations else reference_results
        self._reference = reference(replace(case, suite="", layout="contiguous", providers=()), device)
        self._torch = self._make(TORCH)
        self._torchs = self._torch.results()

    @cached_property
    def _model(self) -> nn.Module:
        return make_model(self._case, self._device)

    def make(self, provider: str) -> Any:
        return self._torch if provider == TORCH else self._make(provider)

    def _make(self, provider: str) -> Any:
        if STEP in self._case.operations:
            return make_trainer(self._case, provider, self._model, self._device)
        built = build(self._case, provider, self._model, self._device)
        return Calls(self._case, built, self._device, getattr(torch, self._case.dtype))

    def check(self, provider: str, made: Any) -> None:
        """Train or call it; raise MismatchError at the first wrong result.

        Models without batch norm are only run, and checkpointed ones: torch's checkpoints update running statistics
        twice a batch.
        """
        if provider in (WITHOUT, CHECKPOINT):
            made.step()
        elif provider != TORCH:
            where = f"{self._case}: {{}} of {provider}"
            # Losses are in float32, but computed from outputs in the case's dtype.
            least = torch.finfo(getattr(torch, self._case.dtype)).eps if STEP in self._case.operations else 0.0
            require_as_close(where, made.results(), self._torchs, self._reference, torch.mean, least)


def reference_results(case: Case, device: str) -> dict[str, Tensor]:
    model = build_reference(case, make_model(case, device), device)
    if STEP in case.operations:
        return Trainer(case, model, device).results()
    return Calls(case, model, device, REFERENCE_DTYPES[case.dtype]).results()


# Training in double precision takes longer than all else, so it runs once for both layouts: the result is the same.
reference_curve = cache(reference_results)
