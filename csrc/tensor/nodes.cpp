#include "nodes.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/variable.h>

#include <mutex>
#include <utility>

#include "checks.h"
#include "compiled_autograd.h"
#include "dispatcher.h"

namespace bnext::autograd {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// batch_norm_backward, or batch_norm_sync_backward of a batch that several processes share.
Gradients call_backward(const Point& at, const Tensor& grad_output, OutputMask wanted,
                        const Activation& activation = {}, const Tensor& bias = {}, const Tensor& residual = {},
                        const Tensor& mask = {}) {
  const auto input = or_none(at.input);
  const auto weight = or_none(at.weight);
  const std::string_view act = activation_name(activation.act);
  if (at.batch) {
    return sync_backward_op().call(grad_output, input, weight, at.save_stats, at.batch->count, at.eps, wanted,
                                   at.batch->group_name, or_none(bias), or_none(residual), or_none(mask), act,
                                   activation.slope, or_none(at.valid));
  }
  return backward_op().call(grad_output, input, weight, at.save_stats, at.training, at.eps, wanted, or_none(bias),
                            or_none(residual), or_none(mask), act, activation.slope, /*mean_grads=*/{},
                            or_none(at.valid), at.virtual_batch_size);
}

// The derivatives of a rectifier for which only the mask was saved. The second derivative is zero: an undefined tensor.
ActivationDerivatives mask_derivatives(const Activation& activation, const Point& at, const Tensor& mask) {
  const auto results = backward_op().call(at::ones_like(at.like), /*input=*/{}, /*weight=*/{}, at.save_stats,
                                          at.training, at.eps, {false, false, false, true}, /*bias=*/{},
                                          /*residual=*/{}, mask, activation_name(activation.act), activation.slope,
                                          /*mean_grads=*/{}, or_none(at.valid), at.virtual_batch_size);
  return {std::get<3>(results), {}};
}

CallTensors call_tensors(const Tensor* saved) {
  return {saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7]};
}

// The gradients of the forward operators; `saved`: the tensors of a SavedCall.
variable_list backward_gradients(const variable_list& grads, const variable_list& saved, const CallSettings& settings,
                                 const std::vector<bool>& needs) {
  variable_list result(4);
  if (!grads[0].defined()) return result;
  const Activation& activation = settings.activation;
  const bool activated = activation.act != Act::kIdentity;
  const OutputMask wanted{needs[0], needs[1], needs[2], needs[3] && activated};
  const CallTensors call = call_tensors(saved.data());
  if (needs[3] && !activated) result[3] = call.at(grads[0], settings).without_padding(grads[0]);
  if (wanted == OutputMask{}) return result;
  auto [grad_input, grad_weight, grad_bias, grad_residual] =
      call_backward(call.at(grads[0], settings), grads[0], wanted, activation, call.bias, call.residual, call.mask);
  if (wanted[0]) result[0] = std::move(grad_input);
  if (wanted[1]) result[1] = std::move(grad_weight);
  if (wanted[2]) result[2] = std::move(grad_bias);
  if (wanted[3]) result[3] = std::move(grad_residual);
  return result;
}

// The gradients of the backward operators; `saved`: their grad_output, and the tensors of a SavedCall.
variable_list double_backward_gradients(const variable_list& cotangents, const variable_list& saved,
                                        const CallSettings& settings, OutputMask output_mask,
                                        const std::vector<bool>& needs) {
  const CallTensors call = call_tensors(saved.data() + 1);
  const Point at = call.at(saved[0], settings);
  const Tensor dy = at.without_padding(saved[0]);
  const ActivationDerivatives derivatives =
      derivatives_of(settings.activation, at, call.bias, call.residual, call.mask);
  // An output that was not asked for is a placeholder, whose cotangent means nothing.
  const auto cotangent = [&](std::size_t i) { return output_mask[i] ? cotangents[i] : Tensor(); };
  const Tensor u = cotangent(0);
  const Tensor v = cotangent(1);
  // The cotangent of dz = dy*act'(z).
  const Tensor t = plus(output_tangent(at, u, v, cotangent(2)), at.without_padding(cotangent(3)));
  variable_list result(5);
  if (needs[0]) result[0] = scaled(t, derivatives.first);
  // Processes that share a batch must take part in the same collectives, whatever each of them needs.
  if (needs[1] || needs[2] || at.batch) {
    const SecondOrder second = second_order(at, scaled(dy, derivatives.first), u, v);
    if (needs[1]) result[1] = second.input;
    if (needs[2]) result[2] = second.weight;
  }
  if (t.defined() && derivatives.second.defined() && (needs[1] || needs[2] || needs[3] || needs[4])) {
    // dz also depends on z, and so on all that z is computed from.
    const Tensor dz = scaled(scaled(t, dy), derivatives.second);
    const auto [dx, dweight, dbias] = plain_backward(at, dz, {needs[1], needs[2], needs[3], false});
    if (needs[1]) result[1] = plus(result[1], dx);
    if (needs[2]) result[2] = plus(result[2], dweight);
    if (needs[3]) result[3] = dbias;
    if (needs[4]) result[4] = dz;
  }
  return result;
}

