#include "batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <string>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "common/arguments.h"
#include "common/mask.h"
#include "common/problem.h"
#include "kernel_tensors.h"

namespace bnext {
namespace {

using at::Tensor;
using std::optional;

// (N, C, bytes) for channels first, (N*spatial, bytes) for channels last: the rank tells which.
std::vector<std::int64_t> mask_sizes(const Problem& problem, const Backend& backend) {
  const std::int64_t bytes = mask_row_bytes(mask_row_elements(problem), backend.mask_lanes(problem));
  if (problem.layout == Layout::kChannelsFirst) return {problem.N, problem.C, bytes};
  return {problem.count(), bytes};
}

Tensor allocate_mask(const Tensor& input, const Problem& problem, const Backend& backend, bool wanted) {
  const auto options = input.options().dtype(at::kByte);
  if (!wanted) return at::empty({0}, options);
  const auto sizes = mask_sizes(problem, backend);
  // The operator's results are the same bits at every call, those that mean nothing too.
  const bool padded = mask_has_padding(mask_row_elements(problem), backend.mask_lanes(problem));
  return padded ? at::zeros(sizes, options) : at::empty(sizes, options);
}

// The memory format that a backward call works in: the forward call's, to which a mask is tied.
at::MemoryFormat backward_format(const Tensor& like, const optional<Tensor>& mask) {
  if (!is_given(mask)) return format_of(like);
  const bool channels_first = mask->dim() == 3 || like.dim() < 4;
  if (channels_first) return at::MemoryFormat::Contiguous;
  return like.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

void check_mask(const optional<Tensor>& mask, const Activation& activation, const Tensor& like, const Problem& problem,
                const Backend& backend) {
  if (!is_given(mask)) return;
  TORCH_CHECK_VALUE(activation.rectifies(), "batch_norm: expected no mask, which only relu, relu6 and leaky_relu have");
  TORCH_CHECK(mask->device() == like.device(), "batch_norm: expected mask on the device of grad_output, ",
              like.device(), ", but got ", mask->device());
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kByte, "batch_norm: expected mask to be uint8, but got ",
                   mask->scalar_type());
  const auto sizes = mask_sizes(problem, backend);
  TORCH_CHECK_VALUE(mask->sizes() == at::IntArrayRef(sizes), "batch_norm: expected mask to have shape torch.Size(",
                    at::IntArrayRef(sizes), "), but got ", size_of(*mask));
}

// Nothing will ever be multiplied with the statistics of an empty input, but they must not be garbage.
Tensor allocate_stats(const Tensor& input, const Problem& problem) {
  const auto options = input.options().dtype(at::kDouble);
  return problem.numel() == 0 ? at::zeros({2, problem.C}, options) : at::empty({2, problem.C}, options);
}

// What every forward pass writes, and what of its arguments the kernels read: dense, in the input's memory format.
class ForwardTensors {
 public:
  ForwardTensors(const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
                 const optional<Tensor>& residual, const Activation& activation, bool with_mask, bool reduces)
      : device_(input.device()),
        backend_(backend_of(input)),
        format_(format_of(input)),
        problem_(problem_of(input, format_)),
        activation_(activation),
        with_mask_(with_mask),
        output_(backend_.allocate_output(input, format_, problem_, reduces)),
        stats_(allocate_stats(input, problem_)),
        mask_(allocate_mask(input, problem_, backend_, with_mask)) {
    if (empty()) return;
    input_ = kernel_input(input, format_, backend_);
    if (is_given(residual)) residual_ = kernel_input(*residual, format_, backend_);
    weight_ = densely(weight);
    bias_ = densely(bias);
  }

  bool empty() const { return problem_.numel() == 0; }
  const Backend& backend() const { return backend_; }

  // Runs Forward, TrainingForward or EvalForward, which holds what these have of their own.
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
  const at::MemoryFormat format_;
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

// y by statistics that are known.
std::tuple<Tensor, Tensor, Tensor> normalize_by(const Tensor& input, const ChannelVector& mean,
                                                const ChannelVector& var, const optional<Tensor>& weight,
                                                const optional<Tensor>& bias, double eps,
                                                const optional<Tensor>& residual, const Activation& activation,
                                                bool with_mask) {
  ForwardTensors tensors(input, weight, bias, residual, activation, with_mask, /*reduces=*/false);
  if (!tensors.empty()) tensors.run(EvalForward{.running_mean = mean, .running_var = var, .eps = eps});
  return tensors.results();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& input, const optional<Tensor>& weight,
                                                    const optional<Tensor>& bias, const optional<Tensor>& running_mean,
                                                    const optional<Tensor>& running_var,
                                                    const optional<Tensor>& num_batches_tracked,
                                                    optional<double> momentum, double eps,
                                                    const optional<Tensor>& residual, std::string_view act,
                                                    double slope, bool with_mask) {
  const Activation activation = parse_activation(act, slope);
  check_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                 activation, with_mask);
  TORCH_CHECK_VALUE(problem_of(input, format_of(input)).count() != 1,
                    "Expected more than 1 value per channel when training, got input size ", size_of(input));

