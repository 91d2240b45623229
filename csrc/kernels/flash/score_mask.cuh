// The mask tensor, read in place: which keys a lane holds so that it can read its entries with wide loads, and what
// they do to the scores. Only kernels for calls with a mask know of it. The backward's part: score_mask_bwd.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../attn/params.h"
#include "../attn/softmax.h"
#include "tile.cuh"

namespace sdpa {

// Which key stands in a row of a key or value tile. Attention does not care about the order of its keys, and the mma
// layout scatters a lane's keys over the tile; this order and the backward's RowRuns give a lane neighbouring keys, so
// that it reads its entries of the mask with a few wide loads.
//
// Forward (keys are the columns of the scores): element i of accumulator n is key kRows / 4 * (lane % 4) + 2 n + i % 2.
template <int kRows>
struct ColumnRuns {
  static __host__ __device__ constexpr int key(int row) { return row % 8 / 2 * (kRows / 4) + row / 8 * 2 + row % 2; }
};

// A bias lower than this, in powers of two, counts as this: the log2(e)-fold of a type's lowest value would be -inf,
// which means "takes no part". So far down the scores are lost in rounding anyway. This value survives
// float(float(x * ln 2) * log2 e), so that logsumexp_rest stays small in rows that are filled with the lowest value.
constexpr float kLowestBias = -68719476736.f;
constexpr float kLowestPlainBias = kLowestBias / 2.f;

// kCount neighbouring entries of a row of the mask, packed as they lie in memory.
template <class M, int kCount>
struct MaskRun {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(M));
  static constexpr int kAlignment = kBytes < 16 ? kBytes : 16;  // that read_wide wants
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes % 16 == 0);
  uint32_t words[(kBytes + 3) / 4];

  __device__ __forceinline__ void read_wide(const M* from) {
    if constexpr (kBytes == 2) {
      words[0] = __ldg(reinterpret_cast<const unsigned short*>(from));
    } else if constexpr (kBytes == 4) {
      words[0] = __ldg(reinterpret_cast<const unsigned*>(from));
    } else if constexpr (kBytes == 8) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
      for (int n = 0; n < kBytes / 16; ++n) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + n);
        words[4 * n] = v.x, words[4 * n + 1] = v.y, words[4 * n + 2] = v.z, words[4 * n + 3] = v.w;
      }
    }
  }

  __device__ __forceinline__ void read_shared(uint32_t from) {
    static_assert(kBytes == 4 || kBytes == 8);
    if constexpr (kBytes == 4) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from));
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from));
    }
  }

  // One by one; those past `present` are not read and are zero.
  __device__ __forceinline__ void gather(const M* from, int64_t stride, int present) {
    constexpr int kBits = 8 * static_cast<int>(sizeof(M));
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      uint32_t bits = 0;
      if (n < present) {
        if constexpr (kBits == 8) {
          bits = __ldg(reinterpret_cast<const unsigned char*>(from + n * stride));
        } else if constexpr (kBits == 16) {
          bits = __ldg(reinterpret_cast<const unsigned short*>(from + n * stride));
        } else {
          bits = __ldg(reinterpret_cast<const unsigned*>(from + n * stride));
        }
      }
      const int word = n * kBits / 32, shift = n * kBits % 32;
      words[word] = shift == 0 ? bits : words[word] | bits << shift;
    }
  }

  // Whether no entry changes a score.
  __device__ __forceinline__ bool keeps_all() const {
    static_assert(sizeof(M) == 1);
    bool all = true;
#pragma unroll
    for (const uint32_t word : words) all &= word == (kBytes == 2 ? 0x0101u : 0x01010101u);
    return all;
  }

  // An entry of a bool mask.
  __device__ __forceinline__ bool takes_part(int n) const { return (words[n / 4] & 0xffu << n % 4 * 8) != 0; }

  // Each entry becomes the lower one of the two.
  __device__ __forceinline__ void take_lower(const MaskRun& other) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(words) / 4); ++i) {
      if constexpr (sizeof(M) == 4) {
        words[i] = __float_as_uint(fminf(__uint_as_float(words[i]), __uint_as_float(other.words[i])));
      } else {
        using Pair = std::conditional_t<std::is_same_v<M, __half>, __half2, __nv_bfloat162>;
        Pair a, b;
        memcpy(&a, &words[i], sizeof(a));
        memcpy(&b, &other.words[i], sizeof(b));
        a = __hmin2(a, b);
        memcpy(&words[i], &a, sizeof(a));
      }
    }
  }

  // The lowest entry.
  __device__ __forceinline__ float lowest() const {
    if constexpr (sizeof(M) == 4) {
      float x = __uint_as_float(words[0]);
#pragma unroll
      for (const uint32_t word : words) x = fminf(x, __uint_as_float(word));
      return x;
    } else {
      using Pair = std::conditional_t<std::is_same_v<M, __half>, __half2, __nv_bfloat162>;
      Pair x;
      memcpy(&x, &words[0], sizeof(x));
#pragma unroll
      for (const uint32_t word : words) {
        Pair y;
        memcpy(&y, &word, sizeof(y));
        x = __hmin2(x, y);
      }
      return fminf(static_cast<float>(x.x), static_cast<float>(x.y));
    }
  }

  __device__ __forceinline__ float bias(int n) const {
    if constexpr (sizeof(M) == 4) {
      return __uint_as_float(words[n]);
    } else {
      const auto bits = static_cast<unsigned short>(words[n / 2] >> n % 2 * 16);
      M entry;
      memcpy(&entry, &bits, sizeof(M));
      return static_cast<float>(entry);
    }
  }

  // The score with this entry: as it was for a bool mask, an exponent of two for a float mask. -inf takes no part,
  // whatever the score was, NaN too. kPlain: no entry is below kLowestPlainBias.
  template <bool kPlain>
  __device__ __forceinline__ float apply(float score, float scale_log2, int n) const {
    if constexpr (sizeof(M) == 1) {
      return takes_part(n) ? score : -INFINITY;

    } else if constexpr (kPlain) {
      return fmaf(score, scale_log2, bias(n) * kLog2E);
    } else {
      const float exponent = bias(n) * kLog2E;
      const float sum = fmaf(score, scale_log2, exponent < kLowestBias ? kLowestBias : exponent);
      return bias(n) == -INFINITY ? -INFINITY : sum;
    }
  }
};

