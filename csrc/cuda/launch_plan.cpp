#include "launch_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "../common/elementwise.h"
#include "../common/mask.h"

namespace bnext::cuda {
namespace {

constexpr std::int64_t kSectorBytes = 32;            // reading less of a row wastes bandwidth
constexpr std::int64_t kLineBytes = 128;             // reading more gains nothing where all of a tile is kept
constexpr std::int64_t kSmallTensorBytes = 8 << 20;  // up to this size L2 combines the sectors of a line
constexpr std::int64_t kMinItems = 4;  // vectors a thread should have before a tile is shared by more blocks
constexpr std::int64_t kMapItems = 8;  // the same where the blocks of a tile need not wait for each other
// Doubles of other blocks that a thread reads at most: beyond, a share of the reads and a second barrier cost less.
constexpr std::int64_t kMaxDirectReads = 8;
// Vectors that a thread could move while its group's blocks exchange their sums over the grid, about 5 us.
constexpr double kExchangeVectors = 18;
constexpr std::int64_t kMaxExtraParts = 32;  // that are tried to cut rows evenly
// Vectors and their bytes of a mask are counted in 32 bits; a plane takes up to three bytes more than it has vectors.
constexpr std::int64_t kMaxWholeVectors = std::int64_t{1} << 30;
constexpr std::int64_t kMaxFoldedRowBytes = 2048;  // a tile of all channels: their sums have to fit beside the slots
constexpr std::int64_t kL2Share = 2;               // results larger than L2's size over this are stored past it
constexpr std::int64_t kMaskWordBytes = 4;         // the least that an asynchronous copy moves

static_assert(kVectorBytes == kCudaMaskBytes, "a vector's lanes share a byte of a mask");

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

std::int64_t power_of_two_from(std::int64_t n) {
  std::int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// The smallest number of pixels or planes of `bytes` bytes that fill whole vectors.
std::int64_t vector_group(std::int64_t bytes) { return kVectorBytes / std::gcd(std::int64_t{kVectorBytes}, bytes); }

// What is kept of a vector: that of each input, and its word of the mask.
std::int64_t vector_bytes(const LaunchPlan& plan) {
  return std::int64_t{plan.inputs} * kVectorBytes + (plan.reads_mask ? kMaskWordBytes : 0);
}

// ---- tiles

// Bytes of a row that a tile takes: a cache line, if a group across the device can keep such a tile, or half a line if
// two groups cannot: one group alone moves nothing while it waits for its sums. A tile that cannot be kept anyway is
// read in long runs, by one group. Of a small tensor, narrower tiles make more groups.
std::int64_t row_bytes(const LaunchPlan& plan, const Problem& problem, const DeviceLimits& limits) {
  const std::int64_t row = problem.C * element_size(problem.dtype);
  std::int64_t bytes = kLineBytes;
  if (problem.count() * row * plan.inputs <= kSmallTensorBytes) {
    while (bytes > kSectorBytes && divide_up(row, bytes) < limits.sms) bytes /= 2;
    return bytes;
  }
  const std::int64_t shared = std::int64_t{limits.sms} * limits.shared_per_block;
  const std::int64_t tile = problem.count() * (bytes / kVectorBytes) * vector_bytes(plan);
  // The sums and the coefficients take a fifth of shared memory at most, and a tenth beside long tiles.
  if (tile <= shared * 4 / 5) return 2 * tile <= shared * 9 / 10 ? bytes : bytes / 2;
  bytes = limits.max_row_bytes;
  while (bytes > kSectorBytes && row > bytes && row % bytes != 0) bytes /= 2;
  return bytes;
}

void choose_channels_last(LaunchPlan& plan, const Problem& problem, const DeviceLimits& limits, bool may_fold) {
  const std::int64_t size = element_size(problem.dtype);
  const std::int64_t M = problem.count();
  const std::int64_t fold = vector_group(problem.C * size);
  plan.tile = Tile::kColumns;
  plan.columns_per_channel = 1;
  if (may_fold && fold > 1 && fold <= M && fold * problem.C * size <= kMaxFoldedRowBytes) {
    // A channel's values lie in `fold` columns, which one tile has to hold, so the tile is as wide as the row.
    plan.rows = divide_up(M, fold);
    plan.row_width = plan.tile_width = fold * problem.C;
    plan.tiles = 1;
    plan.tile_channels = static_cast<int>(problem.C);
    return;
  }
  plan.rows = M;
  plan.row_width = problem.C;
  plan.tile_width = std::min(row_bytes(plan, problem, limits) / size, problem.C);
  plan.tiles = divide_up(problem.C, plan.tile_width);
  plan.tile_channels = static_cast<int>(plan.tile_width);
}

void choose_channels_first(LaunchPlan& plan, const Problem& problem) {
  const std::int64_t size = element_size(problem.dtype);
  const std::int64_t plane = problem.HW * size;
  plan.rows = problem.N;
  plan.row_width = problem.C * problem.HW;
  plan.columns_per_channel = problem.HW;
  // Planes that are short, or whose ends cut vectors in two, are taken several at a time, as long as every row begins
  // with a whole vector.
  std::int64_t channels = vector_group(plane);
  while (channels * plane < kLineBytes) channels *= 2;
  const bool aligned_rows = plan.row_width * size % kVectorBytes == 0;
  if (channels > 1 && aligned_rows && channels * plane <= kThreads * kVectorBytes) {
    plan.tile = Tile::kColumns;
    channels = std::min(channels, problem.C);
  } else {
    plan.tile = Tile::kChannel;
    channels = 1;
  }
  plan.tile_width = channels * problem.HW;
  plan.tile_channels = static_cast<int>(channels);
  plan.tiles = divide_up(problem.C, channels);
}

// ---- threads

void set_thread_rows(LaunchPlan& plan, int y) {
  plan.threads_y = y;
  plan.workers = plan.threads_x * y;
  plan.threads = static_cast<int>(round_up(plan.workers, 32));
  // Merging more rows at a time would save barriers, but the memory is better used to keep vectors.
  plan.merge_rows = static_cast<int>(divide_up(y, 8));
}

void choose_threads(LaunchPlan& plan, const Problem& problem, int max_threads) {
  const std::int64_t V = kVectorBytes / element_size(problem.dtype);
  std::int64_t vectors = divide_up(plan.tile_width, V);
  // A row that begins inside a vector may touch one vector more.
  if (plan.tile == Tile::kChannel && (plan.row_width % V != 0 || plan.tile_width % V != 0)) {
    vectors = divide_up(plan.tile_width + V - 1, V);
  }
  // A few parts more, if that makes all parts equally long, so that no thread lies beyond the end of a row.
  const std::int64_t fewest = divide_up(vectors, max_threads);
  const std::int64_t most = std::min(2 * fewest, fewest + kMaxExtraParts);
  std::int64_t parts = fewest;
  while (vectors % parts != 0 && parts < most) ++parts;
  if (vectors % parts != 0) parts = fewest;
  const std::int64_t x = divide_up(vectors, parts);
  const std::int64_t y = std::min<std::int64_t>(max_threads / x, plan.rows * parts);
  plan.parts = static_cast<int>(parts);
  plan.threads_x = static_cast<int>(x);
  set_thread_rows(plan, static_cast<int>(y));
  plan.whole = plan.row_width % V == 0 && plan.row_width % plan.tile_width == 0 &&
               plan.numel == plan.rows * plan.row_width && plan.tile_width == x * plan.parts * V &&
               plan.numel / V < kMaxWholeVectors;
}

// ---- shared memory

// The buffer in which a block's threads merge their sums: merge_rows rows of threads at a time, then the columns.
std::int64_t merge_bytes(const LaunchPlan& plan, const Problem& problem, bool reduces) {
  if (!reduces) return 0;
  const std::int64_t V = kVectorBytes / element_size(problem.dtype);
  const std::int64_t pairs = plan.tile == Tile::kColumns ? plan.threads_x * V * plan.merge_rows : plan.threads / 32;
  // The grid's partial sums pass through it too, one value a thread.
  return std::max<std::int64_t>(pairs * 2, plan.threads) * static_cast<std::int64_t>(sizeof(double));
}

// One slot of every worker.
std::int64_t slot_bytes(const LaunchPlan& plan) { return plan.workers * vector_bytes(plan); }

void lay_out_shared(LaunchPlan& plan, const Problem& problem, const KernelTraits& traits) {
  const bool reduces = traits.reduces;
  std::int64_t offset = 0;
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t begin = offset;
    offset += round_up(bytes, kVectorBytes);
    return static_cast<int>(begin);
  };
  const std::int64_t doubles = plan.tile_channels * static_cast<std::int64_t>(sizeof(double));
  SharedLayout& shared = plan.shared;
  shared.own = take(reduces ? 4 * doubles : 0);
  shared.total = take(reduces ? 2 * doubles : 0);
  shared.shift = take(reduces ? (traits.activated ? kMaxReduceCoefficients : 1) * doubles : 0);
  shared.coefficients = take(kMaxCoefficients * doubles);
  shared.needs_fp64 = take(reduces ? plan.tile_channels * static_cast<std::int64_t>(sizeof(int)) : 0);
  const std::int64_t lanes = kVectorBytes / element_size(problem.dtype);
  const std::int64_t compute_bytes = problem.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const bool spreads = traits.activated && plan.tile == Tile::kColumns;
  const std::int64_t column_bytes = spreads ? kMaxCoefficients * lanes * plan.threads_x * compute_bytes : 0;
  shared.merge = shared.columns = take(std::max(merge_bytes(plan, problem, reduces), column_bytes));
  const std::int64_t slots = std::int64_t{plan.kept + plan.ring} * plan.workers;
  shared.slot = plan.workers * kVectorBytes;
  shared.region = static_cast<int>(slots * kVectorBytes);
  shared.staging = take(std::int64_t{plan.inputs} * shared.region);
  shared.mask = take(plan.reads_mask ? slots * kMaskWordBytes : 0);
  shared.bytes = static_cast<int>(offset);
}

bool fits(const LaunchPlan& plan, const DeviceLimits& limits) {
  return plan.shared.bytes + kRingSlots * slot_bytes(plan) <= limits.shared_per_block;
}

// Tiles and threads. A wide tile's sums and coefficients may leave too little room for the slots of many threads.
void choose_tiles(LaunchPlan& plan, const Problem& problem, const KernelTraits& traits, const DeviceLimits& limits,
                  int max_threads, bool may_fold) {
  if (problem.layout == Layout::kChannelsFirst) {
    choose_channels_first(plan, problem);
  } else {
    choose_channels_last(plan, problem, limits, may_fold);
  }
  choose_threads(plan, problem, max_threads);
  lay_out_shared(plan, problem, traits);
  while (plan.threads_y > 1 && !fits(plan, limits)) {
    set_thread_rows(plan, (plan.threads_y + 1) / 2);
    lay_out_shared(plan, problem, traits);
  }
}

// ---- groups

// Steps that a thread takes with `blocks` blocks in the group.
std::int64_t items(const LaunchPlan& plan, std::int64_t blocks) {
  return divide_up(plan.rows * plan.parts, plan.threads_y * blocks);
}

// Slots that a thread can have if `blocks` blocks share an SM. So far plan.shared is laid out without slots.
std::int64_t capacity(const LaunchPlan& plan, const DeviceLimits& limits, int blocks) {
  const std::int64_t share = std::min(limits.shared_per_block, limits.shared_per_sm / blocks - limits.reserved_shared);
  return std::max<std::int64_t>(0, (share - plan.shared.bytes) / slot_bytes(plan));
}

void choose_map_blocks(LaunchPlan& plan, const DeviceLimits& limits) {
  plan.group = Group::kBlock;
  plan.kept = 0;
  plan.ring = kRingSlots;
  plan.group_blocks = static_cast<int>(std::min<std::int64_t>(divide_up(items(plan, 1), kMapItems), limits.max_grid));
  plan.groups = static_cast<int>(std::min(plan.tiles, std::max<std::int64_t>(1, limits.max_grid / plan.group_blocks)));
}

// The time of a tile in each of `groups` groups that work at once, in steps of all of the device's threads. While one
// group exchanges its sums, the others move memory: more groups wait less, but no group less than for its own exchange.
double steps_at_once(const LaunchPlan& plan, std::int64_t groups, std::int64_t resident) {
  const auto moving = static_cast<double>(items(plan, resident / groups));
  const double exchange = kExchangeVectors / (plan.inputs + 1);
  const double alone = moving / static_cast<double>(groups) + exchange;
  const double least = std::max(moving, alone);
  return least + (moving + exchange - least) / static_cast<double>(groups);
}

// The number of groups that takes the least time, with at least `fewest` blocks in each group.
std::int64_t balanced_groups(const LaunchPlan& plan, std::int64_t fewest, std::int64_t resident) {
  std::int64_t best = 1;
  double best_time = std::numeric_limits<double>::infinity();
  for (std::int64_t groups = 1; groups <= std::min(plan.tiles, resident / fewest); ++groups) {
    const double time = static_cast<double>(divide_up(plan.tiles, groups)) * steps_at_once(plan, groups, resident);
    if (time <= best_time) {
      best = groups;
      best_time = time;
    }
  }
  return best;
}

// Clusters of `blocks` blocks that run at once, as the driver says; as many as the SMs hold if it was not asked.
std::int64_t clusters_at_once(const DeviceLimits& limits, std::int64_t blocks, int per_sm) {
  int size = 0;
  while ((2 << size) < blocks) ++size;
  const std::int64_t held = limits.sms * per_sm / blocks;
  const int asked = limits.clusters_at_once[per_sm - 1][size];
  return asked > 0 ? std::min<std::int64_t>(asked, held) : held;
}

void choose_group(LaunchPlan& plan, const DeviceLimits& limits) {
  // Two blocks an SM, with half of its shared memory each, if half holds at least a ring's slots.
  const std::int64_t half = plan.threads <= kThreads ? capacity(plan, limits, kBlocksPerSM) : 0;
  const std::int64_t whole = capacity(plan, limits, 1);
  const int per_sm = half >= kRingSlots ? kBlocksPerSM : 1;
  std::int64_t resident = std::int64_t{limits.sms} * per_sm;

  const std::int64_t most = std::max<std::int64_t>(1, items(plan, 1) / kMinItems);
  const std::int64_t to_fill = std::min(divide_up(resident, plan.tiles), most);
  // Filling the device is worth a cluster's barrier, but not the grid's, which costs more than it gains.
  const auto blocks_with = [&](std::int64_t slots) {
    const std::int64_t to_fit = slots == 0 ? resident + 1 : divide_up(items(plan, 1), slots);
    return std::max(to_fit,
                    to_fit > limits.max_cluster ? to_fill : std::min<std::int64_t>(to_fill, limits.max_cluster));
  };
  // A cluster's blocks run at once, so the device has to hold them all.
  const auto clusters = [&](std::int64_t blocks, std::int64_t at_once) {
    return power_of_two_from(blocks) <= std::min<std::int64_t>(limits.max_cluster, at_once);
  };
  std::int64_t slots = per_sm == kBlocksPerSM ? half : whole;
  std::int64_t blocks = blocks_with(slots);
  bool cluster = clusters(blocks, resident);
  // With one block an SM, which has all of its memory, the group may fit into a cluster, whose barrier is cheaper.
  if (!cluster && clusters(blocks_with(whole), limits.sms)) {
    slots = whole;
    blocks = blocks_with(whole);
    cluster = true;
  }
  plan.group = blocks == 1 ? Group::kBlock : cluster ? Group::kCluster : Group::kGrid;
  if (plan.group == Group::kGrid && !limits.cooperative) {
    blocks = std::min<std::int64_t>(limits.max_cluster, resident);
    while (power_of_two_from(blocks) > blocks) --blocks;
    plan.group = blocks == 1 ? Group::kBlock : Group::kCluster;
  }
  if (plan.group == Group::kCluster) blocks = power_of_two_from(blocks);
  std::int64_t groups = limits.max_grid / blocks;
  if (plan.group != Group::kGrid && plan.whole) {
    // No more groups than run at once: each requests its next tile while it maps the current one.
    const int blocks_per_sm = slots == half ? kBlocksPerSM : 1;
    groups = std::min(groups, plan.group == Group::kBlock ? std::int64_t{limits.sms} * blocks_per_sm
                                                          : clusters_at_once(limits, blocks, blocks_per_sm));
    groups = std::max<std::int64_t>(groups, 1);
  }
  if (plan.group == Group::kGrid) {
    // One block an SM keeps a little more than two: there is only one set of sums and coefficients beside the slots.
    if (items(plan, resident) > slots && items(plan, limits.sms) <= whole) {
      resident = limits.sms;
      slots = whole;
      blocks = blocks_with(whole);
    }
    groups = balanced_groups(plan, std::min(blocks, resident), resident);
    blocks = resident / groups;
  }
  plan.group_blocks = static_cast<int>(blocks);
  plan.groups = static_cast<int>(std::min(plan.tiles, groups));
  const bool all = items(plan, blocks) <= slots;
  plan.ring = all ? 0 : kRingSlots;
  plan.kept = static_cast<int>(all ? items(plan, blocks) : std::max<std::int64_t>(0, slots - kRingSlots));
}

// ---- workspace, samples, steps, masks

// A counter for each group. The sums of each group's blocks, [group][2: parity][block][2][channels]; then, where blocks
// share the additions, each group's totals, [group][2][channels].
void choose_workspace(LaunchPlan& plan) {
  plan.share = 0;
  plan.workspace_size = {};
  if (plan.group != Group::kGrid) return;
  const std::int64_t values = 2 * std::int64_t{plan.tile_channels};
  if (plan.group_blocks * values > kMaxDirectReads * plan.threads) {
    plan.share = static_cast<int>(divide_up(values, plan.group_blocks));
  }
  plan.workspace_size.counters = plan.groups;
  plan.workspace_size.doubles = plan.groups * (2 * std::int64_t{plan.group_blocks} + (plan.share > 0 ? 1 : 0)) * values;
}

void choose_samples(LaunchPlan& plan, const Problem& problem) {
  const SamplePositions positions(problem.count());
  plan.samples = positions.samples;
  const bool first = problem.layout == Layout::kChannelsFirst;
  plan.sample_stride = first ? problem.HW : 1;
  for (int i = 0; i < kMaxSamples; ++i) {
    const std::int64_t at = i < positions.samples ? positions.at[i] : 0;
    plan.sample_offsets[i] = first ? at / problem.HW * problem.C * problem.HW + at % problem.HW : at * problem.C;
  }
}

void choose_steps(LaunchPlan& plan, const Problem& problem) {
  const std::int64_t V = kVectorBytes / element_size(problem.dtype);
  const std::int64_t row = std::int64_t{plan.parts} * plan.threads_x;  // in vectors, idle ones at the end included
  plan.step = std::int64_t{plan.threads_y} * plan.group_blocks;
  plan.part_step = static_cast<int>(plan.step % plan.parts);
  const std::int64_t rows = plan.step / plan.parts;
  const std::int64_t vectors = std::int64_t{plan.part_step} * plan.threads_x;
  plan.vector_step = rows * plan.row_width + vectors * V;
  plan.vector_wrap = plan.row_width - row * V;
  const std::int64_t units = plan.rows * plan.parts;
  plan.full_steps = static_cast<int>(units / plan.step);
  plan.partial_step = units % plan.step;
  plan.next_tile = plan.groups * plan.tile_width / V;
  plan.next_mask = plan.groups * plan.mask_tile;
  plan.mask_step = rows * plan.mask_row + vectors;
  plan.mask_wrap = plan.mask_row - row;
}

// Each vector has a byte of its own. Where a tile is a single channel, whose ends may cut a vector in two, each plane
// has bytes of its own, too.
void choose_mask(LaunchPlan& plan, const Problem& problem) {
  const std::int64_t lanes = cuda_mask_lanes(element_size(problem.dtype));
  if (plan.tile == Tile::kChannel) {
    plan.mask_tile = mask_row_bytes(problem.HW, lanes);
    plan.mask_row = problem.C * plan.mask_tile;
  } else {
    plan.mask_tile = plan.tile_width / lanes;
    plan.mask_row = divide_up(plan.row_width, lanes);
  }
}

LaunchPlan plan_of_blocks(const Problem& problem, const KernelTraits& traits, const DeviceLimits& limits,
                          int max_threads) {
  LaunchPlan plan = {};
  plan.inputs = traits.inputs;
  plan.reads_mask = traits.reads_mask;
  plan.reduces = traits.reduces;
  plan.C = problem.C;
  plan.numel = problem.numel();
  plan.exceeds_l2 = kL2Share * plan.numel * element_size(problem.dtype) > limits.l2_bytes;
  choose_tiles(plan, problem, traits, limits, max_threads, /*may_fold=*/true);
  // A tile of folded pixels holds all channels, whose sums may be too many for shared memory.
  if (!fits(plan, limits)) choose_tiles(plan, problem, traits, limits, max_threads, /*may_fold=*/false);
  choose_mask(plan, problem);
  if (traits.reduces) {
    choose_group(plan, limits);
  } else {
    choose_map_blocks(plan, limits);
  }
  lay_out_shared(plan, problem, traits);
  choose_steps(plan, problem);
  choose_workspace(plan);
  choose_samples(plan, problem);
  return plan;
}

bool fills_an_sm(const LaunchPlan& plan, const DeviceLimits& limits) {
  return plan.shared.bytes > limits.shared_per_sm / kBlocksPerSM - limits.reserved_shared;
}

}  // namespace

LaunchPlan make_launch_plan(const Problem& problem, const KernelTraits& traits, const DeviceLimits& limits) {
  const LaunchPlan plan = plan_of_blocks(problem, traits, limits, kThreads);
  if (!plan.reduces || !fills_an_sm(plan, limits)) return plan;
  // A block alone on an SM has the registers of two: it doubles its threads, unless the group would grow or keep less.
  const LaunchPlan wide = plan_of_blocks(problem, traits, limits, kMaxThreads);
  const bool alike = wide.group == plan.group && wide.group_blocks <= plan.group_blocks && wide.ring <= plan.ring;
  return alike && fills_an_sm(wide, limits) && wide.shared.bytes <= limits.shared_per_block ? wide : plan;
}

std::string description(const LaunchPlan& plan) {
  if (!plan.reduces) return "no sums";
  const std::string blocks = std::to_string(plan.group_blocks);
  const std::string group = plan.group == Group::kBlock     ? "block"
                            : plan.group == Group::kCluster ? "cluster of " + blocks
                                                            : "grid of " + blocks;
  if (plan.ring == 0) return group + ", read once";
  return group + ", " + std::to_string(plan.kept) + " of " + std::to_string(items(plan, plan.group_blocks)) + " kept";
}

}  // namespace bnext::cuda
