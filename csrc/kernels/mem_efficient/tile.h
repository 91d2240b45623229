// The parts the memory-efficient kernels are made of: how 128 threads share a tile of scores, how a tile of a tensor
// comes into shared memory as float32, and the two tile products. Plain FFMA arithmetic: any chip from sm_70 up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../attn/dropout.h"
#include "../attn/launch.h"
#include "../attn/mask.h"
#include "../attn/params.h"

namespace sdpa::efficient {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Four neighbouring elements, the unit in which tensors are read and written.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

// One (batch, head) of a tensor: a matrix with any strides.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;
  int rows, cols;
  bool quads;  // every aligned group of four columns can be accessed at once

  __device__ static Matrix of(const Operand& t, int64_t b, int64_t h, int64_t rows, int64_t cols) {
    T* const data = static_cast<T*>(t.data) + b * t.stride[0] + h * t.stride[1];
    const bool quads =
        t.stride[3] == 1 && t.stride[2] % 4 == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Quad<T>) == 0;
    return {data, t.stride[2], t.stride[3], static_cast<int>(rows), static_cast<int>(cols), quads};
  }

  __device__ T* at(int row, int col) const { return data + row * row_stride + col * col_stride; }

  __device__ bool has_quad(int col) const { return quads && col + 4 <= cols; }

  // Reads rows first_row, first_row + step, ... below first_row + count, in columns col .. col + 3: calls use(n, quad)
  // with n = 0, step, ... Zero where the matrix has nothing. The loads of four rows are in flight together.
  template <int kCount, int kStep, class F>
  __device__ __forceinline__ void read(int first_row, int col, F use) const {
    const T* source = at(first_row, col);
    const int rows_left = rows - first_row, cols_left = cols - col;
    if (has_quad(col)) {
#pragma unroll 4
      for (int n = 0; n < kCount; n += kStep, source += kStep * row_stride) {
        use(n, n < rows_left ? quad(source) : float4{0.f, 0.f, 0.f, 0.f});
      }
    } else {
#pragma unroll 2
      for (int n = 0; n < kCount; n += kStep, source += kStep * row_stride) {
        use(n, slow_quad(source, n < rows_left ? cols_left : 0));
      }
    }
  }

  // One row of it.
  __device__ float4 quad_at(int row, int col) const {
    return has_quad(col) ? quad(at(row, col)) : slow_quad(at(row, col), cols - col);
  }

  // As it is; zero where the matrix has nothing.
  __device__ Quad<std::remove_const_t<T>> raw_quad_at(int row, int col) const {
    using Raw = Quad<std::remove_const_t<T>>;
    Raw q = {};
    if (row >= rows) return q;
    if (has_quad(col)) return *reinterpret_cast<const Raw*>(at(row, col));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (col + n < cols) q.at[n] = *at(row, col + n);
    }
    return q;
  }

  // Writes what lies inside the matrix.
  __device__ void store(int row, int col, const float (&x)[4]) const {
    if (row >= rows) return;
    if (has_quad(col)) {
      *reinterpret_cast<Quad<T>*>(at(row, col)) = {from_float<T>(x[0]), from_float<T>(x[1]), from_float<T>(x[2]),
                                                   from_float<T>(x[3])};
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (col + n < cols) *at(row, col + n) = from_float<T>(x[n]);
      }
    }
  }

 private:
  __device__ static float4 quad(const T* source) {
    const Quad<T> q = *reinterpret_cast<const Quad<T>*>(source);
    return {to_float(q.at[0]), to_float(q.at[1]), to_float(q.at[2]), to_float(q.at[3])};
  }
  __device__ float4 slow_quad(const T* source, int count) const {
    float x[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n] = n < count ? to_float(source[n * col_stride]) : 0.f;
    return {x[0], x[1], x[2], x[3]};
  }
};

// Rows and columns stand in shared memory in another order within each 16: n = 0b dcba is at place 0b cbda. A thread,
// which owns groups of four neighbouring places, so owns pairs of rows and of columns and the same pairs 8 further on,
// which one Philox draw decides on (see dropout.h).
__host__ __device__ constexpr int place_of(int n) {
  return (n & ~14) | ((n & 6) << 1) | ((n & 8) >> 2);
}
__host__ __device__ constexpr int at_place(int n) {
  return (n & ~14) | ((n & 12) >> 1) | ((n & 2) << 2);
}

