#include <ATen/Parallel.h>

#include "../common/mask.h"
#include "../cpu/batch_norm.h"
#include "../cpu/huge_page_cache.h"
#include "backend.h"
#include "output_memory.h"
#include "schema.h"

namespace bnext {
namespace {

// Up to this much work, in elements, the barriers of parallel regions cost more than threads save. Channels first
// reduces and maps in one region, channels last in two or three; and a map alone takes half as long. The work per
// channel takes as long as so many elements; less in channels-last memory, where several channels are done at once.
constexpr std::int64_t kSerialElements = 65536;
constexpr std::int64_t kSerialElementsOfOneRegion = 24576;
constexpr std::int64_t kElementsOfAChannel = 64;
constexpr std::int64_t kElementsOfAColumn = 8;

cpu::Parallel parallel_for(const Problem& problem, bool reduces) {
  const bool planes = problem.layout == Layout::kChannelsFirst;
  const std::int64_t work = problem.numel() + (planes ? kElementsOfAChannel : kElementsOfAColumn) * problem.C;
  if (work <= (planes && reduces ? kSerialElementsOfOneRegion : kSerialElements)) return cpu::Parallel::serial();
  const auto loop = [](std::int64_t tasks, cpu::Parallel::Body body, void* context) {
    at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
  };
  return {loop, at::get_num_threads()};
}

class CpuBackend final : public Backend {
 public:
  std::uintptr_t alignment() const override { return 1; }

  std::int64_t mask_lanes(DType) const override { return kCpuMaskLanes; }

  // A channels-first map after a reduction writes with strides, from image to image: fresh pages are touched before.
  at::Tensor allocate_output(const at::Tensor& like, at::MemoryFormat format, const Problem& problem,
                             bool reduces) const override {
    at::Tensor output = empty_output(like, format);
    const bool strided = problem.layout == Layout::kChannelsFirst && reduces;
    if (strided && output.nbytes() >= cpu::kMinCachedBytes) {
      cpu::touch_pages(output.mutable_data_ptr(), output.nbytes(), parallel_for(problem, reduces));
    }
    return output;
  }

  void count_batch(std::int64_t* num_batches_tracked, at::Device) const override { ++*num_batches_tracked; }

  void run(const GatherStats& args, at::Device) const override { cpu::gather_stats(args); }
  void run(const Problem& problem, const TrainingForward& args, at::Device) const override {
    cpu::forward(problem, args, parallel_for(problem, /*reduces=*/true));
  }
  void run(const Problem& problem, const EvalForward& args, at::Device) const override {
    cpu::forward(problem, args, parallel_for(problem, /*reduces=*/false));
  }
  void run(const Problem& problem, const Backward& args, at::Device) const override {
    cpu::backward(problem, args, parallel_for(problem, args.reduces()));
  }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace bnext

TORCH_LIBRARY_IMPL(bnext, CPU, m) { bnext::register_kernels(m); }
