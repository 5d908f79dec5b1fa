// The Python module _C: registers the operators with torch and reports what was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "autograd.h"
#include "backend.h"
#include "batch_norm.h"
#include "common/activation.h"
#include "cpu/isa.h"
#include "cpu/large_blocks.h"

// output = act(batch_norm(input) + residual); slope is leaky_relu's, or elu's just below zero: alpha.
// save_stats: (2, C) float64, the mean and 1/sqrt(var + eps) that the output was normalised with.
// mask: uint8, with_mask only: what a rectifier's backward needs of the pre-activation; (N, C, bytes) for
// channels-first memory, else (N*spatial, bytes); common/mask.h. Autograd asks for it by itself. momentum=None: the
// cumulative average, the batch counting 1/num_batches_tracked. output_mask: of grad_input, grad_weight, grad_bias,
// grad_residual; the last only with an activation. mean_grads: (2, C), grad_weight and grad_bias over a batch that lies
// on several processes, divided by its count; then grad_input is by these.
//
// batch_norm_sync: batch_norm_train over the batch of a group of processes (torch.distributed), which is made of
// batch_norm_moments: (2*C + 1) float64, the means of a process's share, the sums of (x - mean)^2, the count; and of
// batch_norm_merged, which is batch_norm_train by the moments of all shares, (shares, 2*C + 1).
TORCH_LIBRARY(bnext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor? residual=None, str act='identity', float slope=0., bool with_mask=False) "
      "-> (Tensor output, Tensor save_stats, Tensor mask)",
      tags);
  m.def(
      "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual=None, str act='identity', float slope=0., bool with_mask=False) "
      "-> (Tensor output, Tensor save_stats, Tensor mask)",
      tags);
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor save_stats, bool training, "
      "float eps, bool[4] output_mask, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "str act='identity', float slope=0., Tensor? mean_grads=None) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);
  m.def("batch_norm_moments(Tensor input, float eps) -> Tensor", tags);
  m.def(
      "batch_norm_merged(Tensor input, Tensor moments, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor? residual=None, str act='identity', float slope=0., bool with_mask=False) "
      "-> (Tensor output, Tensor save_stats, Tensor mask)",
      tags);
  m.def(
      "batch_norm_sync(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, int group_size, "
      "str group_name, Tensor? residual=None, str act='identity', float slope=0.) -> Tensor",
      tags);
}

namespace {

void register_kernels(torch::Library& m) {
  m.impl("batch_norm_train", &bnext::batch_norm_train);
  m.impl("batch_norm_eval", &bnext::batch_norm_eval);
  m.impl("batch_norm_backward", &bnext::batch_norm_backward);
  m.impl("batch_norm_moments", &bnext::batch_norm_moments);
  m.impl("batch_norm_merged", &bnext::batch_norm_merged);
}

}  // namespace

TORCH_LIBRARY_IMPL(bnext, CompositeExplicitAutograd, m) { m.impl("batch_norm_sync", &bnext::batch_norm_sync); }

TORCH_LIBRARY_IMPL(bnext, CPU, m) { register_kernels(m); }

#if defined(BNEXT_CUDA)
TORCH_LIBRARY_IMPL(bnext, CUDA, m) { register_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(bnext, Autograd, m) {
  m.impl("batch_norm_train", &bnext::autograd::batch_norm_train);
  m.impl("batch_norm_eval", &bnext::autograd::batch_norm_eval);
  m.impl("batch_norm_backward", &bnext::autograd::batch_norm_backward);
  m.impl("batch_norm_sync", &bnext::autograd::batch_norm_sync);
}

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const auto isa : bnext::cpu::available_isas()) names.emplace_back(bnext::cpu::isa_name(isa));
  return names;
}

#if defined(BNEXT_CUDA)
#define BNEXT_STRING(...) #__VA_ARGS__
#define BNEXT_EXPANDED_STRING(...) BNEXT_STRING(__VA_ARGS__)
constexpr bool kCuda = true;
constexpr const char* kCudaArchitectures = BNEXT_EXPANDED_STRING(BNEXT_CUDA_ARCHITECTURES);
#else
constexpr bool kCuda = false;
constexpr const char* kCudaArchitectures = "";
#endif

void cap_cuda_device(std::optional<int> sms, std::optional<int> shared_per_block, std::optional<int> max_cluster) {
#if defined(BNEXT_CUDA)
  const auto checked = [](const char* name, std::optional<int> value, int none) {
    if (value.value_or(none) > 0) return value.value_or(none);
    throw std::invalid_argument("cap_cuda_device: expected " + std::string(name) + " to be positive, but got " +
                                std::to_string(*value));
  };
  const bnext::CudaCap none;
  bnext::cap_cuda_device({checked("sms", sms, none.sms),
                          checked("shared_per_block", shared_per_block, none.shared_per_block),
                          checked("max_cluster", max_cluster, none.max_cluster)});
#else
  (void)sms, (void)shared_per_block, (void)max_cluster;
  throw std::runtime_error("cap_cuda_device: bnext was built without CUDA");
#endif
}

std::string last_cuda_plan() {
#if defined(BNEXT_CUDA)
  return bnext::last_cuda_plan();
#else
  return {};
#endif
}

// The names of all activations, or of those that rectify.
pybind11::tuple activations(bool rectifiers_alone) {
  pybind11::list names;
  for (const auto& each : bnext::kActs) {
    if (!rectifiers_alone || bnext::Activation{each.act}.rectifies()) names.append(each.name);
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  std::string known;
  for (const auto isa : bnext::cpu::available_isas()) {
    if (name == bnext::cpu::isa_name(isa)) return bnext::cpu::use_isa(isa);
    known += std::string(known.empty() ? "" : ", ") + bnext::cpu::isa_name(isa);
  }
  throw std::invalid_argument("set_cpu_isa: expected name to be one of " + known + ", but got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of bnext. Importing it registers the operators torch.ops.bnext.*.";
  m.attr("torch_version") = TORCH_VERSION;  // that this was compiled against
  m.attr("compiler") = __VERSION__;
  m.attr("activations") = activations(/*rectifiers_alone=*/false);
  m.attr("rectifiers") = activations(/*rectifiers_alone=*/true);  // whose operators have a mask
  m.attr("cuda") = kCuda;
  m.attr("cuda_architectures") = kCudaArchitectures;  // 8.0,9.0
  m.def("cap_cuda_device", &cap_cuda_device, pybind11::arg("sms") = pybind11::none(),
        pybind11::arg("shared_per_block") = pybind11::none(), pybind11::arg("max_cluster") = pybind11::none(),
        "Plan as for a device with no more than this, for tests; without arguments, for the real one.");
  m.def("last_cuda_plan", &last_cuda_plan, "How the last CUDA launch was planned; empty before the first.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets the kernels can use on this machine, slowest first.");
  m.def("cpu_isa", [] { return bnext::cpu::isa_name(bnext::cpu::current_isa()); }, "The one in use.");
  m.def("set_cpu_isa", &set_cpu_isa, pybind11::arg("name"), "Use another of cpu_isas(), for tests and comparisons.");
  m.def("huge_pages_enabled", &bnext::cpu::huge_pages_enabled, "Whether large outputs ask for huge pages.");
  m.def("most_kept_bytes", &bnext::cpu::most_kept_bytes, "How much freed memory of large outputs is kept at most.");
  m.def("kept_bytes", &bnext::cpu::kept_bytes, "How much is kept now.");
  m.def("release_kept_blocks", &bnext::cpu::release_kept_blocks, "Unmap what is kept.");
}
