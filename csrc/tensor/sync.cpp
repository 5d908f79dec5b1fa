#include "sync.h"

#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatcher.h"

namespace bnext {

using at::Tensor;
using std::optional;

SyncForward sync_forward(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                         const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
                         const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
                         const optional<Tensor>& residual, std::string_view act, double slope, bool with_mask,
                         const ProcessGroup& group) {
  TORCH_CHECK_VALUE(group.size > 0, "batch_norm: expected group_size to be positive, but got ", group.size);
  // Before the other processes are told of this local batch. Traced shapes are not checked: they may be symbols.
  if (!input.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    check_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                   parse_activation(act, slope), with_mask);
  }
  const Tensor gathered_stats = all_gather(stats_op().call(input, eps), group);
  auto [output, save_stats, mask] =
      gathered_op().call(input, gathered_stats, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                         eps, residual, act, slope, with_mask);
  return {std::move(output), std::move(save_stats), std::move(mask), gathered_stats.select(1, -1).sum()};
}

Tensor sync_mean_grads(const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& count,
                       const ProcessGroup& group) {
  return all_reduce_sum(at::stack({grad_weight, grad_bias}), group).div(count);
}

namespace {

// The operator where nothing is differentiated.
Tensor batch_norm_sync(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                       const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
                       const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
                       std::int64_t group_size, std::string_view group_name, const optional<Tensor>& residual,
                       std::string_view act, double slope) {
  return sync_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual, act,
                      slope, /*with_mask=*/false, {std::string(group_name), group_size})
      .output;
}

}  // namespace
}  // namespace bnext

TORCH_LIBRARY_IMPL(bnext, CompositeExplicitAutograd, m) { m.impl("batch_norm_sync", &bnext::batch_norm_sync); }