// Turing's 64 KB take a tile of fewer columns.
template <class Arch>
constexpr bool kHasRoom = Arch::kSharedBytes >= 96 * 1024;

// Volta has no uniform registers: what all threads of a warp compute alike takes registers of each.
template <class Arch>
constexpr bool kHasFewRegisters = Arch::kId == 70;

// How a block shares a tile of scores (kRows x kColumns) and the kRows x kHeadDim results made from it. A warp owns
// whole rows; a thread owns 8 rows, 8 or 4 columns of scores, and 8 columns of a result, all in groups of four.
template <int kHeadDim, int kScoreColumns>
struct Tile {
  static constexpr bool kIsNarrow = kHeadDim == 32;  // takes no wider heads; see in_flight.h
  static constexpr int kThreads = 128;
  static constexpr int kWidth = kHeadDim;  // of a chunk of the operands, and of a result
  static constexpr int kColumns = kScoreColumns;
  static constexpr int kThreadsX = kHeadDim / 8;    // threads that share a row
  static constexpr int kWarpRows = 32 / kThreadsX;  // threads that share a column, in a warp
  static constexpr int kRowsOwned = 8, kColumnsOwned = kColumns / kThreadsX, kResultsOwned = 8;
  static constexpr int kWarpTileRows = kRowsOwned * kWarpRows;
  static constexpr int kRows = kThreads / 32 * kWarpTileRows;
  // Shared memory. Operands of scores lie transposed, [e][place], and so do scores, [column][place of row]: products
  // then read groups of four places. The four extra floats spread what neighbouring lanes write over the banks.
  static constexpr int kRowStride = kRows + 4, kColumnStride = kColumns + 4;
  static constexpr int kRowTile = kHeadDim * kRowStride;
  static constexpr int kColumnTile = kHeadDim * kColumnStride;
  static constexpr int kResultStride = kIsNarrow ? kHeadDim + 4 : kHeadDim;
  static constexpr int kResultTile = kColumns * kResultStride;  // kColumns rows that a result is made of
  static constexpr int kScoreTile = kColumns * kRowStride;
  static constexpr int kSharedBytes = (kRowTile + kColumnTile + kScoreTile) * static_cast<int>(sizeof(float));
  static_assert(kHeadDim == 32 || kHeadDim == 64 || kHeadDim == 128);
  static_assert(kIsNarrow || kResultTile <= kColumnTile);  // they share a place

  // Neighbouring lanes share a column and lanes two apart share a row: a 16-byte shared load then takes two passes
  // instead of four, since the hardware merges equal addresses of such pairs.
  int first_row_place, x;
  __device__ static Tile of_thread() {
    const int thread = fresh_thread_index(), warp = thread / 32, lane = thread % 32;
    const int y = (lane & 1) + 2 * (lane / (2 * kThreadsX));
    return {warp * kWarpTileRows + 4 * y, (lane >> 1) % kThreadsX};
  }
  __device__ int row(int i) const { return at_place(first_row_place) + owned(i, 4 * kWarpRows); }
  __device__ int row_place(int i) const { return first_row_place + (i & 3) + 4 * kWarpRows * (i >> 2); }
  __device__ int column(int j) const { return at_place(4 * x) + owned(j, 4 * kThreadsX); }
  __device__ int result_column(int c) const { return 4 * x + (c & 3) + 4 * kThreadsX * (c >> 2); }
  // How far owned row or column n is from the first one, if `step` places lie between groups of four.
  __device__ static constexpr int owned(int n, int step) { return at_place(n & 3) + at_place(step) * (n >> 2); }

  // Over the threads that share a row.
  __device__ static float row_max(float v) {
#pragma unroll
    for (int lanes = 2; lanes < 2 * kThreadsX; lanes *= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, lanes));
    return v;
  }
  __device__ static float row_sum(float v) {
#pragma unroll
    for (int lanes = 2; lanes < 2 * kThreadsX; lanes *= 2) v += __shfl_xor_sync(~0u, v, lanes);
    return v;
  }
};

