#include "requests.h"

#include <algorithm>
#include <set>

#include "machine.h"

namespace simt {
namespace {

constexpr std::size_t kSectorBytes = 32;
constexpr std::size_t kBankBytes = 4;
constexpr std::size_t kBanks = 32;
// Lanes whose vectors fill all banks once, and so are served together.
constexpr std::size_t kTogether = kBanks * kBankBytes / kVectorBytes;

template <typename Lanes>
std::size_t sectors(const Lanes& lanes) {
  std::set<std::uintptr_t> touched;
  for (const std::uintptr_t address : lanes) {
    if (address == 0) continue;
    touched.insert(address / kSectorBytes);
    touched.insert((address + kVectorBytes - 1) / kSectorBytes);
  }
  return touched.size();
}

// A pass reads or writes one word of each bank.
template <typename Lanes>
std::size_t wavefronts(const Lanes& lanes) {
  std::size_t passes = 0;
  for (std::size_t first = 0; first < lanes.size(); first += kTogether) {
    std::array<std::set<std::uintptr_t>, kBanks> words;
    for (std::size_t lane = first; lane < first + kTogether; ++lane) {
      if (lanes[lane] == 0) continue;
      for (std::size_t byte = 0; byte < kVectorBytes; byte += kBankBytes) {
        const std::uintptr_t word = (lanes[lane] + byte) / kBankBytes;
        words[word % kBanks].insert(word);
      }
    }
    const auto fewer = [](const auto& a, const auto& b) { return a.size() < b.size(); };
    passes += std::max_element(words.begin(), words.end(), fewer)->size();
  }
  return passes;
}

}  // namespace

void Requests::note(const Thread& thread, Site site, std::uintptr_t address, bool shared) {
  const Place place{site, shared};
  const unsigned time = times_[{&thread, place}]++;
  requests_[{thread.warp, place, time}][thread.lane] = address;
}

void Requests::take(Counters& counters) {
  for (const auto& [key, lanes] : requests_) {
    const auto present =
        static_cast<std::uint64_t>(std::count_if(lanes.begin(), lanes.end(), [](auto a) { return a != 0; }));
    if (std::get<1>(std::get<1>(key))) {
      counters.shared_vectors += present;
      counters.shared_wavefronts += wavefronts(lanes);
    } else {
      counters.global_vectors += present;
      counters.global_sectors += sectors(lanes);
    }
  }
  times_.clear();
  requests_.clear();
}

}  // namespace simt
