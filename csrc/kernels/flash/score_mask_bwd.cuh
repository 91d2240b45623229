// The mask tensor in the backward, where scores are computed transposed: its entries in registers or in shared memory,
// what they do to the scores, and its gradient.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../attn/mask_blocks.h"
#include "../attn/params.h"
#include "score_mask.cuh"
#include "tile.cuh"

namespace sdpa {

// The order of the keys (see ColumnRuns), which are the rows here: element i of accumulators m is key
// 2 kBlocks * (lane / 4) + 2 m + i / 2 of its warp.
template <int kBlocks>
struct RowRuns {
  static constexpr int kRun = 2 * kBlocks;
  static __host__ __device__ constexpr int key(int row) {
    return row / (16 * kBlocks) * (16 * kBlocks) + row % 8 * kRun + row % (16 * kBlocks) / 8;
  }
};

// The log2 of P^T, from S^T. read(run) reads this lane's entries of the mask, a run for each of its queries; lse and
// rest are those of the first. kPacked: a mask of at most 16 bits.
template <bool kPacked, int kKeyBlocks, int kCols, class Read>
__device__ __forceinline__ void transposed_log2_probability(float (&scores)[kKeyBlocks][kCols][4], MaskKind kind,
                                                            float scale_log2, const float* lse, const float* rest,
                                                            Read read) {
  with_mask_type(kind, [&]<class M>(const M*) {
    const auto each = [&](auto f) {
#pragma unroll
      for (int n = 0; n < kCols; ++n) {
        const float2 row_lse = *reinterpret_cast<const float2*>(lse + n * 8);
        const float2 row_rest = *reinterpret_cast<const float2*>(rest + n * 8);
#pragma unroll
        for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            f(scores[m][n][i], 2 * n + i % 2, 2 * m + i / 2, i % 2 == 0 ? row_lse.x : row_lse.y,
              i % 2 == 0 ? row_rest.x : row_rest.y);
          }
        }
      }
    };
    if constexpr (std::is_void_v<M> || (kPacked && std::is_same_v<M, float>)) {
      each([&](float& score, int, int, float lse, float) { score = fmaf(score, scale_log2, -lse); });
    } else {
      MaskRun<M, 2 * kKeyBlocks> run[2 * kCols];
      read(run);
      const auto all_plain = [&] {
        MaskRun<M, 2 * kKeyBlocks> lowest[1] = {run[0]};
#pragma unroll
        for (int n = 1; n < 2 * kCols; ++n) lowest[0].take_lower(run[n]);
        return are_plain(lowest);
      };
      if constexpr (sizeof(M) == 1) {
        each([&](float& score, int n, int entry, float lse, float) {
          score = run[n].takes_part(entry) ? fmaf(score, scale_log2, -lse) : -INFINITY;
        });
      } else if (all_plain()) {
        each([&](float& score, int n, int entry, float lse, float rest) {
          score = run[n].template apply<true>(score, scale_log2, entry) - lse - rest;
        });
      } else {
        each([&](float& score, int n, int entry, float lse, float rest) {
          score = run[n].template apply<false>(score, scale_log2, entry) - lse - rest;
        });
      }
    }
  });
}

// A tile of the mask in shared memory, one query after the other, as its entries lie in memory. It comes with the other
// tiles, while the scores before are worked on, and costs few instructions, which are what the loop's time goes by: a
// lane that reads its entries itself computes their addresses in every step. The pitch keeps a warp's runs in different
// banks.
template <int kQueries, int kKeys>
struct SharedMask {
  static constexpr int kPitch = kKeys * 2 + kChunkBytes, kBytes = kQueries * kPitch;
  uint32_t base;

  // Whether it takes a mask: one of at most 16 bits, with a row for each query, which can be copied 16 bytes at a time.
  static bool fits(const ForwardParams& p) {
    if (p.mask_kind == MaskKind::kNone || p.mask_kind == MaskKind::kFloat32) return false;
    const int64_t* const stride = p.attn_mask.stride;
    const int64_t elements = kChunkBytes / (p.mask_kind == MaskKind::kBool ? 1 : 2);
    return stride[3] == 1 && stride[2] != 0 && (stride[0] | stride[1] | stride[2]) % elements == 0 &&
           reinterpret_cast<uint64_t>(p.attn_mask.data) % kChunkBytes == 0;
  }