// The mask of one (batch, head).
template <class M>
struct HeadMask {
  const M* data;
  int64_t query_stride, key_stride;
  int L, S;

  __device__ __forceinline__ HeadMask(const ForwardParams& p, int batch, int head)
      : data(static_cast<const M*>(p.attn_mask.data) + batch * p.attn_mask.stride[0] + head * p.attn_mask.stride[1]),
        query_stride(p.attn_mask.stride[2]),
        key_stride(p.attn_mask.stride[3]),
        L(static_cast<int>(p.L)),
        S(static_cast<int>(p.S)) {}

  // Whether every run of `bytes` whose first key is a multiple of its length may be read at once.
  __device__ __forceinline__ bool is_aligned(int bytes) const {
    const auto bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(query_stride * sizeof(M));
    return key_stride == 1 && bits % bytes == 0;
  }
  // Run n is that of query + offset(n), and offset grows. A query past the last gets the last one's entries: what
  // becomes of its scores is nobody's concern.
  template <int kCount, int kRuns, class Offset>
  __device__ __forceinline__ void read(MaskRun<M, kCount> (&run)[kRuns], int query, int key, Offset offset) const {
    if (is_aligned(MaskRun<M, kCount>::kAlignment) && key + kCount <= S && query + offset(kRuns - 1) < L) {
      const M* const from = data + query * query_stride + key;
#pragma unroll
      for (int n = 0; n < kRuns; ++n) run[n].read_wide(from + offset(n) * query_stride);
    } else {
#pragma unroll
      for (int n = 0; n < kRuns; ++n) {
        const M* const from = data + min(query + offset(n), L - 1) * query_stride + key * key_stride;
        run[n].gather(from, key_stride, S - key);
      }
    }
  }
};

// Calls f with a null pointer of the mask's element type; with a null pointer to void if there is no mask.
template <class F>
__device__ __forceinline__ void with_mask_type(MaskKind kind, F f) {
  switch (kind) {
    case MaskKind::kBool:
      return f(static_cast<const uint8_t*>(nullptr));
    case MaskKind::kFloat16:
      return f(static_cast<const __half*>(nullptr));
    case MaskKind::kBFloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case MaskKind::kFloat32:
      return f(static_cast<const float*>(nullptr));
    default:
      return f(static_cast<const void*>(nullptr));
  }
}

// A bool mask that is the same for every query (key padding): whether any of the keys [key, key + kKeys) takes part.
// True for every other mask. All lanes of a warp must ask together.
template <int kKeys>
__device__ __forceinline__ bool any_key_takes_part(const ForwardParams& p, int batch, int head, int key) {
  if (p.mask_kind != MaskKind::kBool || p.attn_mask.stride[2] != 0) return true;
  const HeadMask<uint8_t> mask(p, batch, head);
  bool any = false;
#pragma unroll
  for (int n = 0; n < kKeys; n += 32) {
    const int k = key + n + static_cast<int>(threadIdx.x % 32);
    any |= k < mask.S && mask.data[k * mask.key_stride] != 0;
  }
  return __any_sync(0xffffffffu, any);
}

