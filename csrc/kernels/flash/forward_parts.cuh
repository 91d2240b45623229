// What forward kernels have in common: a warp's work on one tile of keys and values, what it writes, and the launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../arch/mma.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

// The work of a block that has one query tile of a head, those with most keys first.
struct ForwardWork {
  int q0, batch_head, batch, head, key_head;
  // Keys from key_end on are seen by no query of the block, those before full_end by all.
  int key_end, full_end;

  // False for a block without work.
  template <int kQueryTile>
  __device__ __forceinline__ bool find(const ForwardParams& p, const BlockOrder& order) {
    int tile;
    if (!order.locate_quickly(tile, batch_head)) return false;
    take<kQueryTile>(p, static_cast<int>(order.tiles) - 1 - tile);
    return true;
  }
  // Query tile `tile` of the head, of which batch_head tells.
  template <int kQueryTile>
  __device__ __forceinline__ void take(const ForwardParams& p, int tile) {
    q0 = tile * kQueryTile;
    const int heads = static_cast<int>(p.H), S = static_cast<int>(p.S);
    batch = batch_head / heads, head = batch_head % heads;
    key_head = head / static_cast<int>(p.group);
    key_end = p.is_causal ? min(S, q0 + kQueryTile) : S;
    full_end = p.is_causal ? min(S, q0 + 1) : S;
  }
};

// S = Q K^T, where load_query(q, k) fetches k-step k of the warp's rows. after(k) is called after each k-step: to issue
// copies while the tensor cores are busy.
template <class Product, int kSteps, int kRowBlocks, int kCols, class KeyTile, class LoadQuery, class After>
__device__ __forceinline__ void multiply_scores(float (&scores)[kRowBlocks][kCols][4], const KeyTile& keys,
                                                const LaneOffset& lane_offset, LoadQuery load_query, After after) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t q[kRowBlocks][4];
    load_query(q, k);
#pragma unroll
    for (int n = 0; n < kCols / 2; ++n) {
      uint32_t b[4];
      keys.load_b_transposed(b, lane_offset, n, k);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        Product::add(scores[m][2 * n], q[m], b[0], b[1]);
        Product::add(scores[m][2 * n + 1], q[m], b[2], b[3]);
      }
    }
    after(k);
  }
}

// What must not be attended to is replaced, so that no NaN in it survives. The warp's rows begin at the tile's
// row_block, its keys are in the given order.
template <class Order = InOrder, int kRowBlocks, int kCols>
__device__ __forceinline__ void hide_unseen(float (&scores)[kRowBlocks][kCols][4], const TileLimit& limit,
                                            int row_block) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (row_block + m) * 16 + lane / 4 + i / 2 * 8;
        if (!limit.sees(row, Order::key(n * 8 + lane % 4 * 2 + i % 2))) scores[m][n][i] = -INFINITY;
      }
    }
  }
}

// O += P V of the values' 16 rows `block`.
template <class Product, int kRowBlocks, int kOutCols, class ValueTile>
__device__ __forceinline__ void add_products(float (&output)[kRowBlocks][kOutCols][4],
                                             const uint32_t (&probability)[kRowBlocks][4], const ValueTile& values,
                                             const LaneOffset& lane_offset, int block) {
#pragma unroll
  for (int n = 0; n < kOutCols / 2; ++n) {
    uint32_t b[4];
    values.load_b(b, lane_offset, block, n);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      Product::add(output[m][2 * n], probability[m], b[0], b[1]);
      Product::add(output[m][2 * n + 1], probability[m], b[2], b[3]);
    }
  }
}

// O += P V. Each 16 keys' exp2 stand right before their mma, so that the two pipes overlap.
template <class T, class Product, int kRowBlocks, int kCols, int kOutCols, class Softmax, class ValueTile>
__device__ __forceinline__ void add_values(float (&output)[kRowBlocks][kOutCols][4], Softmax& softmax,
                                           float (&scores)[kRowBlocks][kCols][4], const ValueTile& values,
                                           const LaneOffset& lane_offset) {
#pragma unroll
  for (int k = 0; k < kCols / 2; ++k) {
    uint32_t probability[kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      softmax.exponentiate(scores[m][2 * k], m);
      softmax.exponentiate(scores[m][2 * k + 1], m);
      to_operand<T>(probability[m], scores[m][2 * k], scores[m][2 * k + 1]);
    }
    add_products<Product>(output, probability, values, lane_offset, k);
  }
}

// The LSE of a warp's 32 rows from warp_row on, and what their sums are to be multiplied by.
template <class Softmax>
__device__ __forceinline__ void write_statistics(float (&factors)[2][2], Softmax& softmax, const ForwardParams& p,
                                                 int batch_head, int warp_row) {
  const int lane = threadIdx.x % 32;
  float logsumexp, rest;
  softmax.finish_all(factors, logsumexp, rest);
  const int row = warp_row + lane / 2 % 2 * 16 + lane % 2 * 8 + lane / 4;
  const int64_t i = int64_t{batch_head} * p.L + row;
  if (row < p.L && p.logsumexp != nullptr) p.logsumexp[i] = logsumexp;
  if (row < p.L && p.logsumexp_rest != nullptr) p.logsumexp_rest[i] = rest;
}

// The output of those rows, to the head whose first row is at `target`, 16 rows at a time through the rows of a tile
// that begin at row_block(m).
template <class T, int kOutCols, class Tile, class RowBlock>
__device__ __forceinline__ void write_output(float (&output)[2][kOutCols][4], const float (&factors)[2][2],
                                             const Tile& tile, RowBlock row_block, const ForwardParams& p,
                                             uint64_t target, int warp_row) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kOutCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) output[m][n][i] *= factors[m][i / 2];
    }
    store_rows<T>(tile, row_block(m), output[m], target, static_cast<int>(p.output.stride[2] * 2), warp_row + m * 16,
                  static_cast<int>(p.L), static_cast<int>(p.Ev));
  }
}

template <class Flash, class T>
BlockOrder forward_order(const ForwardParams& p) {
  const int64_t query_tiles = (p.L + Flash::kQueryTile - 1) / Flash::kQueryTile;
  return BlockOrder::make(query_tiles, p.B * p.H, p.S * (p.E + p.Ev) * sizeof(T) / p.group);
}

// Whether blocks of eight warps pay: a multiprocessor has room for one of Flash's blocks of four, and more to do.
template <class Flash, class T>
cudaError_t wants_eight_warps(const ForwardParams& p, bool& wants) {
  int multiprocessors = 0;
  if (const auto error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  wants = !fits_twice<Flash>(p) && forward_order<Flash, T>(p).blocks() > multiprocessors;
  return cudaSuccess;
}

// kKernel(p, order, arguments...), a block for each query tile. Flash describes the kernel.
template <class Flash, auto kKernel, class T, class... Arguments>
cudaError_t launch_query_tiles(const ForwardParams& p, cudaStream_t stream, const Arguments&... arguments) {
  const auto order = forward_order<Flash, T>(p);
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  if (order.blocks() == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  kKernel<<<dim3(order.grid_x(), order.grid_y()), Flash::kThreads, Flash::kSharedBytes, stream>>>(p, order,
                                                                                                  arguments...);
  return cudaGetLastError();
}

}  // namespace sdpa