  template <int kThreads>
  __device__ __forceinline__ void fill(const ForwardParams& p, int batch, int head, int q0, int k0) const {
    const int64_t* const stride = p.attn_mask.stride;
    const int shift = p.mask_kind == MaskKind::kBool ? 0 : 1;  // of elements to bytes
    const int chunks = kKeys / kChunkBytes << shift;
    const int first = threadIdx.x / chunks, byte = threadIdx.x % chunks * kChunkBytes, row_step = kThreads / chunks;
    const int keys = min(static_cast<int>(p.S) - k0, kKeys), last = static_cast<int>(p.L) - 1;
    const int present = min(max((keys << shift) - byte, 0), kChunkBytes);
    const char* const from =
        static_cast<const char*>(p.attn_mask.data) + byte + ((batch * stride[0] + head * stride[1] + k0) << shift);
#pragma unroll 2
    for (int row = first; row < kQueries; row += row_step) {  // as HeadMask::read, of a query past the last
      cp_async<kChunkBytes>(base + row * kPitch + byte, from + (min(q0 + row, last) * stride[2] << shift), present);
    }
  }

  // Run n is that of query + n / 2 * 8 + n % 2, from `key` on; both count from the tile's first.
  template <class M, int kCount, int kRuns>
  __device__ __forceinline__ void read(MaskRun<M, kCount> (&run)[kRuns], int query, int key) const {
    if constexpr (sizeof(M) <= 2) {
      const uint32_t from = base + query * kPitch + key * static_cast<int>(sizeof(M));
#pragma unroll
      for (int n = 0; n < kRuns; ++n) run[n].read_shared(from + (n / 2 * 8 + n % 2) * kPitch);
    }
  }
};

// Which query tiles a loop takes: those with a score of the block's keys that a bool mask lets take part, as far as it
// is known (of key padding, and where blocks have been looked through) and the same for all heads of the loop. In
// shared memory, for each of the first kTiles tiles how far it is to the first to be taken, a byte: one load, since all
// warps wait for it at the same time (finding a bit in a word instead cost the backward 11 %).
template <int kQueries, int kKeys, int kTiles>
struct QueryTiles {
  static constexpr int kBytes = kTiles + kTiles / 8;
  uint32_t base;

  // All threads of the block; ends with a barrier. (Inlined, it makes the wide kernel spill at 128 columns on sm90.)
  template <int kThreads>
  __device__ __noinline__ void fill(const ForwardParams& p, int batch, int head, int k0) const {
    static_assert(MaskBlocks::kWordKeys % kKeys == 0 && kKeys % MaskBlocks::kKeys == 0 && kTiles % 32 == 0);
    constexpr uint32_t kKeyBits = (1u << kKeys / MaskBlocks::kKeys) - 1;
    const bool is_same = p.group == 1 || p.attn_mask.stride[1] == 0, is_known = is_same && p.mask_blocks != nullptr;
    const bool any_key = !is_same || any_key_takes_part<kKeys>(p, batch, head, k0);
    const int count = static_cast<int>((p.L + kQueries - 1) / kQueries);
    const int end = min(count / 32 * 32 + 32, kTiles);
    const MaskBlocks blocks(p, batch, head);
    const uint32_t words = base + kTiles;
    for (int i = threadIdx.x; i < end; i += kThreads) {
      bool takes_part = any_key || i >= count;  // one that does not exist ends the loop
      if (is_known && takes_part && i < count) {
        const uint64_t word = blocks.word_of<kQueries>(i * kQueries, k0 / MaskBlocks::kWordKeys);
        takes_part = (word >> k0 % MaskBlocks::kWordKeys / MaskBlocks::kKeys & kKeyBits) != 0;
      }
      const uint32_t bits = __ballot_sync(0xffffffffu, takes_part);
      if (i % 32 == 0) asm volatile("st.shared.u32 [%0], %1;" ::"r"(words + i / 8), "r"(bits) : "memory");
    }
    __syncthreads();
    for (int i = threadIdx.x; i < end; i += kThreads) {
      int tile = i;
      while (tile < end) {
        const uint32_t bits = static_cast<uint32_t>(load_shared_4(words + tile / 32 * 4)) >> tile % 32;
        if (bits != 0) {
          tile += __ffs(static_cast<int>(bits)) - 1;
          break;
        }
        tile = (tile / 32 + 1) * 32;
      }
      asm volatile("st.shared.u8 [%0], %1;" ::"r"(base + i), "r"(min(tile - i, 255)) : "memory");
    }
    __syncthreads();
  }
  // The first from this one on.
  __device__ __forceinline__ int from(int tile) const {
    uint32_t distance;  // which nobody writes: a load that may move
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(distance) : "r"(base + min(tile, kTiles - 1)));
    return tile + (tile < kTiles ? static_cast<int>(distance) : 0);
  }
};

