// Attention in differentiable ATen operations: for double backward, forward-mode AD and torch.func.grad.
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

// (..., H, L, D) as (..., heads, H / heads * L, D), by the heads of key or value: a product with these copies none.
Tensor by_heads_of(const Tensor& key, const Tensor& t) {
  if (key.dim() < 3 || t.size(-3) == key.size(-3)) return t;
  auto sizes = t.sizes().vec();
  const auto heads = sizes.end() - 3, rows = sizes.end() - 2;
  *rows *= *heads / key.size(-3);
  *heads = key.size(-3);
  return t.reshape(sizes);
}

// t @ key, where each head of key is for as many of t.
Tensor product(const Tensor& t, const Tensor& key) {
  auto sizes = t.sizes().vec();
  sizes.back() = key.size(-1);
  return at::matmul(by_heads_of(key, t), key).reshape(sizes);
}

// The query over all leading dims of the output: the dropout's numbers are counted along them.
Tensor over_all(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto lead = [&](const Tensor& t) {
    auto sizes = t.sizes().slice(0, t.dim() - 2).vec();
    // Heads of a key are for as many of the query.
    if (!sizes.empty() && query.dim() > 2 && sizes.back() != 0 && query.size(-3) % sizes.back() == 0) sizes.back() = 1;
    return sizes;
  };
  auto sizes = at::infer_size(at::infer_size(query.sizes().slice(0, query.dim() - 2), lead(key)), lead(value));
  sizes.insert(sizes.end(), {query.size(-2), query.size(-1)});
  return query.expand(sizes);
}

Weights weights_of(const Tensor& query, const Tensor& key, const Tensor& attn_mask, bool is_causal, double scale) {
  constexpr double kNegInf = -std::numeric_limits<double>::infinity();
  Tensor scores = product(query, key.transpose(-2, -1)) * scale;
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
  return w;
}

void drop(Weights& w, const Tensor& seed, const Tensor& rows, double dropout_p) {
  const Tensor keep = call_dropout_keep(seed, rows, w.probs.size(-1), dropout_p);
  w.keep = keep.to(w.probs.scalar_type()) * dropout_rescale(dropout_p);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> differentiable_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                          const Tensor& attn_mask, double dropout_p, bool is_causal,
                                                          double scale) {
  const auto type = at::toOpMathType(query.scalar_type());
  const Tensor k = key.to(type), v = value.to(type);
  Weights w = weights_of(over_all(query.to(type), k, v), k, attn_mask, is_causal, scale);
  Tensor seed = at::empty({0}, query.options().dtype(at::kLong));
  if (dropout_p > 0) {
    const Tensor rows = w.lse + v.new_zeros({});  // vmapped if values alone are
    seed = call_dropout_seed(rows);
    drop(w, seed, rows, dropout_p);
  }
  return {product(w.dropped(), v).to(query.scalar_type()), w.lse, seed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> differentiable_backward(const Tensor& grad_output, const Tensor& query,
                                                                   const Tensor& key, const Tensor& value,
                                                                   const Tensor& attn_mask, const Tensor& logsumexp,
                                                                   const Tensor& seed, double dropout_p, bool is_causal,
                                                                   double scale) {
  const auto type = at::toOpMathType(query.scalar_type());
  const Tensor grad = grad_output.to(type), k = key.to(type), v = value.to(type);
  const Tensor q = over_all(query.to(type), k, v);
  Weights w = weights_of(q, k, attn_mask, is_causal, scale);
  Tensor grad_probs = product(grad, v.transpose(-2, -1));
  if (dropout_p > 0) {
    drop(w, seed, logsumexp, dropout_p);
    grad_probs = grad_probs * w.keep;
  }
  const Tensor grad_scores = w.probs * (grad_probs - (w.probs * grad_probs).sum(-1, true));
  // Broadcast dims are summed; heads that share a key head are by the product.
  const auto fold = [](const Tensor& t, const Tensor& like) {
    return t.sum_to_size(like.sizes()).to(like.scalar_type());
  };
  const auto sum_over_rows = [&](const Tensor& a, const Tensor& b, const Tensor& like) {
    return at::matmul(by_heads_of(like, a).transpose(-2, -1), by_heads_of(like, b));
  };
  const Tensor grad_query = fold(product(grad_scores, k) * scale, query);
  const Tensor grad_key = fold(sum_over_rows(grad_scores, q, k) * scale, key);
  const Tensor grad_value = fold(sum_over_rows(w.dropped(), grad, v), value);
  const Tensor grad_mask = attn_mask.defined() && attn_mask.scalar_type() != at::kBool
                               ? grad_scores.sum_to_size(attn_mask.sizes()).to(attn_mask.scalar_type())
                               : at::empty({0}, query.options());
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace sdpa
