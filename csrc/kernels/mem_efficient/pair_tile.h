// Tiles of float32 numbers in shared memory as pairs of float16 (arch/half_pair.h), and products of them on tensor
// cores: what the float32 kernels for sm80 and newer are made of.
#pragma once

#include "../arch/half_pair.h"
#include "../attn/softmax.h"
#include "../flash/tile.cuh"
#include "tile.h"

namespace sdpa::efficient {

// Whether these kernels are the ones for a code path and type.
template <class Arch, class T>
constexpr bool kHasPairs = Arch::kId >= 80 && std::is_same_v<T, float>;

// A tensor core cuts off what it sums up, sixteen products at a time. Where a score is a sum of few products, that
// shows beside FFMA, which rounds (E = 16, logits of some thousands: over four times eager's error). Narrower heads
// take FFMA, unless TF32 is allowed.
constexpr int kNarrowestExactPairs = 64;

// Only the widest of these kernels takes E or Ev wider than itself.
constexpr int kWidestPairs = 128;
template <int kHeadDim>
bool fits_pairs(const ForwardParams& p) {
  return kHeadDim == kWidestPairs || (p.E <= kHeadDim && p.Ev <= kHeadDim);
}

__device__ __forceinline__ float power_of_two(int exponent) {
  return __int_as_float((exponent + 127) << 23);
}

// Numbers stand in a pair multiplied by 2^kShift. A row whose largest is from 2^kLowest to 2^(15 - kShift) needs no
// more: what float16 cannot hold is below 2^-29 of the row's largest. Any other row has a power of two of its own on
// top, its factor, that its numbers are to be multiplied by. (Not one for a tile: a row that a mask hides may hold
// anything.)
constexpr int kShift = 11, kLowest = -8;

// What a warp owns: kRowBlocks * 16 rows of scores, all kColumns columns. A lane (g = lane / 4, t = lane % 4) has rows
// g, g + 8, ... and of every eight columns 2t and 2t + 1, as an mma leaves them. Of the results made from scores it has
// the same rows, and of every 32 columns 8t .. 8t + 7.
template <int kRowBlocks_, int kColumns_, int kWidth_>
struct WarpTile {
  static constexpr int kRowBlocks = kRowBlocks_, kColumns = kColumns_, kWidth = kWidth_;
  static constexpr int kTiles = kColumns / 8, kSteps = kColumns / 16;
  static constexpr int kRowsOwned = 2 * kRowBlocks, kColumnsOwned = 2 * kTiles, kResultsOwned = kWidth / 4;

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x % 32 / 4) + 8 * i; }
  __device__ static int column(int j) { return static_cast<int>(threadIdx.x % 4 * 2) + j / 2 * 8 + j % 2; }
  // Column of results c .. c + 3, c a multiple of four.
  __device__ static int result_column(int c) { return c / 8 * 32 + static_cast<int>(threadIdx.x % 4 * 8) + c % 8; }

  // Over the lanes that share a row.
  __device__ static float row_max(float v) { return quad_max(v); }
  __device__ static float row_sum(float v) { return quad_sum(v); }
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

