// Which elements of a part a thread takes, and what it reads of them.
#pragma once

#include "part_plan.h"
#include "staging.cuh"

namespace bnext::cuda {

struct PartArgs {
  PartPlan plan;
  Tensors tensors;
  Epilogue epilogue;  // says of residual and mask what the tensors do
  double* workspace;
  std::int64_t* count_batches;  // to which the map adds the number of parts; null: not here
};

// An element, or a place in a padded plane or beyond the channels that is `inside` of nothing.
struct PartElement {
  std::int64_t image;
  std::int64_t spot;
  bool inside;
  bool valid;  // and no padding
};

class PartPlace {
 public:
  __device__ __forceinline__ explicit PartPlace(const PartPlan& plan) : plan_(plan) {
    const int t = static_cast<int>(threadIdx.x);
    const std::int64_t block = blockIdx.x;
    const std::int64_t chunk = block / plan.tiles;
    channel_ = block % plan.tiles * plan.threads_x + t % plan.threads_x;
    part_ = chunk / plan.splits;
    split_ = chunk % plan.splits;
    const std::int64_t first = part_ * plan.part_images;
    const std::int64_t images = first + plan.part_images <= plan.images ? plan.part_images : plan.images - first;
    const std::int64_t begin = split_ * plan.chunk;
    const std::int64_t positions = images * plan.padded_plane;
    const std::int64_t end = begin + plan.chunk < positions ? begin + plan.chunk : positions;
    left_ = end - begin;
    row_ = t / plan.threads_x;
    image_ = first + (begin + row_) / plan.padded_plane;
    spot_ = (begin + row_) % plan.padded_plane;
  }

  __device__ __forceinline__ std::int64_t channel() const { return channel_; }
  __device__ __forceinline__ std::int64_t part() const { return part_; }
  __device__ __forceinline__ std::int64_t split() const { return split_; }
  __device__ __forceinline__ bool has_channel() const { return channel_ < plan_.C; }

  // Whether there is more for a thread of the block: in all of them the same.
  __device__ __forceinline__ bool more() const { return left_ > 0; }

  __device__ __forceinline__ PartElement next() {
    PartElement element = {image_, spot_, has_channel() && row_ < left_ && spot_ < plan_.plane, false};
    if (element.inside) element.valid = plan_.valid == nullptr || plan_.valid[image_ * plan_.plane + spot_] != 0;
    left_ -= plan_.threads_y;
    image_ += plan_.step_images;
    spot_ += plan_.step_spots;
    if (spot_ >= plan_.padded_plane) {
      spot_ -= plan_.padded_plane;
      ++image_;
    }
    return element;
  }

  __device__ __forceinline__ std::int64_t offset(const PartElement& element) const {
    return (element.image * plan_.C + channel_) * plan_.plane + element.spot;
  }

  // The byte of a mask that holds an element's bit, and which of its bits that is.
  template <typename scalar_t>
  __device__ __forceinline__ std::int64_t mask_byte(const PartElement& element) const {
    const std::int64_t row = plan_.channels_last ? element.image : element.image * plan_.C + channel_;
    return row * plan_.mask_row_bytes + in_row(element) / kLanes<scalar_t>;
  }
  template <typename scalar_t>
  __device__ __forceinline__ int mask_bit(const PartElement& element) const {
    return static_cast<int>(in_row(element) % kLanes<scalar_t>);
  }

 private:
  __device__ __forceinline__ std::int64_t in_row(const PartElement& element) const {
    return plan_.channels_last ? channel_ : element.spot;
  }

  const PartPlan& plan_;
  std::int64_t channel_;
  std::int64_t part_;
  std::int64_t split_;
  std::int64_t image_;
  std::int64_t spot_;
  std::int64_t left_;  // positions of the chunk from the block's first thread on
  int row_;
};

// Elements that are read before the first of them is looked at. With an activation fewer, whose code is long.
template <typename Functor>
constexpr int kPartAhead = Functor::kActivated ? 2 : 4;

// What a functor reads of an element, in float64. Of padding nothing is read: whatever lies there does not matter.
template <typename scalar_t, typename Functor>
__device__ __forceinline__ void read_element(const PartArgs& args, const PartPlace& place, const PartElement& element,
                                             double (&in)[kMaxInputs]) {
  if (!element.valid) return;
  const Tensors& tensors = args.tensors;
  const std::int64_t offset = place.offset(element);
  const auto read = [&](int i) {
    const void* data = tensors.in[i];
    if (data != nullptr) in[i] = static_cast<double>(widen(static_cast<const scalar_t*>(data)[offset]));
  };
  if constexpr (Functor::kReadsInput) read(0);
  if constexpr (Functor::kReadsGrad) read(1);
  if constexpr (Functor::kActivated) {
    if (tensors.mask != nullptr) {
      const unsigned byte = tensors.mask[place.mask_byte<scalar_t>(element)];
      in[2] = (byte >> place.mask_bit<scalar_t>(element) & 1u) != 0 ? 1.0 : 0.0;
    } else {
      read(2);
    }
  }
}

// f(element, what the functor reads of it) for each of a thread's places, all threads of a block in step.
template <typename scalar_t, typename Functor, typename F>
__device__ __forceinline__ void for_each_element(const PartArgs& args, PartPlace& place, F&& f) {
  constexpr int kAhead = kPartAhead<Functor>;
  while (place.more()) {
    PartElement element[kAhead];
    double in[kAhead][kMaxInputs] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) element[i] = place.next();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) read_element<scalar_t, Functor>(args, place, element[i], in[i]);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) f(element[i], in[i]);
  }
}

}  // namespace bnext::cuda
