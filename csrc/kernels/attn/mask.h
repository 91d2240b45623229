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

  // Calls f(bias) once; bias(query, key) is what is added to that score. It is -inf for a score that takes no part: one
  // masked out, outside causality or outside L x S. The kind is looked at out here, so that loads in a loop inside f
  // can be in flight together.
  template <class F>
  __device__ __forceinline__ void read(F f) const {
    switch (kind) {
      case MaskKind::kNone:
        return f([this](int query, int key) { return sees(query, key) ? 0.f : -INFINITY; });
      case MaskKind::kBool:
        return f([this](int query, int key) {
          return sees(query, key) && entry<uint8_t>(query, key) != 0 ? 0.f : -INFINITY;
        });
      case MaskKind::kFloat16:
        return f([this](int query, int key) {
          return sees(query, key) ? __half2float(entry<__half>(query, key)) : -INFINITY;
        });
      case MaskKind::kBFloat16:
        return f([this](int query, int key) {
          return sees(query, key) ? __bfloat162float(entry<__nv_bfloat16>(query, key)) : -INFINITY;
        });
      case MaskKind::kFloat32:
        return f([this](int query, int key) { return sees(query, key) ? entry<float>(query, key) : -INFINITY; });
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
  template <class M>
  __device__ M entry(int query, int key) const {
    return static_cast<const M*>(data)[query * query_stride + key * key_stride];
  }
};

}  // namespace sdpa
