// One attention call as the selector sees it: no tensors, no torch. The device's compute capability is a field like any
// other, so every architecture's selection can be asked for on any machine.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "attn/params.h"

namespace sdpa {

enum class DeviceType : int { kCPU, kCUDA, kOther };

using Strides = std::array<int64_t, 4>;  // (batch, heads, rows, columns), in elements

struct Problem {
  int64_t B = 0, H = 0, L = 0, S = 0, E = 0, Ev = 0;
  int64_t key_heads = 0;
  Strides query_stride{}, key_stride{}, value_stride{}, mask_stride{};
  DType dtype = DType::kOther;
  MaskKind mask_kind = MaskKind::kNone;
  bool is_causal = false;
  bool in_boxes = false;  // tensor maps describe query, key and value, and scale is positive: see flash_*_sm90.cuh
  double dropout_p = 0;
  bool grad_wanted = false;       // of anything
  bool mask_grad_wanted = false;  // of the mask
  bool mask_broadcasts = false;   // its gradient has fewer elements than there are scores
  bool deterministic = false;     // torch.use_deterministic_algorithms
  DeviceType device_type = DeviceType::kCPU;
  int capability = 0;         // 10 * major + minor: whose code path is taken
  int device_capability = 0;  // of the chip that will run it; differs under SDPA_FORCE_ARCH
  // True: capability was given by the caller as a question ("what on sm70?"), so it does not matter whether this build
  // has kernels for it.
  bool hypothetical = false;
};

const char* name(DType dtype);
const char* name(MaskKind kind);
const char* name(DeviceType type);
std::string to_string(const Problem& problem);

}  // namespace sdpa
