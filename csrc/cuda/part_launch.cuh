// From a plan to the launches of the kernels for parts: sums, finish, totals, map.
#pragma once

#include "../common/dispatch.h"
#include "batch_norm.h"
#include "part_map.cuh"

namespace bnext::cuda {

// Launches one kernel after another on a stream, until there is an error.
class PartLaunches {
 public:
  PartLaunches(const PartArgs& args, cudaStream_t stream) : args_(args), stream_(stream) {}

  template <typename Reduce, typename Op>
  void sums(const Op& op) {
    splits_ = args_.plan.splits;
    dispatch(op.dtype, [&](auto tag) {
      launch(&part_sums_kernel<typename decltype(tag)::Type, Reduce, Op>, args_.plan.blocks(), args_.plan.threads(),
             shared_bytes(args_.plan.threads()), args_, op);
    });
  }

  template <typename Op>
  void finish(const Op& op) {
    launch(&part_finish_kernel<Op>, args_.plan.finish_blocks(), kPartThreads, shared_bytes(kPartThreads), args_, op,
           splits_);
  }

  template <typename Op>
  void totals(const Op& op) {
    launch(&part_totals_kernel<Op>, (args_.plan.C + kPartThreads - 1) / kPartThreads, kPartThreads, 0, op);
  }

  template <typename Map>
  void map(DType dtype) {
    dispatch(dtype, [&](auto tag) {
      launch(&part_map_kernel<typename decltype(tag)::Type, Map>, args_.plan.blocks(), args_.plan.threads(), 0, args_);
    });
  }

  cudaError_t error() const { return error_; }

 private:
  static std::size_t shared_bytes(int threads) { return threads * kPartialDoubles * sizeof(double); }

  template <typename... Expected, typename... Actual>
  void launch(void (*kernel)(Expected...), std::int64_t blocks, int threads, std::size_t shared,
              const Actual&... actual) {
    if (error_ != cudaSuccess) return;
    // Only a tensor of some GB in parts of a few values needs more blocks than a grid can have.
    if (blocks > std::int64_t{0x7fffffff}) {
      error_ = cudaErrorInvalidConfiguration;
      return;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, actual...);
    if (error_ == cudaSuccess) error_ = cudaGetLastError();
  }

  const PartArgs args_;
  const cudaStream_t stream_;
  std::int64_t splits_ = 0;  // partial sums of each part and channel; 0: nothing is reduced
  cudaError_t error_ = cudaSuccess;
};

}  // namespace bnext::cuda