// kRows x kCols numbers, which any kThreads neighbours fill, from a multiple of that on. A thread brings what it stages
// itself: 16 numbers of a row at a time, of every 32 columns the four at 8 t + 4 (group % 2) for t = 0 .. 3. They fill
// two 16-byte chunks, so that word t of one has the first two of four neighbours, word t of the other the last two:
// where the tile's rows are k of a product, a lane's results are four neighbours too. Products along the columns need
// but the same order in both operands.
template <int kRows_, int kCols_, int kThreads, bool kSplit>
struct PairTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kGroups = kCols / 16, kRowStep = kThreads / kGroups;
  static constexpr int kUnits = kRows / kRowStep;
  using Part = SharedTile<__half, kRows, kCols>;
  static constexpr int kBytes = (kSplit ? 2 : 1) * Part::kBytes, kStagingBytes = kRows * kCols * 4;
  static constexpr int kFactorBytes = (kRows + 4) * 4;  // and behind them which tile has one that is not 1
  static_assert(kCols % 32 == 0 && kRows % kRowStep == 0 && kRowStep % 8 == 0);

  Part big, small;
  uint32_t factors;

  __device__ __forceinline__ PairTile(uint32_t base, uint32_t factors)
      : big{base}, small{base + Part::kBytes}, factors(factors) {}

  // Chunk of a group's first (half 0) or last two of four neighbours: such that no two threads that store together meet
  // in a bank.
  static __host__ __device__ constexpr int chunk(int group, int half) {
    return kGroups >= 8 ? group + kGroups * half : 2 * group + half;
  }
  // The 16 columns that step n of a product along the columns takes, so that 32 neighbouring columns are two steps.
  static __host__ __device__ constexpr int column_block(int step) {
    return kGroups >= 8 ? step / 2 + step % 2 * (kGroups / 2) : step;
  }
  // The result (index c of WarpTile) that column i of the eight in a chunk is for lane t, where i = 2t or 2t + 1.
  static __host__ __device__ constexpr int result(int chunk, int i) {
    return kGroups >= 8 ? chunk % kGroups * 4 + chunk / kGroups * 2 + i : chunk / 2 * 4 + chunk % 2 * 2 + i;
  }

  // As Part's, anew.
  __device__ __forceinline__ static LaneOffset lane_offset() {
    const int lane = fresh_thread_index() % 32;
    return {Part::offset(lane % 16, lane / 16), Part::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }

  struct Place {
    int row, group, col;  // of the first unit
    __device__ __forceinline__ static Place of_thread() {
      const int thread = fresh_thread_index() % kThreads, group = thread % kGroups;
      return {thread / kGroups, group, group / 2 * 32 + group % 2 * 4};
    }
  };
  __device__ __forceinline__ static uint32_t staged(uint32_t staging, int unit, int t) {
    return staging + ((unit * 4 + t) * kThreads + fresh_thread_index() % kThreads) * 16;
  }

  // Starts to copy rows from first_row and columns from first_col to this thread's places in `staging`; zero where the
  // matrix has nothing. Complete, for this thread, after cp_async_wait_all.
  __device__ __forceinline__ static void fetch(uint32_t staging, const Matrix<const float>& m, int first_row,
                                               int first_col) {
    const uint32_t to = staged(staging, 0, 0);
    fetch_to([to](int n, int t) { return to + (n * 4 + t) * kThreads * 16; }, m, first_row, first_col);
  }
  // The same to where this thread's part of the tile will stand. (One part is half as large as what it is made of; the
  // rest lies behind it.)
  __device__ __forceinline__ void fetch_in_place(const Matrix<const float>& m, int first_row, int first_col) const {
    const OwnPlaces to = own_places();
    fetch_to([to](int n, int t) { return to(n, t); }, m, first_row, first_col);
  }

  // Fills the tile with what this thread fetched, times `sign`. `number`: of this tile, not that of any before.
  __device__ __forceinline__ void take(uint32_t staging, int number, float sign = 1.f) const {
    const uint32_t from = staged(staging, 0, 0);
    fill(number, sign, [&](int n, int t) { return read_quad(from + (n * 4 + t) * kThreads * 16); });
  }
  // Fills it from where the numbers are, which takes longer.
  __device__ __forceinline__ void take(const Matrix<const float>& m, int first_row, int first_col, int number,
                                       float sign = 1.f) const {
    const Place place = Place::of_thread();
    const int row = first_row + place.row, col = first_col + place.col;
    fill(number, sign, [&](int n, int t) {
      return row + n * kRowStep < m.rows ? m.quad_at(row + n * kRowStep, col + 8 * t) : float4{0.f, 0.f, 0.f, 0.f};
    });
  }

  // Of what was fetched in place.
  __device__ __forceinline__ void take_in_place(int number, float sign = 1.f) const {
    const OwnPlaces from = own_places();
    fill(number, sign, [&](int n, int t) { return read_quad(from(n, t)); });
  }

  // To be called once, before the tile is first filled, and a barrier before it is next.
  __device__ __forceinline__ void start() const {
    if (threadIdx.x == 0) store_shared_4(factors + kRows * 4, ~0u);
  }
  // Whether some row of the tile has a factor other than 1.
  __device__ __forceinline__ bool has_factors(int number) const {
    return __float_as_int(load_shared_4(factors + kRows * 4)) == number;
  }
  __device__ __forceinline__ float factor(int row) const { return load_shared_4(factors + row * 4); }

 private:
  __device__ __forceinline__ static float4 read_quad(uint32_t from) {
    const uint4 v = load_shared_16(from);
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
  }

  // Where this thread's chunks of the tile stand: 0 and 1 of a unit in the first part, 2 and 3 in the second.
  struct OwnPlaces {
    uint32_t even, odd;
    __device__ __forceinline__ uint32_t operator()(int n, int t) const {
      return (t % 2 == 0 ? even : odd) + t / 2 * Part::kBytes + n * kRowStep * Part::kRowBytes;
    }
  };
  __device__ __forceinline__ OwnPlaces own_places() const {
    const Place place = Place::of_thread();
    return {big.base + Part::offset(place.row, chunk(place.group, 0)),
            big.base + Part::offset(place.row, chunk(place.group, 1))};
  }

  template <class To>
  __device__ __forceinline__ static void fetch_to(To to, const Matrix<const float>& m, int first_row, int first_col) {
    const Place place = Place::of_thread();
    const int rows_left = m.rows - first_row - place.row, cols_left = m.cols - first_col - place.col;
    const float* from = m.at(first_row + place.row, first_col + place.col);
    if (m.quads && first_row + kRows <= m.rows && first_col + kCols <= m.cols) {
#pragma unroll
      for (int n = 0; n < kUnits; ++n, from += kRowStep * m.row_stride) {
#pragma unroll
        for (int t = 0; t < 4; ++t) cp_async<16>(to(n, t), from + 8 * t, 16);
      }
    } else if (m.quads) {
#pragma unroll 1
      for (int n = 0; n < kUnits; ++n, from += kRowStep * m.row_stride) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const int present = n * kRowStep < rows_left ? min(max(cols_left - 8 * t, 0), 4) : 0;
          cp_async<16>(to(n, t), from + 8 * t, present * 4);
        }
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < kUnits; ++n, from += kRowStep * m.row_stride) {
#pragma unroll 1
        for (int t = 0; t < 4; ++t) {
          const int present = n * kRowStep < rows_left ? cols_left - 8 * t : 0;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            cp_async<4>(to(n, t) + c * 4, from + (8 * t + c) * m.col_stride, c < present ? 4 : 0);
          }
        }
      }
    }
  }
  __device__ __forceinline__ static float largest(const HalfPair<kSplit, 4>& first, const HalfPair<kSplit, 4>& last) {
    __half2 most = __float2half2_rn(0.f);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      most = __hmax2(most, __habs2(reinterpret_cast<const __half2&>(first.big[t])));
      most = __hmax2(most, __habs2(reinterpret_cast<const __half2&>(last.big[t])));
    }
    return __half2float(__hmax(most.x, most.y));
  }
  __device__ __forceinline__ static bool is_usual(float largest) {
    return (largest >= power_of_two(kLowest + kShift) && largest < power_of_two(15)) || largest == 0.f;
  }
  __device__ __forceinline__ static float finite(float x) { return isinf(x) ? 0.f : fabsf(x); }

  // Splits numbers with a power of two that suits their row; gives the row's factor.
  template <class Split>
  __device__ __forceinline__ float split_unusual(int number, float sign, const float4 (&x)[4], Split split) const {
    float most = 0.f;  // of the row; infinities and NaN leave its other numbers what they are
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      most = fmaxf(fmaxf(most, finite(x[t].x)), finite(x[t].y));
      most = fmaxf(fmaxf(most, finite(x[t].z)), finite(x[t].w));
    }
