// The vectorised inner loops, the microkernels of the CPU path, as a table of function pointers for each instruction
// set. A kernel works on a block of `rows` rows of `len` elements, `stride` elements apart, of one of two kinds:
//
// * segments: a whole block belongs to one channel (channels first; a row is an image's plane)
// * columns:  column j of the block belongs to channel j (channels last; a row is a pixel)
//
// All kernels are single-threaded, allocate nothing and read and write just the block.
#pragma once

#include <cstdint>

#include "../common/channel_ops.h"
#include "../common/elementwise.h"
#include "../common/mask.h"
#include "../common/problem.h"
#include "../common/samples.h"

namespace bnext::cpu {

constexpr int kLineBytes = 64;  // of a cache line

enum class ReduceOp { kMomentSums, kGradSums, kBiasGradSum, kActivatedGradSums };
enum class MapOp { kNormalize, kGradInput, kScaleGrad, kActivatedNormalize, kActivatedGrad };
constexpr int kReduceOps = 4;
constexpr int kMapOps = 5;

constexpr int reduce_coefficients_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kMomentSums: return MomentSums::kCoefficients;
    case ReduceOp::kGradSums: return GradSums::kCoefficients;
    case ReduceOp::kBiasGradSum: return BiasGradSum::kCoefficients;
    case ReduceOp::kActivatedGradSums: return ActivatedGradSums::kCoefficients;
  }
  return kMaxReduceCoefficients;
}

constexpr int map_coefficients_of(MapOp op) {
  switch (op) {
    case MapOp::kNormalize: return Normalize::kCoefficients;
    case MapOp::kGradInput: return GradInput::kCoefficients;
    case MapOp::kScaleGrad: return ScaleGrad::kCoefficients;
    case MapOp::kActivatedNormalize: return ActivatedNormalize::kCoefficients;
    case MapOp::kActivatedGrad: return ActivatedGrad::kCoefficients;
  }
  return kMaxCoefficients;
}

// The type that elements are widened to before they are computed with.
enum class Compute { kFloat32, kFloat64 };
constexpr int kComputes = 2;

constexpr Compute opmath_compute(DType dtype) {
  return dtype == DType::kFloat64 ? Compute::kFloat64 : Compute::kFloat32;
}

struct Block {
  const void* in[kMaxInputs];  // the block's first element in each input that the functor reads
  std::int64_t rows;
  std::int64_t len;
  std::int64_t stride;  // between rows, in elements
  // Bit i of a row's mask belongs to its element i; null if there is none. Forward writes it, backward reads it.
  std::uint8_t* mask;
  std::int64_t mask_stride;  // bytes
  // Bit i of a row is 0 where its element i is padding, which adds nothing to a sum and maps to 0. Null: no padding.
  const std::uint8_t* valid = nullptr;
  std::int64_t valid_stride = 0;  // bytes
};

// Columns are reduced a tile of rows at a time: all rows of a tile for a few registers of columns, then for the next.
constexpr std::int64_t kMaxTileRows = 16;

// Adds each channel's two sums over the block to first[j] and second[j]. A call for segments takes several channels:
// the block of channel j lies j*channel_stride after that of the first.
struct ReduceArgs {
  Block block;
  const void* coefficients[kMaxReduceCoefficients];  // [channels] (segments) or [len] (columns), of the compute type
  Epilogue epilogue;
  double* first;
  double* second;
  std::int64_t prefetch_distance = 0;     // with element i, prefetch input i + prefetch_distance, unless 0
  std::int64_t prefetching_rows = 0;      // segments: only the first so many rows do
  std::int64_t tile_rows = kMaxTileRows;  // columns only
  std::int64_t channels = 1;              // segments only
  std::int64_t channel_stride = 0;        // elements
  std::int64_t mask_channel_stride = 0;   // bytes
};

// out[...] = functor(in[...]), with the block's geometry.
struct MapArgs {
  Block block;
  void* out[2];  // output or grad_input; grad_residual. Null if not wanted; a plain functor has the first alone
  const void* coefficients[kMaxCoefficients];
  std::int64_t coefficient_step = 0;  // segments: 0, or 1 where row r has coefficients[k][r]
  Epilogue epilogue;
  bool non_temporal = false;           // store past the caches, where the alignment allows
  bool in_order = false;               // columns: one row after the other
  std::int64_t prefetch_distance = 0;  // with element i, prefetch input i + prefetch_distance, unless 0
  std::int64_t write_prefetch = 0;     // segments: the same for the outputs, to be written
};

// shift[j] = shift_of_samples() (common/samples.h) of in[offsets[i] + j*stride] over i, for j < len: their mean in the
// dtype's opmath_t, without bits finer than an ulp of their spread (coarse_shift). The samples are averaged in pairs,
// which neither overflows nor rounds equal values; `samples` is a power of two, at most kMaxSamples.
struct SampleArgs {
  const void* in;
  const std::int64_t* offsets;
  int samples;
  std::int64_t len;
  std::int64_t stride;  // from one channel to the next
  double* shift;
};

using ReduceKernel = void (*)(const ReduceArgs&);
using MapKernel = void (*)(const MapArgs&);
using SampleKernel = void (*)(const SampleArgs&);

// n channels from c on, and their sums. Coefficients are [coefficient][channel], with `stride` between coefficients.
struct Channels {
  std::int64_t c;
  std::int64_t n;
  const double* shift;
  const double* first;
  const double* second;
  double* coefficients;
  int coefficient_count;
  std::int64_t stride;
  bool stores;  // whether `finish` writes the caller's results, if several threads finish the same channels
};

// The functions of an Op (common/channel_ops.h), for many channels at once. `op` points to the Op.
struct ChannelKernels {
  // Sets the reduction's coefficients, shift included. Not called where the shift is sampled.
  void (*reduce_coefficients)(const void* op, const Channels& channels);
  // Marks the channels whose float32 sums are not accurate enough, and returns whether there are any. The traversal
  // reduces these again in float64, shifted by refined_shift.
  bool (*find_needs_fp64)(const void* op, const Channels& channels, std::uint8_t* needs_fp64);
  double (*refined_shift)(const void* op, const ChannelSums& sums);
  // Takes the channels' sums, stores what the caller asked for, and sets the map's coefficients. Called once for each
  // channel, possibly from several threads at once.
  void (*finish)(const void* op, const Channels& channels);
};

// single[i] = wide[i]; fits[i] becomes 0 where wide[i] would overflow or underflow in float32.
using NarrowKernel = void (*)(const double* wide, std::int64_t n, float* single, std::uint8_t* fits);

// Indexed [dtype][compute][op]; float64 data has no float32 compute, and those entries are null.
using ReduceKernels = ReduceKernel[kDTypes][kComputes][kReduceOps];
using MapKernels = MapKernel[kDTypes][kComputes][kMapOps];

struct KernelTable {
  ReduceKernels reduce_segments;
  ReduceKernels reduce_columns;
  MapKernels map_segments;
  MapKernels map_columns;
  SampleKernel sample[kDTypes];
  NarrowKernel narrow;
  ChannelKernels training;
  ChannelKernels evaluation;
  ChannelKernels backward;
};

// One for each instruction set (isa/).
namespace isa_default {
KernelTable kernel_table();
}
#if defined(__x86_64__)
namespace isa_avx2 {
KernelTable kernel_table();
}
namespace isa_avx512 {
KernelTable kernel_table();
}
#endif

}  // namespace bnext::cpu
