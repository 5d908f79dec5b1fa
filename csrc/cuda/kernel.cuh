// The one kernel: reduce a tile's channels, exchange the sums with the team, finish the channels, map the elements.
//
// Grid: plan.teams * plan.team_blocks blocks of plan.threads threads; team = blockIdx.x / team_blocks takes the tiles
// team, team + teams, ... Each input is read once, as far as shared memory holds it (plan.kept vectors a thread); the
// rest is read again for the map, the last read first, while L2 has it. Bytes moved (S = bytes of the tensor): training
// forward 2 S, backward 3 S, evaluation forward 2 S; with nothing kept 3 S, 5 S, 2 S.
// Results are the same bits at every run: what is added to what, and in which order, depends on the plan alone.
// The caller has ruled out empty problems, and aligned all data to 16 bytes.
#pragma once

#include "../common/channel_ops.h"
#include "../common/samples.h"
#include "reduce.cuh"
#include "slab.cuh"
#include "team.cuh"

// An emulation has its own.
#if defined(__CUDACC__)
#define BNEXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace bnext::cuda {

struct KernelArgs {
  Plan plan;
  Tensors tensors;
  Epilogue epilogue;
  unsigned char* workspace;
  std::int64_t* count_batch;  // incremented by one thread; null: not here
};

// Pointers into a block's shared memory.
struct Shared {
  unsigned char* slab;
  unsigned char* mask;
  void* columns;
  double* merge;
  double* own;
  double* total;
  double* shift;
  double* coefficients;
  int* doubtful;

  __device__ __forceinline__ Shared(const SharedLayout& layout, unsigned char* base)
      : slab(base + layout.slab),
        mask(base + layout.mask),
        columns(base + layout.columns),
        merge(reinterpret_cast<double*>(base + layout.merge)),
        own(reinterpret_cast<double*>(base + layout.own)),
        total(reinterpret_cast<double*>(base + layout.total)),
        shift(reinterpret_cast<double*>(base + layout.shift)),
        coefficients(reinterpret_cast<double*>(base + layout.coefficients)),
        doubtful(reinterpret_cast<int*>(base + layout.doubtful)) {}
};

template <typename scalar_t, typename Op, typename Reduce, typename Map, Tile kTile>
class BlockTask {
  using Acc = Natural<scalar_t>;
  static constexpr bool kReduces = !std::is_same_v<Reduce, NoSums>;
  // The shift is a sample of the channel's own values; else it is known.
  static constexpr bool kSamples = std::is_same_v<Reduce, MomentSums>;
  static constexpr int kN = kLanes<scalar_t>;

 public:
  __device__ __forceinline__ BlockTask(const KernelArgs& args, const Op& op, const Shared& shared, TeamMember& member,
                                       std::int64_t tile)
      : args_(args),
        plan_(args.plan),
        op_(op),
        shared_(shared),
        member_(member),
        span_(args.plan, tile),
        slab_(args.plan, args.tensors, shared.slab, shared.mask) {}

  __device__ __forceinline__ void run() {
    const Walk<scalar_t, kTile> walk(plan_, span_, span_.tile, member_.rank);
    const std::int64_t items = walk.items();
    const int kept = items < plan_.kept ? static_cast<int>(items) : plan_.kept;
    Verdict verdict;
    if constexpr (kReduces) {
      // The samples are asked for first: behind all the rest they would arrive last.
      const Acc sample = kSamples ? load_sample(0) : Acc{};
      request_kept(walk, kept);
      // Where float32 cannot begin, every channel counts as doubtful.
      verdict = {true, false};
      if (choose_coefficients(sample)) verdict = finish(team_sums<Acc>(walk, items, kept), /*again=*/false);
      if (verdict.doubtful) {
        const bool wide = verdict.wide;
        verdict = finish(team_sums<double>(walk_anew(), items, kept), /*again=*/true);
        verdict.wide |= wide;
      }
    } else {
      verdict = finish(nullptr, /*again=*/false);
    }
    if (!args_.tensors.maps()) return;
    if (std::is_same_v<Acc, double> || verdict.wide) {
      map<double>(items, kept);
    } else {
      map<float>(items, kept);
    }
  }

