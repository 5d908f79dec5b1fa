// The operators on tensors below autograd: forward.cpp, backward.cpp and sync.cpp. schema.h explains the arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace bnext {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_train(
    const at::Tensor& input, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum, double eps,
    const std::optional<at::Tensor>& residual, std::string_view act, double slope, bool with_mask,
    const std::optional<at::Tensor>& valid, std::int64_t virtual_batch_size, bool update_in_backward);

at::Tensor batch_norm_stats(const at::Tensor& input, double eps, const std::optional<at::Tensor>& valid);

at::Tensor sequence_mask(const at::Tensor& lengths, std::int64_t batch, std::int64_t size, at::Device device);

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_gathered(
    const at::Tensor& input, const at::Tensor& gathered_stats, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& num_batches_tracked,
    std::optional<double> momentum, double eps, const std::optional<at::Tensor>& residual, std::string_view act,
    double slope, bool with_mask, const std::optional<at::Tensor>& valid);

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_eval(
    const at::Tensor& input, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
    const std::optional<at::Tensor>& residual, std::string_view act, double slope, bool with_mask,
    const std::optional<at::Tensor>& valid);

at::Tensor batch_norm_recompute(const at::Tensor& input, const at::Tensor& save_stats,
                                const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& residual, std::string_view act, double slope,
                                const std::optional<at::Tensor>& valid, std::int64_t virtual_batch_size);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
    const at::Tensor& save_stats, bool training, double eps, std::array<bool, 4> output_mask,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& mask, std::string_view act, double slope,
    const std::optional<at::Tensor>& mean_grads, const std::optional<at::Tensor>& valid,
    std::int64_t virtual_batch_size);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_sync_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& weight,
    const at::Tensor& save_stats, const at::Tensor& count, double eps, std::array<bool, 4> output_mask,
    std::string_view group_name, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& mask, std::string_view act, double slope, const std::optional<at::Tensor>& valid);

}  // namespace bnext
