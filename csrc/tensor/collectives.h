// What the processes of a group tell each other, by torch's functional collectives: operators like any other, so that
// torch.compile sees them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace bnext {

// A group of processes, as torch.distributed knows it.
struct ProcessGroup {
  std::string name;
  std::int64_t size = 1;
};

// (size, *shape): every process's tensor, which all have the same shape, in the order of their ranks.
at::Tensor all_gather(const at::Tensor& tensor, const ProcessGroup& group);

// The sum of every process's tensor.
at::Tensor all_reduce_sum(const at::Tensor& tensor, const ProcessGroup& group);

}  // namespace bnext
