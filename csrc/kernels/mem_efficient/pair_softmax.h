// From products of pairs to probabilities. A product goes straight into the exponent of two, by one fused multiply-add,
// whose rounding is that of the exponent's distance from its reference; only float masks need scores in between.
#pragma once

#include "../attn/mask.h"
#include "pair_tile.h"
#include "statistics.h"

namespace sdpa::efficient {

// How products become exponents. The sign of the scale is the queries' matter, and so is a scale of 0.
struct PairScale {
  float query_sign, to_score, to_exponent;
  bool is_biased;  // what goes into the exponent is not the product but product * to_score + bias

  __device__ __forceinline__ static PairScale of(const ForwardParams& p) {
    const bool is_biased = p.mask_kind != MaskKind::kNone && p.mask_kind != MaskKind::kBool;
    const float size = p.scale == 0.f ? 1.f : fabsf(p.scale), to_score = size * power_of_two(-2 * kShift);
    return {p.scale == 0.f ? 0.f : copysignf(1.f, p.scale), to_score, is_biased ? kLog2E : to_score * kLog2E,
            is_biased};
  }

  // x is a product or, if biased, a score. A score below the lowest whose exponent is a number counts as that: a row
  // filled with the lowest finite value is uniform.
  __device__ __forceinline__ float add_bias(float x, float bias) const {
    if (bias == -INFINITY) return -INFINITY;
    if (!is_biased) return x;
    const float sum = x + bias;
    return sum < -2.3e38f ? -2.3e38f : sum;  // NaN stays
  }
};

// The running softmax of a forward pass. A row's reference follows its maximum when that has outgrown it by kSlack
// powers of two; a probability is up to 2^(kHeadroom + kSlack), and what float16 cannot hold of it is below 2^-32 of
// the largest.
template <class Warp>
struct PairSoftmax {
  static constexpr float kHeadroom = 7.f, kSlack = 4.f;

  float reference[Warp::kRowsOwned];  // an exponent of two
  float sum[Warp::kRowsOwned];        // this lane's share

  __device__ static PairSoftmax none() {
    PairSoftmax s;
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      s.reference[i] = -INFINITY;
      s.sum[i] = 0.f;
    }
    return s;
  }

  // This thread's rows from kBytes of shared memory, and there.
  static constexpr int kBytes = 2 * Warp::kRowsOwned * 4;
  __device__ __forceinline__ void load(uint32_t place) {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      const float2 row = load_shared_8(place + 8 * i);
      reference[i] = row.x;
      sum[i] = row.y;
    }
  }
  __device__ __forceinline__ void store(uint32_t place) const {
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      store_shared_4(place + 8 * i, __float_as_uint(reference[i]));
      store_shared_4(place + 8 * i + 4, __float_as_uint(sum[i]));
    }
  }

  // Makes probabilities, up to the row's sum; rescales what was made of earlier ones.
  template <class Rows = OwnRows<Warp>>
  __device__ __forceinline__ void take_in(Scores<Warp>& score, float to_exponent, Results<Warp>& result,
                                          const Rows& rows = {}) {
    float most[Warp::kRowsOwned];
    bool outgrown = false;
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      most[i] = score[i][0];
#pragma unroll
      for (int j = 1; j < Warp::kColumnsOwned; ++j) most[i] = fmaxf(most[i], score[i][j]);
      outgrown |= fmaf(most[i], to_exponent, -reference[i]) > kHeadroom + kSlack;
    }
    if (rows.any(outgrown)) {
      rows.find_row_max(most);
#pragma unroll
      for (int i = 0; i < Warp::kRowsOwned; ++i) {
        const float next = fmaxf(reference[i], fmaf(most[i], to_exponent, -kHeadroom));
        const float rescale = next == -INFINITY ? 1.f : exp2_approx(reference[i] - next);
        reference[i] = next;
        sum[i] *= rescale;
#pragma unroll
        for (float& x : result[i]) x *= rescale;
      }
    }
#pragma unroll
    for (int i = 0; i < Warp::kRowsOwned; ++i) {
      const float finite = reference[i] == -INFINITY ? 0.f : reference[i];  // -inf - -inf would be NaN
      float step_sum = 0.f;
#pragma unroll
      for (int j = 0; j < Warp::kColumnsOwned; ++j) {
        score[i][j] = exp2_approx(fmaf(score[i][j], to_exponent, -finite));
        step_sum += score[i][j];
      }
      sum[i] += step_sum;
    }
  }

  // After the last keys: the factor that normalises a row, 0 for one with nothing to attend to. `row` < 0: its
  // statistics are not wanted.
  __device__ __forceinline__ float finish(int i, const ForwardParams& p, int64_t row) const {
    const float total = Warp::row_sum(sum[i]);
    const bool is_empty = reference[i] == -INFINITY && total == 0.f;
    if (row >= 0) {
      int exponent;
      const float mantissa = frexpf(total, &exponent);  // the logarithm's rounding is then that of a number below 1
      const double whole = static_cast<double>(reference[i]) + (exponent + static_cast<double>(log2f(mantissa)));
      const float lse = is_empty ? -INFINITY : static_cast<float>(whole * 0.6931471805599453);
      p.logsumexp[row] = lse;
      if (p.logsumexp_rest != nullptr) {
        p.logsumexp_rest[row] = is_empty ? 0.f : static_cast<float>(whole - __fmul_rn(lse, kLog2E));
      }
    }
    return is_empty ? 0.f : 1.f / total;
  }
};

// A row's reference for the backward, an exponent of two in two parts, and delta (see statistics.h).
__device__ __forceinline__ QueryStatistics pair_statistics(const BackwardParams& p, int64_t head_index, int query) {
  if (query >= p.L) return {{0.f, 0.f}, 0.f};
  const int64_t row = head_index * p.L + query;
  const float lse = p.logsumexp[row], delta = p.delta[row];
  if (lse == -INFINITY) return {{INFINITY, 0.f}, delta};  // nothing to attend to: every P is 0
  return {{__fmul_rn(lse, kLog2E), p.logsumexp_rest != nullptr ? p.logsumexp_rest[row] : product_rest(lse)}, delta};
}
__device__ __forceinline__ float pair_probability(float score, float to_exponent, const RowReference& reference) {
  return exp2_approx(fmaf(score, to_exponent, -reference.lse) - reference.rest);
}

}  // namespace sdpa::efficient
