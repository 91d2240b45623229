// What a block of the float32 kernels works on, in shared memory: the products need all registers.
#pragma once

#include "../attn/block_range.h"
#include "pair_softmax.h"
#include "pair_tile.h"

namespace sdpa::efficient {

// Forward: some queries of a head.
struct QueryPlace {
  struct Work {
    int first_query, batch, head, key_head;
  };
  const ForwardParams& p;
  uint32_t address;  // of 16 bytes

  // By one thread. The longest first.
  __device__ __forceinline__ void put(const BlockOrder& order, int tile_index, int head_index, int rows) const {
    const unsigned heads = static_cast<unsigned>(p.H), index = static_cast<unsigned>(head_index);
    const unsigned head = index % heads;
    store_shared_16(address, {static_cast<unsigned>(order.tiles - 1 - tile_index) * rows, index / heads, head,
                              head / static_cast<unsigned>(p.group)});
  }
  __device__ __forceinline__ Work operator()() const {
    const uint4 v = load_shared_16(address);
    return {static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), static_cast<int>(v.w)};
  }
  __device__ __forceinline__ Matrix<const float> queries() const {
    return Matrix<const float>::of(p.query, (*this)().batch, (*this)().head, p.L, p.E);
  }
  __device__ __forceinline__ Matrix<const float> keys() const {
    return Matrix<const float>::of(p.key, (*this)().batch, (*this)().key_head, p.S, p.E);
  }
  __device__ __forceinline__ Matrix<const float> values() const {
    return Matrix<const float>::of(p.value, (*this)().batch, (*this)().key_head, p.S, p.Ev);
  }
};

// Backward: some keys of a head.
struct KeyPlace {
  struct Work {
    int batch, key_head;
  };
  const BackwardParams& p;
  uint32_t address;  // of 16 bytes

  // By one thread.
  __device__ __forceinline__ void put(int key_head_index, int key_heads) const {
    const unsigned index = static_cast<unsigned>(key_head_index), heads = static_cast<unsigned>(key_heads);
    store_shared_16(address, {index / heads, index % heads, 0, 0});
  }
  __device__ __forceinline__ Work operator()() const {
    const float2 v = load_shared_8(address);
    return {__float_as_int(v.x), __float_as_int(v.y)};
  }
  __device__ __forceinline__ Matrix<const float> keys() const {
    return Matrix<const float>::of(p.key, (*this)().batch, (*this)().key_head, p.seen_keys, p.E);
  }
  __device__ __forceinline__ Matrix<const float> values() const {
    return Matrix<const float>::of(p.value, (*this)().batch, (*this)().key_head, p.seen_keys, p.Ev);
  }
  __device__ __forceinline__ Matrix<const float> queries(int head) const {
    return Matrix<const float>::of(p.query, (*this)().batch, head, p.L, p.E);
  }
  __device__ __forceinline__ Matrix<const float> grads(int head) const {
    return Matrix<const float>::of(p.grad_output, (*this)().batch, head, p.L, p.Ev);
  }
  // Of the thread's own query, of kQueries.
  template <int kQueries>
  __device__ __forceinline__ QueryStatistics statistics(int head, int first_query) const {
    const int row = fresh_thread_index();
    return row < kQueries ? pair_statistics(p, int64_t{(*this)().batch} * p.H + head, first_query + row)
                          : QueryStatistics{};
  }
};

}  // namespace sdpa::efficient
