// What the flash backend takes.
#include "select/describe.h"

namespace sdpa {

constexpr int64_t kMaxHeadDim = 128;

const std::vector<Constraint>& flash_constraints() {
  static const std::vector<Constraint> list = {
      {"device", [](const Problem& p) { return p.device_type == DeviceType::kCUDA; }, got_device, "cuda",
       "Move query, key and value to a CUDA device."},
      {"architecture", [](const Problem& p) { return p.device_type != DeviceType::kCUDA || p.capability >= 80; },
       got_capability, "sm80 or newer", "Use the memory-efficient backend on this chip.",
       [](const Problem& p) { return unsupported_chip("Flash", "sm80 and newer", p); }},
      {"dtype", [](const Problem& p) { return p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16; }, got_dtype,
       "float16 or bfloat16", "Cast the inputs, or run under torch.autocast."},
      {"head dims", [](const Problem& p) { return p.E >= 1 && p.Ev >= 1 && p.E <= kMaxHeadDim && p.Ev <= kMaxHeadDim; },
       got_head_dims, "1 to 128", "Use the memory-efficient backend, which takes any head dim."},
      {"mask", [](const Problem& p) { return p.mask_kind != MaskKind::kFloat64; }, got_mask,
       "no mask, or a bool, float32, float16 or bfloat16 mask", "Cast the mask to float32."},
      {"kernel in this build",
       [](const Problem& p) {
         return p.device_type != DeviceType::kCUDA || p.capability < 80 || p.E > kMaxHeadDim || p.Ev > kMaxHeadDim ||
                (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) || compiled(Backend::kFlash, p);
       },
       [](const Problem&) { return "kernels for " + compiled_chips(Backend::kFlash); }, "one for this chip and call",
       kRebuild},
  };
  return list;
}

}  // namespace sdpa