// What compiled autograd's trace depends on: where it differs, a new trace is made.
void collect(CompiledNodeArgs& args, const SavedCall& call) {
  for (const SavedVariable* each : const_cast<SavedCall&>(call).tensors()) args.collect(*each, /*is_output=*/false);
  args.collect(call.training);
  args.collect(call.eps);
  args.collect(static_cast<std::int64_t>(call.activation.act));
  args.collect(call.activation.slope);
  args.collect(call.group_name);
  args.collect(call.virtual_batch_size);
}

}  // namespace

Point CallTensors::at(const Tensor& like, const CallSettings& settings) const {
  auto batch = count.defined() ? optional<SharedBatch>({settings.group_name, count}) : std::nullopt;
  return {like,
          input,
          weight,
          save_stats,
          settings.training,
          settings.eps,
          std::move(batch),
          valid,
          settings.virtual_batch_size};
}

std::array<SavedVariable*, CallTensors::kSize> SavedCall::tensors() {
  return {&input, &weight, &bias, &residual, &mask, &save_stats, &count, &valid};
}

std::string BatchNormBackward::name() const { return "BNextBatchNormBackward"; }

void BatchNormBackward::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable* each : call.tensors()) each->reset_data();
  output.reset();
}

variable_list BatchNormBackward::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!grads[0].defined()) return variable_list(4);
  if (output) output->drop();  // backward has passed all nodes that saved it
  variable_list saved = unpacked(call.tensors());
  // A saved bias that is a detached copy (copy_of_bias) gets the bias's own edge, for double backward.
  Tensor& bias = saved[2];
  if (bias.defined() && at::GradMode::is_enabled() && next_edge(2).is_valid() && !bias.requires_grad()) {
    bias = torch::autograd::make_variable(bias, next_edge(2));
  }
  return backward_gradients(grads, saved, call, needed_outputs(*this));
}

void BatchNormBackward::compiled_args(CompiledNodeArgs& args) const { collect(args, call); }

variable_list BatchNormBackward::apply_with_saved(const variable_list& grads, SwapSavedVariables& swapped) {
  const auto gradients = [settings = static_cast<const CallSettings&>(call), needs = needed_outputs(*this)](
                             const variable_list& inputs, const variable_list& saved) {
    return backward_gradients(inputs, saved, settings, needs);
  };
  return traced(*this, grads, call.tensors(), swapped, gradients);
}

std::string BatchNormDoubleBackward::name() const { return "BNextBatchNormDoubleBackward"; }

void BatchNormDoubleBackward::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable* each : tensors()) each->reset_data();
}

std::array<SavedVariable*, 1 + CallTensors::kSize> BatchNormDoubleBackward::tensors() {
  const auto others = call.tensors();
  std::array<SavedVariable*, 1 + CallTensors::kSize> all{&grad_output};
  std::copy(others.begin(), others.end(), all.begin() + 1);
  return all;
}

variable_list BatchNormDoubleBackward::apply(variable_list&& cotangents) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return double_backward_gradients(cotangents, unpacked(tensors()), call, output_mask, needed_outputs(*this));
}

void BatchNormDoubleBackward::compiled_args(CompiledNodeArgs& args) const {
  args.collect(grad_output, /*is_output=*/false);
  collect(args, call);
  for (const bool wanted : output_mask) args.collect(wanted);
}

variable_list BatchNormDoubleBackward::apply_with_saved(const variable_list& cotangents, SwapSavedVariables& swapped) {
  const auto gradients = [settings = static_cast<const CallSettings&>(call), mask = output_mask,
                          needs = needed_outputs(*this)](const variable_list& inputs, const variable_list& saved) {
    return double_backward_gradients(inputs, saved, settings, mask, needs);
  };
  return traced(*this, cotangents, tensors(), swapped, gradients);
}

std::tuple<Tensor, Tensor, Tensor> plain_backward(const Point& at, const Tensor& dz, OutputMask wanted) {
  wanted[3] = false;
  auto [dx, dweight, dbias, none] = call_backward(at, dz.to(at.like.scalar_type()), wanted);
  return {std::move(dx), std::move(dweight), std::move(dbias)};
}

ActivationDerivatives derivatives_of(const Activation& activation, const Point& at, const Tensor& bias,
                                     const Tensor& residual, const Tensor& mask) {
  return mask.defined() ? mask_derivatives(activation, at, mask)
                        : activation_derivatives(activation, at, bias, residual);
}

}  // namespace bnext::autograd
