// Half of the backward kernels, in a translation unit of their own because they take a minute to compile.
#include "launch.cuh"

namespace bnext::cuda {

template cudaError_t launch_dtype<ActivatedGradSums, ActivatedGrad>(const KernelArgs&, const BackwardOp&, cudaStream_t);

}  // namespace bnext::cuda
