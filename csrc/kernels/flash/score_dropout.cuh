// Which of a lane's scores dropout drops. The numbers belong to places in the scores (see attn/dropout.h). With keys in
// order a lane's accumulators of a 32 x 32 block are those of two draws, whatever their rows are; with keys in the
// orders of score_mask.cuh lanes share draws and pass on what is others'.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../arch/mma.h"
#include "../attn/dropout.h"

namespace sdpa {

// An order of keys (see InOrder): neighbours in a tile are 8 keys apart, and so of one draw.
struct PairedOctets {
  static __host__ __device__ constexpr int key(int row) { return (row & ~9) | (row & 1) << 3 | (row >> 3 & 1); }
};

// Keys in order: the numbers of a lane's accumulators of a 32 x 32 block. kTransposed: their rows are keys, not
// queries. kPacked: what is dropped, in 2 registers rather than 8, for an instruction a score. kWideProducts: see
// Philox::run.
template <bool kTransposed, bool kPacked, bool kWideProducts = false>
struct DroppedBlock {
  // For each 16 columns: by the parity of the column, then the half of the rows. Packed: all in one, the first on top.
  uint32_t words[2][kPacked ? 1 : 4];

  // Of this lane's even columns, and what changes in it for the n-th.
  static __device__ __forceinline__ uint32_t column_word(uint32_t block_key) {
    const uint32_t lane = threadIdx.x % 32;
    return block_key * 64 + (kTransposed ? lane % 4 * 16 + lane / 4 : lane * 2);
  }
  static __device__ __forceinline__ constexpr uint32_t column(uint32_t n) { return kTransposed ? n * 8 : n; }

  // A warp that has only half of the rows or columns takes them from the second half of the block if lower_rows or
  // right_columns says so, and drops in the first.
  __device__ __forceinline__ void draw(const Dropout& dropout, uint32_t batch_head, uint32_t block_query,
                                       uint32_t block_key, bool lower_rows = false, bool right_columns = false) {
    const uint32_t word = column_word(block_key);
    const auto numbers = [&](uint32_t n) {
      return dropout.numbers<kWideProducts>(batch_head, block_query, word ^ column(n));
    };
    draw(dropout, numbers, lower_rows, right_columns);
  }
  // numbers(n): of the lane's n-th column.
  template <class Numbers>
  __device__ __forceinline__ void draw(const Dropout& dropout, Numbers numbers, bool lower_rows, bool right_columns) {
    uint32_t drawn[2][4];
#pragma unroll
    for (uint32_t n = 0; n < 2; ++n) {
      const Philox x = numbers(n);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int col = 0; col < 2; ++col) drawn[col][2 * n + row] = x.word[kTransposed ? 2 * col + row : 2 * row + col];
      }
    }
    if (lower_rows) {
#pragma unroll
      for (auto& word : drawn) word[0] = word[1], word[2] = word[3];
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) drawn[0][n] = right_columns ? drawn[1][n] : drawn[0][n];
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      if constexpr (kPacked) {
        uint32_t x = dropout.below_each(drawn[col][0]);
        x = (x & 0x80808080u) | (dropout.below_each(drawn[col][1]) & 0x7f7f7f7fu);
        x = (x & 0xc0c0c0c0u) | (dropout.below_each(drawn[col][2]) & 0x3f3f3f3fu);
        x = (x & 0xe0e0e0e0u) | (dropout.below_each(drawn[col][3]) & 0x1f1f1f1fu);
        words[col][0] = x ^ dropout.keeps;
      } else {
#pragma unroll
        for (int n = 0; n < 4; ++n) words[col][n] = drawn[col][n];
      }
    }
  }

  // Of operand `a` of the 16 x 16 block (row, col) of the four: makes 0 of what is dropped of P,
  __device__ __forceinline__ void drop(uint32_t (&a)[4], const Dropout& dropout, int row, int col) const {
    static_assert(!kPacked && !kTransposed);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t bytes = i << 4 | (i + 3) % 4;  // of a word: the score's own above the one before
      uint32_t pair;
      asm("prmt.b32 %0, %1, %2, %3;"
          : "=r"(pair)
          : "r"(words[col][row]), "r"(words[col][2 + row]), "r"(bytes * 0x101 + 0x4400));
      a[i] &= ~(dropout.below(pair) ^ dropout.keeps);
    }
  }
  // the same with keys in the order of PairedOctets, for fewer instructions,
  __device__ __forceinline__ void drop_paired(uint32_t (&a)[4], const Dropout& dropout, int row, int col) const {
    static_assert(!kPacked && !kTransposed);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[col][i / 2 * 2 + row];
      a[i] &= ~(dropout.below(i % 2 == 0 ? Dropout::rotate(word) : word) ^ dropout.keeps);
    }
  }
  // and, in float32, of what the operand is made of.
  __device__ __forceinline__ void drop(float (&left)[4], float (&right)[4], const Dropout& dropout, int row,
                                       int col) const {
    if constexpr (kPacked) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = (i < 4 ? left : right)[i % 4];
        const uint32_t byte = kTransposed ? i / 4 + i / 2 % 2 * 2 : i / 2, place = row + i % 2 * 2;
        if constexpr (kIsBeforeSm90) {
          uint32_t mask;  // eight copies of a byte's top bit
          asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(words[col][0] << place), "r"((8 | byte) * 0x1111));
          x = __uint_as_float(__float_as_uint(x) & ~mask);
        } else {
          const uint32_t lowered = words[col][0] >> 1;
          x = lowered & (1u << (8 * byte + 6 - place)) ? 0.f : x;
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t word = words[col][2 * n + row];
        dropout.drop(left[n], kTransposed ? left[2 + n] : right[n], Dropout::rotate(word));
        dropout.drop(kTransposed ? right[n] : left[2 + n], right[2 + n], word);
      }
    }
  }
};

