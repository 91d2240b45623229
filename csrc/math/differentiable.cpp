// Attention in differentiable ATen operations: for double backward and forward-mode AD.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>

#include "math/math.h"

namespace sdpa {
namespace {

using at::Tensor;

struct Weights {
  Tensor probs, keep;  // keep: undefined without dropout; already multiplied by the rescale
  Tensor lse;
  Tensor dropped() const { return keep.defined() ? probs * keep : probs; }
};

Tensor repeat_heads(const Tensor& t, int64_t heads) {
  return t.size(-3) == heads ? t : t.repeat_interleave(heads / t.size(-3), -3);
}

// The query over all leading dims of the output: the dropout's numbers are counted along them.
Tensor over_all(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto lead = [](const Tensor& t) { return t.sizes().slice(0, t.dim() - 2); };
  auto sizes = at::infer_size(at::infer_size(lead(query), lead(key)), lead(value));
  sizes.insert(sizes.end(), {query.size(-2), query.size(-1)});
  return query.expand(sizes);
}

Weights weights_of(const Tensor& query, const Tensor& key, const Tensor& attn_mask, double dropout_p, bool is_causal,
                   double scale, const Tensor& seed) {
  constexpr double kNegInf = -std::numeric_limits<double>::infinity();
  Tensor scores = at::matmul(query, key.transpose(-2, -1)) * scale;
  const int64_t L = scores.size(-2), S = scores.size(-1);
  if (is_causal) {
    const auto options = scores.options().dtype(at::kLong);
    scores = scores.masked_fill(at::arange(S, options) > at::arange(L, options).unsqueeze(1), kNegInf);
  }
  if (attn_mask.defined()) {
    scores = attn_mask.scalar_type() == at::kBool ? scores.masked_fill(attn_mask.logical_not(), kNegInf)
                                                  : scores + attn_mask;
  }
  Weights w;
  if (S == 0) {
    w.probs = scores;
    w.lse = scores.sum(-1) + kNegInf;
  } else {
    // A row with nothing to attend to: softmax over zeros, then zero, so that no NaN enters any derivative.
    const Tensor empty = scores.detach().amax(-1, true) == kNegInf;
    const Tensor filled = scores.masked_fill(empty, 0);
    w.probs = filled.softmax(-1).masked_fill(empty, 0);
    w.lse = filled.detach().logsumexp(-1).masked_fill(empty.squeeze(-1), kNegInf);
  }
  if (dropout_p > 0) {
    const int64_t batch_heads = scores.numel() / std::max<int64_t>(L * S, 1);
    w.keep = dropout_keep(seed, dropout_p, 0, batch_heads, 0, L, S).view(scores.sizes()).to(scores.scalar_type()) *
             dropout_rescale(dropout_p);
  }
  return w;
}

}  // namespace

std::tuple<Tensor, Tensor> differentiable_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const Tensor& attn_mask, double dropout_p, bool is_causal,
                                                  double scale, bool enable_gqa, const Tensor& seed) {
  const auto type = at::toOpMathType(query.scalar_type());
  Tensor k = key.to(type), v = value.to(type);
  if (enable_gqa) {
    k = repeat_heads(k, query.size(-3));
    v = repeat_heads(v, query.size(-3));
  }
  const Weights w = weights_of(over_all(query.to(type), k, v), k, attn_mask, dropout_p, is_causal, scale, seed);
  return {at::matmul(w.dropped(), v).to(query.scalar_type()), w.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> differentiable_backward(const Tensor& grad_output, const Tensor& query,
                                                                   const Tensor& key, const Tensor& value,
                                                                   const Tensor& attn_mask, double dropout_p,
                                                                   bool is_causal, double scale, bool enable_gqa,
                                                                   const Tensor& seed) {
  const auto type = at::toOpMathType(query.scalar_type());
  const Tensor grad = grad_output.to(type);
  Tensor k = key.to(type), v = value.to(type);
  if (enable_gqa) {
    k = repeat_heads(k, query.size(-3));
    v = repeat_heads(v, query.size(-3));
  }
  const Tensor q = over_all(query.to(type), k, v);
  const Weights w = weights_of(q, k, attn_mask, dropout_p, is_causal, scale, seed);
  Tensor grad_probs = at::matmul(grad, v.transpose(-2, -1));
  if (w.keep.defined()) grad_probs = grad_probs * w.keep;
  const Tensor grad_scores = w.probs * (grad_probs - (w.probs * grad_probs).sum(-1, true));
  // Broadcast dims, and heads that share a key head, are summed.
  const auto fold = [&](Tensor t, const Tensor& like) {
    if (enable_gqa && t.size(-3) != like.size(-3)) {
      auto sizes = t.sizes().vec();
      sizes[sizes.size() - 3] = like.size(-3);
      sizes.insert(sizes.end() - 2, t.size(-3) / like.size(-3));
      t = t.reshape(sizes).sum(-3);
    }
    return t.sum_to_size(like.sizes()).to(like.scalar_type());
  };
  const Tensor grad_query = fold(at::matmul(grad_scores, k) * scale, query);
  const Tensor grad_key = fold(at::matmul(grad_scores.transpose(-2, -1), q) * scale, key);
  const Tensor grad_value = fold(at::matmul(w.dropped().transpose(-2, -1), grad), value);
  const Tensor grad_mask = attn_mask.defined() && attn_mask.scalar_type() != at::kBool
                               ? grad_scores.sum_to_size(attn_mask.sizes()).to(attn_mask.scalar_type())
                               : at::empty({0}, query.options());
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace sdpa
