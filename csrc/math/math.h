// The math backend: attention on ATen, for every device and floating dtype, with bounded scratch memory. On a GPU the
// softmax and, in float32, the products are kernels of our own (kernels/attn/softmax_rows.h, float32_product.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "math/call.h"
#include "select/problem.h"

namespace sdpa {

struct Gradients {  // undefined: not wanted; mask is in the accumulation dtype, expanded like attn_mask, and added to
  at::Tensor query, key, value, mask;
};

// Writes output (B, H, L, Ev) and, if defined, logsumexp (B, H, L).
void math_forward(const Call& call, at::Tensor output, at::Tensor logsumexp);
void math_backward(const Call& call, const at::Tensor& grad_output, const at::Tensor& output,
                   const at::Tensor& logsumexp, const Gradients& gradients);

// The bytes of scratch that math_forward allows itself; settable.
int64_t math_scratch_limit();
void set_math_scratch_limit(int64_t bytes);
// What it will take for a problem, and what one score matrix for all heads would.
int64_t math_scratch_bytes(const Problem& problem);

// Attention in differentiable ATen operations on tensors of any rank: what double backward, forward-mode AD and
// torch.func.grad go through. Memory is not bounded: a few float32 tensors of the whole (N..., L, S), some of which a
// further derivative keeps. Returns the output, the LSE and the dropout's seed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable_forward(const at::Tensor& query, const at::Tensor& key,
                                                                      const at::Tensor& value,
                                                                      const at::Tensor& attn_mask, double dropout_p,
                                                                      bool is_causal, double scale);
// The gradients of query, key, value and mask, in the inputs' dtypes and shapes; seed and LSE are the forward's.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> differentiable_backward(
    const at::Tensor& grad_output, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& attn_mask, const at::Tensor& logsumexp, const at::Tensor& seed, double dropout_p, bool is_causal,
    double scale);

// Which scores dropout keeps: uint8 (batch_heads, rows, S), by the definition in kernels/attn/dropout.h.
at::Tensor dropout_keep(const at::Tensor& seed, double dropout_p, int64_t first_batch_head, int64_t batch_heads,
                        int64_t first_row, int64_t rows, int64_t S);
double dropout_rescale(double dropout_p);

// A draw from torch's generator, on the tensor's device.
at::Tensor dropout_seed(const at::Tensor& like);
// dropout_keep of all rows (N..., L): uint8 (N..., L, S).
at::Tensor dropout_keep_rows(const at::Tensor& seed, const at::Tensor& rows, int64_t S, double dropout_p);
// Both through the dispatcher: functorch and the compiler see an op. Of `rows` these need the shape, and whether vmap
// has them differ: then each has numbers of its own, as where the forward folds the vmapped dim into the batch.
at::Tensor call_dropout_seed(const at::Tensor& rows);
at::Tensor call_dropout_keep(const at::Tensor& seed, const at::Tensor& rows, const c10::SymInt& S, double dropout_p);

}  // namespace sdpa
