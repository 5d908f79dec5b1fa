// Tensors as the kernels take them: which problem they pose, dense and aligned, as raw pointers, and what the kernels
// wrote given back.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "backend.h"
#include "common/arguments.h"
#include "common/problem.h"

namespace bnext {

// The memory format of a tensor, and so of what is computed from it.
at::MemoryFormat format_of(const at::Tensor& tensor);

Problem problem_of(const at::Tensor& tensor, at::MemoryFormat format);

// The values dense in the format and aligned, by one copy at most.
at::Tensor kernel_input(const at::Tensor& tensor, at::MemoryFormat format, const Backend& backend);

// A vector of length C, dense; and where it lies.
std::optional<at::Tensor> densely(const std::optional<at::Tensor>& tensor);
ChannelVector channels(const std::optional<at::Tensor>& dense);
MutableChannelVector mutable_channels(const std::optional<at::Tensor>& dense);

// The running statistics of a training call, which the kernels update past autograd's eyes.
class RunningTensors {
 public:
  // They are checked. The arguments must outlive this.
  RunningTensors(const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& var,
                 const std::optional<at::Tensor>& counter);

  std::int64_t* counter() const;

  // momentum: none for the cumulative average.
  Running pointers(std::optional<double> momentum) const;

  // To be called when the kernels have counted the batch, and when they have updated all.
  void counted() const;
  void updated() const;

 private:
  const std::optional<at::Tensor>& mean_;
  const std::optional<at::Tensor>& var_;
  const std::optional<at::Tensor>& counter_;
  std::optional<at::Tensor> dense_mean_;
  std::optional<at::Tensor> dense_var_;
};

}  // namespace bnext
