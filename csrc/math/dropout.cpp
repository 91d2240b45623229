// The dropout mask as a tensor, for math.
#include "attn/dropout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "math/math.h"

#if defined(SDPA_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "attn/dropout_mask.h"
#endif

namespace sdpa {

double dropout_rescale(double dropout_p) {
  return Dropout::make(static_cast<float>(dropout_p), 0).rescale;
}

static at::Tensor keep_on_cpu(int64_t seed, float p, int64_t first_batch_head, int64_t batch_heads, int64_t first_row,
                              int64_t rows, int64_t S) {
  at::Tensor keep = at::empty({batch_heads, rows, S}, at::kByte);
  uint8_t* const data = keep.data_ptr<uint8_t>();
  const Dropout dropout = Dropout::make(p, seed);
  at::parallel_for(0, batch_heads * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t batch_head = static_cast<uint32_t>(first_batch_head + i / rows);
      const uint32_t row = static_cast<uint32_t>(first_row + i % rows);
      uint8_t* const line = data + i * S;
      // A draw decides on every eighth score of 32 in this row.
      for (int64_t block = 0; block < S; block += 32) {
        for (uint32_t col8 = 0; col8 < 8; ++col8) {
          const Dropped16 dropped =
              dropout.draw(batch_head, row / 32, static_cast<uint32_t>(block / 32), row % 8, col8);
          for (uint32_t col = col8; col < 32 && block + col < S; col += 8) line[block + col] = dropped.keeps(row, col);
        }
      }
    }
  });
  return keep;
}

at::Tensor dropout_keep(const at::Tensor& seed, double dropout_p, int64_t first_batch_head, int64_t batch_heads,
                        int64_t first_row, int64_t rows, int64_t S) {
  const float p = static_cast<float>(dropout_p);
#if defined(SDPA_WITH_CUDA)
  if (seed.is_cuda()) {
    at::Tensor keep = at::empty({batch_heads, rows, S}, seed.options().dtype(at::kByte));
    C10_CUDA_CHECK(dropout_mask(keep.data_ptr<uint8_t>(), first_batch_head, batch_heads, first_row, rows, S, p,
                                seed.data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
    return keep;
  }
#endif
  // Without our kernels a GPU's mask is drawn on the CPU: slow, and the same.
  return keep_on_cpu(seed.item<int64_t>(), p, first_batch_head, batch_heads, first_row, rows, S).to(seed.device());
}

}  // namespace sdpa
