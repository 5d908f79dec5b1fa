#include "valid.h"

#include <algorithm>
#include <cstring>

namespace bnext::cpu {

// The most positions that a byte can count: the compiler vectorises a loop that counts in bytes.
constexpr std::int64_t kRun = 255;

void pack_valid(const std::uint8_t* valid, std::int64_t positions, std::uint8_t* bits) {
  constexpr std::uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  for (std::int64_t i = 0; i < positions; i += 8) {
    std::uint64_t eight = 0;
    std::memcpy(&eight, valid + i, static_cast<std::size_t>(std::min<std::int64_t>(8, positions - i)));
    // 1 in each byte that is not 0; the multiplication gathers these eight bits in the highest byte.
    const std::uint64_t ones = (((eight & kLow) + kLow) | eight) >> 7 & 0x0101010101010101;
    bits[i / 8] = static_cast<std::uint8_t>(ones * 0x0102040810204080 >> 56);
  }
}

std::int64_t count_valid(const std::uint8_t* valid, std::int64_t positions) {
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < positions; begin += kRun) {
    const std::int64_t end = std::min(positions, begin + kRun);
    std::uint8_t some = 0;
    for (std::int64_t i = begin; i < end; ++i) some = static_cast<std::uint8_t>(some + (valid[i] != 0 ? 1 : 0));
    count += some;
  }
  return count;
}

SamplePositions samples_of_valid(const std::uint8_t* valid, std::int64_t positions, std::int64_t count) {
  SamplePositions samples(count);
  std::int64_t begin = 0;   // of a run of positions
  std::int64_t before = 0;  // valid positions before the run, and in it
  std::int64_t within = count_valid(valid, std::min(positions, kRun));
  for (int i = 0; i < samples.samples; ++i) {
    while (before + within <= samples.at[i]) {
      before += within;
      begin += kRun;
      within = count_valid(valid + begin, std::min(positions - begin, kRun));
    }
    std::int64_t position = begin;
    for (std::int64_t left = samples.at[i] - before; valid[position] == 0 || left-- > 0;) ++position;
    samples.at[i] = position;
  }
  return samples;
}

}  // namespace bnext::cpu
