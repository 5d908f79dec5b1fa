// Collectives over a group of processes: torch's functional ones, which are operators like any other, so that
// torch.compile traces them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace bnext {

// A group of processes, as torch.distributed knows it.
struct ProcessGroup {
  std::string name;
  std::int64_t size = 1;
};

// A batch that is spread over the processes of a group.
struct SharedBatch {
  std::string group_name;
  at::Tensor count;  // of a channel's values on all processes; float64, rank 0
};

// (size, *shape): every process's tensor, which all have the same shape, in the order of their ranks.
at::Tensor all_gather(const at::Tensor& tensor, const ProcessGroup& group);

// The sum of every process's tensor: an operator, whose derivatives are in all_reduce.cpp.
at::Tensor all_reduce_sum(const at::Tensor& tensor, std::string_view group_name);

}  // namespace bnext
