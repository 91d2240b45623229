// Which of a lane's scores dropout drops. The numbers belong to places in the scores (see attn/dropout.h). With keys in
// order a lane's accumulators of a 32 x 32 block are those of two draws, whatever their rows are; with keys in the
// orders of score_mask.cuh lanes share draws and pass on what is others'.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/mma.h"
#include "../attn/dropout.h"

namespace sdpa {

// Keys in order: what is dropped of a lane's accumulators of a 32 x 32 block. kTransposed: their rows are keys, not
// queries. kPacked: in 2 registers rather than 8, for half an instruction a score. kWideProducts: see Dropout::draw.
template <bool kTransposed, bool kPacked, bool kWideProducts = false>
struct DroppedBlock {
  // For each 16 columns: by the parity of the column, then the half of the rows. Packed: all in one, the first on top.
  uint32_t bits[2][kPacked ? 1 : 4];

  // A warp that has only half of the rows or columns takes them from the second half of the block if lower_rows or
  // right_columns says so, and drops in the first.
  __device__ __forceinline__ void draw(const Dropout& dropout, uint32_t batch_head, uint32_t block_query,
                                       uint32_t block_key, bool lower_rows = false, bool right_columns = false) {
    const uint32_t row8 = threadIdx.x % 32 / 4, col8 = threadIdx.x % 4 * 2;
    uint32_t words[2][4];
#pragma unroll
    for (uint32_t n = 0; n < 2; ++n) {
      const Dropped16 x = dropout.draw<kWideProducts>(batch_head, block_query, block_key, kTransposed ? col8 + n : row8,
                                                      kTransposed ? row8 : col8 + n);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int col = 0; col < 2; ++col) {
          words[col][2 * n + row] = kTransposed ? x.word_of(col, row) : x.word_of(row, col);
        }
      }
    }
    if (lower_rows) {
#pragma unroll
      for (auto& word : words) word[0] = word[1], word[2] = word[3];
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) words[0][n] = right_columns ? words[1][n] : words[0][n];
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      if constexpr (kPacked) {
        uint32_t x = words[col][0];
        x = (x & 0x80808080u) | (words[col][1] >> 1 & 0x7f7f7f7fu);
        x = (x & 0xc0c0c0c0u) | (words[col][2] >> 2 & 0x3f3f3f3fu);
        bits[col][0] = (x & 0xe0e0e0e0u) | (words[col][3] >> 3 & 0x1f1f1f1fu);
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) bits[col][n] = words[col][n];
      }
    }
  }

  // Of operand `a` of the 16 x 16 block (row, col) of the four: makes 0 of what is dropped of P,
  __device__ __forceinline__ void drop(uint32_t (&a)[4], int row, int col) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = byte_of(i), low = 8 | byte, high = 12 | byte;
      a[i] &= ~spread(row, col, low * 0x11 | high * 0x1100);
    }
  }
  // and, in float32, of what the operand is made of.
  __device__ __forceinline__ void drop(float (&left)[4], float (&right)[4], int row, int col) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& x = (i < 4 ? left : right)[i % 4];
      if constexpr (kPacked && !kIsBeforeSm90) {
        const uint32_t lowered = bits[col][0] >> 1;
        x = lowered & (1u << (8 * byte_of(i / 2) + 6 - row - i % 2 * 2)) ? 0.f : x;
        continue;
      }
      x = __uint_as_float(__float_as_uint(x) & ~spread(row, col, (8 | byte_of(i / 2) | i % 2 * 4) * 0x1111));
    }
  }

 private:
  // The byte that has register i of an operand.
  static __device__ __forceinline__ constexpr uint32_t byte_of(int i) { return kTransposed ? i / 2 + i % 2 * 2 : i; }
  // Bytes of the even column's word, and from 4 on of the odd one's; 8 more: eight copies of a byte's top bit.
  __device__ __forceinline__ uint32_t spread(int row, int col, uint32_t bytes) const {
    const uint32_t even = kPacked ? bits[col][0] << row : bits[col][row];
    const uint32_t odd = kPacked ? bits[col][0] << (2 + row) : bits[col][kPacked ? 0 : 2 + row];
    uint32_t mask;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(mask) : "r"(even), "r"(odd), "r"(bytes));
    return mask;
  }
};

// Forward, keys in the order of ColumnRuns<64>: a lane has 16 neighbouring keys from `first_key` on, half of a block's
// columns, and its neighbour has the other half. So each draws for four of a row's eight sets of columns, and they
// swap. Bit 4 n + i of dropped[m] is for element i of accumulator n; `first_row` is the warp's.
template <int kRowBlocks>
__device__ __forceinline__ void dropped_columns(uint32_t (&dropped)[kRowBlocks], const Dropout& dropout,
                                                uint32_t batch_head, uint32_t first_row, uint32_t first_key) {
  static_assert(kRowBlocks <= 2);
  const uint32_t is_right = first_key / 16 % 2;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) dropped[m] = 0;

