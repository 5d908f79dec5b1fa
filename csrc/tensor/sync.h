// Batch norm over a batch that is spread over the processes of a group, composed of operators and one collective.
// Its backward is an operator itself with one collective, batch_norm_sync_backward, declared with the others.
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
  SharedBatch batch;
};

// Each process normalises its local batch by the statistics of all; local batches may differ in size and be empty.
SyncForward sync_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                         double eps, const std::optional<at::Tensor>& residual, std::string_view act, double slope,
                         bool with_mask, const std::optional<at::Tensor>& valid, bool update_in_backward,
                         const ProcessGroup& group);

}  // namespace bnext
