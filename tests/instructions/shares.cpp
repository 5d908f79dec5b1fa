// How evenly the CPU kernels divide a call among threads: the most that a thread writes, as a multiple of an even share.
//
//     shares < CASES        one a line: LAYOUT PASS THREADS N C HW; prints a number for each
//
// The threads' ranges run one after the other; what each has written is counted.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/batch_norm.h"

namespace {

using namespace bnext;

constexpr float kUnwritten = std::numeric_limits<float>::max();

std::vector<float> output;
std::vector<std::int64_t> written;  // by each thread

std::int64_t count_written() {
  return static_cast<std::int64_t>(output.size()) - std::count(output.begin(), output.end(), kUnwritten);
}

// Divides tasks as at::parallel_for does.
void loop(std::int64_t tasks, cpu::Parallel::Body body, void* context) {
  const auto threads = std::min(static_cast<std::int64_t>(written.size()), tasks);
  const std::int64_t share = (tasks + threads - 1) / threads;
  std::int64_t before = count_written();
  for (std::int64_t thread = 0; thread * share < tasks; ++thread) {
    body(context, thread * share, std::min(tasks, (thread + 1) * share));
    const std::int64_t after = count_written();
    written[static_cast<std::size_t>(thread)] += after - before;
    before = after;
  }
}

}  // namespace

int main() {
  std::string layout, pass;
  std::int64_t threads, N, C, HW;
  while (std::cin >> layout >> pass >> threads >> N >> C >> HW) {
    const Problem problem{N, C, HW, layout == "contiguous" ? Layout::kChannelsFirst : Layout::kChannelsLast,
                          DType::kFloat32};
    std::vector<float> input(static_cast<std::size_t>(problem.numel()));
    for (std::size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i * 37 % 1001) / 250.0f - 2.0f;
    output.assign(input.size(), kUnwritten);
    written.assign(static_cast<std::size_t>(threads), 0);
    const auto of_channels = static_cast<std::size_t>(C);
    std::vector<float> mean(of_channels, 0.0f), var(of_channels, 1.0f);
    std::vector<double> save_mean(of_channels, 0.0), save_invstd(of_channels, 1.0);
    const cpu::Parallel parallel(loop, threads);
    const auto filled = [&](auto args) {
      args.input = input.data();
      args.eps = 1e-5;
      args.output = output.data();
      args.save_mean = save_mean.data();
      args.save_invstd = save_invstd.data();
      return args;
    };
    if (pass == "forward") {
      cpu::forward(problem, filled(TrainingForward{}), parallel);
    } else if (pass == "eval") {
      EvalForward args = filled(EvalForward{});
      args.running_mean = {mean.data()};
      args.running_var = {var.data()};
      cpu::forward(problem, args, parallel);
    } else {
      cpu::backward(problem,
                    Backward{.grad_output = input.data(),
                             .input = input.data(),
                             .save_mean = save_mean.data(),
                             .save_invstd = save_invstd.data(),
                             .training = true,
                             .grad_input = output.data()},
                    parallel);
    }
    const std::int64_t most = *std::max_element(written.begin(), written.end());
    if (count_written() != problem.numel()) return 1;
    std::printf("%.3f\n", static_cast<double>(most * threads) / static_cast<double>(problem.numel()));
  }
  return 0;
}