template <class Tile>
using Scores = float[Tile::kRowsOwned][Tile::kColumnsOwned];
template <class Tile>
using Results = float[Tile::kRowsOwned][Tile::kResultsOwned];

// Brings kCount rows of a matrix and a chunk of its columns into shared memory, transposed; zero where it has none.
// Columns beyond the last group of four that holds any are left alone, and the products stop before them. A warp
// reads 16 rows by 8 columns: its stores then hit 32 different banks.
template <class Tile, int kCount, class T>
__device__ __forceinline__ void stage_transposed(float* tile, const Matrix<const T>& m, int first_row, int first_col) {
  constexpr int kStride = kCount + 4, kStep = Tile::kThreads / 16 * 4;
  const int thread = fresh_thread_index();
#pragma unroll 1
  for (int tile_col = thread / 16 * 4; tile_col < min(Tile::kWidth, m.cols - first_col); tile_col += kStep) {
    float* const place = tile + tile_col * kStride + place_of(thread % 16);
    m.template read<kCount, 16>(first_row + thread % 16, first_col + tile_col, [&](int n, float4 v) {
      place[n] = v.x;
      place[n + kStride] = v.y;
      place[n + 2 * kStride] = v.z;
      place[n + 3 * kStride] = v.w;
    });
  }
}

// Brings kColumns rows of a matrix into shared memory as they are; zero where it has none. Columns beyond the last
// group of four that holds any are left alone: nobody uses what comes of them.
template <class Tile, class T>
__device__ __forceinline__ void stage_rows(float* tile, const Matrix<const T>& m, int first_row, int first_col) {
  constexpr int kQuads = Tile::kWidth / 4, kStep = Tile::kThreads / kQuads;
  const int thread = fresh_thread_index(), first = thread / kQuads, tile_col = thread % kQuads * 4;
  if (first_col + tile_col >= m.cols) return;
  float* const place = tile + first * Tile::kWidth + tile_col;
  m.template read<Tile::kColumns, kStep>(first_row + first, first_col + tile_col, [&](int n, float4 v) {
    *reinterpret_cast<float4*>(place + n * Tile::kWidth) = v;
  });
}

// product[i][j] += sum over k < depth of a[k][i] * b[k][j], for a thread's 8 places in a and the first kGroups groups
// of its places in b. The operands of step k + 1 are read while those of step k are used.
template <int kGroups, class Tile, int kProductColumns>
__device__ __forceinline__ void multiply(float (&product)[Tile::kRowsOwned][kProductColumns], const Tile& t,
                                         const float* a, const float* b, int b_stride, int depth) {
  a += t.first_row_place;
  b += 4 * t.x;
  float4 row[2][2], column[2][kGroups];
  const auto read = [&](int step, const float* a_at, const float* b_at) {
#pragma unroll
    for (int g = 0; g < 2; ++g) row[step][g] = *reinterpret_cast<const float4*>(a_at + 4 * Tile::kWarpRows * g);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      column[step][g] = *reinterpret_cast<const float4*>(b_at + 4 * Tile::kThreadsX * g);
    }
  };
  read(0, a, b);
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {  // a tile's depth is zero-filled to a multiple of four
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (s < 3) {
        read((s + 1) & 1, a + (s + 1) * Tile::kRowStride, b + (s + 1) * b_stride);
      } else if (k + 4 < depth) {
        a += 4 * Tile::kRowStride;
        b += 4 * b_stride;
        read(0, a, b);
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowsOwned; ++i) {
        const float4 a4 = row[s & 1][i / 4];
        const float x = i % 4 == 0 ? a4.x : i % 4 == 1 ? a4.y : i % 4 == 2 ? a4.z : a4.w;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const float4 b4 = column[s & 1][g];
          product[i][4 * g] = fmaf(x, b4.x, product[i][4 * g]);
          product[i][4 * g + 1] = fmaf(x, b4.y, product[i][4 * g + 1]);
          product[i][4 * g + 2] = fmaf(x, b4.z, product[i][4 * g + 2]);
          product[i][4 * g + 3] = fmaf(x, b4.w, product[i][4 * g + 3]);
        }
      }
    }
  }
}

