// The derivatives of a sum over processes, where the loss is the sum of all processes' losses. Every process has the
// result, so the gradient of one process's term is the sum of all results' gradients: a sum over processes again, as is
// the tangent. So derivatives of every order are collectives, one for each sum that is differentiated.

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "compiled_autograd.h"
#include "dispatcher.h"
#include "node.h"

namespace bnext::autograd {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

class AllReduceSumBackward : public torch::autograd::Node {
 public:
  std::string group_name;

  std::string name() const override { return "BNextAllReduceSumBackward"; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override { args.collect(group_name); }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    return traced(*this, grads, {}, swapped, [name = group_name](const variable_list& inputs, const variable_list&) {
      return gradients(inputs, name);
    });
  }

  variable_list apply(variable_list&& grads) override { return gradients(grads, group_name); }

 private:
  static variable_list gradients(const variable_list& grads, const std::string& group_name) {
    // All processes run the same passes, so a gradient that is undefined on one is undefined on all.
    return {grads[0].defined() ? all_reduce_sum_op().call(grads[0], group_name) : Tensor()};
  }
};

Tensor all_reduce_sum(const Tensor& tensor, std::string_view group_name) {
  decltype(make_node<AllReduceSumBackward>()) node;
  if (torch::autograd::compute_requires_grad(tensor)) {
    node = make_node<AllReduceSumBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(tensor));
    node->group_name = group_name;
  }
  Tensor sum = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return bnext::all_reduce_sum(tensor, group_name);
  }();
  if (node) torch::autograd::set_history(sum, node);
  if (torch::autograd::isFwGradDefined(tensor)) {
    sum._set_fw_grad(all_reduce_sum_op().call(tensor._fw_grad(/*level=*/0), group_name), /*level=*/0,
                     /*is_inplace_op=*/false);
  }
  return sum;
}

}  // namespace
}  // namespace bnext::autograd

TORCH_LIBRARY_IMPL(bnext, Autograd, m) { m.impl("all_reduce_sum", &bnext::autograd::all_reduce_sum); }
