#include "ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/Exceptions.h>

#include "attn/split.h"
#include "ops/inputs.h"
#include "registry.h"

#if defined(SDPA_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "attn/mask_blocks.h"
#endif

namespace sdpa {
namespace {

[[noreturn]] void no_backend(const Problem& problem, Switches switches) {
  forget_traced_switches();  // a graph that set them ends here
  {
    torch::PyWarningHandler handler;  // warnings become Python's, wherever we are called from
    try {
      for (const std::string& line : reasons(problem, switches)) TORCH_WARN(line);
    } catch (...) {
      handler.set_in_exception();
      throw;
    }
  }
  TORCH_CHECK(false, "No available kernel. Aborting execution.");
}

Backend choose(const Problem& problem, int64_t backends) {
  const Backend backend = select(problem, check_switches(backends));
  if (backend == Backend::kNone) no_backend(problem, backends);
  return backend;
}

#if defined(SDPA_WITH_CUDA)

void fill_results(ForwardParams& params, const Tensor& output, const Tensor& logsumexp, const Tensor& logsumexp_rest) {
  params.output = operand(output);
  params.logsumexp = logsumexp.defined() ? logsumexp.data_ptr<float>() : nullptr;
  params.logsumexp_rest = logsumexp_rest.defined() ? logsumexp_rest.data_ptr<float>() : nullptr;
}

// What the path's chip has: SDPA_FORCE_ARCH=86 is to run the tiles of an sm86.
int shared_bytes_of(const Problem& problem) {
  return std::min(sdpa::shared_bytes_of(problem.capability), sdpa::shared_bytes_of(problem.device_capability));
}

const Variant& variant_of(Backend backend, bool backward, const Problem& problem) {
  const Variant* variant = find_variant(backend, backward, problem);
  TORCH_INTERNAL_ASSERT(variant != nullptr, "selected ", name(backend), " without a kernel for ", to_string(problem));
  return *variant;
}

// What is returned is to live until the kernel is launched.
Tensor look_through_mask(Backend backend, ForwardParams& params, const Tensor& query) {
  const int64_t words = backend == Backend::kFlash ? mask_block_words(params) : 0;
  if (words == 0) return {};
  const Tensor blocks = at::empty({words}, query.options().dtype(at::kLong));
  auto* const data = reinterpret_cast<uint64_t*>(blocks.data_ptr<int64_t>());
  C10_CUDA_CHECK(find_mask_blocks(params, data, c10::cuda::getCurrentCUDAStream()));
  return blocks;
}

void kernel_forward(Backend backend, const Call& call, const Problem& problem, const Tensor& output,
                    const Tensor& logsumexp, const Tensor& logsumexp_rest) {
  ForwardParams params;
  fill(params, call);
  fill_results(params, output, logsumexp, logsumexp_rest);
  params.shared_bytes = shared_bytes_of(problem);
  const Variant& variant = variant_of(backend, false, problem);
  Tensor scratch;
  if (variant.direction == Direction::kDecode) {
    int sms = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, output.get_device()));
    params.split_parts = variant.backend == Backend::kFlash
                             ? KeySplit::flash_parts(params, sms)
                             : KeySplit::parts(params, efficient_decode_block(variant.path, variant.head_dim), sms);
    if (const int64_t size = KeySplit::scratch(params); size > 0) {
      scratch = at::empty({size}, output.options().dtype(at::kFloat));
      params.split_scratch = scratch.data_ptr<float>();
    }
  }
  const Tensor mask_blocks =
      variant.direction == Direction::kForward ? look_through_mask(backend, params, call.query) : Tensor();
  C10_CUDA_CHECK(variant.launch_forward(params, c10::cuda::getCurrentCUDAStream()));
}

