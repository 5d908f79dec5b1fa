// Control of the emulated device: what the tests call, beside the CUDA host API, which keeps its own names.
//
// Kernels run on the calling thread, within the call that launches them; only one host thread may call at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// An H100's, but for the number of SMs: small grids should fill the device. host_api.cpp has the other limits.
struct DeviceLimits {
  int sms = 4;
  int cooperative_sms = 1 << 30;  // what a cooperative launch gets of them: fewer where others share the device
};
void set_device(const DeviceLimits& limits);

struct Options {
  std::uint64_t seed = 0;  // of the order in which blocks and threads run
  bool check = true;
  bool count_requests = false;  // while checking; it takes long
};
void set_options(const Options& options);

enum class Access { kRead, kReadWrite, kUninitialised };

// Memory that kernels may use. kUninitialised is kReadWrite whose bytes must be written before they are read.
// Registering the same range anew replaces it; one that overlaps another is refused by std::invalid_argument.
void register_buffer(const void* data, std::size_t bytes, const char* name, Access access);
void unregister_buffer(const void* data);
void unregister_all();

// Bytes that no kernel has written since a buffer was registered as kUninitialised.
std::size_t unwritten_bytes(const void* data);

// The findings since the last call. A launch that adds one returns cudaErrorLaunchFailure.
std::vector<std::string> take_errors();

// Counts since the last take_counters(). Bytes are counted only while checking, those of atomics not at all.
struct Counters {
  std::uint64_t launches = 0;
  std::uint64_t global_load_bytes = 0;
  std::uint64_t global_store_bytes = 0;
  // Accesses of 16 bytes by one lane, and what the memory system makes of those of a warp (requests.h).
  std::uint64_t global_vectors = 0;
  std::uint64_t global_sectors = 0;
  std::uint64_t shared_vectors = 0;
  std::uint64_t shared_wavefronts = 0;
};
Counters take_counters();

}  // namespace simt
