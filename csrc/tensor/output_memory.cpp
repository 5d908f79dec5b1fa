#include "output_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include "../cpu/huge_page_cache.h"
#include "../cpu/output_pool.h"

namespace bnext {
namespace {

class OutputAllocator final : public c10::Allocator {
 public:
  // Called for any size: a storage that is resized asks its allocator again.
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes >= cpu::kMinCachedBytes) {
      if (void* const block = cpu::allocate_block(bytes)) return report(block, bytes, &give_back<cpu::release_block>);
    } else if (bytes >= cpu::kMinPooledBytes) {
      if (void* const piece = cpu::allocate_piece(bytes)) return report(piece, bytes, &give_back<cpu::release_piece>);
    }
    return c10::GetDefaultCPUAllocator()->allocate(bytes);
  }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

 private:
  static c10::DataPtr report(void* data, std::size_t bytes, c10::DeleterFnPtr deleter) {
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, deleter, at::kCPU};
  }

  template <void (*release)(void*)>
  static void give_back(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    release(data);
  }
};

}  // namespace

at::Tensor empty_output(const at::Tensor& like, at::MemoryFormat format) {
  if (like.nbytes() < cpu::kMinPooledBytes) return at::empty_like(like, like.options(), format);
  static OutputAllocator* const allocator = new OutputAllocator;  // outlives every tensor
  return at::detail::empty_generic(like.sizes(), allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   like.scalar_type(), format);
}

}  // namespace bnext
