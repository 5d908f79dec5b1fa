// What compiled autograd needs of a node: it traces backward passes, with tensors of its own in place of the gradients
// and of what a node has saved.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <functional>
#include <vector>

namespace bnext::autograd {

using Saved = c10::ArrayRef<torch::autograd::SavedVariable*>;

torch::autograd::variable_list unpacked(Saved saved);

// Which of a node's gradients the present pass asks for.
std::vector<bool> needed_outputs(const torch::autograd::Node& node);

// The node's apply_with_saved: a call of `gradients` in the trace, a function of the gradients that come in and of what
// is saved. The shapes of the former are not known yet.
torch::autograd::variable_list traced(
    const torch::autograd::Node& node, const torch::autograd::variable_list& grads, Saved saved,
    torch::dynamo::autograd::SwapSavedVariables& swapped,
    std::function<torch::autograd::variable_list(const torch::autograd::variable_list& grads,
                                                 const torch::autograd::variable_list& saved)>
        gradients);

}  // namespace bnext::autograd
