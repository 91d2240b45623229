// Flash attention forward without mask and dropout on sm90 and newer, for operands whose rows are whole aligned chunks:
// flash_fwd.cuh's loop, but keys and values are copied box by box, by one thread. With cp.async the copies alone take
// 10 to 20 % of the time at 96 columns, more the more rows a warp's instruction touches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../arch/tensor_copy.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "tile.cuh"
#include "tile_stream.cuh"

namespace sdpa {

template <class Arch, class T, int kHeadDim>
struct FlashForwardTensor {
  static constexpr int kWarps = 4, kThreads = kWarps * 32;
  static constexpr int kRowBlocks = 2, kWarpRows = kRowBlocks * 16, kQueryTile = kWarps * kWarpRows;
  static constexpr int kKeyTile = 64;
  static constexpr int kSteps = kHeadDim / 16;  // k-steps of Q K^T
  static constexpr int kBlocksPerSm = 2;
  using QueryTile = SharedTile<T, kQueryTile, kHeadDim, Arch, false, true>;
  using KeyTile = BoxedTile<T, kKeyTile, kHeadDim, Arch>;  // of values too
  using Range = BlockRange<kQueryTile, kKeyTile>;
  using Barrier = SharedBarrier<Arch>;
  static constexpr int kBarrierOffset = QueryTile::kBytes + 4 * KeyTile::kBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 2 * Barrier::kBytes;
  static_assert(kSharedBytes <= kSm90SharedBytes / kBlocksPerSm);
  static_assert(QueryTile::kBytes % 1024 == 0);
};

template <class Arch, class T, int kHeadDim>
__global__ void __launch_bounds__(FlashForwardTensor<Arch, T, kHeadDim>::kThreads,
                                  FlashForwardTensor<Arch, T, kHeadDim>::kBlocksPerSm)
    flash_forward_tensor_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ BlockOrder order,
                                const __grid_constant__ CUtensorMap key_map,
                                const __grid_constant__ CUtensorMap value_map, const float scale_log2) {
  if constexpr (kIsBeforeSm90) return;
  using Flash = FlashForwardTensor<Arch, T, kHeadDim>;
  using KeyTile = typename Flash::KeyTile;
  using Product = Mma<Arch, T>;
  constexpr int kRowBlocks = Flash::kRowBlocks, kKeyTile = Flash::kKeyTile, kSteps = Flash::kSteps;
  extern __shared__ __align__(1024) unsigned char shared[];

  // Work of this block.
  int tile_number, batch_head;
  if (!order.locate_quickly(tile_number, batch_head)) return;
  const int q0 = (static_cast<int>(order.tiles) - 1 - tile_number) * Flash::kQueryTile;  // the longest first
  const int heads = static_cast<int>(p.H), batch = batch_head / heads, head = batch_head % heads;
  const int key_head = head / static_cast<int>(p.group);
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};
  // Keys from here on are seen by no query of the block, those before the other one by all.
  const int key_end = p.is_causal ? min(range.S, q0 + Flash::kQueryTile) : range.S;
  const int full_end = p.is_causal ? min(range.S, q0 + 1) : range.S;

  // Shared memory: query | two stages of keys | two of values | a barrier for each. The output leaves through the
  // query's place.
  const uint32_t base = shared_address(shared);
  const typename Flash::QueryTile query_tile{base};
  const auto key_tile = [&](uint32_t stage) {
    return KeyTile{base + Flash::QueryTile::kBytes + stage * KeyTile::kBytes};
  };
  const auto value_tile = [&](uint32_t stage) { return key_tile(2 + stage); };
  const auto full = [&](uint32_t stage) {
    return typename Flash::Barrier{base + Flash::kBarrierOffset + stage * Flash::Barrier::kBytes};
  };
  const auto fetch = [&](int k0, uint32_t stage) {
    const uint32_t barrier = full(stage).address;
    expect_bytes(barrier, 2 * KeyTile::kBytes);
#pragma unroll
    for (int i = 0; i < 2 * KeyTile::kBoxes; ++i) {
      const bool is_key = i < KeyTile::kBoxes;
      const int number = i % KeyTile::kBoxes;
      copy_box((is_key ? key_tile(stage) : value_tile(stage)).box(number).base, is_key ? key_map : value_map,
               number * KeyTile::kBoxCols, k0, key_head, batch, barrier);
    }
  };
  if (threadIdx.x == 0) {
    full(0).init(1), full(1).init(1);
    fence_barrier_init();
    fetch(0, 0);
  }
  using QueryStream = TileStream<typename Flash::QueryTile, Flash::kThreads, InOrder, kHeadDim>;
  QueryStream::fill(query_tile, QueryStream::first_row(p.query, batch, head, p.E),
                    static_cast<int>(p.query.stride[2] * 2), q0, range.L, static_cast<int>(p.E), true);
  wait_for_copies<Arch>();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_block = warp * kRowBlocks;  // of 16 rows, in the query tile
  const auto query_offset = Flash::QueryTile::lane_offset();
  const auto lane_offset = KeyTile::lane_offset();
  const typename Flash::QueryTile query_rows{base + warp_block * 16 * Flash::QueryTile::kRowBytes};

  OnlineSoftmax<kRowBlocks, true> softmax(scale_log2);
  float output[kRowBlocks][kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int k0 = 0; k0 < key_end; k0 += kKeyTile) {
    const uint32_t turn = k0 / kKeyTile, stage = turn % 2;
    __syncthreads();  // every warp is done with the tile before, whose stage is filled next
    if (threadIdx.x == 0 && k0 + kKeyTile < key_end) fetch(k0 + kKeyTile, stage ^ 1);
    full(stage).wait(turn / 2 % 2);
    const KeyTile keys = key_tile(stage), values = value_tile(stage);

    // S = Q K^T
    float scores[kRowBlocks][kKeyTile / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t q[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) query_rows.load_a(q[m], query_offset, m, k);
#pragma unroll
      for (int n = 0; n < kKeyTile / 16; ++n) {
        uint32_t b[4];
        keys.load_b_transposed(b, lane_offset, n, k);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          Product::add(scores[m][2 * n], q[m], b[0], b[1]);
          Product::add(scores[m][2 * n + 1], q[m], b[2], b[3]);
        }
      }
    }

    // What must not be attended to is replaced, so that no NaN in it survives.
    if (k0 + kKeyTile > full_end) {
      const TileLimit limit = range.limit(q0, k0);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = (warp_block + m) * 16 + lane / 4 + i / 2 * 8;
            if (!limit.sees(row, n * 8 + lane % 4 * 2 + i % 2)) scores[m][n][i] = -INFINITY;
          }
        }
      }
    }

    softmax.see(scores, output, k0 == 0);

    // O += P V. Each 16 keys' exp2 stand right before their mma, so that the two pipes overlap.
