#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <tuple>

#include "checker.h"

// What kernels see as constants (simt_device.h).
extern "C" {
uint1 threadIdx;
uint1 blockIdx;
uint1 blockDim;
uint1 gridDim;
}

namespace simt {

thread_local Thread* running __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

// Blocks that need not run at once run a few at a time: enough for what one does wrong to another to show.
constexpr std::uint64_t kResidentThreads = 2048;
// After so many rounds in which threads only spun, they are taken to spin for ever.
constexpr int kIdleRounds = 2000;
constexpr int kPauseOneIn = 4;

// Ticks go on from launch to launch: what earlier launches did happened before.
Tick last_tick = 0;

}  // namespace

Launch::Launch(const LaunchShape& shape, const Kernel& kernel)
    : shape_(shape), kernel_(kernel), random_(device().options.seed), first_tick_(++last_tick), tick_(last_tick) {
  pending_clusters_.resize(shape.blocks / shape.cluster_blocks);
  std::iota(pending_clusters_.begin(), pending_clusters_.end(), 0);
  std::shuffle(pending_clusters_.begin(), pending_clusters_.end(), random_);
  device().memory.forget_releases();
  blockDim = {shape.threads};
  gridDim = {shape.blocks};
}

Launch::~Launch() {
  device().requests.take(device().counters);
  last_tick = tick_;
}

void Launch::run() {
  std::uint64_t last_progress = 0;
  int idle_rounds = 0;
  for (admit(); !clusters_.empty(); admit()) {
    idle_rounds = progress_ == last_progress ? idle_rounds + 1 : 0;
    last_progress = progress_;
    if (woken_.empty() || idle_rounds > kIdleRounds) {
      report_deadlock();
      abandoned_ = failed_ = true;
      return;
    }
    ready_.swap(woken_);
    std::shuffle(ready_.begin(), ready_.end(), random_);
    for (Thread* const thread : ready_) {
      resume(*thread);
      if (abandoned_) return;
      if (thread->exited) retire(*thread);
    }
    ready_.clear();
    const auto has_exited = [&](const auto& cluster) { return cluster->exited == shape_.cluster_threads(); };
    resident_threads_ -= shape_.cluster_threads() * std::erase_if(clusters_, has_exited);
  }
}

void Launch::admit() {
  while (!pending_clusters_.empty() && (shape_.cooperative || resident_threads_ < kResidentThreads)) {
    const std::uint32_t number = pending_clusters_.back();
    pending_clusters_.pop_back();
    start_cluster(number);
    ++progress_;
  }
}

void Launch::start_cluster(std::uint32_t number) {
  clusters_.push_back(std::make_unique<Cluster>());
  for (unsigned rank = 0; rank < shape_.cluster_blocks; ++rank) {
    start_block(*clusters_.back(), number * shape_.cluster_blocks + rank);
  }
}

void Launch::start_block(Cluster& cluster, std::uint32_t number) {
  cluster.blocks.push_back(std::make_unique<Block>());
  Block& block = *cluster.blocks.back();
  const unsigned threads = shape_.threads;
  block.cluster = &cluster;
  block.number = number;
  block.shared.reset(static_cast<unsigned char*>(::operator new[](shape_.dynamic_shared, std::align_val_t{128})));
  // NaN in every floating-point type.
  std::memset(block.shared.get(), 0xff, shape_.dynamic_shared);
  block.shared_region =
      std::make_unique<Region>(block.shared.get(), shape_.dynamic_shared, "shared", Access::kUninitialised, true);
  block.threads = std::make_unique<Thread[]>(threads);
  block.warps.resize((threads + 31) / 32);

  const Tick tick = next_tick();
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.launch = this;
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.id = number * threads + i + 1;
    thread.in_block = i;
    thread.lane = i % 32;
    thread.tick = tick;
    if (thread.lane == 0) thread.warp->threads = &thread;
    thread.warp->lanes |= 1u << thread.lane;
    thread.fiber.start(&Launch::run_thread, &thread);
    woken_.push_back(&thread);
  }
  resident_threads_ += threads;
}

