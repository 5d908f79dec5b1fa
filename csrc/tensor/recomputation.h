// Outputs that others save for backward, and that are made again when backward asks: from the input, which batch norm
// saves anyway, and the statistics, in one pass and with the same bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/Stream.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../common/activation.h"

namespace bnext::autograd {

// What gives a saved tensor back. An error where that is no longer what was saved.
class SavedTensor {
 public:
  virtual ~SavedTensor() = default;
  virtual at::Tensor tensor() = 0;
};

// The tensor itself. Without its place in the graph, for it may be the output of the node that saves it, which would
// keep itself alive.
class KeptTensor final : public SavedTensor {
 public:
  explicit KeptTensor(const at::Tensor& tensor);
  at::Tensor tensor() override;

 private:
  at::Tensor data_;
  std::uint32_t version_;
};

// Hooks of saved tensors under which this thread's outputs are made again.
struct Hooks {
  const void* pack = nullptr;  // the Python function; null where there are none
  bool pass_on = false;        // to a pair around them what is not made again

  static Hooks& of_thread();
  // The function that torch asks, of the innermost pair; null where there is none.
  static const void* innermost();
  // Inside these, hooks of others have their way.
  bool are_innermost() const;
};

// The output of one forward call. Of several who save it, the first who asks has it made, and it is kept until the last
// has asked, or until the call's own backward.
class RecomputedOutput {
 public:
  explicit RecomputedOutput(const at::Tensor& output);

  // Of a call that saves its input. The vectors are copies, for the caller's may change, or be freed, before backward.
  // Null where the output is not made again: where nobody else keeps the residual, and where input or residual are made
  // again from what is made again, so that one output never takes a whole chain of them.
  static std::shared_ptr<RecomputedOutput> of(const at::Tensor& output, const at::Tensor& input,
                                              const at::Tensor& save_stats, at::Tensor weight, at::Tensor bias,
                                              const at::Tensor& residual, const Activation& activation,
                                              const at::Tensor& valid, std::int64_t virtual_batch_size);

  // What `tensor` is the unchanged output of, or a view of; null if nothing.
  static std::shared_ptr<RecomputedOutput> behind(const at::Tensor& tensor);

  // Lets go of what was made.
  void drop();

  // One of those who save it, or a view of it.
  class Use final : public SavedTensor {
   public:
    Use(std::shared_ptr<RecomputedOutput> output, const at::Tensor& tensor);
    ~Use() override;
    at::Tensor tensor() override;

   private:
    at::Tensor output();

    const std::shared_ptr<RecomputedOutput> of_;
    const std::vector<std::int64_t> sizes_;
    const std::vector<std::int64_t> strides_;
    const std::int64_t offset_;  // from the output's first element
    std::uint64_t round_ = 0;    // in which it asked last
  };

 private:
  at::Tensor make() const;

  // Not those of the call's own backward: some hooks give a tensor back once only.
  std::shared_ptr<SavedTensor> input_;
  std::shared_ptr<SavedTensor> save_stats_;
  std::shared_ptr<SavedTensor> residual_;
  std::shared_ptr<SavedTensor> valid_;
  std::int64_t virtual_batch_size_ = 0;
  at::Tensor weight_;
  at::Tensor bias_;
  Activation activation_;
  bool of_recomputed_ = false;  // whether input or residual are made again themselves

  const std::vector<std::int64_t> sizes_;
  const std::vector<std::int64_t> strides_;
  const std::int64_t offset_;
  const at::ScalarType dtype_;
  const c10::weak_intrusive_ptr<c10::StorageImpl> storage_;  // a tensor may be given another, by its attribute `data`

  std::mutex mutex_;  // of what follows; never held while something is made, or unpacked, which may call Python
  at::Tensor made_;
  std::optional<c10::Stream> made_on_;
  std::int64_t users_ = 0;
  std::int64_t waiting_ = 0;  // users who have not asked since it was made
  std::uint64_t rounds_ = 0;  // how often it was made
};

// What stands for a tensor that is saved.
std::shared_ptr<SavedTensor> saved_tensor(const at::Tensor& tensor);

// A vector or mask that a node of ours saves. Our own hooks, which would keep it as torch does without any, are not
// asked: they are Python's, and cost a microsecond. (Data is theirs: it may be made again, or be a residual.)
torch::autograd::SavedVariable saved_vector(const at::Tensor& vector);

}  // namespace bnext::autograd
