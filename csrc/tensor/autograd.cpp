// The operators' kernels for the Autograd dispatch key, with what torch's own operators have: autograd nodes for
// backward and double backward (nodes.h), tangents for forward mode. So torch.func transforms, torch.compile and
// saved-tensor hooks treat them like native operators; torch.func refuses a torch::autograd::Function, and one in
// Python costs every call some 10 us.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <utility>

#include "checks.h"
#include "derivatives.h"
#include "dispatcher.h"
#include "node.h"
#include "nodes.h"
#include "recomputation.h"
#include "sync.h"

namespace bnext::autograd {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::isFwGradDefined;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;

Tensor or_undefined(const optional<Tensor>& tensor) { return tensor.value_or(Tensor()); }

// The reshape is differentiated, so a parameter of another shape, as (1, C, 1, 1), gets a gradient of that shape.
Tensor as_vector(const optional<Tensor>& tensor) {
  const Tensor given = or_undefined(tensor);
  return given.defined() && given.dim() != 1 ? given.reshape({-1}) : given;
}

Tensor primal_of(const Tensor& tensor) { return tensor.defined() ? tensor._fw_primal(/*level=*/0) : tensor; }
Tensor tangent_of(const Tensor& tensor) { return tensor.defined() ? tensor._fw_grad(/*level=*/0) : tensor; }

void set_tangent(const Tensor& tensor, const Tensor& tangent) {
  if (tangent.defined()) tensor._set_fw_grad(tangent.to(tensor.scalar_type()), /*level=*/0, /*is_inplace_op=*/false);
}

SavedVariable saved(const Tensor& data) { return SavedVariable(data, /*is_output=*/false); }

void save_batch(SavedCall& call, const optional<SharedBatch>& batch) {
  if (!batch) return;
  call.count = saved_vector(batch->count);
  call.group_name = batch->group_name;
}

Tensor copy_of(const Tensor& vector) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return vector.defined() ? vector.clone() : vector;
}

// torch's batch norm saves no bias, so users may change it before backward, by a step of an optimiser that trains
// biases alone: the node saves a copy, whose gradient goes to the bias's edge. A tangent is copied, too.
Tensor copy_of_bias(const Tensor& bias) { return isFwGradDefined(bias) ? bias.clone() : copy_of(bias); }

// What all forward operators do around their kernel. `run` calls the kernel, with a mask or without, and sets the batch
// where several processes share it.
template <typename Run>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const optional<Tensor>& weight,
                                           const optional<Tensor>& bias, bool training, double eps,
                                           const optional<Tensor>& residual, const Activation& activation,
                                           bool with_mask, const optional<Tensor>& valid,
                                           std::int64_t virtual_batch_size, Run run) {
  const Tensor w = as_vector(weight);
  const Tensor b = as_vector(bias);
  const Tensor r = or_undefined(residual);
  const Tensor v = or_undefined(valid);
  // The node is made before the kernel runs: collecting edges can fail, and must then leave running statistics as is.
  decltype(make_node<BatchNormBackward>()) node;
  bool grad_input = false;
  bool keeps_input = false;
  if (compute_requires_grad(input, w, b, r)) {
    node = make_node<BatchNormBackward>();
    node->set_next_edges(collect_next_edges(input, w, b, r));
    grad_input = node->should_compute_output(0);
    // In evaluation with a frozen weight no gradient depends on the input, so the node does not save it.
    keeps_input = node->should_compute_output(1) || (grad_input && training);
    // A rectifier's backward needs to know where it was open. It recomputes that from the input, if the input is saved
    // anyway and there is no residual; else it saves a mask: a bit an element is less than a residual or an input.
    with_mask |= activation.rectifies() && (r.defined() || !keeps_input);
  }
  const bool reads_preactivation = activation.act != Act::kIdentity && !with_mask;
  if (node) {
    // Also before the kernel runs: torch raises when a tensor that was made in inference mode is saved.
    SavedCall& call = node->call;
    if (keeps_input || reads_preactivation) call.input = saved(input);
    if (grad_input || reads_preactivation) call.weight = saved_vector(w);
    if (reads_preactivation) {
      call.bias = saved_vector(copy_of_bias(b));
      call.residual = saved(r);
    }
    call.valid = saved_vector(v);
  }
  optional<SharedBatch> batch;
  auto [output, save_stats, mask] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return run(with_mask, batch);
  }();
  if (node) {
    SavedCall& call = node->call;
    if (with_mask) call.mask = saved_vector(mask);
    call.save_stats = saved_vector(save_stats);
    call.training = training;
    call.eps = eps;
    call.activation = activation;
    call.virtual_batch_size = virtual_batch_size;
    save_batch(call, batch);
    // The output is recomputed only from an input that is saved anyway.
    if (Hooks::of_thread().are_innermost() && (keeps_input || reads_preactivation)) {
      node->output =
          RecomputedOutput::of(output, input, save_stats, copy_of(w), copy_of(b), r, activation, v, virtual_batch_size);
    }
    set_history(output, node);
  }
  if (isFwGradDefined(input) || isFwGradDefined(w) || isFwGradDefined(b) || isFwGradDefined(r)) {
    const Tensor primal = primal_of(input);
    const Point at{primal, primal, primal_of(w), save_stats, training, eps, batch, v, virtual_batch_size};
    const Tensor z =
        plus(output_tangent(at, tangent_of(input), tangent_of(w), tangent_of(b)), at.without_padding(tangent_of(r)));
    set_tangent(output, scaled(z, activation_derivatives(activation, at, primal_of(b), primal_of(r)).first));
  }
  return {std::move(output), std::move(save_stats), std::move(mask)};
}

