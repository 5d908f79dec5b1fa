// The operators as the dispatcher knows them: what is called above the kernels, so that torch sees the calls.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "batch_norm.h"

namespace bnext {

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
inline const auto& moments_op() {
  static const auto op = find_op<decltype(batch_norm_moments)>("bnext::batch_norm_moments");
  return op;
}
inline const auto& merged_op() {
  static const auto op = find_op<decltype(batch_norm_merged)>("bnext::batch_norm_merged");
  return op;
}
inline const auto& backward_op() {
  static const auto op = find_op<decltype(batch_norm_backward)>("bnext::batch_norm_backward");
  return op;
}

}  // namespace bnext
