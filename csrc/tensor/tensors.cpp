#include "tensors.h"

#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

#include <utility>

#include "../common/mask.h"
#include "checks.h"

namespace bnext {
namespace {

using at::Tensor;
using std::optional;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", tensor.scalar_type());
  }
}

// Autograd does not see what the kernels write. Tensors made in inference mode have no version.
void bump_version(const optional<Tensor>& tensor) {
  if (is_given(tensor) && !tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
}

// The kernels write to dense memory; a strided statistic is updated through a copy.
void write_back(const optional<Tensor>& tensor, const optional<Tensor>& dense) {
  if (!is_given(tensor)) return;
  if (!tensor->is_same(*dense)) tensor->copy_(*dense);
  bump_version(tensor);
}

}  // namespace

at::MemoryFormat format_of(const Tensor& tensor) {
  const auto suggested = tensor.suggest_memory_format();
  if (suggested != at::MemoryFormat::Contiguous || tensor.dim() < 4 || tensor.is_contiguous()) return suggested;
  // suggest_memory_format may be misled by the stride of a dimension of size 1, which is_contiguous ignores.
  const auto last = tensor.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return tensor.dim() <= 5 && tensor.is_contiguous(last) ? last : suggested;
}

Geometry geometry_of(const Tensor& tensor, at::MemoryFormat format, const optional<Tensor>& valid,
                     std::int64_t virtual_batch_size) {
  Problem problem;
  problem.N = tensor.size(0);
  problem.C = tensor.size(1);
  problem.HW = 1;
  for (std::int64_t d = 2; d < tensor.dim(); ++d) problem.HW *= tensor.size(d);
  problem.dtype = dtype_of(tensor);
  // With one spatial position the two layouts coincide, and channels last has the longer rows.
  problem.layout =
      format == at::MemoryFormat::Contiguous && problem.HW != 1 ? Layout::kChannelsFirst : Layout::kChannelsLast;
  problem.virtual_batch = virtual_batch_size;
  if (!is_given(valid)) return {format, problem, {}};
  Tensor dense_valid = valid->contiguous();
  problem.valid = reinterpret_cast<const std::uint8_t*>(dense_valid.const_data_ptr<bool>());
  return {format, problem, std::move(dense_valid)};
}

// An empty result gets the strides of `like`, which do not tell its memory format.
Tensor allocate_output(const Tensor& like, const Geometry& geometry, const Backend& backend, bool reduces) {
  const Problem& problem = geometry.problem;
  return problem.numel() == 0 ? at::empty_like(like) : backend.allocate_output(like, geometry.format, problem, reduces);
}

bool is_transposed_sequence(const Tensor& tensor) {
  if (tensor.dim() != 3 || tensor.is_contiguous() || tensor.numel() == 0) return false;
  const std::int64_t C = tensor.size(1), L = tensor.size(2);
  return tensor.stride(1) == 1 && tensor.stride(2) == C && (tensor.size(0) == 1 || tensor.stride(0) == C * L);
}

optional<Tensor> as_images(const optional<Tensor>& sequences) {
  return is_given(sequences) ? optional<Tensor>(as_images(*sequences)) : std::nullopt;
}

optional<Tensor> valid_of_images(const optional<Tensor>& valid_of_sequences) {
  return is_given(valid_of_sequences) ? optional<Tensor>(valid_of_sequences->unsqueeze(1)) : std::nullopt;
}

std::vector<std::int64_t> mask_sizes(const Problem& problem, const Backend& backend) {
  const std::int64_t bytes = mask_row_bytes(mask_row_elements(problem), backend.mask_lanes(problem.dtype));
  if (problem.layout == Layout::kChannelsFirst) return {problem.N, problem.C, bytes};
  return {problem.count(), bytes};
}

Tensor kernel_input(const Tensor& tensor, at::MemoryFormat format, const Backend& backend) {
  Tensor dense = tensor.contiguous(format);
  const auto address = reinterpret_cast<std::uintptr_t>(dense.const_data_ptr());
  return address % backend.alignment() == 0 ? dense : dense.clone(format);
}

ChannelVector channels(const optional<Tensor>& dense) {
  return is_given(dense) ? ChannelVector{dense->const_data_ptr(), dtype_of(*dense)} : ChannelVector{};
}

MutableChannelVector mutable_channels(const optional<Tensor>& dense) {
  return is_given(dense) ? MutableChannelVector{dense->mutable_data_ptr(), dtype_of(*dense)} : MutableChannelVector{};
}

optional<Tensor> densely(const optional<Tensor>& tensor) {
  return is_given(tensor) ? optional<Tensor>(tensor->contiguous()) : std::nullopt;
}

bool runs_in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

RunningTensors::RunningTensors(const optional<Tensor>& mean, const optional<Tensor>& var,
                               const optional<Tensor>& counter)
    : mean_(mean), var_(var), counter_(counter), dense_mean_(densely(mean)), dense_var_(densely(var)) {}

std::int64_t* RunningTensors::counter() const {
  return is_given(counter_) ? counter_->mutable_data_ptr<std::int64_t>() : nullptr;
}

Running RunningTensors::pointers(optional<double> momentum) const {
  return {.mean = mutable_channels(dense_mean_),
          .var = mutable_channels(dense_var_),
          .num_batches_tracked = counter(),
          .cumulative = !momentum.has_value(),
          .momentum = momentum.value_or(0.0)};
}

void RunningTensors::counted() const { bump_version(counter_); }

void RunningTensors::updated() const {
  counted();
  write_back(mean_, dense_mean_);
  write_back(var_, dense_var_);
}

}  // namespace bnext