void kernel_backward(Backend backend, const Call& call, Problem problem, const Tensor& grad_output,
                     const Tensor& output, const Tensor& logsumexp, const Tensor& logsumexp_rest,
                     const Gradients& grads) {
  for (const Tensor& t : {grad_output, grads.key, grads.value}) {
    if (t.defined() && !is_in_boxes(t)) problem.in_boxes = false;
  }
  BackwardParams params;
  fill(params, call);
  fill_results(params, output, logsumexp, logsumexp_rest);
  params.grad_output = operand(grad_output);
  params.grad_query = operand(grads.query);
  params.grad_key = operand(grads.key);
  params.grad_value = operand(grads.value);
  params.seen_keys = params.is_causal ? std::min(params.L, params.S) : params.S;
  params.deterministic = problem.deterministic;
  params.shared_bytes = shared_bytes_of(problem);
  if (grads.mask.defined()) {
    params.grad_mask = grads.mask.data_ptr<float>();
    for (int d = 0; d < 4; ++d) params.grad_mask_stride[d] = grads.mask.stride(d);
  }
  const auto options = call.query.options().dtype(at::kFloat);
  const Tensor delta = at::empty({problem.B, problem.H, problem.L}, options);
  params.delta = delta.data_ptr<float>();
  const Variant& variant = variant_of(backend, true, problem);
  Tensor accum, turns;
  // In order, flash's kernels need no sums in memory; the others take turns at them.
  const bool in_order = problem.deterministic && variant.backend == Backend::kFlash;
  if (variant.sums_grad_query && grads.query.defined() && !in_order) {
    const bool is_flash = variant.backend == Backend::kFlash;
    const auto sizes = {problem.B, problem.H, problem.L, problem.E};
    accum = is_flash ? at::empty(sizes, options) : at::zeros(sizes, options);
    params.grad_query_accum = accum.data_ptr<float>();
    if (problem.deterministic) {
      turns = at::zeros({problem.B, problem.H, (problem.L + 15) / 16, (problem.E + 31) / 32}, options.dtype(at::kInt));
      params.grad_query_turns = turns.data_ptr<int>();
    }
  }
  const Tensor mask_blocks = look_through_mask(backend, params, call.query);
  C10_CUDA_CHECK(variant.launch_backward(params, c10::cuda::getCurrentCUDAStream()));
}

#endif

Arguments arguments(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                    double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  return {query, key, value, attn_mask.value_or(Tensor()), dropout_p, is_causal, scale, enable_gqa};
}

Call call_of(const Inputs& in, const Arguments& a, const Tensor& seed, const Tensor& query, const Tensor& key,
             const Tensor& value, const Tensor& attn_mask, int64_t first_batch_head) {
  return {query, key, value, attn_mask, in.scale, a.is_causal, a.dropout_p, seed, first_batch_head};
}

// float32, and float64 for float64 inputs.
at::ScalarType lse_type(const Tensor& query) {
  return at::toOpMathType(query.scalar_type());
}

// (N..., H, L) as (N..., H, L, 1), so that it walks along with tensors that have columns.
Tensor with_column(const Tensor& t) {
  return t.defined() ? t.unsqueeze(-1) : t;
}
Tensor without_column(const Tensor& t) {
  return t.defined() ? t.squeeze(-1) : t;
}

}  // namespace

