#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <variant>

#include "../common/mask.h"
#include "../cuda/batch_norm.h"
#include "../cuda/counters.h"
#include "backend.h"
#include "schema.h"

namespace bnext {
namespace {

CudaCap cap;

// What is asked of a device once.
struct Device {
  Device() {
    // The first call may be captured, and loads code and variables, which a capture need not allow.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    C10_CUDA_CHECK(cuda::current_limits(&limits));
    C10_CUDA_CHECK(cuda::current_counters(&counters));
  }

  cuda::DeviceLimits limits;
  unsigned* counters;
  cuda::CounterSlots counter_slots;
};

Device& current_device() {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, Device> known;
  const std::lock_guard lock(mutex);
  return known.try_emplace(c10::cuda::current_device()).first->second;
}

cuda::DeviceLimits limits_of_current_device() {
  cuda::DeviceLimits limits = current_device().limits;
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
at::Tensor allocate_bytes(std::int64_t bytes, at::Device where) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(where));
}

// The workspace of one launch on the current stream.
class OwnedWorkspace {
 public:
  OwnedWorkspace(const cuda::WorkspaceSize& size, at::Device where, cudaStream_t stream) {
    if (size.doubles > 0) {
      doubles_ = allocate_bytes(size.doubles * static_cast<std::int64_t>(sizeof(double)), where);
      view_.doubles = static_cast<double*>(doubles_.mutable_data_ptr());
    }
    if (size.counters > 0) view_.counters = take_counters(size.counters, where, stream);
  }

  const cuda::Workspace& view() const { return view_; }

 private:
  unsigned* take_counters(int count, at::Device where, cudaStream_t stream) {
    Device& device = current_device();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    std::optional<std::int64_t> first;
    if (status == cudaStreamCaptureStatusNone) {
      unsigned long long id = 0;
      C10_CUDA_CHECK(cudaStreamGetId(stream, &id));
      first = device.counter_slots.of_stream(id, count);
    } else {
      first = device.counter_slots.of_captured_launch(count);
    }
    if (first) return device.counters + *first;
    // Thousands of streams or of captured launches have them all.
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(unsigned));
    counters_ = allocate_bytes(bytes, where);
    C10_CUDA_CHECK(cudaMemsetAsync(counters_.mutable_data_ptr(), 0, static_cast<std::size_t>(bytes), stream));
    return static_cast<unsigned*>(counters_.mutable_data_ptr());
  }

  at::Tensor doubles_;
  at::Tensor counters_;
  cuda::Workspace view_;
};

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
      const OwnedWorkspace workspace(plan.workspace_size, where, stream);
      last_plan().set(plan);
      return launch(problem, args, plan, workspace.view(), stream);
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
