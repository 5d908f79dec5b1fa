#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/Exception.h>

#include <cmath>

namespace bnext {
namespace {

using at::Tensor;
using std::optional;

void check_updated(const char* name, const optional<Tensor>& tensor, const Tensor& input) {
  if (!is_given(tensor)) return;
  check_channels(name, *tensor, input);
  TORCH_CHECK(at::has_internal_overlap(*tensor) != at::MemOverlap::Yes, "batch_norm: expected ", name,
              " to have memory of its own for each channel, since it is updated in place, but got strides ",
              tensor->strides(), " (an expanded tensor?)");
}

void check_counter(const optional<Tensor>& counter, const Tensor& input) {
  if (!is_given(counter)) return;
  TORCH_CHECK(counter->device() == input.device(), "batch_norm: expected num_batches_tracked on the device of input, ",
              input.device(), ", but got ", counter->device());
  TORCH_CHECK(counter->layout() == at::kStrided, "batch_norm: expected num_batches_tracked to be strided, but got ",
              counter->layout());
  TORCH_CHECK_TYPE(counter->scalar_type() == at::kLong,
                   "batch_norm: expected num_batches_tracked to be int64, but got ", counter->scalar_type());
  TORCH_CHECK_VALUE(counter->numel() == 1, "batch_norm: expected num_batches_tracked to hold 1 element, but got ",
                    size_of(*counter));
}

}  // namespace

std::string size_of(const Tensor& tensor) { return c10::str("torch.Size(", tensor.sizes(), ")"); }

// As Python prints it, so that the messages equal torch's own.
std::string python_float(double value) {
  if (std::isnan(value)) return "nan";
  const bool whole = std::isfinite(value) && value == std::floor(value) && std::fabs(value) < 1e16;
  return whole ? c10::str(static_cast<std::int64_t>(value), ".0") : c10::str(value);
}

std::vector<std::int64_t> stats_sizes(const Tensor& input, std::int64_t virtual_batch_size) {
  const std::int64_t N = input.size(0), C = input.size(1);
  if (virtual_batch_size == 0) return {2, C};
  return {number_of_parts(N, virtual_batch_size), 2, C};
}

// For an argument that is `Tensor` in the schema, not `Tensor?`, torch turns None into an undefined tensor.
void check_given(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), "batch_norm: expected ", name, " to be a tensor, but got None");
}

void check_data(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() >= 2, "batch_norm: expected ", name,
                    " to have at least 2 dimensions (N, C, ...), but got ", size_of(tensor));
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
                   "batch_norm: expected ", name, " to be float32, float64, float16 or bfloat16, but got ", type);
}

// A parameter or running statistic of `input`.
void check_channels(const char* name, const Tensor& tensor, const Tensor& input) {
  const std::int64_t C = input.size(1);
  check_given(name, tensor);
  TORCH_CHECK(tensor.device() == input.device(), "batch_norm: expected ", name, " on the device of input, ",
              input.device(), ", but got ", tensor.device());
  TORCH_CHECK(tensor.layout() == at::kStrided, "batch_norm: expected ", name, " to be strided, but got ",
              tensor.layout());
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == input.scalar_type(), "batch_norm: expected ", name,
                   " to be float32 or of input's dtype, ", input.scalar_type(), ", but got ", type);
  TORCH_CHECK(tensor.numel() == C, name, " should contain ", C, " elements not ", tensor.numel(),
              " (one for each channel of input, ", size_of(input), ")");
}

void check_channels(const char* name, const optional<Tensor>& tensor, const Tensor& input) {
  if (is_given(tensor)) check_channels(name, *tensor, input);
}

void check_running(const optional<Tensor>& mean, const optional<Tensor>& var, const optional<Tensor>& counter,
                   optional<double> momentum, const Tensor& input) {
  check_updated("running_mean", mean, input);
  check_updated("running_var", var, input);
  check_counter(counter, input);
  TORCH_CHECK_VALUE(
      momentum.has_value() || is_given(counter) || !(is_given(mean) || is_given(var)),
      "batch_norm: expected num_batches_tracked with momentum=None, the cumulative average, but got None");
}