void check_constant(const char* name, const optional<Tensor>& tensor) {
  TORCH_CHECK(!(tensor.has_value() && tensor->defined() && tensor->requires_grad() && at::GradMode::is_enabled()),
              "batch_norm: expected ", name, " not to require grad, since it has no derivative, but it does");
  TORCH_CHECK(!(tensor.has_value() && isFwGradDefined(*tensor)), "batch_norm: expected ", name,
              " to have no tangent, since it has no derivative, but it has one");
}

// torch's fallback for lazily negated views raises only after the statistics have been written.
void check_written(const char* name, const optional<Tensor>& tensor) {
  check_constant(name, tensor);
  TORCH_CHECK(!(tensor.has_value() && tensor->defined() && tensor->is_neg()), "batch_norm: expected ", name,
              " not to be a lazily negated view, since it is updated in place (see torch.Tensor.resolve_neg)");
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& input, const optional<Tensor>& weight,
                                                    const optional<Tensor>& bias, const optional<Tensor>& running_mean,
                                                    const optional<Tensor>& running_var,
                                                    const optional<Tensor>& num_batches_tracked,
                                                    optional<double> momentum, double eps,
                                                    const optional<Tensor>& residual, std::string_view act,
                                                    double slope, bool with_mask, const optional<Tensor>& valid,
                                                    std::int64_t virtual_batch_size, bool update_in_backward) {
  check_written("running_mean", running_mean);
  check_written("running_var", running_var);
  check_written("num_batches_tracked", num_batches_tracked);
  return forward(input, weight, bias, /*training=*/true, eps, residual, parse_activation(act, slope), with_mask, valid,
                 virtual_batch_size, [&](bool masked, optional<SharedBatch>&) {
                   return train_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                          eps, residual, act, slope, masked, valid, virtual_batch_size,
                                          update_in_backward);
                 });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_eval(const Tensor& input, const optional<Tensor>& weight,
                                                   const optional<Tensor>& bias, const Tensor& running_mean,
                                                   const Tensor& running_var, double eps,
                                                   const optional<Tensor>& residual, std::string_view act, double slope,
                                                   bool with_mask, const optional<Tensor>& valid) {
  check_constant("running_mean", running_mean);
  check_constant("running_var", running_var);
  return forward(input, weight, bias, /*training=*/false, eps, residual, parse_activation(act, slope), with_mask, valid,
                 /*virtual_batch_size=*/0, [&](bool masked, optional<SharedBatch>&) {
                   return eval_op().call(input, weight, bias, running_mean, running_var, eps, residual, act, slope,
                                         masked, valid);
                 });
}

