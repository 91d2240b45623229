// The code paths a kernel can be compiled for. An Arch is a template parameter, never __CUDA_ARCH__, so that an
// older path can be compiled for, and tested on, a newer chip.
#pragma once

namespace sdpa {

// kSharedBytes: the most dynamic shared memory one block may opt in to on that architecture.
// kAsyncCopy: whether it has cp.async; elsewhere copies to shared memory go through registers.
struct Sm70 {
  static constexpr int kId = 70, kSharedBytes = 96 * 1024;
  static constexpr bool kAsyncCopy = false;
};
struct Sm75 {
  static constexpr int kId = 75, kSharedBytes = 64 * 1024;
  static constexpr bool kAsyncCopy = false;
};
struct Sm80 {  // sm80, and the only path so far for everything newer; 99 KB is what sm86 and sm89 allow
  static constexpr int kId = 80, kSharedBytes = 99 * 1024;
  static constexpr bool kAsyncCopy = true;
};

// Whether this pass of the compiler makes code for a chip before sm90. For settings that only move registers, since
// ptxas spills at others for sm80 than for sm90; never for a code path.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kIsBeforeSm90 = true;
#else
constexpr bool kIsBeforeSm90 = false;
#endif

}  // namespace sdpa