// This lane's entries for one step of transposed scores, from global memory. They are read before the step's products,
// so that the loads are on their way meanwhile, unless they would take too many registers.
template <int kKeyBlocks, int kCols, int kEarlyWords>
struct TransposedMask {
  static constexpr int kRuns = 2 * kCols, kCount = 2 * kKeyBlocks;
  uint32_t words[kRuns][kEarlyWords > 0 ? kEarlyWords : 1];

  template <class M>
  static constexpr bool kIsEarly = kCount * sizeof(M) <= kEarlyWords * 4;

  static __device__ __forceinline__ constexpr int offset(int n) { return n / 2 * 8 + n % 2; }

  // `query` and `key` are this lane's first.
  __device__ __forceinline__ void read_early(const ForwardParams& p, int batch, int head, int query, int key) {
    with_mask_type(p.mask_kind, [&]<class M>(const M*) {
      if constexpr (!std::is_void_v<M>) {
        if constexpr (kIsEarly<M>) {
          MaskRun<M, kCount> run[kRuns];
          HeadMask<M>(p, batch, head).read(run, query, key, offset);
#pragma unroll
          for (int n = 0; n < kRuns; ++n) memcpy(words[n], run[n].words, sizeof(run[n].words));
        }
      }
    });
  }

  // log2 of P^T from scores. lse and rest are those of this lane's first query.
  __device__ __forceinline__ void log2_probability(float (&scores)[kKeyBlocks][kCols][4], const ForwardParams& p,
                                                   int batch, int head, int query, int key, float scale_log2,
                                                   const float* lse, const float* rest) const {
    const auto read = [&]<class M>(MaskRun<M, kCount>(&run)[kRuns]) {
      if constexpr (kIsEarly<M>) {
#pragma unroll
        for (int n = 0; n < kRuns; ++n) memcpy(run[n].words, words[n], sizeof(run[n].words));
      } else {
        HeadMask<M>(p, batch, head).read(run, query, key, offset);
      }
    };
    transposed_log2_probability<false>(scores, p.mask_kind, scale_log2, lse, rest, read);
  }
};

// Adds a tile of dS^T to the mask's gradient. It comes from shared memory, where a lane can take the keys that let a
// warp add to 128 bytes in a row. What the mask broadcasts over is summed up first, as far as it lies in the tile.
template <class T, int kWarps, class KeyOrder, class ScoreTile>
__device__ __forceinline__ void add_mask_gradient(const ScoreTile& tile, const BackwardParams& p, int batch, int head,
                                                  int q0, int k0) {
  constexpr int kKeyGroups = ScoreTile::kRows / 32, kShares = kWarps / kKeyGroups;
  static_assert(kKeyGroups * kShares == kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % kKeyGroups * 32 + lane, key = k0 + KeyOrder::key(row);
  const int64_t query_stride = p.grad_mask_stride[2], key_stride = p.grad_mask_stride[3];
  float* const to =
      p.grad_mask + batch * p.grad_mask_stride[0] + head * p.grad_mask_stride[1] + int64_t{key} * key_stride;
  const auto warp_sum = [](float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  };
  // dS is zero outside L x S.
  float total = 0.f;
#pragma unroll 1
  for (int chunk = warp / kKeyGroups; chunk < ScoreTile::kChunksPerRow; chunk += kShares) {
    const uint4 v = load_shared_16(tile.base + ScoreTile::offset(row, chunk));
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) {
      const int query = q0 + chunk * kChunkElements + i;
      const float2 pair = unpack<T>(words[i / 2]);
      const float x = i % 2 == 0 ? pair.x : pair.y;
      if (query_stride == 0) {
        total += x;
      } else if (key_stride == 0) {
        const float sum = warp_sum(x);
        if (lane == 0 && query < p.L) atomicAdd(to + query * query_stride, sum);
      } else if (query < p.L && key < p.S) {
        atomicAdd(to + query * query_stride, x);
      }
    }
  }
  if (query_stride != 0) return;
  if (key_stride == 0) total = warp_sum(total);
  if (key_stride == 0 ? lane == 0 : key < p.S) atomicAdd(to, total);
}

}  // namespace sdpa
