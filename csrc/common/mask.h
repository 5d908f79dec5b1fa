// One bit an element that says whether a rectifier was open: all that its backward pass needs of the pre-activation.
//
// Elements lie in rows: a channel's plane of an image (channels first) or the channels of a pixel (channels last). A
// row begins with a byte of its own, so that two threads never write to the same byte.
// Only the device that wrote a mask reads it: so a device may pack rows closer, or align them to vectors.
#pragma once

#include <cstdint>

#include "problem.h"

namespace bnext {

// How many elements share a byte: on the CPU as many as it has bits; on CUDA those of a 16-byte vector, so that only
// one thread writes to a byte.
constexpr std::int64_t kCpuMaskLanes = 8;
constexpr std::int64_t kCudaMaskBytes = 16;
constexpr std::int64_t cuda_mask_lanes(std::int64_t element_bytes) { return kCudaMaskBytes / element_bytes; }
constexpr bool lanes_fit_a_byte() {
  for (int i = 0; i < kDTypes; ++i) {
    if (cuda_mask_lanes(element_size(static_cast<DType>(i))) > 8) return false;
  }
  return true;
}
static_assert(lanes_fit_a_byte(), "a vector's lanes share a byte of a mask, whatever the dtype");

// Bytes reserved for a row of `elements`, where a byte holds `lanes` of them. A row that does not fill its bytes may
// begin inside a byte, hence one more; rows are whole 4-byte words.
constexpr std::int64_t mask_row_bytes(std::int64_t elements, std::int64_t lanes) {
  const std::int64_t touched = (elements + lanes - 1) / lanes;
  const std::int64_t ragged = touched - elements / lanes;
  return (touched + ragged + 3) / 4 * 4;
}

// Whether rows have bits that belong to no element, which no kernel writes.
constexpr bool mask_has_padding(std::int64_t elements, std::int64_t lanes) {
  return mask_row_bytes(elements, lanes) * lanes != elements;
}

// Elements of a row.
constexpr std::int64_t mask_row_elements(const Problem& problem) {
  return problem.layout == Layout::kChannelsFirst ? problem.HW : problem.C;
}

}  // namespace bnext
