// Sums in global memory that several blocks add to.
#pragma once

namespace sdpa {

// Adds two or four floats to a place aligned to as many, where the chip can in one reduction. Both ways do the same;
// this is not a code path, so it need not be a template parameter.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kVectorReductions = true;
__device__ __forceinline__ void reduce(float* to, const float (&x)[2]) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x[0]), "f"(x[1]) : "memory");
}
__device__ __forceinline__ void reduce(float* to, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
#else
constexpr bool kVectorReductions = false;
template <int kCount>
__device__ __forceinline__ void reduce(float* to, const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) atomicAdd(to + i, x[i]);
}
#endif

}  // namespace sdpa
