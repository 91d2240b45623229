// The ops, as C++ functions. Schemas and registrations are in registration.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "select/select.h"

namespace sdpa {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// output; logsumexp (N..., H, L) float32, natural log, and logsumexp_rest, what rounding took from it (params.h), both
// empty unless grad_wanted; seed, one int64 if dropout_p > 0, else empty.
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Below autograd: checks, chooses a backend among `backends`, runs it.
Forward attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                          double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                          int64_t backends, bool grad_wanted, bool mask_grad_wanted);

// Gradients of query, key, value, attn_mask; empty where `wanted` (four bools) says no.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output, const Tensor& query,
                                                              const Tensor& key, const Tensor& value,
                                                              const MaybeTensor& attn_mask, const Tensor& output,
                                                              const Tensor& logsumexp, const Tensor& logsumexp_rest,
                                                              const Tensor& seed, double dropout_p, bool is_causal,
                                                              std::optional<double> scale, bool enable_gqa,
                                                              int64_t backends, std::array<bool, 4> wanted);

// The same through the dispatcher, autograd and all.
Forward call_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                               const MaybeTensor& attn_mask, double dropout_p, bool is_causal,
                               std::optional<double> scale, bool enable_gqa, int64_t backends, bool grad_wanted,
                               bool mask_grad_wanted);
std::tuple<Tensor, Tensor, Tensor, Tensor> call_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const MaybeTensor& attn_mask, const Tensor& output, const Tensor& logsumexp, const Tensor& logsumexp_rest,
    const Tensor& seed, double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
    int64_t backends, std::array<bool, 4> wanted);

// What users call.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                 double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa, int64_t backends);

// What torch.ops.sdpa.attention takes: the calling thread's switches, which Python keeps, or, in a graph that sets them
// (sdpa::_set_switches), what the graph set last.
Switches current_switches();
void set_traced_switches(Switches switches);
void forget_traced_switches();

}  // namespace sdpa
