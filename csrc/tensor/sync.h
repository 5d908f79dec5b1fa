// Batch norm over a batch that lies on the processes of a group, composed of operators and one collective a direction.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "collectives.h"

namespace bnext {

struct SyncForward {
  at::Tensor output;
  at::Tensor save_stats;
  at::Tensor mask;
  at::Tensor count;  // of a channel's values on all processes; float64, rank 0
};

// Each process normalises its local batch by the statistics of all; local batches may differ in size and be empty.
SyncForward sync_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                         double eps, const std::optional<at::Tensor>& residual, std::string_view act, double slope,
                         bool with_mask, const ProcessGroup& group);

// mean_grads, for batch_norm_backward, from this process's grad_weight and grad_bias.
at::Tensor sync_mean_grads(const at::Tensor& grad_weight, const at::Tensor& grad_bias, const at::Tensor& count,
                           const ProcessGroup& group);

}  // namespace bnext