#pragma unroll
    for (int distance = 1; distance < kGroups; distance *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    if (is_usual(most * power_of_two(kShift))) return 1.f;
    const int exponent = min(14 - ((__float_as_int(most) >> 23) - 127), 127);
    split(sign * power_of_two(exponent));
    store_shared_4(factors + kRows * 4, static_cast<uint32_t>(number));
    return power_of_two(kShift - exponent);
  }

  template <class Read>
  __device__ __forceinline__ void fill(int number, float sign, Read read) const {
    const Place place = Place::of_thread();
    const OwnPlaces to = own_places();
#pragma unroll
    for (int n = 0; n < kUnits; ++n) {
      float4 x[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) x[t] = read(n, t);
      HalfPair<kSplit, 4> first, last;
      const auto split = [&](float multiplier) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          first.set(t, x[t].x * multiplier, x[t].y * multiplier);
          last.set(t, x[t].z * multiplier, x[t].w * multiplier);
        }
      };
      split(sign * power_of_two(kShift));
      float factor = 1.f;
      // A look at this thread's numbers will mostly do.
      if (!__all_sync(~0u, is_usual(largest(first, last)))) factor = split_unusual(number, sign, x, split);
      store_shared_16(to(n, 0), {first.big[0], first.big[1], first.big[2], first.big[3]});
      store_shared_16(to(n, 1), {last.big[0], last.big[1], last.big[2], last.big[3]});
      if constexpr (kSplit) {
        store_shared_16(to(n, 2), {first.small[0], first.small[1], first.small[2], first.small[3]});
        store_shared_16(to(n, 3), {last.small[0], last.small[1], last.small[2], last.small[3]});
      }
      if (place.group == 0) store_shared_4(factors + (place.row + n * kRowStep) * 4, __float_as_uint(factor));
    }
  }
};

