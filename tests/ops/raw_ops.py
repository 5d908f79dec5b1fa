"""The raw operators on one problem, for tests of what only they have: save_stats, masks, output_mask."""

from __future__ import annotations

import reference
import torch
from cases import RECTIFIERS, Case
from checks import make_inputs
from reference import Act
from torch import Tensor

train = torch.ops.bnext.batch_norm_train
evaluate = torch.ops.bnext.batch_norm_eval
backward = torch.ops.bnext.batch_norm_backward


def act_args(act: Act) -> dict[str, object]:
    """The activation as the operators take it."""
    known, slope = reference.named(act)
    return {"act": known, "slope": slope}


def keeps_mask(act: Act) -> bool:
    return reference.named(act)[0] in RECTIFIERS


class Call:
    """A problem, and the operators on it. `missing` names the attributes that are None."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        training: bool,
        act: Act,
        has_residual: bool = True,
        grad: bool = False,
        device: str = "cpu",
        missing: str = "",
    ) -> None:
        inputs = make_inputs(*case, dtype, device, has_residual)
        p = inputs.params
        values = (inputs.input, p.weight, p.bias, inputs.residual)
        self.x, self.weight, self.bias, self.residual = (
            None if v is None else v.detach().requires_grad_(grad) for v in values
        )
        self.mean, self.var, self.counter = p.running_mean, p.running_var, torch.tensor(3, device=device)
        self.training, self.act, self.momentum, self.eps = training, act, 0.1, 1e-5
        # g has the input's layout, since in backward without the input g's layout decides the order of the sums.
        self.g = torch.empty_like(self.x).copy_(inputs.grad_output).detach().requires_grad_(grad)
        for what in missing.split():
            setattr(self, what, None)

    @property
    def op(self) -> object:
        return train if self.training else evaluate

    def forward_args(self) -> tuple[object, ...]:
        stem = (self.x, self.weight, self.bias, self.mean, self.var)
        return (*stem, self.counter, self.momentum, self.eps) if self.training else (*stem, self.eps)

    def epilogue(self, with_mask: bool = False) -> dict[str, object]:
        return {"residual": self.residual, **act_args(self.act), "with_mask": with_mask}

    def forward(self, with_mask: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return self.op(*self.forward_args(), **self.epilogue(with_mask))

    def backward_args(
        self, stats: Tensor, wanted: tuple[bool, ...], mask: Tensor | None = None, **changes: object
    ) -> dict[str, object]:
        return {
            "grad_output": self.g,
            "input": self.x,
            "weight": self.weight,
            "save_stats": stats,
            "training": self.training,
            "eps": self.eps,
            "output_mask": list(wanted),
            "bias": self.bias,
            "residual": self.residual if mask is None else None,
            "mask": mask,
            **act_args(self.act),
            **changes,
        }

    def backward(self, *args: object, **changes: object) -> tuple[Tensor, ...]:
        return backward(**self.backward_args(*args, **changes))

    def wanted(self) -> tuple[bool, ...]:
        """The output_mask for all gradients; with identity the operator has none for the residual."""
        return (True, True, True, self.act != "identity" and self.residual is not None)
