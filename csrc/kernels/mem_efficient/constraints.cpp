// What the memory-efficient backend takes.
#include "select/describe.h"

namespace sdpa {

static bool on_gpu(const Problem& p) {
  return p.device_type == DeviceType::kCUDA;
}

static bool runs_flash_kernel(const Problem& p) {
  const Variant* variant = find_variant(Backend::kEfficient, /*backward=*/true, p);
  return variant != nullptr && variant->backend == Backend::kFlash;
}

static bool takes_dtype(const Problem& p) {
  return p.dtype == DType::kFloat32 || p.dtype == DType::kFloat16 ||
         (p.dtype == DType::kBFloat16 && (!on_gpu(p) || p.capability >= 80));
}

constexpr int64_t kMaxFloat32HeadDim = 256;

const std::vector<Constraint>& efficient_constraints() {
  static const std::vector<Constraint> list = {
      {"device", on_gpu, got_device, "cuda", "Move query, key and value to a CUDA device."},
      {"architecture", [](const Problem& p) { return !on_gpu(p) || p.capability >= 70; }, got_capability,
       "sm70 or newer", "Use the math backend on this chip.",
       [](const Problem& p) { return unsupported_chip("Memory efficient", "sm70 and newer", p); }},
      {"dtype", takes_dtype, got_dtype, "float32, float16, or (on sm80 and newer) bfloat16",
       "Cast the inputs, or run under torch.autocast."},
      // Before sm80 a float32 score is summed up in one go: over more than this it loses more than twice what eager
      // does.
      {"head dims",
       [](const Problem& p) {
         const bool sums_in_one_go = p.dtype == DType::kFloat32 && on_gpu(p) && p.capability < 80;
         return p.E >= 1 && p.Ev >= 1 && !(sums_in_one_go && p.E > kMaxFloat32HeadDim);
       },
       got_head_dims, "1 or more, in float32 before sm80 E up to 256", "Use the math backend."},
      {"lengths", takes_lengths, got_lengths, kNeedsLengths, "Split the call along its batch or its queries."},
      {"mask", [](const Problem& p) { return p.mask_kind != MaskKind::kFloat64; }, got_mask,
       "a bool, float32, float16 or bfloat16 mask", "Cast the mask to float32."},
      {"determinism",
       [](const Problem& p) {
         return !(p.deterministic && p.mask_grad_wanted && p.mask_broadcasts) || runs_flash_kernel(p);
       },
       got_determinism,
       "a mask of the full (B, H, L, S) shape, or torch.use_deterministic_algorithms(False): the gradient of a "
       "broadcast mask is added in no fixed order",
       "Use the math backend."},
      {"kernel in this build",
       [](const Problem& p) {
         return !on_gpu(p) || p.capability < 70 || !takes_dtype(p) || compiled(Backend::kEfficient, p);
       },
       [](const Problem&) { return "kernels for " + compiled_chips(Backend::kEfficient); },
       "one for this chip and call", kRebuild},
  };
  return list;
}

}  // namespace sdpa
