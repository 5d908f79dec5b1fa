#include "huge_pages.h"

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bnext::cpu {
namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

// glibc's malloc maps every block above 32 MB afresh; smaller ones are mostly reused, their pages already there.
constexpr std::size_t kMinBytes = std::size_t{32} << 20;

bool system_supports() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return std::getline(file, line) && line.find("[never]") == std::string::npos;
}

bool allowed() {
  const char* setting = std::getenv("BNEXT_HUGE_PAGES");
  return setting == nullptr || std::string(setting) != "0";
}

}  // namespace

bool huge_pages_enabled() {
  static const bool enabled = allowed() && system_supports();
  return enabled;
}

void use_huge_pages([[maybe_unused]] void* data, std::size_t bytes, [[maybe_unused]] const Parallel* touch) {
  if (bytes < kMinBytes || !huge_pages_enabled()) return;
#if defined(__linux__)
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  const bool advised = madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
  if (!advised || touch == nullptr) return;
  (*touch)(static_cast<std::int64_t>((end - begin) / kHugePage), [begin](std::int64_t first, std::int64_t last) {
    for (std::int64_t page = first; page < last; ++page) {
      *reinterpret_cast<volatile char*>(begin + static_cast<std::uintptr_t>(page) * kHugePage) = 0;
    }
  });
#endif
}

}  // namespace bnext::cpu
