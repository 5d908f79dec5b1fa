// The staging buffer: a thread's slots in shared memory, filled by asynchronous copies.
//
// A slot belongs to one thread, which fills it and reads it: waiting for its own copies is all the synchronisation
// there is.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "tile_iterator.cuh"

namespace bnext::cuda {

// What a call reads and writes, as the kernel's functors want it.
struct Tensors {
  const void* in[kMaxInputs];  // input, grad_output, residual; null if not read
  const unsigned char* mask;   // to be read; null: none, and likewise
  void* out[2];                // output or grad_input, grad_residual
  unsigned char* new_mask;     // to be written

  __device__ __forceinline__ bool maps() const { return out[0] != nullptr || out[1] != nullptr; }
};

// Of this thread's groups of copies, all but the last kGroups have landed.
template <int kGroups>
__device__ __forceinline__ void wait_prior() {
  __pipeline_wait_prior(kGroups);
  // No barrier follows, since no other thread looks: the compiler must not read a slot before the wait all the same.
  asm volatile("" ::: "memory");
}

// Reduce and Map: the functors that want the vectors. A plain one reads what it says; an activated one what there is.
template <typename scalar_t, typename Reduce, typename Map>
class StagingBuffer {
  // Both of them at once, for what is kept.
  struct Either {
    static constexpr bool kReadsInput = Reduce::kReadsInput || Map::kReadsInput;
    static constexpr bool kReadsGrad = Reduce::kReadsGrad || Map::kReadsGrad;
    static constexpr bool kActivated = Map::kActivated;
  };

 public:
  __device__ __forceinline__ StagingBuffer(const LaunchPlan& plan, const Tensors& tensors, unsigned char* slots,
                                           unsigned char* mask_slots)
      : tensors_(tensors),
        slots_(slots + threadIdx.x * kVectorBytes),
        mask_slots_(reinterpret_cast<unsigned*>(mask_slots) + threadIdx.x),
        workers_(plan.workers),
        inputs_(plan.inputs) {}

  // Begins to fill slot k; it may be read when the copy has been committed and waited for.
  template <typename Functor = Either>
  __device__ __forceinline__ void request(int k, const Segment& segment) {
    if (reads_mask<Functor>() && segment.low < segment.high) {
      // The word that the byte lies in, as less cannot be copied. A row of a mask is a whole number of words.
      __pipeline_memcpy_async(mask_slots_ + k * workers_, tensors_.mask + (segment.mask & ~std::int64_t{3}),
                              sizeof(unsigned));
    }
#pragma unroll
    for (int i = 0; i < kMaxInputs; ++i) {
      if (!reads<Functor>(i)) continue;
      const auto* data = static_cast<const scalar_t*>(tensors_.in[i]);
      if (segment.whole) {
        __pipeline_memcpy_async(slot(k, i), data + segment.offset, kVectorBytes);
      } else {
        *slot(k, i) = as_word(load_lanes(data, segment));
      }
    }
  }

  template <typename Functor>
  __device__ __forceinline__ Item<scalar_t> read(int k, const Segment& segment) const {
    Item<scalar_t> item;
    item.bits = 0;
    if (reads_mask<Functor>() && segment.low < segment.high) {
      item.bits = mask_slots_[k * workers_] >> (8 * static_cast<int>(segment.mask & 3));
    }
#pragma unroll
    for (int i = 0; i < kMaxInputs; ++i) {
      if (!reads<Functor>(i)) {
        item.vec[i] = as_vec<scalar_t>(uint4{0, 0, 0, 0});
        continue;
      }
      // Component by component: a whole-struct copy is taken apart into loads of single bytes.
      const uint4* word = slot(k, i);
      item.vec[i] = as_vec<scalar_t>(make_uint4(word->x, word->y, word->z, word->w));
    }
    return item;
  }

  // Hands visit(segment, item) `count` items, from where the iterator stands, that are not to be kept. They pass
  // through the slots from `first` on, kRingSlots of them at a time.
  template <typename Functor, typename Iterator, typename Step, typename Visit>
  __device__ __forceinline__ void stream(Iterator& iterator, std::int64_t count, int first, Step&& step,
                                         Visit&& visit) {
    Iterator ahead = iterator;
#pragma unroll 1
    for (int r = 0; r < kRingSlots; ++r) {
      if (r < count) {
        request<Functor>(first + r, ahead.segment());
        step(ahead);
      }
      __pipeline_commit();
    }
    int slot = first;
#pragma unroll 1
    for (std::int64_t k = 0; k < count; ++k) {
      wait_prior<kRingSlots - 1>();
      const Segment segment = iterator.segment();
      visit(segment, read<Functor>(slot, segment));
      if (k + kRingSlots < count) {
        request<Functor>(slot, ahead.segment());
        step(ahead);
      }
      __pipeline_commit();
      step(iterator);
      slot = slot + 1 == first + kRingSlots ? first : slot + 1;
    }
  }

 private:
  template <typename Functor>
  __device__ __forceinline__ bool reads(int i) const {
    if (i == 0) return Functor::kReadsInput && (!Functor::kActivated || tensors_.in[0] != nullptr);
    if (i == 1) return Functor::kReadsGrad;
    return Functor::kActivated && tensors_.in[2] != nullptr;
  }

  template <typename Functor>
  __device__ __forceinline__ bool reads_mask() const {
    return Functor::kActivated && tensors_.mask != nullptr;
  }

  // The slots of a step lie one after another: the input's, grad_output's, the residual's, as far as the call has them.
  __device__ __forceinline__ uint4* slot(int k, int input) const {
    int index = 0;
    if constexpr (Either::kActivated) {
      index = input == 0 ? 0 : input == 2 ? inputs_ - 1 : (tensors_.in[0] != nullptr ? 1 : 0);
      index += k * inputs_;
    } else {
      constexpr int kInputs = (Either::kReadsInput ? 1 : 0) + (Either::kReadsGrad ? 1 : 0);
      index = kInputs == 2 ? 2 * k + input : k;
    }
    return reinterpret_cast<uint4*>(slots_ + index * workers_ * kVectorBytes);
  }

  const Tensors& tensors_;
  unsigned char* slots_;
  unsigned* mask_slots_;
  int workers_;
  int inputs_;
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
