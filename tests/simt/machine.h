// A launch as it runs: threads in warps in blocks in clusters, and who waits for what.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "findings.h"
#include "include/simt_runtime.h"
#include "knowledge.h"
#include "memory.h"
#include "requests.h"

namespace simt {

class Launch;
struct Block;
struct Cluster;

// What a thread that does not run is waiting for; also said in findings.
inline constexpr const char* kClusterWait = "a cluster barrier";
struct Wait {
  const char* what = nullptr;  // null: it can run
  Site site = nullptr;
  unsigned mask = 0;  // of a warp's operation
};

struct AsyncCopy {
  void* shared;
  const void* global;
  std::size_t bytes;
  Tick tick;  // of the issue
  Site site;
};

struct Warp {
  struct Meeting {
    WarpOp op;
    unsigned mask;
    unsigned arrived;
    std::uint64_t values[32];
    unsigned sources[32];  // lanes that a shuffle reads
  };

  unsigned lanes = 0;   // that exist
  unsigned exited = 0;  // of those
  struct Thread* threads = nullptr;
  std::vector<Meeting> meetings;  // not complete yet: several, where lanes meet under different masks
};

struct Thread {
  Launch* launch;
  Block* block;
  Warp* warp;
  std::uint32_t id;   // 1 + its number in the launch
  unsigned in_block;  // its number in the block
  unsigned lane;

  Fiber fiber;
  Wait wait;
  bool exited = false;
  std::uint64_t result = 0;  // of the operation it waited in

  KnowledgePtr knowledge;
  Tick tick = 0;         // of its accesses now
  Tick block_known = 0;  // its block in `knowledge`, which is looked up most

  std::vector<AsyncCopy> issued;                  // not committed
  std::vector<std::vector<AsyncCopy>> committed;  // groups, the oldest first

  bool cluster_arrived = false;         // and has not waited
  bool accessed_since_arrival = false;  // memory that is written to
  unsigned cluster_barriers = 0;        // passed
  std::uint64_t cluster_goal = 0;       // the barrier it arrived at

  void adopt(const KnowledgePtr& other);  // instead of what it knew
  void learn(const KnowledgePtr& other);  // besides
  // Whether what `record` says happened before what this thread does now.
  bool is_after(const Record& record) const;
};

struct FreeShared {
  void operator()(unsigned char* data) const { ::operator delete[](data, std::align_val_t{128}); }
};

struct Block {
  Cluster* cluster;
  std::uint32_t number;  // in the launch
  std::unique_ptr<unsigned char[], FreeShared> shared;
  std::unique_ptr<Region> shared_region;
  std::unique_ptr<Thread[]> threads;
  std::vector<Warp> warps;
  unsigned exited = 0;

  unsigned barrier_arrived = 0;
  Site barrier_site = nullptr;
  bool barrier_result = false;  // whether some predicate was true

  KnowledgePtr at_exit;  // joined over its threads
  struct RemoteUse {
    Tick tick;
    Site site;
  };
  std::unordered_map<std::uint32_t, RemoteUse> remote_uses;  // of its shared memory, the last one of each thread
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned exited = 0;  // threads
  unsigned arrived = 0;
  std::uint64_t completed = 0;  // barriers
  KnowledgePtr gathered;        // of those that arrived
  std::vector<Known> arrivals;
  KnowledgePtr released;  // by the last completed barrier
};

struct LaunchShape {
  unsigned blocks;
  unsigned threads;  // of a block
  unsigned cluster_blocks = 1;
  std::size_t dynamic_shared = 0;
  bool cooperative = false;

  unsigned cluster_threads() const { return cluster_blocks * threads; }
};

class Launch {
 public:
  Launch(const LaunchShape& shape, const Kernel& kernel);
  ~Launch();
  void run();

  // For the threads of this launch, which call them while they run.
  void wait(Thread& thread, Wait what);  // returns once woken
  void wake(Thread& thread);
  void pause(Thread& thread, Site site);
  // An access that a program may spin on: now and then it lets others run first, or a spin would never end.
  void maybe_pause(Thread& thread, Site site);
  [[noreturn]] void abandon(Thread& thread);  // stops the launch

  bool block_barrier(Thread& thread, bool predicate, Site site);
  void cluster_arrive(Thread& thread, Site site);
  void cluster_wait(Thread& thread, Site site);
  std::uint64_t warp_meet(Thread& thread, WarpOp op, unsigned mask, std::uint64_t value, int distance, int width,
                          Site site);

  Tick first_tick() const { return first_tick_; }
  Tick next_tick() { return ++tick_; }
  void note_progress() { ++progress_; }
  // Fails the launch; false if the defect was reported at these places before, or if nothing is checked.
  bool is_new(Defect defect, Site site, Site other = nullptr);
  void report(const std::string& text);

  const LaunchShape& shape() const { return shape_; }
  const Kernel& kernel() const { return kernel_; }
  bool failed() const { return failed_; }

 private:
  static void run_thread(void* opaque);
  void admit();
  void start_cluster(std::uint32_t number);
  void start_block(Cluster& cluster, std::uint32_t number);
  void resume(Thread& thread);
  void retire(Thread& thread);
  void retire_from_warp(Thread& thread);
  void retire_from_block(Thread& thread);
  void report_deadlock();

  void release_block(Block& block);
  void release_cluster(Cluster& cluster);
  void complete(Warp& warp, std::size_t meeting);

  LaunchShape shape_;
  Kernel kernel_;
  std::mt19937_64 random_;
  std::vector<std::uint32_t> pending_clusters_;     // numbers; the next one last
  std::vector<std::unique_ptr<Cluster>> clusters_;  // resident
  std::vector<Thread*> ready_;
  std::vector<Thread*> woken_;          // for the next round
  std::uint64_t resident_threads_ = 0;  // with those that have exited, until their cluster has
  std::uint64_t progress_ = 0;
  Tick first_tick_;
  Tick tick_;
  bool abandoned_ = false;
  bool failed_ = false;
};

// The thread that this OS thread runs; null in host code and in the emulator itself, which does not check itself even
// where the linker gave it an instrumented copy of a function from the standard library.
extern thread_local Thread* running __attribute__((tls_model("initial-exec")));

// In a function that a kernel calls itself, the place of the call.
#define SIMT_SITE __builtin_return_address(0)

// Every function that kernels call opens one, so that the emulator does not check its own accesses.
class EmulatorScope {
 public:
  EmulatorScope() : thread_(running) { running = nullptr; }
  ~EmulatorScope() { running = thread_; }
  EmulatorScope(const EmulatorScope&) = delete;
  EmulatorScope& operator=(const EmulatorScope&) = delete;
  Thread& thread() const { return *thread_; }

 private:
  Thread* thread_;
};

// What outlives a launch.
struct Device {
  DeviceLimits limits;
  Options options;
  GlobalMemory memory;
  Findings findings;
  Counters counters;
  Requests requests;
};
Device& device();

}  // namespace simt
