#include "math/call.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <torch/version.h>

namespace sdpa {

using at::Tensor;

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBool:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

MaskKind mask_kind_of(const Tensor& mask) {
  if (!mask.defined()) return MaskKind::kNone;
  switch (mask.scalar_type()) {
    case at::kBool:
      return MaskKind::kBool;
    case at::kHalf:
      return MaskKind::kFloat16;
    case at::kBFloat16:
      return MaskKind::kBFloat16;
    case at::kFloat:
      return MaskKind::kFloat32;
    default:
      return MaskKind::kFloat64;
  }
}

// torch.backends.cuda.matmul.allow_tf32, or fp32_precision, which torch had no enumeration for before 2.10 and did not
// have before 2.9.
bool tf32_is_allowed() {
  const auto& context = at::globalContext();
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  return context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
#elif TORCH_VERSION_MINOR == 9
  return context.float32Precision("cuda", "matmul") == "tf32";
#else
  return context.allowTF32CuBLAS();
#endif
}

Operand operand(const Tensor& t) {
  Operand o;
  if (!t.defined()) return o;
  o.data = t.data_ptr();
  for (int d = 0; d < 4; ++d) o.stride[d] = t.stride(d);
  return o;
}

void fill(ForwardParams& params, const Call& call) {
  params.query = operand(call.query);
  params.key = operand(call.key);
  params.value = operand(call.value);
  params.attn_mask = operand(call.attn_mask);
  params.B = call.query.size(0);
  params.H = call.query.size(1);
  params.L = call.query.size(2);
  params.S = call.key.size(2);
  params.E = call.query.size(3);
  params.Ev = call.value.size(3);
  params.group = params.H / call.key.size(1);
  params.dtype = dtype_of(call.query.scalar_type());
  params.mask_kind = mask_kind_of(call.attn_mask);
  params.scale = static_cast<float>(call.scale);
  params.is_causal = call.is_causal;
  params.allow_tf32 = params.dtype == DType::kFloat32 && tf32_is_allowed();
  params.dropout_p = static_cast<float>(call.dropout_p);
  params.seed = call.seed.defined() && call.dropout_p > 0 ? call.seed.data_ptr<int64_t>() : nullptr;
  params.first_batch_head = call.first_batch_head;
}

}  // namespace sdpa
