// What the self-test's cases are made of: small kernels, each correct or with one planted defect.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>
#include <vector>

#include "../emulator.h"

namespace selftest {

struct Case {
  const char* name;
  const char* expected;  // part of a finding; null: none, checked or unchecked
  void (*run)();
};

std::vector<Case> access_cases();
std::vector<Case> block_cases();
std::vector<Case> warp_cases();
std::vector<Case> grid_cases();
std::vector<Case> cluster_cases();
std::vector<Case> copy_cases();
std::vector<Case> host_cases();

// What must hold beside the findings: results, and what the host's API returns.
void require(bool holds, const char* what);
// False in the second run of a case without findings: what only the checker counts is zero.
bool is_checked();

// A buffer of global memory, registered while it lives.
template <typename T>
class Buffer {
 public:
  Buffer(const char* name, std::size_t elements, simt::Access access, T value = {}) : values_(elements, value) {
    simt::register_buffer(values_.data(), elements * sizeof(T), name, access);
  }
  ~Buffer() { simt::unregister_buffer(values_.data()); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return values_.data(); }
  const std::vector<T>& values() const { return values_; }
  const T& operator[](std::size_t i) const { return values_[i]; }

 private:
  std::vector<T> values_;
};

struct Shape {
  dim3 grid = 1;
  dim3 block = 32;
  std::size_t shared = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <typename... Expected, typename... Actual>
cudaError_t launch(const Shape& shape, void (*kernel)(Expected...), Actual&&... actual) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {shape.cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = shape.cooperative;
  const cudaLaunchConfig_t config{shape.grid, shape.block, shape.shared, nullptr, attributes, 2};
  return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(actual)...);
}

// What a kernel writes to its last argument, a buffer "output" of so many elements.
template <typename T, typename... Actual>
std::vector<T> output_of(std::size_t elements, const Shape& shape, auto kernel, Actual&&... actual) {
  Buffer<T> output("output", elements, simt::Access::kUninitialised);
  launch(shape, kernel, std::forward<Actual>(actual)..., output.data());
  return output.values();
}

// Declares, in a kernel, a pointer to its dynamic shared memory.
#define SHARED_VALUES(T, name)  \
  BNEXT_DYNAMIC_SHARED(memory); \
  auto* const name = reinterpret_cast<T*>(memory)

}  // namespace selftest
