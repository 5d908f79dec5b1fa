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
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const auto overlaps = [&](const std::unique_ptr<Region>& region) {
    return begin < region->begin + region->bytes && region->begin < begin + bytes;
  };
  const auto old = std::find_if(regions_.begin(), regions_.end(), overlaps);
  if (old != regions_.end()) {
    if ((*old)->begin != begin || (*old)->bytes != bytes) {
      throw std::invalid_argument(std::string("buffer '") + name + "' overlaps '" + (*old)->name + "'");
    }
    regions_.erase(old);
  }
  auto region = std::make_unique<Region>(data, bytes, name, access, false);
  const auto position = std::find_if(regions_.begin(), regions_.end(), [&](const auto& r) { return r->begin > begin; });
  regions_.insert(position, std::move(region));
  last_ = nullptr;
}

void GlobalMemory::remove(const void* data) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  std::erase_if(regions_, [&](const auto& region) { return region->begin == begin; });
  last_ = nullptr;
}

void GlobalMemory::clear() {
  regions_.clear();
  last_ = nullptr;
}

Region* GlobalMemory::find(std::uintptr_t address) {
  if (last_ != nullptr && last_->contains(address)) return last_;
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                      [](std::uintptr_t wanted, const auto& region) { return wanted < region->begin; });
  if (after == regions_.begin()) return nullptr;
  Region* const region = std::prev(after)->get();
  if (!region->contains(address)) return nullptr;
  return last_ = region;
}

void GlobalMemory::forget_sync_points() {
  for (auto& region : regions_) region->sync_points.clear();
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
