// Tiles of float32 in shared memory, and products of them on tensor cores (arch/mma_tf32.h): what the float32 kernels
// for sm80 and newer are made of. Operands are taken apart into TF32 parts after they are read from shared memory.
// (Doing so once for all warps, in a second tile, was no faster.)
#pragma once

#include "../arch/mma_tf32.h"
#include "../arch/shared_memory.h"
#include "tile.h"

namespace sdpa::efficient {

// Whether these kernels are the ones for a code path and type.
template <class Arch, class T>
constexpr bool kHasTf32 = Arch::kId >= 80 && std::is_same_v<T, float>;

// A tensor core cuts off what it sums up, eight products at a time. Where a score is a sum of few products, that shows
// beside FFMA, which rounds (E = 16, logits of some thousands: over four times eager's error). Narrower heads take
// FFMA, unless TF32 is allowed.
constexpr int kNarrowestExactTf32 = 64;

// Only the widest of these kernels takes E or Ev wider than itself.
constexpr int kWidestTf32 = 128;
template <int kHeadDim>
bool fits_tf32(const ForwardParams& p) {
  return kHeadDim == kWidestTf32 || (p.E <= kHeadDim && p.Ev <= kHeadDim);
}

// What a warp owns: kRowBlocks * 16 rows of scores, all kColumns columns. A lane (g = lane / 4, t = lane % 4) has rows
// g, g + 8, ... and of every eight columns 2t and 2t + 1, as an mma leaves them. Of the results made from scores it
// has the same rows, and of every 32 columns 8t .. 8t + 7: see FloatTile::load_rows.
template <int kRowBlocks_, int kColumns_, int kWidth_>
struct WarpTile {
  static constexpr int kRowBlocks = kRowBlocks_, kColumns = kColumns_, kWidth = kWidth_;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kRowsOwned = 2 * kRowBlocks, kColumnsOwned = 2 * kTiles, kResultsOwned = kWidth / 4;

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x % 32 / 4) + 8 * i; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x % 4 * 2) + j / 2 * 8 + j % 2; }
  // Column of results c .. c + 3, c a multiple of four.
  __device__ static int result_column(int c) { return c / 8 * 32 + static_cast<int>(threadIdx.x % 4 * 8) + c % 8; }

  // Over the lanes that share a row.
  __device__ static float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
  }
  __device__ static float row_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  }
};

