// Schemas, and what runs where. Fake kernels and batching rules are in sdpa/_registrations.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/attention.h"
#include "select/select.h"

namespace sdpa {

Forward call_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                               const MaybeTensor& attn_mask, double dropout_p, bool is_causal,
                               std::optional<double> scale, bool enable_gqa, int64_t backends, bool grad_wanted,
                               bool mask_grad_wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sdpa::attention_forward", "")
                             .typed<decltype(attention_forward)>();
  return op.call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backends, grad_wanted,
                 mask_grad_wanted);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> call_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const MaybeTensor& attn_mask, const Tensor& output, const Tensor& logsumexp, const Tensor& logsumexp_rest,
    const Tensor& seed, double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
    int64_t backends, std::array<bool, 4> wanted) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sdpa::attention_backward", "")
                             .typed<decltype(attention_backward)>();
  return op.call(grad_output, query, key, value, attn_mask, output, logsumexp, logsumexp_rest, seed, dropout_p,
                 is_causal, scale, enable_gqa, backends, wanted);
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                 double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa, int64_t backends) {
  forget_traced_switches();  // called from no graph
  return std::get<0>(call_attention_forward(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                                            backends, false, false));
}

static Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                           double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  return std::get<0>(call_attention_forward(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                                            current_switches(), false, false));
}

TORCH_LIBRARY(sdpa, m) {
  const std::vector<at::Tag> compiled = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded,
                                         at::Tag::needs_exact_strides};
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
      "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
      compiled);
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
      "float? scale, bool enable_gqa, int backends, bool grad_wanted=False, bool mask_grad_wanted=False) -> "
      "(Tensor output, Tensor logsumexp, Tensor logsumexp_rest, Tensor seed)",
      compiled);
  m.def(
      "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor "
      "output, "
      "Tensor logsumexp, Tensor logsumexp_rest, Tensor seed, float dropout_p, bool is_causal, float? scale, bool "
      "enable_gqa, int backends, "
      "bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
  // A call that the compiler sees at trace time, so that torch.ops.sdpa.attention under a context manager inside a
  // compiled function takes that manager's switches.
  m.def("_set_switches(int backends) -> ()", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sdpa, CompositeImplicitAutograd, m) {
  m.impl("attention", attention_op);
  m.impl("_set_switches", set_traced_switches);
}

TORCH_LIBRARY_IMPL(sdpa, CPU, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}
TORCH_LIBRARY_IMPL(sdpa, CUDA, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}

}  // namespace sdpa
