// One kind of leaf, instantiated for every dtype, compute type and functor. Included by the files of leaves alone.
#pragma once

template <typename Leaf, typename scalar_t, typename acc_t>
void fill_ops(ReduceLeaf (&ops)[kReduceOps]) {
  ops[static_cast<int>(ReduceOp::kMomentSums)] = &run_form<Leaf, scalar_t, acc_t, MomentSums, ReduceArgs>;
  ops[static_cast<int>(ReduceOp::kGradSums)] = &run_form<Leaf, scalar_t, acc_t, GradSums, ReduceArgs>;
  ops[static_cast<int>(ReduceOp::kBiasGradSum)] = &run_form<Leaf, scalar_t, acc_t, BiasGradSum, ReduceArgs>;
  ops[static_cast<int>(ReduceOp::kActivatedGradSums)] = &run_form<Leaf, scalar_t, acc_t, ActivatedGradSums, ReduceArgs>;
}

template <typename Leaf, typename scalar_t, typename acc_t>
void fill_ops(MapLeaf (&ops)[kMapOps]) {
  ops[static_cast<int>(MapOp::kNormalize)] = &run_form<Leaf, scalar_t, acc_t, Normalize, MapArgs>;
  ops[static_cast<int>(MapOp::kGradInput)] = &run_form<Leaf, scalar_t, acc_t, GradInput, MapArgs>;
  ops[static_cast<int>(MapOp::kScaleGrad)] = &run_form<Leaf, scalar_t, acc_t, ScaleGrad, MapArgs>;
  ops[static_cast<int>(MapOp::kActivatedNormalize)] = &run_form<Leaf, scalar_t, acc_t, ActivatedNormalize, MapArgs>;
  ops[static_cast<int>(MapOp::kActivatedGrad)] = &run_form<Leaf, scalar_t, acc_t, ActivatedGrad, MapArgs>;
}

template <typename Leaf, typename Entry, int kOps>
void fill(Entry (&table)[kDTypes][kComputes][kOps]) {
  const auto of = [&](DType dtype, Compute compute) -> Entry(&)[kOps] {
    return table[static_cast<int>(dtype)][static_cast<int>(compute)];
  };
  fill_ops<Leaf, float, float>(of(DType::kFloat32, Compute::kFloat32));
  fill_ops<Leaf, float, double>(of(DType::kFloat32, Compute::kFloat64));
  fill_ops<Leaf, Half, float>(of(DType::kFloat16, Compute::kFloat32));
  fill_ops<Leaf, Half, double>(of(DType::kFloat16, Compute::kFloat64));
  fill_ops<Leaf, BFloat16, float>(of(DType::kBFloat16, Compute::kFloat32));
  fill_ops<Leaf, BFloat16, double>(of(DType::kBFloat16, Compute::kFloat64));
  fill_ops<Leaf, double, double>(of(DType::kFloat64, Compute::kFloat64));
}
