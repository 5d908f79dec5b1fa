#include "collectives.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace bnext {
namespace {

using at::Tensor;

// Operators are looked up when needed, because a torch without torch.distributed lacks them, and called boxed, because
// the C++ types of their string arguments are internal to torch.
template <typename... Arguments>
Tensor call(const char* name, const Arguments&... arguments) {
  torch::jit::Stack stack;
  torch::jit::push(stack, arguments...);
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return torch::jit::pop(stack).toTensor();
}

Tensor finished(const Tensor& pending) { return call("_c10d_functional::wait_tensor", pending); }

}  // namespace

Tensor all_gather(const Tensor& tensor, const ProcessGroup& group) {
  // Gathered along the first dimension.
  return finished(call("_c10d_functional::all_gather_into_tensor", tensor.unsqueeze(0), group.size, group.name));
}

Tensor all_reduce_sum(const Tensor& tensor, std::string_view group_name) {
  return finished(call("_c10d_functional::all_reduce", tensor, std::string("sum"), std::string(group_name)));
}

}  // namespace bnext

TORCH_LIBRARY_IMPL(bnext, CompositeExplicitAutograd, m) { m.impl("all_reduce_sum", &bnext::all_reduce_sum); }
