// Typed handles of the operators in torch's dispatcher: autograd and sync call the kernels through it, so that torch's
// modes and transforms see the calls.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

#include "collectives.h"
#include "operators.h"

namespace bnext {

// The operators' optional arguments are nullopt where a tensor is undefined.
inline std::optional<at::Tensor> or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline const auto& train_op() {
  static const auto op = find_op<decltype(batch_norm_train)>("bnext::batch_norm_train");
  return op;
}
inline const auto& eval_op() {
  static const auto op = find_op<decltype(batch_norm_eval)>("bnext::batch_norm_eval");
  return op;
}
inline const auto& recompute_op() {
  static const auto op = find_op<decltype(batch_norm_recompute)>("bnext::batch_norm_recompute");
  return op;
}
inline const auto& stats_op() {
  static const auto op = find_op<decltype(batch_norm_stats)>("bnext::batch_norm_stats");
  return op;
}
inline const auto& gathered_op() {
  static const auto op = find_op<decltype(batch_norm_gathered)>("bnext::batch_norm_gathered");
  return op;
}
inline const auto& backward_op() {
  static const auto op = find_op<decltype(batch_norm_backward)>("bnext::batch_norm_backward");
  return op;
}
inline const auto& sync_backward_op() {
  static const auto op = find_op<decltype(batch_norm_sync_backward)>("bnext::batch_norm_sync_backward");
  return op;
}
inline const auto& all_reduce_sum_op() {
  static const auto op = find_op<decltype(all_reduce_sum)>("bnext::all_reduce_sum");
  return op;
}

}  // namespace bnext
