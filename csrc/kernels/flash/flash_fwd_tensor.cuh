// Flash attention forward without mask and dropout on sm90 and newer, for operands whose rows are whole aligned chunks:
// flash_fwd.cuh's loop, but keys and values are copied box by box, by one thread. With cp.async the copies alone take
// 10 to 20 % of the time at 96 columns, more the more rows a warp's instruction touches.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../arch/arch.h"
#include "../arch/barrier.h"
#include "../arch/tensor_copy.h"
#include "../attn/block_range.h"
#include "../attn/launch.h"
#include "../attn/params.h"
#include "../attn/softmax.h"
#include "forward_parts.cuh"
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

  ForwardWork work{};
  if (!work.find<Flash::kQueryTile>(p, order)) return;
  const auto [q0, batch_head, batch, head, key_head, key_end, full_end] = work;
  const typename Flash::Range range{static_cast<int>(p.L), static_cast<int>(p.S), p.is_causal};

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

  const int warp = threadIdx.x / 32;
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

    float scores[kRowBlocks][kKeyTile / 8][4] = {};
    multiply_scores<Product, kSteps>(
        scores, keys, lane_offset,
        [&](uint32_t (&q)[kRowBlocks][4], int k) {
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) query_rows.load_a(q[m], query_offset, m, k);
        },
        [](int) {});
    if (k0 + kKeyTile > full_end) hide_unseen(scores, range.limit(q0, k0), warp_block);
    softmax.see(scores, output, k0 == 0);

    add_values<T, Product>(output, softmax, scores, values, lane_offset);
  }

  // O and LSE.
  const int warp_row = q0 + warp * Flash::kWarpRows;
  float factors[kRowBlocks][2];
  write_statistics(factors, softmax, p, batch_head, warp_row);
  write_output<T>(
      output, factors, query_tile, [&](int m) { return warp_block + m; }, p,
      QueryStream::first_row(p.output, batch, head, p.Ev), warp_row);
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
  return launch_query_tiles<Flash, kKernel, T>(p, stream, maps[0], maps[1], p.scale * kLog2E);
}

}  // namespace sdpa