// Nested torch.func transforms call the operators that batch_norm_sync is composed of, one level after another; without
// the check the tangents of the outer levels would be lost silently.
Tensor batch_norm_stats(const Tensor& input, double eps, const optional<Tensor>& valid) {
  TORCH_CHECK(!isFwGradDefined(input),
              "batch_norm: the statistics of one process have no forward mode; over several "
              "processes it does not nest in torch.func, but does in torch.autograd");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return stats_op().call(input, eps, valid);
}

Tensor batch_norm_sync(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                       const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
                       const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
                       std::int64_t group_size, std::string_view group_name, const optional<Tensor>& residual,
                       std::string_view act, double slope, const optional<Tensor>& valid, bool update_in_backward) {
  check_written("running_mean", running_mean);
  check_written("running_var", running_var);
  check_written("num_batches_tracked", num_batches_tracked);
  const ProcessGroup group{std::string(group_name), group_size};
  return std::get<0>(
      forward(input, weight, bias, /*training=*/true, eps, residual, parse_activation(act, slope),
              /*with_mask=*/false, valid, /*virtual_batch_size=*/0, [&](bool masked, optional<SharedBatch>& batch) {
                auto all = sync_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                        eps, residual, act, slope, masked, valid, update_in_backward, group);
                batch = std::move(all.batch);
                return std::tuple{std::move(all.output), std::move(all.save_stats), std::move(all.mask)};
              }));
}

// What both backward operators do around their kernels, which `run` calls.
template <typename Run>
Gradients backward(const Tensor& grad_output, const optional<Tensor>& input, const optional<Tensor>& weight,
                   const Tensor& save_stats, bool training, double eps, OutputMask output_mask,
                   const optional<Tensor>& bias, const optional<Tensor>& residual, const optional<Tensor>& mask,
                   const Activation& activation, const optional<Tensor>& valid, std::int64_t virtual_batch_size,
                   const optional<SharedBatch>& batch, Run run) {
  const Tensor x = or_undefined(input);
  const Tensor w = or_undefined(weight);
  const Tensor b = or_undefined(bias);
  const Tensor r = or_undefined(residual);
  const Tensor m = or_undefined(mask);
  const Tensor v = or_undefined(valid);
  decltype(make_node<BatchNormDoubleBackward>()) node;
  if (compute_requires_grad(grad_output, x, w, b, r)) {
    node = make_node<BatchNormDoubleBackward>();
    node->set_next_edges(collect_next_edges(grad_output, x, w, b, r));
  }
  auto [grad_input, grad_weight, grad_bias, grad_residual] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return run();
  }();
  if (node) {
    node->grad_output = saved(grad_output);
    node->call.input = saved(x);
    node->call.weight = saved_vector(w);
    node->call.bias = saved_vector(b);
    node->call.residual = saved(r);
    node->call.mask = saved_vector(m);
    node->call.save_stats = saved_vector(save_stats);
    node->call.valid = saved_vector(v);
    node->call.training = training;
    node->call.eps = eps;
    node->call.activation = activation;
    node->call.virtual_batch_size = virtual_batch_size;
    save_batch(node->call, batch);
    node->output_mask = output_mask;
    for (const Tensor& each : {grad_input, grad_weight, grad_bias, grad_residual}) set_history(each, node);
  }
  if (isFwGradDefined(grad_output) || isFwGradDefined(x) || isFwGradDefined(w) || isFwGradDefined(b) ||
      isFwGradDefined(r)) {
    const Tensor given_dy = primal_of(grad_output);
    const Point at{given_dy, primal_of(x), primal_of(w), save_stats, training, eps, batch, v, virtual_batch_size};
    const Tensor dy = at.without_padding(given_dy);
    const ActivationDerivatives derivatives = derivatives_of(activation, at, primal_of(b), primal_of(r), m);
    // dz = dy*act'(z) changes with dy and with z. The gradients are linear in dz; their change along input and weight
    // is the symmetric second derivative.
    Tensor dz_tangent = scaled(tangent_of(grad_output), derivatives.first);
    if (derivatives.second.defined()) {
      const Tensor z = plus(output_tangent(at, tangent_of(x), tangent_of(w), tangent_of(b)), tangent_of(r));
      dz_tangent = plus(dz_tangent, scaled(scaled(z, dy), derivatives.second));
    }
    dz_tangent = at.without_padding(dz_tangent);
    SecondOrder second;
    if (output_mask[0] || output_mask[1] || batch) {
      second = second_order(at, scaled(dy, derivatives.first), tangent_of(x), tangent_of(w));
    }
    std::tuple<Tensor, Tensor, Tensor> linear;
    if (batch && !dz_tangent.defined()) dz_tangent = at::zeros_like(dy);
    if (dz_tangent.defined()) linear = plain_backward(at, dz_tangent, output_mask);
    if (output_mask[0]) set_tangent(grad_input, plus(std::get<0>(linear), second.input));
    if (output_mask[1]) set_tangent(grad_weight, plus(std::get<1>(linear), second.weight));
    if (output_mask[2]) set_tangent(grad_bias, std::get<2>(linear));
    if (output_mask[3]) set_tangent(grad_residual, dz_tangent);
  }
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias), std::move(grad_residual)};
}

