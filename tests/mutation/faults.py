"""The faults: each is what a careless change would make, and a user would notice late."""

from __future__ import annotations

from mutation.edits import Fault

STATISTICS = "csrc/common/statistics.h"
CHANNELS = "csrc/common/channel_ops.h"
ACTIVATION = "csrc/common/activation.h"
NODES = "csrc/tensor/nodes.cpp"
FORWARD = "csrc/tensor/forward.cpp"
RECOMPUTATION = "csrc/tensor/recomputation.cpp"
CHECKS = "csrc/tensor/checks.cpp"

PLAIN_TRAINING = "train_batch_norm(input, running_mean, running_var, None, weight, bias, momentum, eps, batch=batch)"

FAULTS: tuple[Fault, ...] = (
    # The statistics.
    Fault(
        "running_var-is-biased",
        CHANNELS,
        "unbiased_var(batch.var, count)",
        "batch.var",
        "ops/test_forward.py::test_momentum_and_eps",
    ),
    Fault(
        "momentum-is-swapped",
        STATISTICS,
        "(1.0 - momentum) * running + momentum * batch",
        "momentum * running + (1.0 - momentum) * batch",
        "ops/test_forward.py::test_momentum_and_eps",
    ),
    Fault(
        "batch-is-not-counted",
        "csrc/cpu/batch_norm.cpp",
        "running.num_batches_tracked != nullptr",
        "false",
        "ops/test_running_stats.py::test_counter_with_momentum_only_counts",
    ),
    Fault(
        "batch-variance-is-unbiased",
        STATISTICS,
        "m2 / count",
        "m2 / (count - 1.0)",
        "ops/test_forward.py::test_save_stats_are_mean_and_invstd_in_float64",
    ),
    Fault(
        "eps-is-outside-the-root",
        STATISTICS,
        "1.0 / lane_by_lane(var + eps, [](double lane) { return std::sqrt(lane); })",
        "1.0 / (lane_by_lane(var, [](double lane) { return std::sqrt(lane); }) + eps)",
        "ops/test_forward.py::test_momentum_and_eps",
    ),
    Fault(
        "cancelled-sums-are-good-enough",
        STATISTICS,
        "delta * delta <= 4.0 * var",
        "delta * delta <= INFINITY + var",
        "ops/test_numerics.py::test_outliers_in_pairs[cpu-16384x3-contiguous-1e+15]",
    ),
    Fault(
        "mean-has-no-low-part",
        STATISTICS,
        "is_finite(high) ? mean - high : V{}",
        "V{}",
        "ops/test_numerics.py::test_offset_does_not_cost_accuracy[cpu-16384x3-contiguous-mean=100]",
    ),
    Fault(
        "shares-have-each-others-weight",
        STATISTICS,
        "mean + delta * share",
        "mean + delta * (1.0 - share)",
        "sync/test_sync_ops.py::test_running_statistics_over_steps",
    ),
    # The gradients.
    Fault(
        "mean-gradient-has-the-wrong-sign",
        STATISTICS,
        "-scale * mean_dy - split.low * slope",
        "scale * mean_dy - split.low * slope",
        "ops/test_forward.py::test_grad_output_expanded_from_one_number",
    ),
    Fault(
        "residual-has-no-gradient",
        NODES,
        "needs[3] && !activated",
        "false",
        "ops/test_forward.py::test_identity_has_the_bits_of_plain_batch_norm",
    ),
    Fault(
        "second-derivatives-see-one-process-alone",
        "csrc/tensor/derivatives.cpp",
        "all_reduce_sum_op().call(t.sum(dims, /*keepdim=*/true), at.batch->group_name)",
        "t.sum(dims, /*keepdim=*/true)",
        "sync/test_sync_derivatives.py::test_forward_mode_of_any_subset",
    ),
    Fault(
        "gradient-of-a-sum-is-that-of-one-process",
        "csrc/tensor/all_reduce.cpp",
        "all_reduce_sum_op().call(grads[0], group_name)",
        "Tensor(grads[0])",
        "sync/test_sync_derivatives.py::test_sum_over_processes",
    ),
    # The activations.
    Fault(
        "relu-is-open-at-zero",
        ACTIVATION,
        "z <= static_cast<scalar_of<V>>(0) ? closed : open",
        "z < static_cast<scalar_of<V>>(0) ? closed : open",
        "ops/test_backward.py::test_at_a_kink_the_derivative_is_torchs",
    ),
    Fault(
        "leaky_relu-has-the-default-slope-in-backward",
        ACTIVATION,
        "dy * static_cast<T>(a.slope)",
        "dy * static_cast<T>(0.01)",
        "ops/test_forward.py::test_any_finite_slope",
    ),
    Fault(
        "relu6-is-open-at-six",
        ACTIVATION,
        "z >= static_cast<scalar_of<V>>(6) ? V{} : z",
        "z > static_cast<scalar_of<V>>(6) ? V{} : z",
        "ops/test_backward.py::test_at_a_kink_the_derivative_is_torchs",
    ),
    Fault(
        "mask-of-relu6-is-the-sign",
        "csrc/common/elementwise.h",
        "opening(epilogue.activation, before)",
        "before",
        "ops/test_forward.py::test_every_activation",
    ),
    Fault(
        "elu-cancels-near-zero",
        ACTIVATION,
        "x.quotient * x.f * scale + (scale - 1.0f)",
        "(x.quotient * x.f + 1.0f) * scale - 1.0f",
        "ops/test_activations.py::test_small_values_keep_their_relative_accuracy[elu]",
    ),
    Fault(
        "mish-has-half-its-bend",
        ACTIVATION,
        "(mish.e * (mish.e + kOne) * static_cast<T>(4))",
        "(mish.e * (mish.e + kOne) * static_cast<T>(2))",
        "ops/test_forward.py::test_every_activation",
    ),
    Fault(
        "gelu-is-by-tanh",
        ACTIVATION,
        "(z <= static_cast<T>(0) ? z - z : z) - normal.distance * normal.beyond",
        "lane_by_lane(z, [](T x) { return x / 2 * (1 + std::tanh(T(0.7978845608) * (x + T(0.044715) * x * x * x))); })",
        "modules/test_modules.py::test_every_activation_behaves_as_torchs",
    ),
    # The arguments.
    Fault(
        "any-dtype-of-a-parameter-is-taken",
        CHECKS,
        "type == at::kFloat || type == input.scalar_type()",
        "type == type",
        "ops/test_errors.py::test_only_the_dtype_of_the_input_or_float32",
    ),
    Fault(
        "empty-batch-is-refused",
        FORWARD,
        "problem.count() != 1",
        "problem.count() > 1",
        "ops/test_running_stats.py::test_empty_batch_does_not_spoil_the_cumulative_average",
    ),
    # The memory.
    Fault(
        "freed-memory-of-outputs-stays-in-pieces",
        "csrc/cpu/output_pool.cpp",
        "left->second.block != right->second.block",
        "left->second.block == right->second.block",
        "runtime/test_output_pool.py::test_free_neighbours_are_joined[ab]",
    ),
    # Outputs that backward recomputes.
    Fault(
        "an-output-that-was-written-to-is-made-again",
        RECOMPUTATION,
        "tensor._version() != 0",
        "tensor._version() < 0",
        "recompute/test_recomputed_outputs.py::test_an_output_that_is_written_to_before_it_is_saved",
    ),
    Fault(
        "an-output-takes-a-whole-row-to-be-made",
        RECOMPUTATION,
        "source && source->of_recomputed_",
        "source && source == nullptr",
        "recompute/test_recomputed_rows.py::test_every_third_is_kept_and_each_other_is_made_once",
    ),
    Fault(
        "a-residual-is-kept-in-the-place-of-an-output",
        RECOMPUTATION,
        "residual.storage().use_count() <= 1",
        "residual.storage().use_count() < 1",
        "recompute/test_recomputed_rows.py::test_an_output_goes_where_its_residual_stays",
    ),
    Fault(
        "a-source-may-be-written-to",
        RECOMPUTATION,
        "version == version_",
        "version >= version_",
        "recompute/test_recomputed_outputs.py::test_a_source_that_is_written_to_afterwards_is_torchs_error",
    ),
    Fault(
        "what-was-made-again-stays",
        RECOMPUTATION,
        "of_->made_.reset()",
        "void()",
        "recompute/test_recomputed_lifetimes.py::test_what_was_made_goes_when_its_last_user_has_asked",
    ),
    Fault(
        "recompute-inside-hooks-of-others",
        RECOMPUTATION,
        "pack != nullptr && pack == innermost()",
        "pack != nullptr",
        "recompute/test_recompute_and_hooks.py::test_checkpoints",
    ),
    Fault(
        "vectors-of-an-output-are-the-callers",
        "csrc/tensor/autograd.cpp",
        "copy_of(w)",
        "w",
        "recompute/test_recomputed_outputs.py::test_parameters_may_be_changed_before_the_gradient_of_a_user",
    ),
    # Padding and parts of a batch.
    Fault(
        "padding-counts-in-backward",
        "csrc/cpu/batch_norm.cpp",
        "divides ? count_of(problem) : problem.count()",
        "problem.count()",
        "ops/test_padding.py::test_padding_is_as_if_it_were_not_there",
    ),
    Fault(
        "parts-share-their-statistics",
        "csrc/cpu/parts.cpp",
        "2 * index * whole.C",
        "index * whole.C",
        "ops/test_ghost_batches.py::test_each_part_is_normalised_by_itself",
    ),
    Fault(
        "parts-count-as-one-batch",
        "csrc/cpu/batch_norm.cpp",
        "count_batches(args.running, parts)",
        "count_batches(args.running, 1)",
        "ops/test_ghost_batches.py::test_running_statistics_are_those_of_a_loop",
    ),
    Fault(
        "tangents-see-padding",
        "csrc/tensor/derivatives.cpp",
        "!t.defined() || !valid.defined()",
        "!t.defined() || valid.defined() || !valid.defined()",
        "ops/test_padding.py::test_derivatives_do_not_see_what_padding_holds",
    ),
    Fault(
        "a-batch-counts-again-in-backward",
        FORWARD,
        "!update_in_backward && runs_in_backward()",
        "update_in_backward && runs_in_backward()",
        "modules/test_policies.py::test_a_checkpointed_batch_counts_once",
    ),
    Fault(
        "a-sum-at-padding-is-fused",
        "bnext/fusion/rewrite.py",
        'norm.options.get("valid") is None',
        "norm is not None",
        "fusion/test_fused_padding.py::test_a_sum_behind_padding_is_not_fused",
    ),
    # The Python layers.
    Fault(
        "eval-updates-the-statistics",
        "bnext/functional.py",
        f"if training:\n        return {PLAIN_TRAINING}\n",
        f"if training is not None:\n        return {PLAIN_TRAINING}\n",
        "ops/test_forward.py::test_one_value_a_channel",
    ),
    Fault(
        "activation-adds-a-key-to-the-state_dict",
        "bnext/modules.py",
        "self.act = act\n\n    def extra_repr",
        'self.act = act\n        self.register_buffer("slope", torch.zeros(()))\n\n    def extra_repr',
        "modules/test_modules.py::test_state_dict_loads_both_ways",
    ),
    Fault(
        "convert-loses-hooks",
        "bnext/convert.py",
        "        if type(m) is torch.nn.SyncBatchNorm:\n",
        "        m._forward_hooks = type(m._forward_hooks)()\n        if type(m) is torch.nn.SyncBatchNorm:\n",
        "convert/test_convert.py::test_parameters_buffers_hooks_and_flags_are_kept",
    ),
    Fault(
        "convert-loses-the-training-flag",
        "bnext/convert.py",
        "        if type(m) is torch.nn.SyncBatchNorm:\n",
        "        m.train()\n        if type(m) is torch.nn.SyncBatchNorm:\n",
        "convert/test_convert.py::test_parameters_buffers_hooks_and_flags_are_kept",
    ),
    Fault(
        "fusing-ignores-the-residuals-shape",
        "bnext/fusion/patterns.py",
        'require(same(residual, normalized), "the residual has another shape, dtype or device")',
        "require(residual is not None, '')",
        "fusion/test_networks.py::test_a_residual_that_is_broadcast_is_added_as_before",
    ),
    Fault(
        "fake-save_stats-are-float32",
        "bnext/ops/fake.py",
        "save_stats = input.new_empty((*parts, 2, input.shape[1]), dtype=torch.float64)",
        "save_stats = input.new_empty((*parts, 2, input.shape[1]), dtype=torch.float32)",
        "ops/test_schema.py::test_fake_kernels_predict_shape_dtype_and_strides",
    ),
    Fault(
        "revert-thaws",
        "bnext/attached.py",
        "if not (isinstance(a, Method) and a.lasting)]",
        "]",
        "modules/test_freezing.py::test_copies_are_frozen_by_themselves",
    ),
    Fault(
        "unfreezing-forgets-what-was-asked-for",
        "bnext/freezing.py",
        "self.attach(layer, layer.training)\n        return",
        "self.attach(layer, self.training)\n        return",
        "modules/test_freezing.py::test_unfreezing_gives_back_modes_and_gradients",
    ),
    Fault(
        "batches-of-any-size-weigh-alike",
        "bnext/population.py",
        "share = b[-1] / total.clamp(min=1)",
        "share = 0.5 * (total > 0)",
        "modules/test_population.py::test_statistics_of_all_values_of_all_calls",
    ),
)