 private:
  // Of a tile, the same in all threads of the team.
  struct Verdict {
    bool doubtful;  // float32 was not enough for a channel's sums
    bool wide;      // nor for a channel's coefficients
  };

  // From the first step again, by a few divisions: the registers to remember it would be missed meanwhile. The compiler
  // is not to see that it has been here before.
  __device__ __forceinline__ Walk<scalar_t, kTile> walk_anew() const {
    std::int64_t tile = span_.tile;
    int rank = member_.rank;
    asm volatile("" : "+l"(tile), "+r"(rank));
    return Walk<scalar_t, kTile>(plan_, span_, tile, rank);
  }

  __device__ __forceinline__ void request_kept(Walk<scalar_t, kTile> walk, int kept) {
    int k = 0;
#pragma unroll 1
    for (int stage = 0; stage < kLoadStages; ++stage) {
      for (const int end = stage_end(stage, kept); k < end; ++k, walk.advance()) slab_.request(k, walk.segment());
      __pipeline_commit();
    }
  }

  __device__ __forceinline__ static int stage_end(int stage, int kept) { return (stage + 1) * kept / kLoadStages; }

  // Sixteen threads a channel read one value each: of the first channels at once, of more in turn.
  __device__ __forceinline__ Acc load_sample(int first) const {
    const int sample = static_cast<int>(threadIdx.x) % kMaxSamples;
    const int channel = first + static_cast<int>(threadIdx.x) / kMaxSamples;
    if (sample >= plan_.samples || channel >= span_.channels) return 0;
    const auto* input = static_cast<const scalar_t*>(args_.tensors.in[0]);
    return widen(input[plan_.sample_offsets[sample] + (span_.first_channel(plan_) + channel) * plan_.sample_stride]);
  }

  // The reduction's coefficients. Whether float32 holds them, which all blocks of the team find alike.
  __device__ __forceinline__ bool choose_coefficients(Acc sample) {
    if constexpr (kSamples) {
      choose_shift(sample);
      return true;
    } else {
      bool wide = false;
      for (int i = static_cast<int>(threadIdx.x); i < span_.channels; i += plan_.threads) {
        double value[kMaxReduceCoefficients] = {};
        op_.reduce_coefficients(span_.first_channel(plan_) + i, value);
        if (Reduce::kActivated) wide |= !fits_float32(value, kMaxReduceCoefficients);
        shared_.doubtful[i] = 1;
        shared_.shift[i] = value[0];
#pragma unroll
        for (int j = 1; j < Reduce::kCoefficients; ++j) shared_.shift[j * plan_.tile_channels + i] = value[j];
      }
      return __syncthreads_or(wide ? 1 : 0) == 0;
    }
  }

  __device__ __forceinline__ void choose_shift(Acc value) {
    const bool stores = threadIdx.x % kMaxSamples == 0;
    const int step = plan_.threads / kMaxSamples;
    for (int first = 0; first < span_.channels; first += step) {
      const int channel = first + static_cast<int>(threadIdx.x) / kMaxSamples;
      if (first > 0) value = load_sample(first);
      Acc mean = value;
      for (int lanes = 1; lanes < plan_.samples; lanes *= 2) {
        mean = average(mean, __shfl_xor_sync(0xffffffffu, mean, lanes), static_cast<Acc>(0.5));
      }
      Acc distance = farthest(Acc{}, value - mean);
      for (int lanes = 1; lanes < plan_.samples; lanes *= 2) {
        distance = farthest(distance, __shfl_xor_sync(0xffffffffu, distance, lanes));
      }
      if (stores && channel < span_.channels) {
        shared_.shift[channel] = static_cast<double>(shift_of_samples(mean, distance));
      }
    }
    __syncthreads();
  }

