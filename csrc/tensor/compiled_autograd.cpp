#include "compiled_autograd.h"

#include <optional>
#include <string>
#include <utility>

namespace bnext::autograd {

using torch::autograd::InputMetadata;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::IValuePacker;
using torch::dynamo::autograd::PackedArgs;

variable_list unpacked(Saved saved) {
  variable_list tensors;
  for (const SavedVariable* each : saved) tensors.push_back(each->unpack());
  return tensors;
}

std::vector<bool> needed_outputs(const Node& node) {
  std::vector<bool> needs;
  for (std::size_t i = 0; i < node.num_outputs(); ++i) needs.push_back(node.task_should_compute_output(i));
  return needs;
}

variable_list traced(const Node& node, const variable_list& grads, Saved saved,
                     torch::dynamo::autograd::SwapSavedVariables& swapped,
                     std::function<variable_list(const variable_list&, const variable_list&)> gradients) {
  PackedArgs arguments;
  for (SavedVariable* each : saved) swapped.before(*each);
  arguments.pack(unpacked(saved));
  for (SavedVariable* each : saved) swapped.after(*each);
  const auto function = [gradients = std::move(gradients)](const variable_list& inputs,
                                                           const std::vector<c10::IValue>& packed) {
    return gradients(inputs, PackedArgs(packed).unpack<variable_list>());
  };
  const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
  auto* const py_compiler = swapped.get_py_compiler();
  const std::string name = compiler->bind_function(py_compiler, node.name(), function, {arguments.vec()[0].type()},
                                                   /*is_custom_function=*/true);
  const auto metadata = torch::dynamo::autograd::get_input_metadata(node.next_edges());
  return compiler->call_function(py_compiler, "apply_functional", name, grads, arguments.vec(),
                                 IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(metadata));
}

}  // namespace bnext::autograd
