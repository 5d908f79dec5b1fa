// The forward operators on tensors: arguments are checked, outputs allocated, and layout, dtype and device chosen here;
// the kernels get raw pointers.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "../common/mask.h"
#include "backend.h"
#include "checks.h"
#include "operators.h"
#include "tensors.h"

namespace bnext {
namespace {

using at::Tensor;
using std::optional;

Tensor allocate_mask(const Tensor& input, const Problem& problem, const Backend& backend, bool wanted) {
  const auto options = input.options().dtype(at::kByte);
  if (!wanted) return at::empty({0}, options);
  const auto sizes = mask_sizes(problem, backend);
  // No kernel writes a row's padding, but an operator's results must have the same bits at every call: hence zeros.
  const bool padded = mask_has_padding(mask_row_elements(problem), backend.mask_lanes(problem.dtype));
  return padded ? at::zeros(sizes, options) : at::empty(sizes, options);
}

// No result depends on the statistics of an empty input, but they must not be uninitialised memory.
Tensor allocate_stats(const Tensor& input, const Problem& problem) {
  const auto options = input.options().dtype(at::kDouble);
  const auto sizes = stats_sizes(input, problem.virtual_batch);
  return problem.numel() == 0 ? at::zeros(sizes, options) : at::empty(sizes, options);
}

// The outputs of a forward pass, and its arguments as the kernels read them: dense, in the input's memory format.
class ForwardTensors {
 public:
  ForwardTensors(const Tensor& input, const Geometry& geometry, const optional<Tensor>& weight,
                 const optional<Tensor>& bias, const optional<Tensor>& residual, const Activation& activation,
                 bool with_mask, bool reduces)
      : device_(input.device()),
        backend_(backend_of(input)),
        problem_(geometry.problem),
        activation_(activation),
        with_mask_(with_mask),
        output_(allocate_output(input, geometry, backend_, reduces)),
        stats_(allocate_stats(input, problem_)),
        mask_(allocate_mask(input, problem_, backend_, with_mask)) {
    if (empty()) return;
    input_ = kernel_input(input, geometry.format, backend_);
    if (is_given(residual)) residual_ = kernel_input(*residual, geometry.format, backend_);
    weight_ = densely(weight);
    bias_ = densely(bias);
  }

  bool empty() const { return problem_.numel() == 0; }
  const Backend& backend() const { return backend_; }

  // Runs a TrainingForward or an EvalForward, in which the caller has set what the other does not have.
  template <typename Forward>
  void run(Forward args) {
    auto* stats = stats_.mutable_data_ptr<double>();
    args.input = input_.const_data_ptr();
    args.weight = channels(weight_);
    args.bias = channels(bias_);
    args.output = output_.mutable_data_ptr();
    args.save_mean = stats;
    args.save_invstd = stats + problem_.C;
    args.epilogue = {activation_, residual_.defined() ? residual_.const_data_ptr() : nullptr,
                     with_mask_ ? mask_.mutable_data_ptr<std::uint8_t>() : nullptr};
    backend_.run(problem_, args, device_);
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {output_, stats_, mask_}; }

 private:
  const at::Device device_;
  const Backend& backend_;
  const Problem problem_;
  const Activation activation_;
  const bool with_mask_;
  Tensor output_;
  Tensor stats_;
  Tensor mask_;
  Tensor input_;
  Tensor residual_;
  optional<Tensor> weight_;
  optional<Tensor> bias_;
};

// The results of a call on images, for the sequences that the images stand for (see as_images).
std::tuple<Tensor, Tensor, Tensor> of_sequences(std::tuple<Tensor, Tensor, Tensor> results) {
  std::get<0>(results) = as_sequences(std::get<0>(results));
  return results;
}

// Normalises by known statistics.
std::tuple<Tensor, Tensor, Tensor> normalize_by(const EvalForward& stats, const Tensor& input,
                                                const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                const optional<Tensor>& residual, const Activation& activation,
                                                bool with_mask, const optional<Tensor>& valid,
                                                std::int64_t virtual_batch_size = 0) {
  const Geometry geometry = geometry_of(input, format_of(input), valid, virtual_batch_size);
  ForwardTensors tensors(input, geometry, weight, bias, residual, activation, with_mask, /*reduces=*/false);
  if (!tensors.empty()) tensors.run(stats);
  return tensors.results();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& input, const optional<Tensor>& weight,
                                                    const optional<Tensor>& bias, const optional<Tensor>& running_mean,
                                                    const optional<Tensor>& running_var,
                                                    const optional<Tensor>& num_batches_tracked,
                                                    optional<double> momentum, double eps,
                                                    const optional<Tensor>& residual, std::string_view act,
                                                    double slope, bool with_mask, const optional<Tensor>& valid,
                                                    std::int64_t virtual_batch_size, bool update_in_backward) {
  const Activation activation = parse_activation(act, slope);
  check_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                 activation, with_mask, valid);
  check_virtual_batch_size(virtual_batch_size);
  if (is_transposed_sequence(input)) {
    return of_sequences(batch_norm_train(as_images(input), weight, bias, running_mean, running_var, num_batches_tracked,
                                         momentum, eps, as_images(residual), act, slope, with_mask,
                                         valid_of_images(valid), virtual_batch_size, update_in_backward));
  }
  const Geometry geometry = geometry_of(input, format_of(input), valid, virtual_batch_size);
  const Problem& problem = geometry.problem;
  TORCH_CHECK_VALUE(problem.count() != 1, "Expected more than 1 value per channel when training, got input size ",
                    size_of(input));
  // No part is smaller than the last.
  const std::int64_t last_part = problem.N - (problem.parts() - 1) * problem.virtual_batch;
  TORCH_CHECK_VALUE(last_part * problem.HW != 1,
                    "Expected more than 1 value per channel when training, in each part of virtual_batch_size=",
                    virtual_batch_size, ", got input size ", size_of(input));