__device__ __forceinline__ float load_shared_4(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ float2 load_shared_8(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

// kRows x kCols floats, row after row; the four extra ones spread what a warp reads over the banks.
template <int kRows_, int kCols_>
struct FloatTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kStride = kCols + 4;
  static constexpr int kRowBytes = kStride * 4, kBytes = kRows * kRowBytes;
  static_assert(kCols % 32 == 0);

  uint32_t base;

  // Starts to copy rows from first_row and columns from first_col; zero where the matrix has nothing. Complete after
  // cp_async_wait_all and a barrier. kHasRegisters: for a path for whole tiles, which needs no predicates.
  template <int kThreads, bool kHasRegisters = true>
  __device__ __forceinline__ void fill(const Matrix<const float>& m, int first_row, int first_col) const {
    constexpr int kQuads = kCols / 4, kStep = kThreads / kQuads;
    static_assert(kRows % kStep == 0);
    const int thread = fresh_thread_index(), row = thread / kQuads, col = thread % kQuads * 4;
    const int rows_left = m.rows - first_row, present = min(max(m.cols - first_col - col, 0), 4);
    const float* from = m.at(first_row + row, first_col + col);
    const uint32_t to = base + row * kRowBytes + col * 4;
    if (kHasRegisters && m.quads && first_row + kRows <= m.rows && first_col + kCols <= m.cols) {
#pragma unroll
      for (int n = 0; n < kRows; n += kStep) {
        cp_async<16>(to + n * kRowBytes, from, 16);
        from += kStep * m.row_stride;
      }
    } else if (m.quads) {
#pragma unroll 4
      for (int n = 0; n < kRows; n += kStep) {
        cp_async<16>(to + n * kRowBytes, from, row + n < rows_left ? present * 4 : 0);
        from += kStep * m.row_stride;
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < kRows; n += kStep) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          cp_async<4>(to + n * kRowBytes + c * 4, from + c * m.col_stride, row + n < rows_left && c < present ? 4 : 0);
        }
        from += kStep * m.row_stride;
      }
    }
  }

  // Rounds the tile's numbers to TF32, so that load_a need not.
  template <int kThreads>
  __device__ __forceinline__ void round() const {
    for (int i = fresh_thread_index(); i < kRows * kCols / 4; i += kThreads) {
      const uint32_t at = base + i / (kCols / 4) * kRowBytes + i % (kCols / 4) * 16;
      const uint4 v = load_shared_16(at);
      store_shared_16(at, {Tf32A<false>::rounded(__uint_as_float(v.x)), Tf32A<false>::rounded(__uint_as_float(v.y)),
                           Tf32A<false>::rounded(__uint_as_float(v.z)), Tf32A<false>::rounded(__uint_as_float(v.w))});
    }
  }

  // Operand `a`: rows from row, columns from col. ldmatrix moves 16-bit elements, two of which make a float.
  template <bool kIsRounded = false, bool kSplit>
  __device__ __forceinline__ void load_a(Tf32A<kSplit>& a, int row, int col) const {
    const int lane = threadIdx.x % 32;
    uint32_t r[4];
    ldmatrix(r, base + (lane % 16) * kRowBytes + lane / 16 * 16 + row * kRowBytes + col * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIsRounded) {
        a.big[i] = r[i];
      } else {
        a.set(i, r[i]);
      }
    }
  }
  // Two operands `b` that are the transposes of rows from row and from row + 8, columns from col.
  template <bool kSplit>
  __device__ __forceinline__ void load_columns(Tf32B<kSplit> (&b)[2], int row, int col) const {
    const int lane = threadIdx.x % 32;
    uint32_t r[4];
    ldmatrix(r, base + (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16 + row * kRowBytes + col * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, r[i]);
  }
  // Four operands `b` that are eight rows from row and 32 columns from col. Their k is in another order than the rows:
  // k = t is row 2t and k = t + 4 row 2t + 1, so that a lane's scores are an operand `a` as they stand. Column g of
  // b[n] is column 4g + n, so that a lane reads 16 bytes at once, and all lanes of a quarter of the warp from different
  // banks.
  template <bool kSplit>
  __device__ __forceinline__ void load_rows(Tf32B<kSplit> (&b)[4], int row, int col) const {
    const int lane = threadIdx.x % 32;
    const uint32_t from = base + (lane % 4 * 2) * kRowBytes + lane / 4 * 16 + row * kRowBytes + col * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = load_shared_16(from + i * kRowBytes);
      b[0].set(i, v.x);
      b[1].set(i, v.y);
      b[2].set(i, v.z);
      b[3].set(i, v.w);
    }
  }
};

// Columns of an operand whose products are summed up before they join the others. Part of what a score is: forward
// and backward must come to the same bits.
// A single TF32 product has errors of its own beside which those of the sums are nothing.
template <bool kSplit, class Tile>
constexpr int kColumnsTogether = kSplit || Tile::kCols < 64 ? 32 : 64;

