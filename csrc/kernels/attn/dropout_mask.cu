// The dropout mask as a tensor, for the math backend, which multiplies by it. Every other backend draws it in place.

#include <cuda_runtime.h>

#include "attn/dropout.h"
#include "attn/dropout_mask.h"

namespace sdpa {

constexpr int kDropoutMaskThreads = 256;

// A score a thread, though a draw decides on 16: this is for the differentiable backward alone.
static __global__ void dropout_mask_kernel(uint8_t* keep, int64_t first_batch_head, int64_t first_row, int64_t rows,
                                           int64_t S, int64_t count, float p, const int64_t* seed) {
  const Dropout dropout = Dropout::make(p, *seed);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += step) {
    const int64_t line = n / S, col = n % S;
    const int64_t batch_head = first_batch_head + line / rows, row = first_row + line % rows;
    keep[n] = dropout.keep(static_cast<uint32_t>(batch_head), static_cast<uint32_t>(row), static_cast<uint32_t>(col));
  }
}

// keep[bh, row, col], contiguous, becomes 1 where dropout keeps score (first_row + row, col) of
// first_batch_head + bh, 0 elsewhere.
cudaError_t dropout_mask(uint8_t* keep, int64_t first_batch_head, int64_t batch_heads, int64_t first_row, int64_t rows,
                         int64_t S, float p, const int64_t* seed, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 1 << 16;  // the kernel loops over the rest
  const int64_t count = batch_heads * rows * S;
  if (count == 0) return cudaSuccess;
  const int64_t wanted = (count + kDropoutMaskThreads - 1) / kDropoutMaskThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  dropout_mask_kernel<<<blocks, kDropoutMaskThreads, 0, stream>>>(keep, first_batch_head, first_row, rows, S, count, p,
                                                                  seed);
  return cudaGetLastError();
}

}  // namespace sdpa
