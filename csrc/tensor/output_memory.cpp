#include "output_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include "../cpu/huge_page_cache.h"

namespace bnext {
namespace {

class HugePageAllocator final : public c10::Allocator {
 public:
  // A storage that is resized asks its allocator again, for any size.
  c10::DataPtr allocate(std::size_t bytes) override {
    void* const block = bytes >= cpu::kMinCachedBytes ? cpu::allocate_block(bytes) : nullptr;
    if (block == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &give_back, at::kCPU};
  }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

 private:
  static void give_back(void* block) {
    c10::profiledCPUMemoryReporter().Delete(block);
    cpu::release_block(block);
  }
};

}  // namespace

at::Tensor empty_output(const at::Tensor& like, at::MemoryFormat format) {
  if (like.nbytes() < cpu::kMinCachedBytes) return at::empty_like(like, like.options(), format);
  static HugePageAllocator* const allocator = new HugePageAllocator;  // outlives every tensor
  return at::detail::empty_generic(like.sizes(), allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   like.scalar_type(), format);
}

}  // namespace bnext
