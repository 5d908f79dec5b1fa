// Derivatives of batch norm beyond the first backward pass, composed of torch operators: rarely needed, so written
// for brevity, and themselves differentiable to any order and in either mode.
//
// With E the mean over a channel, r = 1/sqrt(var + eps), xhat = (x - mean)*r, a = weight*r, and
// P(t) = t - E[t] - xhat*E[t*xhat] in training, P(t) = t in evaluation, batch norm's backward is
//   dx = a*P(dy),  dweight = sum(dy*xhat),  dbias = sum(dy).
// docs/numerics.md derives the rest from it. Where several processes share the batch, E is over the values of all
// processes, sum over this process's, and each process has a weight and a bias of its own, of equal values. With
// padding, E and sum are over the values that are not padding, and results are 0 at padding. The parts of a batch
// (virtual_batch_size) are differentiated one after another, each by itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/activation.h"
#include "collectives.h"

namespace bnext {

// a + b, where an undefined tensor stands for zero.
at::Tensor plus(const at::Tensor& a, const at::Tensor& b);

// t*factor, where an undefined t stands for zero and an undefined factor for one.
at::Tensor scaled(const at::Tensor& t, const at::Tensor& factor);

// What the derivatives are taken at. An undefined weight means 1.
struct Point {
  at::Tensor like;   // any tensor with the input's shape and dtype
  at::Tensor input;  // undefined in evaluation, if neither grad_weight nor a change of the weight is involved
  at::Tensor weight;
  at::Tensor save_stats;
  bool training;
  double eps;
  // Set where several processes share the batch. All of them must then call the functions below in the same order. The
  // collectives of a call do not depend on which changes are defined, if the input is defined on all or on none.
  std::optional<SharedBatch> batch;
  at::Tensor valid;                     // undefined where there is no padding
  std::int64_t virtual_batch_size = 0;  // 0: the batch is normalised as a whole

  // t with zeros in the place of padding; undefined if t is.
  at::Tensor without_padding(const at::Tensor& t) const;
};

// The change of y = weight*xhat + bias along (u, v, z) = changes of (input, weight, bias), each possibly undefined:
//   a*P(u) + v*xhat + z.
// It is also the gradient with respect to dy of <u, dx> + <v, dweight> + <z, dbias>, the backward's adjoint.
// Undefined if all three are.
at::Tensor output_tangent(const Point& at, const at::Tensor& u, const at::Tensor& v, const at::Tensor& z);

// The gradients of <u, dx> + <v, dweight> with respect to input and weight; by symmetry also the change of
// (dx, dweight) along (u, v) = changes of (input, weight). u and v are possibly undefined, and so are the results.
struct SecondOrder {
  at::Tensor input;
  at::Tensor weight;
};
SecondOrder second_order(const Point& at, const at::Tensor& grad_output, const at::Tensor& u, const at::Tensor& v);

// act'(z) and act''(z) at the pre-activation z = weight*xhat + bias + residual, in the compute type. A first derivative
// that is 1 everywhere, and a second that is 0, are undefined.
struct ActivationDerivatives {
  at::Tensor first;
  at::Tensor second;
};
ActivationDerivatives activation_derivatives(const Activation& activation, const Point& at, const at::Tensor& bias,
                                             const at::Tensor& residual);

}  // namespace bnext
