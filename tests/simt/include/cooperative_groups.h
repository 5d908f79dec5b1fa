// Stands in for the toolkit's header of this name: blocks, clusters and grids as far as the kernels use them.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  SIMT_DEVICE void sync() const { __syncthreads(); }
  SIMT_DEVICE unsigned thread_rank() const {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  }
  SIMT_DEVICE unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
};

class cluster_group {
 public:
  SIMT_DEVICE void sync() const { simt::cluster_sync(); }
  SIMT_DEVICE void barrier_arrive() const { simt::cluster_arrive(); }
  SIMT_DEVICE void barrier_wait() const { simt::cluster_wait(); }
  SIMT_DEVICE unsigned block_rank() const { return simt::cluster_rank(); }
  SIMT_DEVICE unsigned num_blocks() const { return simt::cluster_blocks(); }
  SIMT_DEVICE unsigned thread_rank() const {
    return block_rank() * thread_block().num_threads() + thread_block().thread_rank();
  }
  SIMT_DEVICE unsigned num_threads() const { return num_blocks() * thread_block().num_threads(); }
  template <typename T>
  SIMT_DEVICE T* map_shared_rank(T* own, int rank) const {
    return static_cast<T*>(simt::cluster_map(own, static_cast<unsigned>(rank)));
  }
};

class grid_group {
 public:
  SIMT_DEVICE void sync() const { simt::grid_sync(); }
  SIMT_DEVICE unsigned long long block_rank() const {
    return blockIdx.x + static_cast<unsigned long long>(gridDim.x) * (blockIdx.y + gridDim.y * blockIdx.z);
  }
  SIMT_DEVICE unsigned long long num_blocks() const {
    return static_cast<unsigned long long>(gridDim.x) * gridDim.y * gridDim.z;
  }
  SIMT_DEVICE unsigned long long thread_rank() const {
    return block_rank() * thread_block().num_threads() + thread_block().thread_rank();
  }
};

SIMT_DEVICE thread_block this_thread_block() { return {}; }
SIMT_DEVICE cluster_group this_cluster() { return {}; }
SIMT_DEVICE grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
