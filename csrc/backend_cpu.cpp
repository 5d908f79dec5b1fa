#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include "backend.h"
#include "cpu/batch_norm.h"
#include "cpu/huge_pages.h"

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
    at::Tensor output = at::empty_like(like, like.options(), format);
    const cpu::Parallel parallel = parallel_for(problem);
    const bool in_order = problem.layout == Layout::kChannelsLast || !reduces;
    cpu::use_huge_pages(output.mutable_data_ptr(), output.nbytes(), in_order ? nullptr : &parallel);
    return output;
  }

  void count_batch(std::int64_t* num_batches_tracked, at::Device) const override { ++*num_batches_tracked; }

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
