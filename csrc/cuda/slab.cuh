// Where a thread's vectors come from: its slots in shared memory, filled by asynchronous copies.
//
// A slot belongs to one thread, which fills it and reads it: waiting for its own copies is all the synchronisation
// there is.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "walk.cuh"

namespace bnext::cuda {

// What a call reads and writes, as the kernel's functors want it.
struct Tensors {
  const void* in[2];  // input, grad_output; null if not read
  void* out;          // null: there is nothing to map
};

// Of this thread's groups of copies, all but the last kGroups have landed.
template <int kGroups>
__device__ __forceinline__ void wait_prior() {
  __pipeline_wait_prior(kGroups);
  // No barrier follows, since no other thread looks: the compiler must not read a slot before the wait all the same.
  asm volatile("" ::: "memory");
}

template <typename scalar_t, bool kInput, bool kGrad>
class Slab {
 public:
  static constexpr int kInputs = (kInput ? 1 : 0) + (kGrad ? 1 : 0);

  __device__ __forceinline__ Slab(const Plan& plan, const Tensors& tensors, unsigned char* slots)
      : tensors_(tensors), slots_(slots + threadIdx.x * kVectorBytes), stride_(plan.threads * kVectorBytes) {}

  // Begins to fill slot k; it may be read when the copy has been committed and waited for.
  __device__ __forceinline__ void request(int k, const Segment& segment) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!reads(i)) continue;
      const auto* data = static_cast<const scalar_t*>(tensors_.in[i]);
      if (segment.whole) {
        __pipeline_memcpy_async(slot(k, i), data + segment.offset, kVectorBytes);
      } else {
        *slot(k, i) = as_word(load_lanes(data, segment));
      }
    }
  }

  __device__ __forceinline__ void read(int k, Vec<scalar_t> (&vec)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!reads(i)) continue;
      // Component by component: a whole-struct copy is taken apart into loads of single bytes.
      const uint4* word = slot(k, i);
      vec[i] = as_vec<scalar_t>(make_uint4(word->x, word->y, word->z, word->w));
    }
  }

  // Hands visit(segment, vec) `count` vectors, from where the walk stands, that are not to be kept. They pass through
  // the slots from `first` on, kRingSlots of them at a time.
  template <typename Walk, typename Step, typename Visit>
  __device__ __forceinline__ void stream(Walk& walk, std::int64_t count, int first, Step&& step, Visit&& visit) {
    Walk ahead = walk;
#pragma unroll 1
    for (int r = 0; r < kRingSlots; ++r) {
      if (r < count) {
        request(first + r, ahead.segment());
        step(ahead);
      }
      __pipeline_commit();
    }
    int slot = first;
#pragma unroll 1
    for (std::int64_t k = 0; k < count; ++k) {
      wait_prior<kRingSlots - 1>();
      Vec<scalar_t> vec[2];
      read(slot, vec);
      visit(walk.segment(), vec);
      if (k + kRingSlots < count) {
        request(slot, ahead.segment());
        step(ahead);
      }
      __pipeline_commit();
      step(walk);
      slot = slot + 1 == first + kRingSlots ? first : slot + 1;
    }
  }

 private:
  __device__ __forceinline__ static constexpr bool reads(int i) { return i == 0 ? kInput : kGrad; }

  __device__ __forceinline__ uint4* slot(int k, int input) const {
    const int index = kInputs == 2 ? 2 * k + input : k;
    return reinterpret_cast<uint4*>(slots_ + index * stride_);
  }

  const Tensors& tensors_;
  unsigned char* slots_;
  int stride_;
};

// Waits until what has been read is there, but for the groups of copies committed last, as many as the stages after
// this one.
__device__ __forceinline__ void wait_for_stage(int stage) {
  static_assert(kLoadStages == 4);
  switch (stage) {
    case 0: wait_prior<3>(); return;
    case 1: wait_prior<2>(); return;
    case 2: wait_prior<1>(); return;
    default: wait_prior<0>(); return;
  }
}

}  // namespace bnext::cuda
