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

// Dropout in the backward: which scores of a transposed 16 x 16 block (two accumulators, keys are the rows) are kept.
// kInOrder: the block's keys are 16 in a row from a multiple of 16 on. Otherwise they are in the order of RowRuns.
template <bool kInOrder>
struct KeptRows {
  uint32_t words[2][2];  // by the query's parity; then by the key's half if kInOrder, else by the query's

  // Of element i of accumulator n. `limit` is last_kept of below.
  __device__ __forceinline__ bool at(int n, int i, uint32_t limit) const {
    const uint32_t word = words[i % 2][kInOrder ? i / 2 : n];
    return ((kInOrder ? n : i / 2) == 0 ? word << 16 : word) <= limit;
  }
};

// A 16-bit number in the upper half of a word, whatever is below it, is below the threshold if the word is at most
// this. Threshold 0, which keeps nothing, would keep everything; but then `rescale` is 0.
__device__ __forceinline__ uint32_t last_kept(const Dropout& dropout) {
  return (dropout.threshold << 16) - 1;
}

// A lane has queries 2 * (lane % 4) and the next, and the same 8 further, whose numbers come from two draws, and half
// of the numbers of each; the other halves are those of one other lane, so each of the two draws once.
__device__ __forceinline__ KeptRows<true> kept_in_order(const Dropout& dropout, uint32_t batch_head, uint32_t block_row,
                                                        uint32_t block_col) {
  const uint32_t lane = threadIdx.x % 32, odd = lane / 4 % 2;  // odd key: upper halves, and the draw of the odd query
  const Philox8 x = dropout.draw(batch_head, block_row, block_col, Dropout::lane_of(lane % 4 * 2 + odd, lane / 4));
  const uint32_t own = odd ? 0x7632 : 0x5410, other = odd ? 0x5410 : 0x7632;
  KeptRows<true> kept;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t low = x.word[2 * half], high = x.word[2 * half + 1];
    const uint32_t mine = __byte_perm(low, high, own);
    const uint32_t given = __shfl_xor_sync(0xffffffffu, __byte_perm(low, high, other), 4);
    kept.words[0][half] = odd ? given : mine;
    kept.words[1][half] = odd ? mine : given;
  }
  return kept;
}

// The same for block m of a warp's keys in the order of RowRuns<kKeyBlocks>, `first_key` the warp's first key.
template <int kKeyBlocks>
__device__ __forceinline__ KeptRows<false> kept_rows(const Dropout& dropout, uint32_t batch_head, uint32_t block_row,
                                                     uint32_t first_key, int m) {
  static_assert(kKeyBlocks <= 2);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t key = first_key + lane / 4 * 2 * kKeyBlocks + 2 * m;
  const uint32_t upper = key / 8 % 2;  // the half of the block in which this lane's keys are
  const Philox8 x = dropout.draw(batch_head, block_row, key / 16, Dropout::lane_of(lane % 4 * 2 + upper, key % 16));
  KeptRows<false> kept;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t own = upper ? x.word[2 + n] : x.word[n];
    const uint32_t others = __shfl_xor_sync(0xffffffffu, upper ? x.word[n] : x.word[2 + n], 16 / kKeyBlocks);
    kept.words[0][n] = upper ? others : own;
    kept.words[1][n] = upper ? own : others;
  }
  return kept;
}

// The operand of P^T with what is dropped left out, from P^T, and dP^T with its share of dropout, in place: block m of
// a warp's keys and 16 queries. `first_key` is the warp's first.
struct DropoutPlace {
  uint32_t batch_head, block_row;
  int first_key, m;
};
template <class T, bool kHasMask, int kKeyBlocks>
__device__ __forceinline__ void drop(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4],
                                     float (&grad_left)[4], float (&grad_right)[4], const ForwardParams& p,
                                     const Dropout& dropout, const DropoutPlace& at) {
  const Dropout draw{static_cast<uint64_t>(*p.seed), dropout.threshold, dropout.rescale};
  const auto apply = [&](const auto& kept) {
    const uint32_t limit = last_kept(dropout);
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool keeps_left = kept.at(0, i, limit), keeps_right = kept.at(1, i, limit);
      x[0][i] = keeps_left ? left[i] : 0.f;
      x[1][i] = keeps_right ? right[i] : 0.f;
      grad_left[i] = keeps_left ? grad_left[i] * dropout.rescale : 0.f;
      grad_right[i] = keeps_right ? grad_right[i] * dropout.rescale : 0.f;
    }
    to_operand<T>(a, x[0], x[1]);
  };
  if constexpr (kHasMask) {
    apply(kept_rows<kKeyBlocks>(draw, at.batch_head, at.block_row, at.first_key, at.m));
  } else {
    apply(kept_in_order(draw, at.batch_head, at.block_row, at.first_key / 16 + at.m));
  }
}

}  // namespace sdpa
