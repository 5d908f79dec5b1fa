// What the graph of autograd holds of a call for its backward, beside what it is differentiated in.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <typeinfo>
#include <utility>

#include "../common/activation.h"
#include "derivatives.h"

namespace bnext::autograd {

struct SavedCall {
  torch::autograd::SavedVariable input;
  torch::autograd::SavedVariable weight;
  torch::autograd::SavedVariable bias;
  torch::autograd::SavedVariable residual;
  torch::autograd::SavedVariable mask;
  torch::autograd::SavedVariable save_stats;
  bool training = true;
  double eps = 0.0;
  Activation activation;
  // Of a batch that several processes share; else undefined.
  torch::autograd::SavedVariable count;
  std::string group_name;

  Point at(const at::Tensor& like) const {
    const at::Tensor values = count.unpack();
    auto batch = values.defined() ? std::optional<SharedBatch>({group_name, values}) : std::nullopt;
    return {like, input.unpack(), weight.unpack(), save_stats.unpack(), training, eps, std::move(batch)};
  }

  void reset() {
    for (auto* each : tensors()) each->reset_data();
  }

  // For compiled autograd, which traces backward with tensors of its own in place of what is saved: all that the
  // computation depends on, and the exchange and its undoing, in one order.
  void collect(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    for (const auto* each : const_cast<SavedCall*>(this)->tensors()) args.collect(*each, /*is_output=*/false);
    args.collect(training);
    args.collect(eps);
    args.collect(static_cast<std::int64_t>(activation.act));
    args.collect(activation.slope);
    args.collect(group_name);
  }

  void before(torch::dynamo::autograd::SwapSavedVariables& swapped) {
    for (auto* each : tensors()) swapped.before(*each);
  }

  void after(torch::dynamo::autograd::SwapSavedVariables& swapped) {
    for (auto* each : tensors()) swapped.after(*each);
  }

 private:
  std::array<torch::autograd::SavedVariable*, 7> tensors() {
    return {&input, &weight, &bias, &residual, &mask, &save_stats, &count};
  }
};

// The class of the forward operators' nodes, and what such a node holds.
const std::type_info& backward_type();
SavedCall& saved_call(torch::autograd::Node& backward);

}  // namespace bnext::autograd