  // The tile's sums over the whole team: double [2][tile_channels].
  template <typename acc_t>
  __device__ __forceinline__ const double* team_sums(Walk<scalar_t, kTile> walk, std::int64_t items, int kept) {
    spread<acc_t, Reduce>(shared_.shift);
    Accumulator<scalar_t, acc_t, Reduce, kTile> sums(plan_, span_, shared_.shift, shared_.columns, args_.epilogue);
    int k = 0;
#pragma unroll 1
    for (int stage = 0; stage < kLoadStages; ++stage) {
      wait_for_stage(stage);
      for (const int end = stage_end(stage, kept); k < end; ++k, walk.advance()) {
        const Segment segment = walk.segment();
        sums.add(segment, slab_.template read<Reduce>(k, segment));
      }
    }
    if (items > kept) {
      slab_.template stream<Reduce>(
          walk, items - kept, plan_.kept, [](auto& w) { w.advance(); },
          [&](const Segment& segment, const auto& item) { sums.add(segment, item); });
    }
    sums.flush();
    const int values = 2 * plan_.tile_channels;
    double* own = shared_.own + (member_.round & 1) * values;
    if constexpr (kTile == Tile::kChannel) {
      merge_channel(plan_, sums.first, sums.second, shared_.merge, own);
    } else {
      merge_columns(plan_, sums.first, sums.second, shared_.merge, own);
    }
    return exchange(plan_, member_, own, shared_.total, shared_.merge, values);
  }

  // From sums to results and coefficients, a channel a thread. Again only of the channels that were doubtful: the
  // others keep what they have, for a channel's bits must not depend on another's values.
  __device__ __forceinline__ Verdict finish(const double* sums, bool again) {
    bool doubtful = false;
    bool wide = false;
    for (int i = static_cast<int>(threadIdx.x); i < span_.channels; i += plan_.threads) {
      ChannelSums channel;
      if constexpr (kReduces) {
        channel = {shared_.shift[i], sums[i], sums[plan_.tile_channels + i]};
        if (again && shared_.doubtful[i] == 0) continue;
        const bool accurate = again || op_.accurate(channel);
        shared_.doubtful[i] = accurate ? 0 : 1;
        if (!accurate) {
          shared_.shift[i] = op_.better_shift(channel);
          doubtful = true;
          continue;
        }
      }
      double value[kMaxCoefficients] = {};
      op_.finish(span_.first_channel(plan_) + i, channel, member_.rank == 0, value);
      wide |= !fits_float32(value, kMaxCoefficients);
#pragma unroll
      for (int j = 0; j < Map::kCoefficients; ++j) shared_.coefficients[j * plan_.tile_channels + i] = value[j];
    }
    // Also what makes the coefficients, and the better shifts, visible to the block.
    Verdict verdict;
    verdict.doubtful = kReduces && __syncthreads_or(doubtful ? 1 : 0) != 0;
    verdict.wide = __syncthreads_or(wide ? 1 : 0) != 0;
    return verdict;
  }

  template <typename acc_t, typename Functor>
  __device__ __forceinline__ void spread(const double* channels) const {
    if constexpr (kKeep<scalar_t, acc_t, Functor, kTile> == Keep::kColumns) {
      spread_to_columns(plan_, span_, kN, Functor::kCoefficients, channels, static_cast<acc_t*>(shared_.columns));
    }
  }

  // Elements from the last to the first: those that were not kept were read last, and L2 may still have them.
  template <typename acc_t>
  __device__ __forceinline__ void map(std::int64_t items, int kept) {
    spread<acc_t, Map>(shared_.coefficients);
    const MapCoefficients<acc_t> coefficients(plan_, span_, shared_.coefficients, shared_.columns);
    Walk<scalar_t, kTile> walk = walk_anew();
    walk.jump(items - 1);
    if (items > kept) {
      slab_.template stream<Map>(
          walk, items - kept, plan_.kept, [](auto& w) { w.retreat(); },
          [&](const Segment& segment, const auto& item) { map_item(segment, item, coefficients); });
    }
    for (int k = kept - 1; k >= 0; --k, walk.retreat()) {
      const Segment segment = walk.segment();
      map_item(segment, slab_.template read<Map>(k, segment), coefficients);
    }
  }

