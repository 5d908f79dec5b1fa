// The memory that kernels may use, and for each piece of it what was last done there by whom.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>

#include "emulator.h"
#include "knowledge.h"

namespace simt {

// One access: 0 as `thread` means none, so that fresh pages are valid shadow.
struct Record {
  std::uint64_t thread : 24;  // 1 + its number in the launch
  std::uint64_t tick : 40;
  std::uint64_t site : 48;
  std::uint64_t atomic : 1;
  std::uint64_t in_flight : 1;  // a write that an asynchronous copy has yet to do
};
constexpr std::uint64_t kMaxThreads = (1u << 24) - 1;

constexpr int kReads = 3;
struct alignas(64) Cell {
  Record write;
  Record reads[kReads];  // of all readers since the write, those that matter (see note_read)
};

// The cells of a range of bytes. A cell stands for as many bytes as the smallest access so far touched, since
// neighbours that different threads write are no race: 16 to begin with, and cells are split when a smaller access
// comes.
class Shadow {
 public:
  explicit Shadow(std::size_t bytes);
  ~Shadow();
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;

  struct Span {
    Cell* begin;
    Cell* end;
  };
  Span cells(std::size_t offset, std::size_t bytes) {
    if (((offset | bytes) & (granule_ - 1)) != 0) split(offset | bytes);
    return {cells_ + offset / granule_, cells_ + (offset + bytes) / granule_};
  }
  std::size_t unwritten_bytes() const;

 private:
  void split(std::size_t multiple);
  std::size_t count() const { return (bytes_ + granule_ - 1) / granule_; }

  std::size_t bytes_;
  std::size_t granule_ = 16;
  Cell* cells_;
};

struct Region {
  Region(const void* data, std::size_t bytes, std::string name, Access access, bool shared)
      : begin(reinterpret_cast<std::uintptr_t>(data)),
        bytes(bytes),
        name(std::move(name)),
        access(access),
        shared(shared),
        shadow(bytes) {}

  bool contains(std::uintptr_t address) const { return address - begin < bytes; }

  std::uintptr_t begin;
  std::size_t bytes;
  std::string name;
  Access access;
  bool shared;
  Shadow shadow;
  std::unordered_map<std::uintptr_t, KnowledgePtr> released;  // by address: what an acquire there learns
};

// The registered buffers of global memory.
class GlobalMemory {
 public:
  void add(const void* data, std::size_t bytes, const char* name, Access access);
  void remove(const void* data);
  void clear();

  Region* find(std::uintptr_t address);  // null outside of all
  Region& at(const void* data);          // the buffer that begins there
  // Launches follow one another: nothing is left to synchronise with.
  void forget_releases();

 private:
  std::map<std::uintptr_t, Region> regions_;  // by address
  Region* last_ = nullptr;
};

// Constants that the compiler put into a loaded module.
bool is_constant_data(std::uintptr_t address, std::size_t bytes);

}  // namespace simt
