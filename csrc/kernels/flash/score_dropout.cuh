// Which of a lane's scores dropout keeps. The numbers belong to places in the scores (see attn/dropout.h), and a lane
// has other places than those of one lane there, since the keys are in the order of score_mask.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../attn/dropout.h"

namespace sdpa {

// Dropout in the forward, keys in order: the numbers of one draw are those of a lane's share of a 16 x 16 block, the
// accumulators `left` and `right`. Zeroes what is dropped.
__device__ __forceinline__ void drop_block(float (&left)[4], float (&right)[4], const Dropout& dropout,
                                           uint32_t batch_head, uint32_t block_row, uint32_t block_col) {
  const Philox8 x = dropout.draw(batch_head, block_row, block_col, threadIdx.x % 32);
  // A number is kept below the threshold. In the upper half of a word it is compared with the lower half in place;
  // with a threshold of 0 nothing is dropped here, but `rescale` is 0.
  const uint32_t bound = (dropout.threshold << 16) - 1;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const uint32_t word = n % 2 == 0 ? x.word[n / 2] << 16 : x.word[n / 2];
    float& score = n < 4 ? left[n] : right[n - 4];
    score = word <= bound ? score : 0.f;
  }
}

// Dropout in the forward, keys in the order of ColumnRuns<64>: a lane has 16 neighbouring keys, one block column, for
// rows lane / 4 and the eighth after it. Bit 4 n + i says whether scores[n][i] is kept.
template <int kRowBlocks>
__device__ __forceinline__ void kept_columns(uint32_t (&kept)[kRowBlocks], const Dropout& dropout, uint32_t batch_head,
                                             uint32_t block_row, uint32_t block_col) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) kept[m] = 0;

#pragma unroll 1
  for (uint32_t pair = 0; pair < 4; ++pair) {  // columns 2 pair and the next, and those 8 further right
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      const Philox8 x = dropout.draw(batch_head, block_row + m, block_col, threadIdx.x % 32 / 4 * 4 + pair);
      uint32_t bits = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) bits |= x.number(n) < dropout.threshold ? 1u << (n % 4 + n / 4 * 16) : 0u;
      kept[m] |= bits << 4 * pair;
    }
  }
}

// Dropout in the backward, keys in the order of RowRuns<kKeyBlocks>: block m of a warp's keys, `first_key` its first
// key, and 16 queries. Bit 4 n + i says whether element i of the n-th of their two accumulators is kept.
//
// A lane has two queries (2 * (lane % 4) and the next, and the same 8 further), whose numbers come from two draws, and
// half of the numbers of each; the other halves are those of one other lane, so each of the two draws once.
template <int kKeyBlocks>
__device__ __forceinline__ uint32_t kept_rows(const Dropout& dropout, uint32_t batch_head, uint32_t block_row,
                                              uint32_t first_key, int m) {
  static_assert(kKeyBlocks <= 2);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t key = first_key + lane / 4 * 2 * kKeyBlocks + 2 * m;
  const uint32_t upper = key / 8 % 2;  // the half of the block in which this lane's keys are
  const Philox8 x = dropout.draw(batch_head, block_row, key / 16, Dropout::lane_of(lane % 4 * 2 + upper, key % 16));
  uint32_t words[2][2];  // query, accumulator
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t own = upper ? x.word[2 + n] : x.word[n];
    const uint32_t others = __shfl_xor_sync(0xffffffffu, upper ? x.word[n] : x.word[2 + n], 16 / kKeyBlocks);
    words[0][n] = upper ? others : own;
    words[1][n] = upper ? own : others;
  }
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t number = words[i % 2][n] >> i / 2 * 16 & 0xffffu;
      kept |= number < dropout.threshold ? 1u << (4 * n + i) : 0u;
    }
  }
  return kept;
}

// Zeroes what is dropped in operand `a` of 16 x 16 P^T. Bits as kept_rows has them; element 2 r + h is half h of a[r].
template <class T>
__device__ __forceinline__ void drop(uint32_t (&a)[4], uint32_t kept) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t low = kept >> 2 * r & 1 ? 0xffffu : 0u, high = kept >> (2 * r + 1) & 1 ? 0xffff0000u : 0u;
    a[r] &= low | high;
  }
}

}  // namespace sdpa