// score[i][j] += rows . columns over `depth` of a chunk's columns.
template <class Tile>
__device__ __forceinline__ void multiply_scores(Scores<Tile>& score, const Tile& t, const float* rows,
                                                const float* columns, int depth) {
  multiply<Tile::kColumnsOwned / 4>(score, t, rows, columns, Tile::kColumnStride, min(Tile::kWidth, depth));
}

// result[i][c] += sum over j < depth of scores[i][j] * rows[j][c]. Where the result is at most half as wide as it
// could be, as at head dim 16 or 72, so is the work.
template <class Tile>
__device__ __forceinline__ void multiply_result(Results<Tile>& result, const Tile& t, const float* scores,
                                                const float* rows, int depth, int width) {
  depth = min(Tile::kColumns, depth);
  if (width <= Tile::kWidth / 2) {
    multiply<1>(result, t, scores, rows, Tile::kResultStride, depth);
  } else {
    multiply<2>(result, t, scores, rows, Tile::kResultStride, depth);
  }
}

// A thread's scores of column j in the score tile, rows 4 * g and the next three.
template <class Tile>
__device__ __forceinline__ float4& score_quad(float* scores, const Tile& t, int j, int g) {
  return *reinterpret_cast<float4*>(scores + t.column(j) * Tile::kRowStride + t.first_row_place +
                                    4 * Tile::kWarpRows * g);
}

// Puts a thread's scores where its warp can read them.
template <class Tile>
__device__ __forceinline__ void store_scores(float* scores, const Tile& t, const Scores<Tile>& score) {
#pragma unroll
  for (int j = 0; j < Tile::kColumnsOwned; ++j) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      score_quad(scores, t, j, g) = {score[4 * g][j], score[4 * g + 1][j], score[4 * g + 2][j], score[4 * g + 3][j]};
    }
  }
}

// Makes 0 of every score of the warp's rows that carries a minus sign.
template <class Tile>
__device__ __forceinline__ void drop_negative(float* scores) {
  constexpr int kQuads = Tile::kWarpTileRows / 4;
  const int thread = fresh_thread_index(), lane = thread % 32;
  float* const first = scores + thread / 32 * Tile::kWarpTileRows;
  const auto kept = [](float x) { return signbit(x) ? 0.f : x; };
  __syncwarp();
#pragma unroll 4
  for (int n = lane; n < kQuads * Tile::kColumns; n += 32) {
    float4& quad = *reinterpret_cast<float4*>(first + n / kQuads * Tile::kRowStride + n % kQuads * 4);
    quad = {kept(quad.x), kept(quad.y), kept(quad.z), kept(quad.w)};
  }
  __syncwarp();
}

// Puts what the mask adds to the scores of a tile in their place in shared memory, warp by warp its own rows. Doing so
// before the scores are computed spares registers. A warp takes 8 queries by 16 keys at a time.
template <bool kRowsAreKeys, class Tile>
__device__ __forceinline__ void stage_mask(float* scores, const Mask& mask, int first_query, int first_key) {
  const int thread = fresh_thread_index(), lane = thread % 32;
  const int query = kRowsAreKeys ? lane / 4 : lane % 8, key = 4 * (kRowsAreKeys ? lane % 4 : lane / 8);
  const int warp_row = thread / 32 * Tile::kWarpTileRows;
  constexpr int kTogether = kRowsAreKeys ? 2 : 4;  // more cost the kernel for dK and dV registers that it lacks
  constexpr int kRowStep = kRowsAreKeys ? 16 : 8, kColumnStep = kRowsAreKeys ? 8 : 16;
  constexpr int kRowSteps = Tile::kWarpTileRows / kRowStep, kColumnSteps = Tile::kColumns / kColumnStep;
  __syncwarp();  // the warp is done with what stood there
  mask.read([&](auto bias) {
#pragma unroll kTogether
    for (int n = 0; n < kRowSteps * kColumnSteps; ++n) {
      const int row = warp_row + n % kRowSteps * kRowStep + (kRowsAreKeys ? key : query);
      const int column = n / kRowSteps * kColumnStep + (kRowsAreKeys ? query : key);
      const float4 b4 = bias(first_query + (kRowsAreKeys ? column : row), first_key + (kRowsAreKeys ? row : column));
      const float four[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        scores[(column + (kRowsAreKeys ? 0 : k)) * Tile::kRowStride + place_of(row + (kRowsAreKeys ? k : 0))] = four[k];
      }
    }
  });
  __syncwarp();
}

