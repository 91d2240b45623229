// What a call was given, checked, and its tensors seen as (batch, heads, rows, columns).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "math/math.h"
#include "select/select.h"

namespace sdpa {

struct Arguments {
  at::Tensor query, key, value, attn_mask;  // attn_mask may be undefined
  double dropout_p = 0;
  bool is_causal = false;
  std::optional<double> scale;
  bool enable_gqa = false;
};

struct Inputs {
  std::vector<int64_t> lead;  // the leading dims of the output, (N, ..., H)
  int64_t L = 0, S = 0, E = 0, Ev = 0;
  double scale = 1;
  // Expanded over the leading dims (key and value keep their own number of heads).
  at::Tensor query, key, value, attn_mask;
  bool mask_broadcasts = false;

  std::vector<int64_t> shape(std::initializer_list<int64_t> tail) const;
  bool empty() const;  // no output element
};

// The scale of a call: 1 / sqrt(E) unless given. E = 0: any, since every score is 0.
double scale_of(const at::Tensor& query, std::optional<double> scale);

// Throws what is wrong, with the offending values.
Inputs check(const Arguments& arguments);

// Leading dims beyond (batch, heads) are folded into batch where every tensor's strides allow, and walked over where
// not, so that nothing is copied. Tensors have the same rank; undefined ones stay so. `body` is given them with 4 dims,
// and the number of batch x heads pairs that came before.
using FourDims = std::vector<at::Tensor>;
void for_each_4d(const FourDims& tensors, int64_t first_batch_head,
                 const std::function<void(const FourDims&, int64_t)>& body);

// An empty (lead..., L, columns) tensor in the memory layout of `query`, dense.
at::Tensor empty_in_layout_of(const at::Tensor& query, const std::vector<int64_t>& sizes);

// `t`, which has the output's shape, in that layout.
at::Tensor in_layout_of(const at::Tensor& query, const at::Tensor& t);

// The selector's view of 4-dim tensors.
struct Wants {
  bool any_grad = false, mask_grad = false, mask_broadcasts = false;
};
Problem describe(const Call& call, Wants wants);
// Whether a tensor map can describe it: rows of whole 16-byte chunks, aligned, and no stride of 0.
bool is_in_boxes(const at::Tensor& t);

// SDPA_FORCE_ARCH=70|75|80|86|90|100, or 0.
int forced_capability();

}  // namespace sdpa
