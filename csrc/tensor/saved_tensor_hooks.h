// Recomputation by saved-tensor hooks, which torch takes only as Python functions.
#pragma once

#include <pybind11/pybind11.h>

namespace bnext {

// The class SavedTensorHooks.
void register_saved_tensor_hooks(pybind11::module_& m);

}  // namespace bnext
