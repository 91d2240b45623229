// What the float32 kernels for head dims over 128 add to pair_tile.h: tiles of 256 columns, and two warps that share
// rows. Each of them has half of a tile's keys in products along the columns, and of results every other 32 columns.
#pragma once

#include "../arch/barrier.h"
#include "pair_tile.h"

namespace sdpa::efficient {

constexpr int kWideColumns = 256;  // of a tile

// What one of two warps owns: scores as ever, and of 256 columns of results blocks of 32 from its own first on.
template <int kRowBlocks, int kColumns>
struct HalfTile : WarpTile<kRowBlocks, kColumns, kWideColumns / 2> {
  __device__ static int result_column(int c) { return c / 8 * 64 + static_cast<int>(threadIdx.x % 4 * 8) + c % 8; }
};

// Two warps that share rows, and this one's part. maxima: their place in shared memory for two sets of both warps'
// row maxima.
template <class Warp>
struct SharedRows {
  static constexpr int kSetBytes = 2 * Warp::kRowBlocks * 16 * 4, kBytes = 2 * kSetBytes;
  int barrier, half;
  uint32_t maxima;

  __device__ __forceinline__ SharedRows set(int n) const { return {barrier, half, maxima + n * kSetBytes}; }
  __device__ __forceinline__ uint32_t place(int half, int i) const {
    return maxima + (half * Warp::kRowBlocks * 16 + Warp::row(i)) * 4;
  }
  __device__ __forceinline__ void put(int i, float x) const { store_shared_4(place(half, i), __float_as_uint(x)); }
  __device__ __forceinline__ float get(int i) const { return load_shared_4(place(half ^ 1, i)); }
  __device__ __forceinline__ bool any(bool x) const { return sync_threads_or<64>(barrier, x) || kForRacecheck; }
  // Calls use(i, x) with what the other warp passed as x[i], which a row's four lanes have alike.
  template <class F>
  __device__ __forceinline__ void exchange(const float (&x)[Warp::kRowsOwned], F use) const {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      if (threadIdx.x % 4 == 0) put(i, x[i]);
    }
    sync_threads<64>(barrier);
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) use(i, get(i));
  }
  __device__ __forceinline__ void find_row_max(float (&x)[Warp::kRowsOwned]) const {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) x[i] = Warp::row_max(x[i]);
    exchange(x, [&](int i, float other) { x[i] = fmaxf(x[i], other); });
  }
  // Of two kinds of scores at once.
  __device__ __forceinline__ void find_row_max(float (&x)[2][Warp::kRowsOwned]) const {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      x[0][i] = Warp::row_max(x[0][i]);
      x[1][i] = Warp::row_max(x[1][i]);
      if (threadIdx.x % 4 == 0) set(1).put(i, x[1][i]);
    }
    exchange(x[0], [&](int i, float other) {
      x[0][i] = fmaxf(x[0][i], other);
      x[1][i] = fmaxf(x[1][i], set(1).get(i));
    });
  }
};

// A block of a tile as operands, from what block_address gives for its first part.
template <bool kSplit, class Tile>
__device__ __forceinline__ void load_block(HalfPair<kSplit, 4>& x, uint32_t address) {
  ldmatrix(x.big, address);
  if constexpr (kSplit) ldmatrix(x.small, address + Tile::Part::kBytes);
}
template <bool kSplit, class Tile>
__device__ __forceinline__ void load_block_transposed(HalfPair<kSplit, 4>& x, uint32_t address) {
  ldmatrix_transposed(x.big, address);
  if constexpr (kSplit) ldmatrix_transposed(x.small, address + Tile::Part::kBytes);
}

// As multiply_scores, of tiles with any number of columns: those of 128 are summed up by themselves, as sum_chunks
// does, so that all kernels come to the same bits.
template <bool kSplit, bool kIsTransposed, class Warp, class A, class B>
__device__ __forceinline__ void multiply_wide_scores(Scores<Warp>& score, const A& a_tile, int a_block, int a_number,
                                                     const B& b_tile, int b_block, int b_number, int depth) {
  constexpr int kRowBytes = A::Part::kRowBytes, kTogether = 64, kChunk = 128, kPairs = Warp::kColumns / 16;
  static_assert(A::kCols == B::kCols && A::kGroups >= 8);
  const LaneOffset lane = A::lane_offset();
  const uint32_t a_base = a_tile.big.base + lane.rows_first + a_block * 16 * kRowBytes;
  const uint32_t b_base = b_tile.big.base + lane.cols_first + b_block * 16 * kRowBytes;
  Scores<Warp> part = {};
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] = 0.f;
  }
