// Tensors as the kernels take them: their geometry, dense and aligned memory, raw pointers; and the running statistics
// that the kernels update.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../common/arguments.h"
#include "../common/problem.h"
#include "backend.h"

namespace bnext {

// The memory format of a tensor, and so of what is computed from it.
at::MemoryFormat format_of(const at::Tensor& tensor);

// The memory format that a call works in, and the call's Problem in that format.
struct Geometry {
  at::MemoryFormat format;
  Problem problem;
  at::Tensor valid;  // dense; owns the memory of problem.valid
};
Geometry geometry_of(const at::Tensor& tensor, at::MemoryFormat format, const std::optional<at::Tensor>& valid = {},
                     std::int64_t virtual_batch_size = 0);

// A result with the shape and dtype of `like`, to be written in that format.
at::Tensor allocate_output(const at::Tensor& like, const Geometry& geometry, const Backend& backend, bool reduces);

// A sequence (N, C, L) that lies in memory as (N, L, C), as a transposed one does: like images (N, C, 1, L) in
// channels_last. The operators work on such images, because torch's channels_last needs four dimensions.
bool is_transposed_sequence(const at::Tensor& tensor);
inline at::Tensor as_images(const at::Tensor& sequences) { return sequences.unsqueeze(2); }
std::optional<at::Tensor> as_images(const std::optional<at::Tensor>& sequences);
std::optional<at::Tensor> valid_of_images(const std::optional<at::Tensor>& valid_of_sequences);
inline at::Tensor as_sequences(const at::Tensor& images) { return images.dim() == 4 ? images.squeeze(2) : images; }

// The shape of a rectifier's mask: (N, C, bytes) for channels first, (N*spatial, bytes) for channels last.
std::vector<std::int64_t> mask_sizes(const Problem& problem, const Backend& backend);

// The tensor, dense in the format and aligned for the kernels; copied at most once.
at::Tensor kernel_input(const at::Tensor& tensor, at::MemoryFormat format, const Backend& backend);

// A vector of length C, made dense; and the pointer and dtype of a dense one.
std::optional<at::Tensor> densely(const std::optional<at::Tensor>& tensor);
ChannelVector channels(const std::optional<at::Tensor>& dense);
MutableChannelVector mutable_channels(const std::optional<at::Tensor>& dense);

// Whether this thread is in a backward pass.
bool runs_in_backward();

// The running statistics of a training call. Autograd does not see the kernels update them: their versions are bumped.
class RunningTensors {
 public:
  // The arguments have been checked, and must outlive this object.
  RunningTensors(const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& var,
                 const std::optional<at::Tensor>& counter);

  std::int64_t* counter() const;

  // momentum: none for the cumulative average.
  Running pointers(std::optional<double> momentum) const;

  // To be called when the kernels have counted the batch alone, and when they have updated all statistics.
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