// Whether masked scores are exponents of two already.
__device__ __forceinline__ bool mask_scales(MaskKind kind) {
  return kind != MaskKind::kNone && kind != MaskKind::kBool;
}

// True if all of a warp's runs are plain in the sense of MaskRun::apply.
template <class M, int kCount, int kRuns>
__device__ __forceinline__ bool are_plain(const MaskRun<M, kCount> (&run)[kRuns]) {
  float lowest = run[0].lowest();
#pragma unroll
  for (int n = 1; n < kRuns; ++n) lowest = fminf(lowest, run[n].lowest());
  return __all_sync(0xffffffffu, lowest > kLowestPlainBias);
}

// A mask that all batches share is read from memory once, and its gradient written once, if the blocks of one head and
// all batches run side by side. Gives the batch and head of the number-th block: batch * heads + head.
__device__ __forceinline__ int side_by_side(const ForwardParams& p, int number, int heads) {
  if (p.attn_mask.stride[0] != 0 || p.attn_mask.stride[1] == 0) return number;
  const int batches = static_cast<int>(p.B);
  return number % batches * heads + number / batches;
}

// Forward, float mask (and bool, if kTakesBool): this lane's entries for one step's scores. They are read before the
// step's product, so that the loads are on their way meanwhile, unless they take more than kEarlyWords registers a row.
template <int kRowBlocks, int kCols, int kEarlyWords, bool kTakesBool>
struct FloatMask {
  static constexpr int kRuns = 2 * kRowBlocks, kKeys = 2 * kCols;
  uint32_t words[kRuns][kEarlyWords > 0 ? kEarlyWords : 1];

  template <class M>
  static constexpr bool kTakes = !std::is_void_v<M> && (kTakesBool || !std::is_same_v<M, uint8_t>);
  template <class M>
  static constexpr bool kIsEarly = kKeys * sizeof(M) <= kEarlyWords * 4;

  static __device__ __forceinline__ constexpr int offset(int n) { return n * 8; }

  // `query` and `key` are this lane's first.
  __device__ __forceinline__ void read_early(const ForwardParams& p, int batch, int head, int query, int key) {
    with_mask_type(p.mask_kind, [&]<class M>(const M*) {
      if constexpr (kTakes<M>) {
        if constexpr (kIsEarly<M>) {
          MaskRun<M, kKeys> run[kRuns];
          HeadMask<M>(p, batch, head).read(run, query, key, offset);
#pragma unroll
          for (int n = 0; n < kRuns; ++n) memcpy(words[n], run[n].words, sizeof(run[n].words));
        }
      }
    });
  }

  __device__ __forceinline__ void apply(float (&scores)[kRowBlocks][kCols][4], const ForwardParams& p, int batch,
                                        int head, int query, int key, float scale_log2) const {
    with_mask_type(p.mask_kind, [&]<class M>(const M*) {
      if constexpr (kTakes<M>) {
        constexpr int kWidest = sizeof(M) == 1 ? 8 : 16 / sizeof(M);
        constexpr int kCount = kIsEarly<M> || kWidest > kKeys ? kKeys : kWidest;
#pragma unroll
        for (int first = 0; first < kKeys; first += kCount) {
          MaskRun<M, kCount> run[kRuns];
          if constexpr (kIsEarly<M>) {
#pragma unroll
            for (int n = 0; n < kRuns; ++n) memcpy(run[n].words, words[n], sizeof(run[n].words));
          } else {
            HeadMask<M>(p, batch, head).read(run, query, key + first, offset);
          }
          const auto each = [&]<bool kPlain>(std::bool_constant<kPlain>) {
#pragma unroll
            for (int row = 0; row < kRuns; ++row) {
#pragma unroll
              for (int n = 0; n < kCount; ++n) {
                float& score = scores[row / 2][(first + n) / 2][row % 2 * 2 + n % 2];
                score = run[row].template apply<kPlain>(score, scale_log2, n);
              }
            }
          };
          if constexpr (sizeof(M) == 1) {
            each(std::true_type());
          } else if (are_plain(run)) {
            each(std::true_type());
          } else {
            each(std::false_type());
          }
        }
      }
    });
  }
};

}  // namespace sdpa
