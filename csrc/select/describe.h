// Small texts that the backends' constraint lists share.
#pragma once

#include <algorithm>
#include <string>

#include "registry.h"
#include "select/select.h"

namespace sdpa {

inline std::string got_device(const Problem& p) {
  return name(p.device_type);
}
inline std::string got_dtype(const Problem& p) {
  return name(p.dtype);
}
inline std::string got_capability(const Problem& p) {
  return p.device_type == DeviceType::kCUDA ? "sm" + std::to_string(p.capability) : "no GPU";
}
inline std::string got_head_dims(const Problem& p) {
  return "E=" + std::to_string(p.E) + ", Ev=" + std::to_string(p.Ev);
}
inline std::string got_lengths(const Problem& p) {
  return "L=" + std::to_string(p.L) + ", S=" + std::to_string(p.S) + ", B*H=" + std::to_string(p.B * p.H);
}
inline bool takes_lengths(const Problem& p) {
  return std::max({p.L, p.S, p.B * p.H}) <= kMaxPosition;
}
constexpr const char* kNeedsLengths = "L, S and B*H up to 2147482623";
static_assert(kMaxPosition == 2147482623);
inline std::string got_mask(const Problem& p) {
  return name(p.mask_kind);
}
inline std::string got_determinism(const Problem& p) {
  return std::string(p.deterministic ? "deterministic" : "free order") + ", " +
         (p.mask_grad_wanted ? "gradients of the mask too"
          : p.grad_wanted    ? "gradients wanted"
                             : "no gradients");
}

inline std::string unsupported_chip(const char* backend, const char* supported, const Problem& p) {
  return std::string(backend) + " attention only supports " + supported +
         " gpu architectures. Attempting to run on a sm " + std::to_string(p.capability / 10) + "." +
         std::to_string(p.capability % 10) + " gpu.";
}

constexpr const char* kRebuild =
    "Rebuild with nvcc and your chip in TORCH_CUDA_ARCH_LIST: SDPA_CUDA=1 pip install --no-build-isolation "
    "--force-reinstall --no-deps .";

// Kernels of this build for the problem's direction(s).
inline bool compiled(Backend backend, const Problem& p) {
  return find_variant(backend, false, p) != nullptr && (!p.grad_wanted || find_variant(backend, true, p) != nullptr);
}

}  // namespace sdpa
