// Autograd and autocast of the ops. A plain autograd node rather than torch::autograd::Function: less host time per
// call, and functorch's transforms (grad, vmap) take it.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <type_traits>

#include "ops/attention.h"
#include "ops/inputs.h"

namespace sdpa {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Newer torch counts a node's references in the node, older ones (2.11, say) in a shared_ptr.
template <class N>
constexpr bool kCountsItself = std::is_base_of_v<c10::intrusive_ptr_target, N>;

template <class N>
auto make_node() {
  if constexpr (kCountsItself<N>) {
    return c10::make_intrusive<N>();
  } else {
    return std::shared_ptr<N>(new N(), [](N* node) { deleteNode(node); });
  }
}

template <class N>
auto pointer_to(N* node) {
  if constexpr (kCountsItself<N>) {
    return c10::intrusive_ptr<N>::reclaim_copy(node);
  } else {
    return node->shared_from_this();
  }
}

struct AttentionBackward final : torch::autograd::Node {
  SavedVariable query, key, value, attn_mask, output, logsumexp, logsumexp_rest, seed;
  double dropout_p = 0;
  bool is_causal = false;
  std::optional<double> scale;
  bool enable_gqa = false;
  int64_t backends = 0;

  std::string name() const override { return "SdpaAttentionBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&query, &key, &value, &attn_mask, &output, &logsumexp, &logsumexp_rest, &seed})
      saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(4);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    std::array<bool, 4> wanted{};
    for (size_t i = 0; i < 4; ++i) wanted[i] = task_should_compute_output(i);
    const Tensor mask = attn_mask.unpack();
    const auto all = call_attention_backward(
        grad, query.unpack(), key.unpack(), value.unpack(), mask.defined() ? MaybeTensor(mask) : std::nullopt,
        output.unpack(pointer_to(this)), logsumexp.unpack(), logsumexp_rest.unpack(), seed.unpack(), dropout_p,
        is_causal, scale, enable_gqa, backends, wanted);
    if (wanted[0]) result[0] = std::get<0>(all);
    if (wanted[1]) result[1] = std::get<1>(all);
    if (wanted[2]) result[2] = std::get<2>(all);
    if (wanted[3]) result[3] = std::get<3>(all);
    return result;
  }
};

template <class... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

void need_math(int64_t backends, const char* what) {
  TORCH_CHECK(enabled(backends, Backend::kMath), "scaled_dot_product_attention: ", what,
              " goes through the math backend, which is disabled. Enable it: sdpa.sdpa_kernel(sdpa.SDPBackend.MATH)");
}

Forward forward_autograd(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                         double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                         int64_t backends, bool grad_wanted, bool mask_grad_wanted) {
  const Tensor mask = attn_mask.value_or(Tensor());
  if (has_tangent(query, key, value, mask)) {
    need_math(backends, "forward-mode AD");
    check({query, key, value, mask, dropout_p, is_causal, scale, enable_gqa});
    const auto [output, lse, seed] =
        differentiable_forward(query, key, value, mask, dropout_p, is_causal, scale_of(query, scale));
    return {in_layout_of(query, output), lse, at::zeros_like(lse), seed};
  }
  if (!torch::autograd::compute_requires_grad(query, key, value, mask)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_attention_forward(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backends,
                                  grad_wanted, mask_grad_wanted);
  }
  const auto node = make_node<AttentionBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(query, key, value, mask));
  node->query = SavedVariable(query, false);
  node->key = SavedVariable(key, false);
  node->value = SavedVariable(value, false);
  node->attn_mask = SavedVariable(mask, false);
  node->dropout_p = dropout_p;
  node->is_causal = is_causal;
  node->scale = scale;
  node->enable_gqa = enable_gqa;
  node->backends = backends;
  Forward result;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    result = call_attention_forward(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backends,
                                    true, mask.defined() && mask.requires_grad());
  }
  auto& [output, lse, lse_rest, seed] = result;
  torch::autograd::set_history(output, node);
  node->output = SavedVariable(output, true);
  node->logsumexp = SavedVariable(lse, false);
  node->logsumexp_rest = SavedVariable(lse_rest, false);
  node->seed = SavedVariable(seed, false);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_autograd(const Tensor& grad_output, const Tensor& query,
                                                             const Tensor& key, const Tensor& value,
                                                             const MaybeTensor& attn_mask, const Tensor& output,
                                                             const Tensor& logsumexp, const Tensor& logsumexp_rest,
                                                             const Tensor& seed, double dropout_p, bool is_causal,
                                                             std::optional<double> scale, bool enable_gqa,
                                                             int64_t backends, std::array<bool, 4> wanted) {
  const Tensor mask = attn_mask.value_or(Tensor());
  if (torch::autograd::compute_requires_grad(grad_output, query, key, value, mask) ||
      has_tangent(grad_output, query, key, value, mask)) {
    need_math(backends, "a derivative of the backward");
    auto grads = differentiable_backward(grad_output, query, key, value, mask, logsumexp, seed, dropout_p, is_causal,
                                         scale_of(query, scale));
    const Tensor none = at::empty({0}, query.options());
    if (!wanted[0]) std::get<0>(grads) = none;
    if (!wanted[1]) std::get<1>(grads) = none;
    if (!wanted[2]) std::get<2>(grads) = none;
    if (!wanted[3]) std::get<3>(grads) = none;
    return grads;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_attention_backward(grad_output, query, key, value, attn_mask, output, logsumexp, logsumexp_rest, seed,
                                 dropout_p, is_causal, scale, enable_gqa, backends, wanted);
}

// As torch's own: query, key and value in autocast's dtype. A float mask may have any dtype and stays what it is.
Forward forward_autocast(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                         double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                         int64_t backends, bool grad_wanted, bool mask_grad_wanted) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto device = query.device().type();
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(type, t, device); };
  return call_attention_forward(cast(query), cast(key), cast(value), attn_mask, dropout_p, is_causal, scale, enable_gqa,
                                backends, grad_wanted, mask_grad_wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(sdpa, Autograd, m) {
  m.impl("attention_forward", forward_autograd);
  m.impl("attention_backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(sdpa, AutocastCPU, m) {
  m.impl("attention_forward", forward_autocast);
}
TORCH_LIBRARY_IMPL(sdpa, AutocastCUDA, m) {
  m.impl("attention_forward", forward_autocast);
}

}  // namespace sdpa
