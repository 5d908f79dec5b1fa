#include "direct_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "dispatcher.h"

namespace bnext {
namespace {

using at::Tensor;
using std::optional;

// Whether no mode, tracer or transform observes torch's functions. Where one does, the call is made in Python.
bool is_unobserved() {
  return !at::impl::torch_function_mode_enabled() && !at::tracer::impl::is_dispatch_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool has_kernels(const Tensor& input) {
#if defined(BNEXT_CUDA)
  const bool known_device = input.is_cpu() || input.is_cuda();
#else
  const bool known_device = input.is_cpu();
#endif
  return known_device && input.layout() == at::kStrided && !input.is_nested() && input.dim() >= 2;
}

// Takes a call's arguments in order, each only if it has exactly the type that is asked for: a subclass may have
// semantics of its own, and a number of another type would have to be converted.
class Arguments {
 public:
  Arguments(PyObject* const* begin, Py_ssize_t count) : next_(begin), end_(begin + count) {}

  bool take(Tensor& to) {
    if (next_ == end_ || !THPVariable_CheckExact(*next_)) return false;
    to = THPVariable_Unpack(*next_++);
    return true;
  }
  bool take(double& to) {
    if (next_ == end_ || !PyFloat_CheckExact(*next_)) return false;
    to = PyFloat_AS_DOUBLE(*next_++);
    return true;
  }
  bool take(std::string_view& to) {
    if (next_ == end_ || !PyUnicode_CheckExact(*next_)) return false;
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(*next_++, &size);
    if (text == nullptr) throw python_error();
    to = {text, static_cast<std::size_t>(size)};
    return true;
  }
  template <typename T>
  bool take(optional<T>& to) {
    if (next_ == end_) return false;
    if (*next_ == Py_None) {
      ++next_;
      return true;
    }
    return take(to.emplace());
  }

  template <typename First, typename... Rest>
  bool take_all(First& first, Rest&... rest) {
    if (!take(first)) return false;
    if constexpr (sizeof...(rest) > 0) return take_all(rest...);
    return true;
  }

  bool empty() const { return next_ == end_; }

 private:
  PyObject* const* next_;
  PyObject* const* end_;
};

// What follows the normalisation; if not given, nothing does.
struct GivenEpilogue {
  optional<Tensor> residual;
  std::string_view act = "identity";
  double slope = 0.0;

  bool take(Arguments& from) { return from.empty() || (from.take_all(residual, act, slope) && from.empty()); }
};

PyObject* batch_norm_train(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments given(args, count);
  Tensor input;
  optional<Tensor> weight, bias, running_mean, running_var, num_batches_tracked;
  optional<double> momentum;
  double eps = 0.0;
  GivenEpilogue after;
  const bool plain = is_unobserved() && given.take(input) && has_kernels(input) &&
                     given.take_all(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps) &&
                     after.take(given);
  // A counter of another dtype or device is counted in Python.
  if (!plain || (num_batches_tracked.has_value() && (num_batches_tracked->scalar_type() != at::kLong ||
                                                     num_batches_tracked->device() != input.device()))) {
    Py_RETURN_NONE;
  }
  const auto output = [&] {
    const pybind11::gil_scoped_release no_gil;
    return std::get<0>(train_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                       eps, after.residual, after.act, after.slope, /*with_mask=*/false,
                                       /*valid=*/{}, /*virtual_batch_size=*/0, /*update_in_backward=*/true));
  }();
  return THPVariable_Wrap(output);
  END_HANDLE_TH_ERRORS
}

PyObject* batch_norm_eval(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments given(args, count);
  Tensor input, running_mean, running_var;
  optional<Tensor> weight, bias;
  double eps = 0.0;
  GivenEpilogue after;
  if (!(is_unobserved() && given.take(input) && has_kernels(input) &&
        given.take_all(weight, bias, running_mean, running_var, eps) && after.take(given))) {
    Py_RETURN_NONE;
  }
  const auto output = [&] {
    const pybind11::gil_scoped_release no_gil;
    return std::get<0>(eval_op().call(input, weight, bias, running_mean, running_var, eps, after.residual, after.act,
                                      after.slope, /*with_mask=*/false, /*valid=*/{}));
  }();
  return THPVariable_Wrap(output);
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyCFunction method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction));
}

// The first line of each docstring is a signature, as pybind11 writes it.
PyMethodDef methods[] = {
    {"batch_norm_train", method<&batch_norm_train>(), METH_FASTCALL,
     "batch_norm_train(input: object, weight: object, bias: object, running_mean: object, running_var: object, "
     "num_batches_tracked: object, momentum: object, eps: object, *epilogue: object) -> torch.Tensor | None\n\n"
     "The operator's output. None, with nothing done, where the caller must go through the dispatcher: for tensor "
     "subclasses, in a trace, a transform or a mode, and unless the input is a dense tensor of at least two dimensions "
     "on a device with kernels."},
    {"batch_norm_eval", method<&batch_norm_eval>(), METH_FASTCALL,
     "batch_norm_eval(input: object, weight: object, bias: object, running_mean: object, running_var: object, "
     "eps: object, *epilogue: object) -> torch.Tensor | None\n\n"
     "Likewise."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void register_direct_calls(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace bnext
