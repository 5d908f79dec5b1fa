// Outputs that other nodes save for backward are not kept, but recomputed when backward unpacks them: from the input,
// which batch norm saves anyway, and the statistics, in one pass and with the same bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/Stream.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../common/activation.h"

namespace bnext::autograd {

// Stands for a saved tensor and returns it; an error if its values have been modified since.
class SavedTensor {
 public:
  virtual ~SavedTensor() = default;
  virtual at::Tensor tensor() = 0;
};

// The tensor itself, detached from the graph: it may be the output of the node that saves it, and would keep that node
// alive.
class KeptTensor final : public SavedTensor {
 public:
  explicit KeptTensor(const at::Tensor& tensor);
  at::Tensor tensor() override;

 private:
  at::Tensor data_;
  std::uint32_t version_;
};

// The saved-tensor hooks under which this thread's outputs are recomputed.
struct Hooks {
  const void* pack = nullptr;  // our pack hook, a Python function; null where there is none
  bool pass_on = false;        // whether a pair of hooks around ours gets what is not recomputed

  static Hooks& of_thread();
  // The pack hook that torch calls: the innermost pair's; null where there is none.
  static const void* innermost();
  // Whether ours are the innermost hooks: hooks of others inside them take precedence.
  bool are_innermost() const;
};

// The output of one forward call. Where several nodes save it, the first that unpacks it recomputes it, and it is kept
// until the last has unpacked it, or until the call's own backward.
class RecomputedOutput {
 public:
  explicit RecomputedOutput(const at::Tensor& output);

  // For a call that saves its input. The vectors are copies, for the caller's may change, or be freed, before backward.
  // Null where the output is not recomputed: if nothing else keeps the residual, or if input or residual are themselves
  // recomputed from recomputed tensors, so that one output never takes a whole chain of recomputations.
  static std::shared_ptr<RecomputedOutput> of(const at::Tensor& output, const at::Tensor& input,
                                              const at::Tensor& save_stats, at::Tensor weight, at::Tensor bias,
                                              const at::Tensor& residual, const Activation& activation,
                                              const at::Tensor& valid, std::int64_t virtual_batch_size);

  // The call whose unchanged output `tensor` is, or is a view of; null if there is none.
  static std::shared_ptr<RecomputedOutput> behind(const at::Tensor& tensor);

  // Frees the recomputed tensor.
  void drop();

  // One node's saved tensor: the output, or a view of it.
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
    std::uint64_t round_ = 0;    // of `rounds_`, in which this was last unpacked
  };

 private:
  at::Tensor make() const;

  // Not shared with the call's own node: some hooks unpack a tensor only once.
  std::shared_ptr<SavedTensor> input_;
  std::shared_ptr<SavedTensor> save_stats_;
  std::shared_ptr<SavedTensor> residual_;
  std::shared_ptr<SavedTensor> valid_;
  std::int64_t virtual_batch_size_ = 0;
  at::Tensor weight_;
  at::Tensor bias_;
  Activation activation_;
  bool of_recomputed_ = false;  // whether input or residual are recomputed themselves

  const std::vector<std::int64_t> sizes_;
  const std::vector<std::int64_t> strides_;
  const std::int64_t offset_;
  const at::ScalarType dtype_;
  const c10::weak_intrusive_ptr<c10::StorageImpl> storage_;  // assigning to a tensor's `data` gives it another one

  std::mutex mutex_;  // guards what follows; not held while a tensor is recomputed or unpacked: that may call Python
  at::Tensor made_;
  std::optional<c10::Stream> made_on_;
  std::int64_t users_ = 0;
  std::int64_t waiting_ = 0;  // users that have not unpacked it since it was recomputed
  std::uint64_t rounds_ = 0;  // how often it was recomputed
};

// The node of a call whose output may be recomputed.
class RecomputableNode : public torch::autograd::Node {
 public:
  std::shared_ptr<RecomputedOutput> output;  // null where the output is not recomputed
};

// What our pack hook returns for a tensor.
std::shared_ptr<SavedTensor> saved_tensor(const at::Tensor& tensor);

// A vector or mask that one of our nodes saves. Our own hooks are skipped: they would keep it, as torch does without
// hooks, and a call of Python costs a microsecond. (Inputs and residuals go through them: those may be recomputed.)
torch::autograd::SavedVariable saved_vector(const at::Tensor& vector);

}  // namespace bnext::autograd
