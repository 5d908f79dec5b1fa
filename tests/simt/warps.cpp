// Where lanes of a warp meet: __syncwarp, shuffles and votes.
//
// Only __syncwarp orders memory: CUDA promises no ordering by shuffles and votes.
#include <bit>
#include <cstdio>

#include "checker.h"
#include "clock.h"

namespace simt {
namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::kSync: return "__syncwarp";
    case WarpOp::kBallot: return "__ballot_sync";
    case WarpOp::kAny: return "__any_sync";
    case WarpOp::kAll: return "__all_sync";
    case WarpOp::kShuffle: return "__shfl_sync";
    case WarpOp::kShuffleUp: return "__shfl_up_sync";
    case WarpOp::kShuffleDown: return "__shfl_down_sync";
    case WarpOp::kShuffleXor: return "__shfl_xor_sync";
  }
  __builtin_unreachable();
}

bool is_shuffle(WarpOp op) { return op >= WarpOp::kShuffle; }

std::string under_mask(WarpOp op, unsigned mask) {
  char text[64];
  std::snprintf(text, sizeof(text), "%s under mask %#x", name_of(op), mask);
  return text;
}

// The lane a shuffle reads; its own where CUDA says so, beyond the end of its group of `width` lanes.
int source_lane(WarpOp op, int lane, int argument, int width) {
  const int group = lane & ~(width - 1);
  const int in_group = lane & (width - 1);
  switch (op) {
    case WarpOp::kShuffle: return group + (argument & (width - 1));
    case WarpOp::kShuffleUp: return in_group < argument ? lane : lane - argument;
    case WarpOp::kShuffleDown: return in_group + argument >= width ? lane : lane + argument;
    case WarpOp::kShuffleXor: return (lane ^ argument) >= group + width ? lane : lane ^ argument;
    default: __builtin_unreachable();
  }
}

unsigned votes(const Warp::Meeting& meeting) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((meeting.arrived >> lane & 1u) != 0 && meeting.values[lane] != 0) ballot |= 1u << lane;
  }
  return ballot;
}

std::uint64_t result_of(const Warp::Meeting& meeting, int lane) {
  switch (meeting.op) {
    case WarpOp::kSync: return 0;
    case WarpOp::kBallot: return votes(meeting);
    case WarpOp::kAny: return votes(meeting) != 0;
    case WarpOp::kAll: return votes(meeting) == meeting.arrived;
    default: break;
  }
  const int source = source_lane(meeting.op, lane, meeting.arguments[lane], meeting.widths[lane]);
  // Undefined on the device: NaN.
  return (meeting.arrived >> source & 1u) != 0 ? meeting.values[source] : ~std::uint64_t{0};
}

}  // namespace

std::uint64_t Launch::warp_meet(Thread& thread, WarpOp op, unsigned mask, std::uint64_t value, int argument, int width,
                                Site site) {
  Warp& warp = *thread.warp;
  const unsigned self = 1u << thread.lane;
  if ((mask & self) == 0) {
    if (is_new(Defect::kMask, site)) {
      report(under_mask(op, mask) + ", which does not name the calling lane: " + describe_where(thread, site));
    }
    return value;
  }
  if ((mask & warp.exited) != 0 && is_new(Defect::kMask, site)) {
    report(under_mask(op, mask) + ", which names a lane that has exited: " + describe_where(thread, site));
  }
  if (is_shuffle(op)) {
    if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
      if (is_new(Defect::kUsage, site)) {
        report(under_mask(op, mask) + " with a width that is no power of two: " + describe_where(thread, site));
      }
      abandon(thread);
    }
    const int source = source_lane(op, static_cast<int>(thread.lane), argument, width);
    if (((mask & warp.lanes) >> source & 1u) == 0 && is_new(Defect::kMask, site)) {
      report(under_mask(op, mask) + ", which does not name lane " + std::to_string(source) +
             " that is read: " + describe_where(thread, site));
    }
  }

  std::size_t i = 0;
  while (i < warp.meetings.size() && (warp.meetings[i].op != op || warp.meetings[i].mask != mask)) ++i;
  if (i == warp.meetings.size()) warp.meetings.push_back({op, mask, 0, {}, {}, {}});
  Warp::Meeting& meeting = warp.meetings[i];
  meeting.arrived |= self;
  meeting.values[thread.lane] = value;
  meeting.arguments[thread.lane] = argument;
  meeting.widths[thread.lane] = width;
  if (meeting.arrived == (mask & warp.lanes & ~warp.exited)) {
    complete(warp, i);
  } else {
    wait(thread, {name_of(op), site, mask});
  }
  return thread.result;
}

void Launch::complete(Warp& warp, std::size_t index) {
  const Warp::Meeting meeting = warp.meetings[index];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(index));
  ++device().counters.warp_operations;
  ++progress_;

  KnowledgePtr joined;
  Tick tick = 0;
  if (meeting.op == WarpOp::kSync) {
    std::vector<Known> entries;
    const Tick now = next_tick();
    const std::uint32_t block = warp.threads->block->number;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((meeting.arrived >> lane & 1u) == 0) continue;
      const Thread& thread = warp.threads[lane];
      joined = Knowledge::join(joined, thread.clock.knowledge);
      entries.push_back({thread_place(block, thread.in_block), now});
    }
    if (meeting.arrived == warp.lanes) entries = {{warp_place(block, warp.threads->in_block), now}};
    joined = Knowledge::with(joined, entries);
    tick = next_tick();
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((meeting.arrived >> lane & 1u) == 0) continue;
    Thread& thread = warp.threads[lane];
    thread.result = result_of(meeting, static_cast<int>(lane));
    if (meeting.op == WarpOp::kSync) {
      adopt(thread, joined);
      thread.clock.tick = tick;
    }
    if (thread.wait.what != nullptr) wake(thread);
  }
}

void Launch::retire_from_warp(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.exited |= 1u << thread.lane;
  for (std::size_t i = 0; i < warp.meetings.size();) {
    const Warp::Meeting& meeting = warp.meetings[i];
    if ((meeting.mask >> thread.lane & 1u) == 0) {
      ++i;
      continue;
    }
    const int waiting = std::countr_zero(meeting.arrived);
    const Site site = warp.threads[waiting].wait.site;
    if (is_new(Defect::kMask, site)) {
      report(under_mask(meeting.op, meeting.mask) +
             ", which names a lane that has exited: " + describe_where(warp.threads[waiting], site));
    }
    if (meeting.arrived == (meeting.mask & warp.lanes & ~warp.exited)) {
      complete(warp, i);
    } else {
      ++i;
    }
  }
}

}  // namespace simt
