// One call seen as (batch, heads, rows, columns), as math takes it and as kernels do.
#pragma once

#include <ATen/core/Tensor.h>

#include "attn/params.h"

namespace sdpa {

// attn_mask is expanded to (B, H, L, S), stride 0 where it broadcasts, or undefined.
struct Call {
  at::Tensor query, key, value, attn_mask;
  double scale = 1;
  bool is_causal = false;
  double dropout_p = 0;
  at::Tensor seed;               // one int64 on the query's device, if dropout_p > 0
  int64_t first_batch_head = 0;  // added to b * H + h in the dropout counter
};

DType dtype_of(at::ScalarType type);
MaskKind mask_kind_of(const at::Tensor& mask);  // kNone if undefined

// Whether torch lets float32 products on a GPU be made of TF32.
bool tf32_is_allowed();

Operand operand(const at::Tensor& t);  // of 4 dims, or undefined
// Everything but what the call's results are written to.
void fill(ForwardParams& params, const Call& call);

}  // namespace sdpa
