// How long the chains of additions in a sum are.
#pragma once

// Sums have three levels, so that no chain of float32 additions is long: each lane of an inner accumulator adds kInner
// values, the outer accumulator adds kOuter inner sums, and a double adds the outer sums. Equal values round the same
// way at every step, so the error of a single chain of 128 would reach 128 * 2^-25; here it is (16 + 8) * 2^-25.
constexpr std::int64_t kInner = 16;
constexpr std::int64_t kOuter = 8;
