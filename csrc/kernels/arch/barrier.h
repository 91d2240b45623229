// Barriers for some of a block's threads, and barriers in shared memory.
#pragma once

#include <cstdint>

#include "arch.h"

namespace sdpa {

// What this thread wrote to shared memory comes before what it does next, arrive_with_copies included.
__device__ __forceinline__ void fence_block() {
  asm volatile("fence.acq_rel.cta;" ::: "memory");
}

// A barrier for kThreads of the block's threads, whole warps. Number 0 is that of __syncthreads.
template <int kThreads>
__device__ __forceinline__ void sync_threads(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// To arrive there without waiting.
template <int kThreads>
__device__ __forceinline__ void arrive_threads(int number) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// And whether any of them has x.
template <int kThreads>
__device__ __forceinline__ bool sync_threads_or(int number, bool x) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.u32 mine, %1, 0; bar.red.or.pred any, %2, %3, mine; selp.u32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(x)), "r"(number), "n"(kThreads)
      : "memory");
  return any != 0;
}

// A build for compute-sanitizer's racecheck (tests/sanitize.py). It reports hazards where some of a block's warps have
// come to more sync_threads than others, although a __syncthreads of all lies between (bench/NOTES.md), so there they
// come to as many. And to it the arrival of one lane says nothing of what the others did before the __syncwarp ahead of
// it, so there every lane arrives.
#if defined(SDPA_RACECHECK)
constexpr bool kForRacecheck = true;
#else
constexpr bool kForRacecheck = false;
#endif
constexpr int kWarpArrivals = kForRacecheck ? 32 : 1;  // how often arrive_warp counts

// To arrive and to wait are two things here, and a warp can do something else in between. A phase ends when as many
// have arrived as `init` was told; the first has parity 0. To wait for the phase before the first (parity 1) takes no
// time. An older Arch than sm80 has none of it: there, to wait is to wait for all threads, who must all do so.
template <class Arch>
struct SharedBarrier {
  static constexpr bool kIsReal = Arch::kId >= 80;
  static constexpr int kBytes = 8;
  uint32_t address;

  __device__ __forceinline__ void init(int arrivals) const {
    if constexpr (kIsReal) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() const {
    if constexpr (kIsReal)
      asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(address) : "memory");
  }
  // For what all lanes of the warp did before: kWarpArrivals times.
  __device__ __forceinline__ void arrive_warp() const {
    if constexpr (kIsReal) __syncwarp();
    if (kForRacecheck || threadIdx.x % 32 == 0) arrive();
  }
  // As soon as this thread's copies up to now have landed.
  __device__ __forceinline__ void arrive_with_copies() const {
    if constexpr (kIsReal) asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory");
  }
  __device__ __forceinline__ void wait(int parity) const {
    if constexpr (kIsReal) {
      uint32_t done;
      do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(parity)
                     : "memory");
      } while (done == 0);
    } else {
      __syncthreads();
    }
  }
  // Whether the phase is known to have ended. Asked ahead of time, the answer is there when it is wanted: a wait of no
  // time takes 100 clocks.
  __device__ __forceinline__ bool test(int parity) const {
    uint32_t done = 0;
    if constexpr (kIsReal) {
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(address), "r"(parity)
                   : "memory");
    }
    return done != 0;
  }
};

}  // namespace sdpa
