#include "emulator.h"

#include <mutex>
#include <utility>

#include "checker.h"
#include "host_lock.h"

namespace simt {

Device& device() {
  static Device& device = *new Device;
  return device;
}

std::recursive_mutex& host_mutex() {
  static std::recursive_mutex& mutex = *new std::recursive_mutex;
  return mutex;
}

void set_device(const DeviceLimits& limits) {
  const HostLock lock;
  device().limits = limits;
}

void set_options(const Options& options) {
  const HostLock lock;
  device().options = options;
}

void register_buffer(const void* data, std::size_t bytes, const char* name, Access access) {
  const HostLock lock;
  device().memory.add(data, bytes, name, access);
}

void unregister_buffer(const void* data) {
  const HostLock lock;
  device().memory.remove(data);
}

void unregister_all() {
  const HostLock lock;
  device().memory.clear();
}

std::size_t unwritten_bytes(const void* data) {
  const HostLock lock;
  return device().memory.at(data).shadow.unwritten_bytes();
}

Traffic buffer_traffic(const void* data) {
  const HostLock lock;
  return device().memory.at(data).traffic;
}

std::vector<std::string> take_errors() {
  const HostLock lock;
  return device().findings.take();
}

Counters take_counters() {
  const HostLock lock;
  return std::exchange(device().counters, {});
}

}  // namespace simt
