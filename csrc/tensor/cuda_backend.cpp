#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <variant>

#include "../common/mask.h"
#include "../cuda/batch_norm.h"
#include "backend.h"
#include "schema.h"

namespace bnext {
namespace {

CudaCap cap;

// Queried once a device.
cuda::DeviceLimits real_limits() {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, cuda::DeviceLimits> known;
  const auto device = c10::cuda::current_device();
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cuda::DeviceLimits limits;
  C10_CUDA_CHECK(cuda::current_limits(&limits));
  known.emplace(device, limits);
  return limits;
}

cuda::DeviceLimits limits_of_current_device() {
  cuda::DeviceLimits limits = real_limits();
  limits.sms = std::min(limits.sms, cap.sms);
  limits.shared_per_block = std::min(limits.shared_per_block, cap.shared_per_block);
  limits.max_cluster = std::min(limits.max_cluster, cap.max_cluster);
  limits.max_row_bytes = std::min(limits.max_row_bytes, cap.max_row_bytes);
  return limits;
}

// Locked, because backward calls run on autograd's own threads.
class LastPlan {
 public:
  template <typename Plan>
  void set(const Plan& plan) {
    const std::lock_guard lock(mutex_);
    plan_ = plan;
  }
  std::string description() {
    const std::lock_guard lock(mutex_);
    const auto described = [](const auto& plan) { return cuda::description(plan); };
    return plan_ ? std::visit(described, *plan_) : std::string();
  }

 private:
  std::mutex mutex_;
  std::optional<std::variant<cuda::LaunchPlan, cuda::PartPlan>> plan_;
};

LastPlan& last_plan() {
  static LastPlan plan;
  return plan;
}

// It may be freed while the kernel runs: the caching allocator reuses it only for work that follows on the stream.
at::Tensor allocate_workspace(std::int64_t bytes, at::Device where) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(where));
}

class CudaBackend final : public Backend {
 public:
  std::uintptr_t alignment() const override { return cuda::kVectorBytes; }

  std::int64_t mask_lanes(DType dtype) const override { return cuda_mask_lanes(element_size(dtype)); }

  at::Tensor allocate_output(const at::Tensor& like, at::MemoryFormat format, const Problem&, bool) const override {
    return at::empty_like(like, like.options(), format);
  }

  void count_batch(std::int64_t* num_batches_tracked, at::Device where) const override {
    const c10::cuda::CUDAGuard guard(where);
    C10_CUDA_CHECK(cuda::count_batch(num_batches_tracked, c10::cuda::getCurrentCUDAStream()));
  }

  void run(const GatherStats& args, at::Device where) const override {
    const c10::cuda::CUDAGuard guard(where);
    C10_CUDA_CHECK(cuda::gather_stats(args, c10::cuda::getCurrentCUDAStream()));
  }
  void run(const Problem& problem, const TrainingForward& args, at::Device where) const override {
    enqueue(problem, args, where, [](auto&&... all) { return cuda::forward(all...); });
  }
  void run(const Problem& problem, const EvalForward& args, at::Device where) const override {
    enqueue(problem, args, where, [](auto&&... all) { return cuda::forward(all...); });
  }
  void run(const Problem& problem, const Backward& args, at::Device where) const override {
    enqueue(problem, args, where, [](auto&&... all) { return cuda::backward(all...); });
  }

 private:
  template <typename Args, typename Launch>
  static void enqueue(const Problem& problem, const Args& args, at::Device where, Launch&& launch) {
    const c10::cuda::CUDAGuard guard(where);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const auto launch_plan = [&](const auto& plan) {
      const at::Tensor workspace =
          plan.workspace_bytes > 0 ? allocate_workspace(plan.workspace_bytes, where) : at::Tensor();
      void* const scratch = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
      last_plan().set(plan);
      return launch(problem, args, plan, scratch, stream);
    };
    if (cuda::has_parts(problem)) {
      C10_CUDA_CHECK(launch_plan(cuda::make_part_plan(problem)));
    } else {
      C10_CUDA_CHECK(cuda::plan_and_launch(problem, args, limits_of_current_device(), launch_plan));
    }
  }
};

}  // namespace

void cap_cuda_device(const CudaCap& wanted) { cap = wanted; }

std::string last_cuda_plan() { return last_plan().description(); }

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

}  // namespace bnext

TORCH_LIBRARY_IMPL(bnext, CUDA, m) { bnext::register_kernels(m); }
