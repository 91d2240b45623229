// float32 products on the tensor cores' float16 units (sm80 and newer). A float16 has 11 significant bits; a number
// taken apart into a big and a small one keeps 22 or 23 of float32's 24, and three products of such parts give a
// float32 product: small * big + big * small + big * big (small * small is below the rounding of the result). TF32
// parts hold as many bits at less than half the speed; what float16 lacks is range, so numbers are scaled by powers of
// two first.
#pragma once

#include <cstdint>

#include "mma.h"

namespace sdpa {

// kRegisters registers of an operand, two numbers in each. kSplit: in two parts, else `big` alone, which is as good as
// TF32.
template <bool kSplit, int kRegisters>
struct HalfPair {
  uint32_t big[kRegisters], small[kRegisters];

  // Numbers below 2^16.
  __device__ __forceinline__ void set(int i, float low, float high) {
    big[i] = pack<__half>(low, high);
    if constexpr (kSplit) {
      const float2 kept = unpack<__half>(big[i]);
      small[i] = pack<__half>(low - kept.x, high - kept.y);
    }
  }
};

// A 16 x 8 sum of products. The tensor core cuts off, where FFMA rounds, what does not fit when it adds to a sum, so
// the small products have a sum of their own, and a sum should not grow longer than some four instructions before its
// value is added to others in float32.
struct HalfPairSum {
  float big[4], small[4];
  template <bool kSplit>
  __device__ __forceinline__ float value(int i) const {
    return kSplit ? big[i] + small[i] : big[i];
  }
};

// d = a * b (see mma.h)
__device__ __forceinline__ void mma_start(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// sum[m][n] += a[m] * b[n], where b[n] is registers 2 n and 2 n + 1 of `b`; the first of its products starts a sum. The
// three products of a sum stand apart: an mma that has to wait for the one before it takes several times as long.
// kIsTransposed: gives the bits which the operands in each other's place give.
template <bool kIsTransposed = false, bool kSplit, int kRows, int kCols>
__device__ __forceinline__ void multiply_add(HalfPairSum (&sum)[kRows][kCols], const HalfPair<kSplit, 4> (&a)[kRows],
                                             const HalfPair<kSplit, 2 * kCols>& b, bool is_first) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int n = 0; n < kCols; ++n) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) f(sum[m][n], a[m], n);
    }
  };
  using A = HalfPair<kSplit, 4>;
  const auto add = [is_first](float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool starts) {
    if (is_first && starts) {
      mma_start(d, a, b0, b1);
    } else {
      Mma<Sm80, __half>::add(d, a, b0, b1);
    }
  };
  const auto small_big = [&](HalfPairSum& s, const A& a, int n) {
    add(s.small, a.small, b.big[2 * n], b.big[2 * n + 1], !kIsTransposed);
  };
  const auto big_small = [&](HalfPairSum& s, const A& a, int n) {
    add(s.small, a.big, b.small[2 * n], b.small[2 * n + 1], kIsTransposed);
  };
  const auto big_big = [&](HalfPairSum& s, const A& a, int n) {
    add(s.big, a.big, b.big[2 * n], b.big[2 * n + 1], true);
  };
  if constexpr (!kSplit) {
    each(big_big);
  } else if constexpr (kIsTransposed) {
    each(big_small);
    each(big_big);
    each(small_big);
  } else {
    each(small_big);
    each(big_big);
    each(big_small);
  }
}

}  // namespace sdpa
