#include "recomputation.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>

#include "checks.h"
#include "dispatcher.h"
#include "nodes.h"

namespace bnext::autograd {
namespace {

using at::Tensor;
using std::optional;

thread_local bool recomputes = false;

optional<Tensor> or_none(const Tensor& tensor) { return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt; }

const at::TensorBase& base_of(const Tensor& tensor) {
  if (tensor.is_view()) return tensor._base();
  return tensor;
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

bool RecomputedOutput::wanted() { return recomputes; }
void RecomputedOutput::want(bool wanted) { recomputes = wanted; }

std::shared_ptr<RecomputedOutput> RecomputedOutput::of(std::shared_ptr<SavedCall> call, const Tensor& output,
                                                       const Tensor& input, Tensor weight, Tensor bias,
                                                       const Tensor& residual) {
  const auto behind_input = behind(input);
  const auto behind_residual = residual.defined() ? behind(residual) : nullptr;
  for (const auto& source : {behind_input, behind_residual}) {
    if (source && source->of_recomputed_) return nullptr;
  }
  std::shared_ptr<SavedTensor> saved_residual;
  if (residual.defined()) {
    // The residual itself is one who holds its memory.
    const bool kept = behind_residual || (residual.has_storage() && residual.storage().use_count() > 1);
    if (!kept) return nullptr;
    saved_residual = saved_tensor(residual);
  }
  auto recomputed = std::make_shared<RecomputedOutput>();
  recomputed->call_ = std::move(call);
  recomputed->weight_ = std::move(weight);
  recomputed->bias_ = std::move(bias);
  recomputed->residual_ = std::move(saved_residual);
  recomputed->of_recomputed_ = behind_input || behind_residual;
  recomputed->sizes_ = output.sizes().vec();
  recomputed->strides_ = output.strides().vec();
  return recomputed;
}

std::shared_ptr<RecomputedOutput> RecomputedOutput::behind(const Tensor& tensor) {
  const at::TensorBase& whole = base_of(tensor);
  const auto* const node = dynamic_cast<const BatchNormBackward*>(whole.grad_fn().get());
  if (node == nullptr || node->output == nullptr || tensor._version() != 0) return nullptr;
  const bool same_numbers = tensor.scalar_type() == whole.scalar_type() && is_plain(tensor);
  return same_numbers ? node->output : nullptr;
}

void RecomputedOutput::drop() {
  Tensor dropped;  // freed without the mutex
  const std::lock_guard<std::mutex> lock(mutex_);
  std::swap(dropped, made_);
}

Tensor RecomputedOutput::make() const {
  const at::NoGradGuard no_grad;
  const Tensor input = call_->input.unpack();
  const Tensor save_stats = call_->save_stats.unpack();
  const Tensor residual = residual_ ? residual_->tensor() : Tensor();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Activation& activation = call_->activation;
  Tensor output = recompute_op().call(input, save_stats, or_none(weight_), or_none(bias_), or_none(residual),
                                      activation_name(activation.act), activation.slope);
  // Whoever brought the input back may have laid it out otherwise.
  return output.strides() == strides_ ? output : at::empty_strided(sizes_, strides_, output.options()).copy_(output);
}

RecomputedOutput::Use::Use(std::shared_ptr<RecomputedOutput> output, const Tensor& tensor)
    : of_(std::move(output)),
      sizes_(tensor.sizes().vec()),
      strides_(tensor.strides().vec()),
      offset_(tensor.storage_offset() - base_of(tensor).storage_offset()) {
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
    output = of_->made_;
  }
  if (!output.defined()) output = of_->make();
  const std::lock_guard<std::mutex> lock(of_->mutex_);
  if (!of_->made_.defined()) {
    of_->made_ = output;
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

}  // namespace bnext::autograd
