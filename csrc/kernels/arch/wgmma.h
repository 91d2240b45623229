// Products of a warpgroup (sm90a): 64 rows by N columns, 16 deep, asynchronous. The second operand, and the first if it
// is not in registers, lie in shared memory in boxes as copy_box lays them: rows of 128 bytes, swizzled.
//
// A lane's accumulators and its registers of the first operand are those of mma.m16n8k16 (see mma.h), side by side; a
// warp has 16 of the 64 rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace sdpa {

constexpr int kBoxRowBytes = 128, kBoxCols = 64;

// Where an operand lies: its address, and how far apart its boxes are, if a product reads more than one.
__device__ __forceinline__ uint64_t operand_at(uint32_t address, int box_bytes = 0) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{8 * kBoxRowBytes / 16} << 32;
  return kSwizzle128 | kEightRows | static_cast<uint64_t>(box_bytes / 16) << 16 | (address & 0x3ffff) >> 4;
}

// Around the products of a warpgroup: what was written to their registers comes before them,
__device__ __forceinline__ void begin_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// those so far are a group,
__device__ __forceinline__ void end_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// and all groups but the last kLeft are complete.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}
// What this thread wrote to shared memory is there for products that begin after a barrier.
__device__ __forceinline__ void fence_shared_for_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Keeps what uses these registers where it is written, before or after the products that are at work on them.
template <int kCols>
__device__ __forceinline__ void pin(float (&values)[kCols][4]) {
#pragma unroll
  for (int i = 0; i < kCols * 4; ++i) asm volatile("" : "+f"(values[i / 4][i % 4])::"memory");
}

// A multiprocessor's registers, from warpgroups that want few to those that want many.
template <int kRegisters>
__device__ __forceinline__ void want_fewer_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void want_more_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// The instructions, by N.
template <class T, int kCols>
struct WarpgroupMma;
#define SDPA_WARPGROUP_MMA(T, NAME, N)                                                                          \
  template <>                                                                                                   \
  struct WarpgroupMma<T, N> {                                                                                   \
    template <cute::SM90::GMMA::Major kA, cute::SM90::GMMA::Major kB>                                           \
    using FromShared = cute::SM90::GMMA::MMA_64x##N##x16_##NAME##_SS<kA, kB>;                                   \
    using Rows = FromShared<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;                            \
    using Transposed = FromShared<cute::SM90::GMMA::Major::MN, cute::SM90::GMMA::Major::MN>;                    \
    using Cols =                                                                                                \
        cute::SM90::GMMA::MMA_64x##N##x16_##NAME##_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>; \
  };
#define SDPA_WARPGROUP_MMAS(N) \
  SDPA_WARPGROUP_MMA(__half, F32F16F16, N) SDPA_WARPGROUP_MMA(__nv_bfloat16, F32BF16BF16, N)
SDPA_WARPGROUP_MMAS(64)
SDPA_WARPGROUP_MMAS(112)
SDPA_WARPGROUP_MMAS(128)
SDPA_WARPGROUP_MMAS(192)
SDPA_WARPGROUP_MMAS(256)
#undef SDPA_WARPGROUP_MMAS
#undef SDPA_WARPGROUP_MMA

namespace detail {
template <class Instruction, int kCols, size_t... I, class... Operands>
__device__ __forceinline__ void multiply(float (&sum)[kCols][4], std::index_sequence<I...>, bool adds,
                                         const Operands&... operands) {
  Instruction::fma(operands..., sum[I / 4][I % 4]...,
                   adds ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
}  // namespace detail

// sum = A B^T, where both A and B are rows in shared memory: 64 of A, kCols * 8 of B. kSteps: of 16 columns of theirs.
template <class T, int kSteps, int kCols>
__device__ __forceinline__ void multiply_rows(float (&sum)[kCols][4], uint32_t a, int a_box_bytes, uint32_t b,
                                              int b_box_bytes) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int in_box = k % 4 * 32, box = k / 4;
    detail::multiply<typename WarpgroupMma<T, kCols * 8>::Rows>(sum, std::make_index_sequence<kCols * 4>{}, k > 0,
                                                                operand_at(a + box * a_box_bytes + in_box),
                                                                operand_at(b + box * b_box_bytes + in_box));
  }
}
// sum += A B, where A is in registers, 16 columns a step, and B's rows, as many, in shared memory.
template <class T, int kBoxBytes, int kSteps, int kCols>
__device__ __forceinline__ void multiply_cols(float (&sum)[kCols][4], const uint32_t (&a)[kSteps][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    detail::multiply<typename WarpgroupMma<T, kCols * 8>::Cols>(sum, std::make_index_sequence<kCols * 4>{}, true,
                                                                a[k][0], a[k][1], a[k][2], a[k][3],
                                                                operand_at(b + k * 16 * kBoxRowBytes, kBoxBytes));
  }
}

// sum = A^T B, where both are boxes of 64 columns in shared memory, of 16 rows a step.
template <class T, int kSteps, int kCols>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kCols][4], uint32_t a, uint32_t b) {
  static_assert(kCols * 8 == kBoxCols);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    detail::multiply<typename WarpgroupMma<T, kCols * 8>::Transposed>(sum, std::make_index_sequence<kCols * 4>{}, k > 0,
                                                                      operand_at(a + k * 16 * kBoxRowBytes),
                                                                      operand_at(b + k * 16 * kBoxRowBytes));
  }
}

}  // namespace sdpa