#pragma unroll 1
  for (uint32_t n = 0; n < 4; ++n) {
    const uint32_t own = 4 * is_right + n, others = own ^ 4;
    const Dropped16 x = dropout.draw(batch_head, first_row / 32, first_key / 32, threadIdx.x % 32 / 4, own);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      const bool is_lower = kRowBlocks == 2 ? m == 1 : first_row / 16 % 2 == 1;
      const uint32_t left = is_lower ? x.word[2] : x.word[0], right = is_lower ? x.word[3] : x.word[1];
      const uint32_t given = __shfl_xor_sync(0xffffffffu, is_right ? left : right, 1);
      const auto add = [&](uint32_t word, uint32_t col8) {
        dropped[m] |= ((word >> 7 & 0x00010001u) | (word >> 13 & 0x00040004u)) << (2 * col8 - col8 % 2);
      };
      add(is_right ? right : left, own);
      add(given, others);
    }
  }
}

// Backward, keys in the order of RowRuns<kKeyBlocks>, 16 queries: a lane has 2 kKeyBlocks neighbouring keys, all in one
// of the four octets of a block's columns, so it draws for one of them, and other lanes for the others. Bit 8 n + 4 m +
// i of the result is for element i of accumulator n of the 16 keys m; `first_key` is the warp's.
template <int kKeyBlocks>
__device__ __forceinline__ uint32_t dropped_rows(const Dropout& dropout, uint32_t batch_head, uint32_t first_query,
                                                 uint32_t first_key) {
  constexpr uint32_t kKeys = 2 * kKeyBlocks, kApart = 32 / kKeys;  // between lanes that share draws
  static_assert(kKeyBlocks <= 2);
  const uint32_t lane = threadIdx.x % 32, key = first_key + lane / 4 * kKeys, is_lower = first_query / 16 % 2;
  uint32_t drawn = 0;  // bit: 16 for the octet's parity, 8 for the query's half of 16, 4 for the octet's half of 32
#pragma unroll 1
  for (uint32_t n = 0; n < 2; ++n) {
    const Dropped16 x =
        dropout.draw(batch_head, first_query / 32, first_key / 32, lane % 4 * 2 + n, (key + lane / kApart) % 8);
    drawn |= ((is_lower ? x.word[2] : x.word[0]) >> 7 & 0x01010101u) << n;
    drawn |= ((is_lower ? x.word[3] : x.word[1]) >> 7 & 0x01010101u) << (4 + n);
  }
  const uint32_t own = key / 8 % 2 * 16 + key / 16 % 2 * 4;
  uint32_t dropped = 0;
#pragma unroll
  for (uint32_t n = 0; n < kKeys; ++n) {
    dropped |= (__shfl_sync(0xffffffffu, drawn, lane % kApart + n * kApart) >> own & 0x0303u) << 2 * n;
  }
  return dropped;
}

// Backward: P^T and dS^T of a warp's keys with their share of dropout, for kQueries queries, 16 by 16.
template <class T, bool kHasMask, int kKeyBlocks, int kQueries, bool kPacked>
struct DroppedKeys {
  DroppedBlock<true, kPacked, true> block;  // keys in order: of 32 queries
  uint32_t bits;                            // keys in the order of RowRuns: of 16

  // To be called before `drop` or `gradient` for the number-th 16 queries, from `query` on. The keys begin with the
  // warp's first.
  __device__ __forceinline__ void draw(const Dropout& dropout, uint32_t batch_head, int query, int first_key,
                                       int number) {
    if constexpr (kHasMask) {
      bits = dropped_rows<kKeyBlocks>(dropout, batch_head, query, first_key);
    } else if (kQueries < 32 || number % 2 == 0) {
      block.draw(dropout, batch_head, query / 32, first_key / 32, kKeyBlocks == 1 && first_key / 16 % 2 == 1,
                 kQueries < 32 && query / 16 % 2 == 1);
    }
  }

  // Of the m-th 16 keys and the number-th 16 queries: `a` becomes the operand of P^T, and dP^T gets its share.
  __device__ __forceinline__ void drop(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4],
                                       float (&grad_left)[4], float (&grad_right)[4], float rescale, int m) const {
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool drops_left = bits >> (4 * m + i) & 1, drops_right = bits >> (8 + 4 * m + i) & 1;
      x[0][i] = drops_left ? 0.f : left[i];
      x[1][i] = drops_right ? 0.f : right[i];
      grad_left[i] = drops_left ? 0.f : grad_left[i] * rescale;
      grad_right[i] = drops_right ? 0.f : grad_right[i] * rescale;
    }
    to_operand<T>(a, x[0], x[1]);
  }

  // The same with keys in order, for fewer instructions: P^T is already rescaled and delta the other way, so that dS^T,
  // which takes the place of P^T, is (rescaled P^T, with what is dropped left out) * dP^T - rescaled P^T * delta.
  // deltas[n]: of the even and the odd query in accumulator n.
  __device__ __forceinline__ void gradient(uint32_t (&a)[4], float (&left)[4], float (&right)[4],
                                           const float (&grad_left)[4], const float (&grad_right)[4],
                                           const float2 (&deltas)[2], int m, int number) const {
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[0][i] = left[i], x[1][i] = right[i];
    block.drop(x[0], x[1], m, kQueries < 32 ? 0 : number % 2);
    to_operand<T>(a, x[0], x[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = fmaf(x[0][i], grad_left[i], -(left[i] * (i % 2 == 0 ? deltas[0].x : deltas[0].y)));
      right[i] = fmaf(x[1][i], grad_right[i], -(right[i] * (i % 2 == 0 ? deltas[1].x : deltas[1].y)));
    }
  }
};

}  // namespace sdpa
