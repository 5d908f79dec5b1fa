#include "derivatives.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "dispatcher.h"

namespace bnext {
namespace {

using at::Tensor;

at::ScalarType compute_type(const Tensor& data) { return data.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// All dimensions but the channels'.
std::vector<std::int64_t> reduced_dims(const Tensor& data) {
  std::vector<std::int64_t> dims{0};
  for (std::int64_t d = 2; d < data.dim(); ++d) dims.push_back(d);
  return dims;
}

// A length-C vector in the shape that broadcasts against `data`, in the compute type.
Tensor per_channel(Tensor vector, const Tensor& data) {
  vector = vector.to(compute_type(data)).unsqueeze(0);
  for (std::int64_t d = 2; d < data.dim(); ++d) vector = vector.unsqueeze(-1);
  return vector;
}

// The mean over the whole channel: over all processes that share the batch.
Tensor channel_mean(const Point& at, const Tensor& given) {
  const auto dims = reduced_dims(given);
  const Tensor t = at.without_padding(given);
  if (at.batch) {
    return all_reduce_sum_op().call(t.sum(dims, /*keepdim=*/true), at.batch->group_name).div(at.batch->count);
  }
  if (!at.valid.defined()) return t.mean(dims, /*keepdim=*/true);
  return t.sum(dims, /*keepdim=*/true).div(at.valid.sum().clamp_min(1));
}

// The sum over this process's part of the channel.
Tensor channel_sum(const Point& at, const Tensor& t) {
  return at.without_padding(t).sum(reduced_dims(t), /*keepdim=*/false);
}

// The images that are normalised together.
struct Part {
  Point at;
  std::int64_t first;
  std::int64_t images;

  Tensor operator()(const Tensor& t) const { return t.defined() ? t.narrow(0, first, images) : t; }
};

std::vector<Part> parts_of(const Point& whole) {
  std::vector<Part> parts;
  const std::int64_t N = whole.like.size(0);
  for (std::int64_t p = 0; p < whole.save_stats.size(0); ++p) {
    const std::int64_t first = p * whole.virtual_batch_size;
    Part part{whole, first, std::min(whole.virtual_batch_size, N - first)};
    part.at.like = part(whole.like);
    part.at.input = part(whole.input);
    part.at.valid = part(whole.valid);
    part.at.save_stats = whole.save_stats.select(0, p);
    part.at.virtual_batch_size = 0;
    parts.push_back(std::move(part));
  }
  return parts;
}

// The parts' results as one tensor; undefined if they are.
Tensor joined(const std::vector<Tensor>& of_parts) { return of_parts[0].defined() ? at::cat(of_parts) : Tensor(); }

struct Standardized {
  Tensor xhat;
  Tensor invstd;  // broadcasts
  Tensor scale;   // weight*invstd, likewise
  const Point& at;

  explicit Standardized(const Point& point) : at(point) {
    const auto type = compute_type(at.like);
    const Tensor mean = at.save_stats.select(0, 0);
    const Tensor high = mean.to(type);
    if (at.training) {
      // The statistics are recomputed from the input, not read from save_stats, so that they are differentiated, too.
      const Tensor shifted = at.without_padding(at.input).to(type) - per_channel(high, at.like);
      const Tensor centred = shifted - channel_mean(at, shifted);
      invstd = (channel_mean(at, centred * centred) + at.eps).rsqrt();
      xhat = centred * invstd;
    } else {
      invstd = per_channel(at.save_stats.select(0, 1), at.like);
      if (at.input.defined()) {
        const Tensor shifted = at.without_padding(at.input).to(type) - per_channel(high, at.like);
        xhat = (shifted - per_channel(mean - high, at.like)) * invstd;
      }
    }
    scale = at.weight.defined() ? per_channel(at.weight, at.like) * invstd : invstd;
  }

  Tensor project(const Tensor& t) const {
    if (!at.training) return t;
    // One after the other: the means may be collectives, and C++ leaves the order of operands to the compiler.
    const Tensor mean = channel_mean(at, t);
    const Tensor along = channel_mean(at, t * xhat);
    return t - mean - xhat * along;
  }
};

// The changes of input and weight, each possibly undefined.
struct Changes {
  Tensor u;
  Tensor v;

  // Processes that share a batch must take part in the same collectives, whichever changes each of them has defined: so
  // there an undefined change becomes a tensor of zeros.
  Changes(const Point& at, const Tensor& of_input, const Tensor& of_weight)
      : u(at.without_padding(of_input)), v(of_weight) {
    if (!at.batch || !at.input.defined()) return;
    if (!u.defined()) u = at::zeros_like(at.like);
    if (!v.defined()) v = at::zeros_like(at.save_stats.select(0, 0));
  }
};

Tensor preactivation(const Point& at, const Tensor& bias, const Tensor& residual) {
  Tensor z = Standardized(at).xhat;
  if (at.weight.defined()) z = z * per_channel(at.weight, at.like);
  if (bias.defined()) z = z + per_channel(bias, at.like);
  if (residual.defined()) z = z + at.without_padding(residual).to(compute_type(at.like));
  return z;
}

}  // namespace

Tensor Point::without_padding(const Tensor& t) const {
  if (!t.defined() || !valid.defined()) return t;
  return at::where(valid.unsqueeze(1), t, at::zeros({}, t.options()));
}

Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

Tensor scaled(const Tensor& t, const Tensor& factor) { return t.defined() && factor.defined() ? t * factor : t; }

Tensor output_tangent(const Point& at, const Tensor& of_input, const Tensor& of_weight, const Tensor& z) {
  if (at.virtual_batch_size != 0) {
    std::vector<Tensor> tangents;
    for (const Part& part : parts_of(at)) tangents.push_back(output_tangent(part.at, part(of_input), of_weight, z));
    return joined(tangents);
  }
  const auto [u, v] = Changes(at, of_input, of_weight);
  Tensor result;
  if (u.defined() || v.defined()) {
    const Standardized s(at);
    if (u.defined()) result = s.scale * s.project(u.to(compute_type(at.like)));
    if (v.defined()) result = plus(result, per_channel(v, at.like) * s.xhat);
  }
  if (z.defined()) result = plus(result, per_channel(z, at.like).expand_as(at.like));
  return result.defined() ? at.without_padding(result).to(at.like.scalar_type()) : result;
}

SecondOrder second_order(const Point& at, const Tensor& grad_output, const Tensor& of_input, const Tensor& of_weight) {
  if (at.virtual_batch_size != 0) {
    SecondOrder result;
    std::vector<Tensor> inputs;
    for (const Part& part : parts_of(at)) {
      const SecondOrder of_part = second_order(part.at, part(grad_output), part(of_input), of_weight);
      inputs.push_back(of_part.input);
      result.weight = plus(result.weight, of_part.weight);
    }
    result.input = joined(inputs);
    return result;
  }
  const auto [u, v] = Changes(at, of_input, of_weight);
  if (!u.defined() && !v.defined()) return {};
  const Standardized s(at);
  const auto type = compute_type(at.like);
  const Tensor dy = at.without_padding(grad_output).to(type);
  SecondOrder result;
  // What P is applied to. v and the weight stand inside P, because each process has its own.
  Tensor projected;
  if (v.defined()) projected = per_channel(v, at.like) * dy;
  Tensor rest;
  if (u.defined()) {
    const Tensor projected_u = s.project(u.to(type));
    result.weight = channel_sum(at, s.invstd * dy * projected_u);
    if (at.training) {
      const Tensor scaled_dy = s.scale * dy;
      const Tensor u_xhat = channel_mean(at, u.to(type) * s.xhat);
      const Tensor dy_xhat = channel_mean(at, scaled_dy * s.xhat);
      const Tensor dy_u = channel_mean(at, scaled_dy * projected_u);
      projected = plus(projected, -u_xhat * scaled_dy);
      rest = dy_xhat * projected_u + dy_u * s.xhat;
    }
  }
  if (projected.defined()) {
    result.input = s.project(projected);
    if (rest.defined()) result.input = result.input - rest;
    result.input = at.without_padding(s.invstd * result.input).to(at.like.scalar_type());
  }
  return result;
}

ActivationDerivatives activation_derivatives(const Activation& activation, const Point& at, const Tensor& bias,
                                             const Tensor& residual) {
  if (activation.act == Act::kIdentity) return {};
  if (at.virtual_batch_size != 0) {
    std::vector<Tensor> first, second;
    for (const Part& part : parts_of(at)) {
      const auto of_part = activation_derivatives(activation, part.at, bias, part(residual));
      first.push_back(of_part.first);
      second.push_back(of_part.second);
    }
    return {joined(first), joined(second)};
  }
  const Tensor z = preactivation(at, bias, residual);
  const auto where = [&](const Tensor& condition, double inside, double outside) {
    return at::where(condition, at::full_like(z, inside), at::full_like(z, outside));
  };
  switch (activation.act) {
    case Act::kIdentity: break;
    case Act::kRelu: return {where(z <= 0, 0.0, 1.0), {}};
    case Act::kRelu6: return {where((z <= 0).logical_or(z >= 6), 0.0, 1.0), {}};
    case Act::kLeakyRelu: return {where(z <= 0, activation.slope, 1.0), {}};
    case Act::kSilu: {
      const Tensor s = at::sigmoid(z);
      const Tensor opposite = at::sigmoid(-z);
      return {s * (1 + z * opposite), s * opposite * (2 + z * (opposite - s))};
    }
    case Act::kGelu: {
      const Tensor density = at::exp(z * z * -0.5) * 0.39894228040143268;
      return {at::erfc(z * -0.70710678118654752) * 0.5 + z * density, density * (2 - z * z)};
    }
    case Act::kHardswish: {
      const Tensor inside = (z > -3).logical_and(z < 3);
      const Tensor beyond = where(z >= 3, 1.0, 0.0);
      return {at::where(inside, z * (1.0 / 3.0) + 0.5, beyond), where(inside, 1.0 / 3.0, 0.0)};
    }
    case Act::kMish: {
      const Tensor s = at::sigmoid(z);
      const Tensor t = at::tanh(at::softplus(z));
      const Tensor bend = s * (1 - t * t);  // dt/dz
      return {t + z * bend, bend * (2 + z * (at::sigmoid(-z) - 2 * t * s))};
    }
    case Act::kElu: {
      // Clamped, so that the branch not taken holds no infinity, whose derivatives would be NaN.
      const Tensor below = at::exp(z.clamp_max(0)) * activation.slope;
      return {at::where(z <= 0, below, at::ones_like(z)), at::where(z <= 0, below, at::zeros_like(z))};
    }
  }
  return {};
}

}  // namespace bnext