Gradients batch_norm_backward(const Tensor& grad_output, const optional<Tensor>& input, const optional<Tensor>& weight,
                              const Tensor& save_stats, bool training, double eps, OutputMask output_mask,
                              const optional<Tensor>& bias, const optional<Tensor>& residual,
                              const optional<Tensor>& mask, std::string_view act, double slope,
                              const optional<Tensor>& mean_grads, const optional<Tensor>& valid,
                              std::int64_t virtual_batch_size) {
  TORCH_CHECK(!is_given(mean_grads) || !compute_requires_grad(grad_output, input, weight, bias, residual),
              "batch_norm: expected nothing to require grad with mean_grads");
  return backward(grad_output, input, weight, save_stats, training, eps, output_mask, bias, residual, mask,
                  parse_activation(act, slope), valid, virtual_batch_size, /*batch=*/{}, [&] {
                    return backward_op().call(grad_output, input, weight, save_stats, training, eps, output_mask, bias,
                                              residual, mask, act, slope, mean_grads, valid, virtual_batch_size);
                  });
}

Gradients batch_norm_sync_backward(const Tensor& grad_output, const optional<Tensor>& input,
                                   const optional<Tensor>& weight, const Tensor& save_stats, const Tensor& count,
                                   double eps, OutputMask output_mask, std::string_view group_name,
                                   const optional<Tensor>& bias, const optional<Tensor>& residual,
                                   const optional<Tensor>& mask, std::string_view act, double slope,
                                   const optional<Tensor>& valid) {
  return backward(
      grad_output, input, weight, save_stats, /*training=*/true, eps, output_mask, bias, residual, mask,
      parse_activation(act, slope), valid, /*virtual_batch_size=*/0, SharedBatch{std::string(group_name), count}, [&] {
        return bnext::batch_norm_sync_backward(grad_output, input, weight, save_stats, count, eps, output_mask,
                                               group_name, bias, residual, mask, act, slope, valid);
      });
}

}  // namespace
}  // namespace bnext::autograd

TORCH_LIBRARY_IMPL(bnext, Autograd, m) {
  m.impl("batch_norm_train", &bnext::autograd::batch_norm_train);
  m.impl("batch_norm_eval", &bnext::autograd::batch_norm_eval);
  m.impl("batch_norm_backward", &bnext::autograd::batch_norm_backward);
  m.impl("batch_norm_stats", &bnext::autograd::batch_norm_stats);
  m.impl("batch_norm_sync", &bnext::autograd::batch_norm_sync);
  m.impl("batch_norm_sync_backward", &bnext::autograd::batch_norm_sync_backward);
}
