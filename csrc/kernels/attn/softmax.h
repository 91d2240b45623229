// The running softmax of a forward pass over key tiles, on mma accumulators: a lane holds a share of rows g and g + 8
// of every 16-row block (see arch/mma.h), and the four lanes of a quad share a row. All statistics are float32.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace sdpa {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// kRowBlocks: 16-row blocks of one warp. `scale_log2` (> 0) turns a score into an exponent of two.
//
// What is subtracted before exp2 need not be the row's maximum, it only has to keep exp2 in range. So this reference
// follows the maximum, and the output is rescaled, only when some row of the warp has outgrown its reference by
// kSlack powers of two: P stays at most 2^kSlack, which float16 holds with ease, and most tiles skip the rescaling.
// (H200, L = 4096: a slack of 0 costs 3 to 6 %.)
//
// kFewInstructions: whether some score has outgrown its reference is asked of the scores' bits, taken as integers,
// which Hopper compares three at a time. That is right where the reference is not far below 0, and elsewhere always
// answers yes, so it suits scores that are not moved by a bias.
template <int kRowBlocks, bool kFewInstructions = false>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.f;
  static constexpr float kNothingYet = -FLT_MAX;  // finite, so that exp2(-inf - reference) is 0 from the start

  float reference[kRowBlocks][2];  // an exponent of two
  float sum[kRowBlocks][2];        // this lane's share
  float scale_log2;

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reference[m][half] = kNothingYet;
        sum[m][half] = 0.f;
      }
    }
  }

  // Takes in a tile's scores before their first exp2. A score of -inf takes no part. kTriesZero: see start_at_0.
  template <bool kTriesZero = false, int kCols, int kOutCols>
  __device__ __forceinline__ void see(const float (&scores)[kRowBlocks][kCols][4],
                                      float (&output)[kRowBlocks][kOutCols][4], bool is_first = false) {
    const bool tries_zero = kTriesZero && is_first;
    if (tries_zero) start_at_0();
    if (!__any_sync(0xffffffffu, tries_zero ? is_far_from_0(scores) : has_outgrown(scores))) return;
    float highest[kRowBlocks][2];
    find_highest(highest, scores);
    if (tries_zero || __any_sync(0xffffffffu, exceeds(highest))) raise<kTriesZero>(highest, output, is_first);
  }

  // The parts of `see`, for warps that share rows: whether some row has outgrown its reference in this lane's share,
  template <int kCols>
  __device__ __forceinline__ bool has_outgrown(const float (&scores)[kRowBlocks][kCols][4]) const {
    bool outgrown = false;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x;
        if constexpr (kFewInstructions) {
          // If the highest score is negative, the integers' order is the wrong way round, but then none exceeds the
          // reference's slack.
          int bits = max(__float_as_int(scores[m][0][2 * half]), __float_as_int(scores[m][0][2 * half + 1]));
#pragma unroll
          for (int n = 1; n < kCols; ++n) {
            bits =
                __vimax3_s32(bits, __float_as_int(scores[m][n][2 * half]), __float_as_int(scores[m][n][2 * half + 1]));
          }
          x = __int_as_float(bits);
          outgrown |= reference[m][half] < -kSlack;
        } else {
          x = lane_max(scores[m], half);
        }
        outgrown |= fmaf(x, scale_log2, -reference[m][half]) > kSlack;
      }
    }
    return outgrown;
  }
  // The first tile's references may be 0 if the maxima of its rows are near that. They are if each lane finds such a
  // score in its share, which takes no exchange between lanes.
  __device__ __forceinline__ void start_at_0() {
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) reference[i / 2][i % 2] = 0.f;
  }
  // Whether this lane finds none in some row. Then `raise` makes references of the maxima alone.
  template <int kCols>
  __device__ __forceinline__ bool is_far_from_0(const float (&scores)[kRowBlocks][kCols][4]) const {
    bool is_far = false;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = lane_max(scores[m], half) * scale_log2;
        is_far |= !(x >= -1.f && x <= kSlack);
      }
    }
    return is_far;
  }
  // the highest exponents of the warp's rows,
  template <int kCols>
  __device__ __forceinline__ void find_highest(float (&highest)[kRowBlocks][2],
                                               const float (&scores)[kRowBlocks][kCols][4]) const {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) highest[m][half] = quad_max(lane_max(scores[m], half)) * scale_log2;
    }
  }
  // whether one of them exceeds its reference by more than the slack: has_outgrown may have been wrong about that,
  __device__ __forceinline__ bool exceeds(const float (&highest)[kRowBlocks][2]) const {
    bool any = false;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) any |= highest[m][half] - reference[m][half] > kSlack;
    }
    return any;
  }
  // and new references for all rows. is_first: there is no output yet; kTriesZero: and they began as 0.
  template <bool kTriesZero = false, int kOutCols>
  __device__ __forceinline__ void raise(const float (&highest)[kRowBlocks][2], float (&output)[kRowBlocks][kOutCols][4],
                                        bool is_first = false) {
    float factor[kRowBlocks][2];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool anew = kTriesZero && is_first;
        const float now = fmaxf(highest[m][half], anew ? kNothingYet : reference[m][half]);
        factor[m][half] = exp2_approx(reference[m][half] - now);
        reference[m][half] = now;
        sum[m][half] = anew ? 0.f : sum[m][half] * factor[m][half];
      }
    }
    if (is_first) return;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kOutCols; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[m][n][i] *= factor[m][i / 2];
      }
    }
  }

  // The highest score of this lane in its row `half`.
  template <int kCols>
  static __device__ __forceinline__ float lane_max(const float (&scores)[kCols][4], int half) {
    float x = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < kCols; ++n) x = fmaxf(x, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    return x;
  }

  // The unnormalised probabilities of one 16 x 8 tile, in place; adds them to the sums.
  __device__ __forceinline__ void exponentiate(float (&scores)[4], int m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -reference[m][i >> 1]));
      sum[m][i >> 1] += scores[i];
    }
  }

  // Between `see` and `exponentiate`, for a score that dropout drops: it counts in the sum alone.
  __device__ __forceinline__ void take_out(float& score, int m, int half) {
    sum[m][half] += exp2_approx(fmaf(score, scale_log2, -reference[m][half]));
    score = -INFINITY;
  }

  // After the last tile: the factors that normalise the rows, and of one of this lane's rows, which is row lane % 2 * 8
  // + lane / 4 of block lane / 2 % 2, its LSE and what rounding took from it.
  __device__ __forceinline__ void finish_all(float (&factors)[kRowBlocks][2], float& logsumexp, float& rest) {
    static_assert(kRowBlocks == 2);
    float total[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[i] = quad_sum(sum[i / 2][i % 2]);
      factors[i / 2][i % 2] = total[i] == 0.f ? 0.f : __fdividef(1.f, total[i]);
    }
    const bool is_odd = threadIdx.x % 2 == 1, is_second = threadIdx.x / 2 % 2 == 1;
    const auto own = [&](float a, float b, float c, float d) { return is_second ? is_odd ? d : c : is_odd ? b : a; };
    set_logsumexp(own(total[0], total[1], total[2], total[3]),
                  own(reference[0][0], reference[0][1], reference[1][0], reference[1][1]), logsumexp, rest);
  }

  // After the last tile: the factor that normalises a row, 0 for a row with nothing to attend to, and its LSE.
  __device__ __forceinline__ float finish(int m, int half, float& logsumexp) {
    float rest;
    return finish(m, half, logsumexp, rest);
  }
  // And what rounding took from the LSE (see params.h).
  __device__ __forceinline__ float finish(int m, int half, float& logsumexp, float& rest) {
    const float total = quad_sum(sum[m][half]);
    set_logsumexp(total, reference[m][half], logsumexp, rest);
    return total == 0.f ? 0.f : 1.f / total;
  }

 private:
  static __device__ __forceinline__ void set_logsumexp(float total, float its_reference, float& logsumexp,
                                                       float& rest) {
    const float log_total = log2f(total);
    logsumexp = total == 0.f ? -INFINITY : (its_reference + log_total) * kLn2;
    rest = total == 0.f ? 0.f : (its_reference - __fmul_rn(logsumexp, kLog2E)) + log_total;
  }
};

}  // namespace sdpa
