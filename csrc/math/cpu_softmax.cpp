#include "math/cpu_softmax.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

// The machine's own vectors, whatever this file is compiled for.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define SDPA_FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SDPA_FOR_EVERY_CPU
#endif

namespace sdpa {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// exp(x) for x <= 0, within two units in the last place; 0 below the least normal number. As 2^n exp(r) with n an
// integer and |r| <= ln(2) / 2 (Cody and Waite's reduction), exp(r) by its Taylor polynomial of degree 7.
inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRounds = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float shifted = x * kLog2E + kRounds, n = shifted - kRounds;
  const float r = x - n * kLn2High - n * kLn2Low;
  float sum = 1.f / 5040;
  sum = sum * r + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 1.f / 2;
  sum = sum * r + 1.f;
  sum = sum * r + 1.f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.3f ? 0.f : sum * power;
}

// Puts `other` where `takes` is 0. (It must be inlined, or it is not part of the clones.)
#if defined(__GNUC__)
__attribute__((always_inline))
#endif
inline void choose(float* values, const uint8_t* takes, int64_t count, float other) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i];  // whatever is asked then: loops with conditional loads are not vectorised
    values[i] = takes[i] != 0 ? x : other;
  }
}

struct Row {
  int64_t columns, padded, visible;
  float* scores;
  float* grad_probs;
  const uint8_t* takes_part;
  const float* bias;
  float* grad_mask;
  const uint8_t* keep;
};

// Returns the LSE.
SDPA_FOR_EVERY_CPU float softmax_row(const Row& row) {
  float* const scores = row.scores;
  const int64_t visible = row.visible, padded = row.padded;
  if (row.takes_part != nullptr) choose(scores, row.takes_part, visible, kNegInf);
  if (row.bias != nullptr) {
    const float* const bias = row.bias;
#pragma omp simd
    for (int64_t i = 0; i < visible; ++i) {
      const float sum = scores[i] + bias[i];
      scores[i] = bias[i] == kNegInf ? kNegInf : sum;
    }
  }
  for (int64_t i = visible; i < padded; ++i) scores[i] = kNegInf;
  float highest = kNegInf;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < padded; ++i) highest = scores[i] > highest ? scores[i] : highest;
  const float reference = highest == kNegInf ? 0.f : highest;

  float total = 0.f;
  if (row.grad_probs == nullptr) {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < padded; ++i) {
      const float e = exponential(scores[i] - reference);
      total += e;
      scores[i] = e;
    }
    const float factor = total == 0.f ? 0.f : 1.f / total;
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) scores[i] *= factor;
  } else {
    float* const grads = row.grad_probs;
    if (row.keep != nullptr) choose(grads, row.keep, row.columns, 0.f);
    // What takes no part is marked by a negative number: its gradient is 0, whatever that of its probability is.
    constexpr float kNoPart = -1.f;
    float weighted = 0.f;
#pragma omp simd reduction(+ : total, weighted)
    for (int64_t i = 0; i < padded; ++i) {
      const float x = scores[i], e = exponential(x - reference), product = e * grads[i];
      total += e;
      weighted += x == kNegInf ? 0.f : product;
      scores[i] = x == kNegInf ? kNoPart : e;
    }
    const float factor = total == 0.f ? 0.f : 1.f / total, mean = weighted * factor;
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) {
      const float e = scores[i], probability = e < 0.f ? 0.f : e * factor, gradient = probability * (grads[i] - mean);
      grads[i] = e < 0.f ? 0.f : gradient;
      scores[i] = probability;
    }
    if (row.grad_mask != nullptr) {
      float* const grad_mask = row.grad_mask;
#pragma omp simd
      for (int64_t i = 0; i < row.columns; ++i) grad_mask[i] += grads[i];
    }
  }
  if (row.keep != nullptr) choose(scores, row.keep, row.columns, 0.f);
  return total == 0.f ? kNegInf : highest + std::log(total);
}

}  // namespace

bool softmax_on_cpu(const CpuSoftmax& p) {
  std::atomic<bool> has_empty{false};
  const int64_t few = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(p.pitch, 1));
  at::parallel_for(0, p.batches * p.heads * p.rows, few, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t r = line % p.rows, h = line / p.rows % p.heads, b = line / p.rows / p.heads;
      const auto place = [&](const int64_t (&stride)[3]) { return b * stride[0] + h * stride[1] + r * stride[2]; };
      const int64_t mask_row = place(p.mask_stride);
      const Row row{p.columns,
                    p.pitch,
                    std::clamp<int64_t>(r + p.diagonal + 1, 0, p.columns),
                    p.scores + line * p.pitch,
                    p.grad_probs == nullptr ? nullptr : p.grad_probs + line * p.pitch,
                    p.takes_part == nullptr ? nullptr : p.takes_part + mask_row,
                    p.bias == nullptr ? nullptr : p.bias + mask_row,
                    p.grad_mask == nullptr ? nullptr : p.grad_mask + place(p.grad_mask_stride),
                    p.keep == nullptr ? nullptr : p.keep + line * p.keep_pitch};
      const float logsumexp = softmax_row(row);
      if (logsumexp == kNegInf) has_empty.store(true, std::memory_order_relaxed);
      if (p.logsumexp != nullptr) p.logsumexp[place(p.logsumexp_stride)] = logsumexp;
    }
  });
  return has_empty;
}

}  // namespace sdpa
