// Where threads of a block, a cluster or a grid meet.
#include <algorithm>

#include "checker.h"
#include "clock.h"

namespace simt {
namespace {

int reduced(Reduce reduce, int count, int threads) {
  switch (reduce) {
    case Reduce::kNone: return 0;
    case Reduce::kOr: return count > 0;
    case Reduce::kAnd: return count == threads;
    case Reduce::kCount: return count;
  }
  __builtin_unreachable();
}

}  // namespace

int Launch::block_barrier(Thread& thread, Reduce reduce, int predicate, Site site) {
  Block& block = *thread.block;
  if (block.exited > 0 && is_new(Defect::kDivergence, site)) {
    report("divergent barrier: __syncthreads after other threads of the block have exited: " +
           describe_where(thread, site));
  }
  if (block.barrier_arrived == 0) {
    block.barrier_site = site;
    block.barrier_reduce = reduce;
    block.barrier_count = 0;
  } else if (device().options.check && site != block.barrier_site) {
    // The compiler may have made two calls out of one in the source.
    const bool diverges = reduce != block.barrier_reduce || source_lines(site) != source_lines(block.barrier_site);
    if (diverges && is_new(Defect::kDivergence, site, block.barrier_site)) {
      report("divergent barrier: others of the block wait in __syncthreads at " + source_line(block.barrier_site) +
             ": " + describe_where(thread, site));
    }
  }
  ++block.barrier_arrived;
  block.barrier_count += predicate != 0;
  if (block.barrier_arrived == shape_.threads() - block.exited) {
    release_block(block);
  } else {
    wait(thread, {"__syncthreads", site});
  }
  return static_cast<int>(thread.result);
}

void Launch::release_block(Block& block) {
  ++device().counters.block_barriers;
  ++progress_;
  const int arrived = static_cast<int>(block.barrier_arrived);
  const int result = reduced(block.barrier_reduce, block.barrier_count, arrived);
  block.barrier_arrived = 0;
  KnowledgePtr joined;
  for (unsigned i = 0; i < shape_.threads(); ++i) {
    if (!block.threads[i].exited) joined = Knowledge::join(joined, block.threads[i].clock.knowledge);
  }
  joined = Knowledge::with(joined, {{block_place(block.number), next_tick()}});
  const Tick tick = next_tick();
  for (unsigned i = 0; i < shape_.threads(); ++i) {
    Thread& thread = block.threads[i];
    if (thread.exited) continue;
    adopt(thread, joined);
    thread.clock.tick = tick;
    thread.result = static_cast<std::uint64_t>(result);
    if (thread.wait.what != nullptr) wake(thread);
  }
}

void Launch::cluster_arrive(Thread& thread, bool split, Site site) {
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived && is_new(Defect::kUsage, site)) {
    report("cluster barrier_arrive twice without barrier_wait: " + describe_where(thread, site));
    abandon(thread);
  }
  thread.cluster_arrived = true;
  thread.cluster_goal = cluster.completed + 1;
  cluster.split = cluster.split || split;
  cluster.gathered = Knowledge::join(cluster.gathered, thread.clock.knowledge);
  cluster.arrivals.push_back({thread_place(thread.block->number, thread.in_block), thread.clock.tick});
  thread.clock.tick = next_tick();
  ++cluster.arrived;
  if (cluster.arrived == shape_.cluster_blocks() * shape_.threads() - cluster.exited) release_cluster(cluster);
}

void Launch::release_cluster(Cluster& cluster) {
  ++device().counters.cluster_barriers;
  ++progress_;
  // What a thread did between its arrival and now is not released. If all have waited since they arrived, there is no
  // such thing, and one entry says it for a whole block.
  std::vector<Known>& arrivals = cluster.arrivals;
  if (!cluster.split && cluster.exited == 0) {
    arrivals.clear();
    const Tick now = next_tick();
    for (const auto& block : cluster.blocks) arrivals.push_back({block_place(block->number), now});
  }
  std::sort(arrivals.begin(), arrivals.end(), [](const Known& a, const Known& b) { return a.place < b.place; });
  cluster.released = Knowledge::with(cluster.gathered, arrivals);
  cluster.gathered = nullptr;
  arrivals.clear();
  cluster.arrived = 0;
  cluster.split = false;
  ++cluster.completed;
  for (const auto& block : cluster.blocks) {
    for (unsigned i = 0; i < shape_.threads(); ++i) {
      Thread& thread = block->threads[i];
      if (thread.wait.what == kClusterWait) wake(thread);
    }
  }
}

void Launch::cluster_wait(Thread& thread, Site site) {
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived && is_new(Defect::kUsage, site)) {
    report("cluster barrier_wait without barrier_arrive: " + describe_where(thread, site));
    abandon(thread);
  }
  if (cluster.completed < thread.cluster_goal) wait(thread, {kClusterWait, site});
  learn(thread, cluster.released);
  thread.cluster_arrived = false;
  thread.clock.tick = next_tick();
  ++thread.cluster_barriers;
}

void Launch::grid_barrier(Thread& thread, Site site) {
  if (!shape_.cooperative) {
    if (is_new(Defect::kUsage, site))
      report("grid barrier in a launch that is not cooperative: " + describe_where(thread, site));
    abandon(thread);
  }
  if (exited_threads_ > 0 && is_new(Defect::kDivergence, site)) {
    report("divergent barrier: grid barrier after other threads have exited: " + describe_where(thread, site));
  }
  grid_site_ = site;
  ++grid_arrived_;
  if (grid_arrived_ == live_threads_) {
    release_grid();
  } else {
    wait(thread, {kGridWait, site});
  }
}

void Launch::release_grid() {
  ++device().counters.grid_barriers;
  ++progress_;
  grid_arrived_ = 0;
  const auto all = std::make_shared<Knowledge>(next_tick());
  const Tick tick = next_tick();
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) {
      for (unsigned i = 0; i < shape_.threads(); ++i) {
        Thread& thread = block->threads[i];
        if (thread.exited) continue;
        adopt(thread, all);
        thread.clock.tick = tick;
        if (thread.wait.what != nullptr) wake(thread);
      }
    }
  }
}

}  // namespace simt
