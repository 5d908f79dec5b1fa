// The tensor level on the emulated device: csrc/tensor/forward.cpp and backward.cpp as they stand, their backend
// replaced by one that gives the CUDA launchers CPU tensors. Operators bnext_simt::*, of the same signatures as
// bnext::*, and some to control the device and to look at plans.

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>

#include "../../csrc/common/mask.h"
#include "../../csrc/cuda/batch_norm.h"
#include "../../csrc/cuda/counters.h"
#include "../../csrc/tensor/backend.h"
#include "../../csrc/tensor/schema.h"
#include "emulator.h"

namespace bnext {
namespace {

cuda::LaunchPlan last_plan;
cuda::PartPlan last_part_plan;
std::string last_description;

// Plans are made as if the device had no more than this, so that small tensors take the paths of large ones.
int shared_cap;
int cluster_cap;
int grid_cap;

std::size_t channel_bytes(std::int64_t C, DType dtype) { return static_cast<std::size_t>(C * element_size(dtype)); }

// The buffers that one launch may use, registered as long as this lives. Parameters may be absent.
class Buffers {
 public:
  ~Buffers() { simt::unregister_all(); }

  void add(const void* data, std::size_t bytes, const char* name, simt::Access access) {
    if (data == nullptr || bytes == 0) return;
    simt::register_buffer(data, bytes, name, access);
    if (access == simt::Access::kUninitialised) outputs_.push_back({data, name});
  }
  void add(const ChannelVector& vector, std::int64_t C, const char* name) {
    add(vector.data, channel_bytes(C, vector.dtype), name, simt::Access::kRead);
  }
  void add(const MutableChannelVector& vector, std::int64_t C, const char* name, simt::Access access) {
    add(vector.data, channel_bytes(C, vector.dtype), name, access);
  }

  // Raises what the checker found, and names outputs that were not written in full.
  void finish(cudaError_t error) const {
    std::string findings;
    for (const auto& finding : simt::take_errors()) findings += "\n" + finding;
    TORCH_CHECK(findings.empty(), "emulated kernel:", findings);
    TORCH_CHECK(error == cudaSuccess, "emulated launch: cudaError_t ", static_cast<int>(error));
    if (!checking) return;
    for (const auto& [data, name] : outputs_) {
      const std::size_t left = simt::unwritten_bytes(data);
      TORCH_CHECK(left == 0, "emulated kernel: ", left, " bytes of ", name, " were not written");
    }
  }

  static inline bool checking = true;

