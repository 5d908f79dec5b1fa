// Recomputation as hooks of saved tensors, which torch has in Python alone.
#pragma once

#include <pybind11/pybind11.h>

namespace bnext {

// The class SavedTensorHooks.
void register_saved_tensor_hooks(pybind11::module_& m);

}  // namespace bnext
