// The nodes of the autograd graph: what they hold of a call, and the gradients that they compute from it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/activation.h"
#include "derivatives.h"
#include "recomputation.h"

namespace bnext::autograd {

using OutputMask = std::array<bool, 4>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct CallSettings {
  bool training = true;
  double eps = 0.0;
  Activation activation;
  std::string group_name;  // of a batch that several processes share
  std::int64_t virtual_batch_size = 0;
};

// What a call is differentiated at.
struct CallTensors {
  static constexpr std::size_t kSize = 8;
  at::Tensor input;
  at::Tensor weight;
  at::Tensor bias;
  at::Tensor residual;
  at::Tensor mask;
  at::Tensor save_stats;
  at::Tensor count;  // of a batch that several processes share
  at::Tensor valid;

  Point at(const at::Tensor& like, const CallSettings& settings) const;
};

struct SavedCall : CallSettings {
  torch::autograd::SavedVariable input;
  torch::autograd::SavedVariable weight;
  torch::autograd::SavedVariable bias;
  torch::autograd::SavedVariable residual;
  torch::autograd::SavedVariable mask;
  torch::autograd::SavedVariable save_stats;
  torch::autograd::SavedVariable count;
  torch::autograd::SavedVariable valid;

  // All of these, in the order of CallTensors.
  std::array<torch::autograd::SavedVariable*, CallTensors::kSize> tensors();
};

// The gradient of all forward operators: (input, weight, bias, residual).
class BatchNormBackward : public RecomputableNode {
 public:
  SavedCall call;

  std::string name() const override;
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  torch::dynamo::autograd::SwapSavedVariables& swapped) override;
};

// The gradient of the backward operators: (grad_output, input, weight, bias, residual) from cotangents of their
// outputs.
class BatchNormDoubleBackward : public torch::autograd::Node {
 public:
  torch::autograd::SavedVariable grad_output;
  SavedCall call;
  OutputMask output_mask{};

  std::string name() const override;
  void release_variables() override;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& cotangents) override;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& cotangents,
                                                  torch::dynamo::autograd::SwapSavedVariables& swapped) override;

 private:
  std::array<torch::autograd::SavedVariable*, 1 + CallTensors::kSize> tensors();
};

// (grad_input, grad_weight, grad_bias) without an activation, each computed only if `wanted`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> plain_backward(const Point& at, const at::Tensor& dz, OutputMask wanted);

// The derivatives of an activation, from the mask if it is defined, else from the pre-activation.
ActivationDerivatives derivatives_of(const Activation& activation, const Point& at, const at::Tensor& bias,
                                     const at::Tensor& residual, const at::Tensor& mask);

}  // namespace bnext::autograd
