// keep[batch_head][row][column] = 1 where dropout keeps the score, for first_batch_head + batch_head and
// first_row + row; uint8 (batch_heads, rows, S), contiguous, in device memory like seed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sdpa {

cudaError_t dropout_mask(uint8_t* keep, int64_t first_batch_head, int64_t batch_heads, int64_t first_row, int64_t rows,
                         int64_t S, float p, const int64_t* seed, cudaStream_t stream);

}  // namespace sdpa
