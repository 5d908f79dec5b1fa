// Instantiates a microkernel for every dtype, compute type and functor. Only the files of microkernels include this.
#pragma once

template <typename Kernel, typename scalar_t, typename acc_t>
void fill_ops(ReduceKernel (&ops)[kReduceOps]) {
  ops[static_cast<int>(ReduceOp::kMomentSums)] = &run_specialized<Kernel, scalar_t, acc_t, MomentSums, ReduceArgs>;
  ops[static_cast<int>(ReduceOp::kGradSums)] = &run_specialized<Kernel, scalar_t, acc_t, GradSums, ReduceArgs>;
  ops[static_cast<int>(ReduceOp::kBiasGradSum)] = &run_specialized<Kernel, scalar_t, acc_t, BiasGradSum, ReduceArgs>;
  ops[static_cast<int>(ReduceOp::kActivatedGradSums)] =
      &run_specialized<Kernel, scalar_t, acc_t, ActivatedGradSums, ReduceArgs>;
}

template <typename Kernel, typename scalar_t, typename acc_t>
void fill_ops(MapKernel (&ops)[kMapOps]) {
  ops[static_cast<int>(MapOp::kNormalize)] = &run_specialized<Kernel, scalar_t, acc_t, Normalize, MapArgs>;
  ops[static_cast<int>(MapOp::kGradInput)] = &run_specialized<Kernel, scalar_t, acc_t, GradInput, MapArgs>;
  ops[static_cast<int>(MapOp::kScaleGrad)] = &run_specialized<Kernel, scalar_t, acc_t, ScaleGrad, MapArgs>;
  ops[static_cast<int>(MapOp::kActivatedNormalize)] =
      &run_specialized<Kernel, scalar_t, acc_t, ActivatedNormalize, MapArgs>;
  ops[static_cast<int>(MapOp::kActivatedGrad)] = &run_specialized<Kernel, scalar_t, acc_t, ActivatedGrad, MapArgs>;
}

template <typename Kernel, typename Entry, int kOps>
void fill(Entry (&table)[kDTypes][kComputes][kOps]) {
  const auto of = [&](DType dtype, Compute compute) -> Entry(&)[kOps] {
    return table[static_cast<int>(dtype)][static_cast<int>(compute)];
  };
  fill_ops<Kernel, float, float>(of(DType::kFloat32, Compute::kFloat32));
  fill_ops<Kernel, float, double>(of(DType::kFloat32, Compute::kFloat64));
  fill_ops<Kernel, Half, float>(of(DType::kFloat16, Compute::kFloat32));
  fill_ops<Kernel, Half, double>(of(DType::kFloat16, Compute::kFloat64));
  fill_ops<Kernel, BFloat16, float>(of(DType::kBFloat16, Compute::kFloat32));
  fill_ops<Kernel, BFloat16, double>(of(DType::kBFloat16, Compute::kFloat64));
  fill_ops<Kernel, double, double>(of(DType::kFloat64, Compute::kFloat64));
}
