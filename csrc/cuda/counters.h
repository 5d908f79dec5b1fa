// The counters that blocks of the grid wait at (grid_group_barrier in cta_group.cuh): which launch has which.
//
// They lie in the device's memory and are zero when the process begins. A barrier leaves its counter as the next one
// needs it, so no launch clears counters, which would take a memset before each. Launches that never run at the same
// time may have the same ones: those of a stream. A graph is replayed on any stream, so that each launch that it holds
// has counters of its own, for good.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>

namespace bnext::cuda {

constexpr std::int64_t kCounters = 1 << 16;  // of a device

// The first of the current device's kCounters counters.
cudaError_t current_counters(unsigned** counters);

// Deals out the counters of a device, by their numbers.
class CounterSlots {
 public:
  explicit CounterSlots(std::int64_t counters = kCounters) : counters_(counters) {}

  // The first of at least `count` counters that only launches on this stream have; none if too few are left. `stream`
  // is the number of cudaStreamGetId, which no other stream of the process ever has.
  std::optional<std::int64_t> of_stream(unsigned long long stream, std::int64_t count) {
    const std::lock_guard lock(mutex_);
    const auto found = streams_.find(stream);
    if (found != streams_.end() && count <= found->second.count) return found->second.first;
    const std::int64_t most = count <= kStreamCounters ? kStreamCounters : 2 * count;
    const std::optional<std::int64_t> first = take(most);
    if (first) streams_[stream] = {*first, most};
    return first;
  }

  // The first of `count` counters that no other launch has; none if too few are left.
  std::optional<std::int64_t> of_captured_launch(std::int64_t count) {
    const std::lock_guard lock(mutex_);
    return take(count);
  }

 private:
  static constexpr std::int64_t kStreamCounters = 32;  // most launches have fewer groups

  struct Slot {
    std::int64_t first;
    std::int64_t count;
  };

  std::optional<std::int64_t> take(std::int64_t count) {
    if (count > counters_ - taken_) return std::nullopt;
    const std::int64_t first = taken_;
    taken_ += count;
    return first;
  }

  std::mutex mutex_;
  std::int64_t counters_;
  std::int64_t taken_ = 0;
  std::map<unsigned long long, Slot> streams_;
};

}  // namespace bnext::cuda
