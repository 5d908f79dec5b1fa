// The operators torch.ops.bnext.*: their schemas, and the kernels that every device has.
//
// output = act(batch_norm(input) + residual). slope: leaky_relu's, or elu's just below zero, which is its alpha.
// save_stats: (2, C) float64, the mean and 1/sqrt(var + eps) that the output was normalised with.
// mask: uint8, with_mask only: what a rectifier's backward needs of the pre-activation; (N, C, bytes) for
// channels-first memory, else (N*spatial, bytes); common/mask.h. Autograd asks for it by itself. momentum=None: the
// cumulative average, in which the batch weighs 1/num_batches_tracked. output_mask: whether to compute grad_input,
// grad_weight, grad_bias and grad_residual, the last only with an activation. mean_grads: (2, C), grad_weight and
// grad_bias over a batch on several processes, divided by its count; if given, grad_input is computed from them.
//
// valid: bool, (N, *spatial), false at padding: no statistic, count or gradient includes padding, and output,
// grad_input and grad_residual are 0 there. virtual_batch_size: so many consecutive images at a time are normalised by
// their own statistics; save_stats is (parts, 2, C) then, and the running statistics are updated as a loop over the
// parts would. 0: all images together. update_in_backward=False: a call that runs within a backward pass, as the second
// one of activation checkpointing does, leaves the running statistics and the counter alone.
//
// sequence_mask: `valid`, on `device`, of `batch` sequences of these lengths (int64 or int32), each padded to `size`.
//
// batch_norm_recompute: the output of an earlier call of any of these, with the same bits, from the call's save_stats.
//
// batch_norm_sync: batch_norm_train over the batch of a group of processes (torch.distributed), composed of
// batch_norm_stats: (2*C + 1) float64, a local batch's means, sums of (x - mean)^2, and count; and of
// batch_norm_gathered: batch_norm_train by the gathered stats of all processes, (processes, 2*C + 1).
// batch_norm_sync_backward: its gradients, grad_input by all_reduce_sum (torch's collective, with every derivative),
// grad_weight and grad_bias of the local batch alone. count: the number of a channel's values on all processes.
#pragma once

#include <torch/library.h>

#include <vector>

#include "operators.h"

namespace bnext {

inline void define_operators(torch::Library& m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor? residual=None, str act='identity', float slope=0., bool with_mask=False, Tensor? valid=None, "
      "int virtual_batch_size=0, bool update_in_backward=True) "
      "-> (Tensor output, Tensor save_stats, Tensor mask)",
      tags);
  m.def(
      "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual=None, str act='identity', float slope=0., bool with_mask=False, "
      "Tensor? valid=None) -> (Tensor output, Tensor save_stats, Tensor mask)",
      tags);
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor save_stats, bool training, "
      "float eps, bool[4] output_mask, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "str act='identity', float slope=0., Tensor? mean_grads=None, Tensor? valid=None, int virtual_batch_size=0) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);
  m.def(
      "batch_norm_recompute(Tensor input, Tensor save_stats, Tensor? weight, Tensor? bias, Tensor? residual=None, "
      "str act='identity', float slope=0., Tensor? valid=None, int virtual_batch_size=0) -> Tensor",
      tags);
  m.def("batch_norm_stats(Tensor input, float eps, Tensor? valid=None) -> Tensor", tags);
  m.def(
      "batch_norm_gathered(Tensor input, Tensor gathered_stats, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "Tensor? residual=None, str act='identity', float slope=0., bool with_mask=False, Tensor? valid=None) "
      "-> (Tensor output, Tensor save_stats, Tensor mask)",
      tags);
  m.def(
      "batch_norm_sync(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, int group_size, "
      "str group_name, Tensor? residual=None, str act='identity', float slope=0., Tensor? valid=None, "
      "bool update_in_backward=True) -> Tensor",
      tags);
  m.def(
      "batch_norm_sync_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor save_stats, Tensor count, "
      "float eps, bool[4] output_mask, str group_name, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "str act='identity', float slope=0., Tensor? valid=None) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
      tags);
  m.def("sequence_mask(Tensor lengths, SymInt batch, SymInt size, Device device) -> Tensor", tags);
  m.def("all_reduce_sum(Tensor tensor, str group_name) -> Tensor", tags);
}

inline void register_kernels(torch::Library& m) {
  m.impl("batch_norm_train", &batch_norm_train);
  m.impl("batch_norm_eval", &batch_norm_eval);
  m.impl("batch_norm_backward", &batch_norm_backward);
  m.impl("batch_norm_recompute", &batch_norm_recompute);
  m.impl("batch_norm_stats", &batch_norm_stats);
  m.impl("batch_norm_gathered", &batch_norm_gathered);
  m.impl("sequence_mask", &sequence_mask);
}

}  // namespace bnext