  ForwardTensors tensors(input, weight, bias, residual, activation, with_mask, /*reduces=*/true);
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

Tensor batch_norm_moments(const Tensor& input, double eps) {
  check_data("input", input);
  check_eps(eps);
  const auto format = format_of(input);
  const Problem problem = problem_of(input, format);
  Tensor moments = at::empty({2 * problem.C + 1}, input.options().dtype(at::kDouble));
  moments.select(0, 2 * problem.C).fill_(static_cast<double>(problem.count()));
  if (problem.numel() == 0) return moments.zero_();
  const Backend& backend = backend_of(input);
  const Tensor dense_input = kernel_input(input, format, backend);
  auto* means = moments.mutable_data_ptr<double>();
  backend.run(problem,
              TrainingForward{
                  .input = dense_input.const_data_ptr(), .eps = eps, .save_mean = means, .save_m2 = means + problem.C},
              input.device());
  return moments;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_merged(
    const Tensor& input, const Tensor& moments, const optional<Tensor>& weight, const optional<Tensor>& bias,
    const optional<Tensor>& running_mean, const optional<Tensor>& running_var,
    const optional<Tensor>& num_batches_tracked, optional<double> momentum, double eps,
    const optional<Tensor>& residual, std::string_view act, double slope, bool with_mask) {
  const Activation activation = parse_activation(act, slope);
  check_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, residual,
                 activation, with_mask);
  const std::int64_t C = input.size(1);
  check_given("moments", moments);
  TORCH_CHECK(moments.device() == input.device(), "batch_norm: expected moments on the device of input, ",
              input.device(), ", but got ", moments.device());
  TORCH_CHECK_TYPE(moments.scalar_type() == at::kDouble, "batch_norm: expected moments to be float64, but got ",
                   moments.scalar_type());
  TORCH_CHECK_VALUE(moments.dim() == 2 && moments.size(1) == 2 * C + 1,
                    "batch_norm: expected moments to have shape torch.Size([shares, ", 2 * C + 1, "]), but got ",
                    size_of(moments));

  const Tensor dense_moments = moments.contiguous();
  const Tensor stats = at::empty({2, C}, moments.options());
  auto* mean = stats.mutable_data_ptr<double>();
  const RunningTensors running(running_mean, running_var, num_batches_tracked);
  backend_of(input).run(Merge{.moments = dense_moments.const_data_ptr<double>(),
                              .shares = moments.size(0),
                              .C = C,
                              .running = running.pointers(momentum),
                              .mean = mean,
                              .var = mean + C},
                        input.device());
  running.updated();
  return normalize_by(input, {mean, DType::kFloat64}, {mean + C, DType::kFloat64}, weight, bias, eps, residual,
                      activation, with_mask);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_eval(const Tensor& input, const optional<Tensor>& weight,
                                                   const optional<Tensor>& bias, const Tensor& running_mean,
                                                   const Tensor& running_var, double eps,
                                                   const optional<Tensor>& residual, std::string_view act, double slope,
                                                   bool with_mask) {
  check_data("input", input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_channels("running_mean", running_mean, input);
  check_channels("running_var", running_var, input);
  const Activation activation = parse_activation(act, slope);
  check_epilogue(input, residual, activation, with_mask);
  TORCH_CHECK_VALUE(!(eps < 0.0), "batch_norm eps must be non-negative, but got ", python_float(eps));
  const Tensor dense_mean = running_mean.contiguous();
  const Tensor dense_var = running_var.contiguous();
  return normalize_by(input, channels(dense_mean), channels(dense_var), weight, bias, eps, residual, activation,
                      with_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_output, const optional<Tensor>& input, const optional<Tensor>& weight, const Tensor& save_stats,
    bool training, double eps, std::array<bool, 4> output_mask, const optional<Tensor>& bias,
    const optional<Tensor>& residual, const optional<Tensor>& mask, std::string_view act, double slope,
    const optional<Tensor>& mean_grads) {
  (void)eps;  // belongs to the operator for its own derivative, which differentiates through 1/sqrt(var + eps)
  const auto [wants_input, wants_weight, wants_bias, wants_residual] = output_mask;
  const Activation activation = parse_activation(act, slope);
  const bool activated = activation.act != Act::kIdentity;
  TORCH_CHECK_VALUE(activated || !wants_residual,
                    "batch_norm: expected output_mask[3]=False with act=identity, whose grad_residual is grad_output");
  check_data("grad_output", grad_output);
  const bool reads_preactivation = activated && !is_given(mask);
  const bool reads_input = wants_weight || (wants_input && training) || reads_preactivation;
  TORCH_CHECK_VALUE(is_given(input) || !reads_input,
                    "batch_norm: expected input, which grad_weight, the training grad_input and an activation without "
                    "a mask need, but got None");
  if (is_given(input)) {
    check_data("input", *input);
    TORCH_CHECK(input->device() == grad_output.device(), "batch_norm: expected input on the device of grad_output, ",
                grad_output.device(), ", but got ", input->device());
    check_alongside("grad_output", grad_output, "input", *input);
  }
  check_channels("weight", weight, grad_output);
  check_channels("bias", bias, grad_output);
  check_alongside("residual", residual, "grad_output", grad_output);
  const std::int64_t C = grad_output.size(1);
  check_given("save_stats", save_stats);
  TORCH_CHECK(save_stats.device() == grad_output.device(),
              "batch_norm: expected save_stats on the device of grad_output, ", grad_output.device(), ", but got ",
              save_stats.device());
  TORCH_CHECK_TYPE(save_stats.scalar_type() == at::kDouble, "batch_norm: expected save_stats to be float64, but got ",
                   save_stats.scalar_type());
  TORCH_CHECK_VALUE(save_stats.dim() == 2 && save_stats.size(0) == 2 && save_stats.size(1) == C,
                    "batch_norm: expected save_stats to have shape torch.Size([2, ", C, "]), but got ",
                    size_of(save_stats));

  const auto sums_dtype = grad_output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (is_given(mean_grads)) {
    TORCH_CHECK(mean_grads->device() == grad_output.device(),
                "batch_norm: expected mean_grads on the device of grad_output, ", grad_output.device(), ", but got ",
                mean_grads->device());
    TORCH_CHECK_TYPE(mean_grads->scalar_type() == sums_dtype, "batch_norm: expected mean_grads to be ", sums_dtype,
                     ", but got ", mean_grads->scalar_type());
    TORCH_CHECK_VALUE(mean_grads->dim() == 2 && mean_grads->size(0) == 2 && mean_grads->size(1) == C,
                      "batch_norm: expected mean_grads to have shape torch.Size([2, ", C, "]), but got ",
                      size_of(*mean_grads));
  }

  const Tensor& like = is_given(input) ? *input : grad_output;
  const Backend& backend = backend_of(grad_output);
  const auto format = backward_format(like, mask);
  const Problem problem = problem_of(like, format);
  check_mask(mask, activation, like, problem, backend);
  const auto sums_options = grad_output.options().dtype(sums_dtype);
  const auto sums = [&](bool wanted) {
    if (!wanted) return at::empty({0}, sums_options);
    return problem.numel() == 0 ? at::zeros({C}, sums_options) : at::empty({C}, sums_options);
  };
  const bool reduces = (wants_input && training && !is_given(mean_grads)) || wants_weight || wants_bias;
  const auto data = [&](bool wanted) {
    return wanted ? backend.allocate_output(like, format, problem, reduces) : at::empty({0}, grad_output.options());
  };
  Tensor grad_input = data(wants_input);
  Tensor grad_weight = sums(wants_weight);
  Tensor grad_bias = sums(wants_bias);
  Tensor grad_residual = data(wants_residual);
  if (problem.numel() == 0) return {grad_input, grad_weight, grad_bias, grad_residual};

  const auto dense = [&](bool needed, const optional<Tensor>& tensor) {
    return needed && is_given(tensor) ? kernel_input(*tensor, format, backend) : Tensor();
  };
  const auto pointer = [](const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
  const Tensor dense_grad = kernel_input(grad_output, format, backend);
  const Tensor dense_input = dense(reads_input, input);
  const Tensor dense_residual = dense(reads_preactivation, residual);
  const auto dense_weight = densely(weight);
  const auto dense_bias = densely(bias);
  const auto dense_mask = densely(mask);
  const auto dense_means = densely(mean_grads);
  const auto mean_of = [&](std::int64_t row) {
    return is_given(mean_grads) ? channels(dense_means->select(0, row)) : ChannelVector{};
  };
  const Tensor dense_stats = save_stats.contiguous();
  const auto* stats = dense_stats.const_data_ptr<double>();
  backend.run(problem,
              Backward{.grad_output = dense_grad.const_data_ptr(),
                       .input = pointer(dense_input),
                       .weight = channels(dense_weight),
                       .save_mean = stats,
                       .save_invstd = stats + C,
                       .training = training,
                       .mean_dz_xhat = mean_of(0),
                       .mean_dz = mean_of(1),
                       .grad_input = wants_input ? grad_input.mutable_data_ptr() : nullptr,
                       .grad_weight = wants_weight ? mutable_channels(grad_weight) : MutableChannelVector{},
                       .grad_bias = wants_bias ? mutable_channels(grad_bias) : MutableChannelVector{},
                       .activation = activation,
                       .bias = channels(dense_bias),
                       .residual = pointer(dense_residual),
                       .mask = is_given(mask) ? dense_mask->const_data_ptr<std::uint8_t>() : nullptr,
                       .grad_residual = wants_residual ? grad_residual.mutable_data_ptr() : nullptr},
              grad_output.device());
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace bnext
