// What compiled autograd needs of a node. It traces backward passes with tensors of its own in place of the gradients
// and of the node's saved tensors.
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

// Which of a node's gradients the current backward pass needs.
std::vector<bool> needed_outputs(const torch::autograd::Node& node);

// The node's apply_with_saved: it puts a call of `gradients` into the trace, a function of the incoming gradients and
// of the saved tensors. The shapes of the incoming gradients are not known yet.
torch::autograd::variable_list traced(
    const torch::autograd::Node& node, const torch::autograd::variable_list& grads, Saved saved,
    torch::dynamo::autograd::SwapSavedVariables& swapped,
    std::function<torch::autograd::variable_list(const torch::autograd::variable_list& grads,
                                                 const torch::autograd::variable_list& saved)>
        gradients);

}  // namespace bnext::autograd
