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

// Registered while it lives.
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
  T& operator[](std::size_t i) { return values_[i]; }
  std::size_t size() const { return values_.size(); }

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

}  // namespace selftest
