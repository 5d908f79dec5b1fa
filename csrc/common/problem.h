// Plain descriptions of a batch-norm call, shared by the CPU and CUDA kernels: no torch type gets past here.
#pragma once

#include <cstdint>

namespace bnext {

enum class DType : std::uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
constexpr int kDTypes = 4;
static_assert(static_cast<int>(DType::kBFloat16) == kDTypes - 1, "tables by dtype have a row for each");

constexpr std::int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// kChannelsFirst: element (n, c, s) lies at (n*C + c)*HW + s   (contiguous (N, C, *spatial))
// kChannelsLast:  element (n, c, s) lies at (n*HW + s)*C + c   (channels_last, channels_last_3d, and (N, C))
enum class Layout : std::uint8_t { kChannelsFirst, kChannelsLast };

// How many parts a batch of N images has: see Problem::virtual_batch. An empty batch has one.
constexpr std::int64_t number_of_parts(std::int64_t N, std::int64_t virtual_batch) {
  return virtual_batch == 0 || N <= virtual_batch ? 1 : (N + virtual_batch - 1) / virtual_batch;
}

struct Problem {
  std::int64_t N;
  std::int64_t C;
  std::int64_t HW;  // product of the spatial sizes, 1 for (N, C)
  Layout layout;
  DType dtype;  // of input, output and their gradients
  // (N, HW): 0 at padding, which no statistic includes and where results are 0. Null: there is no padding.
  const std::uint8_t* valid = nullptr;
  // How many consecutive images are normalised together, as a part; the last part may have fewer. 0: all images.
  std::int64_t virtual_batch = 0;

  std::int64_t count() const { return N * HW; }  // values a channel holds, padding included
  std::int64_t numel() const { return N * C * HW; }
  std::int64_t parts() const { return number_of_parts(N, virtual_batch); }
};

}  // namespace bnext
