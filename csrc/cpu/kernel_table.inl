// The kernel table of an instruction set. The microkernels are compiled in files of their own, in parallel.

#include "channel_kernels.inl"
#include "sample.inl"

void add_reduce_segments(KernelTable& table);
void add_reduce_columns(KernelTable& table);
void add_map_segments(KernelTable& table);
void add_map_columns(KernelTable& table);

KernelTable kernel_table() {
  KernelTable table = {};
  add_reduce_segments(table);
  add_reduce_columns(table);
  add_map_segments(table);
  add_map_columns(table);
  table.sample[static_cast<int>(DType::kFloat32)] = &sample<float, float>;
  table.sample[static_cast<int>(DType::kFloat16)] = &sample<Half, float>;
  table.sample[static_cast<int>(DType::kBFloat16)] = &sample<BFloat16, float>;
  table.sample[static_cast<int>(DType::kFloat64)] = &sample<double, double>;
  table.narrow = &narrow_coefficients;
  table.training = kChannelKernels<TrainingForwardOp>;
  table.evaluation = kChannelKernels<EvalForwardOp>;
  table.backward = kChannelKernels<BackwardOp>;
  return table;
}
