// The one kernel: reduce a tile's channels, all-reduce the sums over the group, finish the channels, map the elements.
//
// Grid: plan.groups * plan.group_blocks blocks of plan.threads threads; group = blockIdx.x / group_blocks takes the
// tiles group, group + groups, ... Each input is read once, as far as shared memory holds it (plan.kept vectors a
// thread); the others are read again for the map, the last read first, while L2 has it. Bytes moved (S = bytes of the
// tensor): training forward 2 S, backward 3 S, evaluation forward 2 S; with nothing kept 3 S, 5 S, 2 S. Results are the
// same bits at every run: what is added to what, and in which order, depends on the plan alone. The caller has ruled
// out empty problems, and aligned all data to 16 bytes.
#pragma once

#include "../common/channel_ops.h"
#include "../common/samples.h"
#include "cta_group.cuh"
#include "reduce.cuh"
#include "staging.cuh"

// An emulation has its own.
#if defined(__CUDACC__)
#define BNEXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace bnext::cuda {

struct KernelArgs {
  LaunchPlan plan;
  Tensors tensors;
  Epilogue epilogue;
  unsigned char* workspace;
  std::int64_t* count_batch;  // incremented by one thread; null: not here
};

// Pointers into a block's shared memory.
struct Shared {
  unsigned char* staging;
  unsigned char* mask;
  void* columns;
  double* merge;
  double* own;
  double* total;
  double* shift;
  double* coefficients;
  int* needs_fp64;

  __device__ __forceinline__ Shared(const SharedLayout& layout, unsigned char* base)
      : staging(base + layout.staging),
        mask(base + layout.mask),
        columns(base + layout.columns),
        merge(reinterpret_cast<double*>(base + layout.merge)),
        own(reinterpret_cast<double*>(base + layout.own)),
        total(reinterpret_cast<double*>(base + layout.total)),
        shift(reinterpret_cast<double*>(base + layout.shift)),
        coefficients(reinterpret_cast<double*>(base + layout.coefficients)),
        needs_fp64(reinterpret_cast<int*>(base + layout.needs_fp64)) {}
};

template <typename scalar_t, typename Op, typename Reduce, typename Map, Tile kTile>
class BlockTask {
  using Acc = opmath_t<scalar_t>;
  static constexpr bool kReduces = !std::is_same_v<Reduce, NoSums>;
  // The shift is a sample of the channel's own values; else it is known.
  static constexpr bool kSamples = std::is_same_v<Reduce, MomentSums>;
  static constexpr int kN = kLanes<scalar_t>;

 public:
  __device__ __forceinline__ BlockTask(const KernelArgs& args, const Op& op, const Shared& shared, GroupRank& self,
                                       std::int64_t tile)
      : args_(args),
        plan_(args.plan),
        op_(op),
        shared_(shared),
        self_(self),
        span_(args.plan, tile),
        staging_(args.plan, args.tensors, shared.staging, shared.mask) {}

