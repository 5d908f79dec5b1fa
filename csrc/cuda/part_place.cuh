// Which elements of a part a thread takes, and what it reads of them.
#pragma once

#include "part_plan.h"
#include "staging.cuh"

namespace bnext::cuda {

struct PartArgs {
  PartPlan plan;
  Tensors tensors;
  Epilogue epilogue;  // has_residual and has_mask agree with the tensors
  double* workspace;
  std::int64_t* count_batches;  // to which the map adds the number of parts; null: not counted
};

// An element of the tensor if `inside`; otherwise a position beyond the chunk, the plane or the channels.
struct PartElement {
  std::int64_t offset;
  std::int64_t image;
  std::int64_t spot;
  bool inside;
  bool valid;  // inside, and no padding
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
    left_ = static_cast<int>(end - begin);
    row_ = t / plan.threads_x;
    image_ = first + (begin + row_) / plan.padded_plane;
    spot_ = (begin + row_) % plan.padded_plane;
    offset_ = (image_ * plan.C + channel_) * plan.plane + spot_;
    position_ = image_ * plan.plane + spot_;
  }

  __device__ __forceinline__ std::int64_t channel() const { return channel_; }
  __device__ __forceinline__ std::int64_t part() const { return part_; }
  __device__ __forceinline__ std::int64_t split() const { return split_; }
  __device__ __forceinline__ bool has_channel() const { return channel_ < plan_.C; }

  // Whether any thread of the block has elements left: the same in all of its threads.
  __device__ __forceinline__ bool more() const { return left_ > 0; }

  __device__ __forceinline__ PartElement next() {
    PartElement element = {offset_, image_, spot_, has_channel() && row_ < left_ && spot_ < plan_.plane, false};
    if (element.inside) element.valid = plan_.valid == nullptr || plan_.valid[position_] != 0;
    left_ -= plan_.threads_y;
    move(plan_.step_images, plan_.step_spots);
    if (spot_ >= plan_.padded_plane) move(1, -plan_.padded_plane);
    return element;
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
  // The products are the same at every step: a step takes additions, where new positions would take multiplications.
  __device__ __forceinline__ void move(std::int64_t images, std::int64_t spots) {
    image_ += images;
    spot_ += spots;
    position_ += images * plan_.plane + spots;
    offset_ += images * plan_.image_elements + spots;
  }

  __device__ __forceinline__ std::int64_t in_row(const PartElement& element) const {
    return plan_.channels_last ? channel_ : element.spot;
  }

  const PartPlan& plan_;
  std::int64_t channel_;
  std::int64_t part_;
  std::int64_t split_;
  std::int64_t image_;
  std::int64_t spot_;
  std::int64_t offset_;
  std::int64_t position_;
  int left_;  // positions left in the chunk, from the block's first thread on
  int row_;
};

// Elements that a thread reads before it uses the first of them: fewer with an activation, whose code is long.
template <typename Functor>
constexpr int kPartAhead = Functor::kActivated ? 2 : 4;

// What a functor reads of an element, in the tensors' types: a conversion would wait for the load.
template <typename scalar_t>
struct PartValues {
  scalar_t value[kMaxInputs];
  unsigned char mask;
};

// Padding is not read: its contents do not matter.
template <typename scalar_t, typename Functor>
__device__ __forceinline__ PartValues<scalar_t> read_element(const Tensors& tensors, const PartPlace& place,
                                                             const PartElement& element) {
  PartValues<scalar_t> values = {};
  const auto read = [&](int i) {
    const auto* data = static_cast<const scalar_t*>(tensors.in[i]);
    if (data != nullptr && element.valid) values.value[i] = data[element.offset];
  };
  if constexpr (Functor::kReadsInput) read(0);
  if constexpr (Functor::kReadsGrad) read(1);
  if constexpr (Functor::kActivated) {
    read(2);
    if (tensors.mask != nullptr && element.valid) values.mask = tensors.mask[place.mask_byte<scalar_t>(element)];
  }
  return values;
}

template <typename scalar_t, typename Functor>
__device__ __forceinline__ void widen_values(const PartArgs& args, const PartPlace& place, const PartElement& element,
                                             const PartValues<scalar_t>& values, double (&in)[kMaxInputs]) {
#pragma unroll
  for (int i = 0; i < kMaxInputs; ++i) in[i] = static_cast<double>(widen(values.value[i]));
  if constexpr (Functor::kActivated) {
    if (args.epilogue.has_mask) in[2] = (values.mask >> place.mask_bit<scalar_t>(element) & 1) != 0 ? 1.0 : 0.0;
  }
}

// Calls f(element, its inputs in float64) for each of a thread's positions, equally often in all threads of a block.
template <typename scalar_t, typename Functor, typename F>
__device__ __forceinline__ void for_each_element(const PartArgs& args, PartPlace& place, F&& f) {
  constexpr int kAhead = kPartAhead<Functor>;
  while (place.more()) {
    PartElement element[kAhead];
    PartValues<scalar_t> values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) element[i] = place.next();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) values[i] = read_element<scalar_t, Functor>(args.tensors, place, element[i]);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      double in[kMaxInputs];
      widen_values<scalar_t, Functor>(args, place, element[i], values[i], in);
      f(element[i], in);
    }
  }
}

}  // namespace bnext::cuda
