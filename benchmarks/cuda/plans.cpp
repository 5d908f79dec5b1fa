// Prints launch plans, for the model of the kernels' times (predict.py). The arguments are the device's limits:
//   sms shared_per_block shared_per_sm reserved_shared max_cluster l2_bytes
// Standard input has a call a line, standard output its plan, a JSON object a line:
//   N C HW channels_last element_bytes backward activated     (activated: with a residual, and ReLU)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "../../csrc/cuda/launch_plan.h"

namespace {

using namespace bnext;
using namespace bnext::cuda;

// As in forward.cu and backward.cu: forward's residual is read in the map alone, and backward with a mask reads none.
KernelTraits traits(bool backward, bool activated) {
  return {/*inputs=*/backward ? 2 : 1, /*reads_mask=*/backward && activated, /*reduces=*/true, activated};
}

void print(const LaunchPlan& plan) {
  const char* const groups[] = {"block", "cluster", "grid"};
  const std::pair<const char*, std::int64_t> numbers[] = {
      {"tiles", plan.tiles},
      {"tile_width", plan.tile_width},
      {"tile_channels", plan.tile_channels},
      {"rows", plan.rows},
      {"parts", plan.parts},
      {"groups", plan.groups},
      {"group_blocks", plan.group_blocks},
      {"threads_x", plan.threads_x},
      {"threads_y", plan.threads_y},
      {"threads", plan.threads},
      {"merge_rows", plan.merge_rows},
      {"whole", plan.whole},
      {"inputs", plan.inputs},
      {"kept", plan.kept},
      {"ring", plan.ring},
      {"share", plan.share},
      {"shared_bytes", plan.shared.bytes},
      {"load_stages", kLoadStages},
      // Of whole vectors a group requests its next tile in the map.
      {"prefetch", plan.whole && plan.groups < plan.tiles},
  };
  std::printf("{\"description\": \"%s\", \"group\": \"%s\", \"tile\": \"%s\"", description(plan).c_str(),
              groups[static_cast<int>(plan.group)], plan.tile == Tile::kChannel ? "kChannel" : "kColumns");
  for (const auto& [name, value] : numbers) std::printf(", \"%s\": %lld", name, static_cast<long long>(value));
  std::printf("}\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const auto argument = [&](int i) { return std::atoi(argv[i]); };
  DeviceLimits limits = {};
  limits.sms = argument(1);
  limits.shared_per_block = argument(2);
  limits.shared_per_sm = argument(3);
  limits.reserved_shared = argument(4);
  limits.max_cluster = argument(5);
  limits.l2_bytes = argument(6);
  limits.max_grid = 2147483647;
  limits.cooperative = true;
  long long N, C, HW;
  int last, element_bytes, backward, activated;
  while (std::scanf("%lld %lld %lld %d %d %d %d", &N, &C, &HW, &last, &element_bytes, &backward, &activated) == 7) {
    const Layout layout = last != 0 ? Layout::kChannelsLast : Layout::kChannelsFirst;
    const Problem problem = {N, C, HW, layout, element_bytes == 4 ? DType::kFloat32 : DType::kBFloat16};
    print(make_launch_plan(problem, traits(backward != 0, activated != 0), limits));
  }
}
