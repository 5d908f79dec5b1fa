// Where lanes of a warp meet: shuffles and votes, by which CUDA promises no order of memory accesses.
#include <bit>
#include <cstdio>

#include "checker.h"

namespace simt {
namespace {

const char* name_of(WarpOp op) { return op == WarpOp::kBallot ? "__ballot_sync" : "__shfl_xor_sync"; }

std::string under_mask(WarpOp op, unsigned mask) {
  char text[64];
  std::snprintf(text, sizeof(text), "%s under mask %#x", name_of(op), mask);
  return text;
}

bool is_in(unsigned lanes, unsigned lane) { return (lanes >> lane & 1u) != 0; }

// The lane a shuffle reads; its own where CUDA says so, beyond the end of its group of `width` lanes.
unsigned source_lane(unsigned lane, int distance, int width) {
  const unsigned source = lane ^ static_cast<unsigned>(distance);
  const auto size = static_cast<unsigned>(width);
  return source >= (lane / size + 1) * size ? lane : source;
}

}  // namespace

std::uint64_t Launch::warp_meet(Thread& thread, WarpOp op, unsigned mask, std::uint64_t value, int distance, int width,
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
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
    if (is_new(Defect::kUsage, site)) {
      report(under_mask(op, mask) + " with a width that is no power of two: " + describe_where(thread, site));
    }
    abandon(thread);
  }
  const unsigned source = source_lane(thread.lane, distance, width);
  if (!is_in(mask & warp.lanes, source) && is_new(Defect::kMask, site)) {
    report(under_mask(op, mask) + ", which does not name lane " + std::to_string(source) +
           " that is read: " + describe_where(thread, site));
  }

  std::size_t i = 0;
  while (i < warp.meetings.size() && (warp.meetings[i].op != op || warp.meetings[i].mask != mask)) ++i;
  if (i == warp.meetings.size()) warp.meetings.push_back({op, mask, 0, {}, {}});
  Warp::Meeting& meeting = warp.meetings[i];
  meeting.arrived |= self;
  meeting.values[thread.lane] = value;
  meeting.sources[thread.lane] = source;
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
  ++progress_;
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (is_in(meeting.arrived, lane) && meeting.values[lane] != 0) ballot |= 1u << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!is_in(meeting.arrived, lane)) continue;
    Thread& thread = warp.threads[lane];
    const unsigned source = meeting.sources[lane];
    // The value of a lane that is not there is undefined on the device: NaN.
    const std::uint64_t shuffled = is_in(meeting.arrived, source) ? meeting.values[source] : ~std::uint64_t{0};
    thread.result = meeting.op == WarpOp::kBallot ? ballot : shuffled;
    if (thread.wait.what != nullptr) wake(thread);
  }
}

void Launch::retire_from_warp(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.exited |= 1u << thread.lane;
  for (std::size_t i = 0; i < warp.meetings.size();) {
    const Warp::Meeting& meeting = warp.meetings[i];
    if (!is_in(meeting.mask, thread.lane)) {
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