Forward attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                          double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa,
                          int64_t backends, bool grad_wanted, bool mask_grad_wanted) {
  const Arguments args = arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
  const Inputs in = check(args);
  const c10::OptionalDeviceGuard guard(query.device());
  Tensor output = empty_in_layout_of(query, in.shape({in.L, in.Ev}));
  Tensor logsumexp =
      at::empty(grad_wanted ? in.shape({in.L}) : std::vector<int64_t>{0}, query.options().dtype(lse_type(query)));
  Tensor logsumexp_rest = at::empty(logsumexp.sizes(), logsumexp.options());
  const Tensor seed = dropout_p > 0 ? dropout_seed(query) : at::empty({0}, query.options().dtype(at::kLong));
  if (in.empty() || in.S == 0) {
    output.zero_();
    logsumexp.fill_(-std::numeric_limits<double>::infinity());
    logsumexp_rest.zero_();
    return {output, logsumexp, logsumexp_rest, seed};
  }
  const Tensor lse = grad_wanted ? logsumexp : Tensor();
  const Tensor lse_rest = grad_wanted ? logsumexp_rest : Tensor();
  const auto step = [&](const FourDims& t, int64_t first_batch_head) {
    const Call call = call_of(in, args, seed, t[0], t[1], t[2], t[3], first_batch_head);
    const Problem problem = describe(call, {grad_wanted, mask_grad_wanted, in.mask_broadcasts});
    const Backend backend = choose(problem, backends);
    const Tensor rows = without_column(t[5]);
    const Tensor rows_rest = without_column(t[6]);
    if (backend == Backend::kMath) {
      if (rows_rest.defined()) rows_rest.zero_();
      math_forward(call, t[4], rows);
      return;
    }
#if defined(SDPA_WITH_CUDA)
    kernel_forward(backend, call, problem, t[4], rows, rows_rest);
#endif
  };
  for_each_4d({in.query, in.key, in.value, in.attn_mask, output, with_column(lse), with_column(lse_rest)}, 0, step);
  return {output, logsumexp, logsumexp_rest, seed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output, const Tensor& query,
                                                              const Tensor& key, const Tensor& value,
                                                              const MaybeTensor& attn_mask, const Tensor& output,
                                                              const Tensor& logsumexp, const Tensor& logsumexp_rest,
                                                              const Tensor& seed, double dropout_p, bool is_causal,
                                                              std::optional<double> scale, bool enable_gqa,
                                                              int64_t backends, std::array<bool, 4> wanted) {
  const Arguments args = arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa);
  const Inputs in = check(args);
  const auto full = in.shape({in.L, in.Ev});
  TORCH_CHECK(grad_output.sizes().equals(full) && output.sizes().equals(full),
              "sdpa::attention_backward: grad_output and output must have the output's shape ", at::IntArrayRef(full),
              ", got ", grad_output.sizes(), " and ", output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == query.scalar_type() && output.scalar_type() == query.scalar_type(),
              "sdpa::attention_backward: grad_output and output must have the query's dtype ", query.scalar_type(),
              ", got ", grad_output.scalar_type(), " and ", output.scalar_type());
  TORCH_CHECK(logsumexp.sizes().equals(in.shape({in.L})) && logsumexp.scalar_type() == lse_type(query),
              "sdpa::attention_backward: logsumexp must be ", lse_type(query), " of shape ",
              at::IntArrayRef(in.shape({in.L})), " (attention_forward gives it with grad_wanted=True), got ",
              logsumexp.scalar_type(), " ", logsumexp.sizes());
  TORCH_CHECK(logsumexp_rest.sizes().equals(logsumexp.sizes()) && logsumexp_rest.scalar_type() == lse_type(query),
              "sdpa::attention_backward: logsumexp_rest must be like logsumexp, ", logsumexp.sizes(), ", got ",
              logsumexp_rest.scalar_type(), " ", logsumexp_rest.sizes());
  TORCH_CHECK(seed.numel() == (dropout_p > 0 ? 1 : 0) && seed.scalar_type() == at::kLong,
              "sdpa::attention_backward: seed must be the int64 tensor that attention_forward gave, got ",
              seed.scalar_type(), " ", seed.sizes(), " with dropout_p ", dropout_p);
  for (const Tensor& t : {grad_output, output, logsumexp, logsumexp_rest, seed}) {
    TORCH_CHECK(t.device() == query.device(), "sdpa::attention_backward: all tensors must be on the query's device, ",
                query.device(), ", got one on ", t.device());
  }
  wanted[3] = wanted[3] && args.attn_mask.defined() && args.attn_mask.scalar_type() != at::kBool;
  const c10::OptionalDeviceGuard guard(query.device());

  // A gradient is written in its input's own shape where no leading dim broadcasts, else in full and summed after.
  const Tensor inputs[3] = {query, key, value};
  const Tensor expanded[3] = {in.query, in.key, in.value};
  Tensor grads[3];
  for (int i = 0; i < 3; ++i) {
    if (!wanted[i]) continue;
    grads[i] = expanded[i].sizes().equals(inputs[i].sizes()) ? at::empty_like(inputs[i])
                                                             : at::empty(expanded[i].sizes(), inputs[i].options());
  }
  Tensor grad_mask;
  if (wanted[3]) {
    grad_mask = at::zeros(args.attn_mask.sizes(), query.options().dtype(at::toOpMathType(query.scalar_type())));
  }
  if (in.empty() || in.S == 0) {
    for (Tensor& grad : grads) {
      if (grad.defined()) grad.zero_();
    }
  } else {
    const auto step = [&](const FourDims& t, int64_t first_batch_head) {
      const Call call = call_of(in, args, seed, t[0], t[1], t[2], t[3], first_batch_head);
      // What the forward was asked, so that its backend is found again: its LSE is not another's.
      const bool mask_grad = wanted[3] || (args.attn_mask.defined() && args.attn_mask.requires_grad());
      const Problem problem = describe(call, {true, mask_grad, in.mask_broadcasts});
      const Backend backend = choose(problem, backends);
      const Gradients gradients{t[8], t[9], t[10], t[11]};
      const Tensor rows = without_column(t[6]);
      const Tensor rows_rest = without_column(t[7]);
      if (backend == Backend::kMath) {
        math_backward(call, t[4], t[5], rows, gradients);
        return;
      }
#if defined(SDPA_WITH_CUDA)
      kernel_backward(backend, call, problem, t[4], t[5], rows, rows_rest, gradients);
#endif
    };
    const Tensor full_mask_grad = grad_mask.defined() ? grad_mask.expand(in.shape({in.L, in.S})) : Tensor();
    for_each_4d({in.query, in.key, in.value, in.attn_mask, grad_output, output, with_column(logsumexp.contiguous()),
                 with_column(logsumexp_rest.contiguous()), grads[0], grads[1], grads[2], full_mask_grad},
                0, step);
  }
  const auto finish = [&](int i) {
    return grads[i].defined() ? at::sum_to(grads[i], inputs[i].sizes()) : at::empty({0}, query.options());
  };
  return {finish(0), finish(1), finish(2),
          wanted[3] ? grad_mask.to(args.attn_mask.scalar_type()) : at::empty({0}, query.options())};
}

}  // namespace sdpa
