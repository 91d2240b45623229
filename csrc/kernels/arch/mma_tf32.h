// float32 products on tensor cores (sm80 and newer). TF32 keeps 11 of float32's 24 significant bits; an operand taken
// apart into a big and a small TF32 number keeps 22 or 23 of them, and three products of such parts give a float32
// product: small * big + big * small + big * big (small * small is below the rounding of the result).
#pragma once

#include <cstdint>

namespace sdpa {

// d += a * b with a 16 x 8 row-major, b 8 x 8 column-major, d 16 x 8. With g = lane / 4 and t = lane % 4 a lane holds:
// a[0..3] = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b[0], b[1] = (t, g), (t + 4, g); d as in mma.h. The lowest
// 13 bits of a and b are not looked at.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// kRegisters registers of an operand. kSplit: in two parts, else `big` alone, which is single TF32.
template <bool kSplit, int kRegisters>
struct Tf32Operand {
  uint32_t big[kRegisters], small[kRegisters];

  // The big part is rounded to nearest: cut off, it would leave a small part one bit too long. (An integer addition
  // does it; cvt.rna.tf32 is three instructions on sm90.)
  __device__ __forceinline__ void set(int i, float x) {
    if constexpr (kSplit) {
      constexpr uint32_t kHalf = 0x1000, kKept = 0xffffe000;
      big[i] = (__float_as_uint(x) + kHalf) & kKept;
      small[i] = __float_as_uint(x - __uint_as_float(big[i]));  // exact; NaN stays NaN
    } else {
      big[i] = rounded(x);
    }
  }
  __device__ __forceinline__ void set(int i, uint32_t bits) { set(i, __uint_as_float(bits)); }

  // Before its lowest bits are cut off, a third to two thirds of the last bit that is kept are added: nearly rounding,
  // in one instruction, and NaN and what TF32 can hold stay what they are.
  __device__ __forceinline__ static uint32_t rounded(float x) { return __float_as_uint(x * (1.f + 1.39f / 4096)); }
};

template <bool kSplit>
using Tf32A = Tf32Operand<kSplit, 4>;
template <bool kSplit>
using Tf32B = Tf32Operand<kSplit, 2>;

// A 16 x 8 sum of products. The tensor core cuts off, where FFMA rounds, what does not fit when it adds to d, so the
// small products have a sum of their own, and a sum should not grow longer than some eight products before its value
// is added to others in float32.
struct Tf32Sum {
  float big[4] = {}, small[4] = {};
  template <bool kSplit>
  __device__ __forceinline__ float value(int i) const {
    return kSplit ? big[i] + small[i] : big[i];
  }
};

// sum[m][first + n] += a[m] * b[n]. The three products of a sum stand four others apart: an mma that has to wait for
// the one before it takes several times as long. kIsTransposed: gives the bits which the operands in each other's place
// give.
template <bool kIsTransposed = false, bool kSplit, int kRows, int kCols, int kSums>
__device__ __forceinline__ void multiply_add(Tf32Sum (&sum)[kRows][kSums], const Tf32A<kSplit> (&a)[kRows],
                                             const Tf32B<kSplit> (&b)[kCols], int first) {
  constexpr int kTogether = kCols < 4 / kRows ? kCols : 4 / kRows;
#pragma unroll
  for (int begin = 0; begin < kCols; begin += kTogether) {
    const auto each = [&](auto f) {
#pragma unroll
      for (int n = begin; n < begin + kTogether; ++n) {
#pragma unroll
        for (int m = 0; m < kRows; ++m) f(sum[m][first + n], a[m], b[n]);
      }
    };
    using A = Tf32A<kSplit>;
    using B = Tf32B<kSplit>;
    if constexpr (kSplit) {
      each([](Tf32Sum& s, const A& a, const B& b) {
        mma_tf32(s.small, kIsTransposed ? a.big : a.small, kIsTransposed ? b.small : b.big);
      });
    }
    each([](Tf32Sum& s, const A& a, const B& b) { mma_tf32(s.big, a.big, b.big); });
    if constexpr (kSplit) {
      each([](Tf32Sum& s, const A& a, const B& b) {
        mma_tf32(s.small, kIsTransposed ? a.small : a.big, kIsTransposed ? b.big : b.small);
      });
    }
  }
}

}  // namespace sdpa
