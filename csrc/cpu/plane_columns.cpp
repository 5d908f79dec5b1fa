#include "plane_columns.h"

#include <algorithm>

namespace bnext::cpu {
namespace {

// Planes are taken as columns from kMinColumnRows images on. The moments' sums read one input and repeat only the shift
// for each column, so they take larger planes too, from more images on.
constexpr std::int64_t kMinColumnRows = 8;
constexpr std::int64_t kMaxMomentsPlane = 256;
constexpr std::int64_t kMinMomentsRows = 32;

// Where there is nothing to reduce, planes of more than kMaxMappedPlaneBytes are mapped one by one: few enough of
// their registers are tails. Smaller planes are mapped as columns, in rows of about kMappedRowBytes, as short rows lie
// too far apart. At least kMinMappedRows rows, if there are as many, share one copy of the repeated coefficients.
constexpr std::int64_t kMaxMappedPlaneBytes = 160;
constexpr std::int64_t kMappedRowBytes = 16384;
constexpr std::int64_t kMinMappedRows = 64;
constexpr std::int64_t kTilesOfAThread = 2;   // at least, if each has kMinTileChannels
constexpr std::int64_t kMinTileChannels = 8;  // whose mathematics is done at once

// The sum in eight chains, which do not wait for each other.
double sum_of(const double* values, std::int64_t n) {
  constexpr std::int64_t kChains = 8;
  double sums[kChains] = {};
  std::int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (std::int64_t k = 0; k < kChains; ++k) sums[k] += values[i + k];
  }
  for (std::int64_t k = 0; i + k < n; ++k) sums[k] += values[i + k];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

}  // namespace

// A mask's rows are planes, so kernels for columns can neither read nor write it. An image's valid bits would have to
// be repeated for each channel.

bool PlaneColumns::take_reduction() const {
  if (op_.reduce_op != ReduceOp::kMomentSums) return take(kMaxColumnPlane, kMinColumnRows) && !op_.epilogue.has_mask;
  return take(kMaxColumnPlane, kMinColumnRows) || take(kMaxMomentsPlane, kMinMomentsRows);
}

bool PlaneColumns::take_map() const { return take(kMaxColumnPlane, kMinColumnRows) && op_.mask == nullptr; }

bool PlaneColumns::take_map_alone() const {
  return take_map() && problem_.HW * element_size(problem_.dtype) <= kMaxMappedPlaneBytes;
}

void PlaneColumns::reduce(std::int64_t c, std::int64_t n, const Coefficients& coefficients, Buffers& buffers,
                          SumsTable& sums) const {
  const Compute compute = opmath_compute(problem_.dtype);
  std::fill(buffers.sums.begin(), buffers.sums.end(), 0.0);
  ReduceArgs args;
  args.block = block_of(c * problem_.HW, n, problem_.N);
  spread(coefficients, 0, n, compute, buffers, args.coefficients);
  args.first = buffers.sums.data();
  args.second = args.first + n * problem_.HW;
  op_.reduce(kernels_.reduce_columns, problem_.dtype, compute, args);
  for (std::int64_t j = 0; j < n; ++j) {
    sums.first[j] = sum_of(args.first + j * problem_.HW, problem_.HW);
    sums.second[j] = sum_of(args.second + j * problem_.HW, problem_.HW);
  }
}

void PlaneColumns::map(std::int64_t c, std::int64_t n, std::int64_t image, std::int64_t rows,
                       const Coefficients& coefficients, std::int64_t j, Buffers& buffers) const {
  for (std::int64_t done = 0; done < n;) {
    const std::int64_t count = coefficients.alike(j + done, n - done);
    const Compute compute = coefficients.compute(j + done);
    const std::int64_t offset = (image * problem_.C + c + done) * problem_.HW;
    MapArgs args;
    args.block = block_of(offset, count, rows);
    spread(coefficients, j + done, count, compute, buffers, args.coefficients);
    op_.map(kernels_.map_columns, problem_.dtype, compute, offset, args);
    done += count;
  }
}

Tile PlaneColumns::tile(std::int64_t threads) const {
  const std::int64_t image_bytes = problem_.C * problem_.HW * element_size(problem_.dtype);
  // Each piece of rows spreads the coefficients over its columns anew.
  const std::int64_t pieces = std::max<std::int64_t>(1, problem_.N / kMinMappedRows);
  const std::int64_t to_share = std::min(divide_up(threads * kTilesOfAThread, pieces), problem_.C / kMinTileChannels);
  const std::int64_t groups = std::max(to_share, image_bytes / kMappedRowBytes);
  return {even_share(problem_.C, groups), divide_up(problem_.N, pieces)};
}

bool PlaneColumns::take(std::int64_t max_plane, std::int64_t min_rows) const {
  return problem_.HW <= max_plane && problem_.N >= min_rows && op_.valid == nullptr;
}

// The columns of n channels in `rows` images, as a block whose first element is at `offset`.
Block PlaneColumns::block_of(std::int64_t offset, std::int64_t n, std::int64_t rows) const {
  return op_.block(problem_.dtype, offset, rows, n * problem_.HW, problem_.C * problem_.HW, 0, 0);
}

// Repeats the coefficients of n channels from j on for each of their columns: [coefficient][column].
template <int kMax>
void PlaneColumns::spread(const Coefficients& of, std::int64_t j, std::int64_t n, Compute compute, Buffers& to,
                          const void* (&coefficients)[kMax]) const {
  // In whole blocks: what they write beyond a plane is overwritten by the next channel, or lies in the table's last
  // block.
  constexpr std::int64_t kBlock = 8;
  const auto repeat = [&](const auto& from, auto& columns) {
    const auto needed = static_cast<std::size_t>(of.count * n * problem_.HW + kBlock);
    if (columns.size() < needed) columns.resize(needed);
    for (int k = 0; k < of.count; ++k) {
      auto* to = columns.data() + k * n * problem_.HW;
      coefficients[k] = to;
      for (std::int64_t i = 0; i < n; ++i, to += problem_.HW) {
        const auto value = from[k * of.channels + j + i];
        for (std::int64_t column = 0; column < problem_.HW; column += kBlock) std::fill_n(to + column, kBlock, value);
      }
    }
  };
  compute == Compute::kFloat32 ? repeat(of.single, to.single) : repeat(of.wide, to.wide);
}

}  // namespace bnext::cpu
