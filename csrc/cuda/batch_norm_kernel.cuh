// The one kernel: reduce a tile's channels, all-reduce the sums over the group, finish the channels, map the elements.
//
// Grid: plan.groups * plan.group_blocks blocks of plan.threads threads; group = blockIdx.x / group_blocks takes the
// tiles group, group + groups, ... Each input is read once, as far as shared memory holds it (plan.kept vectors a
// thread); its other vectors are read again for the map, last read first, while L2 holds them. Bytes moved (S = bytes
// of the tensor): training forward 2 S, backward 3 S, evaluation forward 2 S; with nothing kept 3 S, 5 S, 2 S. Results
// are the same bits at every run, because the order of all additions depends on the plan alone. The caller has ruled
// out empty problems, and aligned all data to 16 bytes.
#pragma once

#include "../common/channel_ops.h"
#include "../common/samples.h"
#include "cta_group.cuh"
#include "loop_form.cuh"
#include "map.cuh"
#include "reduce.cuh"
#include "shared_memory.cuh"
#include "staging.cuh"

namespace bnext::cuda {

template <typename scalar_t, typename Op, typename Reduce, typename Map, Tile kTile>
class BlockTask {
  using Acc = opmath_t<scalar_t>;
  static constexpr bool kIsFloat64 = std::is_same_v<Acc, double>;
  static constexpr bool kReduces = !std::is_same_v<Reduce, NoSums>;
  // Whether the shift comes from samples of the channel's own values; otherwise it is known beforehand.
  static constexpr bool kSamples = std::is_same_v<Reduce, MomentSums>;
  static constexpr bool kStreamsResidual = Map::kActivated && !Map::kReadsGrad;
  using Staging = StagingBuffer<scalar_t, Reduce, Map>;

 public:
  __device__ __forceinline__ BlockTask(const KernelArgs& args, const Op& op, const Shared& shared, GroupRank& self,
                                       std::int64_t tile)
      : args_(args),
        plan_(args.plan),
        op_(op),
        shared_(shared),
        self_(self),
        span_{tile},
        staging_(args, shared.base),
        streams_(opaque(args.plan.exceeds_l2)) {}

  // requested: whether the vectors to keep have been requested. Returns whether those of the group's next tile have.
  __device__ __forceinline__ bool run(bool requested) {
    const int items = this->items();
    Verdict verdict;
    if constexpr (kReduces) {
      bool again = false;
      // This pass and its repetition in float64 share one copy of the code that merges and finishes: a second copy
      // would make the kernel a fifth larger.
      ThreadSums sums;
      if (plan_.reduces) {
        // The samples are requested first: behind all other loads they would arrive last.
        const Acc sample = kSamples ? load_sample(0) : Acc{};
        if (!requested) {
          in_form<scalar_t, Map, Reduce::kActivated>(args_,
                                                     [&](auto loop) { request_kept<loop.value>(kept_of(items)); });
        }
        prefetch_late();
        // If float32 cannot hold the reduction's coefficients, every channel is reduced in float64.
        again = !choose_coefficients(sample);
        // The map of the previous tile requested its vectors in another order than they are added in.
        if (requested) wait_prior<0>();
        if constexpr (!kIsFloat64) {
          if (!again) thread_sums<Acc>(items, sums);
        }
      }
      bool wide = false;
#pragma unroll 1
      for (;; again = true) {
        if (again || (kIsFloat64 && plan_.reduces)) thread_sums<double>(items, sums);
        verdict = finish(plan_.reduces ? group_sums(sums) : nullptr, again);
        wide |= verdict.wide;
        if (again || !verdict.needs_fp64) break;
      }
      verdict.wide = wide;
    } else {
      verdict = finish(nullptr, /*again=*/false);
    }
    // This block has read the other blocks' sums for the last time. It arrives before its map, so that no block waits
    // for another's stores.
    if (kReduces && plan_.group == Group::kCluster && last()) cluster_barrier_arrive();
    if (!args_.tensors.maps()) return false;
    if constexpr (!kIsFloat64) {
      if (verdict.wide) {
        map<double>(items);
        return false;
      }
    }
    map<Acc>(items);
    return asks_ahead();
  }

