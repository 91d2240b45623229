// What Hopper's kernels have in common.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../arch/mma.h"
#include "../arch/shared_memory.h"
#include "../arch/tensor_copy.h"
#include "../arch/wgmma.h"
#include "../attn/params.h"
#include "tile.cuh"

namespace sdpa {

// Describes an operand of T in boxes of box_rows rows. False if the chip does not take it.
template <class T>
bool describe_in_boxes(CUtensorMap& map, const Operand& x, int64_t batches, int64_t heads, int64_t rows, int64_t cols,
                       int box_rows) {
  return describe_tensor(map, x, batches, heads, rows, cols, box_rows, kBoxCols, std::is_same_v<T, __nv_bfloat16>);
}

// A ring's next place: its stage, and the parity of its barriers' phase.
template <int kStages>
struct RingPlace {
  uint32_t number = 0;
  __device__ __forceinline__ int stage() const { return number % kStages; }
  __device__ __forceinline__ int parity() const { return number / kStages % 2; }
};

// A warp's 16 rows, times `factors`, in whole chunks to rows row0, row0 + 1, ... of the head whose first row is at
// `target`.
template <class T, int kCols>
__device__ __forceinline__ void write_rows(const float (&values)[kCols][4], const float (&factors)[2], uint64_t target,
                                           int row_bytes, int row0, int rows, int cols) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + half * 8 + lane / 4;
    const uint64_t to = target + int64_t{row} * row_bytes;
#pragma unroll
    for (int n = 0; n < kCols; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack<T>(values[n + i][2 * half] * factors[half], values[n + i][2 * half + 1] * factors[half]);
      }
      exchange_in_quad(words);
      const int col = (n + lane % 4) * kChunkElements;
      if (row < rows && col < cols) store_global_16(to + col * 2, {words[0], words[1], words[2], words[3]});
    }
  }
}

}  // namespace sdpa
