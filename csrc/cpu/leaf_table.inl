// All leaves of an instruction set. The large ones are compiled in files of their own, several at a time.

#include "channels.inl"
#include "sample.inl"

void add_reduce_segments(LeafTable& table);
void add_reduce_columns(LeafTable& table);
void add_map_segments(LeafTable& table);
void add_map_columns(LeafTable& table);

LeafTable leaf_table() {
  LeafTable table = {};
  add_reduce_segments(table);
  add_reduce_columns(table);
  add_map_segments(table);
  add_map_columns(table);
  table.sample[static_cast<int>(DType::kFloat32)] = &sample<float, float>;
  table.sample[static_cast<int>(DType::kFloat16)] = &sample<Half, float>;
  table.sample[static_cast<int>(DType::kBFloat16)] = &sample<BFloat16, float>;
  table.sample[static_cast<int>(DType::kFloat64)] = &sample<double, double>;
  table.narrow = &narrow_coefficients;
  table.training = kChannelLeaves<TrainingForwardOp>;
  table.evaluation = kChannelLeaves<EvalForwardOp>;
  table.backward = kChannelLeaves<BackwardOp>;
  return table;
}
