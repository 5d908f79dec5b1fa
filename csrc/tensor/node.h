// Makes a node of the autograd graph, in every supported version of torch.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>

namespace bnext::autograd {

// Between torch 2.11 and 2.13 nodes went from shared_ptr to intrusive_ptr.
using NodePtr = decltype(torch::autograd::Edge::function);
constexpr bool kSharedNodes = std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>;

template <typename T>
auto make_node() {
  if constexpr (kSharedNodes) {
    // deleteNode is found by argument-dependent lookup, because newer versions of torch no longer declare it.
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

}  // namespace bnext::autograd