// A tensor with the shape, dtype and device of `like`: of the input, or of grad_output where there is no input.
void check_alongside(const char* name, const optional<Tensor>& tensor, const char* like_name, const Tensor& like) {
  if (!is_given(tensor)) return;
  TORCH_CHECK(tensor->device() == like.device(), "batch_norm: expected ", name, " on the device of ", like_name, ", ",
              like.device(), ", but got ", tensor->device());
  TORCH_CHECK(tensor->layout() == at::kStrided, "batch_norm: expected ", name, " to be strided, but got ",
              tensor->layout());
  TORCH_CHECK_TYPE(tensor->scalar_type() == like.scalar_type(), "batch_norm: expected ", name, " to be of ", like_name,
                   "'s dtype, ", like.scalar_type(), ", but got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->sizes() == like.sizes(), "batch_norm: expected ", name, " to have ", like_name,
                    "'s shape, ", size_of(like), ", but got ", size_of(*tensor));
}

// The arguments of a forward call's epilogue.
void check_epilogue(const Tensor& input, const optional<Tensor>& residual, const Activation& activation,
                    bool with_mask) {
  check_alongside("residual", residual, "input", input);
  TORCH_CHECK_VALUE(!with_mask || activation.rectifies(),
                    "batch_norm: expected with_mask=False, since only relu, relu6 and leaky_relu have a mask");
}

void check_valid(const optional<Tensor>& valid, const char* like_name, const Tensor& like) {
  if (!is_given(valid)) return;
  TORCH_CHECK(valid->device() == like.device(), "batch_norm: expected valid on the device of ", like_name, ", ",
              like.device(), ", but got ", valid->device());
  TORCH_CHECK(valid->layout() == at::kStrided, "batch_norm: expected valid to be strided, but got ", valid->layout());
  TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, "batch_norm: expected valid to be bool, but got ",
                   valid->scalar_type());
  std::vector<std::int64_t> sizes = like.sizes().vec();
  sizes.erase(sizes.begin() + 1);
  TORCH_CHECK_VALUE(valid->sizes() == at::IntArrayRef(sizes), "batch_norm: expected valid to have the shape of ",
                    like_name, " without its channels, torch.Size(", at::IntArrayRef(sizes), "), but got ",
                    size_of(*valid));
}

void check_virtual_batch_size(std::int64_t virtual_batch_size) {
  TORCH_CHECK_VALUE(virtual_batch_size >= 0,
                    "batch_norm: expected virtual_batch_size to be positive, or 0 for the whole batch, but got ",
                    virtual_batch_size);
}

void check_save_stats(const Tensor& save_stats, const char* like_name, const Tensor& like,
                      std::int64_t virtual_batch_size) {
  check_given("save_stats", save_stats);
  TORCH_CHECK(save_stats.device() == like.device(), "batch_norm: expected save_stats on the device of ", like_name,
              ", ", like.device(), ", but got ", save_stats.device());
  TORCH_CHECK_TYPE(save_stats.scalar_type() == at::kDouble, "batch_norm: expected save_stats to be float64, but got ",
                   save_stats.scalar_type());
  const std::vector<std::int64_t> sizes = stats_sizes(like, virtual_batch_size);
  TORCH_CHECK_VALUE(save_stats.sizes() == at::IntArrayRef(sizes), "batch_norm: expected save_stats to have shape ",
                    "torch.Size(", at::IntArrayRef(sizes), "), but got ", size_of(save_stats));
}

void check_eps(double eps) {
  TORCH_CHECK_VALUE(!(eps <= 0.0), "batch_norm eps must be positive during training, but got ", python_float(eps));
}

void check_training(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                    const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
                    const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
                    const optional<Tensor>& residual, const Activation& activation, bool with_mask,
                    const optional<Tensor>& valid) {
  check_data("input", input);
  check_valid(valid, "input", input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_running(running_mean, running_var, num_batches_tracked, momentum, input);
  check_epilogue(input, residual, activation, with_mask);
  check_eps(eps);
}

Activation parse_activation(std::string_view act, double slope) {
  for (const auto& each : kActs) {
    if (act == each.name) return {each.act, slope};
  }
  std::string known;
  for (const auto& each : kActs) known += std::string(known.empty() ? "" : ", ") + each.name;
  TORCH_CHECK_VALUE(false, "batch_norm: expected act to be one of ", known, ", but got ", std::string(act));
}

std::string_view activation_name(Act act) {
  for (const auto& each : kActs) {
    if (act == each.act) return each.name;
  }
  TORCH_INTERNAL_ASSERT(false, "an activation without a name");
}

}  // namespace bnext