// Rows of a tile as operand `a`.
template <bool kSplit, class Tile>
__device__ __forceinline__ void load_a(HalfPair<kSplit, 4>& a, const Tile& tile, const LaneOffset& lane, int row_block,
                                       int col_block) {
  tile.big.load_a(a.big, lane, row_block, col_block);
  if constexpr (kSplit) tile.small.load_a(a.small, lane, row_block, col_block);
}
// 16 rows of a tile, transposed, as two operands `b`.
template <bool kSplit, class Tile>
__device__ __forceinline__ void load_columns(HalfPair<kSplit, 4>& b, const Tile& tile, const LaneOffset& lane,
                                             int row_block, int col_block) {
  tile.big.load_b_transposed(b.big, lane, row_block, col_block);
  if constexpr (kSplit) tile.small.load_b_transposed(b.small, lane, row_block, col_block);
}
// 16 rows of a tile as two operands `b`: 16 columns of results.
template <bool kSplit, class Tile>
__device__ __forceinline__ void load_rows(HalfPair<kSplit, 4>& b, const Tile& tile, const LaneOffset& lane,
                                          int row_block, int col_block) {
  tile.big.load_b(b.big, lane, row_block, col_block);
  if constexpr (kSplit) tile.small.load_b(b.small, lane, row_block, col_block);
}

// Columns of an operand whose products are summed up before they join the others. Part of what a score is: forward and
// backward must come to the same bits.
constexpr int kColumnsTogether = 64;

// Scores of two tiles' rows times what their rows were brought into range by. The numbers: of what is in the tiles.
template <class Warp, class A, class B>
__device__ __forceinline__ void apply_factors(Scores<Warp>& score, const A& a_tile, int a_block, int a_number,
                                              const B& b_tile, int b_block, int b_number) {
  if (!a_tile.has_factors(a_number) && !b_tile.has_factors(b_number)) return;
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    const float row = a_tile.factor(16 * a_block + Warp::row(i));
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) {
      score[i][j] = score[i][j] * row * b_tile.factor(16 * b_block + Warp::column(j));
    }
  }
}