 private:
  // What is found about a tile: the same in all threads of the group.
  struct Verdict {
    bool needs_fp64;  // float32 was not accurate enough for a channel's sums
    bool wide;        // float32 cannot hold a channel's coefficients
  };

  // Keeps the value in a register: otherwise every vector would read it from constant memory.
  __device__ __forceinline__ static bool opaque(bool holds) {
    int value = holds ? 1 : 0;
    asm volatile("" : "+r"(value));
    return value != 0;
  }

  // A kernel that can reduce also serves calls without sums.
  __device__ __forceinline__ bool reduces() const { return kReduces && plan_.reduces; }

  // Whether this is the group's last tile. Computed at each use: kept, it would take a register from the sums.
  __device__ __forceinline__ bool last() const {
    std::int64_t tile = span_.tile;
    asm volatile("" : "+l"(tile));
    return tile + plan_.groups >= plan_.tiles;
  }

  // Whether the map requests the group's next tile, into the slots that it has read.
  __device__ __forceinline__ bool asks_ahead() const { return reduces() && !kIsFloat64 && plan_.whole && !last(); }

  template <Loop kLoop>
  using Iterator = TileIterator<scalar_t, kTile, kLoop != Loop::kAny>;

  __device__ __forceinline__ int items() const { return first_step<Loop::kAny>().items(); }
  __device__ __forceinline__ int kept_of(int items) const { return items < plan_.kept ? items : plan_.kept; }

  // An iterator at the first step. Each use computes it with a few divisions: kept, it would take registers in between.
  // The asm statement stops the compiler from keeping it, or parts of it, nevertheless.
  template <Loop kLoop>
  __device__ __forceinline__ Iterator<kLoop> first_step() const {
    std::int64_t tile = span_.tile;
    int rank = self_.rank;
    int thread = static_cast<int>(threadIdx.x);
    asm volatile("" : "+l"(tile), "+r"(rank), "+r"(thread));
    return Iterator<kLoop>(plan_, span_, tile, rank, thread);
  }

  template <Loop kLoop>
  __device__ __forceinline__ void request_kept(int kept) {
    Iterator<kLoop> iterator = first_step<kLoop>();
    int k = 0;
#pragma unroll 1
    for (int stage = 0; stage < kLoadStages; ++stage) {
      const int end = stage_end(stage, kept);
#pragma unroll(kLoop == Loop::kAny ? 1 : 4)
      for (; k < end; ++k, iterator.next()) {
        staging_.template request<Reads<kLoop, Map, typename Staging::Either>>(k, iterator.segment());
      }
      __pipeline_commit();
    }
  }

  // Requests the same vectors of the group's next tile, into the slots [first, end). iterator: one step before `first`.
  template <Loop kLoop>
  __device__ __forceinline__ void request_next(int first, int end, Iterator<kLoop> iterator) const {
#pragma unroll 4
    for (int k = first; k < end; ++k) {
      iterator.next();
      staging_.template request<Reads<kLoop, Map, typename Staging::Either>>(k, iterator.segment().of_next_tile(plan_));
    }
  }

  __device__ __forceinline__ static int stage_end(int stage, int kept) { return (stage + 1) * kept / kLoadStages; }

  // Sixteen threads per channel read one value each, for as many channels from `first` on as the block has threads for.
  __device__ __forceinline__ Acc load_sample(int first) const {
    const int sample = static_cast<int>(threadIdx.x) % kMaxSamples;
    const int channel = first + static_cast<int>(threadIdx.x) / kMaxSamples;
    if (sample >= plan_.samples || channel >= span_.channels(plan_)) return 0;
    const auto* input = static_cast<const scalar_t*>(args_.tensors.in[0]);
    return widen(input[plan_.sample_offsets[sample] + (span_.first_channel(plan_) + channel) * plan_.sample_stride]);
  }

