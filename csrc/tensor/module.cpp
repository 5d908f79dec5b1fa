// The Python module _C: registers the operators with torch and reports what was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/activation.h"
#include "../common/mask.h"
#include "../cpu/huge_page_cache.h"
#include "../cpu/isa/dispatch.h"
#include "../cpu/output_pool.h"
#include "backend.h"
#include "direct_calls.h"
#include "node_attributes.h"
#include "saved_tensor_hooks.h"
#include "schema.h"

TORCH_LIBRARY(bnext, m) { bnext::define_operators(m); }

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

void cap_cuda_device(std::optional<int> sms, std::optional<int> shared_per_block, std::optional<int> max_cluster,
                     std::optional<int> max_row_bytes) {
#if defined(BNEXT_CUDA)
  const auto checked = [](const char* name, std::optional<int> value, int none) {
    if (value.value_or(none) > 0) return value.value_or(none);
    throw std::invalid_argument("cap_cuda_device: expected " + std::string(name) + " to be positive, but got " +
                                std::to_string(*value));
  };
  const bnext::CudaCap none;
  bnext::cap_cuda_device({checked("sms", sms, none.sms),
                          checked("shared_per_block", shared_per_block, none.shared_per_block),
                          checked("max_cluster", max_cluster, none.max_cluster),
                          checked("max_row_bytes", max_row_bytes, none.max_row_bytes)});
#else
  (void)sms, (void)shared_per_block, (void)max_cluster, (void)max_row_bytes;
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

// The names of all activations, or of the rectifiers.
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
  bnext::register_node_attributes();
  bnext::register_saved_tensor_hooks(m);
  bnext::register_direct_calls(m);
  m.attr("torch_version") = TORCH_VERSION;  // of the torch that this was compiled against
  m.attr("compiler") = __VERSION__;
  m.attr("activations") = activations(/*rectifiers_alone=*/false);
  m.attr("rectifiers") = activations(/*rectifiers_alone=*/true);  // the activations that have a mask
  m.attr("cuda") = kCuda;
  m.attr("cuda_architectures") = kCudaArchitectures;  // such as 8.0,9.0
  m.attr("cpu_mask_lanes") = bnext::kCpuMaskLanes;    // elements that share a byte of a rectifier's mask
  m.attr("cuda_mask_bytes") = bnext::kCudaMaskBytes;  // on CUDA: the bytes of the elements that share one
  m.def("cap_cuda_device", &cap_cuda_device, pybind11::arg("sms") = pybind11::none(),
        pybind11::arg("shared_per_block") = pybind11::none(), pybind11::arg("max_cluster") = pybind11::none(),
        pybind11::arg("max_row_bytes") = pybind11::none(),
        "Plan as for a device with no more than this, for tests; without arguments, for the real one.");
  m.def("last_cuda_plan", &last_cuda_plan, "How the last CUDA launch was planned; empty before the first.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets the kernels can use on this machine, slowest first.");
  m.def("cpu_isa", [] { return bnext::cpu::isa_name(bnext::cpu::current_isa()); }, "The one in use.");
  m.def("set_cpu_isa", &set_cpu_isa, pybind11::arg("name"), "Use another of cpu_isas(), for tests and comparisons.");
  m.def("huge_pages_enabled", &bnext::cpu::huge_pages_enabled, "Whether large outputs ask for huge pages.");
  m.def("max_cached_bytes", &bnext::cpu::max_cached_bytes, "How much freed memory of large outputs is kept at most.");
  m.def(
      "cached_bytes", [] { return bnext::cpu::cached_bytes() + bnext::cpu::free_block_bytes(); },
      "How much is kept now.");
  m.def(
      "empty_cache",
      [] {
        bnext::cpu::empty_pool();
        bnext::cpu::empty_cache();
      },
      "Unmap what is kept.");
}
