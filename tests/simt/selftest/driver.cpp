// Does the emulator find what it should, and nothing else?
//
//     selftest SEED [NAME]     runs one or all of the cases; a line "NAME ok" or "NAME FAILED: why" each
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
    // A finding must name a source line.
    if (finding.find(".cu:") == std::string::npos) failure += "no source line: " + finding + "\n";
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
  const std::uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  bool failed = false;
  for (const auto& c : cases) {
    if (argc < 3 || std::strcmp(argv[2], c.name) == 0) failed |= !selftest::run(c, seed);
  }
  return failed;
}
