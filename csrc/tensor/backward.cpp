// The backward operator on tensors: arguments are checked, results allocated, and layout, dtype and device chosen here;
// the kernels get raw pointers.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "backend.h"
#include "checks.h"
#include "operators.h"
#include "tensors.h"

namespace bnext {
namespace {

using at::Tensor;
using std::optional;

// The memory format that a backward call works in. A mask is laid out in the forward call's, which its rank tells.
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_output, const optional<Tensor>& input, const optional<Tensor>& weight, const Tensor& save_stats,
    bool training, double eps, std::array<bool, 4> output_mask, const optional<Tensor>& bias,
    const optional<Tensor>& residual, const optional<Tensor>& mask, std::string_view act, double slope,
    const optional<Tensor>& mean_grads, const optional<Tensor>& valid, std::int64_t virtual_batch_size) {
  (void)eps;  // for the operator's own derivatives alone, which differentiate through 1/sqrt(var + eps)
  const auto [wants_input, wants_weight, wants_bias, wants_residual] = output_mask;
  const Activation activation = parse_activation(act, slope);
  const bool activated = activation.act != Act::kIdentity;
  TORCH_CHECK_VALUE(activated || !wants_residual,
                    "batch_norm: expected output_mask[3]=False with act=identity, whose grad_residual is grad_output");
  check_data("grad_output", grad_output);
  check_valid(valid, "grad_output", grad_output);
  check_virtual_batch_size(virtual_batch_size);
  TORCH_CHECK_VALUE(virtual_batch_size == 0 || !is_given(mean_grads),
                    "batch_norm: expected no mean_grads with virtual_batch_size, whose parts have each their own");
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
  check_save_stats(save_stats, "grad_output", grad_output, virtual_batch_size);

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
  // A mask's rank tells whether the forward call took the sequences as images.
  if (like.dim() == 3 && (is_given(mask) ? mask->dim() == 2 && like.size(2) != 1 : is_transposed_sequence(like))) {
    auto [dx, dweight, dbias, dresidual] = batch_norm_backward(
        as_images(grad_output), as_images(input), weight, save_stats, training, eps, output_mask, bias,
        as_images(residual), mask, act, slope, mean_grads, valid_of_images(valid), virtual_batch_size);
    return {as_sequences(dx), dweight, dbias, as_sequences(dresidual)};
  }
  const Backend& backend = backend_of(grad_output);
  const Geometry geometry = geometry_of(like, backward_format(like, mask), valid, virtual_batch_size);
  const at::MemoryFormat format = geometry.format;
  const Problem& problem = geometry.problem;
  check_mask(mask, activation, like, problem, backend);
  const auto sums_options = grad_output.options().dtype(sums_dtype);
  const auto sums = [&](bool wanted) {
    if (!wanted) return at::empty({0}, sums_options);
    return problem.numel() == 0 ? at::zeros({C}, sums_options) : at::empty({C}, sums_options);
  };
  const bool reduces = (wants_input && training && !is_given(mean_grads)) || wants_weight || wants_bias;
  const auto data = [&](bool wanted) {
    return wanted ? allocate_output(like, geometry, backend, reduces) : at::empty({0}, grad_output.options());
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
  const Tensor dense_mask = is_given(mask) ? kernel_input(*mask, at::MemoryFormat::Contiguous, backend) : Tensor();
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
                       .mask = is_given(mask) ? dense_mask.const_data_ptr<std::uint8_t>() : nullptr,
                       .grad_residual = wants_residual ? grad_residual.mutable_data_ptr() : nullptr},
              grad_output.device());
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace bnext
