// The autograd side of the operators, on the terms that torch's own operators have: graph nodes for backward and
// double backward, tangents for forward mode. Because these are plain kernels for the Autograd dispatch key,
// torch.func transforms, torch.compile and saved-tensor hooks treat them like native ones; a
// torch::autograd::Function is refused inside torch.func, and one in Python costs every call some 10 us.

#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "derivatives.h"

namespace bnext::autograd {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::isFwGradDefined;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Between torch 2.11 and 2.13 nodes went from shared_ptr to intrusive_ptr.
using NodePtr = decltype(torch::autograd::Edge::function);
constexpr bool kSharedNodes = std::is_same_v<NodePtr, std::shared_ptr<Node>>;

template <typename T>
auto make_node() {
  if constexpr (kSharedNodes) {
    // Found by its argument, for torch no longer declares it where it is not needed.
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

Tensor or_undefined(const optional<Tensor>& tensor) { return tensor.value_or(Tensor()); }

optional<Tensor> or_none(const Tensor& tensor) { return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt; }

Tensor primal_of(const Tensor& tensor) { return tensor.defined() ? tensor._fw_primal(/*level=*/0) : tensor; }
Tensor tangent_of(const Tensor& tensor) { return tensor.defined() ? tensor._fw_grad(/*level=*/0) : tensor; }

void set_tangent(const Tensor& tensor, const Tensor& tangent) {
  if (tangent.defined()) tensor._set_fw_grad(tangent.to(tensor.scalar_type()), /*level=*/0, /*is_inplace_op=*/false);
}

// The operators as the dispatcher knows them.

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& train_op() {
  static const auto op = find_op<decltype(bnext::batch_norm_train)>("bnext::batch_norm_train");
  return op;
}
const auto& eval_op() {
  static const auto op = find_op<decltype(bnext::batch_norm_eval)>("bnext::batch_norm_eval");
  return op;
}
const auto& backward_op() {
  static const auto op = find_op<decltype(bnext::batch_norm_backward)>("bnext::batch_norm_backward");
  return op;
}

// The gradient of batch_norm_backward: (grad_output, input, weight) from cotangents of its three outputs.
class BatchNormDoubleBackward : public Node {
 public:
  SavedVariable grad_output;
  SavedVariable input;
  SavedVariable weight;
  SavedVariable save_stats;
  bool training = true;
  double eps = 0.0;
  std::array<bool, 3> output_mask{};

  std::string name() const override { return "BNextBatchNormDoubleBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    grad_output.reset_data();
    input.reset_data();
    weight.reset_data();
    save_stats.reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor dy = grad_output.unpack();
    const Point at{dy, input.unpack(), weight.unpack(), save_stats.unpack(), training, eps};
    // An output that was not asked for is a placeholder, whose cotangent means nothing.
    const auto cotangent = [&](std::size_t i) { return output_mask[i] ? cotangents[i] : Tensor(); };
    const Tensor u = cotangent(0);
    const Tensor v = cotangent(1);
    const Tensor z = cotangent(2);
    variable_list result(3);
    if (task_should_compute_output(0)) result[0] = output_tangent(at, u, v, z);
    if (task_should_compute_output(1) || task_should_compute_output(2)) {
      const SecondOrder second = second_order(at, dy, u, v);
      if (task_should_compute_output(1)) result[1] = second.input;
      if (task_should_compute_output(2)) result[2] = second.weight;
    }
    return result;
  }
};

// The gradient of both forward operators.
class BatchNormBackward : public Node {
 public:
  SavedVariable input;
  SavedVariable weight;
  SavedVariable save_stats;
  bool training = true;
  double eps = 0.0;

  std::string name() const override { return "BNextBatchNormBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    input.reset_data();
    weight.reset_data();
    save_stats.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const std::array<bool, 3> mask{task_should_compute_output(0), task_should_compute_output(1),
                                   task_should_compute_output(2)};
    auto [grad_input, grad_weight, grad_bias] = backward_op().call(
        grads[0], or_none(input.unpack()), or_none(weight.unpack()), save_stats.unpack(), training, eps, mask);
    if (mask[0]) result[0] = std::move(grad_input);
    if (mask[1]) result[1] = std::move(grad_weight);
    if (mask[2]) result[2] = std::move(grad_bias);
    return result;
  }
};

// What both forward operators do around their kernel, `run`.
template <typename Run>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                                   bool training, double eps, Run run) {
  const Tensor w = or_undefined(weight);
  const Tensor b = or_undefined(bias);
  // Before the kernel runs, as collecting edges can fail and the running statistics must then be untouched.
  decltype(make_node<BatchNormBackward>()) node;
  if (compute_requires_grad(input, w, b)) {
    node = make_node<BatchNormBackward>();
    node->set_next_edges(collect_next_edges(input, w, b));
  }
  auto [output, save_stats] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return run();
  }();
  if (node) {
    // Evaluation with frozen parameters needs no activation for its gradient, and keeps none.
    const bool grad_input = node->should_compute_output(0);
    const bool grad_weight = node->should_compute_output(1);
    if (grad_weight || (grad_input && training)) node->input = SavedVariable(input, /*is_output=*/false);
    if (grad_input) node->weight = SavedVariable(w, /*is_output=*/false);
    node->save_stats = SavedVariable(save_stats, /*is_output=*/false);
    node->training = training;
    node->eps = eps;
    set_history(output, node);
  }
  if (isFwGradDefined(input) || isFwGradDefined(w) || isFwGradDefined(b)) {
    const Tensor primal = primal_of(input);
    const Point at{primal, primal, primal_of(w), save_stats, training, eps};
    set_tangent(output, output_tangent(at, tangent_of(input), tangent_of(w), tangent_of(b)));
  }
  return {std::move(output), std::move(save_stats)};
}

void check_constant(const char* name, const optional<Tensor>& tensor) {
  TORCH_CHECK(!(tensor.has_value() && tensor->defined() && tensor->requires_grad() && at::GradMode::is_enabled()),
              "batch_norm: expected ", name, " not to require grad, since it has no derivative, but it does");
}

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_train(const Tensor& input, const optional<Tensor>& weight,
                                            const optional<Tensor>& bias, const optional<Tensor>& running_mean,
                                            const optional<Tensor>& running_var,
                                            const optional<Tensor>& num_batches_tracked, optional<double> momentum,
                                            double eps) {
  check_constant("running_mean", running_mean);
  check_constant("running_var", running_var);
  return forward(input, weight, bias, /*training=*/true, eps, [&] {
    return train_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
  });
}

std::tuple<Tensor, Tensor> batch_norm_eval(const Tensor& input, const optional<Tensor>& weight,
                                           const optional<Tensor>& bias, const Tensor& running_mean,
                                           const Tensor& running_var, double eps) {
  check_constant("running_mean", running_mean);
  check_constant("running_var", running_var);
  return forward(input, weight, bias, /*training=*/false, eps,
                 [&] { return eval_op().call(input, weight, bias, running_mean, running_var, eps); });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_output, const optional<Tensor>& input,
                                                       const optional<Tensor>& weight, const Tensor& save_stats,
                                                       bool training, double eps, std::array<bool, 3> output_mask) {
  const Tensor x = or_undefined(input);
  const Tensor w = or_undefined(weight);
  decltype(make_node<BatchNormDoubleBackward>()) node;
  if (compute_requires_grad(grad_output, x, w)) {
    node = make_node<BatchNormDoubleBackward>();
    node->set_next_edges(collect_next_edges(grad_output, x, w));
  }
  auto [grad_input, grad_weight, grad_bias] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return backward_op().call(grad_output, input, weight, save_stats, training, eps, output_mask);
  }();
  if (node) {
    node->grad_output = SavedVariable(grad_output, /*is_output=*/false);
    node->input = SavedVariable(x, /*is_output=*/false);
    node->weight = SavedVariable(w, /*is_output=*/false);
    node->save_stats = SavedVariable(save_stats, /*is_output=*/false);
    node->training = training;
    node->eps = eps;
    node->output_mask = output_mask;
    set_history(grad_input, node);
    set_history(grad_weight, node);
    set_history(grad_bias, node);
  }
  if (isFwGradDefined(grad_output) || isFwGradDefined(x) || isFwGradDefined(w)) {
    const Tensor dy = primal_of(grad_output);
    const Point at{dy, primal_of(x), primal_of(w), save_stats, training, eps};
    // Linear in grad_output; along input and weight, the symmetric second derivative.
    SecondOrder second;
    if (output_mask[0] || output_mask[1]) second = second_order(at, dy, tangent_of(x), tangent_of(w));
    const Tensor dy_tangent = tangent_of(grad_output);
    std::tuple<Tensor, Tensor, Tensor> linear;
    if (dy_tangent.defined()) {
      linear =
          backward_op().call(dy_tangent, or_none(at.input), or_none(at.weight), save_stats, training, eps, output_mask);
    }
    if (output_mask[0]) set_tangent(grad_input, plus(std::get<0>(linear), second.input));
    if (output_mask[1]) set_tangent(grad_weight, plus(std::get<1>(linear), second.weight));
    if (output_mask[2]) set_tangent(grad_bias, std::get<2>(linear));
  }
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace bnext::autograd