  // float64 ones wait in shared memory, where registers would run out.
  template <typename acc_t>
  using MapCoefficients =
      LaneCoefficients<scalar_t, acc_t, kTile,
                       std::is_same_v<acc_t, double> && kKeep<scalar_t, acc_t, Map, kTile> == Keep::kRegisters
                           ? Keep::kChannels
                           : kKeep<scalar_t, acc_t, Map, kTile>,
                       Map::kCoefficients>;

  template <typename acc_t>
  __device__ __forceinline__ void map_item(const Segment& segment, const Item<scalar_t>& item,
                                           const MapCoefficients<acc_t>& coefficients) {
    const Tensors& tensors = args_.tensors;
    Vec<scalar_t> first;
    Vec<scalar_t> second;
    unsigned open = 0;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      acc_t in[kMaxInputs] = {};
      widen_lane<Map>(item, e, args_.epilogue, in);
      acc_t c[kMaxCoefficients] = {};
      coefficients.get(e, c);
      const Mapped<acc_t> mapped = Map::template apply<scalar_t>(in, c, args_.epilogue);
      narrow(mapped.first, first.lane[e]);
      if (Map::kActivated && Map::kReadsGrad) narrow(mapped.second, second.lane[e]);
      if (Map::kActivated && !Map::kReadsGrad) open |= (mapped.second <= 0 ? 0u : 1u) << e;
    }
    if (!Map::kActivated || tensors.out[0] != nullptr) {
      store_vec(static_cast<scalar_t*>(tensors.out[0]), segment, first);
    }
    if constexpr (Map::kActivated && Map::kReadsGrad) {
      if (tensors.out[1] != nullptr) store_vec(static_cast<scalar_t*>(tensors.out[1]), segment, second);
    }
    if constexpr (Map::kActivated && !Map::kReadsGrad) {
      const bool some = segment.low < segment.high;
      if (tensors.new_mask != nullptr && some) tensors.new_mask[segment.mask] = static_cast<unsigned char>(open);
    }
  }

  const KernelArgs& args_;
  const Plan& plan_;
  const Op& op_;
  const Shared& shared_;
  TeamMember& member_;
  TileSpan span_;
  Slab<scalar_t, Reduce, Map> slab_;
};

template <typename scalar_t, typename Op, typename Reduce, typename Map, Tile kTile>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    batch_norm_kernel(const __grid_constant__ KernelArgs args, const __grid_constant__ Op op) {
  BNEXT_DYNAMIC_SHARED(bytes);
  const Plan& plan = args.plan;
  const Shared shared(plan.shared, bytes);
  TeamMember member;
  member.team = static_cast<int>(blockIdx.x) / plan.team_blocks;
  member.rank = static_cast<int>(blockIdx.x) % plan.team_blocks;
  member.round = 0;
  member.counter = reinterpret_cast<unsigned*>(args.workspace) + member.team;
  member.published = reinterpret_cast<double*>(args.workspace + plan.counter_bytes) +
                     std::int64_t{member.team} * 2 * plan.team_blocks * 2 * plan.tile_channels;
  for (std::int64_t tile = member.team; tile < plan.tiles; tile += plan.teams) {
    BlockTask<scalar_t, Op, Reduce, Map, kTile>(args, op, shared, member, tile).run();
    // The next tile's coefficients take the place of this one's: sums have barriers enough before that.
    if constexpr (std::is_same_v<Reduce, NoSums>) __syncthreads();
  }
  // A block's shared memory must outlive the others' look at it.
  if (plan.team == Team::kCluster) cluster_barrier();
  if (args.count_batch != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*args.count_batch;
}

}  // namespace bnext::cuda