#pragma unroll 1
  for (int first = 0; first < depth; first += kTogether) {
    HalfPairSum sum[kPairs][Warp::kRowBlocks][2];
    const uint32_t a_first = a_base ^ first, b_first = b_base ^ first;
#pragma unroll
    for (int step = 0; step < kTogether / 16; ++step) {
      const uint32_t column = A::column_block(step) * 32;
      HalfPair<kSplit, 4> a[Warp::kRowBlocks];
#pragma unroll
      for (int m = 0; m < Warp::kRowBlocks; ++m) {
        load_block<kSplit, A>(a[m], (a_first ^ column) + m * 16 * kRowBytes);
      }
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        HalfPair<kSplit, 4> b;
        load_block<kSplit, B>(b, (b_first ^ column) + n * 16 * kRowBytes);
        multiply_add<kIsTransposed>(sum[n], a, b, step == 0);
      }
    }
    const bool is_new = first % kChunk == 0;
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        const float x = sum[j / 4][i / 2][j / 2 % 2].template value<kSplit>(i % 2 * 2 + j % 2);
        if (is_new) score[i][j] += part[i][j];
        part[i][j] = is_new ? x : part[i][j] + x;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] += part[i][j];
  }
  apply_factors<Warp>(score, a_tile, a_block, a_number, b_tile, b_block, b_number);
}

// One warp's part of results = scores times the 32 rows of a tile, of which rows 16 * half on are to be multiplied by
// `own`, the others by `other`; columns as HalfTile has them. Columns are done 16 at a time, those beyond `width` are
// skipped (see multiply_result). kAccumulates: the sums start from what start(i, c) gives.
template <bool kSplit, bool kAccumulates, class Warp, class Tile, class Start, class F>
__device__ __forceinline__ void multiply_half_result(const HalfPair<kSplit, 4> (&own)[Warp::kRowBlocks],
                                                     const HalfPair<kSplit, 4> (&other)[Warp::kRowBlocks],
                                                     const Tile& rows, int half, int width, Start start, F use) {
  static_assert(Tile::kRows == 32 && Tile::kCols == kWideColumns && !(kAccumulates && kSplit));
  constexpr int kBlockBytes = 16 * Tile::Part::kRowBytes;
  const uint32_t base = (rows.big.base + Tile::lane_offset().rows_first) ^ half * 32;
  const uint32_t own_base = base + half * kBlockBytes, other_base = base + (half ^ 1) * kBlockBytes;
  width -= 32 * half;
  constexpr int kTogether = Warp::kRowBlocks == 1 ? 2 : 1;  // steps of 16 columns: sums enough not to wait for
#pragma unroll
  for (int step = 0; step < Warp::kWidth / 16; step += kTogether) {
    asm volatile("" : "+r"(width));
    if (step / 2 * 64 >= width) return;
    const auto result = [&](int s, int n, int i) { return (step + s) / 2 * 8 + n * 4 + (step + s) % 2 * 2 + i % 2; };
    HalfPairSum sum[kTogether][Warp::kRowBlocks][2];
    const auto each = [&](auto f) {
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
#pragma unroll
        for (int m = 0; m < Warp::kRowBlocks; ++m) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f(sum[s][m][n], 2 * m + i / 2, result(s, n, i), i);
          }
        }
      }
    };
    if constexpr (kAccumulates) each([&](HalfPairSum& x, int row, int c, int i) { x.big[i] = start(row, c); });
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        const uint32_t column = Tile::column_block(2 * (step / 2 * 2) + (step + s) % 2) * 32;
        HalfPair<kSplit, 4> b;
        load_block_transposed<kSplit, Tile>(b, (k == 0 ? own_base : other_base) ^ column);
        multiply_add(sum[s], k == 0 ? own : other, b, k == 0 && !kAccumulates);
      }
    }
    each([&](HalfPairSum& x, int row, int c, int i) { use(row, c, x.template value<kSplit>(i)); });
  }
}

}  // namespace sdpa::efficient