#pragma unroll
    for (int k = 0; k < kKeyTile / 16; ++k) {
      uint32_t probability[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        softmax.exponentiate(scores[m][2 * k], m);
        softmax.exponentiate(scores[m][2 * k + 1], m);
        to_operand<T>(probability[m], scores[m][2 * k], scores[m][2 * k + 1]);
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        values.load_b(b, lane_offset, k, n);
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          Product::add(output[m][2 * n], probability[m], b[0], b[1]);
          Product::add(output[m][2 * n + 1], probability[m], b[2], b[3]);
        }
      }
    }
  }

  // O and LSE.
  const int warp_row = q0 + warp * Flash::kWarpRows;
  float factors[kRowBlocks][2], logsumexp, rest;
  softmax.finish_all(factors, logsumexp, rest);
  const int row = warp_row + lane / 2 % 2 * 16 + lane % 2 * 8 + lane / 4;
  const int64_t i = int64_t{batch_head} * p.L + row;
  if (row < p.L && p.logsumexp != nullptr) p.logsumexp[i] = logsumexp;
  if (row < p.L && p.logsumexp_rest != nullptr) p.logsumexp_rest[i] = rest;
  const uint64_t target = QueryStream::first_row(p.output, batch, head, p.Ev);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) output[m][n][i] *= factors[m][i / 2];
    }
    store_rows<T, 0, kHeadDim / 8>(query_tile, warp_block + m, output[m], target,
                                   static_cast<int>(p.output.stride[2] * 2), warp_row + m * 16, static_cast<int>(p.L),
                                   static_cast<int>(p.Ev));
  }
}

// For what streams_forward takes. `done` tells whether this chip and this code do, too.
template <class Arch, class T, int kHeadDim>
cudaError_t flash_forward_tensor(const ForwardParams& p, cudaStream_t stream, bool& done) {
  using Flash = FlashForwardTensor<Arch, T, kHeadDim>;
  constexpr auto kKernel = flash_forward_tensor_kernel<Arch, T, kHeadDim>;
  done = false;
  CUtensorMap maps[2];
  constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const auto describe = [&](CUtensorMap& map, const Operand& x, int64_t cols) {
    return describe_tensor(map, x, p.B, p.H / p.group, p.S, cols, Flash::kKeyTile, Flash::KeyTile::kBoxCols,
                           kIsBFloat16);
  };
  if (p.shared_bytes < kSm90SharedBytes || !runs_as_sm90<kKernel>() || !describe(maps[0], p.key, p.E) ||
      !describe(maps[1], p.value, p.Ev)) {
    return cudaSuccess;
  }
  done = true;
  const int64_t query_tiles = (p.L + Flash::kQueryTile - 1) / Flash::kQueryTile;
  const auto order = BlockOrder::make(query_tiles, p.B * p.H, p.S * (p.E + p.Ev) * sizeof(T) / p.group);
  if (std::max({p.L, p.S, p.B * p.H}) > kMaxPosition) return cudaErrorInvalidValue;
  if (order.blocks() == 0) return cudaSuccess;
  if (const auto error = allow_shared_bytes<kKernel>(Flash::kSharedBytes); error != cudaSuccess) return error;
  kKernel<<<dim3(order.grid_x(), order.grid_y()), Flash::kThreads, Flash::kSharedBytes, stream>>>(
      p, order, maps[0], maps[1], p.scale * kLog2E);
  return cudaGetLastError();
}

}  // namespace sdpa