// Forward, keys in the order of ColumnRuns<64>: a lane has 16 neighbouring keys from `first_key` on, half of a block's
// columns, and its neighbour has the other half. So each draws for four of a row's eight sets of columns, and they
// swap. Bit 4 n + i of dropped[m] is for element i of accumulator n; `first_row` is the warp's.
template <int kRowBlocks>
__device__ __forceinline__ void dropped_columns(uint32_t (&dropped)[kRowBlocks], const Dropout& dropout,
                                                uint32_t batch_head, uint32_t first_row, uint32_t first_key) {
  static_assert(kRowBlocks <= 2);
  unsigned thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const uint32_t is_right = first_key / 16 % 2;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) dropped[m] = 0;

#pragma unroll 1
  for (uint32_t n = 0; n < 4; ++n) {
    const uint32_t own = 4 * is_right + n, place = 2 * own - own % 2;
    const Philox x =
        dropout.numbers(batch_head, first_row / 32, Dropout::column_word(first_key / 32, thread % 32 / 4, own));
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      const bool is_lower = kRowBlocks == 2 ? m == 1 : first_row / 16 % 2 == 1;
      const uint32_t left = is_lower ? x.word[2] : x.word[0], right = is_lower ? x.word[3] : x.word[1];
      const uint32_t given = __shfl_xor_sync(0xffffffffu, is_right ? left : right, 1);
      const auto add = [&](uint32_t word, uint32_t place) {
        word = dropout.below_each(word);
        dropped[m] |= ((word & 0x00010001u) | (word >> 6 & 0x00040004u)) << place;
      };
      add(is_right ? right : left, place);
      add(given, place ^ 8);
    }
  }
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) dropped[m] ^= dropout.keeps;
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
  using Block = DroppedBlock<true, kPacked, true>;

  Block block;    // keys in order: of 32 queries
  uint32_t bits;  // keys in the order of RowRuns: of 16

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

  // The same from what the head's draws have in common.
  __device__ __forceinline__ void draw(const Dropout& dropout, const DrawsOfHead& draws, uint32_t query,
                                       uint32_t first_key, int number) {
    static_assert(!kHasMask && kKeyBlocks == 2 && kQueries == 32);
    const uint32_t word = Block::column_word(first_key / 32);
    const auto numbers = [&](uint32_t n) { return draws.numbers<true>(query / 32, word ^ Block::column(n)); };
    if (number % 2 == 0) block.draw(dropout, numbers, false, false);
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
                                           const float2 (&deltas)[2], const Dropout& dropout, int m, int number) const {
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[0][i] = left[i], x[1][i] = right[i];
    block.drop(x[0], x[1], dropout, m, kQueries < 32 ? 0 : number % 2);
    to_operand<T>(a, x[0], x[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = fmaf(x[0][i], grad_left[i], -(left[i] * (i % 2 == 0 ? deltas[0].x : deltas[0].y)));
      right[i] = fmaf(x[1][i], grad_right[i], -(right[i] * (i % 2 == 0 ? deltas[1].x : deltas[1].y)));
    }
  }
};

}  // namespace sdpa
