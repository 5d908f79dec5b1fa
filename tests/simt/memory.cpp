#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <new>
#include <stdexcept>

namespace simt {
namespace {

// Pages of zeros that cost nothing until they are touched.
Cell* allocate_cells(std::size_t count) {
  if (count == 0) return nullptr;
  void* const mapping =
      mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  return static_cast<Cell*>(mapping);
}

void free_cells(Cell* cells, std::size_t count) {
  if (cells != nullptr) munmap(cells, count * sizeof(Cell));
}

bool is_untouched(const Cell& cell) { return cell.write.thread == 0 && cell.reads[0].thread == 0; }

}  // namespace

Shadow::Shadow(std::size_t bytes) : bytes_(bytes), cells_(allocate_cells(count())) {}

Shadow::~Shadow() { free_cells(cells_, count()); }

void Shadow::split(std::size_t multiple) {
  const std::size_t old_granule = granule_;
  const std::size_t old_count = count();
  Cell* const old_cells = cells_;
  granule_ = std::size_t{1} << std::countr_zero(multiple);
  cells_ = allocate_cells(count());
  const std::size_t parts = old_granule / granule_;
  for (std::size_t i = 0; i < old_count; ++i) {
    if (is_untouched(old_cells[i])) continue;
    const std::size_t end = std::min((i + 1) * parts, count());
    std::fill(cells_ + i * parts, cells_ + end, old_cells[i]);
  }
  free_cells(old_cells, old_count);
}

std::size_t Shadow::unwritten_bytes() const {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < count(); ++i) {
    if (cells_[i].write.thread == 0) bytes += std::min(granule_, bytes_ - i * granule_);
  }
  return bytes;
}

void GlobalMemory::add(const void* data, std::size_t bytes, const char* name, Access access) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  for (const auto& [other, region] : regions_) {
    const bool overlaps = begin < other + region.bytes && other < begin + bytes;
    if (overlaps && (other != begin || region.bytes != bytes)) {
      throw std::invalid_argument(std::string("buffer '") + name + "' overlaps '" + region.name + "'");
    }
  }
  remove(data);
  regions_.try_emplace(begin, data, bytes, name, access, false);
}

void GlobalMemory::remove(const void* data) {
  regions_.erase(reinterpret_cast<std::uintptr_t>(data));
  last_ = nullptr;
}

void GlobalMemory::clear() {
  regions_.clear();
  last_ = nullptr;
}

Region* GlobalMemory::find(std::uintptr_t address) {
  if (last_ != nullptr && last_->contains(address)) return last_;
  const auto after = regions_.upper_bound(address);
  if (after == regions_.begin()) return nullptr;
  Region& region = std::prev(after)->second;
  return region.contains(address) ? last_ = &region : nullptr;
}

void GlobalMemory::forget_releases() {
  for (auto& [begin, region] : regions_) region.released.clear();
}

Region& GlobalMemory::at(const void* data) {
  Region* const region = find(reinterpret_cast<std::uintptr_t>(data));
  if (region == nullptr || region->begin != reinterpret_cast<std::uintptr_t>(data)) {
    throw std::invalid_argument("no buffer is registered at this address");
  }
  return *region;
}

bool is_constant_data(std::uintptr_t address, std::size_t bytes) {
  struct Query {
    std::uintptr_t begin;
    std::uintptr_t end;
  } query{address, address + bytes};
  const auto look = [](dl_phdr_info* module, std::size_t, void* opaque) {
    const Query& wanted = *static_cast<const Query*>(opaque);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const ElfW(Phdr) & segment = module->dlpi_phdr[i];
      const bool constant =
          (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0) || segment.p_type == PT_GNU_RELRO;
      const std::uintptr_t begin = module->dlpi_addr + segment.p_vaddr;
      if (constant && begin <= wanted.begin && wanted.end <= begin + segment.p_memsz) return 1;
    }
    return 0;
  };
  return dl_iterate_phdr(look, &query) != 0;
}

}  // namespace simt
