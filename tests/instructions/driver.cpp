// Calls a CPU kernel a number of times, on one thread: check.py counts the instructions.
//
//     driver DTYPE LAYOUT PASS ACT CALLS
//
// LAYOUT: contiguous, small_planes, channels_last. PASS: forward, eval, backward. ACT: none, relu, silu, gelu, or
// add+relu with a residual and a mask.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/common/mask.h"
#include "../../csrc/cpu/batch_norm.h"

namespace {

using namespace bnext;

constexpr std::int64_t kN = 8;
constexpr std::int64_t kC = 32;
constexpr std::int64_t kHW = 28 * 28;
constexpr std::int64_t kSmallPlane = 16;  // HW of small_planes: one image, with more channels and as many elements

template <typename T>
T one_of(const std::string& name, std::initializer_list<std::pair<const char*, T>> known) {
  for (const auto& [each, value] : known) {
    if (name == each) return value;
  }
  std::fprintf(stderr, "unknown: %s\n", name.c_str());
  std::exit(2);
}

// A tensor of values between -2 and 2.
std::vector<std::uint64_t> tensor(const Problem& problem, int seed) {
  std::vector<std::uint64_t> memory(static_cast<std::size_t>(problem.numel()));
  for (std::int64_t i = 0; i < problem.numel(); ++i) {
    store({memory.data(), problem.dtype}, i, static_cast<double>((i * 37 + seed) % 1001) / 250.0 - 2.0);
  }
  return memory;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const std::string pass = argv[3];
  const std::string act = argv[4];
  const int calls = std::atoi(argv[5]);
  const bool small_planes = std::string(argv[2]) == "small_planes";
  const Problem problem{small_planes ? 1 : kN, small_planes ? kN * kC * kHW / kSmallPlane : kC,
                        small_planes ? kSmallPlane : kHW,
                        one_of<Layout>(argv[2], {{"contiguous", Layout::kChannelsFirst},
                                                 {"small_planes", Layout::kChannelsFirst},
                                                 {"channels_last", Layout::kChannelsLast}}),
                        one_of<DType>(argv[1], {{"float32", DType::kFloat32},
                                                {"float64", DType::kFloat64},
                                                {"float16", DType::kFloat16},
                                                {"bfloat16", DType::kBFloat16}})};
  const Activation activation{one_of<Act>(act, {{"none", Act::kIdentity},
                                                {"relu", Act::kRelu},
                                                {"add+relu", Act::kRelu},
                                                {"silu", Act::kSilu},
                                                {"gelu", Act::kGelu}})};
  const bool adds = act == "add+relu";

  const auto input = tensor(problem, 1);
  const auto grad = tensor(problem, 500);
  const auto residual = tensor(problem, 250);
  auto output = tensor(problem, 0);
  auto grad_residual = tensor(problem, 0);
  const std::int64_t row = mask_row_elements(problem);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(problem.numel() / row * mask_row_bytes(row, 8)), 0x55);
  std::vector<float> weight(problem.C, 1.5f), bias(problem.C, 0.5f), mean(problem.C, 0.0f), var(problem.C, 1.0f),
      grads(2 * problem.C);
  std::vector<double> save_mean(problem.C, 0.0), save_invstd(problem.C, 1.0);
  ForwardEpilogue epilogue{activation, adds ? residual.data() : nullptr, adds ? mask.data() : nullptr};

  // What training and evaluation share.
  const auto filled = [&](auto args) {
    args.input = input.data();
    args.weight = {weight.data()};
    args.bias = {bias.data()};
    args.eps = 1e-5;
    args.output = output.data();
    args.save_mean = save_mean.data();
    args.save_invstd = save_invstd.data();
    args.epilogue = epilogue;
    return args;
  };
  auto training = filled(TrainingForward{});
  training.running = {.mean = {mean.data()}, .var = {var.data()}, .momentum = 0.1};
  auto evaluation = filled(EvalForward{});
  evaluation.running_mean = {mean.data()};
  evaluation.running_var = {var.data()};

  const auto parallel = cpu::Parallel::serial();
  for (int call = 0; call < calls; ++call) {
    if (pass == "forward") {
      cpu::forward(problem, training, parallel);
    } else if (pass == "eval") {
      cpu::forward(problem, evaluation, parallel);
    } else if (pass == "backward") {
      cpu::backward(problem,
                    Backward{.grad_output = grad.data(),
                             .input = input.data(),
                             .weight = {weight.data()},
                             .save_mean = save_mean.data(),
                             .save_invstd = save_invstd.data(),
                             .training = true,
                             .grad_input = output.data(),
                             .grad_weight = {grads.data()},
                             .grad_bias = {grads.data() + problem.C},
                             .activation = activation,
                             .bias = {bias.data()},
                             .mask = adds ? mask.data() : nullptr,
                             .grad_residual = adds ? grad_residual.data() : nullptr},
                    parallel);
    } else {
      return 2;
    }
  }
  std::printf("%g\n", save_mean[0]);
}
