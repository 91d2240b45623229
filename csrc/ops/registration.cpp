// Schemas, and what runs where. Batching rules, and attention's fake kernels, are in sdpa/_registrations.py.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "math/math.h"
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

namespace {

Tensor fake_dropout_seed(const Tensor& rows) {
  return at::empty({1}, rows.options().dtype(at::kLong));
}

Tensor fake_dropout_keep(const Tensor& seed, const Tensor& rows, c10::SymInt S, double) {
  auto sizes = rows.sym_sizes().vec();
  sizes.push_back(std::move(S));
  return at::empty_symint(sizes, seed.options().dtype(at::kByte));
}

}  // namespace

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
  // What the differentiable form of attention draws (math.h).
  m.def("_dropout_seed(Tensor rows) -> Tensor", {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def("_dropout_keep(Tensor seed, Tensor rows, SymInt S, float dropout_p) -> Tensor", {at::Tag::pt2_compliant_tag});
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
  m.impl("_dropout_seed", dropout_seed);
  m.impl("_dropout_keep", dropout_keep_rows);
}
TORCH_LIBRARY_IMPL(sdpa, CUDA, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
  m.impl("_dropout_seed", dropout_seed);
  m.impl("_dropout_keep", dropout_keep_rows);
}
TORCH_LIBRARY_IMPL(sdpa, Meta, m) {
  m.impl("_dropout_seed", fake_dropout_seed);
  m.impl("_dropout_keep", fake_dropout_keep);
}
TORCH_LIBRARY_IMPL(sdpa, Autograd, m) {
  m.impl("_dropout_seed", torch::CppFunction::makeFallthrough());
  m.impl("_dropout_keep", torch::CppFunction::makeFallthrough());
}

}  // namespace sdpa