// score += rows of a, from a_row, times all rows of b, over the first `depth` columns. kIsTransposed: of b times a.
// kIsRounded: a's numbers are TF32 already.
template <bool kSplit, bool kIsTransposed, class Warp, bool kIsRounded = false, class A, class B>
__device__ __forceinline__ void multiply_scores(Scores<Warp>& score, const A& a_tile, int a_row, const B& b_tile,
                                                int depth) {
  static_assert(Warp::kTiles % 2 == 0 && B::kRows == Warp::kColumns && A::kCols == B::kCols);
  constexpr int kTogether = kColumnsTogether<kSplit, A>;
#pragma unroll 1
  for (int first = 0; first < min(A::kCols, depth); first += kTogether) {
    Tf32Sum sum[Warp::kRowBlocks][Warp::kTiles];
#pragma unroll
    for (int col = first; col < first + kTogether; col += 8) {
      Tf32A<kSplit> a[Warp::kRowBlocks];
#pragma unroll
      for (int m = 0; m < Warp::kRowBlocks; ++m) a_tile.template load_a<kIsRounded>(a[m], a_row + 16 * m, col);
#pragma unroll
      for (int n = 0; n < Warp::kTiles; n += 2) {
        Tf32B<kSplit> b[2];
        b_tile.load_columns(b, 8 * n, col);
        multiply_add<kIsTransposed>(sum, a, b, n);
      }
    }
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j)
        score[i][j] += sum[i / 2][j / 2].template value<kSplit>(i % 2 * 2 + j % 2);
    }
  }
}

// Rows whose products with scores are summed up before they join the others.
constexpr int kRowsTogether = 32;

// Calls use(i, c, x) for every result x = scores times rows of a tile, a product of kColumns by kColumns x kWidth, as
// a sum of one or more parts. Column blocks of 32 are done kTogether at a time: each operand `a` serves them all. Those
// that lie beyond `width` are skipped. (The branch does more than that: without it ptxas mixes the groups, and spills.)
template <bool kSplit, int kTogether, class Warp, class RowTile, class F>
__device__ __forceinline__ void multiply_result(const Scores<Warp>& score, const RowTile& rows, int width, F use) {
  static_assert(RowTile::kRows == Warp::kColumns && RowTile::kCols == Warp::kWidth);
  static_assert(Warp::kWidth % (32 * kTogether) == 0);
  constexpr int kDepth = Warp::kColumns < kRowsTogether ? Warp::kColumns : kRowsTogether;
#pragma unroll
  for (int part = 0; part < Warp::kWidth / 32 / kTogether * (Warp::kColumns / kDepth); ++part) {
    const int first = part / (Warp::kColumns / kDepth) * kTogether;  // column block
    const int first_row = part % (Warp::kColumns / kDepth) * kDepth;
    if (32 * first >= width) return;
    Tf32Sum sum[Warp::kRowBlocks][4 * kTogether];
#pragma unroll
    for (int k = first_row / 8; k < (first_row + kDepth) / 8; ++k) {
      Tf32A<kSplit> a[Warp::kRowBlocks];
#pragma unroll
      for (int m = 0; m < Warp::kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m].set(i, score[2 * m + i % 2][2 * k + i / 2]);
      }
#pragma unroll
      for (int block = 0; block < kTogether; ++block) {
        Tf32B<kSplit> b[4];
        rows.load_rows(b, 8 * k, 32 * (first + block));
        multiply_add(sum, a, b, 4 * block);
      }
    }
#pragma unroll
    for (int m = 0; m < Warp::kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < 4 * kTogether; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          use(2 * m + i / 2, 8 * (first + n / 4) + i % 2 * 4 + n % 4, sum[m][n].template value<kSplit>(i));
        }
      }
    }
  }
}

// Writes a warp's results, times factor(i) for row i.
template <class Warp, class F>
__device__ __forceinline__ void store_results(const Matrix<float>& m, const Results<Warp>& result, int first_row,
                                              int first_col, F factor) {
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    const float f = factor(i);
#pragma unroll
    for (int c = 0; c < Warp::kResultsOwned; c += 4) {
      const float x[4] = {result[i][c] * f, result[i][c + 1] * f, result[i][c + 2] * f, result[i][c + 3] * f};
      m.store(first_row + Warp::row(i), first_col + Warp::result_column(c), x);
    }
  }
}

}  // namespace sdpa::efficient