  // L2 fetches what `finish` loads while the tile's vectors are on their way.
  __device__ __forceinline__ void prefetch_late() const {
    for (int i = static_cast<int>(threadIdx.x); i < span_.channels(plan_); i += plan_.threads) {
      op_.for_each_late(span_.first_channel(plan_) + i, [](const void* address) { prefetch(address); });
    }
  }

  // Chooses the reduction's coefficients. Returns whether float32 holds them: all blocks of the group find the same.
  __device__ __forceinline__ bool choose_coefficients(Acc sample) {
    if constexpr (kSamples) {
      choose_shift(sample);
      return true;
    } else {
      bool wide = false;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < span_.channels(plan_); i += plan_.threads) {
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
    for (int first = 0; first < span_.channels(plan_); first += step) {
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
      if (stores && channel < span_.channels(plan_)) {
        shared_.shift[channel] = static_cast<double>(shift_of_samples(mean, distance));
      }
    }
    __syncthreads();
  }

  // A thread's sums, for each of its channels.
  struct ThreadSums {
    double first[kSums<scalar_t, kTile>];
    double second[kSums<scalar_t, kTile>];
  };

  // The tile's sums over the whole group: double [2][tile_channels].
  __device__ __forceinline__ const double* group_sums(ThreadSums& sums) {
    const int values = 2 * plan_.tile_channels;
    double* own = shared_.own + (self_.round & 1) * values;
    if constexpr (kTile == Tile::kChannel) {
      merge_channel(plan_, sums.first, sums.second, shared_.merge, own);
    } else {
      merge_columns(plan_, sums.first, sums.second, shared_.merge, own);
    }
    return all_reduce(plan_, self_, args_.workspace, own, shared_.total, shared_.merge, values);
  }

  template <typename acc_t>
  __device__ __forceinline__ void thread_sums(int items, ThreadSums& results) {
    spread<acc_t, Reduce>(shared_.shift);
    const auto sum = [&](const Epilogue& epilogue, auto&& add) {
      Accumulator<scalar_t, acc_t, Reduce, kTile> sums(plan_, span_, shared_.shift, shared_.columns, epilogue);
      add(sums);
      sums.flush();
#pragma unroll
      for (int p = 0; p < kSums<scalar_t, kTile>; ++p) {
        results.first[p] = sums.first[p];
        results.second[p] = sums.second[p];
      }
    };
    if constexpr (kIsOpmath<scalar_t, acc_t>) {
      in_form<scalar_t, Map, Reduce::kActivated>(args_, [&](auto loop) {
        sum(known_epilogue<loop.value, Map>(args_.epilogue), [&](auto& sums) { add_all<loop.value>(sums, items); });
      });
    } else {
      wait_prior<0>();
      sum(args_.epilogue, [&](auto& sums) {
        for_each_rare<Reduce>(items, [&](const Segment<scalar_t>& segment, const Item& item) {
          sums.add(item, segment.low, segment.high);
        });
      });
    }
    // The merge buffer overlays the coefficients, which other threads may still be reading.
    if constexpr (kKeep<scalar_t, acc_t, Reduce, kTile> == Keep::kColumns) __syncthreads();
  }

  // Where float32 was too narrow, which is rare: a slow loop, which takes no registers from the fast ones.
  template <typename Functor, typename Visit>
  __device__ __forceinline__ void for_each_rare(int items, Visit&& visit) {
    Iterator<Loop::kAny> iterator = first_step<Loop::kAny>();
#pragma unroll 1
    for (int k = 0; k < items; ++k, iterator.next()) {
      const Segment<scalar_t> segment = iterator.segment();
      visit(segment, staging_.template load<Functor>(k, segment));
    }
  }

  // Adds the kept vectors, stage by stage as they arrive, and then those that pass through the ring.
  template <Loop kLoop>
  __device__ __forceinline__ void add_all(Accumulator<scalar_t, Acc, Reduce, kTile>& sums, int items) {
    const int kept = kept_of(items);
    Iterator<kLoop> iterator = first_step<kLoop>();
    Iterator<kLoop> behind_kept = iterator;
    if (items > kept) behind_kept.seek(kept);
    Ring<Reads<kLoop, Map, Reduce>, Staging, Iterator<kLoop>, /*kForward=*/true> ring(staging_, plan_.kept,
                                                                                      items - kept, behind_kept);
    for (int stage = 0; stage < kLoadStages || !ring.empty(); ++stage) {
      const bool streams = stage >= kLoadStages;
      int slot = 0;
      int end = 0;
      if (streams) {
        if (stage == kLoadStages) ring.start();
        slot = ring.wait();
        end = slot + 1;
      } else {
        wait_for_stage(stage);
        slot = stage_end(stage - 1, kept);
        end = stage_end(stage, kept);
      }
      sums.for_each(slot, end, [&](int k) {
        const auto segment = iterator.segment();
        sums.add(staging_.template read<Reads<kLoop, Map, Reduce>>(k, segment), segment.low, segment.high);
        iterator.next();
      });
      if (streams) ring.refill();
    }
  }

  // From sums to results and coefficients, with one thread per channel. `again`: only for channels that need float64.
  // The others keep their results, because a channel's bits must not depend on another's values.
  __device__ __forceinline__ Verdict finish(const double* sums, bool again) {
    bool needs_fp64 = false;
    bool wide = false;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < span_.channels(plan_); i += plan_.threads) {
      ChannelSums channel;
      if (reduces()) {
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
    // These barriers also make the coefficients and the refined shifts visible to the block.
    Verdict verdict;
    verdict.needs_fp64 = reduces() && __syncthreads_or(needs_fp64 ? 1 : 0) != 0;
    verdict.wide = __syncthreads_or(wide ? 1 : 0) != 0;
    return verdict;
  }

  template <typename acc_t, typename Functor>
  __device__ __forceinline__ void spread(const double* channels) const {
    if constexpr (kKeep<scalar_t, acc_t, Functor, kTile> == Keep::kColumns) {
      spread_to_columns<scalar_t>(plan_, span_, Functor::kCoefficients, channels, static_cast<acc_t*>(shared_.columns));
    }
  }

  template <typename acc_t>
  __device__ __forceinline__ void map(int items) {
    spread<acc_t, Map>(shared_.coefficients);
    const MapCoefficients<scalar_t, Map, kTile, acc_t> coefficients(plan_, span_, shared_.coefficients,
                                                                    shared_.columns);
    if constexpr (kIsOpmath<scalar_t, acc_t>) {
      in_form<scalar_t, Map, Map::kActivated>(args_, [&](auto loop) { map_all<loop.value>(coefficients, items); });
    } else {
      for_each_rare<Map>(items, [&](const Segment<scalar_t>& segment, Item item) {
        if (kStreamsResidual && args_.tensors.in[2] != nullptr) {
          item.vec[2] = load_vec<scalar_t>(args_.tensors.in[2], segment);
        }
        map_item<Loop::kAny>(segment, item, coefficients);
      });
    }
  }

  // The map's unroll factor. Forward's with ReLU is 2, so that a residual's registers are moved once for two steps.
  template <Loop kLoop>
  __device__ __forceinline__ static constexpr int map_unroll() {
    if (kLoop == Loop::kAny) return 1;
    if (!Map::kActivated) return 4;
    return kLoop == Loop::kRelu && kStreamsResidual ? 2 : 1;
  }

  // Maps vectors from the last to the first: those that were not kept were read last, and L2 may still hold them. Slots
  // of mapped vectors are filled for the group's next tile, a few at a time.
  template <Loop kLoop, typename Coefficients>
  __device__ __forceinline__ void map_all(const Coefficients& coefficients, int items) {
    const int kept = kept_of(items);
    Iterator<kLoop> iterator = first_step<kLoop>();
    iterator.seek(items - 1);
    Ring<Reads<kLoop, Map, Map>, Staging, Iterator<kLoop>, /*kForward=*/false> ring(staging_, plan_.kept, items - kept,
                                                                                    iterator);
    if (!ring.empty()) ring.start();
    ResidualStream<scalar_t, Iterator<kLoop>> residual(kStreamsResidual ? args_.tensors.in[2] : nullptr, items,
                                                       iterator);
    const int at_once = (kept + kLoadStages - 1) / kLoadStages;
    const bool asks = asks_ahead();
    int asked = kept;
    for (int left = items; left > 0;) {
      const bool streams = left > kept;
      const int last = streams ? ring.wait() : left - 1;
      const int first = streams ? last : left > at_once ? left - at_once : 0;
#pragma unroll(map_unroll<kLoop>())
      for (int slot = last; slot >= first; --slot, iterator.prev()) {
        const auto segment = iterator.segment();
        Item item = staging_.template read<Reads<kLoop, Map, Map>>(slot, segment);
        if constexpr (kStreamsResidual) item.vec[2] = residual.take();
        map_item<kLoop>(segment, item, coefficients);
      }
      left -= last - first + 1;
      if (streams) ring.refill();
      if constexpr (kLoop != Loop::kAny && kReduces) {
        if (asks && (left == 0 || asked - left >= at_once)) {
          request_next<kLoop>(left, asked, iterator);
          asked = left;
        }
      }
    }
    if (asks) __pipeline_commit();
  }

  template <Loop kLoop, typename Where, typename Coefficients>
  __device__ __forceinline__ void map_item(const Where& segment, const Item& item, const Coefficients& coefficients) {
    const Tensors& tensors = args_.tensors;
    const Results<scalar_t> results =
        map_vector<scalar_t, Map, kTile>(item, known_epilogue<kLoop, Map>(args_.epilogue), coefficients);
    if constexpr (Map::kActivated && Map::kReadsGrad) {
      if (kLoop == Loop::kRelu || tensors.out[1] != nullptr) {
        store_vec<scalar_t>(tensors.out[1], segment, narrow_lanes<scalar_t>(results.second), streams_);
      }
      if (kLoop != Loop::kRelu && tensors.out[0] == nullptr) return;
    }
    if constexpr (Map::kActivated && !Map::kReadsGrad) {
      if (tensors.new_mask != nullptr && !segment.empty()) {
        tensors.new_mask[segment.mask] = static_cast<unsigned char>(results.open);
      }
    }
    store_vec<scalar_t>(tensors.out[0], segment, narrow_lanes<scalar_t>(results.first), streams_);
  }

  const KernelArgs& args_;
  const LaunchPlan& plan_;
  const Op& op_;
  const Shared& shared_;
  GroupRank& self_;
  TileSpan span_;
  Staging staging_;
  bool streams_;
};

template <typename scalar_t, typename Op, typename Reduce, typename Map, Tile kTile>
__global__ void __launch_bounds__(kMaxThreads, 1)
    batch_norm_kernel(const __grid_constant__ KernelArgs args, const __grid_constant__ Op op) {
  BNEXT_DYNAMIC_SHARED(bytes);
  const LaunchPlan& plan = args.plan;
  const Shared shared(plan.shared, bytes);
  GroupRank self;
  self.rank = static_cast<int>(blockIdx.x) % plan.group_blocks;
  self.round = 0;
  const int group = static_cast<int>(blockIdx.x) / plan.group_blocks;
  bool requested = false;
  for (std::int64_t tile = group; tile < plan.tiles; tile += plan.groups) {
    requested = BlockTask<scalar_t, Op, Reduce, Map, kTile>(args, op, shared, self, tile).run(requested);
    // The next tile's coefficients overwrite this tile's. Where there are sums, their barriers lie in between.
    if (!plan.reduces) __syncthreads();
  }
  // A block's shared memory must live until the other blocks of its cluster have read it.
  if (plan.group == Group::kCluster) cluster_barrier_wait();
  if (args.count_batch != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*args.count_batch;
}

}  // namespace bnext::cuda
