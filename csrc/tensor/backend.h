// What the tensor level asks of the device that a call's tensors lie on.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <string>

#include "../common/arguments.h"
#include "../common/problem.h"

namespace bnext {

class Backend {
 public:
  virtual ~Backend() = default;

  // Data pointers that the kernels get are multiples of this many bytes.
  virtual std::uintptr_t alignment() const = 0;

  // Elements that share a byte of a rectifier's mask (common/mask.h).
  virtual std::int64_t mask_lanes(DType dtype) const = 0;

  // An empty output with the shape and dtype of `like`; `reduces`: the map that writes it follows a reduction.
  virtual at::Tensor allocate_output(const at::Tensor& like, at::MemoryFormat format, const Problem& problem,
                                     bool reduces) const = 0;

  // Each counts, merges, normalises or differentiates on the device `where`; on CUDA on its current stream.
  virtual void count_batch(std::int64_t* num_batches_tracked, at::Device where) const = 0;
  virtual void run(const GatherStats& args, at::Device where) const = 0;
  virtual void run(const Problem& problem, const TrainingForward& args, at::Device where) const = 0;
  virtual void run(const Problem& problem, const EvalForward& args, at::Device where) const = 0;
  virtual void run(const Problem& problem, const Backward& args, at::Device where) const = 0;
};

const Backend& backend_of(const at::Tensor& tensor);

const Backend& cpu_backend();
#if defined(BNEXT_CUDA)
const Backend& cuda_backend();

// Plan as if the device had no more than this, so that small tensors take the paths of large ones. For tests.
struct CudaCap {
  int sms = std::numeric_limits<int>::max();
  int shared_per_block = std::numeric_limits<int>::max();
  int max_cluster = std::numeric_limits<int>::max();
  int max_row_bytes = std::numeric_limits<int>::max();
};
void cap_cuda_device(const CudaCap& cap);

// How the last launch of any thread was planned; empty before the first. For benchmarks.
std::string last_cuda_plan();
#endif

}  // namespace bnext
