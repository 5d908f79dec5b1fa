#include <ATen/Parallel.h>

#include "backend.h"
#include "cpu/batch_norm.h"
#include "cpu/large_blocks.h"
#include "output_memory.h"

namespace bnext {
namespace {

// Up to this many elements the barriers of parallel regions cost more than they save.
constexpr std::int64_t kSerialElements = 65536;

cpu::Parallel parallel_for(const Problem& problem) {
  if (problem.numel() <= kSerialElements) return cpu::Parallel::serial();
  return cpu::Parallel([](std::int64_t tasks, cpu::Parallel::Body body, void* context) {
    at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
  });
}

class CpuBackend final : public Backend {
 public:
  std::uintptr_t alignment() const override { return 1; }

  std::int64_t mask_lanes(const Problem&) const override { return 8; }

  // A map that follows a reduction jumps from image to image in channels-first memory.
  at::Tensor allocate_output(const at::Tensor& like, at::MemoryFormat format, const Problem& problem,
                             bool reduces) const override {
    at::Tensor output = empty_output(like, format);
    const bool jumps = problem.layout == Layout::kChannelsFirst && reduces;
    if (jumps && output.nbytes() >= cpu::kMinLargeBlock) {
      cpu::touch_pages(output.mutable_data_ptr(), output.nbytes(), parallel_for(problem));
    }
    return output;
  }

  void count_batch(std::int64_t* num_batches_tracked, at::Device) const override { ++*num_batches_tracked; }

  void run(const Merge& args, at::Device) const override { cpu::merge(args); }
  void run(const Problem& problem, const TrainingForward& args, at::Device) const override {
    cpu::forward(problem, args, parallel_for(problem));
  }
  void run(const Problem& problem, const EvalForward& args, at::Device) const override {
    cpu::forward(problem, args, parallel_for(problem));
  }
  void run(const Problem& problem, const Backward& args, at::Device) const override {
    cpu::backward(problem, args, parallel_for(problem));
  }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace bnext
