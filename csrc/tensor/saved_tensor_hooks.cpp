#include "saved_tensor_hooks.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <utility>

#include "recomputation.h"

namespace bnext {
namespace {

namespace py = pybind11;
using autograd::Hooks;
using autograd::RecomputedOutput;
using autograd::SavedTensor;

// A pair of hooks for torch.autograd.graph.saved_tensors_hooks. torch calls only the innermost pair, so this one passes
// a tensor that is not a batch norm's output on to the pair around it, if there is one.
class SavedTensorHooks {
 public:
  SavedTensorHooks() {
    const auto outer = at::SavedTensorDefaultHooks::get_hooks();
    if (!outer) return;
    const auto in_python = [](const c10::SafePyObject& hook) {
      return py::reinterpret_borrow<py::function>(hook.ptr(getPyInterpreter()));
    };
    outer_.emplace(in_python(outer->first), in_python(outer->second));
    pass_on_ = !Hooks::of_thread().are_innermost() || Hooks::of_thread().pass_on;
  }

  py::object pack(const at::Tensor& tensor) const {
    if (outer_ && !RecomputedOutput::behind(tensor)) return outer_->first(tensor);
    return py::cast(autograd::saved_tensor(tensor));
  }

  at::Tensor unpack(const py::object& packed) const {
    if (!py::isinstance<SavedTensor>(packed)) return outer_.value().second(packed).cast<at::Tensor>();
    const auto saved = packed.cast<std::shared_ptr<SavedTensor>>();
    const py::gil_scoped_release no_gil;
    return saved->tensor();
  }

  // From here on the thread's forward calls record how to recompute their outputs.
  void enter() { before_ = std::exchange(Hooks::of_thread(), {Hooks::innermost(), pass_on_}); }
  void exit() { Hooks::of_thread() = before_; }

 private:
  std::optional<std::pair<py::function, py::function>> outer_;
  bool pass_on_ = false;
  Hooks before_;
};

}  // namespace

void register_saved_tensor_hooks(py::module_& m) {
  py::class_<SavedTensor, std::shared_ptr<SavedTensor>>(m, "SavedTensor", "What stands for a tensor that is saved.");
  py::class_<SavedTensorHooks>(m, "SavedTensorHooks", "Hooks that save no output of a batch norm: see bnext.recompute.")
      .def(py::init<>())
      .def_static("allowed", &at::SavedTensorDefaultHooks::is_enabled, "Whether torch allows hooks here.")
      .def("pack", &SavedTensorHooks::pack, py::arg("tensor"))
      .def("unpack", &SavedTensorHooks::unpack, py::arg("packed"))
      .def("enter", &SavedTensorHooks::enter)
      .def("exit", &SavedTensorHooks::exit);
}

}  // namespace bnext
