#include "emulator.h"

#include <utility>

#include "machine.h"

namespace simt {

Device& device() {
  static Device& device = *new Device;
  return device;
}

void set_device(const DeviceLimits& limits) { device().limits = limits; }
void set_options(const Options& options) { device().options = options; }

void register_buffer(const void* data, std::size_t bytes, const char* name, Access access) {
  device().memory.add(data, bytes, name, access);
}
void unregister_buffer(const void* data) { device().memory.remove(data); }
void unregister_all() { device().memory.clear(); }

std::size_t unwritten_bytes(const void* data) { return device().memory.at(data).shadow.unwritten_bytes(); }
std::vector<std::string> take_errors() { return device().findings.take(); }
Counters take_counters() { return std::exchange(device().counters, {}); }

}  // namespace simt
