"""One call of a model in training or evaluation, and all that it returns or updates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.closeness import require_as_close
from benchmarks.model_suites import EVAL, FORWARD_BACKWARD, ModelCase
from benchmarks.models import REFERENCE_DTYPES, Built, build, build_reference, make_data, make_model
from benchmarks.operations import SEED
from benchmarks.timing import Call


@dataclass(frozen=True)
class Calls:
    """A model with an input that requires its gradient, as of a layer in the middle of a network."""

    model: Built
    input: Tensor
    grad_output: Tensor

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of the input and the parameters."""
        output = self.model(self.input)
        leaves = (self.input, *self.model.module.parameters())
        return output, *torch.autograd.grad(output, leaves, self.grad_output)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.model(self.input)

    def prepared(self, operation: str) -> Call:
        """The call of an operation, with the model in its mode: to be made before another operation is prepared."""
        self.model.module.train(operation == FORWARD_BACKWARD)
        return {FORWARD_BACKWARD: self.forward_backward, EVAL: self.evaluate}[operation]

    def results(self) -> dict[str, Tensor]:
        """By name; running statistics as they are after one call in training."""
        self.prepared(FORWARD_BACKWARD)
        output, grad_input, *gradients = self.forward_backward()
        found = {"output": output.detach(), "grad_input": grad_input}
        names = (name for name, _ in self.model.module.named_parameters())
        found |= {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
        found |= {name: buffer.clone() for name, buffer in self.model.module.named_buffers() if "running" in name}
        self.prepared(EVAL)
        return {**found, "eval output": self.evaluate()}


class CallChecker:
    """Knows the right results of one case."""

    def __init__(self, case: ModelCase, device: str) -> None:
        self._case = case
        self._device = device
        self._model = make_model(case, device)
        self._dtype: torch.dtype = getattr(torch, case.dtype)
        # Rounded here, so that a reference is given the same values.
        self._input = make_data(case, device, case.shape).to(self._dtype)
        with torch.no_grad():
            output = build(case, "torch", self._model, device)(self._input)
        # Not the input's values: of these batch norm's gradient is zero but for rounding.
        self._grad_output = make_data(case, device, tuple(output.shape), SEED + 1).to(self._dtype)
        reference = build_reference(case, self._model, device)
        self._reference = self._calls(reference, REFERENCE_DTYPES[case.dtype]).results()
        self._torchs = self._calls(build(case, "torch", self._model, device), self._dtype).results()

    def _calls(self, model: Built, dtype: torch.dtype) -> Calls:
        return Calls(model, self._input.to(dtype, copy=True).requires_grad_(), self._grad_output.to(dtype))

    def make(self, provider: str) -> Calls:
        return self._calls(build(self._case, provider, self._model, self._device), self._dtype)

    def check(self, provider: str, calls: Calls) -> None:
        """Raise MismatchError at the first result that is not right."""
        what = f"{self._case}: {{}} of {provider}"
        require_as_close(what, calls.results(), self._torchs, self._reference)