// score = rows of a, from 16 * a_block, times rows of b, from 16 * b_block, over the first `depth` columns, and times
// 2^(2 kShift). kIsTransposed: of b times a. The numbers are those under which the tiles were filled.
template <bool kSplit, bool kIsTransposed, class Warp, int kTogether = 16, class A, class B>
__device__ __forceinline__ void multiply_scores(Scores<Warp>& score, const A& a_tile, int a_block, int a_number,
                                                const B& b_tile, int b_block, int b_number, int depth) {
  static_assert(A::kCols == B::kCols);
  const LaneOffset lane = A::lane_offset();
  constexpr int kColumns = Warp::kColumns < kTogether ? Warp::kColumns : kTogether,
                kPairs = kColumns / 16;  // at a time
#pragma unroll
  for (int column = 0; column < Warp::kColumns; column += kColumns) {
#pragma unroll 1
    for (int first = 0; first < (A::kCols > kColumnsTogether ? min(A::kCols, depth) : 1); first += kColumnsTogether) {
      HalfPairSum sum[kPairs][Warp::kRowBlocks][2];
#pragma unroll
      for (int step = 0; step < min(A::kCols, kColumnsTogether) / 16; ++step) {
        const int block = first / 32 + A::column_block(step);
        HalfPair<kSplit, 4> a[Warp::kRowBlocks];
#pragma unroll
        for (int m = 0; m < Warp::kRowBlocks; ++m) load_a(a[m], a_tile, lane, a_block + m, block);
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          HalfPair<kSplit, 4> b;
          load_columns(b, b_tile, lane, b_block + column / 16 + n, block);
          multiply_add<kIsTransposed>(sum[n], a, b, step == 0);
        }
      }
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns / 4; ++j) {
          const float part = sum[j / 4][i / 2][j / 2 % 2].template value<kSplit>(i % 2 * 2 + j % 2);
          float& x = score[i][column / 4 + j];
          x = first == 0 ? part : x + part;
        }
      }
    }
  }
  apply_factors<Warp>(score, a_tile, a_block, a_number, b_tile, b_block, b_number);
}

// Products that are sums over chunks of columns: part(x, e) gives those of the chunk at e.
template <class Warp, class F>
__device__ __forceinline__ void sum_chunks(Scores<Warp>& score, int depth, F part) {
#pragma unroll 1
  for (int e = 0; e < depth; e += Warp::kWidth) {
    Scores<Warp> x;
    part(x, e);
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] = e == 0 ? x[i][j] : score[i][j] + x[i][j];
    }
  }
}

// A warp's scores as operands `a`.
template <bool kSplit, class Warp>
struct ScorePairs {
  HalfPair<kSplit, 4> a[Warp::kSteps][Warp::kRowBlocks];

  __device__ __forceinline__ explicit ScorePairs(const Scores<Warp>& score) {
#pragma unroll
    for (int k = 0; k < Warp::kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < Warp::kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const x = &score[2 * m + i % 2][4 * k + i / 2 * 2];
          a[k][m].set(i, x[0], x[1]);
        }
      }
    }
  }
};

// What is to be multiplied with rows of a tile takes on their factors.
template <class Warp, class Tile>
__device__ __forceinline__ void take_on_factors(Scores<Warp>& score, const Tile& tile, int block0 = 0) {
#pragma unroll
  for (int j = 0; j < Warp::kColumnsOwned; ++j) {
    const float factor = tile.factor(16 * block0 + Warp::column(j));
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) score[i][j] *= factor;
  }
}

// What a warp that has rows alone has to know of other warps.
template <class Warp>
struct OwnRows {
  __device__ __forceinline__ bool any(bool x) const { return __any_sync(~0u, x); }
  // From each lane's share of the rows to that of the rows.
  __device__ __forceinline__ void find_row_max(float (&x)[Warp::kRowsOwned]) const {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) x[i] = Warp::row_max(x[i]);
  }
};

// The largest of this lane's scores, in each row.
template <class Warp>
__device__ __forceinline__ void find_largest(const Scores<Warp>& score, float (&most)[Warp::kRowsOwned]) {
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    most[i] = 0.f;
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) most[i] = fmaxf(most[i], fabsf(score[i][j]));
  }
}

// Multiplies each row of scores by the power of two that brings `most` into float16's range; gives the inverse.
template <class Warp>
__device__ __forceinline__ void scale_into_range(Scores<Warp>& score, const float (&most)[Warp::kRowsOwned],
                                                 float (&inverse)[Warp::kRowsOwned]) {
#pragma unroll
  for (int i = 0; i < Warp::kRowsOwned; ++i) {
    const int exponent = max(__float_as_int(most[i]) >> 23, 127 - 100) - 127;  // of 2^-100 or more
    inverse[i] = power_of_two(exponent - 14);
#pragma unroll
    for (int j = 0; j < Warp::kColumnsOwned; ++j) score[i][j] *= power_of_two(14 - exponent);
  }
}

