#include "sync.h"

#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatcher.h"
#include "tensors.h"

namespace bnext {

using at::Tensor;
using std::optional;

namespace {

void check_count(const Tensor& count, const Tensor& grad_output) {
  check_given("grad_output", grad_output);
  check_given("count", count);
  TORCH_CHECK(count.device() == grad_output.device(), "batch_norm: expected count on the device of grad_output, ",
              grad_output.device(), ", but got ", count.device());
  TORCH_CHECK(count.layout() == at::kStrided, "batch_norm: expected count to be strided, but got ", count.layout());
  TORCH_CHECK_TYPE(count.scalar_type() == at::kDouble, "batch_norm: expected count to be float64, but got ",
                   count.scalar_type());
  TORCH_CHECK_VALUE(count.dim() == 0, "batch_norm: expected count to have shape torch.Size([]), but got ",
                    size_of(count));
}

}  // namespace

SyncForward sync_forward(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                         const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
                         const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
                         const optional<Tensor>& residual, std::string_view act, double slope, bool with_mask,
                         const optional<Tensor>& valid, bool update_in_backward, const ProcessGroup& group) {
  TORCH_CHECK_VALUE(group.size > 0, "batch_norm: expected group_size to be positive, but got ", group.size);
  // Checked before the collective makes other processes depend on this one. Traced shapes may be symbolic: no checks.
  if (!input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    check_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                   parse_activation(act, slope), with_mask, valid);
  }
  const Tensor gathered_stats = all_gather(stats_op().call(input, eps, valid), group);
  const bool updates = update_in_backward || !runs_in_backward();
  const auto updated = [&](const optional<Tensor>& tensor) { return updates ? tensor : std::nullopt; };
  auto [output, save_stats, mask] =
      gathered_op().call(input, gathered_stats, weight, bias, updated(running_mean), updated(running_var),
                         updated(num_batches_tracked), momentum, eps, residual, act, slope, with_mask, valid);
  return {std::move(output), std::move(save_stats), std::move(mask), {group.name, gathered_stats.select(1, -1).sum()}};
}

// grad_input is computed from the means over all processes; the parameters' gradients are this process's, which
// DistributedDataParallel averages.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_sync_backward(
    const Tensor& grad_output, const optional<Tensor>& input, const optional<Tensor>& weight, const Tensor& save_stats,
    const Tensor& count, double eps, std::array<bool, 4> output_mask, std::string_view group_name,
    const optional<Tensor>& bias, const optional<Tensor>& residual, const optional<Tensor>& mask, std::string_view act,
    double slope, const optional<Tensor>& valid) {
  // Checked before the collective, as are all other arguments, by the first call below.
  check_count(count, grad_output);
  const auto backward = [&](std::array<bool, 4> outputs, const optional<Tensor>& mean_grads) {
    return backward_op().call(grad_output, input, weight, save_stats, /*training=*/true, eps, outputs, bias, residual,
                              mask, act, slope, mean_grads, valid, /*virtual_batch_size=*/0);
  };
  const auto [wants_input, wants_weight, wants_bias, wants_residual] = output_mask;
  if (!wants_input) return backward(output_mask, {});
  auto [none, grad_weight, grad_bias, nothing] = backward({false, true, true, false}, {});
  const Tensor mean_grads = all_reduce_sum(at::stack({grad_weight, grad_bias}), group_name).div(count);
  auto [grad_input, no_weight, no_bias, grad_residual] = backward({true, false, false, wants_residual}, mean_grads);
  return {std::move(grad_input), wants_weight ? std::move(grad_weight) : std::move(no_weight),
          wants_bias ? std::move(grad_bias) : std::move(no_bias), std::move(grad_residual)};
}

namespace {

// The operator below autograd.
Tensor batch_norm_sync(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                       const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
                       const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
                       std::int64_t group_size, std::string_view group_name, const optional<Tensor>& residual,
                       std::string_view act, double slope, const optional<Tensor>& valid, bool update_in_backward) {
  return sync_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual, act,
                      slope, /*with_mask=*/false, valid, update_in_backward, {std::string(group_name), group_size})
      .output;
}

}  // namespace
}  // namespace bnext

TORCH_LIBRARY_IMPL(bnext, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_sync", &bnext::batch_norm_sync);
  m.impl("batch_norm_sync_backward", &bnext::batch_norm_sync_backward);
}
