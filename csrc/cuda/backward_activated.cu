// Half of backward.cu's kernels, in a file of their own: they take a minute to compile.
#include "launch.cuh"

namespace bnext::cuda {

template cudaError_t launch_dtype<ActivatedGradSums, ActivatedGrad>(const KernelArgs&, const BackwardOp&, cudaStream_t);

}  // namespace bnext::cuda