// The same by the row's largest.
template <class Warp, class Rows = OwnRows<Warp>>
__device__ __forceinline__ void bring_into_range(Scores<Warp>& score, float (&inverse)[Warp::kRowsOwned],
                                                 const Rows& rows = {}) {
  float most[Warp::kRowsOwned];
  find_largest<Warp>(score, most);
  rows.find_row_max(most);
  scale_into_range<Warp>(score, most, inverse);
}

// Calls use(i, c, x) for every result x = scores times rows of a tile from 16 * block0, a product of kColumns by
// kColumns x kWidth. Columns are done 16 at a time, and those that lie beyond `width` are skipped. (The branch does
// more than that: without it ptxas mixes the steps, and spills.)
template <bool kSplit, class Warp, class Tile, class F>
__device__ __forceinline__ void multiply_result(const ScorePairs<kSplit, Warp>& score, const Tile& rows, int block0,
                                                int width, F use) {
  static_assert(Tile::kCols == Warp::kWidth);
  const LaneOffset lane = Tile::lane_offset();
#pragma unroll
  for (int step = 0; step < Warp::kWidth / 16; ++step) {
    asm volatile("" : "+r"(width));
    if (step / 2 * 32 >= width) return;
    const int block = Tile::column_block(step);
    HalfPairSum sum[Warp::kRowBlocks][2];
#pragma unroll
    for (int k = 0; k < Warp::kSteps; ++k) {
      HalfPair<kSplit, 4> b;
      load_rows(b, rows, lane, block0 + k, block);
      multiply_add(sum, score.a[k], b, k == 0);
    }
#pragma unroll
    for (int m = 0; m < Warp::kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          use(2 * m + i / 2, Tile::result(2 * block + n, i % 2), sum[m][n].template value<kSplit>(i));
        }
      }
    }
  }
}

// result += scores times rows of a tile, product by product: single parts have errors beside which those of long sums
// are nothing.
template <class Warp, class Tile>
__device__ __forceinline__ void accumulate_result(Results<Warp>& result, const ScorePairs<false, Warp>& score,
                                                  const Tile& rows, int block0, int width) {
  const LaneOffset lane = Tile::lane_offset();
#pragma unroll
  for (int step = 0; step < Warp::kWidth / 16; ++step) {
    asm volatile("" : "+r"(width));
    if (step / 2 * 32 >= width) return;
    const int block = Tile::column_block(step);
#pragma unroll
    for (int k = 0; k < Warp::kSteps; ++k) {
      HalfPair<false, 4> b;
      load_rows(b, rows, lane, block0 + k, block);
#pragma unroll
      for (int m = 0; m < Warp::kRowBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float sum[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] = result[2 * m + i / 2][Tile::result(2 * block + n, i % 2)];
          Mma<Sm80, __half>::add(sum, score.a[k][m].big, b.big[2 * n], b.big[2 * n + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) result[2 * m + i / 2][Tile::result(2 * block + n, i % 2)] = sum[i];
        }
      }
    }
  }
}

// As multiply_result, for 32 columns from 32 * block alone: use(n, i, x), where x is of row i / 2 and the lane's column
// 2 n + i % 2.
template <bool kSplit, class Warp, class Tile, class F>
__device__ __forceinline__ void multiply_columns(const ScorePairs<kSplit, Warp>& score, const Tile& rows, int block,
                                                 F use) {
  static_assert(Tile::kRows == Warp::kColumns && Warp::kRowBlocks == 1);
  const LaneOffset lane = Tile::lane_offset();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    HalfPairSum sum[1][2];
#pragma unroll
    for (int k = 0; k < Warp::kSteps; ++k) {
      HalfPair<kSplit, 4> b;
      load_rows(b, rows, lane, k, Tile::column_block(step) + block * (Tile::kGroups >= 8 ? 1 : 2));
      multiply_add(sum, score.a[k], b, k == 0);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        use(Tile::result(2 * Tile::column_block(step) + n, 0) / 2, i, sum[0][n].template value<kSplit>(i));
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