// Scales products to scores, and adds the mask if it was staged: rounded twice, never as one fused operation, since the
// backward has to come to the same scores. Scores stay in natural units: log2(e) comes in only
// after the row's maximum or LSE is taken off, since the lowest finite float times log2(e) would be -inf, and a row of
// those is not an empty row.
template <class Tile>
__device__ __forceinline__ void scale_and_mask(Scores<Tile>& score, const Tile& t, float scale, bool is_masked,
                                               float* bias) {
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnsOwned; ++j) score[i][j] = __fmul_rn(score[i][j], scale);
  }
  if (!is_masked) return;
#pragma unroll
  for (int j = 0; j < Tile::kColumnsOwned; ++j) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const float4 b4 = score_quad(bias, t, j, g);
      score[4 * g][j] = Mask::add(score[4 * g][j], b4.x);
      score[4 * g + 1][j] = Mask::add(score[4 * g + 1][j], b4.y);
      score[4 * g + 2][j] = Mask::add(score[4 * g + 2][j], b4.z);
      score[4 * g + 3][j] = Mask::add(score[4 * g + 3][j], b4.w);
    }
  }
}

// The dropout of a call, for a kernel's whole life; where registers are few, made anew wherever it is asked for.
template <class Arch>
struct DropoutOf {
  const ForwardParams& p;
  Dropout kept;

  __device__ __forceinline__ explicit DropoutOf(const ForwardParams& p)
      : p(p), kept(Dropout::make(p.dropout_p, p.dropout_p > 0.f ? *p.seed : 0)) {}
  __device__ __forceinline__ Dropout operator()() const {
    if constexpr (!kHasFewRegisters<Arch>) return kept;
    return Dropout::make_anew(p.dropout_p, p.seed);
  }
};

// Calls f(i, j, keep) for every score a thread owns. first_query and first_key are those of the tile; its rows are
// queries or, in the kernel for key and value gradients, keys. One draw decides on what is 8, 16 or 24 apart (see
// dropout.h): owned rows or columns n and n + 2 are 8 apart, n and n + 4 are 16 apart for some tiles.
template <bool kRowsAreKeys, class Tile, class F>
__device__ __forceinline__ void for_each_keep(const Dropout& dropout, int64_t batch_head, int first_query,
                                              int first_key, F f) {
  constexpr bool kFarRows = Tile::kRowsOwned > 4 && Tile::owned(4, 4 * Tile::kWarpRows) == 16;
  constexpr bool kFarColumns = Tile::kColumnsOwned > 4 && Tile::owned(4, 4 * Tile::kThreadsX) == 16;
  constexpr bool kFarQueries = kRowsAreKeys ? kFarColumns : kFarRows;
  constexpr bool kFarKeys = kRowsAreKeys ? kFarRows : kFarColumns;
  const Tile t = Tile::of_thread();
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
    if ((i & 2) || (kFarRows && (i & 4))) continue;
#pragma unroll
    for (int j = 0; j < Tile::kColumnsOwned; ++j) {
      if ((j & 2) || (kFarColumns && (j & 4))) continue;
      const uint32_t query = first_query + (kRowsAreKeys ? t.column(j) : t.row(i));
      const uint32_t key = first_key + (kRowsAreKeys ? t.row(i) : t.column(j));
      const Dropped16 dropped =
          dropout.draw(static_cast<uint32_t>(batch_head), query / 32, key / 32, query % 8, key % 8);
#pragma unroll
      for (int m = 0; m < (kFarQueries ? 4 : 2); ++m) {
#pragma unroll
        for (int n = 0; n < (kFarKeys ? 4 : 2); ++n) {
          const uint32_t word = dropped.word_of(kFarQueries ? m / 2 : query / 16 % 2, kFarKeys ? n / 2 : key / 16 % 2);
          const bool keep = !(word >> (7 + m % 2 * 8 + n % 2 * 16) & 1);
          f(i + 2 * (kRowsAreKeys ? n : m), j + 2 * (kRowsAreKeys ? m : n), keep);
        }
      }
    }
  }
}

}  // namespace sdpa::efficient
