// What is known of whole blocks of a bool mask, 32 queries by 32 keys, so that kernels leave out tiles in which nothing
// takes part, and do not read the mask where all does. Found once for each call, before its kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace sdpa {

// Of one (batch, head). A word is 32 blocks side by side: bit i of the low half says whether any score of the i-th
// takes part, bit i of the high half whether all do, as far as they exist.
struct MaskBlocks {
  static constexpr int kQueries = 32, kKeys = 32, kWordKeys = 32 * kKeys;

  // Of a mask, and of a row of its blocks.
  static __host__ __device__ int64_t count_rows(const ForwardParams& p) { return (p.L + kQueries - 1) / kQueries; }
  static __host__ __device__ int64_t count_words(const ForwardParams& p) { return (p.S + kWordKeys - 1) / kWordKeys; }

#if defined(__CUDACC__)
  const uint64_t* words;
  int rows, words_per_row;

  __device__ __forceinline__ MaskBlocks(const ForwardParams& p, int batch, int head)
      : words(p.mask_blocks + batch * p.mask_blocks_stride[0] + head * p.mask_blocks_stride[1]),
        rows(static_cast<int>(count_rows(p))),
        words_per_row(static_cast<int>(count_words(p))) {}

  // Of kCount queries from q0 on, a multiple of 32 both, and of keys [word * kWordKeys, (word + 1) * kWordKeys).
  template <int kCount>
  __device__ __forceinline__ uint64_t word_of(int q0, int word) const {
    static_assert(kCount % kQueries == 0);
    uint32_t any = 0, all = ~0u;
#pragma unroll
    for (int i = 0; i < kCount / kQueries; ++i) {
      const int64_t row = min(q0 / kQueries + i, rows - 1);
      const uint64_t x = __ldg(words + row * words_per_row + word);
      any |= static_cast<uint32_t>(x);
      all &= static_cast<uint32_t>(x >> 32);
    }
    return any | uint64_t{all} << 32;
  }
#endif
};

// How many words a call's masks have, 0 if they are not to be looked through: if the mask is of another kind, or is the
// same for all queries, which kernels see for themselves, or if that takes a time that matters.
inline int64_t mask_block_words(const ForwardParams& p) {
  constexpr int64_t kLeastScores = 1 << 22, kLeastShared = 4;
  const int64_t* const stride = p.attn_mask.stride;
  if (p.mask_kind != MaskKind::kBool || stride[2] == 0 || p.L == 0 || p.S == 0) return 0;
  const int64_t masks = (stride[0] == 0 ? 1 : p.B) * (stride[1] == 0 ? 1 : p.H);
  if (p.B * p.H < kLeastShared * masks || p.B * p.H * p.L * p.S < kLeastScores) return 0;
  return masks * MaskBlocks::count_rows(p) * MaskBlocks::count_words(p);
}

// Fills `words`, of which there are as many as said above, and tells p of them.
cudaError_t find_mask_blocks(ForwardParams& p, uint64_t* words, cudaStream_t stream);

}  // namespace sdpa
