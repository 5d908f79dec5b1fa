#include "node_attributes.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "nodes.h"

namespace bnext {
namespace {

using autograd::SavedCall;

// The getter of one attribute, whose value `read` takes from what the node saved.
template <PyObject* (*read)(SavedCall&)>
PyObject* get(PyObject* self, void* /*closure*/) {
  HANDLE_TH_ERRORS
  torch::autograd::Node& node = *reinterpret_cast<torch::autograd::THPCppFunction*>(self)->cdata;
  return read(static_cast<autograd::BatchNormBackward&>(node).call);
  END_HANDLE_TH_ERRORS
}

template <torch::autograd::SavedVariable SavedCall::* member>
PyObject* tensor(SavedCall& call) {
  return THPVariable_Wrap((call.*member).unpack());
}

template <int row>
PyObject* stats(SavedCall& call) {
  return THPVariable_Wrap(call.save_stats.unpack().select(-2, row));
}

PyObject* training(SavedCall& call) { return PyBool_FromLong(call.training); }
PyObject* eps(SavedCall& call) { return PyFloat_FromDouble(call.eps); }

}  // namespace

void register_node_attributes() {
  using namespace torch::autograd;  // for the names in the macro's expansion
  static PyGetSetDef properties[] = {
      THP_FUNCTION_DEFAULT_PROPERTIES,
      {"_saved_input", get<tensor<&SavedCall::input>>, nullptr, nullptr, nullptr},
      {"_saved_weight", get<tensor<&SavedCall::weight>>, nullptr, nullptr, nullptr},
      {"_saved_bias", get<tensor<&SavedCall::bias>>, nullptr, nullptr, nullptr},
      {"_saved_residual", get<tensor<&SavedCall::residual>>, nullptr, nullptr, nullptr},
      {"_saved_result1", get<stats<0>>, nullptr, nullptr, nullptr},
      {"_saved_result2", get<stats<1>>, nullptr, nullptr, nullptr},
      {"_saved_training", get<training>, nullptr, nullptr, nullptr},
      {"_saved_eps", get<eps>, nullptr, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr},
  };
  static PyTypeObject type;
  registerCppFunction(typeid(autograd::BatchNormBackward),
                      _initFunctionPyTypeObject(type, "BNextBatchNormBackward", properties, nullptr));
}

}  // namespace bnext
