// What the flash backend takes.
#include "select/describe.h"

namespace sdpa {

static bool on_gpu(const Problem& p) {
  return p.device_type == DeviceType::kCUDA;
}
static bool on_turing(const Problem& p) {
  return on_gpu(p) && p.capability < 80;
}

static bool takes_dtype(const Problem& p) {
  return p.dtype == DType::kFloat16 || (p.dtype == DType::kBFloat16 && !on_turing(p));
}
static bool takes_head_dims(const Problem& p) {
  return p.E >= 1 && p.Ev >= 1 && p.E <= 256 && p.Ev <= 256;
}

const std::vector<Constraint>& flash_constraints() {
  static const std::vector<Constraint> list = {
      {"device", on_gpu, got_device, "cuda", "Move query, key and value to a CUDA device."},
      {"architecture", [](const Problem& p) { return !on_gpu(p) || p.capability >= 75; }, got_capability,
       "sm75 or newer", "Use the memory-efficient backend on this chip.",
       [](const Problem& p) { return unsupported_chip("Flash", "sm75 and newer", p); }},
      {"dtype", takes_dtype, got_dtype, "float16 or (on sm80 and newer) bfloat16",
       "Cast the inputs, or run under torch.autocast."},
      {"head dims", takes_head_dims, got_head_dims, "1 to 256",
       "Use the memory-efficient backend, which takes any head dim."},
      {"lengths", takes_lengths, got_lengths, kNeedsLengths, "Split the call along its batch or its queries."},
      {"mask", [](const Problem& p) { return p.mask_kind != MaskKind::kFloat64; }, got_mask,
       "no mask, or a bool, float32, float16 or bfloat16 mask", "Cast the mask to float32."},
      {"kernel in this build",
       [](const Problem& p) {
         return !on_gpu(p) || p.capability < 75 || !takes_dtype(p) || !takes_head_dims(p) ||
                compiled(Backend::kFlash, p);
       },
       [](const Problem&) { return "kernels for " + compiled_chips(Backend::kFlash); }, "one for this chip and call",
       kRebuild},
  };
  return list;
}

}  // namespace sdpa
