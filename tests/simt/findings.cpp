#include "findings.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <utility>

namespace simt {
namespace {

constexpr std::size_t kMostFindings = 20;

std::string output_of(const std::string& command) {
  std::string output;
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[4096];
  while (const std::size_t bytes = std::fread(buffer, 1, sizeof(buffer), pipe)) output.append(buffer, bytes);
  pclose(pipe);
  return output;
}

// addr2line's answer for an address of a loaded module; `options` as on its command line.
std::string addr2line(const char* options, const void* address) {
  Dl_info info;
  link_map* module = nullptr;
  if (dladdr1(address, &info, reinterpret_cast<void**>(&module), RTLD_DL_LINKMAP) == 0) return "";
  const auto offset = reinterpret_cast<std::uintptr_t>(address) - module->l_addr;
  char hex[32];
  std::snprintf(hex, sizeof(hex), " %#zx", static_cast<std::size_t>(offset));
  const bool is_program = module->l_name[0] == '\0';
  const std::string file = is_program ? std::filesystem::read_symlink("/proc/self/exe").string() : module->l_name;
  return output_of(std::string("addr2line ") + options + " -e '" + file + "'" + hex + " 2>/dev/null");
}

}  // namespace

bool Findings::is_new(Defect defect, Site site, Site other) {
  return texts_.size() < kMostFindings && seen_.insert({defect, site, other}).second;
}

std::vector<std::string> Findings::take() {
  seen_.clear();
  return std::exchange(texts_, {});
}

std::string source_lines(Site site) {
  static auto& known = *new std::map<Site, std::string>;
  const auto [entry, inserted] = known.try_emplace(site);
  if (!inserted) return entry->second;
  // One byte back: a return address may be the first of the next line.
  std::string& lines = entry->second = addr2line("-i", static_cast<const char*>(site) - 1);
  // Discriminators tell copies of one line apart, which is not what is asked here.
  for (std::size_t begin; (begin = lines.find(" (discriminator")) != std::string::npos;) {
    lines.erase(begin, lines.find('\n', begin) - begin);
  }
  return lines;
}

std::string source_line(Site site) {
  if (site == nullptr) return "?";
  const std::string lines = source_lines(site);
  std::string line = "?";
  for (std::size_t begin = 0, end; (end = lines.find('\n', begin)) != std::string::npos; begin = end + 1) {
    line = lines.substr(begin, end - begin);
    if (line.find("/simt/include/") == std::string::npos) break;
  }
  return line;
}

std::string function_name(const void* function) {
  const std::string output = addr2line("-f -C", function);
  return output.substr(0, output.find('\n'));
}

}  // namespace simt
