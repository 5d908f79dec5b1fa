// The staging buffer: a thread's slots in shared memory, filled by asynchronous copies.
//
// A slot belongs to one thread, which fills it and reads it. So a thread synchronises with nothing but its own copies.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "activation_lanes.cuh"
#include "tile_iterator.cuh"

// The dynamic shared memory of a launch. The emulation defines a macro of its own.
#if defined(__CUDACC__)
#define BNEXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace bnext::cuda {

// What a call reads and writes, in the order of the functors' inputs and results.
struct Tensors {
  const void* in[kMaxInputs];  // input, grad_output, residual; null if not read
  const unsigned char* mask;   // to be read; null if there is none
  void* out[2];                // output or grad_input, grad_residual; null if not wanted
  unsigned char* new_mask;     // to be written; null if not wanted

  __device__ __forceinline__ bool maps() const { return out[0] != nullptr || out[1] != nullptr; }
};

struct KernelArgs {
  LaunchPlan plan;
  Tensors tensors;
  Epilogue epilogue;  // has_residual and has_mask agree with the tensors
  Workspace workspace;
  std::int64_t* count_batch;  // incremented by one thread; null: not counted
};

// Waits until all but the last kGroups of this thread's groups of copies have landed.
template <int kGroups>
__device__ __forceinline__ void wait_prior() {
  __pipeline_wait_prior(kGroups);
  // No barrier follows, since no other thread reads the slots; but the compiler must not move reads before the wait.
  asm volatile("" ::: "memory");
}

// An activated functor of backward, in a call that is known to read its input and a mask, hence no residual.
template <typename Functor>
struct Masked : Functor {};
template <typename Functor>
constexpr bool kIsMasked = false;
template <typename Functor>
constexpr bool kIsMasked<Masked<Functor>> = true;

// Reduce and Map read the vectors. A plain functor reads what it declares; an activated one, what of it the call has.
template <typename scalar_t, typename Reduce, typename Map>
class StagingBuffer {
 public:
  // Both functors, for the inputs that are kept. Forward's residual is not kept: the sums do not read it.
  struct Either {
    static constexpr bool kReadsInput = Reduce::kReadsInput || Map::kReadsInput;
    static constexpr bool kReadsGrad = Reduce::kReadsGrad || Map::kReadsGrad;
    static constexpr bool kActivated = Map::kActivated && Map::kReadsGrad;
  };

  __device__ __forceinline__ StagingBuffer(const KernelArgs& args, unsigned char* shared)
      : plan_(args.plan),
        tensors_(args.tensors),
        epilogue_(args.epilogue),
        slots_(shared + args.plan.shared.staging + threadIdx.x * kVectorBytes),
        mask_slots_(reinterpret_cast<unsigned*>(shared + args.plan.shared.mask) + threadIdx.x) {}

  // Begins to fill slot k; it may be read when the copy has been committed and waited for.
  template <typename Functor, typename Where>
  __device__ __forceinline__ void request(int k, const Where& segment) const {
    if (reads_mask<Functor>() && !segment.empty()) {
      // Copies the word that holds the byte: no less can be copied. A mask is a whole number of words.
      __pipeline_memcpy_async(mask_slot(k), tensors_.mask + (segment.mask & ~std::int64_t{3}), sizeof(unsigned));
    }
    const Move move = segment.move();
#pragma unroll
    for (int i = 0; i < kMaxInputs; ++i) {
      if (!reads<Functor>(i)) continue;
      if (move == Move::kVector) {
        __pipeline_memcpy_async(slot<Functor>(k, i), segment.word(tensors_.in[i]), kVectorBytes);
      } else if (move == Move::kWords) {
        auto* const to = reinterpret_cast<unsigned*>(slot<Functor>(k, i));
        const auto* const from = reinterpret_cast<const unsigned*>(segment.word(tensors_.in[i]));
#pragma unroll
        for (int word = 0; word < 4; ++word) __pipeline_memcpy_async(to + word, from + word, sizeof(unsigned));
      } else {
        *slot<Functor>(k, i) = load_lanes(static_cast<const scalar_t*>(tensors_.in[i]), segment);
      }
    }
  }

  template <typename Functor, typename Where>
  __device__ __forceinline__ Item read(int k, const Where& segment) const {
    Item item = {};
    if (reads_mask<Functor>() && !segment.empty()) {
      item.bits = *mask_slot(k) >> (8 * static_cast<int>(segment.mask & 3));
    }
#pragma unroll
    for (int i = 0; i < kMaxInputs; ++i) {
      if (reads<Functor>(i)) item.vec[i] = words_of(*slot<Functor>(k, i));
    }
    return item;
  }

