// What a row of scores is reduced to: the running softmax of the forward pass, and what is kept of it for the backward.
#pragma once

#include <cmath>

#include "../attn/softmax.h"
#include "tile.h"

namespace sdpa::efficient {

// 2^x to about two units in the last place; exp2f spends four instructions on it to be right for denormal results.
template <class Tile>
struct RowSoftmax {
  float maximum[Tile::kRowsOwned];  // of the row so far
  float sum[Tile::kRowsOwned];      // of this thread's share

  __device__ static RowSoftmax none() {
    RowSoftmax s;
#pragma unroll
    for (int i = 0; i < Tile::kRowsOwned; ++i) {
      s.maximum[i] = -INFINITY;
      s.sum[i] = 0.f;
    }
    return s;
  }

  // Makes a tile's scores probabilities, up to the row's sum; what was made of earlier tiles is to be multiplied by
  // rescale.
  __device__ __forceinline__ void take_in(Scores<Tile>& score, float (&rescale)[Tile::kRowsOwned]) {
#pragma unroll
    for (int i = 0; i < Tile::kRowsOwned; ++i) {
      float tile_max = score[i][0];
#pragma unroll
      for (int j = 1; j < Tile::kColumnsOwned; ++j) tile_max = fmaxf(tile_max, score[i][j]);
      const float new_max = fmaxf(maximum[i], Tile::row_max(tile_max));
      const float reference = new_max == -INFINITY ? 0.f : new_max;  // -inf - -inf would be NaN
      rescale[i] = exp2_approx((maximum[i] - reference) * kLog2E);
      maximum[i] = new_max;
      float tile_sum = 0.f;
#pragma unroll
      for (int j = 0; j < Tile::kColumnsOwned; ++j) {
        score[i][j] = exp2_approx((score[i][j] - reference) * kLog2E);
        tile_sum += score[i][j];
      }
      sum[i] = fmaf(sum[i], rescale[i], tile_sum);
    }
  }
};

// lse * log2(e) less its rounding to float: the distance between the two forms of a row's reference (see params.h).
// Both passes come by it in the same way, so it cancels. Near the lowest finite float the product is out of range.
__device__ __forceinline__ float product_rest(float lse) {
  const float rounded = __fmul_rn(lse, kLog2E);
  return isinf(rounded) ? 0.f : fmaf(lse, kLog2E, -rounded);
}

// Keeps the statistics of a row; `sum` is that of exp(score - maximum).
__device__ __forceinline__ void store_statistics(const ForwardParams& p, int64_t row, float maximum, float sum,
                                                 bool is_empty) {
  int exponent;
  const float mantissa = frexpf(sum, &exponent);  // taken apart, the logarithm's rounding is that of a number below 1
  const double log2_sum = exponent + static_cast<double>(log2f(mantissa));
  const float lse = is_empty ? -INFINITY : static_cast<float>(maximum + log2_sum * 0.6931471805599453);
  p.logsumexp[row] = lse;
  if (p.logsumexp_rest != nullptr) {
    const double rest = (static_cast<double>(maximum) - lse) * kLog2E + log2_sum;
    p.logsumexp_rest[row] = is_empty ? 0.f : static_cast<float>(rest) + product_rest(lse);
  }
}

// What the backward subtracts from a row's scores. The difference of two large numbers is exact where it matters; what
// the LSE was short of is taken off afterwards.
struct RowReference {
  float lse, rest;

  __device__ __forceinline__ static RowReference of(const ForwardParams& p, int64_t row) {
    const float lse = p.logsumexp[row];
    if (lse == -INFINITY) return {INFINITY, 0.f};  // nothing to attend to: every P is 0
    return {lse, p.logsumexp_rest != nullptr ? p.logsumexp_rest[row] - product_rest(lse) : 0.f};
  }
  __device__ __forceinline__ float probability(float score) const {
    return exp2_approx(fmaf(score - lse, kLog2E, -rest));
  }
};

// What the backward has to know of a query. One beyond the last has scores of -inf by its mask: any finite LSE will do.
struct QueryStatistics {
  RowReference reference;
  float delta;  // 0 if not wanted

  __device__ __forceinline__ static QueryStatistics of(const BackwardParams& p, int64_t head_index, int query,
                                                       bool wants_delta) {
    if (query >= p.L) return {{0.f, 0.f}, 0.f};
    const int64_t row = head_index * p.L + query;
    return {RowReference::of(p, row), wants_delta ? p.delta[row] : 0.f};
  }
};

// That of kCount queries, in shared memory.
template <int kCount>
struct StatisticsTile {
  static constexpr int kFloats = 3 * kCount;
  float* at;

  __device__ __forceinline__ void store(int n, const QueryStatistics& s) const {
    at[n] = s.reference.lse;
    at[n + kCount] = s.reference.rest;
    at[n + 2 * kCount] = s.delta;
  }
  __device__ __forceinline__ RowReference reference(int n) const { return {at[n], at[n + kCount]}; }
  __device__ __forceinline__ float delta(int n) const { return at[n + 2 * kCount]; }
};

}  // namespace sdpa::efficient