  __device__ __forceinline__ void run() {
    const TileIterator<scalar_t, kTile> iterator(plan_, span_, span_.tile, self_.rank);
    const std::int64_t items = iterator.items();
    const int kept = items < plan_.kept ? static_cast<int>(items) : plan_.kept;
    Verdict verdict;
    if constexpr (kReduces) {
      // The samples are requested first: behind all other loads they would arrive last.
      const Acc sample = kSamples ? load_sample(0) : Acc{};
      request_kept(iterator, kept);
      // Where float32 cannot begin, every channel needs float64.
      verdict = {true, false};
      if (choose_coefficients(sample)) verdict = finish(group_sums<Acc>(iterator, items, kept), /*again=*/false);
      if (verdict.needs_fp64) {
        const bool wide = verdict.wide;
        verdict = finish(group_sums<double>(restarted(), items, kept), /*again=*/true);
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
  // Of a tile, the same in all threads of the group.
  struct Verdict {
    bool needs_fp64;  // float32 was not enough for a channel's sums
    bool wide;        // nor for a channel's coefficients
  };

  // An iterator at the first step, computed again by a few divisions: kept, it would take registers during the
  // reduction. The asm statement stops the compiler from keeping it all the same.
  __device__ __forceinline__ TileIterator<scalar_t, kTile> restarted() const {
    std::int64_t tile = span_.tile;
    int rank = self_.rank;
    asm volatile("" : "+l"(tile), "+r"(rank));
    return TileIterator<scalar_t, kTile>(plan_, span_, tile, rank);
  }

  __device__ __forceinline__ void request_kept(TileIterator<scalar_t, kTile> iterator, int kept) {
    int k = 0;
#pragma unroll 1
    for (int stage = 0; stage < kLoadStages; ++stage) {
      for (const int end = stage_end(stage, kept); k < end; ++k, iterator.next())
        staging_.request(k, iterator.segment());
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

  // The reduction's coefficients. Whether float32 holds them, which all blocks of the group find alike.
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
        shared_.needs_fp64[i] = 1;
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

  // The tile's sums over the whole group: double [2][tile_channels].
  template <typename acc_t>
  __device__ __forceinline__ const double* group_sums(TileIterator<scalar_t, kTile> iterator, std::int64_t items,
                                                      int kept) {
    spread<acc_t, Reduce>(shared_.shift);
    Accumulator<scalar_t, acc_t, Reduce, kTile> sums(plan_, span_, shared_.shift, shared_.columns, args_.epilogue);
    int k = 0;
#pragma unroll 1
    for (int stage = 0; stage < kLoadStages; ++stage) {
      wait_for_stage(stage);
      for (const int end = stage_end(stage, kept); k < end; ++k, iterator.next()) {
        const Segment segment = iterator.segment();
        sums.add(segment, staging_.template read<Reduce>(k, segment));
      }
    }
    if (items > kept) {
      staging_.template stream<Reduce>(
          iterator, items - kept, plan_.kept, [](auto& w) { w.next(); },
          [&](const Segment& segment, const auto& item) { sums.add(segment, item); });
    }
    sums.flush();
    const int values = 2 * plan_.tile_channels;
    double* own = shared_.own + (self_.round & 1) * values;
    if constexpr (kTile == Tile::kChannel) {
      merge_channel(plan_, sums.first, sums.second, shared_.merge, own);
    } else {
      merge_columns(plan_, sums.first, sums.second, shared_.merge, own);
    }
    return all_reduce(plan_, self_, own, shared_.total, shared_.merge, values);
  }

  // From sums to results and coefficients, a channel a thread. The second time only of the channels that need float64:
  // the others keep their results, for a channel's bits must not depend on another's values.
  __device__ __forceinline__ Verdict finish(const double* sums, bool again) {
    bool needs_fp64 = false;
    bool wide = false;
    for (int i = static_cast<int>(threadIdx.x); i < span_.channels; i += plan_.threads) {
      ChannelSums channel;
      if constexpr (kReduces) {
        channel = {shared_.shift[i], sums[i], sums[plan_.tile_channels + i]};
        if (again && shared_.needs_fp64[i] == 0) continue;
        const bool accurate = again || op_.accurate(channel);
        shared_.needs_fp64[i] = accurate ? 0 : 1;
        if (!accurate) {
          shared_.shift[i] = op_.refined_shift(channel);
          needs_fp64 = true;
          continue;
        }
      }
      double value[kMaxCoefficients] = {};
      op_.finish(span_.first_channel(plan_) + i, channel, self_.rank == 0, value);
      wide |= !fits_float32(value, kMaxCoefficients);
#pragma unroll
      for (int j = 0; j < Map::kCoefficients; ++j) shared_.coefficients[j * plan_.tile_channels + i] = value[j];
    }
    // Also what makes the coefficients, and the refined shifts, visible to the block.
    Verdict verdict;
    verdict.needs_fp64 = kReduces && __syncthreads_or(needs_fp64 ? 1 : 0) != 0;
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
    TileIterator<scalar_t, kTile> iterator = restarted();
    iterator.seek(items - 1);
    if (items > kept) {
      staging_.template stream<Map>(
          iterator, items - kept, plan_.kept, [](auto& w) { w.prev(); },
          [&](const Segment& segment, const auto& item) { map_item(segment, item, coefficients); });
    }
    for (int k = kept - 1; k >= 0; --k, iterator.prev()) {
      const Segment segment = iterator.segment();
      map_item(segment, staging_.template read<Map>(k, segment), coefficients);
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
  const LaunchPlan& plan_;
  const Op& op_;
  const Shared& shared_;
  GroupRank& self_;
  TileSpan span_;
  StagingBuffer<scalar_t, Reduce, Map> staging_;
};

template <typename scalar_t, typename Op, typename Reduce, typename Map, Tile kTile>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    batch_norm_kernel(const __grid_constant__ KernelArgs args, const __grid_constant__ Op op) {
  BNEXT_DYNAMIC_SHARED(bytes);
  const LaunchPlan& plan = args.plan;
  const Shared shared(plan.shared, bytes);
  GroupRank self;
  self.group = static_cast<int>(blockIdx.x) / plan.group_blocks;
  self.rank = static_cast<int>(blockIdx.x) % plan.group_blocks;
  self.round = 0;
  self.counter = reinterpret_cast<unsigned*>(args.workspace) + self.group;
  self.published = reinterpret_cast<double*>(args.workspace + plan.counter_bytes) +
                   std::int64_t{self.group} * 2 * plan.group_blocks * 2 * plan.tile_channels;
  for (std::int64_t tile = self.group; tile < plan.tiles; tile += plan.groups) {
    BlockTask<scalar_t, Op, Reduce, Map, kTile>(args, op, shared, self, tile).run();
    // The next tile's coefficients take the place of this one's: sums have barriers enough before that.
    if constexpr (std::is_same_v<Reduce, NoSums>) __syncthreads();
  }
  // A block's shared memory must outlive the others' look at it.
  if (plan.group == Group::kCluster) cluster_barrier();
  if (args.count_batch != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*args.count_batch;
}

}  // namespace bnext::cuda