  // The same where only the kept vectors were requested: the others are loaded from global memory.
  template <typename Functor>
  __device__ __forceinline__ Item load(int k, const Segment<scalar_t>& segment) const {
    const bool kept = k < plan_.kept;
    Item item = {};
    if (reads_mask<Functor>() && !segment.empty()) {
      item.bits = kept ? *mask_slot(k) >> (8 * static_cast<int>(segment.mask & 3)) : tensors_.mask[segment.mask];
    }
#pragma unroll
    for (int i = 0; i < kMaxInputs; ++i) {
      if (reads<Functor>(i))
        item.vec[i] = kept ? words_of(*slot<Functor>(k, i)) : load_vec<scalar_t>(tensors_.in[i], segment);
    }
    return item;
  }

 private:
  // Whether a functor's input is always there: in backward with a mask it may be missing.
  template <typename Functor>
  static constexpr bool kAlwaysInput = kIsMasked<Functor> || !(Functor::kActivated && Functor::kReadsGrad);

  template <typename Functor>
  __device__ __forceinline__ bool reads(int i) const {
    if (i == 0) return Functor::kReadsInput && (kAlwaysInput<Functor> || tensors_.in[0] != nullptr);
    if (i == 1) return Functor::kReadsGrad;
    return Functor::kActivated && Functor::kReadsGrad && !kIsMasked<Functor> && epilogue_.has_residual;
  }

  template <typename Functor>
  __device__ __forceinline__ bool reads_mask() const {
    return Functor::kActivated && Functor::kReadsGrad && (kIsMasked<Functor> || epilogue_.has_mask);
  }

  // The inputs' slots follow one another: those of the input, of grad_output and of the residual, as far as the call
  // has them.
  template <typename Functor>
  __device__ __forceinline__ uint4* slot(int k, int input) const {
    unsigned char* const first = slots_ + k * plan_.shared.slot;
    if (input == 2) return reinterpret_cast<uint4*>(first + (plan_.inputs - 1) * plan_.shared.region);
    const bool second =
        Either::kReadsInput && (kIsMasked<Functor> || kAlwaysInput<Either> || tensors_.in[0] != nullptr);
    return reinterpret_cast<uint4*>(input == 1 && second ? first + plan_.shared.region : first);
  }

  // The slot of the word that holds the vector's byte.
  __device__ __forceinline__ unsigned* mask_slot(int k) const { return mask_slots_ + k * plan_.workers; }

  const LaunchPlan& plan_;
  const Tensors& tensors_;
  const Epilogue& epilogue_;
  unsigned char* slots_;
  unsigned* mask_slots_;
};

// Vectors that are not kept pass through slots of their own, kRingSlots of them at a time.
template <typename Functor, typename Staging, typename Iterator, bool kForward>
class Ring {
 public:
  // first: the first of the slots; ahead: at the first of `count` vectors that are to pass. Nothing is requested yet.
  __device__ __forceinline__ Ring(const Staging& staging, int first, int count, const Iterator& ahead)
      : staging_(staging), first_(first), slot_(first), left_(count), ahead_(ahead) {}

  __device__ __forceinline__ bool empty() const { return left_ <= 0; }

  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int r = 0; r < kRingSlots; ++r) request(first_ + r, r < left_);
  }

  // Waits for the next vector, and returns its slot.
  __device__ __forceinline__ int wait() const {
    wait_prior<kRingSlots - 1>();
    return slot_;
  }

  // Requests another vector into the slot, after the slot's vector has been read.
  __device__ __forceinline__ void refill() {
    request(slot_, left_ > kRingSlots);
    slot_ = slot_ + 1 == first_ + kRingSlots ? first_ : slot_ + 1;
    --left_;
  }

 private:
  __device__ __forceinline__ void request(int slot, bool more) {
    if (more) {
      staging_.template request<Functor>(slot, ahead_.segment());
      kForward ? ahead_.next() : ahead_.prev();
    }
    __pipeline_commit();
  }

  const Staging& staging_;
  int first_;
  int slot_;
  int left_;
  Iterator ahead_;
};

// Forward's residual, which the map alone reads: loaded into registers two vectors ahead, from the last to the first.
template <typename scalar_t, typename Iterator>
class ResidualStream {
  static constexpr int kAhead = 2;

 public:
  // data: null where there is no residual; last: at the last of `count` vectors.
  __device__ __forceinline__ ResidualStream(const void* data, int count, const Iterator& last)
      : data_(data), left_(data == nullptr ? 0 : count), ahead_(last) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next_[i] = load();
  }

  __device__ __forceinline__ Words take() {
    const Words now = next_[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) next_[i - 1] = next_[i];
    next_[kAhead - 1] = load();
    return now;
  }

 private:
  __device__ __forceinline__ Words load() {
    const auto segment = ahead_.segment();
    ahead_.prev();
    return left_-- > 0 ? load_vec<scalar_t>(data_, segment) : Words{};
  }

  const void* data_;
  int left_;
  Iterator ahead_;
  Words next_[kAhead];
};

// Waits for the copies of all stages up to this one. A stage is one group of copies: those of later stages may still be
// in flight.
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
