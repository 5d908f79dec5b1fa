// One host thread at a time: torch runs backward passes on threads of its own.
#pragma once

#include <mutex>

namespace simt {

std::recursive_mutex& host_mutex();

class HostLock {
 public:
  HostLock() : lock_(host_mutex()) {}

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

}  // namespace simt
