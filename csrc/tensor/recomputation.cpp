#include "recomputation.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <utility>

#include "checks.h"
#include "dispatcher.h"

namespace bnext::autograd {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::SavedVariable;

const at::TensorBase& base_of(const Tensor& tensor) {
  if (tensor.is_view()) return tensor._base();
  return tensor;
}

// Turns saved-tensor hooks off by setting torch's tracing flag: torch calls no hooks while it traces.
class WithoutHooks {
 public:
  WithoutHooks() : before_(at::SavedTensorDefaultHooks::set_tracing(true)) {}
  ~WithoutHooks() { at::SavedTensorDefaultHooks::set_tracing(before_); }
  WithoutHooks(const WithoutHooks&) = delete;
  WithoutHooks& operator=(const WithoutHooks&) = delete;

 private:
  const bool before_;
};

// Saved and unpacked through all active hooks.
class HookedTensor final : public SavedTensor {
 public:
  explicit HookedTensor(const Tensor& tensor) : saved_(tensor, /*is_output=*/false) {}
  Tensor tensor() override { return saved_.unpack(); }

 private:
  SavedVariable saved_;
};

// Saves what an output is recomputed from; through the hooks around ours, where there are any.
std::shared_ptr<SavedTensor> saved_source(const Tensor& tensor) {
  if (Hooks::of_thread().pass_on) return std::make_shared<HookedTensor>(tensor);
  return saved_tensor(tensor);
}

// The stream that the current thread's kernels run on.
c10::Stream current_stream(const at::Device& device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

bool is_plain(const Tensor& tensor) { return tensor.layout() == at::kStrided && !tensor.is_conj() && !tensor.is_neg(); }

}  // namespace

KeptTensor::KeptTensor(const Tensor& tensor)
    : data_(tensor.tensor_data()), version_(torch::autograd::impl::version_counter(tensor).current_version()) {}

Tensor KeptTensor::tensor() {
  const auto version = torch::autograd::impl::version_counter(data_).current_version();
  TORCH_CHECK(version == version_,
              "one of the variables needed for gradient computation has been modified by an inplace operation: [",
              data_.toString(), " ", data_.sizes(), "] is at version ", version, "; expected version ", version_,
              " instead.");
  return data_;
}

Hooks& Hooks::of_thread() {
  thread_local Hooks hooks;
  return hooks;
}

const void* Hooks::innermost() {
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();
  if (state.is_tracing || state.stack.empty()) return nullptr;
  const c10::SafePyObject& pack = state.stack.top().first;
  return pack.ptr(&pack.pyinterpreter());
}

bool Hooks::are_innermost() const { return pack != nullptr && pack == innermost(); }

RecomputedOutput::RecomputedOutput(const Tensor& output)
    : sizes_(output.sizes().vec()),
      strides_(output.strides().vec()),
      offset_(output.storage_offset()),
      dtype_(output.scalar_type()),
      storage_(output.storage().getWeakStorageImpl()) {}

std::shared_ptr<RecomputedOutput> RecomputedOutput::of(const Tensor& output, const Tensor& input,
                                                       const Tensor& save_stats, Tensor weight, Tensor bias,
                                                       const Tensor& residual, const Activation& activation,
                                                       const Tensor& valid, std::int64_t virtual_batch_size) {
  // A residual that was made in inference mode cannot be saved.
  if (!output.has_storage() || (residual.defined() && residual.is_inference())) return nullptr;
  const auto behind_input = behind(input);
  const auto behind_residual = residual.defined() ? behind(residual) : nullptr;
  for (const auto& source : {behind_input, behind_residual}) {
    if (source && source->of_recomputed_) return nullptr;
  }
  if (residual.defined() && !behind_residual && !Hooks::of_thread().pass_on) {
    // One reference to the storage is the residual's own. The count says nothing where outer hooks hold what is saved;
    // and with checkpointing it would differ when the forward runs again.
    if (!residual.has_storage() || residual.storage().use_count() <= 1) return nullptr;
  }
  auto recomputed = std::make_shared<RecomputedOutput>(output);
  recomputed->input_ = saved_source(input);
  recomputed->save_stats_ = saved_source(save_stats);
  if (residual.defined()) recomputed->residual_ = saved_source(residual);
  if (valid.defined()) recomputed->valid_ = saved_source(valid);
  recomputed->virtual_batch_size_ = virtual_batch_size;
  recomputed->weight_ = std::move(weight);
  recomputed->bias_ = std::move(bias);
  recomputed->activation_ = activation;
  recomputed->of_recomputed_ = behind_input || behind_residual;
  return recomputed;
}

std::shared_ptr<RecomputedOutput> RecomputedOutput::behind(const Tensor& tensor) {
  const at::TensorBase& whole = base_of(tensor);
  const auto* const node = dynamic_cast<const RecomputableNode*>(whole.grad_fn().get());
  if (node == nullptr || node->output == nullptr || tensor._version() != 0) return nullptr;
  const RecomputedOutput& output = *node->output;
  const bool same_numbers = tensor.has_storage() &&
                            tensor.storage().unsafeGetStorageImpl() == output.storage_._unsafe_get_target() &&
                            tensor.scalar_type() == output.dtype_ && is_plain(tensor);
  return same_numbers ? node->output : nullptr;
}

void RecomputedOutput::drop() {
  Tensor dropped;  // freed after the mutex is released
  const std::lock_guard<std::mutex> lock(mutex_);
  std::swap(dropped, made_);
}

Tensor RecomputedOutput::make() const {
  const at::NoGradGuard no_grad;
  const Tensor input = input_->tensor();
  const Tensor save_stats = save_stats_->tensor();
  const Tensor residual = residual_ ? residual_->tensor() : Tensor();
  const Tensor valid = valid_ ? valid_->tensor() : Tensor();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Tensor output =
      recompute_op().call(input, save_stats, or_none(weight_), or_none(bias_), or_none(residual),
                          activation_name(activation_.act), activation_.slope, or_none(valid), virtual_batch_size_);
  // The hooks that unpacked the input may have changed its strides, and so the output's.
  return output.strides() == strides_ ? output : at::empty_strided(sizes_, strides_, output.options()).copy_(output);
}

RecomputedOutput::Use::Use(std::shared_ptr<RecomputedOutput> output, const Tensor& tensor)
    : of_(std::move(output)),
      sizes_(tensor.sizes().vec()),
      strides_(tensor.strides().vec()),
      offset_(tensor.storage_offset() - of_->offset_) {
  const std::lock_guard<std::mutex> lock(of_->mutex_);
  ++of_->users_;
  if (of_->made_.defined()) ++of_->waiting_;
}

RecomputedOutput::Use::~Use() {
  Tensor dropped;
  const std::lock_guard<std::mutex> lock(of_->mutex_);
  --of_->users_;
  if (of_->made_.defined() && round_ != of_->rounds_ && --of_->waiting_ == 0) std::swap(dropped, of_->made_);
}

Tensor RecomputedOutput::Use::tensor() {
  const Tensor whole = output();
  if (whole.sizes() == sizes_ && whole.strides() == strides_) return whole;
  const at::NoGradGuard no_grad;
  return whole.as_strided(sizes_, strides_, whole.storage_offset() + offset_);
}

Tensor RecomputedOutput::Use::output() {
  Tensor output;
  {
    const std::lock_guard<std::mutex> lock(of_->mutex_);
    // Another stream does not wait for the recomputation, so it cannot use the result.
    if (of_->made_.defined() && of_->made_on_ == current_stream(of_->made_.device())) output = of_->made_;
  }
  if (!output.defined()) output = of_->make();
  const std::lock_guard<std::mutex> lock(of_->mutex_);
  if (!of_->made_.defined()) {
    of_->made_ = output;
    of_->made_on_ = current_stream(output.device());
    of_->waiting_ = of_->users_;
    ++of_->rounds_;
  }
  if (round_ != of_->rounds_) {
    round_ = of_->rounds_;
    if (--of_->waiting_ == 0) of_->made_.reset();
  }
  return output;
}

std::shared_ptr<SavedTensor> saved_tensor(const Tensor& tensor) {
  if (auto output = RecomputedOutput::behind(tensor)) {
    return std::make_shared<RecomputedOutput::Use>(std::move(output), tensor);
  }
  return std::make_shared<KeptTensor>(tensor);
}

SavedVariable saved_vector(const Tensor& vector) {
  const Hooks& hooks = Hooks::of_thread();
  optional<WithoutHooks> without_hooks;
  if (hooks.are_innermost() && !hooks.pass_on) without_hooks.emplace();
  return SavedVariable(vector, /*is_output=*/false);
}

}  // namespace bnext::autograd
