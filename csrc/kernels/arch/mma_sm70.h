// Volta's tensor-core multiply-add, mma.m8n8k4 with float32 sums. Every quad pair of a warp (lanes 4q .. 4q + 3 and
// 4q + 16 .. 4q + 19) has an 8 x 8 product of its own; nothing is shared between quad pairs but the instruction.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace sdpa {

// A lane's place in its quad pair. The operands are of 4 halves a lane, so two registers:
//   a (8 x 4): row n() of it
//   b (4 x 8), column-major: column n() of it; row-major: row lane % 4, columns 4 * high() .. + 3
//   d (8 x 8), float32: rows odd() + 4 * high() and 2 further down; of each columns 2 * right() and the next, and the
//   same 4 further right. In registers: two of the upper row, two of the lower, then those further right alike.
struct QuadPairLane {
  int lane;
  __device__ __forceinline__ int odd() const { return lane & 1; }
  __device__ __forceinline__ int right() const { return (lane >> 1) & 1; }
  __device__ __forceinline__ int high() const { return (lane >> 4) & 1; }
  __device__ __forceinline__ int n() const { return lane % 4 + 4 * high(); }
  __device__ __forceinline__ int quad_pair() const { return (lane >> 2) & 3; }
};

// d += a * b. `upper` and `lower` are the lane's two rows of d, of which columns `at`, `at` + 1, `at` + kFurther and
// `at` + kFurther + 1 are the four of this product.
template <bool kIsColumnMajorB, int kFurther, int kColumns>
__device__ __forceinline__ void mma_8x8x4(float (&upper)[kColumns], float (&lower)[kColumns], int at, uint32_t a0,
                                          uint32_t a1, uint32_t b0, uint32_t b1) {
  float &d0 = upper[at], &d1 = upper[at + 1], &d2 = lower[at], &d3 = lower[at + 1];
  float &d4 = upper[at + kFurther], &d5 = upper[at + kFurther + 1];
  float &d6 = lower[at + kFurther], &d7 = lower[at + kFurther + 1];
  if constexpr (kIsColumnMajorB) {
    asm("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
        "{%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3), "+f"(d4), "+f"(d5), "+f"(d6), "+f"(d7)
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
        "{%0,%1,%2,%3,%4,%5,%6,%7};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3), "+f"(d4), "+f"(d5), "+f"(d6), "+f"(d7)
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
  }
}

}  // namespace sdpa
