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
struct Sm80 {  // sm80 and everything newer; 99 KB is what sm86 and sm89 allow
  static constexpr int kId = 80, kSharedBytes = 99 * 1024;
  static constexpr bool kAsyncCopy = true;
};
struct Sm90 {  // sm90a alone: wgmma
  static constexpr int kId = 90, kSharedBytes = 227 * 1024;
  static constexpr bool kAsyncCopy = true;
};

// The chip that this pass of the compiler makes code for, 0 for the host. For settings that only move registers, since
// ptxas spills at others for one chip than for another; never for a code path.
#if defined(__CUDA_ARCH__)
constexpr int kChip = __CUDA_ARCH__ / 10;
#else
constexpr int kChip = 0;
#endif
constexpr bool kIsBeforeSm90 = kChip != 0 && kChip < 90;

// threadIdx.x, read anew. What is computed from it cannot be hoisted out of a kernel's main loop, where it would hold
// registers that the products need: the addresses of staged tiles made those spill.
__device__ __forceinline__ int fresh_thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace sdpa
