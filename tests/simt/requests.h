// What the memory system would make of a warp's vector accesses: the sectors that a request to global memory touches,
// and the wavefronts, passes over the banks, that a request to shared memory takes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>

#include "emulator.h"
#include "findings.h"

namespace simt {

struct Thread;
struct Warp;

constexpr std::size_t kVectorBytes = 16;

class Requests {
 public:
  // One lane's access of kVectorBytes. Lanes that come to a line for the n-th time make one request of it.
  void note(const Thread& thread, Site site, std::uintptr_t address, bool shared);
  // Adds up what a launch has noted.
  void take(Counters& counters);

 private:
  static constexpr int kLanes = 32;
  using Place = std::tuple<Site, bool>;
  using Lanes = std::array<std::uintptr_t, kLanes>;  // addresses; 0: not there

  std::map<std::tuple<const Thread*, Place>, unsigned> times_;
  std::map<std::tuple<const Warp*, Place, unsigned>, Lanes> requests_;
};

}  // namespace simt
