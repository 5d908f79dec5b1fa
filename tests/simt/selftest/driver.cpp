// Does the emulator find what it should, and nothing else?  Build, in an empty folder, with S the path of tests/simt:
//
//   g++ -std=c++20 -O2 -I$S/include -c $(ls $S/*.cpp | grep -v backend_simt) $S/selftest/driver.cpp
//   g++ -x c++ -std=c++20 -O1 -g -fsanitize=thread --param tsan-distinguish-volatile=1
//       --param tsan-instrument-func-entry-exit=0 -I$S/include -c $S/selftest/*.cu
//   g++ *.o -o selftest -ldl
//
//   selftest --list              names of the cases
//   selftest [--seed N] [NAME]   runs one or all of them; a line "NAME ok" or "NAME FAILED: why" each
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "case.h"

namespace selftest {
namespace {

std::string failure;
bool checked = true;

void check_findings(const Case& c, const std::vector<std::string>& findings) {
  if (c.expected == nullptr) {
    if (!findings.empty()) failure += "unexpected finding: " + findings.front() + "\n";
    return;
  }
  bool found = false;
  for (const std::string& finding : findings) {
    found = found || finding.find(c.expected) != std::string::npos;
    // A finding must say where; the host's copies have no line.
    const bool has_line = finding.find(".cu:") != std::string::npos || finding.find("memset") != std::string::npos;
    if (!has_line) failure += "no source line: " + finding + "\n";
  }
  if (!found) {
    failure += std::string("expected: ") + c.expected + "\n";
    for (const std::string& finding : findings) failure += "found: " + finding + "\n";
  }
}

void run_once(const Case& c, std::uint64_t seed, bool check) {
  checked = check;
  simt::set_device({});
  simt::set_options({seed, check});
  simt::take_counters();
  c.run();
  check_findings(c, simt::take_errors());
}

bool run(const Case& c, std::uint64_t seed) {
  failure.clear();
  run_once(c, seed, true);
  // A defective kernel may do anything once nobody checks it.
  if (c.expected == nullptr) run_once(c, seed, false);
  std::printf("%s %s%s\n", c.name, failure.empty() ? "ok" : "FAILED: ", failure.c_str());
  std::fflush(stdout);
  return failure.empty();
}

}  // namespace

void require(bool holds, const char* what) {
  if (!holds) failure += std::string("not so: ") + what + (checked ? "" : " (unchecked)") + "\n";
}

bool is_checked() { return checked; }

}  // namespace selftest

int main(int argc, char** argv) {
  std::vector<selftest::Case> cases;
  for (const auto& part :
       {selftest::access_cases(), selftest::block_cases(), selftest::warp_cases(), selftest::grid_cases(),
        selftest::cluster_cases(), selftest::copy_cases(), selftest::host_cases()}) {
    cases.insert(cases.end(), part.begin(), part.end());
  }
  std::uint64_t seed = 0;
  const char* only = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--list") == 0) {
      for (const auto& c : cases) std::printf("%s\n", c.name);
      return 0;
    }
    if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else {
      only = argv[i];
    }
  }
  int ran = 0;
  int failed = 0;
  for (const auto& c : cases) {
    if (only != nullptr && std::strcmp(only, c.name) != 0) continue;
    ++ran;
    failed += !selftest::run(c, seed);
  }
  return ran == 0 || failed != 0;
}
