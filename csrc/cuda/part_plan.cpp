#include "part_plan.h"

#include <algorithm>

#include "../common/elementwise.h"
#include "../common/mask.h"

namespace bnext::cuda {
namespace {

constexpr int kWarp = 32;
// Enough blocks to keep a large device busy, but no more than there is work for, nor more sums than are merged quickly.
constexpr std::int64_t kWantedBlocks = 1024;
constexpr std::int64_t kMinSteps = 8;  // of a thread
constexpr std::int64_t kMaxSplits = 256;
constexpr std::int64_t kMaxChunk = std::int64_t{1} << 30;  // counted in 32 bits

static_assert(kPartThreads % kPartChannels == 0 && kPartChannels % kWarp == 0);
static_assert(kWarp % kCudaMaskBytes == 0, "threads that share a byte of a mask are in one warp");

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int power_of_two_from(std::int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

PartWorkspace layout(const PartPlan& plan, std::int64_t& doubles) {
  doubles = 0;
  const auto take = [&](std::int64_t n) {
    const std::int64_t begin = doubles;
    doubles += n;
    return begin;
  };
  const std::int64_t of_parts = plan.parts == 1 ? 0 : plan.parts * plan.C;
  PartWorkspace workspace = {};
  workspace.partials = take(plan.parts * plan.splits * plan.C * kPartialDoubles);
  workspace.coefficients = take(plan.parts * plan.C * kMaxCoefficients);
  workspace.m2 = take(of_parts);
  workspace.grad_weight = take(of_parts);
  workspace.grad_bias = take(of_parts);
  workspace.counts = take(plan.parts);
  return workspace;
}

}  // namespace

PartPlan make_part_plan(const Problem& problem) {
  const bool last = problem.layout == Layout::kChannelsLast;
  const std::int64_t lanes = cuda_mask_lanes(element_size(problem.dtype));
  PartPlan plan = {};
  plan.valid = problem.valid;
  plan.channels_last = last;
  plan.C = problem.C;
  plan.images = last ? problem.count() : problem.N;
  plan.plane = last ? 1 : problem.HW;
  plan.padded_plane = last ? 1 : divide_up(problem.HW, lanes) * lanes;
  plan.parts = problem.parts();
  plan.part_images = plan.parts == 1 ? plan.images : problem.virtual_batch * (last ? problem.HW : 1);
  plan.mask_row_bytes = mask_row_bytes(mask_row_elements(problem), lanes);

  plan.threads_x = last ? power_of_two_from(plan.C, kPartChannels) : 1;
  plan.mask_threads = static_cast<int>(last ? std::min<std::int64_t>(lanes, plan.threads_x) : lanes);
  plan.tiles = divide_up(plan.C, plan.threads_x);
  const std::int64_t positions = plan.part_images * plan.padded_plane;
  plan.threads_y = std::max(power_of_two_from(positions, kPartThreads / plan.threads_x), kWarp / plan.threads_x);
  const std::int64_t by_work = positions / (plan.threads_y * kMinSteps);
  const std::int64_t wanted = divide_up(kWantedBlocks, plan.tiles * plan.parts);
  const std::int64_t splits = std::max(divide_up(positions, kMaxChunk), std::min({by_work, wanted, kMaxSplits}));
  plan.chunk = divide_up(divide_up(positions, splits), plan.threads_y) * plan.threads_y;
  plan.splits = divide_up(positions, plan.chunk);
  plan.step_images = plan.threads_y / plan.padded_plane;
  plan.step_spots = plan.threads_y % plan.padded_plane;
  plan.image_elements = plan.C * plan.plane;

  plan.workspace_size = {};
  plan.workspace = layout(plan, plan.workspace_size.doubles);
  return plan;
}

std::string description(const PartPlan& plan) {
  return std::to_string(plan.parts) + (plan.parts == 1 ? " part" : " parts") +
         (plan.valid != nullptr ? ", padded" : "") + ", read twice";
}

}  // namespace bnext::cuda