 private:
  std::vector<std::pair<const void*, const char*>> outputs_;
};

// With several parts, the means and the inverse deviations of all parts are rows of one tensor.
void add_stats(Buffers& buffers, const Problem& problem, const double* mean, const double* invstd,
               simt::Access access) {
  const std::size_t bytes = channel_bytes(problem.C, DType::kFloat64);
  if (problem.parts() > 1) return buffers.add(mean, 2 * bytes * problem.parts(), "save_stats", access);
  buffers.add(mean, bytes, "save_mean", access);
  buffers.add(invstd, bytes, "save_invstd", access);
}

void add_valid(Buffers& buffers, const Problem& problem) {
  buffers.add(problem.valid, static_cast<std::size_t>(problem.count()), "valid", simt::Access::kRead);
}

std::size_t mask_bytes(const Problem& problem) {
  const std::int64_t elements = mask_row_elements(problem);
  return static_cast<std::size_t>(problem.numel() / elements *
                                  mask_row_bytes(elements, cuda_mask_lanes(element_size(problem.dtype))));
}

void add_epilogue(Buffers& buffers, const Problem& problem, const ForwardEpilogue& epilogue) {
  buffers.add(epilogue.residual, channel_bytes(problem.numel(), problem.dtype), "residual", simt::Access::kRead);
  // Not kUninitialised: between its rows a mask has bytes that nobody writes or reads.
  buffers.add(epilogue.mask, mask_bytes(problem), "mask", simt::Access::kReadWrite);
}

void add_running(Buffers& buffers, std::int64_t C, const Running& running) {
  buffers.add(running.mean, C, "running_mean", simt::Access::kReadWrite);
  buffers.add(running.var, C, "running_var", simt::Access::kReadWrite);
  buffers.add(running.num_batches_tracked, sizeof(std::int64_t), "num_batches_tracked", simt::Access::kReadWrite);
}

void add_arguments(Buffers& buffers, const Problem& problem, const TrainingForward& args) {
  const std::size_t bytes = channel_bytes(problem.numel(), problem.dtype);
  buffers.add(args.input, bytes, "input", simt::Access::kRead);
  buffers.add(args.weight, problem.C, "weight");
  buffers.add(args.bias, problem.C, "bias");
  add_running(buffers, problem.C, args.running);
  buffers.add(args.output, bytes, "output", simt::Access::kUninitialised);
  add_stats(buffers, problem, args.save_mean, args.save_m2 == nullptr ? args.save_invstd : args.save_m2,
            simt::Access::kUninitialised);
  if (args.save_count != nullptr) {
    buffers.add(args.save_count, sizeof(double), "save_count", simt::Access::kUninitialised);
  }
  add_valid(buffers, problem);
  add_epilogue(buffers, problem, args.epilogue);
}

void add_arguments(Buffers& buffers, const Problem& problem, const EvalForward& args) {
  const std::size_t bytes = channel_bytes(problem.numel(), problem.dtype);
  buffers.add(args.input, bytes, "input", simt::Access::kRead);
  buffers.add(args.weight, problem.C, "weight");
  buffers.add(args.bias, problem.C, "bias");
  if (problem.parts() > 1) {
    add_stats(buffers, problem, static_cast<const double*>(args.running_mean.data), nullptr, simt::Access::kRead);
  } else {
    buffers.add(args.running_mean, problem.C, "running_mean");
    buffers.add(args.running_var, problem.C, "running_var");
    buffers.add(args.invstd, problem.C, "invstd");
  }
  add_valid(buffers, problem);
  buffers.add(args.output, bytes, "output", simt::Access::kUninitialised);
  add_stats(buffers, problem, args.save_mean, args.save_invstd, simt::Access::kUninitialised);
  add_epilogue(buffers, problem, args.epilogue);
}

void add_arguments(Buffers& buffers, const Problem& problem, const Backward& args) {
  const std::size_t bytes = channel_bytes(problem.numel(), problem.dtype);
  buffers.add(args.grad_output, bytes, "grad_output", simt::Access::kRead);
  buffers.add(args.input, bytes, "input", simt::Access::kRead);
  buffers.add(args.weight, problem.C, "weight");
  add_stats(buffers, problem, args.save_mean, args.save_invstd, simt::Access::kRead);
  add_valid(buffers, problem);
  buffers.add(args.mean_dz_xhat, problem.C, "mean_dz_xhat");
  buffers.add(args.mean_dz, problem.C, "mean_dz");
  buffers.add(args.grad_input, bytes, "grad_input", simt::Access::kUninitialised);
  buffers.add(args.grad_weight, problem.C, "grad_weight", simt::Access::kUninitialised);
  buffers.add(args.grad_bias, problem.C, "grad_bias", simt::Access::kUninitialised);
  buffers.add(args.bias, problem.C, "bias");
  buffers.add(args.residual, bytes, "residual", simt::Access::kRead);
  buffers.add(args.mask, mask_bytes(problem), "mask", simt::Access::kRead);
  buffers.add(args.grad_residual, bytes, "grad_residual", simt::Access::kUninitialised);
}

// All launches are on one stream, and have the counters of the launches before them.
unsigned* counters_of_the_stream(int count) {
  static auto& slots = *new cuda::CounterSlots;
  if (count == 0) return nullptr;
  unsigned* counters = nullptr;
  TORCH_CHECK(cuda::current_counters(&counters) == cudaSuccess);
  return counters + slots.of_stream(0, count).value();
}

// The next launch relies on how a launch leaves its counters.
void check_counters(const cuda::Workspace& workspace, const cuda::WorkspaceSize& size) {
  for (int i = 0; i < size.counters; ++i) {
    const unsigned left = workspace.counters[i];
    TORCH_CHECK(left << 1 == 0, "emulated kernel: counter ", i, " is left at ", left);
  }
}

class SimtBackend final : public Backend {
 public:
  std::uintptr_t alignment() const override { return cuda::kVectorBytes; }

  std::int64_t mask_lanes(DType dtype) const override { return cuda_mask_lanes(element_size(dtype)); }

  at::Tensor allocate_output(const at::Tensor& like, at::MemoryFormat format, const Problem&, bool) const override {
    return at::empty_like(like, like.options(), format);
  }

  void count_batch(std::int64_t* num_batches_tracked, at::Device) const override {
    Buffers buffers;
    buffers.add(num_batches_tracked, sizeof(std::int64_t), "num_batches_tracked", simt::Access::kReadWrite);
    buffers.finish(cuda::count_batch(num_batches_tracked, nullptr));
  }

