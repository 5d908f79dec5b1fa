// Calls of the operators from Python that skip torch's matching of the arguments with a schema, which takes longer than
// a small batch norm.
#pragma once

#include <pybind11/pybind11.h>

namespace bnext {

// The functions batch_norm_train and batch_norm_eval.
void register_direct_calls(pybind11::module_& m);

}  // namespace bnext
