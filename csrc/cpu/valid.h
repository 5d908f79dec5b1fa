// Padding on the CPU (Problem::valid): how many positions are none, and which of them to take samples at.
#pragma once

#include <cstdint>

#include "../common/samples.h"

namespace bnext::cpu {

std::int64_t count_valid(const std::uint8_t* valid, std::int64_t positions);

// Where to take samples of a channel, of whose positions `count` are valid: more than none.
SamplePositions samples_of_valid(const std::uint8_t* valid, std::int64_t positions, std::int64_t count);

}  // namespace bnext::cpu
