// Barriers of some of a block's warps.
#pragma once

#include <cstdint>

namespace sdpa {

// Two neighbouring warps, the pair-th of the block. Pairs 0 to 14.
__device__ __forceinline__ void sync_pair(int pair) {
  asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
}
// And whether any of their threads has x.
__device__ __forceinline__ bool sync_pair_or(int pair, bool x) {
  uint32_t any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.u32 mine, %1, 0; bar.red.or.pred any, %2, 64, mine; selp.u32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(x)), "r"(pair + 1)
      : "memory");
  return any != 0;
}

}  // namespace sdpa
