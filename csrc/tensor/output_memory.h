// Tensors for outputs on the CPU, in memory from cpu/output_pool.h and cpu/huge_page_cache.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace bnext {

// An empty CPU tensor of the shape and dtype of `like`.
at::Tensor empty_output(const at::Tensor& like, at::MemoryFormat format);

}  // namespace bnext
