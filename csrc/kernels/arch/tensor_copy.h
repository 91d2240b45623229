// Boxes of a tensor copied to shared memory by one instruction of one thread (sm90 and newer), and what the chip wants
// to know of the tensor for that.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../attn/launch.h"
#include "../attn/params.h"

namespace sdpa {

// Of a block. Chips that have less have no such copies, or are not asked for them.
constexpr int kSm90SharedBytes = 227 * 1024;

// Describes `rows` x `cols` of 16-bit elements of each (batch, head) of x, in boxes of box_rows x box_cols, which is 32
// or 64. In shared memory a box's rows follow each other, swizzled as those of a SharedTile. False if the chip does not
// take such a tensor.
template <class Unused = void>
bool describe_tensor(CUtensorMap& map, const Operand& x, int64_t batches, int64_t heads, int64_t rows, int64_t cols,
                     int box_rows, int box_cols, bool is_bfloat16) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batches)};
  cuuint64_t strides[3];  // bytes
  for (int d = 0; d < 3; ++d) {
    // Where there is one of a kind its stride is never used, but has to be one that the driver takes.
    strides[d] = sizes[d + 1] == 1 ? 16 : static_cast<cuuint64_t>(x.stride[2 - d]) * 2;
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(&map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, x.data,
                sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                box_cols == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The box that begins at (row, col) to shared memory; what lies outside the tensor becomes zero. `barrier` counts its
// bytes, of which expect_bytes has told it.
__device__ __forceinline__ void copy_box(uint32_t destination, const CUtensorMap& map, int col, int row, int head,
                                         int batch, uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(destination),
      "l"(&map), "r"(col), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
#endif
}
// Arrives, too.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier),
               "r"(bytes)
               : "memory");
#endif
}
// Barriers that were initialised before are there for copy_box.
__device__ __forceinline__ void fence_barrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

}  // namespace sdpa