  ForwardTensors tensors(input, geometry, weight, bias, residual, activation, with_mask, /*reduces=*/true);
  if (!update_in_backward && runs_in_backward()) {
    if (!tensors.empty()) tensors.run(TrainingForward{.eps = eps});
    return tensors.results();
  }
  const RunningTensors running(running_mean, running_var, num_batches_tracked);
  if (tensors.empty()) {
    if (running.counter() != nullptr) tensors.backend().count_batch(running.counter(), input.device());
    running.counted();
  } else {
    tensors.run(TrainingForward{.running = running.pointers(momentum), .eps = eps});
    running.updated();
  }
  return tensors.results();
}

Tensor batch_norm_stats(const Tensor& input, double eps, const optional<Tensor>& valid) {
  check_data("input", input);
  check_valid(valid, "input", input);
  check_eps(eps);
  if (is_transposed_sequence(input)) return batch_norm_stats(as_images(input), eps, valid_of_images(valid));
  const Geometry geometry = geometry_of(input, format_of(input), valid);
  const Problem& problem = geometry.problem;
  Tensor stats = at::empty({2 * problem.C + 1}, input.options().dtype(at::kDouble));
  if (problem.numel() == 0) return stats.zero_();
  const bool counts = problem.valid != nullptr;
  if (!counts) stats.select(0, 2 * problem.C).fill_(static_cast<double>(problem.count()));
  const Backend& backend = backend_of(input);
  const Tensor dense_input = kernel_input(input, geometry.format, backend);
  auto* means = stats.mutable_data_ptr<double>();
  backend.run(problem,
              TrainingForward{.input = dense_input.const_data_ptr(),
                              .eps = eps,
                              .save_mean = means,
                              .save_m2 = means + problem.C,
                              .save_count = counts ? means + 2 * problem.C : nullptr},
              input.device());
  return stats;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_gathered(const Tensor& input, const Tensor& gathered_stats,
                                                       const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                       const optional<Tensor>& running_mean,
                                                       const optional<Tensor>& running_var,
                                                       const optional<Tensor>& num_batches_tracked,
                                                       optional<double> momentum, double eps,
                                                       const optional<Tensor>& residual, std::string_view act,
                                                       double slope, bool with_mask, const optional<Tensor>& valid) {
  const Activation activation = parse_activation(act, slope);
  check_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                 activation, with_mask, valid);
  const std::int64_t C = input.size(1);
  check_given("gathered_stats", gathered_stats);
  TORCH_CHECK(gathered_stats.device() == input.device(), "batch_norm: expected gathered_stats on the device of input, ",
              input.device(), ", but got ", gathered_stats.device());
  TORCH_CHECK_TYPE(gathered_stats.scalar_type() == at::kDouble,
                   "batch_norm: expected gathered_stats to be float64, but got ", gathered_stats.scalar_type());
  TORCH_CHECK_VALUE(gathered_stats.dim() == 2 && gathered_stats.size(1) == 2 * C + 1,
                    "batch_norm: expected gathered_stats to have shape torch.Size([processes, ", 2 * C + 1,
                    "]), but got ", size_of(gathered_stats));

  if (is_transposed_sequence(input)) {
    return of_sequences(batch_norm_gathered(as_images(input), gathered_stats, weight, bias, running_mean, running_var,
                                            num_batches_tracked, momentum, eps, as_images(residual), act, slope,
                                            with_mask, valid_of_images(valid)));
  }
  const Tensor dense_gathered = gathered_stats.contiguous();
  const Tensor stats = at::empty({2, C}, gathered_stats.options());
  auto* mean = stats.mutable_data_ptr<double>();
  const RunningTensors running(running_mean, running_var, num_batches_tracked);
  backend_of(input).run(GatherStats{.local_stats = dense_gathered.const_data_ptr<double>(),
                                    .processes = gathered_stats.size(0),
                                    .C = C,
                                    .running = running.pointers(momentum),
                                    .mean = mean,
                                    .var = mean + C},
                        input.device());
  running.updated();
  return normalize_by({.running_mean = {mean, DType::kFloat64}, .running_var = {mean + C, DType::kFloat64}, .eps = eps},
                      input, weight, bias, residual, activation, with_mask, valid);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_eval(const Tensor& input, const optional<Tensor>& weight,
                                                   const optional<Tensor>& bias, const Tensor& running_mean,
                                                   const Tensor& running_var, double eps,
                                                   const optional<Tensor>& residual, std::string_view act, double slope,
                                                   bool with_mask, const optional<Tensor>& valid) {
  check_data("input", input);
  check_valid(valid, "input", input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  const Activation activation = parse_activation(act, slope);
  check_epilogue(input, residual, activation, with_mask);
  TORCH_CHECK_VALUE(!(eps < 0.0), "batch_norm eps must be non-negative, but got ", python_float(eps));
  if (is_transposed_sequence(input)) {
    return of_sequences(batch_norm_eval(as_images(input), weight, bias, running_mean, running_var, eps,
                                        as_images(residual), act, slope, with_mask, valid_of_images(valid)));
  }
  const Tensor dense_mean = running_mean.contiguous();
  const Tensor dense_var = running_var.contiguous();
  return normalize_by({.running_mean = channels(dense_mean), .running_var = channels(dense_var), .eps = eps}, input,
                      weight, bias, residual, activation, with_mask, valid);
}

Tensor batch_norm_recompute(const Tensor& input, const Tensor& save_stats, const optional<Tensor>& weight,
                            const optional<Tensor>& bias, const optional<Tensor>& residual, std::string_view act,
                            double slope, const optional<Tensor>& valid, std::int64_t virtual_batch_size) {
  check_data("input", input);
  check_valid(valid, "input", input);
  check_virtual_batch_size(virtual_batch_size);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_save_stats(save_stats, "input", input, virtual_batch_size);
  const Activation activation = parse_activation(act, slope);
  check_epilogue(input, residual, activation, /*with_mask=*/false);
  if (is_transposed_sequence(input)) {
    return as_sequences(batch_norm_recompute(as_images(input), save_stats, weight, bias, as_images(residual), act,
                                             slope, valid_of_images(valid), virtual_batch_size));
  }
  const Tensor dense_stats = save_stats.contiguous();
  const auto* mean = dense_stats.const_data_ptr<double>();
  return std::get<0>(
      normalize_by({.running_mean = {mean, DType::kFloat64}, .invstd = {mean + input.size(1), DType::kFloat64}}, input,
                   weight, bias, residual, activation, /*with_mask=*/false, valid, virtual_batch_size));
}

Tensor sequence_mask(const Tensor& lengths, std::int64_t batch, std::int64_t size, at::Device device) {
  TORCH_CHECK(lengths.device().is_cpu() || lengths.device() == device,
              "batch_norm: expected lengths on the CPU or on the device of input, ", device, ", but got ",
              lengths.device());
  TORCH_CHECK_TYPE(lengths.scalar_type() == at::kLong || lengths.scalar_type() == at::kInt,
                   "batch_norm: expected lengths to be int64 or int32, but got ", lengths.scalar_type());
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == batch, "batch_norm: expected lengths to have shape ",
                    "torch.Size([", batch, "]), one for each sequence of the batch, but got ", size_of(lengths));
  const Tensor host = lengths.to(at::kCPU, at::kLong).contiguous();
  Tensor valid = at::zeros({batch, size}, host.options().dtype(at::kBool));
  for (std::int64_t n = 0; n < batch; ++n) {
    const std::int64_t length = host.const_data_ptr<std::int64_t>()[n];
    TORCH_CHECK_VALUE(length >= 0 && length <= size, "batch_norm: expected lengths from 0 to ", size,
                      ", the size of input's last dimension, but got ", length, " at ", n);
    std::fill_n(valid.mutable_data_ptr<bool>() + n * size, length, true);
  }
  return valid.to(device);
}

}  // namespace bnext
