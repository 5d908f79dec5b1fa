// Padding on the CPU (Problem::valid): packs valid positions into bits, counts them and picks samples among them.
#pragma once

#include <cstdint>

#include "../common/samples.h"

namespace bnext::cpu {

// Writes a bit for each of `positions`, the lowest of a byte first; unused bits of the last byte are 0.
void pack_valid(const std::uint8_t* valid, std::int64_t positions, std::uint8_t* bits);

std::int64_t count_valid(const std::uint8_t* valid, std::int64_t positions);

// Where to take samples of a channel. `count`: how many of its positions are valid, at least one.
SamplePositions samples_of_valid(const std::uint8_t* valid, std::int64_t positions, std::int64_t count);

}  // namespace bnext::cpu
