// Tensor-core multiply-add on register fragments. One specialisation for each instruction family and element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "arch.h"

namespace sdpa {

// d += a * b with a 16 x 16 row-major, b 16 x 8 column-major, d 16 x 8 in float32. With g = lane / 4 and t = lane % 4
// a lane holds: a[0..3] = rows g, g + 8, g, g + 8, columns 2t and 2t + 1 (the last two registers 8 further right);
// b0, b1 = rows 2t, 2t + 1 (and 8 further down) of column g; d = columns 2t, 2t + 1 of row g, then of row g + 8.
template <class Arch, class T>
struct Mma;

// Two m16n8k8: the left half of `a` with the upper half of `b`, then the right half with the lower.
template <>
struct Mma<Sm75, __half> {
  __device__ static __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    add(d, a[0], a[1], b0);
    add(d, a[2], a[3], b1);
  }

 private:
  __device__ static __forceinline__ void add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
};

template <>
struct Mma<Sm80, __half> {
  __device__ static __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Mma<Sm80, __nv_bfloat16> {
  __device__ static __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// d += a * b with a 16 x 8 row-major, b 8 x 8 column-major, of float32 cut off to TF32. A lane holds: a[0..3] = rows g,
// g + 8, g, g + 8 of column t (the last two of t + 4); b0, b1 = rows t, t + 4 of column g; d as above.
template <>
struct Mma<Sm80, float> {
  __device__ static __forceinline__ void add(float (&d)[4], const float (&a)[4], float b0, float b1) {
    const auto bits = [](float x) { return __float_as_uint(x); };
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b0)), "r"(bits(b1)));
  }
};

// Two floats rounded to T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

// Accumulators of two neighbouring 16 x 8 tiles are, once rounded, the `a` operand of one 16 x 16 block: a lane keeps
// its rows and columns. So P and dS go from one multiplication to the next without leaving the registers.
template <class T>
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// A lane has a word of each of four rows of four words, which it shares with the other lanes of its quad. They exchange
// them, so that each has a row: 16 bytes to store.
__device__ __forceinline__ void exchange_in_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (n & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? words[n] : words[n | bit], bit);
      (upper ? words[n] : words[n | bit]) = got;
    }
  }
}

}  // namespace sdpa
