// Padding on the CPU (Problem::valid): how many positions are none, and which of them to take samples at.
#pragma once

#include <cstdint>

#include "../common/samples.h"

namespace bnext::cpu {

// A bit for each of `positions`, the lowest of a byte first; 0 in what is left of the last byte.
void pack_valid(const std::uint8_t* valid, std::int64_t positions, std::uint8_t* bits);

std::int64_t count_valid(const std::uint8_t* valid, std::int64_t positions);

// Where to take samples of a channel, of whose positions `count` are valid: more than none.
SamplePositions samples_of_valid(const std::uint8_t* valid, std::int64_t positions, std::int64_t count);

}  // namespace bnext::cpu
