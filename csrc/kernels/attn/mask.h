// What keeps a query from seeing a key: nothing, causality, or a tensor given by the caller. One type for every kernel:
// it bounds the loop over tiles, says which tiles need a look at single scores, and what is added to those.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "params.h"

namespace sdpa {

// The mask of one (batch, head). Scores are in natural units: query . key * scale.
struct Mask {
  const void* data;      // element (0, 0) of this head's mask; unused if kind is kNone
  int64_t query_stride;  // in elements; 0 where the mask broadcasts
  int64_t key_stride;
  MaskKind kind;
  bool is_causal;
  int L, S;

  __device__ static Mask of(const ForwardParams& p, int64_t b, int64_t h) {
    const Operand& m = p.attn_mask;
    const int64_t offset = b * m.stride[0] + h * m.stride[1];
    const char* data = static_cast<const char*>(m.data) + offset * element_bytes(p.mask_kind);
    return {data, m.stride[2], m.stride[3], p.mask_kind, p.is_causal, static_cast<int>(p.L), static_cast<int>(p.S)};
  }

  // Keys from here on are seen by none of the queries before query_end.
  __device__ int key_end(int query_end) const { return is_causal ? min(S, query_end) : S; }

  // Queries before this one see none of the keys from key_begin on.
  __device__ int query_begin(int key_begin) const { return is_causal ? min(L, key_begin) : 0; }

  // True if no score of the tile changes: no tensor, every score inside L x S, every key seen.
  __device__ bool passes(int query_begin, int query_end, int key_begin, int key_end) const {
    return kind == MaskKind::kNone && query_end <= L && key_end <= S && !(is_causal && key_end - 1 > query_begin);
  }

  // Calls f(bias) once; bias(query, key) is what is added to the scores of that query with keys key .. key + 3, where
  // key is a multiple of four. It is -inf for a score that takes no part: one masked out, outside causality or outside
  // L x S. The kind is looked at out here, so that loads in a loop inside f can be in flight together.
  template <class F>
  __device__ __forceinline__ void read(F f) const {
    switch (kind) {
      case MaskKind::kNone:
        return f([this](int query, int key) { return seen(query, key, 0.f, 0.f, 0.f, 0.f); });
      case MaskKind::kBool:
        return read_entries<uint8_t>(f);
      case MaskKind::kFloat16:
        return read_entries<__half>(f);
      case MaskKind::kBFloat16:
        return read_entries<__nv_bfloat16>(f);
      case MaskKind::kFloat32:
        return read_entries<float>(f);
      default:
        return;  // kFloat64 is the math backend's alone
    }
  }

  // What takes no part becomes -inf whatever it was, NaN too.
  __device__ static float add(float score, float bias) { return bias == -INFINITY ? -INFINITY : score + bias; }

 private:
  __host__ __device__ static int element_bytes(MaskKind kind) {
    return kind == MaskKind::kFloat32 ? 4 : kind == MaskKind::kBool ? 1 : 2;
  }
  __device__ bool sees(int query, int key) const { return query < L && key < S && !(is_causal && key > query); }
  __device__ float4 seen(int query, int key, float x, float y, float z, float w) const {
    return {sees(query, key) ? x : -INFINITY, sees(query, key + 1) ? y : -INFINITY,
            sees(query, key + 2) ? z : -INFINITY, sees(query, key + 3) ? w : -INFINITY};
  }

  __device__ static float bias_of(uint8_t keep) { return keep != 0 ? 0.f : -INFINITY; }
  __device__ static float bias_of(__half x) { return __half2float(x); }
  __device__ static float bias_of(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static float bias_of(float x) { return x; }

  template <class M>
  struct alignas(4 * sizeof(M)) Entries {
    M at[4];
  };

  // Four entries at once where they stand side by side and aligned, one after the other elsewhere.
  template <class M, class F>
  __device__ __forceinline__ void read_entries(F f) const {
    const M* const first = static_cast<const M*>(data);
    const auto biases = [this](int query, int key, const Entries<M>& e) {
      return seen(query, key, bias_of(e.at[0]), bias_of(e.at[1]), bias_of(e.at[2]), bias_of(e.at[3]));
    };
    if (key_stride == 1 && query_stride % 4 == 0 && S % 4 == 0 &&
        reinterpret_cast<uintptr_t>(data) % sizeof(Entries<M>) == 0) {
      f([=, this](int query, int key) {
        Entries<M> e = {};
        if (query < L && key < S) e = *reinterpret_cast<const Entries<M>*>(first + query * query_stride + key);
        return biases(query, key, e);
      });
    } else {
      f([=, this](int query, int key) {
        const M* const source = first + query * query_stride + key * key_stride;
        Entries<M> e = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (query < L && key + n < S) e.at[n] = source[n * key_stride];
        }
        return biases(query, key, e);
      });
    }
  }
};

}  // namespace sdpa
