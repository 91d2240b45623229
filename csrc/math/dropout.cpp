// The dropout mask as a tensor, for math.
#include "attn/dropout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>

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
  // By blocks of 32 rows: a draw decides on every eighth score of a block's rows and columns.
  const int64_t first_block = first_row / 32, last_row = first_row + rows;
  const int64_t blocks = (last_row + 31) / 32 - first_block;
  at::parallel_for(0, batch_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, block_row = first_block + i % blocks;
      uint8_t* const block = data + (head * rows + block_row * 32 - first_row) * S;
      for (int64_t place = 0; place < 8 * 8 * ((S + 31) / 32); ++place) {
        const int64_t row8 = place % 8, col8 = place / 8 % 8, block_col = place / 64;
        const Dropped16 dropped =
            dropout.draw(static_cast<uint32_t>(first_batch_head + head), static_cast<uint32_t>(block_row),
                         static_cast<uint32_t>(block_col), static_cast<uint32_t>(row8), static_cast<uint32_t>(col8));
        for (int64_t row = row8; row < 32; row += 8) {
          if (block_row * 32 + row < first_row || block_row * 32 + row >= last_row) continue;
          uint8_t* const line = block + row * S + block_col * 32;
          for (int64_t col = col8; col < std::min<int64_t>(32, S - block_col * 32); col += 8) {
            line[col] = dropped.keeps(static_cast<uint32_t>(row), static_cast<uint32_t>(col));
          }
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

at::Tensor dropout_seed(const at::Tensor& like) {
  return at::empty({1}, like.options().dtype(at::kLong)).random_();
}

at::Tensor dropout_keep_rows(const at::Tensor& seed, const at::Tensor& rows, int64_t S, double dropout_p) {
  const c10::OptionalDeviceGuard guard(seed.device());
  const int64_t L = rows.size(-1), batch_heads = rows.numel() / std::max<int64_t>(L, 1);
  auto sizes = rows.sizes().vec();
  sizes.push_back(S);
  return dropout_keep(seed, dropout_p, 0, batch_heads, 0, L, S).view(sizes);
}

at::Tensor call_dropout_seed(const at::Tensor& rows) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sdpa::_dropout_seed", "").typed<at::Tensor(const at::Tensor&)>();
  return op.call(rows);
}

at::Tensor call_dropout_keep(const at::Tensor& seed, const at::Tensor& rows, const c10::SymInt& S, double dropout_p) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sdpa::_dropout_keep", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, double)>();
  return op.call(seed, rows, S, dropout_p);
}

}  // namespace sdpa