  void run(const GatherStats& args, at::Device) const override {
    Buffers buffers;
    buffers.add(args.local_stats, channel_bytes(args.processes * (2 * args.C + 1), DType::kFloat64), "local_stats",
                simt::Access::kRead);
    add_running(buffers, args.C, args.running);
    buffers.add(args.mean, channel_bytes(args.C, DType::kFloat64), "mean", simt::Access::kUninitialised);
    buffers.add(args.var, channel_bytes(args.C, DType::kFloat64), "var", simt::Access::kUninitialised);
    buffers.finish(cuda::gather_stats(args, nullptr));
  }
  void run(const Problem& problem, const TrainingForward& args, at::Device) const override {
    enqueue(problem, args, [](auto&&... all) { return cuda::forward(all...); });
  }
  void run(const Problem& problem, const EvalForward& args, at::Device) const override {
    enqueue(problem, args, [](auto&&... all) { return cuda::forward(all...); });
  }
  void run(const Problem& problem, const Backward& args, at::Device) const override {
    enqueue(problem, args, [](auto&&... all) { return cuda::backward(all...); });
  }

 private:
  template <typename Args, typename Launch>
  static void enqueue(const Problem& problem, const Args& args, Launch&& launch) {
    cuda::DeviceLimits limits;
    TORCH_CHECK(cuda::current_limits(&limits) == cudaSuccess);
    limits.shared_per_block = std::min(limits.shared_per_block, shared_cap);
    limits.max_cluster = std::min(limits.max_cluster, cluster_cap);
    limits.max_grid = std::min(limits.max_grid, grid_cap);
    Buffers buffers;
    add_arguments(buffers, problem, args);
    const auto launch_plan = [&](const auto& plan) {
      last_description = cuda::description(plan);
      const cuda::WorkspaceSize& size = plan.workspace_size;
      std::vector<double> doubles(static_cast<std::size_t>(size.doubles), -1.0);
      const cuda::Workspace workspace{doubles.data(), counters_of_the_stream(size.counters)};
      if (size.doubles > 0) {
        simt::register_buffer(doubles.data(), doubles.size() * sizeof(double), "workspace",
                              simt::Access::kUninitialised);
      }
      buffers.add(workspace.counters, static_cast<std::size_t>(size.counters) * sizeof(unsigned), "counters",
                  simt::Access::kReadWrite);
      const cudaError_t error = launch(problem, args, plan, workspace, cudaStream_t{});
      simt::unregister_buffer(doubles.data());
      if (error == cudaSuccess) check_counters(workspace, size);
      return error;
    };
    if (cuda::has_parts(problem)) {
      last_part_plan = cuda::make_part_plan(problem);
      buffers.finish(launch_plan(last_part_plan));
      return;
    }
    buffers.finish(cuda::plan_and_launch(problem, args, limits, [&](const cuda::LaunchPlan& plan) {
      last_plan = plan;
      return launch_plan(plan);
    }));
  }
};

using Facts = c10::Dict<std::string, std::int64_t>;

Facts facts_of(std::initializer_list<std::pair<const char*, std::int64_t>> all) {
  Facts facts;
  for (const auto& [name, value] : all) facts.insert(name, value);
  return facts;
}

Facts facts_of(const cuda::LaunchPlan& plan) {
  return facts_of({
      {"tile", static_cast<std::int64_t>(plan.tile)},
      {"group", static_cast<std::int64_t>(plan.group)},
      {"rows", plan.rows},
      {"row_width", plan.row_width},
      {"tiles", plan.tiles},
      {"tile_width", plan.tile_width},
      {"tile_channels", plan.tile_channels},
      {"groups", plan.groups},
      {"group_blocks", plan.group_blocks},
      {"threads_x", plan.threads_x},
      {"threads_y", plan.threads_y},
      {"threads", plan.threads},
      {"parts", plan.parts},
      {"whole", plan.whole},
      {"kept", plan.kept},
      {"ring", plan.ring},
      {"share", plan.share},
      {"shared_bytes", plan.shared.bytes},
      {"doubles", plan.workspace_size.doubles},
      {"counters", plan.workspace_size.counters},
  });
}

Facts facts_of(const cuda::PartPlan& plan) {
  return facts_of({{"parts", plan.parts}, {"splits", plan.splits}, {"threads_y", plan.threads_y}});
}

Facts plan(std::int64_t N, std::int64_t C, std::int64_t HW, bool channels_last, at::ScalarType dtype,
           std::int64_t inputs, bool reads_mask, bool reduces, bool activated, std::int64_t sms,
           std::int64_t shared_per_block, std::int64_t max_cluster, std::int64_t l2_bytes, bool cooperative) {
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  const at::ScalarType types[] = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};
  Problem problem{N, C, HW, channels_last ? Layout::kChannelsLast : Layout::kChannelsFirst, DType::kFloat32};
  for (int i = 0; i < kDTypes; ++i) {
    if (types[i] == dtype) problem.dtype = dtypes[i];
  }
  cuda::DeviceLimits limits = {};
  limits.sms = static_cast<int>(sms);
  limits.shared_per_block = static_cast<int>(shared_per_block);
  limits.shared_per_sm = limits.shared_per_block + 1024;
  limits.reserved_shared = 1024;
  limits.max_cluster = static_cast<int>(max_cluster);
  limits.max_grid = std::numeric_limits<int>::max();
  limits.l2_bytes = static_cast<int>(l2_bytes);
  limits.cooperative = cooperative;
  const cuda::KernelTraits traits{static_cast<int>(inputs), reads_mask, reduces, activated};
  return facts_of(cuda::make_launch_plan(problem, traits, limits));
}

void configure(std::int64_t sms, std::int64_t shared_per_block, std::int64_t max_cluster, std::int64_t max_grid,
               std::int64_t cooperative_sms, std::int64_t seed, bool check, bool count_requests) {
  simt::DeviceLimits limits;
  limits.sms = static_cast<int>(sms);
  limits.cooperative_sms = static_cast<int>(cooperative_sms);
  simt::set_device(limits);
  shared_cap = static_cast<int>(shared_per_block);
  cluster_cap = static_cast<int>(max_cluster);
  grid_cap = static_cast<int>(max_grid);
  simt::set_options({static_cast<std::uint64_t>(seed), check, count_requests});
  Buffers::checking = check;
}

// The first counter that each launch of a process would have, -1 where none are left. A negative stream is one that is
// captured.
std::vector<std::int64_t> deal_counters(std::int64_t available, at::IntArrayRef streams, at::IntArrayRef counts) {
  cuda::CounterSlots slots(available);
  std::vector<std::int64_t> firsts;
  for (std::size_t i = 0; i < streams.size(); ++i) {
    const auto first = streams[i] < 0 ? slots.of_captured_launch(counts[i])
                                      : slots.of_stream(static_cast<unsigned long long>(streams[i]), counts[i]);
    firsts.push_back(first.value_or(-1));
  }
  return firsts;
}

Facts counters() {
  const simt::Counters counted = simt::take_counters();
  const auto number = [](std::uint64_t count) { return static_cast<std::int64_t>(count); };
  return facts_of({
      {"launches", number(counted.launches)},
      {"global_load_bytes", number(counted.global_load_bytes)},
      {"global_store_bytes", number(counted.global_store_bytes)},
      {"global_vectors", number(counted.global_vectors)},
      {"global_sectors", number(counted.global_sectors)},
      {"shared_vectors", number(counted.shared_vectors)},
      {"shared_wavefronts", number(counted.shared_wavefronts)},
  });
}

}  // namespace

const Backend& backend_of(const at::Tensor&) {
  static const SimtBackend backend;
  return backend;
}

}  // namespace bnext

TORCH_LIBRARY(bnext_simt, m) {
  bnext::define_operators(m);
  bnext::register_kernels(m);
  m.def(
      "configure(int sms, int shared_per_block, int max_cluster, int max_grid, int cooperative_sms, int seed, "
      "bool check, bool count_requests) -> ()",
      &bnext::configure);
  m.def(
      "plan(int N, int C, int HW, bool channels_last, ScalarType dtype, int inputs, bool reads_mask, bool reduces, "
      "bool activated, int sms, int shared_per_block, int max_cluster, int l2_bytes, bool cooperative) "
      "-> Dict(str, int)",
      &bnext::plan);
  m.def("last_plan() -> Dict(str, int)", [] { return bnext::facts_of(bnext::last_plan); });
  m.def("last_description() -> str", [] { return bnext::last_description; });
  m.def("last_part_plan() -> Dict(str, int)", [] { return bnext::facts_of(bnext::last_part_plan); });
  m.def("counters() -> Dict(str, int)", &bnext::counters);
  m.def("deal_counters(int available, int[] streams, int[] counts) -> int[]", &bnext::deal_counters);
}
