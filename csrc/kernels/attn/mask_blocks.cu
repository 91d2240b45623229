#include "attn/mask_blocks.h"

namespace sdpa {
namespace {

constexpr int kThreads = 128;

// A warp makes a word. With 16-byte loads a lane reads a block of its own.
__global__ void __launch_bounds__(kThreads)
    mask_blocks_kernel(const __grid_constant__ ForwardParams p, uint64_t* words, int64_t count) {
  constexpr int kQueries = MaskBlocks::kQueries, kKeys = MaskBlocks::kKeys;
  const int lane = threadIdx.x % 32;
  const int64_t number = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (number >= count) return;
  const int64_t* const stride = p.attn_mask.stride;
  const int64_t words_per_row = MaskBlocks::count_words(p);
  const int64_t rows = MaskBlocks::count_rows(p), mask = number / words_per_row / rows;
  const int64_t masks_of_batch = stride[1] == 0 ? 1 : p.H;  // else there is one batch's, or as many as batches
  const int64_t query = number / words_per_row % rows * kQueries;
  const int64_t first_key = number % words_per_row * MaskBlocks::kWordKeys;
  const auto* const data = static_cast<const uint8_t*>(p.attn_mask.data) + mask / masks_of_batch * stride[0] +
                           mask % masks_of_batch * stride[1] + query * stride[2] + first_key * stride[3];
  const int queries = static_cast<int>(min(p.L - query, int64_t{kQueries}));
  const int keys = static_cast<int>(min(p.S - first_key, int64_t{MaskBlocks::kWordKeys}));

  uint32_t any, all;
  const bool is_aligned = stride[3] == 1 && (reinterpret_cast<uint64_t>(data) | stride[2]) % 16 == 0;
  if (is_aligned && keys % kKeys == 0) {
    uint32_t ones = 0, zeros = 0;
    if (lane * kKeys < keys) {
#pragma unroll 8
      for (int i = 0; i < queries; ++i) {
        const auto* const from = reinterpret_cast<const uint4*>(data + i * stride[2] + lane * kKeys);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 x = __ldg(from + half);
          for (const uint32_t four : {x.x, x.y, x.z, x.w}) {
            ones |= four;
            zeros |= (four - 0x01010101u) & ~four & 0x80808080u;  // not 0 if, and only if, a byte is 0
          }
        }
      }
    }
    any = __ballot_sync(0xffffffffu, ones != 0);
    all = __ballot_sync(0xffffffffu, zeros == 0);
  } else {
    any = 0, all = ~0u;
#pragma unroll 1
    for (int block = 0; block * kKeys < keys; ++block) {
      const int key = block * kKeys + lane;
      bool one = false, zero = false;
      if (key < keys) {
#pragma unroll 8
        for (int i = 0; i < queries; ++i) {
          const bool takes_part = __ldg(data + i * stride[2] + key * stride[3]) != 0;
          one |= takes_part, zero |= !takes_part;
        }
      }
      if (__any_sync(0xffffffffu, one)) any |= 1u << block;
      if (__any_sync(0xffffffffu, zero)) all &= ~(1u << block);
    }
  }
  if (lane == 0) words[number] = any | uint64_t{all} << 32;
}

}  // namespace

cudaError_t find_mask_blocks(ForwardParams& p, uint64_t* words, cudaStream_t stream) {
  const int64_t count = mask_block_words(p), of_mask = MaskBlocks::count_rows(p) * MaskBlocks::count_words(p);
  const int64_t blocks = (count * 32 + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t* const stride = p.attn_mask.stride;
  p.mask_blocks = words;
  p.mask_blocks_stride[0] = stride[0] == 0 ? 0 : stride[1] == 0 ? of_mask : of_mask * p.H;
  p.mask_blocks_stride[1] = stride[1] == 0 ? 0 : of_mask;
  mask_blocks_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, words, count);
  return cudaGetLastError();
}

}  // namespace sdpa
