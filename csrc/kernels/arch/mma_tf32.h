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

// kRegisters registers of an operand. kSplit: with the small part, else big alone, which is single TF32.
template <bool kSplit, int kRegisters>
struct Tf32Operand {
  uint32_t big[kRegisters], small[kRegisters];

  // Rounds to nearest: a truncated big part would leave a small part one bit too long. An integer addition does it,
  // since the lowest bits are cut off anyway. (cvt.rna.tf32 is three instructions on sm90.)
  __device__ __forceinline__ void set(int i, uint32_t bits) {
    constexpr uint32_t kHalf = 0x1000, kKept = 0xffffe000;
    if constexpr (kSplit) {
      big[i] = (bits + kHalf) & kKept;
      small[i] = __float_as_uint(__uint_as_float(bits) - __uint_as_float(big[i]));  // exact; NaN stays NaN
    } else {
      big[i] = fabsf(__uint_as_float(bits)) < INFINITY ? bits + kHalf : bits;
    }
  }
  __device__ __forceinline__ void set(int i, float x) { set(i, __float_as_uint(x)); }
};

template <bool kSplit>
using Tf32A = Tf32Operand<kSplit, 4>;
template <bool kSplit>
using Tf32B = Tf32Operand<kSplit, 2>;

// A 16 x 8 sum of products. The tensor core cuts off, where FFMA rounds, what does not fit when it adds to d, so the
// small products have a sum of their own, and a sum should not grow longer than some ten products before its value
// is added to others in float32.
template <bool kSplit>
struct Tf32Sum {
  float big[4] = {}, small[4] = {};

  // kIsTransposed: gives the bits which the product of the operands in each other's place gives.
  template <bool kIsTransposed = false>
  __device__ __forceinline__ void add(const Tf32A<kSplit>& a, const Tf32B<kSplit>& b) {
    if constexpr (kSplit) {
      mma_tf32(small, kIsTransposed ? a.big : a.small, kIsTransposed ? b.small : b.big);
      mma_tf32(small, kIsTransposed ? a.small : a.big, kIsTransposed ? b.big : b.small);
    }
    mma_tf32(big, a.big, b.big);
  }
  __device__ __forceinline__ float value(int i) const { return kSplit ? big[i] + small[i] : big[i]; }
};

}  // namespace sdpa
