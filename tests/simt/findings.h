// The checker's findings, and the names of the source lines they speak of.
#pragma once

#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace simt {

// A return address in a kernel; null where there is none.
using Site = const void*;

enum class Defect {
  kRace,
  kUninitialised,
  kOutside,
  kReadOnly,
  kMisaligned,
  kAsyncCopy,
  kDivergence,
  kMask,
  kCluster,
  kUsage,
};

class Findings {
 public:
  // False for a defect that was found at these places before, and once there are enough: naming a line takes long.
  bool is_new(Defect defect, Site site, Site other = nullptr);
  void add(std::string text) { texts_.push_back(std::move(text)); }
  std::vector<std::string> take();

 private:
  std::set<std::tuple<Defect, Site, Site>> seen_;
  std::vector<std::string> texts_;
};

// "file:line" of the kernel's code, past the emulator's own inlined headers.
std::string source_line(Site site);
// All the lines that were inlined into one another there: what tells two calls of an inlined function apart.
std::string source_lines(Site site);
std::string function_name(const void* function);

}  // namespace simt
