// Softmax over rows of scores in a CPU's memory, and its derivative: what math does between its matrix products, in
// one pass over memory where ATen's operations make three to eight.
#pragma once

#include <cstdint>

namespace sdpa {

// Some rows of some heads, (batches, heads, rows), each of `columns` columns.
struct CpuSoftmax {
  static constexpr int64_t kPitchStep = 16;  // `pitch` is a multiple of it

  int64_t batches = 0, heads = 0, rows = 0, columns = 0;
  int64_t pitch = 0;  // elements from one row to the next of these two, which are contiguous
  // Scores, scaled, which become probabilities: 0 where dropout drops, the others not rescaled.
  float* scores = nullptr;
  // The gradients of those probabilities, already multiplied by dropout's rescale, which become those of the scores;
  // or null.
  float* grad_probs = nullptr;
  // Row r sees columns 0 to r + diagonal.
  int64_t diagonal = INT64_MAX / 2;
  // One of these two, or none: where a score takes part, and what is added to it. Columns side by side, stride 0 where
  // it broadcasts. A score that takes no part, or to which -inf is added, counts for nothing, whatever it is.
  const uint8_t* takes_part = nullptr;
  const float* bias = nullptr;
  int64_t mask_stride[3] = {0, 0, 0};
  // To which the gradients of the scores are added; or null. Each row has its own, whose columns are side by side.
  float* grad_mask = nullptr;
  int64_t grad_mask_stride[3] = {0, 0, 0};
  // Dropout: (batches, heads, rows, keep_pitch), contiguous; or null.
  const uint8_t* keep = nullptr;
  int64_t keep_pitch = 0;
  // (batches, heads, rows), -inf for a row with nothing to attend to; or null.
  float* logsumexp = nullptr;
  int64_t logsumexp_stride[3] = {0, 0, 0};
};

// Returns whether some row has nothing to attend to. Parallel, unless within a parallel region.
bool softmax_on_cpu(const CpuSoftmax& rows);

}  // namespace sdpa
