// Softmax over rows of scores that lie in memory, and its derivative: what the math backend does on a GPU between its
// matrix products, in one pass over memory instead of five to ten.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace sdpa {

// Some rows of some heads of the call that ForwardParams describes; of its operands only attn_mask is read, S is the
// number of columns at hand, and logsumexp is written through logsumexp_stride.
struct SoftmaxRows : ForwardParams {
  static constexpr int kPitchStep = 4;  // `pitch` is a multiple of it

  int64_t batch = 0, batches = 0, head = 0, heads = 0, row = 0, rows = 0;  // firsts and counts
  int64_t pitch = 0;  // float32 elements from one row to the next; (batches, heads, rows, pitch) is contiguous
  // float32 scores, scaled. Each row becomes its probabilities, as elements of `dtype` from the row's start on: 0 where
  // dropout drops, the others not rescaled.
  float* scores = nullptr;
  // Backward: likewise the gradient of those probabilities, already multiplied by dropout's rescale, which becomes the
  // gradient of the scores, as elements of grad_dtype.
  float* grad_probs = nullptr;
  DType grad_dtype = DType::kFloat32;
  int64_t logsumexp_stride[3] = {0, 0, 0};
};

cudaError_t softmax_rows(const SoftmaxRows& params, cudaStream_t stream);

// Whether it was compiled for the current device.
bool softmax_rows_runs_here();

}  // namespace sdpa
