// Channels first, planes of a few elements. One by one, each of them would end in a tail; so n channels of HW elements
// are taken as a matrix of N rows and n*HW columns, each of which belongs to one channel.
#pragma once

#include <cstdint>
#include <vector>

#include "traversal.h"

namespace bnext::cpu {

constexpr std::int64_t kMaxColumnPlane = 64;  // elements of a plane that is taken as columns, but for the moments

class PlaneColumns {
 public:
  PlaneColumns(const Problem& problem, const ChannelOp& op, const KernelTable& kernels)
      : problem_(problem), op_(op), kernels_(kernels) {}

  // Whether columns are the faster way for this call: to reduce, to map a group that has just been reduced, and to map
  // where nothing is reduced.
  bool take_reduction() const;
  bool take_map() const;
  bool take_map_alone() const;

  // Buffers for the columns of a group.
  struct Buffers {
    explicit Buffers(std::int64_t columns) : sums(static_cast<std::size_t>(2 * columns)) {}

    std::vector<double> sums;
    // Coefficients in float64 and in float32; mostly only one of the two is ever filled.
    std::vector<double> wide;
    std::vector<float> single;
  };

  // Computes the sums of n channels from c on, all in the dtype's opmath type. In the tables they begin at index 0.
  void reduce(std::int64_t c, std::int64_t n, const Coefficients& coefficients, Buffers& buffers,
              SumsTable& sums) const;

  // Maps n channels from c on in `rows` images from `image` on. The channels' coefficients begin at index j.
  void map(std::int64_t c, std::int64_t n, std::int64_t image, std::int64_t rows, const Coefficients& coefficients,
           std::int64_t j, Buffers& buffers) const;

  // What a task maps where nothing is reduced: as many channels as make long rows.
  Tile tile(std::int64_t threads) const;

 private:
  bool take(std::int64_t max_plane, std::int64_t min_rows) const;
  Block block_of(std::int64_t offset, std::int64_t n, std::int64_t rows) const;
  template <int kMax>
  void spread(const Coefficients& of, std::int64_t j, std::int64_t n, Compute compute, Buffers& to,
              const void* (&coefficients)[kMax]) const;

  const Problem& problem_;
  const ChannelOp& op_;
  const KernelTable& kernels_;
};

}  // namespace bnext::cpu
