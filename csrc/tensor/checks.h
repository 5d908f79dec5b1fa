// Checks of an operator's arguments, made before anything is read or written. Each function raises an error whose
// message names the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../common/activation.h"
#include "../common/problem.h"

namespace bnext {

inline bool is_given(const std::optional<at::Tensor>& tensor) { return tensor.has_value() && tensor->defined(); }

// For messages: torch.Size([2, 3]), and a number as Python prints it, so that the messages equal torch's own.
std::string size_of(const at::Tensor& tensor);
std::string python_float(double value);

// The shape of save_stats: (2, C), or (parts, 2, C) with a virtual_batch_size.
std::vector<std::int64_t> stats_sizes(const at::Tensor& input, std::int64_t virtual_batch_size);

// A tensor that the schema requires.
void check_given(const char* name, const at::Tensor& tensor);

// An input or gradient: at least (N, C), of a floating dtype that the kernels know.
void check_data(const char* name, const at::Tensor& tensor);

// A parameter of `input`, or a running statistic that is only read.
void check_channels(const char* name, const at::Tensor& tensor, const at::Tensor& input);
void check_channels(const char* name, const std::optional<at::Tensor>& tensor, const at::Tensor& input);

// The running statistics that a training call updates.
void check_running(const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& var,
                   const std::optional<at::Tensor>& counter, std::optional<double> momentum, const at::Tensor& input);

// A tensor with the shape, dtype and device of `like`.
void check_alongside(const char* name, const std::optional<at::Tensor>& tensor, const char* like_name,
                     const at::Tensor& like);

// What follows the normalisation in a forward call.
void check_epilogue(const at::Tensor& input, const std::optional<at::Tensor>& residual, const Activation& activation,
                    bool with_mask);

// Which positions of the input, or of a gradient beside it, are no padding.
void check_valid(const std::optional<at::Tensor>& valid, const char* like_name, const at::Tensor& like);

// How many images are normalised together; 0: all.
void check_virtual_batch_size(std::int64_t virtual_batch_size);

// save_stats of a forward call on an input with the shape and device of `like`, in parts of virtual_batch_size.
void check_save_stats(const at::Tensor& save_stats, const char* like_name, const at::Tensor& like,
                      std::int64_t virtual_batch_size);

// The eps of a call that normalises by the batch's variance.
void check_eps(double eps);

// The arguments that all training calls share.
void check_training(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                    const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& num_batches_tracked,
                    std::optional<double> momentum, double eps, const std::optional<at::Tensor>& residual,
                    const Activation& activation, bool with_mask, const std::optional<at::Tensor>& valid);

// What an operator's `act` and `slope` mean; a ValueError lists the known names.
Activation parse_activation(std::string_view act, double slope);
std::string_view activation_name(Act act);

}  // namespace bnext