void Launch::run_thread(void* opaque) {
  Thread& thread = *static_cast<Thread*>(opaque);
  const Kernel& kernel = thread.launch->kernel_;
  kernel.call(kernel.function, kernel.arguments);
  thread.exited = true;
  thread.fiber.suspend();
}

void Launch::resume(Thread& thread) {
  threadIdx = {thread.in_block};
  blockIdx = {thread.block->number};
  running = &thread;
  thread.fiber.resume();
  running = nullptr;
}

void Launch::wait(Thread& thread, Wait what) {
  thread.wait = what;
  thread.fiber.suspend();
}

void Launch::wake(Thread& thread) {
  thread.wait = {};
  woken_.push_back(&thread);
  ++progress_;
}

void Launch::pause(Thread& thread, Site site) {
  woken_.push_back(&thread);
  wait(thread, {"a spin", site});
  thread.wait = {};
}

void Launch::maybe_pause(Thread& thread, Site site) {
  if (random_() % kPauseOneIn == 0) pause(thread, site);
}

void Launch::abandon(Thread& thread) {
  abandoned_ = failed_ = true;
  thread.fiber.suspend();
  __builtin_unreachable();
}

void Launch::retire(Thread& thread) {
  ++progress_;
  thread.fiber.release();
  check_no_copies(thread);
  Block& block = *thread.block;
  block.at_exit = join(block.at_exit, thread.knowledge);
  retire_from_warp(thread);
  retire_from_block(thread);
  Cluster& cluster = *block.cluster;
  ++cluster.exited;
  // The cluster's barrier waits only for threads that have not exited, and so does not count the arrival of this one.
  if (thread.cluster_arrived) --cluster.arrived;
  if (cluster.arrived > 0 && cluster.arrived == shape_.cluster_threads() - cluster.exited) release_cluster(cluster);
}

void Launch::retire_from_block(Thread& thread) {
  Block& block = *thread.block;
  ++block.exited;
  const unsigned left = shape_.threads - block.exited;
  if (block.barrier_arrived > 0) {
    if (is_new(Defect::kDivergence, block.barrier_site)) {
      report("divergent barrier: a thread exits while others wait in __syncthreads at " +
             source_line(block.barrier_site) + ": " + describe_where(thread, nullptr));
    }
    if (block.barrier_arrived == left) release_block(block);
  }
  if (left == 0 && device().options.check) check_remote_uses(*this, block);
}

bool Launch::is_new(Defect defect, Site site, Site other) {
  if (!device().options.check) return false;
  failed_ = true;
  return device().findings.is_new(defect, site, other);
}

void Launch::report(const std::string& text) { device().findings.add(text); }

void Launch::report_deadlock() {
  struct Group {
    const Thread* example;
    int threads = 0;
  };
  std::map<std::tuple<std::string, Site, unsigned>, Group> groups;
  bool some_at_barrier = false;
  for (const auto& cluster : clusters_) {
    for (const auto& block : cluster->blocks) {
      some_at_barrier = some_at_barrier || block->barrier_arrived > 0;
      for (unsigned i = 0; i < shape_.threads; ++i) {
        const Thread& thread = block->threads[i];
        if (thread.exited) continue;
        Group& group = groups[{thread.wait.what, thread.wait.site, thread.wait.mask}];
        group.example = &thread;
        ++group.threads;
      }
    }
  }
  std::string text = some_at_barrier && groups.size() > 1 ? "divergent barrier, deadlock" : "deadlock";
  text += " in kernel " + function_name(kernel_.function) + ":";
  for (const auto& [key, group] : groups) {
    const Wait& wait = group.example->wait;
    text += " " + std::to_string(group.threads) + " threads wait in " + wait.what;
    if (wait.mask != 0) {
      char hex[16];
      std::snprintf(hex, sizeof(hex), "%#x", wait.mask);
      text += std::string(" under mask ") + hex + ", of which some lanes do not participate,";
    }
    text += " at " + source_line(wait.site) + ", one of them " + describe_thread(shape_, group.example->id) + ";";
  }
  // Reported even where nothing is checked: nothing else would say why the launch failed.
  report(text);
}

}  // namespace simt
