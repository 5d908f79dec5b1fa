// The global memory of a launch, beside its tensors.
#pragma once

#include <cstdint>

namespace bnext::cuda {

struct WorkspaceSize {
  std::int64_t doubles;
  int counters;
};

// Nothing else may use it until the launch has ended.
struct Workspace {
  double* doubles = nullptr;  // uninitialised
  // To be waited at by blocks of the grid (counters.h). All bits but the uppermost are zero, before the launch and
  // after it.
  unsigned* counters = nullptr;
};

}  // namespace bnext::cuda
