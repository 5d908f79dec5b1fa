#include "backend.h"

namespace bnext {

const Backend& backend_of(const at::Tensor& tensor) {
#if defined(BNEXT_CUDA)
  if (tensor.is_cuda()) return cuda_backend();
#endif
  (void)tensor;
  return cpu_backend();
}

}  // namespace bnext
