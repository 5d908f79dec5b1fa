// Where threads of a block or a cluster meet.
#include <algorithm>

#include "checker.h"

namespace simt {

bool Launch::block_barrier(Thread& thread, bool predicate, Site site) {
  Block& block = *thread.block;
  if (block.exited > 0 && is_new(Defect::kDivergence, site)) {
    report("divergent barrier: __syncthreads after other threads of the block have exited: " +
           describe_where(thread, site));
  }
  if (block.barrier_arrived == 0) {
    block.barrier_site = site;
    block.barrier_result = false;
  } else if (device().options.check && site != block.barrier_site) {
    // The compiler may have made two calls out of one in the source.
    const bool diverges = source_lines(site) != source_lines(block.barrier_site);
    if (diverges && is_new(Defect::kDivergence, site, block.barrier_site)) {
      report("divergent barrier: others of the block wait in __syncthreads at " + source_line(block.barrier_site) +
             ": " + describe_where(thread, site));
    }
  }
  ++block.barrier_arrived;
  block.barrier_result |= predicate;
  if (block.barrier_arrived == shape_.threads - block.exited) {
    release_block(block);
  } else {
    wait(thread, {"__syncthreads", site});
  }
  return thread.result != 0;
}

void Launch::release_block(Block& block) {
  ++progress_;
  block.barrier_arrived = 0;
  KnowledgePtr joined;
  for (unsigned i = 0; i < shape_.threads; ++i) {
    if (!block.threads[i].exited) joined = join(joined, block.threads[i].knowledge);
  }
  joined = with(joined, {{block_place(block.number), next_tick()}});
  const Tick tick = next_tick();
  for (unsigned i = 0; i < shape_.threads; ++i) {
    Thread& thread = block.threads[i];
    if (thread.exited) continue;
    thread.adopt(joined);
    thread.tick = tick;
    thread.result = block.barrier_result;
    if (thread.wait.what != nullptr) wake(thread);
  }
}

void Launch::cluster_arrive(Thread& thread, Site site) {
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived && is_new(Defect::kUsage, site)) {
    report("cluster barrier_arrive twice without barrier_wait: " + describe_where(thread, site));
    abandon(thread);
  }
  thread.cluster_arrived = true;
  thread.accessed_since_arrival = false;
  thread.cluster_goal = cluster.completed + 1;
  cluster.gathered = join(cluster.gathered, thread.knowledge);
  cluster.arrivals.push_back({thread_place(thread.block->number, thread.in_block), thread.tick});
  ++cluster.arrived;
  if (cluster.arrived == shape_.cluster_threads() - cluster.exited) release_cluster(cluster);
  thread.tick = next_tick();
}

void Launch::release_cluster(Cluster& cluster) {
  ++progress_;
  // What a thread did between its arrival and now is not released. Where all the others have only waited since they
  // arrived, and the last one arrives now, there is no such thing, and one entry says it for a whole block.
  std::vector<Known>& arrivals = cluster.arrivals;
  unsigned idle = 0;
  for (const auto& block : cluster.blocks) {
    for (unsigned i = 0; i < shape_.threads; ++i) {
      const Thread& thread = block->threads[i];
      idle += thread.wait.what == kClusterWait && !thread.accessed_since_arrival;
    }
  }
  if (idle == shape_.cluster_threads() - 1) {
    arrivals.clear();
    const Tick now = next_tick();
    for (const auto& block : cluster.blocks) arrivals.push_back({block_place(block->number), now});
  }
  std::sort(arrivals.begin(), arrivals.end(), [](const Known& a, const Known& b) { return a.place < b.place; });
  cluster.released = with(cluster.gathered, arrivals);
  cluster.gathered = nullptr;
  arrivals.clear();
  cluster.arrived = 0;
  ++cluster.completed;
  for (const auto& block : cluster.blocks) {
    for (unsigned i = 0; i < shape_.threads; ++i) {
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
  thread.learn(cluster.released);
  thread.cluster_arrived = false;
  thread.tick = next_tick();
  ++thread.cluster_barriers;
}

}  // namespace simt
